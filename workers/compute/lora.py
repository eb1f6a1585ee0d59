"""An adapter: what it does to which modules of a base, whether it fits a model, and a new one (arXiv:2106.09685).

    ΔW = scale·B·A        A random, B = 0 at the start

What carries it, alone or with others, is `bank`. Legend: R rank, I inputs, O outputs; an embedding has I = vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from registry.core.errors import NotRunnable, RankTooHigh
from registry.core.recipes import FineTune
from registry.core.targets import check_targets, means

from .lowrank import LowRank
from .model import Model, module_name, whole
from .quantised import Held

LINEAR = (nn.Linear, Conv1D, Held)


@dataclass(frozen=True, eq=False)
class Patch:
    """What an adapter does to one module: factors as stored, and the scale that is applied to their product."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None
    """DoRA (Liu et al. 2024, arXiv:2402.09353): rows of W₀ + ΔW are brought to these lengths."""
    bias_O: Tensor | None = None
    """A bias of B: adds scale·bias."""
    embedding: bool = False
    basis_OR: Tensor | None = None
    """Three factors (`variants`): B = basis·R, and only R is trained. Not stored."""

    @property
    def update(self) -> LowRank:
        """ΔW = scale·B·A in float32."""
        return LowRank(self.a_RI.float(), self.b_OR.float() * self.scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: its patches by module, whole parameters it replaces, and its adapter_config.json."""

    patches: dict[str, Patch]
    config: dict[str, Any]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name: ``modules_to_save`` and trained biases."""


def core_of(patch: Patch) -> Tensor:
    """R (R×R) of three factors: the one with basis·R nearest to B."""
    assert patch.basis_OR is not None
    core_RR: Tensor = torch.linalg.lstsq(patch.basis_OR.double(), patch.b_OR.double(), driver="gelsd")[0]
    return core_RR.float()


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is kept as inputs × outputs in files, as Conv1D's and an embedding's is."""
    return isinstance(module, Conv1D | nn.Embedding) or (isinstance(module, Held) and module.was_transposed)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear module or an embedding, in whatever form its weight is held."""
    if isinstance(module, Held):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def dense(module: nn.Module) -> Tensor:
    """The module's weight in float32, outputs × inputs; a sharded one is put together."""
    if isinstance(module, Held):
        return module.dense(torch.float32)
    weight = whole(module.get_parameter("weight").detach()).float()
    return weight.T if is_transposed(module) else weight


def lengths(module: nn.Module, update_OI: Tensor | None = None) -> Tensor:
    """‖W₀ + ΔW‖ by rows (O), in float32."""
    weight_OI = dense(module).contiguous()
    whole_OI = weight_OI if update_OI is None else weight_OI.add(update_OI.to(weight_OI))
    found_O: Tensor = torch.linalg.vector_norm(whole_OI, dim=1)
    return found_O


# ── on a model ───────────────────────────────────────────────────────────────

Patched = list[tuple[str, nn.Module, Patch]]
Replaced = list[tuple[str, nn.Module, dict[str, Tensor]]]


def fitted(model: Model, adapter: Adapter) -> tuple[Patched, Replaced]:
    """The adapter's patches and replacements beside the modules they are for; `NotRunnable` names what does not fit."""
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.replaced.items():
        owner, _, parameter = name.rpartition(".")
        by_module.setdefault(owner, {})[parameter] = value
    replaced = [(*found_in(model, name), parameters) for name, parameters in by_module.items()]
    for name, module, parameters in replaced:
        own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        if isinstance(module, Held):
            own["weight"] = sizes(module)[::-1] if module.was_transposed else sizes(module)
        for key, value in parameters.items():
            if own.get(key) != tuple(value.shape):
                raise _misfit(f"'{name}.{key}' is {_shape(value.shape)}, the base's {_shape(own.get(key))}")
        if parameters.keys() != {"bias"} and not (type(module) is nn.Embedding or isinstance(module, LINEAR)):
            raise _misfit(f"it replaces '{name}', a {type(module).__name__}")
    patched = [(*found_in(model, name), patch) for name, patch in adapter.patches.items()]
    for name, module, patch in patched:
        if not (type(module) is nn.Embedding if patch.embedding else isinstance(module, LINEAR)):
            raise _misfit(f"'{name}' is a {type(module).__name__}")
        shape = sizes(module)
        if patch.update.shape != shape:
            raise _misfit(f"B·A for '{name}' is {_shape(patch.update.shape)}, its weight {_shape(shape)}")
        if patch.embedding and patch.magnitude_O is not None:
            raise _misfit(f"'{name}' is an embedding with DoRA")
        if patch.magnitude_O is not None and any(owner == name for owner, _, _ in replaced):
            raise _misfit(f"'{name}' has DoRA beside parameters of its own")
    return patched, replaced


def found_in(model: Model, name: str) -> tuple[str, nn.Module]:
    """The module that an adapter calls so, with its own name; `NotRunnable` when there is none."""
    found = module_name(model, name)
    if found is None:
        raise _misfit(f"this base has no module '{name}'")
    return found, model.get_submodule(found)


def _misfit(reason: str) -> NotRunnable:
    return NotRunnable(what="The adapter", reason=reason)


def _shape(shape: Sequence[int] | None) -> str:
    return "not there" if shape is None else "×".join(map(str, shape))


# ── a new adapter ────────────────────────────────────────────────────────────


def target_modules(model: Model, targets: Sequence[str], but: Sequence[str] = ()) -> list[str]:
    """Names of the linear modules and embeddings that ``targets`` mean, in the model's order, without those of ``but``.

    A target is the end of a module's name (``q_proj``, ``layers.0.mlp.up_proj``, ``lm_head``, ``embed_tokens``), or
    the one word ``all-linear``: every linear module but the output head. `UnknownTargets` names what matches nothing.
    """
    if tuple(targets) == ("all-linear",):
        head = model.get_output_embeddings()
        named = model.named_modules()
        found = [name for name, module in named if isinstance(module, LINEAR) and module is not head]
    else:
        found = modules_called(model, targets)
    apart = modules_called(model, but)
    return [name for name in found if name not in apart]


def modules_called(model: Model, targets: Sequence[str]) -> list[str]:
    """The linear modules and embeddings whose names end so, in the model's order."""
    named = [name for name, module in model.named_modules() if takes_factors(module)]
    check_targets(targets, named)
    return [name for name in named if any(means(target, name) for target in targets)]


def takes_factors(module: nn.Module) -> bool:
    """Whether it can be a target: a linear module or an embedding."""
    return isinstance(module, LINEAR) or type(module) is nn.Embedding


def fresh(model: Model, recipe: FineTune) -> Adapter:
    """A new adapter as the recipe asks, that changes nothing yet, by the recipe's seed; `variants` makes more of it.

    A uniform in ±1⁄√I (Kaiming with a = √5) and B = 0; for an embedding A = 0 and B normal, so that only tokens that
    were seen have an A.
    """
    chance = torch.Generator().manual_seed(recipe.seed)
    rank = recipe.rank
    scale = recipe.alpha / (math.sqrt(rank) if recipe.rank_stabilised else rank)
    names = target_modules(model, recipe.targets, recipe.whole)
    patches = {}
    for name in names:
        module = model.get_submodule(name)
        outputs, inputs = sizes(module)
        if rank > min(outputs, inputs):
            most = min(min(sizes(model.get_submodule(name))) for name in names)
            raise RankTooHigh(rank=rank, module=name, outputs=outputs, inputs=inputs, most=most)
        patches[name] = _drawn((rank, inputs), (outputs, rank), scale, isinstance(module, nn.Embedding), chance)
    return Adapter(patches, _config(model, recipe, names))


def _drawn(a: Sequence[int], b: Sequence[int], scale: float, embedding: bool, chance: torch.Generator) -> Patch:
    if embedding:
        return Patch(torch.zeros(a), torch.randn(b, generator=chance), scale, embedding=True)
    return Patch((torch.rand(a, generator=chance) * 2 - 1) / math.sqrt(a[1]), torch.zeros(b), scale)


def restarted(adapter: Adapter, seed: int) -> Adapter:
    """The adapter's modules, ranks and scales as plain LoRA that is drawn anew and changes nothing."""
    chance = torch.Generator().manual_seed(seed)
    patches = {
        name: _drawn(patch.a_RI.shape, patch.b_OR.shape, patch.scale, patch.embedding, chance)
        for name, patch in adapter.patches.items()
    }
    more = {"use_dora": False, "modules_to_save": None, "bias": "none", "lora_bias": False}
    return Adapter(patches, adapter.config | {key: value for key, value in more.items() if key in adapter.config})


def _config(model: Model, recipe: FineTune, names: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    targets = {name.rpartition(".")[2] for name in names} if recipe.targets == ("all-linear",) else set(recipe.targets)
    if modules_called(model, list(targets)) != names:  # some of them are trained whole
        targets = set(names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": recipe.rank,
        "lora_alpha": int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.rank_stabilised,
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(
            is_transposed(module) and not isinstance(module, nn.Embedding)
            for module in map(model.get_submodule, names)
        ),
        "bias": "none",
        "inference_mode": True,
    }
