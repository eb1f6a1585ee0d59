"""Compress: the same update in fewer parameters, by the SVD of each module's ΔW on its factors (`lowrank`).

    B = Q_B·R_B,  Aᵀ = Q_A·R_A,  R_B·R_Aᵀ = U·Σ·Vᵀ,  ΔW ≈ (Q_B·U_K·√Σ_K)·(√Σ_K·V_Kᵀ·Q_Aᵀ)

which is the nearest matrix of rank K (Eckart and Young 1936); ΔW is never formed. The ranks come from the energy to
keep in each module, from one rank for all, or from a budget of bytes that goes, greedily, where a further rank keeps
most σ² per byte. A module whose update is zero, or that the budget leaves without a rank, is left out.
Factors keep their type; magnitudes (DoRA), biases and replaced parameters stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from registry.core.errors import BadRequest, NotRunnable
from registry.core.recipes import Compress

from .finetune import Report, silent
from .lora import Adapter, Patch
from .lowrank import LowRank, rank_for
from .plain import Kept, plain, targets_of

Svds = dict[str, tuple[Tensor, Tensor, Tensor]]
"""U, s and Vᵀ by module."""


@dataclass(frozen=True)
class Compressed:
    """The smaller adapter, what became of each module, and the share of the whole ‖ΔW‖² that is kept."""

    adapter: Adapter
    modules: dict[str, Kept]
    energy: float
    bytes_before: int
    bytes_after: int


def compress(adapter: Adapter, recipe: Compress, report: Report = silent) -> Compressed:
    """``adapter`` with the ranks that the recipe asks for; energies are those of the stored, rounded factors.

    `NotRunnable` when its update is zero; `BadRequest` when the budget is below the smallest module's rank 1.
    """
    svds = decomposed(adapter, report)
    return cut(adapter, svds, ranks_for(adapter, svds, energy=recipe.energy, rank=recipe.rank, budget=recipe.bytes))


def decomposed(adapter: Adapter, report: Report = silent) -> Svds:
    """The SVD of every module's ΔW; `NotRunnable` when all are zero."""
    svds: Svds = {}
    for step, (name, patch) in enumerate(adapter.patches.items(), start=1):
        svds[name] = patch.update.svd()
        report({"step": step, "steps": len(adapter.patches)})
    if not any(float(s.max()) > 0 for _, s, _ in svds.values() if len(s)):
        raise NotRunnable(what="Compressing", reason="the adapter's update is zero in all its modules")
    return svds


def ranks_for(
    adapter: Adapter, svds: Svds, *, energy: float | None = None, rank: int | None = None, budget: int | None = None
) -> dict[str, int]:
    """The rank of every module by one of the three; at least 1 where a magnitude or a bias needs the module."""
    spectra = {name: s for name, (_, s, _) in svds.items()}
    if budget is not None:
        found = _by_bytes(adapter, spectra, budget)
    else:
        found = {}
        for name, s in spectra.items():
            wanted = rank if rank is not None else rank_for(s, energy or 1.0)
            found[name] = min(wanted, int((s > 0).sum()))
    least = {name: int(_needed(patch)) for name, patch in adapter.patches.items()}
    return {name: max(rank, least[name]) for name, rank in found.items()}


def cut(adapter: Adapter, svds: Svds, ranks: Mapping[str, int]) -> Compressed:
    """``adapter`` with its modules' updates cut to ``ranks``."""
    patches, kept = {}, {}
    lost = whole = 0.0
    for name, patch in adapter.patches.items():
        made = LowRank.cut(svds[name], ranks[name], patch.b_OR.dtype)
        missing = (patch.update + LowRank(made.a_RI.float(), made.b_OR.float()) * -1.0).norm() ** 2
        energy = float((svds[name][1] ** 2).sum())
        kept[name] = Kept(patch.a_RI.shape[0], made.rank, max(0.0, 1 - missing / energy) if energy else 1.0)
        lost, whole = lost + missing, whole + energy
        if made.rank:
            bias_O = None if patch.bias_O is None else patch.bias_O * patch.scale
            a_RI, b_OR = made.a_RI.contiguous(), made.b_OR.contiguous()
            patches[name] = replace(patch, a_RI=a_RI, b_OR=b_OR, scale=1.0, bias_O=bias_O)
    smaller = plain(patches, adapter.config, targets_of([adapter], list(patches)), adapter.replaced)
    return Compressed(smaller, kept, max(0.0, 1 - lost / whole), bytes_of(adapter), bytes_of(smaller))


def _by_bytes(adapter: Adapter, spectra: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks that keep most σ² per byte of factors, as far as ``budget`` goes."""
    cost = {
        name: sum(patch.b_OR.shape[:1] + patch.a_RI.shape[1:]) * patch.b_OR.element_size()
        for name, patch in adapter.patches.items()
    }
    ranks = {name: int(_needed(patch)) for name, patch in adapter.patches.items()}
    left = budget - sum(cost[name] * rank for name, rank in ranks.items())
    if left < 0 or budget < min(cost.values()):
        least = max(min(cost.values()), budget - left)
        raise BadRequest(problems=f"bytes: {budget:,} is below {least:,}, the least that this adapter can be")
    steps = sorted(
        ((float(sigma) ** 2 / cost[name], -index, name)
         for name, s in spectra.items() for index, sigma in enumerate(s) if float(sigma) > 0 and index >= ranks[name]),
        reverse=True,
    )  # fmt: skip
    for _, _, name in steps:
        if cost[name] <= left:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def _needed(patch: Patch) -> bool:
    return patch.magnitude_O is not None or patch.bias_O is not None


def bytes_of(adapter: Adapter) -> int:
    """Bytes of all tensors."""
    tensors: list[Tensor | None] = list(adapter.replaced.values())
    for patch in adapter.patches.values():
        tensors += [patch.a_RI, patch.b_OR, patch.magnitude_O, patch.bias_O]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
