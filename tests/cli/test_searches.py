from typing import Any

import click
import pytest

from cli.searches import searched, show_search

RECIPE = {"kind": "finetune", "base": "llama@r1", "datasets": ["team/rows"]}


def wanted(**options: Any) -> dict[str, Any]:
    usual: dict[str, Any] = dict.fromkeys(("rank", "scale", "targets", "energy", "budget", "suite"))
    return searched(RECIPE, **(usual | options))


def test_a_search_holds_the_recipe_that_it_starts_from() -> None:
    assert wanted() == RECIPE
    assert wanted(rank="4") == RECIPE | {"rank": 4}
    assert wanted(rank="auto", budget="2kB", suite="team/s") == {
        "kind": "search", "over": "rank", "base": "llama@r1", "training": RECIPE, "suite": "team/s", "bytes": 2000,
    }  # fmt: skip
    assert wanted(rank="4", targets="auto", suite="team/s")["training"]["rank"] == 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": "high"}, "whole number"),
        ({"rank": "auto"}, "--suite S"),
        ({"rank": "auto", "scale": "auto", "suite": "team/s"}, "one search at a time"),
        ({"scale": "auto", "suite": "team/s", "energy": 0.9}, "--energy goes with --rank auto"),
        ({"scale": "auto", "suite": "team/s", "budget": "1kB"}, "--bytes goes with"),
        ({"suite": "team/s"}, "is for a search"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(click.UsageError, match=word):
        wanted(**options)


SCORE = {"calibration": -1.0, "report": -1.1}
TOLD: dict[str, Any] = {"metric": "likelihood", "items": {"calibration": 40, "report": 41}, "reason": "it is the best"}


def test_a_search_over_the_rank_is_plotted_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    full = {"rank": 4, "mean_rank": 4.0, "energy": 1.0, "bytes": 400, "score": SCORE}
    one = full | {"rank": 1, "energy": 0.7, "bytes": 100, "against_full": [-0.1, -0.2, -0.05]}
    candidates = {"bare": {"score": SCORE}, "full": full, "rank-1": one}
    spectrum = [[1.0, 0.7], [2.0, 0.9], [4.0, 1.0]]
    show_search(TOLD | {"over": "rank", "chosen": "rank-1", "candidates": candidates, "spectrum": spectrum})
    shown = capsys.readouterr().out
    assert "likelihood by rank" in shown
    assert "-0.1 (-0.2 to -0.05)" in shown
    assert "it is the best" in shown


def test_a_search_over_the_scale_is_a_table_with_what_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    candidates: dict[str, Any] = {
        "a": {"scale": 1.0, "learning_rate": 0.1, "steps": 4, "score": SCORE},
        "b": {"scale": 2.0, "learning_rate": 0.1, "steps": 2, "score": {"calibration": -2.0}},
        "c": {"scale": 1.0, "learning_rate": 0.2, "steps": 0, "dropped": "the loss is nan"},
    }
    show_search(TOLD | {"over": "scale", "chosen": "a", "candidates": candidates})
    shown = capsys.readouterr().out
    assert "diverged" in shown
    assert "c was dropped: the loss is nan" in shown
    assert "-2.000*" in shown or "-2*" in shown


def test_gains_by_placement_are_drawn_with_their_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"rank": 4, "bytes": 400, "score": SCORE, "gain": [0.2, 0.1, 0.3], "over": "bare", "learning_rate": 0.1}
    candidates = {"bare": {"score": SCORE}, "attention": one}
    show_search(TOLD | {"over": "targets", "chosen": "attention", "candidates": candidates})
    shown = capsys.readouterr().out
    assert "+0.2 (+0.1 to +0.3)" in shown
    assert "●" in shown
