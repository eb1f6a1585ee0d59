"""What routes a rebase: how far the new base lies from the old one, everywhere and where an adapter reads and writes.

    ρ = ‖D‖ ⁄ ‖W₁‖                    D = W₂ − W₁; about √2 for unrelated weights of one scale
    reads  ‖D·A⁺A‖ ⁄ ‖W₁·A⁺A‖         the same within what A reads,
    writes ‖BB⁺·D‖ ⁄ ‖BB⁺·W₁‖         and within what B writes

From the weights alone: both bases are read once, by position, a tensor a thread and block by block, so that memory is
a constant beside the adapters' factors. And, where there is text, from forward passes (`text`):

    cosine   of B·A·x₁ and B·A·x₂, the activations of either base with the adapter
    excess   KL(W₁ + ΔW ‖ W₂ + ΔW) − KL(W₁ ‖ W₂), in nats a token of the answers of W₁ + ΔW
    alpha    the multiple of ΔW on the new base with the least KL from W₁ + ΔW

Legend: N rows and M columns as stored, n rows of a block, R rank (of all adapters together), T tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from registry.files import cores

from ..data import Row
from ..finetune import Report, silent
from ..lora import Adapter
from ..model import load
from ..pool import a_core_each
from ..shards import Stored, stored_tensors
from ..weights import DTYPES
from .carry import carry
from .free import ALPHAS
from .parameters import Parameters
from .text import Seen, asked, divergence, likelihoods, reads, seen_by

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: it and its float32 copies stay in a core's cache."""


@dataclass(frozen=True)
class Place:
    """How far one patched module moved: all of it, within what A reads, and within what B writes; None: from zero."""

    drift: float | None
    reads: float | None
    writes: float | None


@dataclass(frozen=True)
class Found:
    """The signals of one adapter (`registry.core.route.Signals`), and its modules'."""

    drift: float | None
    most: float | None
    inside: float | None
    modules: dict[str, Place]
    cosine: float | None = None
    excess: float | None = None
    alpha: float | None = None


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
    adapters: tuple[Found, ...] = ()
    """In the order in which they were given."""


def compare(
    old: Path, base: Path, report: Report = silent, adapters: Sequence[Adapter] = (), inputs: Sequence[Row] = ()
) -> Comparison:
    """Drift and kinship of two base folders, and what that means for ``adapters`` of the old one.

    ``inputs``: rows whose prompts are the text; without them no model is run.
    """
    w1, w2 = stored_tensors(old), stored_tensors(base)
    both = [name for name in w1 if name in w2]
    same = [name for name in both if w1[name].shape == w2[name].shape]
    spaces = _spaces(old, adapters)
    measured = _all_measured([(w1[name], w2[name], spaces.get(name, ())) for name in same], report)
    drift = {name: measured[name].drift for name in same}
    equal = len(same) == len(w1) == len(w2) and all(measured[name].exact for name in same)
    dtypes = {w2[name].dtype for name in same if w1[name].dtype != w2[name].dtype}
    places: list[dict[str, Place]] = [{} for _ in adapters]
    for name in same:
        for space, (within_rows, within_columns) in zip(spaces.get(name, ()), measured[name].inside, strict=True):
            read, write = (within_rows, within_columns) if space.transposed else (within_columns, within_rows)
            places[space.adapter][space.module] = Place(drift[name], read, write)
    found = tuple(map(_summed_up, places))
    return Comparison(
        drift=drift,
        median=median_over(drift, [name for name in same if len(w1[name].shape) == 2 and ".layers." in f".{name}"])
        or median_over(drift, [name for name in same if len(w1[name].shape) == 2]),
        cast=dtypes.pop() if equal and len(dtypes) == 1 else None,
        only_old=tuple(sorted(w1.keys() - w2.keys())),
        only_new=tuple(sorted(w2.keys() - w1.keys())),
        reshaped=tuple(sorted(set(both) - set(same))),
        adapters=_with_text(found, adapters, old, base, inputs) if inputs and adapters else found,
    )


def median_over(drift: Mapping[str, float | None], tensors: Iterable[str]) -> float | None:
    """The median ρ over some tensors, such as those an adapter patches; None when none of them was measured."""
    found = [value for name in tensors if (value := drift.get(name)) is not None]
    return median(found) if found else None


def _summed_up(places: dict[str, Place]) -> Found:
    drifts = [place.drift for place in places.values() if place.drift is not None]
    inside = [side for place in places.values() for side in (place.reads, place.writes) if side is not None]
    return Found(
        drift=median(drifts) if drifts else None, most=max(drifts, default=None),
        inside=median(inside) if inside else None, modules=places,
    )  # fmt: skip


# ── from the weights ─────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Space:
    """What one adapter reads and writes of one tensor as stored: orthonormal bases of its rows and its columns."""

    adapter: int
    module: str
    transposed: bool
    rows_NR: Tensor
    columns_MR: Tensor


def _spaces(old: Path, adapters: Sequence[Adapter]) -> dict[str, list[_Space]]:
    """By tensor."""
    found: dict[str, list[_Space]] = {}
    own = Parameters.at(old) if adapters else None
    for which, adapter in enumerate(adapters):
        for module, patch in adapter.patches.items():
            assert own is not None
            stored, transposed = own.matrix(module)
            read_IR, write_OR = (torch.linalg.qr(side.float())[0] for side in (patch.a_RI.T, patch.b_OR))
            rows, columns = (read_IR, write_OR) if transposed else (write_OR, read_IR)
            found.setdefault(stored.name, []).append(_Space(which, module, transposed, rows, columns.contiguous()))
    return found


@dataclass(frozen=True)
class _Measured:
    drift: float | None
    exact: bool
    """Whether the second is exactly the first in its own type."""
    inside: list[tuple[float | None, float | None]]
    """ρ within the rows and within the columns of every space."""


_Job = tuple[Stored, Stored, Sequence[_Space]]


def _all_measured(jobs: Sequence[_Job], report: Report) -> dict[str, _Measured]:
    """A tensor a thread, the largest ones first."""
    found = {}
    with a_core_each(cores()) as pool:
        running = {pool.submit(_measure, *job): job[0].name for job in sorted(jobs, key=lambda job: -job[0].size)}
        for step, done in enumerate(as_completed(running), start=1):
            found[running[done]] = done.result()
            report({"step": step, "steps": len(jobs)})
    return found


def _measure(one: Stored, two: Stored, spaces: Sequence[_Space]) -> _Measured:
    rows, columns = (one.shape[0] if one.shape else 1) if one.size else 0, math.prod(one.shape[1:])
    exact, many = True, max(1, BLOCK_ELEMENTS // max(1, columns))
    sums = _Sums((many, columns), spaces, torch.promote_types(DTYPES[one.dtype], torch.float32))
    widths = [columns * DTYPES[side.dtype].itemsize for side in (one, two)]
    held = [memoryview(bytearray(many * width)) for width in widths]
    with one.path.open("rb") as first, two.path.open("rb") as second:
        for start in range(0, rows, many):
            stop = min(start + many, rows)
            before_nM, after_nM = (
                side.read_rows(file.fileno(), start, stop, data[: (stop - start) * width])
                for side, file, data, width in zip((one, two), (first, second), held, widths, strict=True)
            )
            sums.add(before_nM, after_nM, slice(start, stop))
            exact = exact and torch.equal(before_nM.to(after_nM.dtype), after_nM)
    return _Measured(sums.drift(), exact, sums.inside())


class _Sums:
    """Squares of D and of W₁, as a whole and in all spaces, added up block by block."""

    def __init__(self, block: tuple[int, int], spaces: Sequence[_Space], wide: torch.dtype) -> None:
        self._d_nM, self._w_nM = torch.empty(block, dtype=wide), torch.empty(block, dtype=wide)
        self._ranks = [space.rows_NR.shape[1] for space in spaces]
        self._whole = [0.0, 0.0]
        if spaces:
            self._rows_RN = torch.cat([space.rows_NR for space in spaces], dim=1).T.to(wide)
            self._columns_MR = torch.cat([space.columns_MR for space in spaces], dim=1).to(wide)
            self._within_rows = [torch.zeros(len(self._rows_RN), block[1], dtype=wide) for _ in range(2)]
            self._within_columns = [torch.zeros(len(self._rows_RN), dtype=torch.float64) for _ in range(2)]

    def add(self, before_nM: Tensor, after_nM: Tensor, rows: slice) -> None:
        """A block of either base."""
        w_nM = self._w_nM[: len(before_nM)].copy_(before_nM)
        d_nM = self._d_nM[: len(after_nM)].copy_(after_nM).sub_(w_nM)
        for which, x_nM in enumerate((d_nM, w_nM)):
            self._whole[which] += float(torch.dot(x_nM.view(-1), x_nM.view(-1)))
            if self._ranks:
                self._within_rows[which].addmm_(self._rows_RN[:, rows], x_nM)
                self._within_columns[which] += (x_nM @ self._columns_MR).double().square().sum(0)

    def drift(self) -> float | None:
        """ρ."""
        return _ratio(*self._whole)

    def inside(self) -> list[tuple[float | None, float | None]]:
        """ρ within the rows and within the columns of every space."""
        if not self._ranks:
            return []
        rows = [x_RM.double().square().sum(1).split(self._ranks) for x_RM in self._within_rows]
        columns = [x_R.split(self._ranks) for x_R in self._within_columns]
        return [
            (_ratio(float(rows[0][i].sum()), float(rows[1][i].sum())),
             _ratio(float(columns[0][i].sum()), float(columns[1][i].sum())))
            for i in range(len(self._ranks))
        ]  # fmt: skip


def _ratio(moved: float, size: float) -> float | None:
    return math.sqrt(moved / size) if size else (None if moved else 0.0)


# ── from text ────────────────────────────────────────────────────────────────


def _with_text(
    found: Sequence[Found], adapters: Sequence[Adapter], old: Path, base: Path, inputs: Sequence[Row]
) -> tuple[Found, ...]:
    """The signals with what forward passes say; as they were, where the bases cut the text into other tokens."""
    model, tokenizer = load(old)
    seen = [seen_by(model, tokenizer, inputs, adapter) for adapter in adapters]
    del model
    model, tokenizer = load(base)
    if asked(model, tokenizer, inputs) != seen[0].prompts:
        return tuple(found)
    made = []
    for one, adapter, before in zip(found, adapters, seen, strict=True):
        tried = (1.0, *ALPHAS)
        after = likelihoods(model, before.texts, [None, *(carry(adapter, old, base, alpha) for alpha in tried)])
        bare, *far = [
            float(divergence(p_PV, q_PV).mean())
            for p_PV, q_PV in zip([before.bare_PV, *([before.adapted_PV] * len(tried))], after, strict=True)
        ]
        alpha = min(zip(far, tried, strict=True))[1]
        now = reads(model, before.texts, carry(adapter, old, base))
        made.append(replace(one, cosine=_cosine(adapter, before, now), excess=far[0] - bare, alpha=alpha))
    return tuple(made)


def _cosine(adapter: Adapter, before: Seen, now: Mapping[str, Tensor]) -> float | None:
    """The median over modules of cos(B·y₁, B·y₂), where y = A·x is what was read: ⟨y₁, G·y₂⟩ with G = BᵀB."""
    found = []
    for name, y2_RT in now.items():
        y1_RT, b_OR = before.read[name], adapter.patches[name].b_OR.float()
        g_RR = b_OR.T @ b_OR
        dot, one, two = (float((x * (g_RR @ y)).sum()) for x, y in ((y1_RT, y2_RT), (y1_RT, y1_RT), (y2_RT, y2_RT)))
        if one > 0 and two > 0:
            found.append(dot / math.sqrt(one * two))
    return max(-1.0, min(1.0, median(found))) if found else None
