"""The base digest: against the BLAKE3 library alone on the same bytes, against `cat`, and its memory.

The peer hashes the very same files with `blake3.update_mmap` and the same number of threads. Memory is measured in a
process of its own. Cold means that the files' pages were dropped from the page cache before each run.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from blake3 import blake3

from registry.files import cores, digest_base

from .table import Row, alternate, at_least, at_most, seconds

BYTES = 4 << 30
SHARDS = 4
_MEMORY = """
import sys
from pathlib import Path
from registry.files import digest_base

def peak():  # VmHWM, not ru_maxrss: that one starts at the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = peak()
digest_base(Path(sys.argv[1]))
print(peak() - before)
"""


def make_base(folder: Path, size: int) -> list[Path]:
    """A base of ``size`` random bytes over shards, with tensors as large as those of a 7B model in bf16."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    files = []
    for shard in range(SHARDS):
        left = size // SHARDS // 2  # elements of two bytes
        tensors = {}
        for index, elements in enumerate([65_000_000, *[45_000_000, 16_000_000] * left]):
            if left <= 0:
                break
            tensors[f"layers.{shard}.{index}.weight"] = random.integers(0, 1 << 16, min(elements, left), np.uint16)
            left -= elements
        files.append(folder / f"model-{shard + 1}-of-{SHARDS}.safetensors")
        save_file(tensors, files[-1])
    return files


def drop(files: list[Path]) -> None:
    """Drop the files' pages from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(scale: float = 1.0) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORACTL_BENCH_DIR")) as name:
        folder = Path(name)
        files = make_base(folder, int(BYTES * scale))
        size = sum(file.stat().st_size for file in files)
        threads = cores()

        def ours() -> None:
            digest_base(folder)

        def library() -> None:
            for file in files:
                blake3(max_threads=threads).update_mmap(file).digest()

        def cat() -> None:
            subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)

        ours()
        warm = alternate({"ours": ours, "library": library}, 5)
        cold: dict[str, float] = {"ours": float("inf"), "cat": float("inf")}
        for _ in range(3):
            for label, work in (("cat", cat), ("ours", ours)):
                drop(files)
                cold[label] = min(cold[label], seconds(work))
        growth = int(
            subprocess.run(
                [sys.executable, "-c", _MEMORY, str(folder)], check=True, capture_output=True, text=True
            ).stdout
        )
    speed = {label: f"{size / time / 1e9:.2f} GB/s" for label, time in (warm | {"cat": cold["cat"]}).items()}
    note = f"{size / 1e9:.1f} GB, {threads} threads, {speed['ours']}"
    return [
        at_least(
            "base digest, from the page cache", warm["library"] / warm["ours"], 0.9,
            peer=f"the BLAKE3 library, {speed['library']}", note=note,
        ),
        at_least(
            "base digest, from a cold disk", cold["cat"] / cold["ours"], 0.8, peer=f"cat, {speed['cat']}",
            note=f"{size / cold['ours'] / 1e9:.2f} GB/s",
        ),
        at_most("base digest, memory growth", growth / 1e6, 200, unit="MB", note=f"{size / 1e9:.1f} GB hashed"),
    ]  # fmt: skip
