from typing import Any

import pytest

from registry.core.errors import BadConfig
from registry.core.metrics import check_metric, is_binary
from registry.core.tasks import SCORES, parse_tasks, require_files

TASK: dict[str, Any] = {
    "task": "capitals", "output_type": "multiple_choice", "doc_to_text": "{{country}}:", "doc_to_choice": "cities",
    "doc_to_target": "right", "test_split": "test", "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}},
}  # fmt: skip
OTHER = TASK | {"task": "rivers", "dataset_kwargs": {"data_files": {"test": ["a.jsonl", "b.jsonl"]}}}


def spec(*tasks: dict[str, Any]) -> dict[str, Any]:
    return {"lm_eval": {"tasks": list(tasks)}}


def test_a_spec_without_lm_eval_has_no_tasks_and_scores_every_file() -> None:
    assert parse_tasks({"metrics": ["f1"]}) == []
    assert require_files([], ["a.jsonl"]) == {"a.jsonl"}


def test_what_tasks_name_is_scored_and_their_examples_are_not() -> None:
    shots = TASK | {
        "dataset_kwargs": {"data_files": {"test": "capitals.jsonl", "shots": "shots.jsonl"}},
        "fewshot_split": "shots", "num_fewshot": 3,
    }  # fmt: skip
    tasks = parse_tasks(spec(shots, OTHER))
    there = ["a.jsonl", "b.jsonl", "capitals.jsonl", "shots.jsonl"]
    assert require_files(tasks, there) == {"a.jsonl", "b.jsonl", "capitals.jsonl"}


def test_every_score_of_a_task_has_a_name_that_gates_take() -> None:
    for kind, scores in SCORES.items():
        said = TASK | {"output_type": kind, "metric_list": [{"metric": score} for score in scores]}
        [task] = parse_tasks(spec(said | {"filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}]}))
        assert [check_metric(name) for name in task.metrics()] == [f"lm-eval:{score},first" for score in scores]
        assert set(parse_tasks(spec(TASK | {"output_type": kind}))[0].metrics()) <= {f"lm-eval:{s}" for s in scores}
        assert all(is_binary(name) == ("perplexity" not in name and "bits" not in name) for name in task.metrics())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"process_docs": "x"}, "process_docs: this key is not taken: it runs code.*allowed are task, "),
        ({"include": "default.yaml"}, "include: this key is not taken"),
        ({"dataset_path": "squad"}, "dataset_path: Input should be 'json'"),
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "must be a .jsonl file at the top of the suite"),
        ({"dataset_kwargs": {"data_files": {"test": "../a.jsonl"}}}, "must be a .jsonl file at the top of the suite"),
        ({"doc_to_choice": [True, False]}, "should be a valid string"),
        ({"doc_to_choice": None}, "multiple_choice needs doc_to_choice"),
        ({"test_split": "dev"}, "split 'dev' is not in data_files, which has test"),
        ({"test_split": None}, "must say which rows are scored"),
        ({"num_fewshot": 2}, "num_fewshot needs a fewshot_split"),
        ({"num_fewshot": 2, "fewshot_split": "test"}, "in files of its own"),
        ({"metric_list": [{"metric": "bleu"}]}, "'bleu' is not one that items of multiple_choice have"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "custom"}]}]}, "should be 'lowercase'"),
        ({"generation_kwargs": {"do_sample": True}}, "do_sample: Input should be False"),
        ({"generation_kwargs": {"temperature": 0.7}}, "temperature is 0.7; outputs are greedy here"),
        ({"task": "a b"}, "task: String should match"),
    ],
)  # fmt: skip
def test_what_runs_code_reaches_outside_or_means_nothing_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadConfig, match=reason):
        parse_tasks(spec(TASK | change))


@pytest.mark.parametrize("said", [[], {"tasks": []}, {"tasks": "capitals"}, {"tasks": [TASK], "include_path": "x"}])
def test_lm_eval_is_a_list_of_tasks_and_nothing_else(said: Any) -> None:
    with pytest.raises(BadConfig, match="lm_eval"):
        parse_tasks({"lm_eval": said})


def test_a_row_is_scored_by_one_task_once() -> None:
    with pytest.raises(BadConfig, match="task 'capitals' is there twice"):
        parse_tasks(spec(TASK, TASK))
    with pytest.raises(BadConfig, match=r"'capitals.jsonl' is scored by two tasks"):
        parse_tasks(spec(TASK, TASK | {"task": "again"}))
