"""What an adapter can be beside B·A: DoRA, three factors, and modules that are trained whole.

    DoRA           h = m ⁄ ‖W₀ + s·B·A‖ · (W₀ + s·B·A)·x + b     Liu et al. 2024, arXiv:2402.09353
    three factors  ΔW = s·(W₀·Aᵀ)·R·A, of which R alone is trained  LoRA-XS, Bałazy et al. 2024, arXiv:2405.17604
    whole          a module's own weight and bias, as PEFT's ``modules_to_save``

All of them start where they change nothing: m = ‖W₀ + s·B·A‖ by rows, R = 0, the base's own parameters. In three
factors A holds the leading right singular vectors of W₀, so that W₀·Aᵀ = U·Σ are its left ones, and neither A nor the
base has to be kept a second time: what is stored is (W₀·Aᵀ·R, A), plain LoRA (docs/adr/0008).
Legend: R rank, I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from registry.core.errors import NotRunnable
from registry.core.recipes import FineTune

from .lora import Adapter, core_of, dense, found_in, lengths, modules_called
from .lowrank import leading
from .model import Model, module_name, whole
from .quantised import Held

_FOREIGN = 0.5
"""The share of a start's B that may lie outside of what three factors reach: a base that drifted leaves far less."""


def varied(model: Model, recipe: FineTune, adapter: Adapter) -> Adapter:
    """The adapter with what the recipe wants trained beside its factors; what it holds already is trained on.

    `NotRunnable` says what has no meaning for these modules, or for this adapter to start from.
    """
    if recipe.variant == "dora":
        adapter = _with_magnitudes(model, adapter)
    if recipe.variant == "three-factor":
        adapter = _with_cores(model, adapter)
    return _with_whole(model, adapter, recipe.whole)


def _with_magnitudes(model: Model, adapter: Adapter) -> Adapter:
    patches = {}
    for name, patch in adapter.patches.items():
        if patch.embedding:
            raise NotRunnable(what="DoRA", reason=f"'{name}' is an embedding: train it whole, or as plain LoRA")
        module = found_in(model, name)[1]
        patches[name] = patch
        if patch.magnitude_O is None:
            update = patch.update.dense() if patch.b_OR.any() else None
            patches[name] = replace(patch, magnitude_O=lengths(module, update).cpu())
    return replace(adapter, patches=patches, config=adapter.config | {"use_dora": True})


def _with_cores(model: Model, adapter: Adapter) -> Adapter:
    """Patches whose B is W₀·Aᵀ·R: A from the base where nothing is said yet, else the start's own, and R to match."""
    patches, said, lost = {}, 0.0, 0.0
    for name, patch in adapter.patches.items():
        if patch.magnitude_O is not None:
            raise NotRunnable(what="Training three factors from this adapter", reason="it has DoRA magnitudes")
        weight_OI = dense(found_in(model, name)[1])
        a_RI, b_OR = patch.a_RI.float(), patch.b_OR
        if not (a_RI.any() and b_OR.any()):
            _, _, v_RI = leading(weight_OI, len(a_RI))
            a_RI, b_OR = v_RI.float().cpu(), b_OR * 0
        basis_OR = (weight_OI @ a_RI.T.to(weight_OI)).cpu()
        made = replace(patch, a_RI=a_RI, b_OR=b_OR, basis_OR=basis_OR)
        patches[name] = replace(made, b_OR=basis_OR @ core_of(made))
        said += float(b_OR.double().square().sum())
        lost += float((patches[name].b_OR.double() - b_OR.double()).square().sum())
    if lost > _FOREIGN**2 * said:
        reason = "its B does not lie in W·Aᵀ, as that of three factors of this base does; name its own variant"
        raise NotRunnable(what="Training three factors from this adapter", reason=reason)
    return replace(adapter, patches=patches)


def _with_whole(model: Model, adapter: Adapter, names: Sequence[str]) -> Adapter:
    own = {module_name(model, name.rpartition(".")[0]) for name in adapter.replaced}
    replaced, saved = dict(adapter.replaced), list(adapter.config.get("modules_to_save") or ())
    for name in modules_called(model, names):
        if any(module_name(model, patched) == name for patched in adapter.patches):
            raise NotRunnable(what="The recipe", reason=f"'{name}' has factors in the adapter it starts from")
        if name not in own:
            own_parameters = _parameters(model.get_submodule(name)).items()
            replaced |= {f"{name}.{key}": value.float().cpu().clone() for key, value in own_parameters}
            saved.append(name)
    config: dict[str, Any] = adapter.config | ({"modules_to_save": sorted(saved)} if saved else {})
    return replace(adapter, replaced=replaced, config=config)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """A module's own, as its files have them; a weight that is held in fewer bits is unpacked."""
    found = {name: whole(value.detach()) for name, value in module.named_parameters(recurse=False)}
    if isinstance(module, Held):
        weight_OI = dense(module)
        found["weight"] = weight_OI.T.contiguous() if module.was_transposed else weight_OI
    return found
