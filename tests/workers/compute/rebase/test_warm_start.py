from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import LoractlError, TrainingFailed
from registry.core.recipes import FineTune
from tests.workers import factories
from workers.compute.evaluate import Suite
from workers.compute.finetune import Task, finetune
from workers.compute.lora import Adapter
from workers.compute.model import Model
from workers.compute.rebase.race import Chosen, Entrant, Race, as_raced, raced
from workers.compute.rebase.retrain import retrain
from workers.compute.rebase.starts import SCRATCH, Starts, starts_of
from workers.compute.rebase.warm_start import GENTLE, by_loss, warm_start, with_core

TOKENIZER = factories.tokenizer()
ROWS = factories.rows(60)
SUITE = Suite([*factories.rows(12), *factories.rows(90)[60:]])
RECIPE = factories.recipe(steps=40, batch_tokens=200, targets=("all-linear",))
THIRD, TENTH = (name.format("carry") for name in GENTLE)
SHORT = RECIPE.model_copy(update={"steps": 4, "learning_rate": 3e-3})


def starts(**adapters: Adapter) -> Starts:
    return Starts(adapters, {})


def drifted(model: Model, by: float, seed: int = 7) -> Model:
    """The model after an upgrade: its matrices are off by this share of their norm."""
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=chance)
            parameter.data += noise * (by * parameter.data.norm() / noise.norm())
    return model


@pytest.fixture(scope="module")
def carried() -> Adapter:
    """Trained on the base before it drifted."""
    return finetune(factories.llama(), TOKENIZER, RECIPE, ROWS).adapter


def won(model: Model, found: Starts, suite: Suite | None = None, recipe: FineTune = SHORT, rows: Any = ROWS) -> Chosen:
    return raced(model, TOKENIZER, warm_start(model, TOKENIZER, recipe, rows, found, suite))


@pytest.mark.parametrize("suite", [SUITE, None], ids=["by the suite", "by the loss"])
def test_on_a_drifted_base_a_warm_start_beats_scratch_in_as_many_steps(carried: Adapter, suite: Suite | None) -> None:
    chosen = won(drifted(factories.llama(), 0.1), starts(carry=carried), suite)
    assert chosen.start == "carry"
    assert chosen.candidates.keys() == {THIRD, TENTH, SCRATCH}
    assert chosen.steps == 3 * len(chosen.trained.losses) == 12
    assert chosen.candidates[THIRD]["score"] > chosen.candidates[SCRATCH]["score"]
    rates = [chosen.candidates[name]["learning_rate"] for name in (SCRATCH, THIRD, TENTH)]
    assert rates == pytest.approx([rates[0], rates[0] / 3, rates[0] / 10])
    if suite:
        estimate, lower, upper = chosen.candidates[THIRD]["over_scratch"]
        assert 0 < lower <= estimate <= upper


def test_training_begins_from_the_start_that_scores_best_without_a_step(carried: Adapter) -> None:
    worse = replace(carried, patches={k: replace(p, scale=p.scale * 0.1) for k, p in carried.patches.items()})
    chosen = won(factories.llama(), starts(carry=worse, align=carried), SUITE)
    assert chosen.start == "align"
    assert chosen.starts["align"]["score"] > chosen.starts["carry"]["score"] > chosen.starts["bare"]["score"]


def test_where_the_base_alone_is_better_than_every_start_only_scratch_is_trained(carried: Adapter) -> None:
    harmful = replace(carried, patches={k: replace(p, scale=-9 * p.scale) for k, p in carried.patches.items()})
    chosen = won(factories.llama(), starts(carry=harmful), SUITE)
    assert chosen.candidates.keys() == {SCRATCH}
    assert chosen.starts["carry"]["score"] < chosen.starts["bare"]["score"]


def test_a_start_of_another_shape_is_refused_and_stops_nothing(carried: Adapter) -> None:
    chosen = won(factories.llama(hidden_size=48), Starts({"carry": carried}, {"align": "not of one shape"}), SUITE)
    assert chosen.start == SCRATCH
    assert "its weight 48×48" in str(chosen.starts["carry"]["refused"])
    assert chosen.starts["align"] == {"refused": "not of one shape"}


def test_with_few_rows_only_the_core_of_the_start_changes(carried: Adapter) -> None:
    chosen = won(drifted(factories.llama(), 0.1), starts(carry=carried), rows=ROWS[:20])
    assert chosen.start == "carry"
    for name, patch in chosen.trained.adapter.patches.items():
        before = carried.patches[name]
        assert torch.equal(patch.a_RI, before.a_RI)
        core_RR = torch.linalg.lstsq(before.b_OR.double(), patch.b_OR.double()).solution
        torch.testing.assert_close(before.b_OR.double() @ core_RR, patch.b_OR.double(), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(patch.b_OR, before.b_OR, atol=1e-4)
    assert chosen.candidates[THIRD]["loss"] < chosen.candidates[SCRATCH]["loss"]


def test_a_core_changes_nothing_before_it_is_trained(carried: Adapter) -> None:
    model = factories.llama()
    still = RECIPE.model_copy(update={"steps": 1, "learning_rate": 1e-30})
    trained = finetune(model, TOKENIZER, still, ROWS, start=with_core(carried)).adapter
    for name, patch in carried.patches.items():
        torch.testing.assert_close(trained.patches[name].b_OR, patch.b_OR, atol=1e-6, rtol=1e-5)


def test_a_candidate_that_diverges_is_out_of_its_own_race_alone(carried: Adapter) -> None:
    model = factories.llama()
    wild = replace(carried, patches={k: replace(p, b_OR=p.b_OR * float("nan")) for k, p in carried.patches.items()})
    entrants = {"carry": Entrant("carry", Task(SHORT, ROWS, wild)), SCRATCH: Entrant(SCRATCH, Task(SHORT, ROWS))}
    fields = [entrants, {"carry": entrants["carry"]}, {SCRATCH: entrants[SCRATCH]}]
    found = dict(as_raced(model, TOKENIZER, [Race(field, by_loss) for field in fields]))
    assert isinstance(found[1], TrainingFailed)
    both, alone = found[0], found[2]
    assert isinstance(both, Chosen)
    assert isinstance(alone, Chosen)
    assert both.start == alone.start == SCRATCH
    assert "the loss is nan" in str(both.candidates["carry"]["dropped"])


def test_races_on_one_base_give_what_each_gives_alone(carried: Adapter) -> None:
    model = drifted(factories.llama(), 0.1)
    recipes = [SHORT, SHORT.model_copy(update={"steps": 6, "seed": 1})]
    races = [warm_start(model, TOKENIZER, recipe, ROWS, starts(carry=carried), None) for recipe in recipes]
    together: Mapping[int, Chosen | LoractlError] = dict(as_raced(model, TOKENIZER, races))
    for place, race in enumerate(races):
        alone, beside = raced(model, TOKENIZER, race), together[place]
        assert isinstance(beside, Chosen)
        assert beside.candidate == alone.candidate
        torch.testing.assert_close(
            torch.tensor(beside.trained.losses), torch.tensor(alone.trained.losses), rtol=1e-4, atol=1e-5
        )


def test_after_a_short_training_the_start_is_tried_at_one_rate_alone(carried: Adapter) -> None:
    model = drifted(factories.llama(), 0.1)
    race = warm_start(model, TOKENIZER, SHORT, ROWS, starts(carry=carried), None, candidates=2)
    assert list(race.entrants) == [THIRD, SCRATCH]


def test_who_is_not_wanted_any_more_leaves_the_others_to_their_end(carried: Adapter) -> None:
    model = factories.llama()
    races = [warm_start(model, TOKENIZER, SHORT, ROWS, starts(carry=carried), None) for _ in range(2)]
    unwanted: set[int] = set()
    found = dict(as_raced(model, TOKENIZER, races, report=lambda now: unwanted.add(0), unwanted=unwanted))
    assert found.keys() == {1}


def test_progress_counts_the_steps_of_all_candidates(carried: Adapter) -> None:
    model = factories.llama()
    told: list[dict[str, Any]] = []
    raced(model, TOKENIZER, warm_start(model, TOKENIZER, SHORT, ROWS, starts(carry=carried), None), told.append)
    assert [now["step"] for now in told] == list(range(1, 13))
    assert {now["steps"] for now in told} == {12}
    assert {now["candidate"] for now in told} == {THIRD, TENTH, SCRATCH}


def test_a_race_that_was_stopped_ends_in_the_same_factors(carried: Adapter, tmp_path: Path) -> None:
    model = drifted(factories.llama(), 0.1)

    def race() -> Race:
        return warm_start(model, TOKENIZER, SHORT, ROWS, starts(carry=carried), SUITE)

    def stop(now: dict[str, Any]) -> None:
        if now["step"] > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        raced(model, TOKENIZER, race(), stop, tmp_path)
    seen: list[int] = []
    resumed = raced(model, TOKENIZER, race(), lambda now: seen.append(now["step"]), tmp_path)
    whole = raced(model, TOKENIZER, race())
    assert min(seen) > 6
    assert resumed.candidates == whole.candidates
    for name, patch in whole.trained.adapter.patches.items():
        assert torch.equal(patch.a_RI, resumed.trained.adapter.patches[name].a_RI)
        assert torch.equal(patch.b_OR, resumed.trained.adapter.patches[name].b_OR)


# ── retraining ───────────────────────────────────────────────────────────────


def test_retraining_starts_from_the_best_start_that_recovers_enough_and_else_from_scratch(carried: Adapter) -> None:
    model = factories.llama()
    asked = Suite(SUITE.rows, ("likelihood",))
    own = retrain(model, TOKENIZER, SHORT, ROWS, starts(align=carried), asked, None).starts
    gain = own["align"]["score"] - own["bare"]["score"]
    found = {
        before: [*retrain(model, TOKENIZER, SHORT, ROWS, starts(align=carried), asked, before).entrants]
        for before in (None, gain, 3.2 * gain, 3.5 * gain)
    }
    assert found == {None: [SCRATCH], gain: ["align"], 3.2 * gain: ["align"], 3.5 * gain: [SCRATCH]}
    assert [*retrain(model, TOKENIZER, SHORT, ROWS, starts(align=carried), None, gain).entrants] == [SCRATCH]


def test_retraining_from_scratch_is_the_recipe_anew(carried: Adapter) -> None:
    model = factories.llama()
    chosen = raced(model, TOKENIZER, retrain(model, TOKENIZER, SHORT, ROWS, starts(carry=carried), SUITE, None))
    assert chosen.trained.losses == finetune(model, TOKENIZER, SHORT, ROWS).losses


def test_three_factors_of_the_old_base_are_trained_on_as_their_own(carried: Adapter) -> None:
    recipe = SHORT.model_copy(update={"variant": "three-factor"})
    chosen = won(drifted(factories.llama(), 0.1), starts(carry=carried), recipe=recipe)
    assert not any("dropped" in found for found in chosen.candidates.values())
    assert all(torch.equal(p.a_RI, carried.patches[k].a_RI) for k, p in chosen.trained.adapter.patches.items())


# ── starts ───────────────────────────────────────────────────────────────────


def test_on_a_base_of_another_depth_a_warm_start_begins_with_what_was_transported(
    tmp_path: Path, carried: Adapter
) -> None:
    deeper = factories.llama(num_hidden_layers=3)
    old, new = factories.saved(factories.llama(), tmp_path / "old"), factories.saved(deeper, tmp_path / "new")
    found = starts_of(carried, old, new, ROWS)
    assert "transport" in found.adapters
    chosen = won(deeper, found)
    assert "refused" not in chosen.starts["transport"]
    assert chosen.trained.adapter.patches.keys() <= found.adapters["transport"].patches.keys()

def test_an_alignment_that_moves_nothing_is_no_start_of_its_own(tmp_path: Path, carried: Adapter) -> None:
    old = factories.saved(factories.llama(), tmp_path / "old")
    new = factories.saved(drifted(factories.llama(), 0.05), tmp_path / "new")
    assert starts_of(carried, old, new).adapters.keys() == {"carry"}


def test_what_cannot_be_aligned_is_carried_and_says_why(tmp_path: Path) -> None:
    old, new = (factories.saved(factories.llama(seed), tmp_path / str(seed)) for seed in (0, 1))
    model = factories.llama()
    adapter = finetune(model, TOKENIZER, factories.recipe(steps=2, variant="dora"), ROWS[:12]).adapter
    found = starts_of(adapter, old, new)
    assert found.adapters.keys() == {"carry"}
    assert "DoRA" in found.refused["align"]
