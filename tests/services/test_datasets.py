"""Datasets and suites: rows are checked line by line, items of a suite are scored once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import select

from registry.core.errors import BadConfig, BadDataset, DatasetNotFound, PickleRefused, UnusableDataset
from registry.core.records import item_id, split_of
from registry.core.suites import SuiteSpec
from registry.db.models import DatasetVersion
from registry.services import datasets
from tests.world import ADMIN, World, caller, files_push

PAIR = {"prompt": "2+2=", "completion": " 4"}
CHOICE = {"prompt": "2+2=", "choices": [" 3", " 4"], "answer": 1}
CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True), st.integers(1, 50))
def test_counting_does_not_depend_on_how_the_bytes_arrive(prompts: list[str], size: int) -> None:
    rows = [{"prompt": prompt, "completion": "x"} for prompt in prompts]
    data = lines(*rows)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    gate, calibration = (sum(split_of(item_id(row)) == split for row in rows) for split in ("gate", "calibration"))
    assert datasets.count_rows(chunks, "data.jsonl", suite=SuiteSpec()) == (len(rows), gate, calibration)
    assert datasets.count_rows([data.rstrip(b"\n")], "data.jsonl", suite=None) == (len(rows), 0, 0)


@pytest.mark.parametrize(
    ("metrics", "row"), [(("accuracy",), PAIR), (("chrf", "exact-match"), CHOICE), (("accuracy",), CHAT)]
)
def test_a_row_that_no_metric_of_its_suite_scores_is_refused(metrics: tuple[str, ...], row: dict[str, object]) -> None:
    fine = CHOICE if row is not CHOICE else PAIR
    with pytest.raises(BadDataset, match="line 2: none of the suite's metrics applies to it"):
        datasets.count_rows([lines(fine, row)], "data.jsonl", suite=SuiteSpec(metrics=metrics))
    assert datasets.count_rows([lines(fine, row)], "data.jsonl", suite=SuiteSpec())[0] == 2


def test_a_suite_has_no_more_items_than_a_verifier_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_ITEMS", 3)
    rows = [{"prompt": str(number), "completion": "x"} for number in range(4)]
    assert datasets.count_rows([lines(*rows[:3])], "data.jsonl", suite=SuiteSpec())[0] == 3
    assert datasets.count_rows([lines(*rows)], "data.jsonl", suite=None)[0] == 4
    with pytest.raises(UnusableDataset, match="at most 3 items"):
        datasets.count_rows([lines(*rows)], "data.jsonl", suite=SuiteSpec())


def test_a_dataset_and_a_suite_are_numbered_series_of_their_own(world: World) -> None:
    assert world.push_rows("dataset", "team/rows", lines(PAIR, CHAT))["ref"] == "team/rows@v1"
    assert world.push_rows("dataset", "team/rows", lines(PAIR))["ref"] == "team/rows@v2"
    assert world.push_rows("dataset", "team/rows", lines(PAIR))["ref"] == "team/rows@v2"
    suite = world.push_rows("suite", "team/rows", lines(*({"prompt": str(i), "completion": "x"} for i in range(50))))
    assert suite["ref"] == "team/rows@v1"
    assert suite["rows"] == 50
    assert 15 < suite["gate_rows"] < 45
    with world.database.read() as session:
        assert datasets.show(session, ADMIN, "dataset", "team/rows").version == 2
        assert datasets.show(session, ADMIN, "dataset", "team/rows@v1").rows == 2
        assert datasets.show(session, ADMIN, "suite", "team/rows").gate_rows == suite["gate_rows"]
        rows = datasets.page(session, ADMIN, "dataset", after=0, limit=10)
        assert [info.name for info in datasets.infos(session, rows)] == ["team/rows"]
        assert list(datasets.page(session, caller("x", other=["read"]), "dataset", after=0, limit=10)) == []
        with pytest.raises(DatasetNotFound):
            datasets.show(session, caller("x", other=["read"]), "dataset", "team/rows")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (lines(PAIR) + b"{not json}\n", 2),
        (b"[1, 2]\n", 1),
        (lines({"prompt": "a"}), 1),
        (lines({"prompt": "a", "completion": ""}), 1),
        (b'{"prompt": "a", "completion": "b", "weight": NaN}\n', 1),
        (lines({"messages": [{"role": "user", "content": "hi"}]}), 1),
        (lines({"prompt": "a", "choices": ["x"], "answer": 0}), 1),
        (lines({"prompt": "a", "choices": ["x", "y"], "answer": 2}), 1),
        (lines(CHOICE, PAIR, CHOICE), 3),
    ],
)
def test_a_bad_row_is_refused_with_its_line(embedded: World, data: bytes, line: int) -> None:
    request, contents = files_push("suite", {"data.jsonl": data})
    info = embedded.open("suite", "team/suite", request)
    embedded.send(info, contents)
    with pytest.raises(BadDataset) as refused:
        embedded.commit(info.id)
    assert refused.value.line == line
    assert embedded.all(select(DatasetVersion)) == []


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_a_file_without_rows_is_refused_and_no_line_is_blamed(embedded: World, data: bytes) -> None:
    request, contents = files_push("suite", {"data.jsonl": data})
    info = embedded.open("suite", "team/suite", request)
    embedded.send(info, contents)
    with pytest.raises(UnusableDataset) as refused:
        embedded.commit(info.id)
    assert refused.value.message == "'data.jsonl': there are no rows"
    assert embedded.all(select(DatasetVersion)) == []


def test_choices_are_for_suites(embedded: World) -> None:
    request, contents = files_push("dataset", {"data.jsonl": lines(CHOICE)})
    info = embedded.open("dataset", "team/rows", request)
    embedded.send(info, contents)
    with pytest.raises(BadDataset, match="suite"):
        embedded.commit(info.id)


def test_only_jsonl_and_never_a_pickle(embedded: World) -> None:
    pickled = b"\x80\x04" + b"\0" * 9
    for name, data, refusal in (("data.csv", b"a,b", UnusableDataset), ("data.jsonl", pickled, PickleRefused)):
        request, contents = files_push("dataset", {name: data})
        info = embedded.open("dataset", "team/rows", request)
        embedded.send(info, contents)
        with pytest.raises(refusal):
            embedded.commit(info.id)


def test_a_line_without_an_end_is_bounded() -> None:
    endless = (b"x" * (1 << 20) for _ in range(64))
    with pytest.raises(BadDataset, match="bytes in one line"):
        datasets.count_rows(endless, "data.jsonl", suite=None)


TASK = {
    "task": "sums", "output_type": "loglikelihood", "test_split": "test", "doc_to_text": "{{n}}+1=",
    "doc_to_target": "{{n + 1}}", "dataset_kwargs": {"data_files": {"test": "sums.jsonl", "shots": "shots.jsonl"}},
}  # fmt: skip


def test_of_tasks_the_rows_that_are_scored_count(world: World) -> None:
    rows = [{"n": n} for n in range(50)]
    files = {"sums.jsonl": lines(*rows), "shots.jsonl": lines({"n": 99}, {"n": 99})}
    request, contents = files_push("suite", files, config={"lm_eval": {"tasks": [TASK]}})
    info = world.open("suite", "team/tasks", request)
    world.send(info, contents)
    world.commit(info.id)
    [version] = world.all(select(DatasetVersion))
    assert (version.rows, version.gate_rows) == (50, sum(split_of(item_id(row)) == "gate" for row in rows))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"process_results": "run"}, "lm_eval.tasks.0.process_results: this key is not taken"),
        ({"dataset_kwargs": {"data_files": {"test": "sums.jsonl"}}}, "no task names 'shots.jsonl'"),
        ({"dataset_kwargs": {"data_files": {"test": "others.jsonl"}}}, "'others.jsonl', which is not there"),
    ],
)
def test_tasks_are_checked_before_a_suite_is_committed(
    embedded: World, change: dict[str, object], reason: str
) -> None:
    files = {"sums.jsonl": lines({"n": 1}), "shots.jsonl": lines({"n": 2})}
    request, contents = files_push("suite", files, config={"lm_eval": {"tasks": [TASK | change]}})
    info = embedded.open("suite", "team/tasks", request)
    embedded.send(info, contents)
    with pytest.raises(BadConfig, match=reason):
        embedded.commit(info.id)
    assert embedded.all(select(DatasetVersion)) == []
