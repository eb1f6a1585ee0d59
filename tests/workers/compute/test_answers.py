import json
from pathlib import Path
from typing import Any

import pytest

from registry.core.errors import BadDataset, UnusableDataset
from registry.core.pool import Answered, input_id, parse_answers
from registry.core.recipes import Answers, inputs_of
from registry.core.records import item_id
from tests.workers import factories
from workers.compute.answers import answers, distinct, read_inputs
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate
from workers.compute.metrics import exact_match
from workers.compute.panel import BARE
from workers.compute.weights import write_adapter
from workers.run import run

TOKENIZER = factories.tokenizer()


def asked(rows: list[Row], metric: str, **suite: Any) -> dict[str, list[Answered]]:
    model = factories.llama()
    adapters = {"0": factories.random_adapter(model)}
    how = Suite([], (metric,), **({"max_new_tokens": 4} | suite))
    return answers(model, TOKENIZER, how, rows, adapters, bare=True)


def without(rows: list[Row], *names: str) -> list[Row]:
    return [Row({k: v for k, v in row.value.items() if k not in names}, row.path, row.line) for row in rows]


def test_the_answer_among_choices_is_the_one_that_accuracy_calls_right() -> None:
    rows = factories.choices(20)
    found = asked(without(rows, "answer"), "accuracy")
    model = factories.llama()
    scored = evaluate(model, TOKENIZER, Suite(rows, ("accuracy",)), {"0": factories.random_adapter(model)})
    for name in (BARE, "0"):
        right = {record.item: record.metrics["accuracy"] for record in scored[name]}
        for row, one in zip(rows, found[name], strict=True):
            assert (one.answer == row.value["choices"][row.value["answer"]]) == right[item_id(row.value)]
    assert len({one.answer for one in found["0"]}) > 1


def test_a_written_answer_is_what_exact_match_compares_and_needs_no_completion() -> None:
    rows = factories.rows(8)
    found = asked(without(rows, "completion"), "exact-match", form="regex:.*")
    model = factories.llama()
    scored = evaluate(
        model, TOKENIZER, Suite(rows, ("exact-match",), 4, "regex:.*"), {"0": factories.random_adapter(model)}
    )
    for name in (BARE, "0"):
        assert [one.answer for one in found[name]] == [(record.output or "").strip() for record in scored[name]]
        assert [one.parsed for one in found[name]] == [record.parsed for record in scored[name]]
        for one, record, row in zip(found[name], scored[name], rows, strict=True):
            assert exact_match(one.answer, [row.value["completion"]]) == record.metrics["exact-match"]


def test_inputs_of_another_form_than_the_metric_needs_are_refused_by_line() -> None:
    with pytest.raises(BadDataset, match=r"line 1.*must not have 'choices'"):
        asked(factories.choices(2), "exact-match")
    with pytest.raises(BadDataset, match=r"line 1.*need 'choices'"):
        asked(factories.rows(2), "accuracy")


def test_what_asks_the_same_is_one_input_and_what_is_known_is_none() -> None:
    rows = factories.rows(4)
    twice = Row(rows[1].value | {"completion": " another"}, "other.jsonl", 1)
    found = distinct([*rows, twice], [rows[0]])
    assert [input_id(row.value) for row in found] == sorted(input_id(row.value) for row in rows[1:])
    with pytest.raises(UnusableDataset, match="a pool needs others"):
        distinct(rows, rows)


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    (path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_job_leaves_answers_to_what_neither_suite_nor_training_has(tmp_path: Path) -> None:
    rows = [row.value for row in factories.rows(12)]
    made = factories.random_adapter(factories.llama())
    write_adapter(made, tmp_path / "adapter", base=factories.BASE, recipe="sha256:" + "0" * 64)
    suite = folder(tmp_path / "suite", rows[:3])
    (suite / "suite.json").write_text('{"metrics": ["exact-match", "likelihood"], "max_new_tokens": 4}')
    recipe = Answers(
        base=factories.BASE, suite=factories.SUITE, metric="exact-match", inputs=factories.DATASET,
        apart=("sha256:" + "6" * 64,), adapters=(factories.ADAPTER,), bare=True, precision="fp32",
    )  # fmt: skip
    given = {
        "base": factories.saved(factories.llama(), tmp_path / "base"), "adapter.0": tmp_path / "adapter",
        "suite": suite, "dataset.0": folder(tmp_path / "trained", rows[3:5]),
        "inputs": folder(tmp_path / "inputs", [{"prompt": row["prompt"]} for row in rows]),
    }  # fmt: skip
    assert given.keys() == inputs_of(recipe).keys()
    found = run(recipe, given, tmp_path / "out", lambda _: None).dump()
    assert (found["inputs"], found["answered"]) == (7, ["0", "bare"])
    for name in found["answered"]:
        told = parse_answers((tmp_path / "out" / f"answers-{name}.jsonl").read_bytes())
        assert {one.input["prompt"] for one in told.values()} == {row["prompt"] for row in rows[5:]}
    assert [row.line for row in read_inputs(given["inputs"])] == list(range(1, 13))
