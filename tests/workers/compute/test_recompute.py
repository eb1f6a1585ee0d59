"""Decoder layers that are computed twice give the same bits in less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from registry.core.errors import NotRunnable
from registry.core.recipes import recipe_digest
from tests.workers import factories
from workers.compute.bank import Bank, Drop
from workers.compute.finetune import Task, finetune_many
from workers.compute.model import Model
from workers.compute.recompute import decoder_layers, recomputing

IDS = torch.randint(3, 259, (4, 20), generator=torch.Generator().manual_seed(1))


def adapters(model: Model) -> Any:
    return [factories.random_adapter(model, seed=seed, targets=("all-linear",), rank=2 + seed) for seed in (1, 2)]


def gradient(model: Model, again: bool) -> tuple[Tensor, int]:
    """θ's gradient with dropout, and the bytes that autograd was given to keep."""
    bank, kept = Bank(model, adapters(model), train=True), 0
    bank.drop = Drop([0.2, 0.5], [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    bank.assign([(0, 2), (1, 2)])

    def keep(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel() * value.element_size()
        return value

    with bank.attached(), bank.gradients() as grad_KP, torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        if again:
            with recomputing(model, bank.drop.chances):
                model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        else:
            model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    return grad_KP.clone(), kept


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bit_by_bit(make: Callable[[], Model], dtype: torch.dtype) -> None:
    once, twice = (gradient(make().to(dtype), again)[0] for again in (False, True))
    assert once.any()
    assert torch.equal(once, twice)


def test_what_is_kept_does_not_grow_with_what_is_in_a_layer() -> None:
    def kept(layers: int, again: bool) -> int:
        return gradient(factories.llama(num_hidden_layers=layers), again)[1]

    a_layer = (kept(6, False) - kept(2, False)) / 4
    spared = (kept(6, True) - kept(2, True)) / 4
    inputs = IDS.numel() * 32 * 4
    assert spared + inputs < 0.1 * a_layer


def test_layers_are_found_by_what_the_model_does_not_want_to_be_split() -> None:
    assert len(decoder_layers(factories.llama(num_hidden_layers=3))) == 3
    assert len(decoder_layers(factories.gpt2())) == 2


def test_a_model_that_does_not_say_its_layers_is_refused() -> None:
    with pytest.raises(NotRunnable, match="a Linear does not say which its decoder layers are"), recomputing(
        nn.Linear(2, 2)
    ):
        pass


def test_layers_are_as_they_were_after_the_block() -> None:
    model = factories.llama()
    with pytest.raises(KeyError), recomputing(model):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_who_trains_with_it_ends_with_the_adapter_of_who_trains_without() -> None:
    recipe = factories.recipe(steps=4, dropout=0.2, held_out=0.2, look_every=2)
    sparing = recipe.model_copy(update={"activation_checkpointing": True})
    assert recipe_digest(recipe) == recipe_digest(sparing)
    runs = [
        finetune_many(
            factories.llama(), factories.tokenizer(),
            [Task(one, factories.rows()), Task(recipe.model_copy(update={"seed": 5, "rank": 2}), factories.rows(7))],
        )
        for one in (recipe, sparing)
    ]  # fmt: skip
    for once, twice in zip(*runs, strict=True):
        assert (once.losses, once.held_out) == (twice.losses, twice.held_out)
        for name, patch in once.adapter.patches.items():
            assert torch.equal(patch.a_RI, twice.adapter.patches[name].a_RI)
            assert torch.equal(patch.b_OR, twice.adapter.patches[name].b_OR)
