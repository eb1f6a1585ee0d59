"""The demo's data: repeatable, held out for real, large enough for a verdict, short enough for two cores."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.demo import bases, tasks
from docs.demo.tasks import TASKS, Task
from registry.core.recipes import FineTune
from registry.core.records import Split, item_id, split_of

DIGESTS = {"base": f"b3:{'0' * 64}", "datasets": [f"sha256:{'0' * 64}"]}
FEW: dict[Split, int] = {"gate": 20, "calibration": 10, "report": 5}
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@every_task
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=10, deadline=None)
def test_equal_seeds_give_equal_rows_and_others_do_not(task: Task, seed: int) -> None:
    assert task.train(seed, 50) == task.train(seed, 50) != task.train(seed + 1, 50)
    assert task.suite(seed, FEW) == task.suite(seed, FEW) != task.suite(seed + 1, FEW)


@every_task
def test_no_item_occurs_twice_and_none_was_trained_on(task: Task) -> None:
    train, suite = task.train(), task.suite()
    prompts = [row["prompt"] for row in train + suite]
    assert len(set(prompts)) == len(prompts) == tasks.TRAIN_ROWS + sum(tasks.SUITE_ROWS.values())


@every_task
def test_names_places_and_products_of_the_suite_were_never_trained_on(task: Task) -> None:
    trained = " ".join(row["prompt"] + row["completion"] for row in task.train() + tasks.refresh())
    for pool in (tasks.NAMES, tasks.CITIES, tasks.PRODUCTS):
        assert not [word for word in pool.of("held-out") if word in trained]


@pytest.mark.parametrize("pool", tasks.POOLS, ids=range(len(tasks.POOLS)))
def test_train_and_held_out_share_no_word_of_a_pool(pool: tasks.Pool) -> None:
    assert pool.of("train") and pool.of("held-out")
    assert not set(pool.of("train")) & set(pool.of("held-out"))


@every_task
def test_a_suite_has_the_promised_rows_of_each_split_and_three_hundred_that_decide(task: Task) -> None:
    splits = [split_of(item_id(row)) for row in task.suite()]
    assert {split: splits.count(split) for split in tasks.SUITE_ROWS} == tasks.SUITE_ROWS
    assert tasks.SUITE_ROWS["gate"] >= 300


@every_task
def test_prompts_and_completions_are_short(task: Task) -> None:
    for row in task.train() + task.suite():
        assert len(row["prompt"]) <= 110
        assert len(row.get("completion", "")) <= 45


def test_triage_asks_for_every_team_about_equally_often() -> None:
    answers = [row["answer"] for row in TASKS[0].suite()]
    assert all(60 <= answers.count(team) <= 125 for team in range(len(tasks.TEAMS)))


def test_train_rows_of_a_choice_have_the_right_choice_as_their_completion() -> None:
    assert {row["completion"] for row in TASKS[0].train()} == set(tasks.TEAMS)


def test_the_refresh_has_no_row_in_the_form_of_a_task() -> None:
    mine = {row["prompt"] for row in tasks.refresh()}
    assert len(mine) == tasks.TRAIN_ROWS
    assert not mine & {row["prompt"] for task in TASKS for row in task.train() + task.suite()}


def test_rows_are_written_one_a_line(tmp_path: Path) -> None:
    rows = TASKS[1].train(1, 5)
    path = tasks.write_rows(rows, tmp_path / "orders" / "train.jsonl")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows


@pytest.mark.parametrize("recipe", bases.RECIPES.values(), ids=bases.RECIPES)
@pytest.mark.parametrize("native", [True, False])
def test_every_recipe_is_valid_and_takes_fewer_steps_without_native_bf16(recipe: bases.Recipe, native: bool) -> None:
    made = FineTune.model_validate(bases.paced(recipe, native) | DIGESTS)
    assert (made.steps == recipe["steps"]) == native
    assert 0 < made.steps <= recipe["steps"]


def test_the_refresh_is_a_valid_recipe() -> None:
    assert FineTune.model_validate(bases.REFRESH | DIGESTS).steps == bases.REFRESH["steps"]


def test_there_is_a_recipe_and_a_margin_for_every_task() -> None:
    assert bases.RECIPES.keys() == bases.MARGINS.keys() == {task.name for task in TASKS}
