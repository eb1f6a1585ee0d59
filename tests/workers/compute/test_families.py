"""Layers of other families (fused q, k and v, LayerNorm, biases, rows in one): logits and gradients as PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.workers import factories
from workers.compute.bank import Bank
from workers.compute.model import Model
from workers.compute.weights import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 250, (4, 10), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gpt_neox": ({"intermediate_size": 64}, ("query_key_value", "dense_4h_to_h")),
    "phi3": ({"intermediate_size": 64, "num_key_value_heads": 2}, ("qkv_proj", "gate_up_proj")),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, ("q_proj", "fc1")),
    "bloom": ({}, ("query_key_value", "dense_h_to_4h")),
    "gpt2": ({"n_positions": 64}, ("c_attn", "c_proj")),
}
"""By model type: changes of `SIZES`, and targets."""


def made(kind: str, **changes: Any) -> Model:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_adapters_at_once_answer_and_learn_as_with_peft(kind: str, tmp_path: Path) -> None:
    changes, targets = FAMILIES[kind]
    model = made(kind, **changes)
    adapters = [
        factories.random_adapter(model, seed=1, rank=3, targets=targets),
        factories.random_adapter(model, seed=2, rank=4, targets=("all-linear",)),
    ]
    bank = Bank(model, adapters, train=True)
    bank.assign([(0, 2), (1, 2)])
    assert bank.grad_KP is not None
    with bank.attached(), bank.gradients():
        found = model(input_ids=IDS).logits
        found.square().mean().backward()
    for which, adapter in enumerate(adapters):
        folder = tmp_path / str(which)
        write_adapter(adapter, folder, base=factories.BASE, recipe=factories.SUITE)
        peft = PeftModel.from_pretrained(made(kind, **changes), str(folder), is_trainable=True)
        rows = slice(2 * which, 2 * which + 2)
        expected = peft(input_ids=IDS[rows]).logits
        torch.testing.assert_close(found[rows], expected, atol=1e-4, rtol=1e-4)
        (expected.square().sum() / found.numel()).backward()
        gradients = bank.parts(which, bank.grad_KP)
        trained = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
        theirs = {name.removeprefix("base_model.model."): gradient for name, gradient in trained.items()}
        assert len(theirs) == len(gradients)
        for name, gradient in gradients.items():
            module, _, kind_of = name.rpartition(".")
            expected_gradient = theirs[f"{module}.lora_{kind_of}.default.weight"]
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-3)
