from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from registry.core.errors import NotRunnable
from tests.workers import factories
from workers.compute.bank import attached
from workers.compute.evaluate import Suite
from workers.compute.finetune import finetune
from workers.compute.lora import fresh
from workers.compute.rebase.carry import carry
from workers.compute.rebase.retrain import gain, recovered

TOKENIZER = factories.tokenizer()
ROWS = factories.rows(12)
RECIPE = factories.recipe(steps=40, batch_tokens=200, targets=("all-linear",))


def test_carrying_to_the_same_base_keeps_the_logits(tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    base = factories.saved(model, tmp_path)
    head = {"lm_head.weight": torch.randn(259, 32, generator=torch.Generator().manual_seed(1))}
    adapter = replace(factories.random_adapter(model), replaced=head)
    with attached(model, adapter):
        expected = factories.logits(model)
    with attached(model, carry(adapter, base, base)):
        torch.testing.assert_close(factories.logits(model), expected, atol=1e-4, rtol=1e-4)


def test_carried_factors_are_the_same_and_replaced_parameters_move_with_the_base(tmp_path: Path) -> None:
    old, new = (factories.saved(factories.gpt2(seed), tmp_path / str(seed)) for seed in (0, 1))
    torch.manual_seed(2)
    saved = {"transformer.h.0.attn.c_attn.bias": torch.randn(96), "lm_head.weight": torch.randn(259, 32)}
    adapter = replace(factories.random_adapter(factories.gpt2(), targets=("c_attn",)), replaced=saved)
    moved = carry(adapter, old, new)
    assert moved.patches is adapter.patches
    w1, w2 = (load_file(folder / "model.safetensors") for folder in (old, new))
    for name, stored in (("transformer.h.0.attn.c_attn.bias",) * 2, ("lm_head.weight", "transformer.wte.weight")):
        torch.testing.assert_close(moved.replaced[name] - w2[stored], saved[name] - w1[stored], atol=1e-5, rtol=1e-5)


def test_a_replaced_parameter_that_no_base_stores_is_refused(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path)
    adapter = replace(factories.random_adapter(model), replaced={"score.weight": torch.ones(2, 2)})
    with pytest.raises(NotRunnable, match=r"'score.weight', which a base does not store"):
        carry(adapter, base, base)


def test_the_gain_is_measured_on_the_calibration_split() -> None:
    model = factories.llama()
    suite = Suite(factories.rows(40))
    assert gain(model, TOKENIZER, suite, fresh(model, RECIPE)) == 0.0
    trained = finetune(model, TOKENIZER, RECIPE, suite.only("calibration").rows).adapter
    assert (gain(model, TOKENIZER, suite, trained) or 0.0) > 0.1
    assert gain(model, TOKENIZER, Suite(suite.only("gate").rows), trained) is None


def test_the_share_recovered_is_of_a_gain_that_was_there() -> None:
    assert recovered(2.0, 1.0) == 0.5
    assert recovered(None, 1.0) is recovered(1.0, None) is recovered(-1.0, 1.0) is None
