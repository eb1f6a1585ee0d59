import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import BadRequest
from registry.core.recipes import (
    Combine,
    Compare,
    Compress,
    Evaluate,
    Extract,
    FineTune,
    FullFineTune,
    Merge,
    Rebase,
    inputs_of,
    parse_recipe,
    recipe_digest,
)

B1, B2 = ("b3:" + d * 64 for d in "12")
S1, S2, S3 = ("sha256:" + d * 64 for d in "123")
TRAIN = {"kind": "finetune", "base": B2, "datasets": [S1]}
RECIPES: list[dict[str, Any]] = [
    TRAIN,
    TRAIN | {"start": S2, "pull": 0.5, "targets": ["all-linear"]},
    {"kind": "full-finetune", "base": B2, "datasets": [S1, S2], "parameters": ["mlp"], "dtype": "fp32"},
    {"kind": "evaluate", "base": B1, "suite": S1, "adapters": [S2, S3]},
    {"kind": "merge", "base": B1, "adapter": S1},
    {"kind": "rebase", "tier": "carry", "adapter": S1, "old": B1, "base": B2},
    {"kind": "rebase", "tier": "warm-start", "adapter": S1, "old": B1, "base": B2, "training": TRAIN, "suite": S3,
     "made": {"carry": S2}},
    {"kind": "rebase", "tier": "distil", "adapter": S1, "old": B1, "base": B2, "inputs": S3, "distil": {"texts": 9}},
    {"kind": "compare", "old": B1, "base": B2},
    {"kind": "combine", "base": B1, "adapters": [S1, S2], "method": "ties", "density": 0.2, "weights": [1, -0.5]},
    {"kind": "compress", "base": B1, "adapter": S1, "bytes": 1000},
    {"kind": "extract", "base": B1, "tuned": B2, "rest": "drop"},
]
COMBINE, EXTRACT = RECIPES[-3], RECIPES[-1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_written_and_read_is_itself(recipe: dict[str, Any]) -> None:
    made = parse_recipe(recipe)
    assert parse_recipe(made.model_dump_json().encode()) == made
    assert recipe_digest(parse_recipe(json.dumps(recipe).encode())) == recipe_digest(made)


@given(st.integers(1, 4096), st.floats(1e-9, 1.0), st.integers(0, 2**32 - 1))
def test_equal_work_has_one_digest_and_other_work_another(rank: int, rate: float, seed: int) -> None:
    recipe = TRAIN | {"rank": rank, "learning_rate": rate, "seed": seed}
    turned = dict(reversed(recipe.items()))
    assert recipe_digest(parse_recipe(recipe)) == recipe_digest(parse_recipe(turned))
    assert recipe_digest(parse_recipe(recipe)) != recipe_digest(parse_recipe(recipe | {"steps": 7}))


def test_how_often_a_checkpoint_is_made_is_not_part_of_the_result() -> None:
    often = TRAIN | {"checkpoint_every": 5}
    assert recipe_digest(parse_recipe(TRAIN)) == recipe_digest(parse_recipe(often))
    within = (SEARCH | {"training": training} for training in (TRAIN, often))
    assert len({recipe_digest(parse_recipe(recipe)) for recipe in within}) == 1


@pytest.mark.parametrize(
    ("recipe", "inputs"),
    [
        (RECIPES[0], {"base": B2, "dataset.0": S1}),
        (RECIPES[1], {"base": B2, "dataset.0": S1, "start": S2}),
        (RECIPES[2], {"base": B2, "dataset.0": S1, "dataset.1": S2}),
        (RECIPES[3], {"base": B1, "suite": S1, "adapter.0": S2, "adapter.1": S3}),
        (RECIPES[4], {"base": B1, "adapter": S1}),
        (RECIPES[5], {"base": B2, "old": B1, "adapter": S1}),
        (RECIPES[6], {"base": B2, "old": B1, "adapter": S1, "dataset.0": S1, "suite": S3, "made.carry": S2}),
        (RECIPES[7], {"base": B2, "old": B1, "adapter": S1, "inputs": S3}),
        (RECIPES[8], {"base": B2, "old": B1}),
        (RECIPES[9], {"adapter.0": S1, "adapter.1": S2}),
        (RECIPES[10], {"adapter": S1}),
        (RECIPES[11], {"base": B1, "tuned": B2}),
        (
            RECIPES[8] | {"adapters": [S1, S3], "inputs": S2},
            {"base": B2, "old": B1, "adapter.0": S1, "adapter.1": S3, "inputs": S2},
        ),
        (RECIPES[5] | {"inputs": S2}, {"base": B2, "old": B1, "adapter": S1, "inputs": S2}),
    ],
)
def test_a_recipe_says_what_a_worker_needs(recipe: dict[str, Any], inputs: dict[str, str]) -> None:
    assert inputs_of(parse_recipe(recipe)) == inputs


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({}, "discriminator"),
        ({"kind": "distil"}, "distil"),
        (TRAIN | {"base": S1}, "named by b3"),
        (TRAIN | {"datasets": []}, "datasets"),
        (TRAIN | {"datasets": ["x"]}, "not a digest"),
        (TRAIN | {"targets": [" q_proj"]}, "spaces around"),
        (TRAIN | {"rank": 0}, "rank"),
        (TRAIN | {"learning_rate": -1}, "learning_rate"),
        (TRAIN | {"dropout": 1}, "dropout"),
        (TRAIN | {"seed": 1 << 32}, "seed"),
        (TRAIN | {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        (RECIPES[2] | {"rank": 8}, "rank"),
        (RECIPES[3] | {"adapters": [], "bare": False}, "nothing to evaluate"),
        (RECIPES[5] | {"training": TRAIN}, "takes no training recipe"),
        (RECIPES[5] | {"tier": "retrain"}, "needs a training recipe"),
        (RECIPES[6] | {"training": TRAIN | {"base": B1}}, "for another base"),
        (RECIPES[5] | {"tier": "distil"}, "needs a 'distil'"),
        (RECIPES[5] | {"distil": {}}, "takes no 'distil'"),
        (RECIPES[7] | {"distil": {"texts": 1}}, "texts"),
        (COMBINE | {"adapters": [S1]}, "adapters"),
        (COMBINE | {"weights": [1.0]}, "1 weights for 2 adapters"),
        (COMBINE | {"weights": [0, 0]}, "not be zero"),
        (COMBINE | {"weights": [1, float("nan")]}, "finite"),
        (COMBINE | {"density": None}, "needs a density"),
        (COMBINE | {"method": "svd"}, "takes no density"),
        (COMBINE | {"method": "concat", "density": None, "rank": 3}, "neither rank nor energy"),
        (COMBINE | {"rank": 3, "energy": 0.5}, "exclude each other"),
        (RECIPES[10] | {"rank": 3}, "exclude each other"),
        (EXTRACT | {"rank": 3, "energy": 0.5}, "exclude each other"),
        (EXTRACT | {"tuned": B1}, "the same weights"),
    ],
)
def test_a_recipe_that_cannot_be_says_why(recipe: dict[str, Any], word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        parse_recipe(recipe)


def test_a_mistyped_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(BadRequest, match=r"finetune\.learning_rat: there is no such key; did you mean learning_rate\?"):
        parse_recipe(TRAIN | {"learning_rat": 1})
    with pytest.raises(BadRequest, match=r"rebase\.training\.stepps: there is no such key; did you mean steps\?"):
        parse_recipe(RECIPES[6] | {"training": TRAIN | {"stepps": 1}})
    with pytest.raises(BadRequest, match=r"merge\.weather: there is no such key$"):
        parse_recipe({"kind": "merge", "base": B1, "adapter": S1, "weather": 1})


def test_kinds_are_told_apart() -> None:
    kinds = [type(parse_recipe(recipe)) for recipe in RECIPES]
    assert kinds[:6] == [FineTune, FineTune, FullFineTune, Evaluate, Merge, Rebase]
    assert kinds[6:] == [Rebase, Rebase, Compare, Combine, Compress, Extract]


SEARCH = {"kind": "search", "over": "rank", "base": B2, "training": TRAIN, "suite": S3}


def test_a_search_is_written_and_read_and_names_what_it_needs() -> None:
    made = parse_recipe(SEARCH)
    assert parse_recipe(made.model_dump_json().encode()) == made
    assert inputs_of(made) == {"base": B2, "dataset.0": S1, "suite": S3}
    assert recipe_digest(made) == recipe_digest(parse_recipe(SEARCH | {"energy": 0.95}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base": B1}, "for another base"),
        ({"training": TRAIN | {"start": S2}}, "trains from nothing"),
        ({"training": TRAIN | {"quantised": "nf4"}}, "full weights"),
        ({"energy": 0.5, "bytes": 100}, "exclude each other"),
        ({"over": "targets", "energy": 0.5}, "not over the targets"),
        ({"over": "scale", "bytes": 100}, "rank or the targets"),
        ({"over": "scale", "scales": [1, 1]}, "names one twice"),
        ({"over": "scale", "rates": list(range(1, 40))}, "at most 64"),
        ({"suite": None}, "suite"),
    ],
)
def test_a_search_that_cannot_be_says_why(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        parse_recipe(SEARCH | changes)


def test_work_that_says_no_measure_is_equal_to_work_that_says_the_usual_one() -> None:
    for recipe in ({"kind": "compress", "base": B1, "adapter": S1}, {"kind": "extract", "base": B1, "tuned": B2}):
        assert recipe_digest(parse_recipe(recipe)) == recipe_digest(parse_recipe(recipe | {"energy": 0.95}))
