"""The layer this project exists for, on any linear module of a frozen base (Hu et al. 2021, arXiv:2106.09685):

    h = W₀x + scale·B·A·x        A random, B = 0 at the start

It is a forward hook beside the module, so that the base's weights are never written: what was attached is
detached by forgetting it, and the recorded weights are there bit by bit.
Legend: R rank, I inputs, O outputs; an embedding has I = vocabulary.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from registry.core.errors import NotRunnable, UnknownTargets
from registry.core.recipes import FineTune

from .lowrank import LowRank
from .model import Model, module_name

LINEAR = (nn.Linear, Conv1D)


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


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as inputs × outputs, as Conv1D and embeddings do."""
    return isinstance(module, Conv1D | nn.Embedding)


# ── the layer ────────────────────────────────────────────────────────────────


class Layer:
    """One patch on one module: called by the module with its input and output, it returns h."""

    def __init__(self, module: nn.Module, patch: Patch, dropout: float = 0.0) -> None:
        weight = module.get_parameter("weight")
        self.module, self.scale, self.dropout = module, patch.scale, dropout
        self.a_RI = patch.a_RI.detach().to(weight.device, torch.float32, copy=True)
        self.b_OR = patch.b_OR.detach().to(weight.device, torch.float32, copy=True)
        self.shift_O = None if patch.bias_O is None else patch.bias_O.to(weight) * patch.scale
        self.stretch_O = None
        if patch.magnitude_O is not None:
            update = patch.update.dense().to(weight.device)
            length_O = (weight.float().T if is_transposed(module) else weight.float()).add(update).norm(dim=1)
            self.stretch_O = (patch.magnitude_O.to(length_O) / length_O).to(weight.dtype)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
        """h = W₀x + scale·B·A·x; with DoRA, all but the bias times magnitude ⁄ ‖W₀ + ΔW‖ by rows."""
        x = inputs[0]
        if isinstance(module, nn.Embedding):
            low = F.embedding(x, self.a_RI.T).to(h.dtype)
        else:
            low = F.linear(F.dropout(x, self.dropout, self.dropout > 0), self.a_RI.to(x.dtype))
        update = F.linear(low * self.scale, self.b_OR.to(h.dtype), self.shift_O)
        if self.stretch_O is None:
            return h + update
        bias: Tensor | None = getattr(module, "bias", None)
        bare = h if bias is None else h - bias
        stretched: Tensor = self.stretch_O * (bare + update) + (h - bare)
        return stretched


class Replacement:
    """Another weight or bias in the place of a module's own (``modules_to_save``, trained biases)."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        self.module, self.only_bias = module, parameters.keys() == {"bias"}
        self.parameters = {**own, **{name: value.to(own[name]) for name, value in parameters.items()}}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
        """The module's output with its parameters replaced."""
        if self.only_bias:
            return h + (self.parameters["bias"] - module.get_parameter("bias"))
        x, weight, bias = inputs[0], self.parameters["weight"], self.parameters.get("bias")
        if isinstance(module, nn.Embedding):
            return F.embedding(x, weight)
        return F.linear(x, weight.T if isinstance(module, Conv1D) else weight, bias)


Hook = Replacement | Layer
Patched = list[tuple[str, nn.Module, Patch]]
Replaced = list[tuple[str, nn.Module, dict[str, Tensor]]]


def fitted(model: Model, adapter: Adapter) -> tuple[Patched, Replaced]:
    """The adapter's patches and replacements beside the modules they are for; `NotRunnable` names what does not fit."""
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.replaced.items():
        owner, _, parameter = name.rpartition(".")
        by_module.setdefault(owner, {})[parameter] = value
    replaced = [(*_find(model, name), parameters) for name, parameters in by_module.items()]
    for name, module, parameters in replaced:
        own = {key: value.shape for key, value in module.named_parameters(recurse=False)}
        for key, value in parameters.items():
            if own.get(key) != value.shape:
                raise _misfit(f"'{name}.{key}' is {_shape(value.shape)}, the base's {_shape(own.get(key))}")
        if parameters.keys() != {"bias"} and not (type(module) is nn.Embedding or isinstance(module, LINEAR)):
            raise _misfit(f"it replaces '{name}', a {type(module).__name__}")
    patched = [(*_find(model, name), patch) for name, patch in adapter.patches.items()]
    for name, module, patch in patched:
        if not (type(module) is nn.Embedding if patch.embedding else isinstance(module, LINEAR)):
            raise _misfit(f"'{name}' is a {type(module).__name__}")
        weight = module.get_parameter("weight")
        shape = tuple(reversed(weight.shape)) if is_transposed(module) else tuple(weight.shape)
        if patch.update.shape != shape:
            raise _misfit(f"B·A for '{name}' is {_shape(patch.update.shape)}, its weight {_shape(shape)}")
        if patch.embedding and patch.magnitude_O is not None:
            raise _misfit(f"'{name}' is an embedding with DoRA")
        if patch.magnitude_O is not None and any(owner == name for owner, _, _ in replaced):
            raise _misfit(f"'{name}' has DoRA beside parameters of its own")
    return patched, replaced


def layers_of(model: Model, adapter: Adapter, dropout: float = 0.0) -> list[Hook]:
    """The adapter's hooks for this model: replacements, then patches in the adapter's order."""
    patched, replaced = fitted(model, adapter)
    return [
        *(Replacement(module, parameters) for _, module, parameters in replaced),
        *(Layer(module, patch, dropout) for _, module, patch in patched),
    ]


def _find(model: Model, name: str) -> tuple[str, nn.Module]:
    found = module_name(model, name)
    if found is None:
        raise _misfit(f"this base has no module '{name}'")
    return found, model.get_submodule(found)


def _misfit(reason: str) -> NotRunnable:
    return NotRunnable(what="The adapter", reason=reason)


def _shape(shape: Sequence[int] | None) -> str:
    return "not there" if shape is None else "×".join(map(str, shape))


@contextmanager
def attached(layers: Sequence[Hook]) -> Iterator[None]:
    """The layers' modules answer as adapted inside the block, and as they were after it."""
    handles = [layer.module.register_forward_hook(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ── a new adapter ────────────────────────────────────────────────────────────


def target_modules(model: Model, targets: Sequence[str]) -> list[str]:
    """Names of the linear modules that ``targets`` mean, in the model's order.

    A target is the end of a module's name (``q_proj``, ``layers.0.mlp.up_proj``), or the one word
    ``all-linear``: every linear module but the output head. `UnknownTargets` names what matches nothing.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    if tuple(targets) == ("all-linear",):
        return [name for name in linear if model.get_submodule(name) is not head]
    unknown = [target for target in targets if not any(_means(target, name) for name in linear)]
    if unknown:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        near = [close for target in unknown for close in difflib.get_close_matches(target, ends, n=3, cutoff=0.5)]
        nearest = f" Did you mean {_list(near)}?" if near else f" There are {_list(ends)}."
        raise UnknownTargets(targets=_list(unknown), nearest=nearest)
    return [name for name in linear if any(_means(target, name) for target in targets)]


def _means(target: str, name: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in dict.fromkeys(names))


def fresh(model: Model, recipe: FineTune) -> Adapter:
    """A new adapter as the recipe asks: A uniform in ±1⁄√I (Kaiming with a = √5), B = 0, by the recipe's seed."""
    chance = torch.Generator().manual_seed(recipe.seed)
    rank = recipe.rank
    scale = recipe.alpha / (math.sqrt(rank) if recipe.rank_stabilised else rank)
    names = target_modules(model, recipe.targets)
    patches = {}
    for name in names:
        module = model.get_submodule(name)
        rows, columns = module.weight.shape
        outputs, inputs = (columns, rows) if is_transposed(module) else (rows, columns)
        a_RI = (torch.rand(rank, inputs, generator=chance) * 2 - 1) / math.sqrt(inputs)
        patches[name] = Patch(a_RI, torch.zeros(outputs, rank), scale)
    return Adapter(patches, _config(model, recipe, names))


def restarted(adapter: Adapter, seed: int) -> Adapter:
    """The adapter's modules, ranks and scales with A drawn anew and B = 0."""
    chance = torch.Generator().manual_seed(seed)
    patches = {
        name: Patch(
            (torch.rand(patch.a_RI.shape, generator=chance) * 2 - 1) / math.sqrt(patch.a_RI.shape[1]),
            torch.zeros(patch.b_OR.shape),
            patch.scale,
            embedding=patch.embedding,
        )
        for name, patch in adapter.patches.items()
    }
    return Adapter(patches, adapter.config)


def _config(model: Model, recipe: FineTune, names: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    targets = {name.rpartition(".")[2] for name in names} if recipe.targets == ("all-linear",) else set(recipe.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": recipe.rank,
        "lora_alpha": int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.rank_stabilised,
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        "bias": "none",
        "inference_mode": True,
    }
