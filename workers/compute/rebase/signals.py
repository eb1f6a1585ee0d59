"""What routes a rebase: how far the new base lies from the old one, tensor by tensor, streamed.

ρ = ‖W2 − W1‖ ⁄ ‖W1‖        about √2 for unrelated weights of one scale
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ..finetune import Report, silent
from ..shards import Stored, stored_tensors
from ..weights import DTYPES


@dataclass(frozen=True)
class Comparison:
    """Two bases side by side."""

    drift: dict[str, float | None]
    """ρ of every tensor that both have in one shape; None where it was zero and is not any more."""
    median: float | None
    """Over the matrices of layers, which adapters patch; None when nothing compares."""
    cast: str | None
    """The new base's dtype, when it is the old one converted to it and nothing else."""
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    reshaped: tuple[str, ...]


def compare(old: Path, base: Path, report: Report = silent) -> Comparison:
    """Drift and kinship of two base folders, in bounded memory."""
    w1, w2 = stored_tensors(old), stored_tensors(base)
    both = [name for name in w1 if name in w2]
    same = [name for name in both if w1[name].shape == w2[name].shape]
    drift: dict[str, float | None] = {}
    equal = len(same) == len(w1) == len(w2)
    for step, name in enumerate(same, start=1):
        drift[name], exact = _drift(w1[name], w2[name])
        equal = equal and exact
        report({"step": step, "steps": len(same)})
    dtypes = {w2[name].dtype for name in same if w1[name].dtype != w2[name].dtype}
    return Comparison(
        drift=drift,
        median=median_over(drift, [name for name in same if len(w1[name].shape) == 2 and ".layers." in f".{name}"])
        or median_over(drift, [name for name in same if len(w1[name].shape) == 2]),
        cast=dtypes.pop() if equal and len(dtypes) == 1 else None,
        only_old=tuple(sorted(w1.keys() - w2.keys())),
        only_new=tuple(sorted(w2.keys() - w1.keys())),
        reshaped=tuple(sorted(set(both) - set(same))),
    )


def median_over(drift: Mapping[str, float | None], tensors: Iterable[str]) -> float | None:
    """The median ρ over some tensors, such as those an adapter patches; None when none of them was measured."""
    found = [value for name in tensors if (value := drift.get(name)) is not None]
    return median(found) if found else None


def _drift(one: Stored, two: Stored) -> tuple[float | None, bool]:
    """ρ, and whether the second is exactly the first in its own type."""
    moved = size = 0.0
    exact = True
    with ExitStack() as files:
        first, second = (files.enter_context(tensor.path.open("rb")) for tensor in (one, two))
        # blocks of either side hold as many rows as fit its own type: read the old one in the new one's rows
        ahead = iter(one.blocks(first.fileno()))
        rest = torch.empty(0, dtype=DTYPES[one.dtype])
        for _, block in two.blocks(second.fileno()):
            while len(rest) < block.numel():
                rest = torch.cat([rest, next(ahead)[1].reshape(-1)])
            before, rest = rest[: block.numel()], rest[block.numel() :]
            after = block.reshape(-1)
            exact = exact and torch.equal(before.to(after.dtype), after)
            moved += float((after.double() - before.double()).square().sum())
            size += float(before.double().square().sum())
    return (math.sqrt(moved / size) if size else (None if moved else 0.0)), exact
