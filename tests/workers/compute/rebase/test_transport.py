"""A base of another shape that computes the same gives the transported adapter the logits that it had."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.rebase import rewrites
from registry.core.errors import NotRunnable
from tests.workers import factories
from tests.workers.compute.rebase.test_align import FAMILIES, answers, lively, made, qwen2, qwen3, untied
from workers.compute.bank import attached
from workers.compute.data import Row
from workers.compute.lora import Adapter, Patch
from workers.compute.model import Model
from workers.compute.rebase import transport as tier
from workers.compute.rebase.depths import monotone
from workers.compute.rebase.tokens import number_cuts, shared_tokens, spellings
from workers.compute.rebase.transport import transport
from workers.compute.weights import read_adapter, write_adapter

GROUPED = {factories.llama, untied, qwen2, qwen3}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def prompts(count: int = 40) -> list[Row]:
    return [Row({"prompt": f"What is {i} and {i % 7} more? ", "completion": "x"}, "rows", i) for i in range(count)]


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "in other coordinates"])
@pytest.mark.parametrize("shape", rewrites.SHAPES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_another_shape_of_the_same_function_gives_the_adapter_its_logits_back(
    family: Callable[[], Model], shape: str, turned: bool, tmp_path: Path
) -> None:
    if shape == "groups" and family not in GROUPED:
        family = untied
    model = lively(family())
    adapter = factories.random_adapter(model, targets=("all-linear",))
    old, bare, expected = factories.saved(model, tmp_path / "old"), factories.logits(model), answers(model, adapter)
    new = rewrites.SHAPES[shape](model, 7)
    if turned:
        rewrites.everything(new, 7)
    base = factories.saved(new, tmp_path / "new")
    close(factories.logits(new), bare)
    found = transport(adapter, old, base)
    close(answers(new, found.adapter), expected)
    assert all(moved.likeness > tier.SURE for moved in found.modules.values())
    assert not found.lost
    if shape == "identity blocks":
        assert found.layers == (0, None, 1)
        added = {name for name, moved in found.modules.items() if moved.by == "new"}
        assert len(added) * 3 == len(found.modules)
        assert not any(found.adapter.patches[name].b_OR.any() for name in added)
    else:
        assert all(moved.by == "weights" for moved in found.modules.values())


@pytest.mark.parametrize("family", [factories.llama, untied], ids=["tied", "untied"])
def test_rows_of_the_vocabulary_go_where_their_tokens_are_in_a_wider_stream(
    family: Callable[[], Model], tmp_path: Path
) -> None:
    model = lively(family())
    chance = torch.Generator().manual_seed(1)
    adapter = factories.random_adapter(model)
    adapter.patches["model.embed_tokens"] = Patch(
        torch.randn(4, 259, generator=chance), torch.randn(32, 4, generator=chance) * 0.1, 2.0, embedding=True
    )
    if family is untied:
        adapter.patches["lm_head"] = Patch(
            torch.randn(4, 32, generator=chance) * 0.2, torch.randn(259, 4, generator=chance), 2.0
        )
    old, expected = factories.saved(model, tmp_path / "old"), answers(model, adapter)
    order = torch.randperm(259, generator=chance).tolist()
    place = torch.tensor(order).argsort()
    new = rewrites.cloned(model, 3)
    rewrites.vocabulary(new, order, more=5, seed=4)
    new.save_pretrained(tmp_path / "new")
    rewrites.renumbered(factories.tokenizer(), order).save_pretrained(tmp_path / "new")
    moved = transport(adapter, old, tmp_path / "new")
    assert moved.tokens == {"shared": 259, "old": 259, "new": 264}
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(9))
    with attached(new, moved.adapter), torch.no_grad():
        close(new(input_ids=place[ids]).logits[..., place], expected)


def test_heads_that_had_one_k_and_v_each_come_together_in_groups(tmp_path: Path) -> None:
    model = lively(untied())
    apart = rewrites.groups_split(model, 0)
    adapter = factories.random_adapter(apart, targets=("q_proj", "o_proj", "gate_proj"))
    old, expected = factories.saved(apart, tmp_path / "old"), answers(apart, adapter)
    rewrites.everything(model, 7)
    close(answers(model, transport(adapter, old, factories.saved(model, tmp_path / "new")).adapter), expected)


def test_parts_that_another_family_holds_in_one_module_come_together_and_apart_again(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = lively(untied())
    fused: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "phi3", **sizes, vocab_size=259, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, rms_norm_eps=llama.config.rms_norm_eps,
        )
    ).eval().requires_grad_(False)  # fmt: skip
    state = {name: value for name, value in llama.state_dict().items() if name in fused.state_dict()}
    for layer in range(2):
        block, mine = llama.model.layers[layer], f"model.layers.{layer}"
        q, k, v = (getattr(block.self_attn, f"{part}_proj").weight for part in "qkv")
        state[f"{mine}.self_attn.qkv_proj.weight"] = torch.cat([q, k, v])
        state[f"{mine}.mlp.gate_up_proj.weight"] = torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
    fused.load_state_dict(state)
    adapter = factories.random_adapter(llama, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))
    expected = answers(llama, adapter)
    old, new = factories.saved(llama, tmp_path / "llama"), factories.saved(fused, tmp_path / "fused")
    together = transport(adapter, old, new)
    assert together.adapter.config["target_modules"] == ["down_proj", "gate_up_proj", "qkv_proj"]
    close(answers(fused, together.adapter), expected)
    close(answers(llama, transport(together.adapter, new, old).adapter), expected)


def test_what_was_transported_is_written_and_read(tmp_path: Path) -> None:
    model = lively(factories.gpt2())
    adapter = factories.random_adapter(model, targets=("c_attn", "c_fc"))
    old, expected = factories.saved(model, tmp_path / "old"), answers(model, adapter)
    new = rewrites.identity_blocks(model, 0)
    rewrites.gains(new, 7)
    moved = transport(adapter, old, factories.saved(new, tmp_path / "new")).adapter
    write_adapter(moved, tmp_path / "adapter", base=factories.BASE, recipe=factories.SUITE)
    close(answers(new, read_adapter(tmp_path / "adapter")), expected)


# ── where weights leave doubt ────────────────────────────────────────────────


def unlike(tmp_path: Path) -> tuple[Model, Path, Model, Path]:
    model, other = factories.llama(0), factories.llama(1, hidden_size=48, intermediate_size=80)
    return model, factories.saved(model, tmp_path / "old"), other, factories.saved(other, tmp_path / "new")


def test_without_text_an_update_keeps_its_size_against_the_weight(tmp_path: Path) -> None:
    model, old, other, new = unlike(tmp_path)
    adapter = factories.random_adapter(model, targets=("all-linear",))
    found = transport(adapter, old, new)
    assert max(moved.likeness for moved in found.modules.values()) < 0.9
    for name, patch in adapter.patches.items():
        before, after = patch.update.norm(), found.adapter.patches[name].update.norm()
        w1, w2 = (side.get_submodule(name).weight.norm() for side in (model, other))
        assert after / float(w2) == pytest.approx(before / float(w1), rel=1e-4)


def test_text_is_read_where_weights_leave_doubt_and_not_elsewhere(tmp_path: Path) -> None:
    model, old, other, new = unlike(tmp_path)
    adapter = factories.random_adapter(model, targets=("all-linear",))
    found = transport(adapter, old, new, prompts())
    assert {moved.by for moved in found.modules.values()} == {"text"}
    assert answers(other, found.adapter).isfinite().all()
    same = transport(adapter, old, old, prompts())
    assert {moved.by for moved in same.modules.values()} == {"weights"}


def test_text_alone_gives_back_most_of_what_an_adapter_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    adapter.patches["model.embed_tokens"] = Patch(torch.randn(4, 259) * 0.1, torch.randn(32, 4), 1.0, embedding=True)
    adapter.patches["lm_head"] = Patch(torch.randn(4, 32) * 0.1, torch.randn(259, 4), 1.0)
    old, bare, expected = factories.saved(model, tmp_path / "old"), factories.logits(model), answers(model, adapter)
    new = rewrites.cloned(model, 7)
    rewrites.everything(new, 7)
    monkeypatch.setattr(tier, "SURE", 1.1)
    noise = ["".join(map(chr, torch.randint(33, 126, (40,)).tolist())) for _ in range(60)]
    rows = [Row({"prompt": text, "completion": "x"}, "noise", i) for i, text in enumerate(noise)]
    found = transport(adapter, old, factories.saved(new, tmp_path / "new"), rows)
    assert {moved.by for moved in found.modules.values()} == {"text"}
    assert (answers(new, found.adapter) - expected).norm() < 0.5 * (expected - bare).norm()


def test_layers_are_matched_on_text_where_weights_leave_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(factories.llama())
    adapter = factories.random_adapter(model)
    old = factories.saved(model, tmp_path / "old")
    new = factories.saved(rewrites.identity_blocks(model, 7), tmp_path / "new")
    monkeypatch.setattr(tier, "SURE", 1.1)
    assert transport(adapter, old, new, prompts()).layers == (0, None, 1)


def test_patches_of_layers_that_are_gone_are_named(tmp_path: Path) -> None:
    model = lively(factories.llama(num_hidden_layers=3))
    adapter = factories.random_adapter(model)
    old = factories.saved(model, tmp_path / "old")
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    found = transport(adapter, old, factories.saved(model, tmp_path / "new"))
    assert found.layers == (0, 2)
    assert found.lost == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


def test_layers_are_matched_in_their_order() -> None:
    like_AB = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.8, 0.3, 0.1, 0.7]])
    assert monotone(like_AB) == [None, 0, None, 1]
    assert monotone(torch.eye(3)) == [0, 1, 2]


# ── tokens ───────────────────────────────────────────────────────────────────


def test_tokens_are_the_same_by_their_bytes_and_special_ones_by_what_they_are_for() -> None:
    one, two = factories.merging_tokenizer(), factories.piece_tokenizer()
    first, second = spellings(one), spellings(two)
    assert b" the" in first
    shared = dict(shared_tokens(one, two, (len(one), len(two))))
    assert shared[first[b"he"]] == second[b"he"]
    assert shared[first[b" t"]] == second[b" t"]
    assert shared[one.bos_token_id] == two.bos_token_id
    named = factories.tokenizer()
    text = named.backend_tokenizer.to_str().replace("<s>", "<|begin|>")
    named._tokenizer, named.bos_token = type(named.backend_tokenizer).from_str(text), "<|begin|>"
    assert dict(shared_tokens(named, two, (len(named), len(two))))[named.bos_token_id] == two.bos_token_id


def test_tokenizers_that_cut_numbers_differently_are_told(tmp_path: Path) -> None:
    model = factories.llama(vocab_size=300)
    adapter = factories.random_adapter(model)
    for name, tokenizer in (("old", factories.tokenizer()), ("new", factories.merging_tokenizer())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert transport(adapter, tmp_path / "old", tmp_path / "new").numbers is None
    digits = factories.tokenizer()
    digits.add_tokens(["42", "2024"])
    digits.save_pretrained(tmp_path / "new")
    found = transport(adapter, tmp_path / "old", tmp_path / "new").numbers
    assert found == {"old": number_cuts(factories.tokenizer()), "new": number_cuts(digits)}


# ── what cannot be ───────────────────────────────────────────────────────────


def test_what_cannot_be_transported_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model)
    old = factories.saved(model, tmp_path / "old")

    def refused(base: Path, reason: str, one: Adapter = adapter, **options: Any) -> None:
        with pytest.raises(NotRunnable, match=reason):
            transport(one, old, base, **options)

    refused(factories.saved(factories.gpt2(), tmp_path / "gpt2"), "differ in gated neurons and the kind of norm")
    refused(factories.saved(made("opt", ffn_dim=64, word_embed_proj_dim=32), tmp_path / "opt"), "'opt' are not known")
    name, patch = next(iter(adapter.patches.items()))
    lengths = {name: Patch(patch.a_RI, patch.b_OR, patch.scale, magnitude_O=torch.ones(len(patch.b_OR)))}
    refused(old, "DoRA, whose lengths", Adapter(lengths, adapter.config))
    bits = factories.saved(model, tmp_path / "bits")
    told = json.loads((bits / "config.json").read_text())
    (bits / "config.json").write_text(json.dumps(told | {"quantization_config": {"load_in_4bit": True}}))
    refused(bits, "stored as fp4")


def test_bases_whose_tokenizers_share_no_token_are_refused(tmp_path: Path) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model)
    old = factories.saved(model, tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    words = Tokens(models.WordLevel({"alpha": 0, "beta": 1}, unk_token="alpha"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "new")
    with pytest.raises(NotRunnable, match="share no token"):
        transport(adapter, old, tmp_path / "new")
    assert shared_tokens(factories.tokenizer(), None, (5, 7)) == [(i, i) for i in range(5)]


