"""A client killed 50 times at random bytes of its pushes: it resumes, sends no finished part twice, breaks no version.

The moment is drawn in bytes that the server received, so it falls into the middle of parts; the client is a process
of its own, and the signal is SIGKILL. Ten pushes are each killed five times and then left to finish; after every
kill the version must not be there, and at the end it must come back byte by byte.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from registry import transfer
from registry.core.errors import NotFound
from tests import live

from .table import Row, at_least, at_most

PUSHES, KILLS, PARTS = 10, 5, 48
PATIENCE_S = 120.0
CLIENT = """
import sys
from pathlib import Path
from registry import transfer
from registry.client import RegistryClient

url, token, file, name = sys.argv[1:]
with RegistryClient(url, token) as client:
    print(transfer.push_dataset(client, "dataset", Path(file), name).version_digest)
"""


def run(scale: float = 1.0) -> list[Row]:
    pushes, kills = max(1, round(PUSHES * scale)), KILLS if scale >= 0.2 else 2
    draw = random.Random(1)
    twice = broken = killed = inside = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "registry").mkdir()
        with live.registry(folder / "registry") as registry:
            for push in range(pushes):
                file = _rows(folder / "data.jsonl", PARTS * live.PART, draw)
                registry.seen.clear()
                series = f"team/data-{push}"
                line = [sys.executable, "-c", CLIENT, registry.url, registry.token, str(file), series]
                for _ in range(kills):
                    limit = registry.sent() + draw.randrange(PARTS * live.PART // (kills + 1))
                    dead = _kill_at(registry, line, limit)
                    killed += dead
                    inside += dead and any(put.status != 200 for put in registry.puts())
                    broken += dead and _there(registry, series)
                digest = subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()
                whole = [put.headers["x-amz-checksum-sha256"] for put in registry.puts() if put.status == 200]
                twice += len(whole) - len(set(whole))
                with registry.client() as client:
                    transfer.pull(client, digest, folder / f"out-{push}")
                broken += _sha256(folder / f"out-{push}" / "data.jsonl") != _sha256(file)
    note = f"{pushes} pushes of {PARTS} parts; {inside} kills with parts on their way"
    return [
        at_least("killed clients that resumed", killed, pushes * kills, unit="kills", note=note),
        at_most("finished parts sent again after kills", twice, 0, unit="parts"),
        at_most("broken versions after kills", broken, 0, unit="versions", note="each was pulled and compared"),
    ]


def _rows(path: Path, size: int, draw: random.Random) -> Path:
    """A dataset whose every part is another."""
    with path.open("w") as file:
        while file.tell() < size:
            row = {"prompt": f"{draw.getrandbits(400_000):x}", "completion": f"{draw.getrandbits(400_000):x}"}
            file.write(json.dumps(row) + "\n")
    return path


def _kill_at(registry: live.Live, line: list[str], limit: int) -> bool:
    """Start the client and kill it once the store received ``limit`` bytes; False when it had ended before."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + PATIENCE_S
        while registry.sent() <= limit and child.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the client sent {registry.sent()} of {limit} bytes")
            time.sleep(0.001)
        alive = child.poll() is None
        child.kill()
    return alive


def _there(registry: live.Live, series: str) -> bool:
    with registry.client() as client:
        try:
            client.dataset("dataset", series)
        except NotFound:
            return False
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
