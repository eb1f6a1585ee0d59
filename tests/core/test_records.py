"""Evaluation records: names and splits by content, the line format, and what is refused."""

import contextlib
import json
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from registry.core.errors import BadRecords
from registry.core.records import SPLITS, Record, item_id, parse_records, split_of, summary, to_jsonl

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@st.composite
def some_records(draw: st.DrawFn) -> list[Record]:
    numbers = draw(st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
    return [
        Record(
            item=f"{number:016x}",
            split=split_of(f"{number:016x}"),
            metrics={"likelihood": draw(NUMBERS), "accuracy": draw(st.sampled_from([0, 1]))},
            parsed=draw(st.sampled_from([None, True, False])),
            output=draw(st.none() | st.text()),
        )
        for number in numbers
    ]


def line(item: str, **changes: object) -> bytes:
    body = {"item": item, "split": split_of(item), "metrics": {"likelihood": -0.5}, "parsed": None, "output": None}
    return json.dumps(body | changes).encode() + b"\n"


ITEM = item_id({"prompt": "a"})


@given(some_records())
def test_what_was_written_is_read_back(records: list[Record]) -> None:
    assert parse_records(to_jsonl(records)) == tuple(sorted(records, key=lambda record: record.item))


@given(some_records(), st.randoms())
def test_equal_results_are_equal_bytes_in_whichever_order_they_came(records: list[Record], random: Random) -> None:
    shuffled = records[:]
    random.shuffle(shuffled)
    assert to_jsonl(shuffled) == to_jsonl(records)


@given(st.dictionaries(st.text(), JSON))
def test_an_item_is_named_by_its_content_not_by_the_order_of_its_keys(row: dict[str, object]) -> None:
    assert item_id(row) == item_id(dict(reversed(row.items())))
    assert item_id(row) != item_id(row | {"one key more": 0})


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_records_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRecords):
        assert parse_records(data)


def test_names_and_splits_are_pinned_for_good() -> None:
    assert item_id({"prompt": "2+2=", "completion": "4"}) == "5cf3cd6e45850ed1"
    assert [split_of(f"{n:016x}") for n in range(8)] == [
        "gate", "gate", "gate", "report", "report", "calibration", "gate", "gate",
    ]


def test_splits_are_a_fifth_three_fifths_and_a_fifth() -> None:
    drawn = [split_of(f"{n:016x}") for n in range(20_000)]
    shares = [drawn.count(split) / len(drawn) for split in SPLITS]
    assert shares == pytest.approx([0.2, 0.6, 0.2], abs=4 * math.sqrt(0.24 / len(drawn)))


def test_the_split_is_independent_of_the_leading_digit_of_the_name() -> None:
    for digit in "0123456789abcdef":
        drawn = [split_of(f"{digit}{n:015x}") for n in range(3_000)]
        assert drawn.count("gate") / 3_000 == pytest.approx(0.6, abs=0.05)


def test_summary_gives_mean_and_number_per_metric_and_split() -> None:
    records = [
        Record(item="0" * 15 + "1", split="gate", metrics={"accuracy": 1, "likelihood": -1.0}),
        Record(item="0" * 15 + "2", split="gate", metrics={"accuracy": 0, "likelihood": -2.0}),
        Record(item="0" * 15 + "3", split="report", metrics={"accuracy": 1, "likelihood": -3.0}),
    ]
    assert summary(records) == {
        "accuracy": {"gate": {"mean": 0.5, "n": 2}, "report": {"mean": 1.0, "n": 1}},
        "likelihood": {
            "gate": {"mean": -1.5, "n": 2, "perplexity": pytest.approx(math.exp(1.5))},
            "report": {"mean": -3.0, "n": 1, "perplexity": pytest.approx(math.exp(3))},
        },
    }


def test_a_likelihood_of_nearly_nothing_has_a_finite_perplexity() -> None:
    found = summary([Record(item=ITEM, split="gate", metrics={"likelihood": -1e300})])
    assert math.isfinite(found["likelihood"]["gate"]["perplexity"])


def test_right_or_wrong_is_written_as_an_integer() -> None:
    assert b'"accuracy":1,' in to_jsonl([Record(item=ITEM, split="gate", metrics={"accuracy": 1, "likelihood": -1})])


@pytest.mark.parametrize(
    ("data", "number", "says"),
    [
        (line(ITEM) + line(ITEM), 2, "occurs twice"),
        (line(ITEM, metrics={"likelihood": math.nan}), 1, "finite number"),
        (line(ITEM, metrics={"likelihood": math.inf}), 1, "finite number"),
        (line(ITEM, metrics={"accuracy": 0.5}), 1, "allowed are 0 and 1"),
        (line(ITEM, metrics={"beauty": 1}), 1, "metrics.beauty"),
        (line(ITEM, metrics={"custom-binary:runs": 0.5}), 1, "custom-binary:runs is 0.5; allowed are 0 and 1"),
        (line(ITEM, metrics={}), 1, "metrics"),
        (line(ITEM, split="gate" if split_of(ITEM) != "gate" else "report"), 1, "its hash says"),
        (line(ITEM, extra=1), 1, "extra"),
        (line("../../etc/passwd"), 1, "item"),
        (line(ITEM) + b"not json\n", 2, "Invalid JSON"),
        (b"\n\n", 1, "no record"),
    ],
    ids=[
        "twice", "nan", "inf", "half", "unknown metric", "half a custom one", "no metric", "split", "unknown key",
        "name", "json", "empty",
    ],
)
def test_a_bad_line_is_refused_with_its_number(data: bytes, number: int, says: str) -> None:
    with pytest.raises(BadRecords, match=says) as refusal:
        parse_records(data)
    assert refusal.value.line == number


def test_a_record_does_not_change() -> None:
    record = Record(item=ITEM, split="gate", metrics={"accuracy": 1})
    with pytest.raises(ValidationError, match="frozen"):
        record.split = "report"  # type: ignore[misc]  # that it must not is the point
