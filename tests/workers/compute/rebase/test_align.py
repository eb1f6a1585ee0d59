"""Function-preserving rewrites of a base are undone: the aligned adapter gives the logits it gave before them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.rebase import rewrites
from registry.core.errors import NotRunnable
from tests.workers import factories
from workers.compute.bank import attached
from workers.compute.lora import Adapter, Patch
from workers.compute.model import Model
from workers.compute.rebase import align as tier
from workers.compute.rebase import symmetries
from workers.compute.rebase.align import align
from workers.compute.rebase.carry import carry
from workers.compute.rebase.symmetries import rotation
from workers.compute.weights import write_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def made(kind: str, **changes: Any) -> Model:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes))
    return model.eval().requires_grad_(False)


def untied() -> Model:
    return factories.llama(tied=False)


def neox() -> Model:
    return made("gpt_neox", rotary_pct=0.5)


def qwen2() -> Model:
    return made("qwen2", num_key_value_heads=2)


def qwen3() -> Model:
    return made("qwen3", num_key_value_heads=2, head_dim=8)


def phi3() -> Model:
    return made("phi3", num_key_value_heads=2)


FAMILIES: list[Callable[[], Model]] = [factories.llama, untied, factories.gpt2, neox, qwen2, qwen3, phi3]
REWRITES = rewrites.EXACT | {"everything": rewrites.everything, "some channels": rewrites.some_channels}


def lively(model: Model) -> Model:
    """With gains that differ from 1 and biases that differ from 0, as trained models have them."""
    chance = torch.Generator().manual_seed(5)
    for name, value in model.named_parameters():
        if value.ndim == 1 and not (name.endswith("bias") and ("ln_f" in name or "final" in name)):
            value.data += 0.2 * torch.randn(value.shape, generator=chance)
    return model


def answers(model: Model, adapter: Adapter) -> torch.Tensor:
    with attached(model, adapter):
        return factories.logits(model)


@pytest.fixture(params=["all of it", "some channels"])
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bases are compared on all there is, those of wide streams on some channels, and by blocks of neurons."""
    if request.param == "some channels":
        for name, value in {"_WIDE": 16, "_CHANNELS": 20, "_OUTPUTS": 5}.items():
            monkeypatch.setattr(tier, name, value)
        for name, value in {"_ASSIGNED": 16, "_BLOCK": 24, "_SAMPLE": 16}.items():
            monkeypatch.setattr(symmetries, name, value)


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_rewritten_base_gives_the_adapter_its_logits_back(
    family: Callable[[], Model], rewrite: rewrites.Rewrite, tmp_path: Path
) -> None:
    model = lively(family())
    adapter = factories.random_adapter(model, targets=("all-linear",))
    old, bare = factories.saved(model, tmp_path / "old"), factories.logits(model)
    expected = answers(model, adapter)
    rewrite(model, 7)
    new = factories.saved(model, tmp_path / "new")
    torch.testing.assert_close(factories.logits(model), bare, atol=3e-5, rtol=1e-5)
    assert (answers(model, carry(adapter, old, new)) - expected).abs().max() > 0.5
    torch.testing.assert_close(answers(model, align(adapter, old, new).adapter), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_what_the_bias_of_a_norm_brought_is_a_bias_that_peft_loads(tmp_path: Path) -> None:
    model = lively(factories.gpt2())
    adapter = factories.random_adapter(model, targets=("c_attn", "c_fc"))
    old, expected = factories.saved(model, tmp_path / "old"), answers(model, adapter)
    rewrites.gains(model, 7)
    moved = align(adapter, old, factories.saved(model, tmp_path / "new")).adapter
    assert set(moved.replaced) == {f"{name}.bias" for name in adapter.patches}
    write_adapter(moved, tmp_path / "adapter", base=factories.BASE, recipe=factories.SUITE)
    with_peft = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    torch.testing.assert_close(factories.logits(with_peft), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "turned"])
@pytest.mark.parametrize("family", [factories.llama, untied], ids=["tied", "untied"])
def test_rows_of_the_vocabulary_go_where_their_tokens_are(
    family: Callable[[], Model], turned: bool, tmp_path: Path
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
    if turned:
        rewrites.residual(model, 3)
    rewrites.vocabulary(model, order, more=5, seed=4)
    model.save_pretrained(tmp_path / "new")
    rewrites.renumbered(factories.tokenizer(), order).save_pretrained(tmp_path / "new")
    moved = align(adapter, old, tmp_path / "new").adapter
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(9))
    with attached(model, moved), torch.no_grad():
        found = model(input_ids=place[ids]).logits[..., place]
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("looks", ["one at some channels", "whole"])
def test_a_base_that_only_trained_on_keeps_its_coordinates(
    looks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    old = factories.saved(model, tmp_path / "old")
    chance = torch.Generator().manual_seed(2)
    for value in model.parameters():
        value.data += 0.1 * value.std() * torch.randn(value.shape, generator=chance)
    new = factories.saved(model, tmp_path / "new")
    spaces = align(adapter, old, new).matches.keys()
    if looks != "whole":
        monkeypatch.setattr(tier, "_WIDE", 16)
        monkeypatch.setattr(tier, "_CHANNELS", 20)
        monkeypatch.setattr(tier, "layer_maps", None)  # which nobody asks
    found = align(adapter, old, new)
    assert found.matches.keys() == spaces
    assert not any(match.moved for match in found.matches.values())
    for name, patch in adapter.patches.items():
        assert torch.equal(found.adapter.patches[name].a_RI, patch.a_RI)
        assert torch.equal(found.adapter.patches[name].b_OR, patch.b_OR)


@pytest.mark.usefixtures("seen")
def test_rewriting_is_found_under_training(tmp_path: Path) -> None:
    model = lively(factories.llama())
    adapter = factories.random_adapter(model, targets=("all-linear",))
    old, expected = factories.saved(model, tmp_path / "old"), answers(model, adapter)
    rewrites.everything(model, 7)
    chance = torch.Generator().manual_seed(2)
    for value in model.parameters():
        if value.ndim == 2:
            value.data += 0.02 * value.std() * torch.randn(value.shape, generator=chance)
    new = factories.saved(model, tmp_path / "new")
    found = align(adapter, old, new)
    assert all(found.matches[space].moved for space in ("residual", "layers.0.heads", "layers.1.neurons"))
    aligned, naive = (
        float((answers(model, one) - expected).norm()) for one in (found.adapter, carry(adapter, old, new))
    )
    assert aligned < 0.2 * naive


def test_neurons_that_are_each_others_likest_are_pairs_and_the_others_are_assigned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = torch.Generator().manual_seed(0)
    x_FN = symmetries.unit(torch.randn(60, 12, generator=chance).double())
    order_F = torch.randperm(60, generator=chance)
    noise = torch.randn(60, 12, generator=chance) * (torch.arange(60) % 3 == 0)[:, None]  # a third is like nothing
    y_FN = symmetries.unit(x_FN[order_F] + 0.3 * noise)

    def alike(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return x_FN[some] @ y_FN[others].T

    whole = symmetries._assigned(alike, 60)
    monkeypatch.setattr(symmetries, "_ASSIGNED", 8)
    monkeypatch.setattr(symmetries, "_BLOCK", 7)
    paired = symmetries._assigned(alike, 60)
    assert whole is not None
    assert paired is not None
    assert sorted(paired.tolist()) == list(range(60))
    assert (whole == order_F).double().mean() > 0.9
    assert (paired == order_F).double().mean() > 0.9
    monkeypatch.setattr(symmetries, "_PASSES", 1)
    others_FN = torch.randn(60, 12, generator=chance).double()
    assert symmetries._assigned(lambda some, others: x_FN[some] @ others_FN[others].T, 60) is None, "like none"


@pytest.mark.usefixtures("seen")
def test_unrelated_bases_stay_as_they_are(tmp_path: Path) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    old, other = (factories.saved(factories.llama(seed), tmp_path / str(seed)) for seed in (0, 1))
    assert not any(match.moved for match in align(adapter, old, other).matches.values())


def test_the_rotation_is_the_nearest_one() -> None:
    chance = torch.Generator().manual_seed(0)
    e_ND = torch.randn(100, 8, generator=chance).double()
    q_DD = torch.linalg.qr(torch.randn(8, 8, generator=chance).double()).Q
    found, match = rotation(e_ND, e_ND @ q_DD.T)
    assert found is not None
    torch.testing.assert_close(found, q_DD)
    assert match.moved
    assert match.after == pytest.approx(1)


def test_what_belongs_to_the_old_rows_is_refused(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    plain = factories.random_adapter(model)
    name, patch = next(iter(plain.patches.items()))
    lengths = {name: Patch(patch.a_RI, patch.b_OR, patch.scale, magnitude_O=torch.ones(len(patch.b_OR)))}
    for adapter, reason in (
        (Adapter(lengths, plain.config), "DoRA, whose lengths"),
        (Adapter(plain.patches, plain.config, {"lm_head.weight": torch.zeros(259, 32)}), "replaces 'lm_head.weight'"),
    ):
        with pytest.raises(NotRunnable, match=reason):
            align(adapter, base, base)
    wider = factories.saved(factories.llama(intermediate_size=96), tmp_path / "wider")
    with pytest.raises(NotRunnable, match="neurons 64 and 96"):
        align(plain, base, wider)
