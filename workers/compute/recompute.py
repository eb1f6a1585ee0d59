"""Activation checkpointing: a decoder layer keeps what goes into it, and computes the rest again on the way back.

    memory: one layer's activations and every layer's input, in place of every layer's activations
    time:   one forward pass more, about a third of a step

The source is Chen et al. 2016 (arXiv:1604.06174); the mechanism is torch's own, in its form without reentrance. What is
drawn by chance in a layer is drawn again from where its generators stood, so that gradients are the same bit by bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from registry.core.errors import NotRunnable

from .model import Model


def decoder_layers(model: Model) -> list[nn.Module]:
    """The layers that the model repeats: members of its lists that are of the kinds it does not want to be split."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    of_kind = (layer for layers in lists for layer in layers)  # a sharded layer has a kind of its own, below its own
    return [layer for layer in of_kind if kinds & {kind.__name__ for kind in type(layer).__mro__}]


@contextmanager
def recomputing(model: Model, chances: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Inside the block decoder layers are computed twice; ``chances`` are the generators that they draw from.

    `NotRunnable` where the model does not say which its layers are.
    """
    layers = decoder_layers(model)
    if not layers:
        reason = f"a {type(model).__name__} does not say which its decoder layers are"
        raise NotRunnable(what="Activation checkpointing", reason=reason)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _drawing_again(chances, [chance.get_state() for chance in chances])

    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


@contextmanager
def _drawing_again(chances: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> Iterator[None]:
    """Generators stand where they stood, and after the block where they stand now."""
    now = [chance.get_state() for chance in chances]
    for chance, state in zip(chances, states, strict=True):
        chance.set_state(state)
    try:
        yield
    finally:
        for chance, state in zip(chances, now, strict=True):
            chance.set_state(state)
