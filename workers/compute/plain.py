"""Plain adapters out of patches that were computed, not trained: every module of scale 1, ranks as they came out.

Each module gets α = r, so its scale is 1 and all of ΔW lies in the factors. ``r`` is the largest rank; other ranks
stand in ``rank_pattern`` and ``alpha_pattern``, where PEFT reads them. Engines that look at the global α ⁄ r alone
compute the same, because that is 1 as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .lora import Adapter, Patch


@dataclass(frozen=True)
class Kept:
    """What became of one module."""

    before: int
    """Its rank; where several came together, the sum of their ranks; of a full update, the smaller side."""
    after: int
    """Its rank now; 0: the module is not in the adapter any more."""
    energy: float | None
    """The share of ‖ΔW‖² that is kept; None where nothing was meant to be kept as it was."""


def plain(
    patches: Mapping[str, Patch],
    config: Mapping[str, Any],
    targets: Sequence[str],
    replaced: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """The adapter of ``patches``, all of scale 1, with what else ``config`` says of it."""
    ranks = {name: patch.a_RI.shape[0] for name, patch in patches.items()}
    largest = max(ranks.values(), default=1)
    pattern = {_pattern(name, ranks): rank for name, rank in ranks.items() if rank != largest}
    own = {
        "r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "use_rslora": False, "target_modules": sorted(targets), "init_lora_weights": True,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    return Adapter(dict(patches), {**config, **own}, dict(replaced or {}))


def targets_of(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """The targets that mean just the modules ``names``: the adapters' own lists, or every name where that is unsure."""
    listed = [adapter.config.get("target_modules") for adapter in adapters]
    narrowed = any(
        adapter.config.get(key) is not None
        for adapter in adapters
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    )
    whole = {name for adapter in adapters for name in adapter.patches} == set(names)
    if narrowed or not whole or not all(isinstance(targets, list) and targets for targets in listed):
        return sorted(names)
    return sorted({target for targets in listed if targets for target in targets})


def _pattern(name: str, names: Mapping[str, int]) -> str:
    """A key of PEFT's patterns, which are matched at the end of a name: anchored where another name ends like this."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
