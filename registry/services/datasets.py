"""Datasets and suites: series of content-addressed JSONL; a suite's rows fall into splits by their hash."""

from collections.abc import Iterable, Iterator, Sequence

from sqlmodel import Session, col, select

from registry.core.errors import BadDataset, UnusableDataset
from registry.core.records import item_id, split_of
from registry.core.rows import MAX_LINE_BYTES, parse_input, parse_object, parse_row
from registry.core.suites import SuiteSpec, metrics_of
from registry.db import queries
from registry.db.models import Dataset, DatasetVersion
from registry.schemas import DatasetInfo

from .references import find_dataset
from .tokens import Caller

MAX_ITEMS = 1_000_000
"""Of a suite: all are held against one another, some 150 bytes each."""


def count_rows(
    chunks: Iterable[bytes],
    path: str,
    *,
    suite: SuiteSpec | None,
    scored: bool = True,
    seen: dict[str, str] | None = None,
) -> tuple[int, int, int]:
    """Rows, and rows in the gate and in the calibration split, of one JSONL file that arrives in chunks.

    ``suite``: None for a dataset. Rows of tasks of lm-eval are any objects; and where they are not ``scored``, but
    examples in front of others, they do not count. ``seen`` collects a suite's items over its files: an item that
    occurs twice would be scored twice. `BadDataset` names the line.
    """
    tasks = suite is not None and bool(suite.tasks)
    rows = gate = calibration = 0
    items = seen if seen is not None else {}
    for number, line in enumerate(_lines(chunks, path), start=1):
        if not line.strip():
            continue
        read = parse_object if tasks else parse_row if suite else parse_input
        row = read(line, path, number)
        if not scored:
            continue
        if not suite and "choices" in row and "answer" in row:
            raise BadDataset(path=path, line=number, reason="rows with 'choices' and 'answer' belong in a suite")
        rows += 1
        if suite:
            if not tasks and not metrics_of(suite.metrics, choices="choices" in row):
                reason = f"none of the suite's metrics applies to it: {', '.join(suite.metrics or ())}"
                raise BadDataset(path=path, line=number, reason=reason)
            item = item_id(row)
            if item in items:
                raise BadDataset(path=path, line=number, reason=f"it is the same item as {items[item]}")
            if len(items) >= MAX_ITEMS:
                raise UnusableDataset(path=path, reason=f"a suite has at most {MAX_ITEMS:,} items")
            items[item] = f"{path}, line {number}"
            gate += split_of(item) == "gate"
            calibration += split_of(item) == "calibration"
    return rows, gate, calibration


def _lines(chunks: Iterable[bytes], path: str) -> Iterator[bytes]:
    left, number = b"", 0
    for chunk in chunks:
        *whole, left = (left + chunk).split(b"\n")
        number += len(whole)
        yield from whole
        if len(left) > MAX_LINE_BYTES:
            reason = f"over {MAX_LINE_BYTES} bytes in one line"
            raise BadDataset(path=path, line=number + 1, reason=reason)
    if left:
        yield left


def page(session: Session, caller: Caller, kind: str, *, after: int, limit: int) -> Sequence[Dataset]:
    """Series that the caller may read, in order of their ids; ``after`` is the last one seen."""
    query = select(Dataset).where(Dataset.kind == kind, col(Dataset.id) > after)
    namespaces = caller.readable()
    if namespaces is not None:
        query = query.where(col(Dataset.namespace).in_(namespaces))
    return session.exec(query.order_by(col(Dataset.id)).limit(limit)).all()


def infos(session: Session, rows: Iterable[Dataset]) -> list[DatasetInfo]:
    """The newest version of each series, as it travels."""
    found = [(row, queries.dataset_version(session, row.kind, row.namespace, row.name)) for row in rows]
    return [_info(row, version) for row, version in found if version is not None]


def show(session: Session, caller: Caller, kind: str, ref: str) -> DatasetInfo:
    """One version of a series: ``namespace/name`` (its newest), with ``@vN`` or a digest."""
    version = find_dataset(session, caller, kind, ref)
    row = session.get(Dataset, version.dataset_id)
    assert row is not None
    return _info(row, version)


def _info(row: Dataset, version: DatasetVersion) -> DatasetInfo:
    return DatasetInfo(
        name=f"{row.namespace}/{row.name}",
        kind="suite" if row.kind == "suite" else "dataset",
        version=version.number,
        digest=version.digest,
        rows=version.rows,
        gate_rows=version.gate_rows,
        spec=version.spec,
        size=version.size,
        created_by=version.created_by,
        created_at=version.created_at,
    )
