from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import BadRequest, RankTooHigh, SuiteTooSmall, TrainingFailed
from registry.core.recipes import Search
from tests.workers import factories
from workers.compute.data import Row
from workers.compute.evaluate import Suite
from workers.compute.finetune import finetune
from workers.compute.lora import Adapter
from workers.compute.metrics import Difference
from workers.compute.search import Found, Study, search
from workers.compute.search.by_targets import cost, groups_of, targets_of

TOKENIZER = factories.tokenizer()
ROWS, ITEMS = factories.rows(40), factories.rows(200)[40:]
SHORT: dict[str, Any] = {"steps": 12, "batch_tokens": 160}


def asked(over: str, training: dict[str, Any] | None = None, **options: Any) -> Search:
    recipe = factories.recipe(**(SHORT | (training or {})))
    words = {"over": over, "base": factories.BASE, "suite": factories.SUITE, "training": recipe}
    return Search.model_validate(words | options)


def found(recipe: Search, items: list[Row] = ITEMS, **options: Any) -> tuple[Study, Found]:
    return search(factories.llama(), TOKENIZER, recipe, ROWS, Suite(items), **options)


def equal(one: Adapter, other: Adapter) -> bool:
    return one.patches.keys() == other.patches.keys() and all(
        torch.equal(patch.a_RI, other.patches[name].a_RI) and torch.equal(patch.b_OR, other.patches[name].b_OR)
        for name, patch in one.patches.items()
    )


def test_at_all_of_the_energy_the_cut_is_the_update_that_was_trained() -> None:
    _, result = found(asked("rank", energy=1.0, full_rank=6))
    trained = finetune(factories.llama(), TOKENIZER, factories.recipe(**SHORT, rank=6), ROWS).adapter
    assert result.chosen == "energy-1"
    for name, patch in trained.patches.items():
        made = result.adapter.patches[name].update
        torch.testing.assert_close(made.b_OR @ made.a_RI, patch.update.b_OR @ patch.update.a_RI, atol=1e-5, rtol=1e-4)


def test_less_energy_is_less_rank_and_its_score_is_in_the_same_pass() -> None:
    study, result = found(asked("rank", energy=0.5, full_rank=8))
    known = result.candidates
    assert known["rank-1"]["bytes"] < known["rank-4"]["bytes"] < known["full"]["bytes"]
    assert known["rank-1"]["energy"] < known["rank-4"]["energy"] < known["full"]["energy"] == 1.0
    assert known["energy-0.5"]["energy"] >= 0.5
    assert all(found["score"].keys() == {"calibration", "report"} for found in known.values())
    assert [rank for rank, _ in result.facts["spectrum"]] == list(range(1, 9))
    assert result.recipe.rank == known[result.chosen]["rank"]
    assert study.items["calibration"] >= 20


def test_a_budget_of_bytes_is_kept_and_one_below_the_least_is_refused_before_training() -> None:
    _, result = found(asked("rank", bytes=2000, full_rank=8))
    assert 0 < result.candidates[result.chosen]["bytes"] <= 2000
    with pytest.raises(BadRequest, match="bytes: 10 is below 192"):
        found(asked("rank", bytes=10), report=lambda _: pytest.fail("it trains"))


def test_a_full_rank_above_the_sides_is_refused() -> None:
    with pytest.raises(RankTooHigh, match="Rank 40"):
        found(asked("rank", full_rank=40))


def test_a_scale_and_a_rate_are_found_together_and_the_worse_half_ends_early() -> None:
    _, result = found(asked("scale", {"learning_rate": 1e-3}, scales=(1.0, 8.0), rates=(0.01, 1.0, 10.0)))
    tried = {name: candidate for name, candidate in result.candidates.items() if name != "bare"}
    assert len(tried) == 6
    assert sorted(candidate["steps"] for candidate in tried.values()) == [3, 3, 3, 6, 12, 12]
    ended = [candidate for candidate in tried.values() if candidate["steps"] == 12]
    assert result.candidates[result.chosen]["score"] == max(
        (candidate["score"] for candidate in ended), key=lambda score: float(score["calibration"])
    )
    alone = finetune(factories.llama(), TOKENIZER, result.recipe, ROWS)
    assert alone.losses == pytest.approx(result.trained.losses, rel=5e-3)


def test_a_candidate_that_diverges_is_dropped_and_told() -> None:
    wild = {"max_grad_norm": 1e30}
    _, result = found(asked("scale", wild, scales=(1.0,), rates=(0.1, 1e30)))
    assert result.chosen == "scale-1-rate-0.1"
    assert "dropped" in result.candidates["scale-1-rate-1e+30"]
    with pytest.raises(TrainingFailed, match="every candidate diverged"):
        found(asked("scale", wild, scales=(1.0,), rates=(1e29, 1e30)))


def test_placements_are_compared_at_equal_bytes() -> None:
    _, result = found(asked("targets", {"learning_rate": None, "rank": 16}))
    placed = {name: candidate for name, candidate in result.candidates.items() if name != "bare"}
    assert {"attention", "feed-forward"} <= placed.keys()
    budget = 4 * result.facts["parameters"]
    for candidate in placed.values():
        of_one_rank = candidate["bytes"] // candidate["rank"]
        assert budget - of_one_rank < candidate["bytes"] <= budget
    assert result.recipe.targets == tuple(placed[result.chosen]["targets"])
    assert result.recipe.learning_rate == placed[result.chosen]["learning_rate"]
    best = placed[result.chosen]["gain"]
    assert best[1] <= best[0] <= best[2]


def test_groups_hold_every_module_that_may_have_factors_and_are_named_by_their_ends() -> None:
    model = factories.llama()
    groups = groups_of(model)
    sizes = {name: len(modules) for name, modules in groups.items()}
    assert sizes == {"attention": 8, "feed-forward": 6, "embeddings": 1}  # the head is tied
    untied = factories.llama(tied=False)
    assert targets_of(untied, groups_of(untied)["embeddings"]) == ("embed_tokens", "lm_head")
    assert targets_of(model, groups["feed-forward"]) == ("gate_proj", "up_proj", "down_proj")
    both_called_c_proj = groups_of(factories.gpt2())
    assert set(targets_of(factories.gpt2(), both_called_c_proj["attention"])) == {"c_attn", "attn.c_proj"}


def test_bytes_below_rank_1_of_a_placement_are_refused() -> None:
    with pytest.raises(BadRequest, match="100 bytes are too few: rank 1 on"):
        found(asked("targets", bytes=100))


def test_a_group_that_the_bytes_are_too_few_for_is_dropped() -> None:
    groups = groups_of(factories.llama())
    needed = {name: 4 * cost(factories.llama(), modules) for name, modules in groups.items()}
    _, result = found(asked("targets", bytes=max(needed["attention"], needed["embeddings"])))
    dropped = {name for name, candidate in result.candidates.items() if "too few" in candidate.get("dropped", "")}
    assert "feed-forward" in dropped
    assert result.chosen not in dropped


def test_a_suite_that_is_too_small_to_choose_by_is_refused_with_its_number() -> None:
    few = ITEMS[:30]
    with pytest.raises(SuiteTooSmall, match=r"has \d+ items scored by likelihood; at least 20"):
        found(asked("rank"), few, report=lambda _: pytest.fail("it trains"))


@pytest.mark.parametrize("over", ["rank", "scale", "targets"])
@pytest.mark.parametrize("at", [4, 14])
def test_a_search_that_was_stopped_ends_in_the_same_bytes(over: str, at: int, tmp_path: Path) -> None:
    recipe = asked(over, {"dropout": 0.1})
    _, whole = found(recipe)
    told = 0

    def stop(_: dict[str, Any]) -> None:
        nonlocal told
        told += 1
        if told == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(recipe, report=stop, checkpoint_dir=tmp_path)
    _, resumed = found(recipe, checkpoint_dir=tmp_path)
    assert equal(resumed.adapter, whole.adapter)
    assert (resumed.chosen, resumed.candidates) == (whole.chosen, whole.candidates)


def test_the_gate_split_is_not_looked_at() -> None:
    _, result = found(asked("rank"))
    assert {split for candidate in result.candidates.values() for split in candidate["score"]} <= {
        "calibration", "report"
    }  # fmt: skip


def test_a_difference_is_clear_when_its_interval_says_so() -> None:
    assert Difference(0.2, 0.1, 0.3).clearly_better
    assert not Difference(0.2, -0.1, 0.3).clearly_better
    assert Difference(-0.2, -0.3, -0.1).clearly_worse(0.05)
    assert not Difference(-0.2, -0.3, -0.1).clearly_worse(0.15)
