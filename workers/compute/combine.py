"""Combine: several adapters of one base as one adapter of that base, module by module.

With τ_k = w_k·scale_k·B_k·A_k, the weighted update of adapter k:

    concat   Σ τ_k = [B₁ B₂ …]·[A₁; A₂; …]                        exact; ranks add up
    svd      the nearest matrix of lower rank to Σ τ_k             (Eckart and Young 1936)
    linear   A = Σ ±√|w_k·scale_k|·A_k,  B = Σ √|w_k·scale_k|·B_k    equal ranks; see below
    ties     trim, elect the sign, mean of those that agree        (Yadav et al. 2023, arXiv:2306.01708)
    dare     Σ m_k ⊙ τ_k ⁄ density, m_k random in {0, 1}            (Yu et al. 2023, arXiv:2311.03099)

``linear`` is what the field calls so (PEFT's add_weighted_adapter): factors are added, and their product holds the
cross terms B_j·A_k too. It keeps the rank, and means something for adapters that were trained from one start; the
exact weighted sum of updates is ``concat``.

TIES and DARE work on dense updates and are brought back to low rank by SVD. Factors are determined only up to an
invertible R×R matrix, so trimming or dropping *their* elements would depend on the accident of the factorisation;
ΔW does not. The price is memory: a few times one module's outputs × inputs in float32, and never more than that.
Trimming is by module, where the paper takes one threshold over the whole model.

Legend: R rank, I inputs, O outputs, N rows of a block.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from operator import add
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import NotCombinable
from registry.core.recipes import Combine

from .finetune import Report, silent
from .lora import Adapter, Patch
from .lowrank import LowRank, nearest, rank_for
from .plain import Kept, plain, targets_of

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Combined:
    """The one adapter, and what became of each module."""

    adapter: Adapter
    modules: dict[str, Kept]


@dataclass(frozen=True, eq=False)
class _Part:
    """One adapter's share in one module."""

    index: int
    patch: Patch
    factor: float
    """weight · scale"""

    @property
    def update(self) -> LowRank:
        wide = torch.promote_types(self.patch.b_OR.dtype, torch.float32)
        return LowRank(self.patch.a_RI.to(wide), self.patch.b_OR.to(wide) * self.factor)


def combine(adapters: Sequence[Adapter], recipe: Combine, report: Report = silent) -> Combined:
    """``adapters`` as one, by the recipe's method; factors in float32 at least.

    `NotCombinable` names what has no sum: DoRA magnitudes, replaced parameters that differ, modules of other shapes
    or kinds, for ``linear`` other ranks.
    """
    _check(adapters, recipe.method)
    weights = recipe.weights or (1.0,) * len(adapters)
    names = sorted({name for adapter in adapters for name in adapter.patches})
    biased = any(patch.bias_O is not None for adapter in adapters for patch in adapter.patches.values())
    patches, kept = {}, {}
    for step, name in enumerate(names, start=1):
        parts = [
            _Part(index, adapter.patches[name], weight * adapter.patches[name].scale)
            for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
            if name in adapter.patches
        ]
        update, energy = _combined(name, parts, recipe)
        kept[name] = Kept(sum(part.patch.a_RI.shape[0] for part in parts), update.rank, energy)
        if update.rank:
            patches[name] = Patch(
                update.a_RI.contiguous(), update.b_OR.contiguous(), 1.0,
                bias_O=_bias(parts) if biased else None, embedding=parts[0].patch.embedding,
            )  # fmt: skip
        report({"step": step, "steps": len(names)})
    if not patches and not adapters[0].replaced:
        raise NotCombinable(method=recipe.method, reason="their sum changes nothing")
    return Combined(plain(patches, _config(adapters), targets_of(adapters, list(patches)), adapters[0].replaced), kept)


def _combined(name: str, parts: Sequence[_Part], recipe: Combine) -> tuple[LowRank, float | None]:
    """The module's update, and the share that it keeps of what it stands for."""
    largest = max(part.patch.a_RI.shape[0] for part in parts)
    match recipe.method:
        case "concat":
            return reduce(add, (part.update for part in parts)), 1.0
        case "linear":
            return _linear(parts), None
        case "svd":
            total = reduce(add, (part.update for part in parts))
            _, s, _ = svd = total.svd()
            rank = rank_for(s, recipe.energy) if recipe.energy else recipe.rank or largest
            rank = min(rank, int((s > 0).sum()))
            whole = float((s**2).sum())
            kept = float((s[:rank] ** 2).sum()) / whole if whole else 1.0
            return LowRank.cut(svd, rank, total.b_OR.dtype), kept
    assert recipe.density is not None
    if recipe.method == "ties":
        dense = ties([part.update for part in parts], recipe.density)
    else:
        seeds = [zlib.crc32(f"{recipe.seed} {part.index} {name}".encode()) for part in parts]
        dense = dare([part.update for part in parts], recipe.density, seeds)
    if recipe.energy:
        return nearest(dense, energy=recipe.energy)
    return nearest(dense, rank=recipe.rank or largest)


def _linear(parts: Sequence[_Part]) -> LowRank:
    roots = [sqrt(abs(part.factor)) for part in parts]
    wide = reduce(torch.promote_types, (part.patch.b_OR.dtype for part in parts), torch.float32)
    signs = [1.0 if part.factor >= 0 else -1.0 for part in parts]
    return LowRank(
        sum((part.patch.a_RI.to(wide) * (root * sign) for part, root, sign in zip(parts, roots, signs, strict=True)),
            torch.zeros((), dtype=wide)),
        sum((part.patch.b_OR.to(wide) * root for part, root in zip(parts, roots, strict=True)),
            torch.zeros((), dtype=wide)),
    )  # fmt: skip


# ── on dense updates ─────────────────────────────────────────────────────────


def ties(updates: Sequence[LowRank], density: float) -> Tensor:
    """TIES of weighted updates τ_k, as one dense O×I matrix (Yadav et al. 2023, arXiv:2306.01708):

        τ̂_k = τ_k where |τ_k| is among its ⌊density·O·I⌋ largest, else 0       trim
        γ   = sign(Σ τ̂_k)                                                     elect
        τ   = Σ {τ̂_k : sign τ̂_k = γ} ⁄ |{k : sign τ̂_k = γ, τ̂_k ≠ 0}|            merge
    """  # a formula ends it
    cuts = [_threshold(update, density) for update in updates]

    def merged(blocks: list[Tensor]) -> Tensor:
        trimmed = torch.stack([
            torch.where(block.abs() >= cut, block, torch.zeros_like(block))
            for block, cut in zip(blocks, cuts, strict=True)
        ])  # fmt: skip
        agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        return (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)

    return _by_rows(updates, merged)


def dare(updates: Sequence[LowRank], density: float, seeds: Sequence[int]) -> Tensor:
    """DARE of weighted updates τ_k, as one dense O×I matrix (Yu et al. 2023, arXiv:2311.03099):

        Σ m_k ⊙ τ_k ⁄ density        m_k ~ Bernoulli(density), element by element; the mean over m is Σ τ_k
    """  # a formula ends it
    chances = [torch.Generator().manual_seed(seed) for seed in seeds]

    def dropped(blocks: list[Tensor]) -> Tensor:
        return sum(
            (block * (torch.rand(block.shape, generator=chance) < density) / density
             for block, chance in zip(blocks, chances, strict=True)),
            torch.zeros_like(blocks[0]),
        )  # fmt: skip

    return _by_rows(updates, dropped)


def _threshold(update: LowRank, density: float) -> float:
    """The smallest |ΔW_ij| that stays."""
    sizes = update.dense().abs().reshape(-1)
    stay = max(1, int(density * sizes.numel()))
    return float(sizes.kthvalue(sizes.numel() - stay + 1).values)


def _by_rows(updates: Sequence[LowRank], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """``join`` of the dense updates, block of rows by block of rows."""
    outputs, inputs = updates[0].shape
    wide = reduce(torch.promote_types, (update.b_OR.dtype for update in updates))
    joined_OI = torch.empty(outputs, inputs, dtype=wide)
    many = max(1, _BLOCK_BYTES // (inputs * joined_OI.element_size()))
    for first in range(0, outputs, many):
        rows = slice(first, first + many)
        joined_OI[rows] = join([update.b_OR[rows].to(wide) @ update.a_RI.to(wide) for update in updates])
    return joined_OI


# ── what has no sum ──────────────────────────────────────────────────────────


def _check(adapters: Sequence[Adapter], method: str) -> None:
    def refuse(reason: str) -> None:
        raise NotCombinable(method=method, reason=reason)

    first: dict[str, tuple[int, Patch]] = {}
    for index, adapter in enumerate(adapters):
        for name, patch in adapter.patches.items():
            if patch.magnitude_O is not None:
                refuse(f"adapter {index + 1} is DoRA: '{name}' has lengths of the rows of W + ΔW, which do not add up")
            before, other = first.setdefault(name, (index, patch))
            if (patch.update.shape, patch.embedding) != (other.update.shape, other.embedding):
                refuse(f"'{name}' is {_kind(other)} in adapter {before + 1} and {_kind(patch)} in adapter {index + 1}")
            if method == "linear" and patch.a_RI.shape[0] != other.a_RI.shape[0]:
                refuse(
                    f"'{name}' has rank {other.a_RI.shape[0]} in adapter {before + 1} and {patch.a_RI.shape[0]} in "
                    f"adapter {index + 1}; factors of other ranks do not add up"
                )
        if adapter.replaced.keys() != adapters[0].replaced.keys():
            name = min(adapter.replaced.keys() ^ adapters[0].replaced.keys())
            refuse(f"adapters 1 and {index + 1}: only one of them replaces '{name}'")
        for name, value in adapter.replaced.items():
            if not torch.equal(value, adapters[0].replaced[name]):
                refuse(f"adapters 1 and {index + 1} replace '{name}' by different values")
    embedded = next((name for name, (_, patch) in first.items() if patch.embedding), None)
    biased = next((name for a in adapters for name, patch in a.patches.items() if patch.bias_O is not None), None)
    if embedded and biased:
        refuse(f"'{biased}' has a bias of lora_B, which PEFT does not take beside the embedding '{embedded}'")
    ends = {name.partition(".")[2]: name for name in first}
    for name in first:
        if name in ends and ends[name] not in adapters[first[name][0]].patches:
            refuse(f"one adapter says '{name}' and another '{ends[name]}': name modules alike")


def _kind(patch: Patch) -> str:
    outputs, inputs = patch.update.shape
    return f"{'an embedding' if patch.embedding else 'a matrix'} of {outputs}×{inputs}"


def _bias(parts: Sequence[_Part]) -> Tensor:
    """Σ weight·scale·bias of lora_B; PEFT has one in every module, or in none."""
    given = (part.patch.bias_O.float() * part.factor for part in parts if part.patch.bias_O is not None)
    return sum(given, torch.zeros(parts[0].patch.b_OR.shape[0]))


def _config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    configs = [adapter.config for adapter in adapters]
    either = {key: any(config.get(key) for config in configs) for key in ("fan_in_fan_out", "lora_bias")}
    return configs[0] | {key: value for key, value in either.items() if value or key in configs[0]}
