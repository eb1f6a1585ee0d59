"""A base of a model type that nobody here knows, as its tensor table shows it: names and shapes, nothing that computes.

Merging and extracting ask a model which tensor is whose weight, which way round it is stored, and what is tied. Of a
known type `model.skeleton` tells; of any other the adapter does, as far as it goes: its keys name the modules,
``fan_in_fan_out`` says that they store inputs × outputs. What nothing tells is refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from registry.core.errors import NotRunnable

from .lora import Adapter
from .model import Model, config_of, skeleton
from .quantised import form_of
from .shards import FLOATS, Stored, stored_tensors

Kind = Callable[[str, tuple[int, ...]], nn.Module]
"""The module that is called so and has a weight of this shape."""


def model_for(folder: Path, adapter: Adapter) -> Model:
    """The model of ``folder`` without its weights; of an unknown type its modules are what ``adapter`` takes them for.

    `NotRunnable` where the adapter changes what may be tied to something else.
    """
    if is_known(folder):
        return skeleton(folder)
    config, stored = _plain_config(folder), stored_tensors(folder)
    prefix = _prefix(stored)
    whole = {name.removesuffix(".weight") for name in adapter.replaced if name.endswith(".weight")}
    said = bool(adapter.config.get("fan_in_fan_out"))
    factors = any(patch.embedding for patch in adapter.patches.values())

    def spelled(name: str) -> set[str]:
        return {name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"}

    def kind(name: str, shape: tuple[int, ...]) -> nn.Module:
        patch = next((adapter.patches[one] for one in spelled(name) & adapter.patches.keys()), None)
        if len(shape) != 2 or (patch is None and not spelled(name) & whole):
            return nn.Module()
        if patch is None or patch.embedding:
            return nn.Embedding(*shape)
        rows, columns = shape
        if said and rows == columns and factors:  # of an embedding some trainers say so as well
            raise NotRunnable(what="Merging", reason=f"nothing tells whether '{name}' is stored as inputs × outputs")
        turned = said and shape == patch.update.shape[::-1]  # beside such modules there may be others
        return Conv1D(columns, rows) if turned else nn.Linear(columns, rows, bias=False)

    model = _built(stored, prefix, kind)
    if _says(config, "tie_word_embeddings") is not False:
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.Linear | Conv1D) and _is_end(config, name, module.weight.shape):
                reason = (
                    f"'{name}' may share its weight with another module: config.json has no \"tie_word_embeddings\": "
                    f"false, and a model of type '{config.get('model_type')}' is not known here"
                )
                raise NotRunnable(what="Merging", reason=reason)
    return model


def model_of(folder: Path) -> Model:
    """The model of ``folder`` without its weights; of an unknown type, matrices within layers are linear modules.

    They are taken to be stored as outputs × inputs; whatever has the size of the vocabulary is none of them.
    """
    if is_known(folder):
        return skeleton(folder)
    config, stored = _plain_config(folder), stored_tensors(folder)

    def kind(name: str, shape: tuple[int, ...]) -> nn.Module:
        if len(shape) != 2 or not _in_layer(name) or _is_end(config, name, shape):
            return nn.Module()
        return nn.Linear(shape[1], shape[0], bias=False)

    return _built(stored, _prefix(stored), kind)


class _Table(nn.Module):
    """Modules by name, with what `merge` and `extract` ask of a model of transformers."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.base_model_prefix = prefix

    def get_input_embeddings(self) -> None:
        """Nobody knows."""

    def get_output_embeddings(self) -> None:
        """Nobody knows."""


def _built(stored: Mapping[str, Stored], prefix: str, kind: Kind) -> Model:
    """The tree of modules that the names of floating-point tensors make, on the meta device."""
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in stored.items():
        if tensor.dtype in FLOATS:
            owner, _, parameter = name.rpartition(".")
            own.setdefault(owner, {})[parameter] = tensor.shape
    model = _Table(prefix)
    with torch.device("meta"):
        for owner in sorted(own):  # those above before those below
            module = model if owner == "" else kind(owner, own[owner].get("weight", ()))
            try:
                if owner:
                    _put(model, owner, module)
                for parameter, shape in own[owner].items():
                    setattr(module, parameter, nn.Parameter(torch.empty(shape), requires_grad=False))
            except (KeyError, AttributeError) as error:
                reason = f"the names of its tensors below '{owner}' are no names of modules: {error}"
                raise NotRunnable(what="The base", reason=reason) from error
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module where its name says; what is above it is made."""
    at, (*above, last) = model, name.split(".")
    for part in above:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    at.add_module(last, module)


def is_known(folder: Path) -> bool:
    """Whether transformers has a model for the base."""
    return config_of(folder).get("model_type") in CONFIG_MAPPING


def _plain_config(folder: Path) -> dict[str, Any]:
    config = config_of(folder)
    if (bits := form_of(config)) is not None:
        reason = f"it is stored in {bits}, and its model type '{config.get('model_type')}' is not known here"
        raise NotRunnable(what="The base", reason=reason)
    return config


def _prefix(stored: Mapping[str, Stored]) -> str:
    """What the names of layers begin with, where all do: adapters name modules with or without it."""
    found = {tuple(name.split(".")[:2]) for name in stored if _in_layer(name)}
    firsts = {first for first, _ in found}
    return firsts.pop() if len(firsts) == 1 and not any(second.isdecimal() for _, second in found) else "model"


def _in_layer(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _is_end(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    """Whether it may be an embedding or the output head: it has the vocabulary's size, or is in no layer."""
    size = _says(config, "vocab_size")
    return not _in_layer(name) if size is None else size in shape


def _says(config: Mapping[str, Any], key: str) -> Any:
    """What a config says itself, or for the text of a model that reads more."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)
