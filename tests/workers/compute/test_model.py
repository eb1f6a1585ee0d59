import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from registry.core.errors import ForeignTokenizer, NotABase, NotRunnable, UnknownModel
from tests.workers import factories
from workers.compute.evaluate import Suite, evaluate
from workers.compute.finetune import finetune
from workers.compute.model import Model, attending, dtype_for, keeps_apart, load, module_name, skeleton


def test_a_precision_that_is_asked_for_is_taken() -> None:
    assert (dtype_for("fp32"), dtype_for("bf16")) == (torch.float32, torch.bfloat16)
    assert dtype_for("auto") in (torch.float32, torch.bfloat16)


def test_a_loaded_base_is_frozen_and_answers_as_it_was_saved(tmp_path: Path) -> None:
    model, tokenizer = load(factories.saved(factories.llama(), tmp_path), "fp32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(factories.logits(model), factories.logits(factories.llama()))
    assert tokenizer("a")["input_ids"] == factories.tokenizer()("a")["input_ids"]


def test_a_skeleton_has_the_modules_and_no_weights(tmp_path: Path) -> None:
    model = skeleton(factories.saved(factories.gpt2(), tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert module_name(model, "h.0.attn.c_attn") == "transformer.h.0.attn.c_attn"
    assert module_name(model, "h.2.attn.c_attn") is None


def test_what_is_no_base_or_an_unknown_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotABase, match=r"no config\.json"):
        load(tmp_path)
    factories.saved(factories.llama(), tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NotRunnable, match="there is no tokenizer beside its weights"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    for opened in (load, skeleton):
        with pytest.raises(UnknownModel, match="model type 'unheard_of', which the installed transformers") as refused:
            opened(tmp_path)
        assert "push, pull, fit, merge, combine, compress, extract and compare." in refused.value.hint


def test_short_rows_in_bfloat16_attend_by_plain_products_no_less_exactly() -> None:
    """Through the fused kernel and without it: the same loss and gradient, as far from those in float32."""
    ids_BT = torch.randint(3, 259, (2, 32), generator=torch.Generator().manual_seed(1))

    def gradient(model: Model, length: int) -> torch.Tensor:
        x_BTH = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        with attending(model, length):
            model(inputs_embeds=x_BTH, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        assert x_BTH.grad is not None
        found: torch.Tensor = x_BTH.grad.float()
        return found

    exact = gradient(factories.llama(), 32)
    model = factories.llama().bfloat16()
    errors = {length: float((gradient(model, length) - exact).norm() / exact.norm()) for length in (128, 129)}
    assert errors[128] != errors[129]  # two ways there are
    assert max(errors.values()) < 0.05
    assert errors[128] < 1.2 * errors[129]


def test_packed_sequences_are_kept_apart_by_attention_and_not_by_a_recurrent_model() -> None:
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert keeps_apart(factories.llama())
    assert keeps_apart(factories.gpt2())
    assert not keeps_apart(recurrent.eval())


def test_a_tokenizer_of_another_base_is_refused_in_training_and_in_evaluation() -> None:
    small = factories.llama(vocab_size=100)
    with pytest.raises(ForeignTokenizer, match="100 rows"):
        finetune(small, factories.tokenizer(), factories.recipe(), factories.rows())
    with pytest.raises(ForeignTokenizer, match="100 rows"):
        evaluate(small, factories.tokenizer(), Suite(factories.choices()), {})
