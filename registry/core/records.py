"""Evaluation records: one line of JSON per item of a suite, the evidence that every gate judges.

    {"item": "<16 hex>", "split": "gate", "metrics": {"likelihood": -0.4, "accuracy": 1}, "parsed": null, "output": null}

An item is named by its content, so that two evaluations pair up without trusting any order. Items fall
into three splits by a hash of that name: what chose among candidates (calibration), what decides (gate)
and what is quoted (report) never overlap, in whichever suite a row turns up.
"""

import hashlib
from collections.abc import Iterable
from math import exp
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from .errors import BadRecords
from .manifest import Frozen, canonical_json
from .metrics import Metric, is_binary

Split = Literal["calibration", "gate", "report"]
SPLITS: tuple[Split, ...] = ("calibration", "gate", "report")
_FIFTHS: tuple[Split, ...] = ("calibration", "gate", "gate", "gate", "report")

_LARGEST_EXPONENT = 700.0

Summary = dict[Metric, dict[Split, dict[str, float]]]


class Record(Frozen):
    """What one candidate did on one item."""

    item: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    split: Split
    metrics: Annotated[dict[Metric, FiniteFloat], Field(min_length=1)]
    """Higher is better in every one of them."""
    parsed: bool | None = None
    """Whether the output had the form that the suite asks for; where it asks for none, whether it came to an end of
    its own; None where nothing was generated."""
    output: str | None = None

    @model_validator(mode="after")
    def _right_or_wrong(self) -> Self:
        for metric, value in self.metrics.items():
            if is_binary(metric) and value not in (0, 1):
                raise ValueError(f"{metric} is {value:g}; allowed are 0 and 1")
        return self


def item_id(row: dict[str, Any]) -> str:
    """The name of a suite's row: 16 hex digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(row)).hexdigest()[:16]


def split_of(item: str) -> Split:
    """Which split an item belongs to: 20 % calibration, 60 % gate, 20 % report.

    Hashed again, so that the split says nothing about the digits of the name itself.
    """
    drawn = hashlib.sha256(b"loractl/1 split\0" + item.encode()).digest()
    return _FIFTHS[int.from_bytes(drawn[:8], "big") % 5]


def to_jsonl(records: Iterable[Record]) -> bytes:
    """The lines of ``records`` in order of item: equal results are equal bytes, in whichever order they came."""
    return b"".join(canonical_json(_line(record)) + b"\n" for record in sorted(records, key=lambda r: r.item))


def _line(record: Record) -> dict[str, Any]:
    metrics = {name: int(value) if is_binary(name) else value for name, value in record.metrics.items()}
    return record.model_dump() | {"metrics": metrics}


def parse_records(data: bytes) -> tuple[Record, ...]:
    """Records from JSONL; `BadRecords` names the line and what is wrong with it."""
    found: dict[str, Record] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BadRecords(line=number, reason=f"{where}: {first['msg']}" if where else first["msg"]) from error
        if record.item in found:
            raise BadRecords(line=number, reason=f"item {record.item} occurs twice; every item is scored once")
        if record.split != split_of(record.item):
            expected = split_of(record.item)
            raise BadRecords(
                line=number, reason=f"item {record.item} is in split '{record.split}'; its hash says '{expected}'"
            )
        found[record.item] = record
    if not found:
        raise BadRecords(line=1, reason="there is no record; a suite has at least one item")
    return tuple(found.values())


def summary(records: Iterable[Record]) -> Summary:
    """Mean and number of items, per metric and split; splits without items are left out.

    Likelihood has its perplexity per byte beside it, exp(−mean).
    """
    values: dict[Metric, dict[Split, list[float]]] = {}
    for record in records:
        for metric, value in record.metrics.items():
            values.setdefault(metric, {}).setdefault(record.split, []).append(value)
    return {
        metric: {split: _mean(metric, some) for split, some in sorted(splits.items())}
        for metric, splits in sorted(values.items())
    }


def _mean(metric: Metric, values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    perplexity = {"perplexity": exp(min(-mean, _LARGEST_EXPONENT))} if metric == "likelihood" else {}
    return {"mean": mean, "n": len(values)} | perplexity
