"""Tier N: what an adapter changes on its own base, as s·B·A, exactly, or refused with the reason (docs: rebase).

Some initialisations take a part out of the base and train it on: the adapter's factors then stand for

    W_res + s·B·A  with  W_res = W − s·B₀·A₀        so that on W itself  ΔW = s·(B·A − B₀·A₀), of twice the rank

    PiSSA   s·B₀·A₀ = U_R·Σ_R·V_Rᵀ, the SVD of W       Meng et al. 2024, arXiv:2404.02948
    OLoRA   B₀·A₀ = Q_R·R_R, of W = Q·R                Büyükakyüz 2024, arXiv:2406.01775

Both follow from W, whatever the signs of vectors are. CorDA, LoRA-GA and LoftQ followed data, a gradient or a
quantisation: theirs have to be at hand, as PEFT saves them for ``path_initial_model_for_weight_conversion``.
Everything else is read as it is (`weights`): DoRA, three factors and whole modules mean the same anywhere.
Legend: R rank, I inputs, O outputs.
"""

from dataclasses import replace
from pathlib import Path

import torch

from registry.core.errors import NotRunnable

from ..lora import Adapter, Patch
from ..lowrank import LowRank, leading
from ..plain import plain, targets_of
from ..weights import changed_base, read_unconverted
from .parameters import Parameters

_OF_STARTS = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}


def normalised(folder: Path, base: Path, initial: Path | None = None) -> Adapter:
    """The adapter of a PEFT folder as an update of ``base``, the weights that it was made for.

    ``initial``: the adapter as it was before its training; with LoftQ what its quantisation could not express is left
    out. `NotRunnable` when what was taken out of the base cannot be told.
    """
    adapter = read_unconverted(folder)
    start = changed_base(adapter.config)
    if start is None:
        return adapter
    first = read_unconverted(initial) if initial is not None else None
    own = Parameters.at(base)
    patches = {}
    for name, patch in adapter.patches.items():
        took = LowRank(patch.a_RI[:0].float(), patch.b_OR[:, :0].float())
        saved = f"{name}.weight" in adapter.replaced  # then what was left of the base is in it
        if not saved and (start == "loftq" or not patch.embedding):  # the others leave embeddings as they are
            took = _taken(own, start, name, patch) if first is None else _known(first, name, patch)
        update = patch.update + took * -1.0
        bias_O = None if patch.bias_O is None else patch.bias_O.float() * patch.scale
        patches[name] = replace(patch, a_RI=update.a_RI, b_OR=update.b_OR, scale=1.0, bias_O=bias_O)
    config = {key: value for key, value in adapter.config.items() if key not in _OF_STARTS}
    return plain(patches, config, targets_of([adapter], list(patches)), adapter.replaced)


def _known(first: Adapter, name: str, patch: Patch) -> LowRank:
    """s·B₀·A₀ of an adapter that was kept from before its training."""
    before = first.patches.get(name)
    if before is None or before.update.shape != patch.update.shape:
        raise NotRunnable(what="The adapter", reason=f"the one from before its training does not fit it at '{name}'")
    return before.update


def _taken(base: Parameters, start: str, name: str, patch: Patch) -> LowRank:
    """s·B₀·A₀, from the base itself."""
    if start not in ("pissa", "olora"):
        raise NotRunnable(what="The adapter", reason=f"its initialisation '{start}' changed the base it was trained on")
    if base.is_tied(name):
        reason = f"its initialisation '{start}' of '{name}' changed the embedding that is tied to it"
        raise NotRunnable(what="The adapter", reason=reason)
    weight_OI, rank = base.weight(name), patch.a_RI.shape[0]
    if start == "pissa":
        return LowRank.cut(leading(weight_OI, rank, exact=True), rank, torch.float32)
    if base.matrix(name)[1]:
        raise NotRunnable(what="The adapter", reason=f"OLoRA knows no weights that are stored as '{name}' is")
    # Q_R·Q_Rᵀ·W, in which the signs of Q cancel; Q_R spans the first R columns of W
    q_OR = torch.linalg.qr(weight_OI[:, :rank].double())[0]
    return LowRank((q_OR.T @ weight_OI.double()).float(), q_OR.float()) * patch.scale
