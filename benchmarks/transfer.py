"""Push and pull of one gigabyte: fleet against boto3 on the same S3, embedded against a bare ASGI receiver.

Embedded: API and daemons as `loractl up` starts them, SQLite and a folder. Fleet: the same commands on PostgreSQL and
SeaweedFS. Transfer is timed from the first byte to the last one accepted by the storage; the time to ``committed``
(with the whole base read, its tensors hashed) stands beside it. Every round pushes other bytes.
"""

import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from safetensors.numpy import save_file

from registry import transfer
from registry.client import RegistryClient
from registry.db.engine import Database
from registry.db.migrate import upgrade
from registry.files import digest_base
from registry.schemas import PushInfo
from registry.services.tokens import make_text
from tests import servers

from .table import Row, at_least, at_most, seconds

BYTES = 1 << 30
PART = 32 << 20
ROUNDS = 3
_BARE = """
import hashlib, os, sys

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    hasher, more = hashlib.sha256(), scope["method"] == "PUT"
    if more:
        with open(sys.argv[1], "wb") as file:
            while more:
                message = await receive()
                hasher.update(message.get("body", b""))
                file.write(message.get("body", b""))
                more = message.get("more_body", False)
            file.flush()
            os.fsync(file.fileno())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["method"] == "GET":
        with open(sys.argv[1], "rb") as file:
            while chunk := file.read(1 << 20):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": hasher.hexdigest().encode()})

import uvicorn
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""


@contextmanager
def program(command: list[str], url: str, env: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """A program of ours that serves ``url``, until the end of the block."""
    with subprocess.Popen(command, env=os.environ | (env or {}), stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    httpx.get(url)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


@contextmanager
def registry(env: dict[str, str]) -> Iterator[tuple[RegistryClient, dict[str, psutil.Process]]]:
    """API and daemons as processes, and a client."""
    [port] = servers.free_ports(1)
    url, token = f"http://127.0.0.1:{port}", make_text()
    env |= {
        "LORACTL_BROKER_URL": "memory://", "LORACTL_PUBLIC_URL": url, "LORACTL_SIGNING_KEY": secrets.token_hex(),
        "LORACTL_BOOTSTRAP_TOKEN": token, "LORACTL_PART_SIZE": str(PART), "LORACTL_MULTIPART_FROM": str(2 * PART),
    }  # fmt: skip
    database = Database(env["LORACTL_DATABASE_URL"])
    upgrade(database)
    database.close()
    api = [sys.executable, "-m", "uvicorn", "--factory", "registry.api.app:create_app", "--port", str(port)]
    with ExitStack() as stack:
        processes = {"API": stack.enter_context(program([*api, "--log-level", "warning"], f"{url}/health", env))}
        daemons = [sys.executable, "-m", "registry.daemons.run"]
        processes["verifier"] = stack.enter_context(program(daemons, f"{url}/health", env))
        client = stack.enter_context(RegistryClient(url, token))
        with tempfile.TemporaryDirectory() as warm:  # imports and pools are no growth
            round_trip(client, make_base(Path(warm) / "base", 4 << 20, 1000), Path(warm) / "out")
        yield client, processes


def make_base(folder: Path, size: int, seed: int) -> Path:
    """A base of ``size`` bytes in one file."""
    folder.mkdir(parents=True)
    random, count = np.random.default_rng(seed), max(1, size // (64 << 20))
    tensors = {f"layers.{i}.weight": random.integers(0, 1 << 16, size // count // 2, np.uint16) for i in range(count)}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Watch:
    """The largest memory of some processes beyond what they had at first."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.processes = processes
        self.first = {name: process.memory_info().rss for name, process in processes.items()}
        self.peak = dict(self.first)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            for name, process in self.processes.items():
                self.peak[name] = max(self.peak[name], process.memory_info().rss)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def growth(self, name: str) -> float:
        """Megabytes."""
        return (self.peak[name] - self.first[name]) / 1e6


def round_trip(client: RegistryClient, folder: Path, out: Path) -> dict[str, float]:
    """Seconds of transfer, of the time to committed after it, and of the pull."""
    base = digest_base(folder)
    scan = transfer.scanned("base", folder, base=base.digest)
    info: PushInfo = client.open_push("base", None, transfer.request_of(scan, None, transfer.table_of(base)))
    paths = {entry.digest: scan.files[entry.path] for entry in scan.manifest.files}
    push = seconds(lambda: transfer.upload(client, info, paths))
    commit = seconds(lambda: transfer.settle(client, info.id))
    pull = seconds(lambda: transfer.pull(client, info.version_digest, out))
    return {"push": push, "commit": commit, "pull": pull}


def compare(
    client: RegistryClient, folder: Path, size: int, peer: Callable[[Path, Path], dict[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Best times of ours and of the peer's, in turn."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(ROUNDS):
        base = make_base(folder / f"base-{seed}", size, seed)
        for best, found in (
            (theirs, peer(base / "model.safetensors", folder / f"peer-{seed}")),
            (ours, round_trip(client, base, folder / f"out-{seed}")),
        ):
            for name, value in found.items():
                best[name] = min(best.get(name, float("inf")), value)
    return ours, theirs


def bare(url: str) -> Callable[[Path, Path], dict[str, float]]:
    """One client hash and one stream to a program that hashes and fsyncs; and back."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def send(path: Path) -> None:
        expected = digest(path)
        with path.open("rb") as file:
            assert httpx.put(url, content=iter(lambda: file.read(1 << 20), b""), timeout=600).text == expected

    def fetch(path: Path) -> None:
        hasher = hashlib.sha256()
        with httpx.stream("GET", url, timeout=600) as answer, path.open("wb") as file:
            for chunk in answer.iter_raw(1 << 20):
                hasher.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    return lambda path, out: {"push": seconds(lambda: send(path)), "pull": seconds(lambda: fetch(out))}


def plain_s3(server: servers.S3Server) -> Callable[[Path, Path], dict[str, float]]:
    """boto3's own transfer manager, with SHA-256 per part, the same part size and as many threads."""
    client: Any = boto3.client(
        "s3", endpoint_url=server.endpoint, aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key, region_name=server.region,
        config=Config(request_checksum_calculation="when_required", max_pool_connections=transfer.THREADS),
    )  # fmt: skip
    how = TransferConfig(multipart_threshold=2 * PART, multipart_chunksize=PART, max_concurrency=transfer.THREADS)

    def both(path: Path, out: Path) -> dict[str, float]:
        key = f"peer/{path.parent.name}"
        extra = {"ChecksumAlgorithm": "SHA256"}
        push = seconds(lambda: client.upload_file(str(path), server.bucket, key, ExtraArgs=extra, Config=how))
        return {"push": push, "pull": seconds(lambda: client.download_file(server.bucket, key, str(out), Config=how))}

    return both


def rows(name: str, size: int, limit: float, against: str, found: tuple[Any, Any], watch: Watch) -> list[Row]:
    """The rows of one mode."""
    ours, theirs = found
    speed = {kind: f"{size / theirs[kind] / 1e6:.0f} MB/s" for kind in ("push", "pull")}
    notes = {
        "push": f"{size / ours['push'] / 1e6:.0f} MB/s; committed {ours['commit']:.1f} s later",
        "pull": f"{size / ours['pull'] / 1e6:.0f} MB/s, verified and fsynced",
    }
    made = [
        at_least(f"{kind} of {size / 1e9:.2g} GB, {name}", theirs[kind] / ours[kind], limit,
                 peer=f"{against}, {speed[kind]}", note=notes[kind])
        for kind in ("push", "pull")
    ]  # fmt: skip
    made += [at_most(f"{part}, memory growth, {name}", watch.growth(part), 100, unit="MB") for part in watch.processes]
    return made


def run(scale: float = 1.0) -> list[Row]:
    """Both modes."""
    size = int(BYTES * scale)
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch) / "embedded"
        folder.mkdir()
        [port] = servers.free_ports(1)
        url = f"http://127.0.0.1:{port}/"
        (folder / "bare").touch()
        stack.enter_context(program([sys.executable, "-c", _BARE, str(folder / "bare"), str(port)], url))
        env = {
            "LORACTL_MODE": "embedded", "LORACTL_DATA": str(folder),
            "LORACTL_DATABASE_URL": f"sqlite:///{folder / 'registry.db'}",
        }  # fmt: skip
        with registry(env) as (client, processes), Watch(processes) as watch:
            found = compare(client, folder, size, bare(url))
        made += rows("embedded", size, 0.7, "a bare ASGI receiver", found, watch)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        server = stack.enter_context(servers.seaweedfs())
        env = {
            "LORACTL_DATABASE_URL": stack.enter_context(servers.postgres()), "LORACTL_S3_BUCKET": server.bucket,
            "LORACTL_S3_ENDPOINT": server.endpoint, "LORACTL_S3_ACCESS_KEY": server.access_key,
            "LORACTL_S3_SECRET_KEY": server.secret_key, "LORACTL_S3_REGION": server.region,
        }  # fmt: skip
        with registry(env) as (client, processes), Watch(processes) as watch:
            found = compare(client, folder, size, plain_s3(server))
        made += rows("fleet", size, 0.9, "boto3", found, watch)
    return made
