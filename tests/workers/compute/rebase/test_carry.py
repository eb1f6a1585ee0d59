"""What moves with the base, and the variants of a carry that take no training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from registry.core.errors import NotRunnable
from tests.workers import factories
from workers.compute.bank import attached
from workers.compute.evaluate import Suite
from workers.compute.finetune import finetune
from workers.compute.lora import Adapter, fresh
from workers.compute.lowrank import LowRank
from workers.compute.model import Model
from workers.compute.rebase import carry as module
from workers.compute.rebase.carry import carry, expressed, shifted
from workers.compute.rebase.free import PLAIN, best_carried
from workers.compute.rebase.text import answered, asked, reads, seen_by
from workers.compute.variants import varied

TOKENIZER = factories.tokenizer()
ROWS = factories.rows(40)


def untied(seed: int = 0) -> Model:
    return factories.llama(seed, tied=False)


def drifted(model: Model, by: float, seed: int = 7) -> Model:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * by)
    return model


def on(model: Model, adapter: Adapter) -> Tensor:
    with attached(model, adapter):
        return factories.logits(model)


def everything(model: Model, **changes: Any) -> Adapter:
    """DoRA on all linear modules, beside a head that is trained whole; new, so that it changes nothing."""
    recipe = factories.recipe(targets=("c_attn",) if model.config.model_type == "gpt2" else ("all-linear",), **changes)
    return varied(model, recipe, fresh(model, recipe))


def stirred(adapter: Adapter) -> Adapter:
    torch.manual_seed(3)
    patches = {
        name: replace(
            patch, b_OR=patch.b_OR + torch.randn_like(patch.b_OR) * 0.1,
            magnitude_O=None if patch.magnitude_O is None else patch.magnitude_O * torch.empty(1).uniform_(1, 1.2),
        )
        for name, patch in adapter.patches.items()
    }  # fmt: skip
    return replace(adapter, patches=patches, replaced={k: v + torch.randn_like(v) for k, v in adapter.replaced.items()})


makes = pytest.mark.parametrize("make", [untied, factories.gpt2], ids=["llama", "gpt2"])


@makes
def test_an_adapter_that_changes_nothing_changes_nothing_on_another_base(
    make: Callable[..., Model], tmp_path: Path
) -> None:
    old, new = (factories.saved(make(seed), tmp_path / str(seed)) for seed in (0, 1))
    adapter = everything(make(0), variant="dora", whole=("lm_head",))
    torch.testing.assert_close(
        on(make(1), carry(adapter, old, new)), factories.logits(make(1)), atol=1e-4, rtol=1e-4
    )


@makes
def test_carried_to_its_own_base_dora_is_the_same(make: Callable[..., Model], tmp_path: Path) -> None:
    base = factories.saved(make(), tmp_path)
    adapter = stirred(everything(make(), variant="dora", whole=("lm_head",)))
    moved = carry(adapter, base, base)
    for name, patch in adapter.patches.items():
        torch.testing.assert_close(moved.patches[name].magnitude_O, patch.magnitude_O)


def test_what_dora_moves_is_the_gain_of_every_row(tmp_path: Path) -> None:
    old, new = (factories.saved(untied(seed), tmp_path / str(seed)) for seed in (0, 1))
    adapter = stirred(everything(untied(), variant="dora"))
    moved = carry(adapter, old, new)
    for name, patch in adapter.patches.items():
        gains = []
        for model, magnitude_O in ((untied(0), patch.magnitude_O), (untied(1), moved.patches[name].magnitude_O)):
            assert magnitude_O is not None
            gains.append(magnitude_O / (model.get_submodule(name).weight + patch.update.dense()).norm(dim=1))
        torch.testing.assert_close(*gains, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"variant": "dora"}, {"whole": ("lm_head",)}], ids=["plain", "DoRA", "whole"])
def test_no_part_of_an_adapter_changes_nothing_and_all_of_it_is_the_carry(
    options: dict[str, Any], tmp_path: Path
) -> None:
    old, new = (factories.saved(untied(seed), tmp_path / str(seed)) for seed in (0, 1))
    adapter = stirred(everything(untied(), **options) if options else factories.random_adapter(untied()))
    nothing = on(untied(1), carry(adapter, old, new, 0.0))
    torch.testing.assert_close(nothing, factories.logits(untied(1)), atol=1e-4, rtol=1e-4)
    whole, half = (on(untied(1), carry(adapter, old, new, alpha)) for alpha in (1.0, 0.5))
    torch.testing.assert_close(whole, on(untied(1), carry(adapter, old, new)))
    assert float((half - nothing).norm()) > 0.05 * float((whole - nothing).norm())


def test_whole_parameters_are_moved_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (factories.saved(untied(seed), tmp_path / str(seed)) for seed in (0, 1))
    adapter = everything(untied(), whole=("lm_head",))
    at_once = carry(adapter, old, new).replaced["lm_head.weight"]
    monkeypatch.setattr(module, "_BLOCK", 100)
    assert torch.equal(carry(adapter, old, new).replaced["lm_head.weight"], at_once)
    with pytest.raises(NotRunnable, match="is 3×2 and 259×32"):
        carry(replace(adapter, replaced={"lm_head.weight": torch.ones(3, 2)}), old, new)


# ── variants ─────────────────────────────────────────────────────────────────


def test_between_equal_bases_every_variant_is_the_adapter_itself(tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path)
    model, adapter = untied(), factories.random_adapter(untied(), targets=("all-linear",))
    texts = answered(model, TOKENIZER, asked(model, TOKENIZER, ROWS), adapter)
    for made in (shifted(adapter, base, base), expressed(adapter, reads(model, texts, adapter), model, texts)):
        for name, patch in adapter.patches.items():
            torch.testing.assert_close(made.patches[name].update.dense(), patch.update.dense(), atol=1e-5, rtol=1e-4)


def test_a_shift_takes_away_what_lies_along_the_drift_and_keeps_the_rank(tmp_path: Path) -> None:
    adapter = factories.random_adapter(untied())
    old, new = factories.saved(untied(), tmp_path / "old"), untied()
    for name, patch in adapter.patches.items():  # the drift is three times the adapter, of its rank
        with torch.no_grad():
            new.get_submodule(name).weight += 3 * patch.update.dense()
    made = shifted(adapter, old, factories.saved(new, tmp_path / "new"))
    for name, patch in adapter.patches.items():
        assert float(made.patches[name].update.norm()) < 1e-3 * float(patch.update.norm())
        assert made.patches[name].a_RI.shape == patch.a_RI.shape


def test_the_inner_product_of_two_updates_is_that_of_their_matrices() -> None:
    one, two = (LowRank(torch.randn(r, 7), torch.randn(5, r)) for r in (2, 3))
    assert one.inner(two) == pytest.approx(float((one.dense() * two.dense()).sum()), rel=1e-5)


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_inputs_that_were_turned_are_read_as_they_were(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x₂ = Q·x₁ for every text, ridge finds A₂ = A·Qᵀ."""
    monkeypatch.setattr(module, "MEMORY", memory)
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    model = untied()
    adapter = factories.random_adapter(model)
    rows = factories.rows(120)
    texts = answered(model, TOKENIZER, asked(model, TOKENIZER, rows), adapter)
    q_DD = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    first = "model.layers.0.self_attn.q_proj"
    read = reads(model, texts, adapter)
    turned = untied()
    with torch.no_grad():  # the first layer's inputs: the embedding turned, norms without gains
        turned.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ q_DD.T)
    made = expressed(adapter, {first: read[first]}, turned, texts)
    torch.testing.assert_close(
        reads(turned, texts, made)[first], read[first], atol=1e-2 * float(read[first].abs().max()), rtol=1e-2
    )
    assert torch.equal(made.patches[first].b_OR, adapter.patches[first].b_OR)


def test_dora_is_not_expressed_anew() -> None:
    model, adapter = untied(), stirred(everything(untied(), variant="dora"))
    texts = answered(model, TOKENIZER, asked(model, TOKENIZER, ROWS), adapter)
    made = expressed(adapter, reads(model, texts, adapter), untied(1), texts)
    assert made.patches == adapter.patches


def test_only_prompts_are_looked_at() -> None:
    model = untied()
    unlike = [replace(row, value=row.value | {"completion": " 0"}) for row in ROWS]
    assert asked(model, TOKENIZER, ROWS) == asked(model, TOKENIZER, unlike)


# ── the choice ───────────────────────────────────────────────────────────────


def bases(tmp_path: Path, by: float) -> tuple[Path, Path]:
    return (
        factories.saved(untied(), tmp_path / "old"), factories.saved(drifted(untied(), by), tmp_path / "new")
    )  # fmt: skip


def test_nothing_but_the_plain_carry_is_taken_without_a_reason(tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path)
    adapter = factories.random_adapter(untied())
    best = best_carried(adapter, base, base, None, ROWS)
    assert best.chosen == PLAIN
    assert best.adapter is adapter
    assert set(best.candidates) >= {PLAIN, "× 0.5", "shifted", "expressed"}
    assert best.candidates[PLAIN] == {"score": pytest.approx(0.0, abs=1e-6), "better": [0.0, 0.0, 0.0]}


def test_unlabelled_text_alone_finds_what_answers_as_the_old_base_did(tmp_path: Path) -> None:
    adapter, moved = factories.random_adapter(untied()), untied()
    with torch.no_grad():  # half of the update is in the new base already
        for name, patch in adapter.patches.items():
            moved.get_submodule(name).weight += patch.update.dense() / 2
    old, new = factories.saved(untied(), tmp_path / "old"), factories.saved(moved, tmp_path / "new")
    best = best_carried(adapter, old, new, None, ROWS)
    assert best.chosen == "× 0.5"
    assert best.candidates["× 0.5"]["score"] == pytest.approx(0.0, abs=1e-5)


def test_an_update_that_is_far_too_large_is_scaled_down_by_a_suite(tmp_path: Path) -> None:
    old, new = bases(tmp_path, 0.01)
    recipe = factories.recipe(steps=40, targets=("all-linear",), batch_tokens=200)
    trained = finetune(untied(), TOKENIZER, recipe, factories.rows(24)).adapter
    large = replace(trained, patches={n: replace(p, b_OR=p.b_OR * 4) for n, p in trained.patches.items()})
    best = best_carried(large, old, new, Suite(factories.rows(200)))
    assert best.chosen == "× 0.25"
    assert "better than the plain carry" in best.reason
    torch.testing.assert_close(
        on(untied(), best.adapter), on(untied(), trained), atol=1e-3, rtol=1e-3
    )


def test_bases_that_cut_numbers_differently_are_chosen_between_by_the_suite_alone(tmp_path: Path) -> None:
    """Positions of the two do not pair, so inputs are not expressed anew, and without a suite nothing is chosen."""
    adapter = factories.random_adapter(factories.llama(vocab_size=300))
    old = factories.saved(factories.llama(vocab_size=300), tmp_path / "old")
    new = factories.saved(factories.llama(vocab_size=300, seed=1), tmp_path / "new")
    digits = factories.tokenizer()
    digits.add_tokens(["10", "11", "12"])
    digits.save_pretrained(new)
    by_suite = best_carried(adapter, old, new, Suite(factories.rows(200)), ROWS)
    assert {PLAIN, "× 0.5", "shifted"} <= set(by_suite.candidates)
    assert "expressed" not in by_suite.candidates
    by_text = best_carried(adapter, old, new, None, ROWS)
    assert (by_text.chosen, by_text.reason) == (PLAIN, "the bases cut text into other tokens: nothing to compare by")


def test_the_gates_items_have_no_say(tmp_path: Path) -> None:
    old, new = bases(tmp_path, 0.1)
    adapter = factories.random_adapter(untied())
    suite = Suite(factories.rows(200))
    calibration = suite.only("calibration")
    found = best_carried(adapter, old, new, suite)
    again = best_carried(adapter, old, new, calibration)
    assert found.candidates == again.candidates


def test_too_few_items_choose_nothing(tmp_path: Path) -> None:
    old, new = bases(tmp_path, 0.1)
    adapter = factories.random_adapter(untied())
    best = best_carried(adapter, old, new, Suite(factories.rows(30)))
    assert (best.chosen, best.adapter) == (PLAIN, adapter)
    assert "choose nothing" in best.reason


def test_what_the_old_base_answered_is_kept_by_text() -> None:
    model, adapter = untied(), factories.random_adapter(untied())
    seen = seen_by(model, TOKENIZER, ROWS, adapter)
    values = torch.arange(len(seen.adapted_PV)).float()
    apart = seen.by_text(values)
    assert len(apart) == len(seen.texts) == len(ROWS)
    assert torch.equal(torch.cat(list(apart)), values)
    with attached(model, adapter), torch.no_grad():
        logits = model(input_ids=torch.tensor([seen.texts[0].ids])).logits[0, seen.texts[0].first - 1 :]
    torch.testing.assert_close(seen.adapted_PV[: len(apart[0])], logits.log_softmax(-1)[: len(apart[0])])
    said = seen.texts[0].ids[seen.texts[0].first :]
    assert list(said[: len(apart[0])]) == seen.adapted_PV[: len(apart[0])].argmax(-1).tolist()
