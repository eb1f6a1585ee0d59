"""Push and pull of 1 GB in fleet mode against boto3, on the same S3 server, with the same part size and threads.

Sending counts from the first byte until the storage has accepted the last part; the peer is `upload_file`, which
hashes its parts to sign them as ours does. Pulling counts twice: until the last byte is here, against `download_file`
as it is; and until the file is verified and on the disk, against `download_file` followed by a SHA-256 and an fsync,
because a pull never gives a file its name before both. Both clients are processes of their own and take turns, each
with fresh bytes.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.client import Config

from registry.transfer import RANGE, THREADS
from tests import servers
from tests.world import SETTINGS

from .gigabyte import WEIGHTS, make_adapter, renew, trip
from .house import Memory, apart, fleet
from .table import Row, at_least, at_most

ROUNDS = 3
PART = SETTINGS.part_size


def run(scale: float = 1.0) -> list[Row]:
    rounds = ROUNDS if scale >= 0.1 else 1
    with (
        tempfile.TemporaryDirectory() as name,
        servers.postgres() as database,
        servers.seaweedfs() as storage,
        fleet(Path(name), database, storage) as registry,
    ):
        folder = Path(name)
        apart(trip, registry.url, registry.token, make_adapter(folder / "small", 0), "team/warm", folder / "warm")
        adapter = make_adapter(folder / "adapter", scale)
        size = (adapter / WEIGHTS).stat().st_size
        assert registry.daemons is not None
        api, daemons = Memory.of(registry.api), Memory.of(registry.daemons)
        ours, theirs = [], []
        for number in range(rounds):
            renew(adapter)
            theirs.append(apart(_boto3, storage, adapter / WEIGHTS, f"peer/{number}", folder / "peer"))
            ours.append(apart(trip, registry.url, registry.token, adapter, f"team/bot-{number}", folder / "out"))
            shutil.rmtree(folder / "out")
        grown = {"API": api.growth(), "verifier": daemons.growth()}
    sent, received, synced = (statistics.median(each) for each in zip(*theirs, strict=True))
    accepted, pulled = statistics.median(t.accepted for t in ours), statistics.median(t.pulled for t in ours)
    arrived = statistics.median(t.received for t in ours)
    hashed, committed = statistics.median(t.hashed for t in ours), statistics.median(t.committed for t in ours)
    same = f"{size / 1e9:.2f} GB, {THREADS} threads, SeaweedFS"
    return [
        at_least(
            "push, fleet: first byte to accepted by the storage", sent / accepted, 0.9,
            peer=f"boto3 upload_file, {size / sent / 1e6:.0f} MB/s",
            note=f"{size / accepted / 1e6:.0f} MB/s, {same}, parts of {PART >> 20} MiB; "
            f"hashing before it {hashed:.1f} s, "
            f"committed {committed:.1f} s after the start",
        ),
        at_least(
            "pull, fleet: until the last byte", received / arrived, 0.9,
            peer=f"boto3 download_file, {size / received / 1e6:.0f} MB/s",
            note=f"{size / arrived / 1e6:.0f} MB/s, {same}, ranges of {RANGE >> 20} MiB",
        ),
        at_least(
            "pull, fleet: until verified and synced", synced / pulled, 0.9,
            peer=f"boto3 download_file, then SHA-256 and fsync, {size / synced / 1e6:.0f} MB/s",
            note=f"{size / pulled / 1e6:.0f} MB/s",
        ),
        at_most("push and pull, fleet: client's memory", max(t.peak for t in ours), 300, unit="MB", note="all of it"),
        *(
            at_most(f"push and pull, fleet: growth of the {which}'s memory", grown[which], 100, unit="MB")
            for which in grown
        ),
    ]  # fmt: skip


def _boto3(server: servers.S3Server, file: Path, key: str, out: Path) -> tuple[float, float, float]:
    """Seconds that boto3 takes to send, to receive, and to receive, hash and sync."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
        config=Config(request_checksum_calculation="when_required", max_pool_connections=THREADS + 2),
    )
    up = TransferConfig(
        multipart_threshold=SETTINGS.multipart_from, multipart_chunksize=PART, max_concurrency=THREADS,
        preferred_transfer_client="classic",
    )  # fmt: skip
    down = TransferConfig(
        multipart_threshold=RANGE, multipart_chunksize=RANGE, max_concurrency=THREADS,
        preferred_transfer_client="classic",
    )  # fmt: skip
    began = time.perf_counter()
    client.upload_file(str(file), server.bucket, key, Config=up)
    sent = time.perf_counter() - began
    began = time.perf_counter()
    client.download_file(server.bucket, key, str(out), Config=down)
    received = time.perf_counter() - began
    with out.open("r+b") as file_:
        hashlib.file_digest(file_, "sha256")
        os.fsync(file_.fileno())
    synced = time.perf_counter() - began
    client.delete_object(Bucket=server.bucket, Key=key)
    out.unlink()
    return sent, received, synced
