"""Tier 0: the adapter as it is, on the new base (docs: rebase).

Factors stay the same bytes. Whole parameters that the adapter replaces (``modules_to_save``, biases) are
carried as differences: W2 + (saved − W1); kept as they are they would bring back the old base's weights.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from registry.core.errors import NotRunnable

from ..lora import Adapter
from ..shards import Stored, stored_tensors


def carry(adapter: Adapter, old: Path, base: Path) -> Adapter:
    """``adapter``, made on the base in folder ``old``, for the base in folder ``base``."""
    if not adapter.replaced:
        return adapter
    w1, w2 = stored_tensors(old), stored_tensors(base)
    moved = {
        name: (value.float() + (_read(w2, name) - _read(w1, name))).to(value.dtype)
        for name, value in adapter.replaced.items()
    }
    return replace(adapter, replaced=moved)


def _read(stored: dict[str, Stored], name: str) -> Tensor:
    """The base's own value of a parameter, in float32; names in files may lack their first part."""
    short = name.partition(".")[2]
    tied = "model.embed_tokens.weight" if name == "lm_head.weight" else "transformer.wte.weight"
    found = next((stored[n] for n in (name, short, tied, tied.partition(".")[2]) if n in stored), None)
    if found is None:
        raise NotRunnable(what="Carrying the adapter", reason=f"it replaces '{name}', which a base does not store")
    with found.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), found.start, found.size, os.POSIX_FADV_SEQUENTIAL)
        return torch.cat([block.float() for _, block in found.blocks(file.fileno())]).reshape(found.shape)
