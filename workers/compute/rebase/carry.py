"""Tier 0: the adapter as it is, on the new base (docs: rebase).

Factors stay the same bytes. Whole parameters that the adapter replaces (``modules_to_save``, biases) are
carried as differences: W2 + (saved − W1); kept as they are they would bring back the old base's weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from registry.core.errors import NotRunnable

from ..lora import Adapter
from ..model import module_name, skeleton
from ..shards import stored_name, stored_tensors


def carry(adapter: Adapter, old: Path, base: Path) -> Adapter:
    """``adapter``, made on the base in folder ``old``, for the base in folder ``base``."""
    if not adapter.replaced:
        return adapter
    w1, w2 = (_parameters(folder, list(adapter.replaced)) for folder in (old, base))
    moved = {name: (value.float() + (w2[name] - w1[name])).to(value.dtype) for name, value in adapter.replaced.items()}
    return replace(adapter, replaced=moved)


def _parameters(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The base's own values of some parameters, in float32; a tied head is read from its embedding."""
    model, stored = skeleton(folder), stored_tensors(folder)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    found = {}
    for name in names:
        owner, _, parameter = name.rpartition(".")
        own = module_name(model, owner)
        tied = own is not None and model.get_submodule(own) is model.get_output_embeddings()
        here = stored_name(model, name, stored) or (
            stored_name(model, f"{embedding}.{parameter}", stored) if tied else None
        )
        if here is None:
            raise NotRunnable(what="Carrying the adapter", reason=f"it replaces '{name}', which a base does not store")
        found[name] = stored[here].read().float()
    return found
