"""A new base of 1 GB pushed in embedded mode: hashed while it is sent, hashed before it, and with its digest known.

Seconds count from a known base digest, as a merge leaves it, until the registry has accepted that every byte is in the
store; verification comes after that and is the same for all. The three take turns, each in a process of its own with
fresh bytes from the page cache, as files lie there that were just written.
"""

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from registry import files, transfer
from registry.client import RegistryClient
from registry.files import HashCache
from tests.factories import llama_config, tiny_base, write_json, write_safetensors

from .house import apart, embedded
from .table import Row, at_most

ROUNDS = 3
WIDTH, LAYERS = 4096, 16
WEIGHTS = "model.safetensors"


def run(scale: float = 1.0) -> list[Row]:
    rounds = ROUNDS if scale >= 0.1 else 1
    with tempfile.TemporaryDirectory() as name, embedded(Path(name) / "registry") as registry:
        apart(_push, registry.url, registry.token, tiny_base(Path(name) / "small"), "overlapped")  # both sides are warm
        took: dict[str, list[float]] = {"known": [], "before": [], "overlapped": []}
        for number in range(rounds):
            for way, seconds in took.items():
                folder = make_base(Path(name) / f"{way}-{number}", scale)
                size = (folder / WEIGHTS).stat().st_size
                seconds.append(apart(_push, registry.url, registry.token, folder, way))
                (folder / WEIGHTS).unlink()
    known, before, overlapped = (statistics.median(took[way]) for way in ("known", "before", "overlapped"))
    rate, note = partial(_rate, size), f"{size / 1e9:.2f} GB in one file; medians of {rounds}"
    return [
        at_most(
            "push of a new base, hashed while it is sent, against its digest known", overlapped / known, 1.1,
            unit="× the time", peer=f"digest known, {known:.1f} s, {rate(known)}",
            note=f"{overlapped:.1f} s, {rate(overlapped)}; {note}",
        ),
        at_most(
            "push of a new base, hashed while it is sent, against hashed before", overlapped / before, 1,
            unit="× the time", peer=f"hashed, then sent, {before:.1f} s, {rate(before)}",
            note=f"{overlapped:.1f} s, {rate(overlapped)}; {note}",
        ),
    ]  # fmt: skip


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:.0f} MB/s"


def make_base(folder: Path, scale: float) -> Path:
    """A Llama of wide attention and nothing else of weight, 1.07 GB of random numbers at scale 1, on the disk."""
    layers, width = (max(1, round(LAYERS * scale)), WIDTH) if scale >= 1 / LAYERS else (1, 64)
    random = np.random.default_rng()
    tensors = {
        f"model.layers.{layer}.self_attn.o_proj.weight": random.integers(
            0, 0x3F80_0000, (width, width), np.uint32
        ).view(np.float32)
        for layer in range(layers)
    }
    write_json(folder / "config.json", llama_config(width=width, layers=layers))
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.utime(path, (1e9, 1e9))  # old enough to be remembered
    return folder


def _push(url: str, token: str, folder: Path, way: str) -> float:
    """Seconds until the registry has all bytes; waits for the commit, so that nothing runs beside the next one."""
    base = files.digest_base(folder)
    cache = HashCache(folder / "cache")
    if way == "known":
        files.scan_folder("base", folder, base=base.digest, cache=cache)
    accepted: list[float] = []

    def told(what: str, done: int, total: int) -> None:  # noqa: ARG001  # the shape of a progress
        if what == "verifying":
            accepted.append(time.perf_counter())

    with RegistryClient(url, token) as client:
        began = time.perf_counter()
        if way == "before":
            scan = transfer.scanned("base", folder, base=base.digest)
            info = transfer.push(client, "base", None, scan, table=transfer.table_of(base), progress=told)
        else:
            info = transfer.push_base(client, folder, base=base, progress=told, cache=cache)
        assert info.state == "committed"
        return (accepted or [time.perf_counter()])[0] - began
