"""Push and pull of 1 GB in embedded mode against a bare ASGI program, and against how little one could do.

The peer's push: hash the file once, send it in one request to a program that hashes it, writes it and fsyncs it. Its
pull: receive it, hash it, write it, fsync it. Both sides run under uvicorn, both clients are processes of their own,
and they take turns. Our push counts hashing, too, up to all bytes being in the store; the commit is told beside it,
since it waits for the verifier to read the file, which the peer does not.
"""

import hashlib
import http.client
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from starlette.types import Receive, Scope, Send

from tests import servers

from .gigabyte import WEIGHTS, make_adapter, renew, trip
from .house import ROOT, answers, apart, embedded, started
from .table import Row, at_least

ROUNDS = 3
CHUNK = 1 << 20


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """One file, in the working directory: PUT receives, hashes and fsyncs it, GET gives it back."""
    if scope["type"] != "http":
        return
    file = Path("file")  # blocking: bare means that nothing but this happens
    if scope["method"] == "PUT":
        hashed, more = hashlib.sha256(), True
        with file.open("wb") as out:
            while more:
                message = await receive()
                hashed.update(message["body"])
                out.write(message["body"])
                more = message["more_body"]
            out.flush()
            os.fsync(out.fileno())
        answer = hashed.hexdigest().encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"64")]})
        await send({"type": "http.response.body", "body": answer})
        return
    size = file.stat().st_size if file.exists() else 0
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(size).encode())]})
    if size:
        with file.open("rb") as given:
            while chunk := given.read(CHUNK):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body"})


def run(scale: float = 1.0) -> list[Row]:
    rounds = ROUNDS if scale >= 0.1 else 1
    [port] = servers.free_ports(1)
    command = ["/usr/bin/env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "uvicorn", f"{__name__}:bare"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-access-log", "--lifespan", "off"]
    with tempfile.TemporaryDirectory() as name:
        folder, peer = Path(name), f"http://127.0.0.1:{port}/"
        with started("bare", command, folder) as program, embedded(folder / "registry") as registry:
            program.wait_until(lambda: answers(peer))
            apart(trip, registry.url, registry.token, make_adapter(folder / "small", 0), "team/warm", folder / "warm")
            adapter = make_adapter(folder / "adapter", scale)
            size = (adapter / WEIGHTS).stat().st_size
            ours, theirs = [], []
            for number in range(rounds):
                renew(adapter)
                theirs.append(apart(_peer, peer, adapter / WEIGHTS, folder / "peer"))
                ours.append(apart(trip, registry.url, registry.token, adapter, f"team/bot-{number}", folder / "out"))
                shutil.rmtree(folder / "out")
    sent, received = (statistics.median(each) for each in zip(*theirs, strict=True))
    pushed, pulled = statistics.median(t.hashed + t.accepted for t in ours), statistics.median(t.pulled for t in ours)
    committed = statistics.median(t.committed for t in ours)
    return [
        at_least(
            "push, embedded: hashed, sent and stored", sent / pushed, 0.7,
            peer=f"a bare ASGI program and one hash, {size / sent / 1e6:.0f} MB/s",
            note=f"{size / pushed / 1e6:.0f} MB/s, {size / 1e9:.2f} GB; verified and committed after {committed:.1f} s",
        ),
        at_least(
            "pull, embedded: verified and synced", received / pulled, 0.7,
            peer=f"a bare ASGI program and one hash, {size / received / 1e6:.0f} MB/s",
            note=f"{size / pulled / 1e6:.0f} MB/s, {size / 1e9:.2f} GB",
        ),
    ]  # fmt: skip


def _peer(url: str, file: Path, out: Path) -> tuple[float, float]:
    """Seconds to hash and send, and to receive, hash, write and sync."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600, blocksize=CHUNK)
    began = time.perf_counter()
    with file.open("rb") as stream:
        hashed = hashlib.file_digest(stream, "sha256").hexdigest()
    with file.open("rb") as stream:
        connection.request("PUT", "/", stream, {"content-length": str(file.stat().st_size)})
        assert connection.getresponse().read().decode() == hashed
    sent = time.perf_counter() - began
    began, again = time.perf_counter(), hashlib.sha256()
    connection.request("GET", "/")
    answer = connection.getresponse()
    with out.open("wb") as target:
        while chunk := answer.read(CHUNK):
            again.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    assert again.hexdigest() == hashed
    return sent, time.perf_counter() - began
