"""The audit's chain: what is changed, removed, moved, cut off or written anew is found, and where."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from registry.core.audit import START, Break, Entry, Head, Linked, breaks, link
from registry.core.errors import BadRequest

AT = datetime(2026, 1, 1, tzinfo=UTC)


def chain(length: int, word: str = "alias.moved") -> list[Linked]:
    rows, before = [], START
    for seq in range(1, length + 1):
        entry = Entry(seq + 10, AT + timedelta(seconds=seq), "ada", "team", word, f"team/bot{seq}", "", None, "{}")
        before = link(before, seq, entry)
        rows.append(Linked(seq, before, entry))
    return rows


WHOLE = chain(6)
HEAD = Head(6, WHOLE[-1].link)


def _at(seq: int, row: Linked) -> Linked:
    return replace(row, seq=seq)


def found(rows: list[Linked], kept: Head | None = None, stored: Head = HEAD) -> list[int]:
    return [at.seq for at in breaks(rows, stored, kept)]


def test_a_whole_chain_has_no_break_also_against_a_head_that_was_kept() -> None:
    assert found(WHOLE) == []
    assert found(WHOLE, kept=Head(3, WHOLE[2].link)) == []
    assert found([], stored=Head()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"actor": "eve"}, {"reason": "x"}, {"before": "{}"}, {"after": None}, {"subject": "team/other"}, {"id": 1},
        {"at": AT}, {"namespace": None}, {"event": "alias.removed"},
    ],
    ids=str,
)  # fmt: skip
def test_every_word_of_a_row_is_covered(change: dict[str, object]) -> None:
    rows = [*WHOLE]
    rows[2] = replace(rows[2], entry=replace(rows[2].entry, **change))  # type: ignore[arg-type]  # any of the fields
    assert found(rows) == [3]


@pytest.mark.parametrize(
    ("tampered", "at"),
    [
        (lambda rows: rows[:2] + rows[3:], [3]),
        (lambda rows: rows[1:], [1]),
        (lambda rows: rows[:-1], [6]),
        (lambda rows: [], [1]),
        (lambda rows: [*rows[:2], _at(3, rows[3]), _at(4, rows[2]), *rows[4:]], [3, 4, 5]),
    ],
)
def test_rows_that_are_removed_or_change_places_are_missed_where_they_were(
    tampered: Callable[[list[Linked]], list[Linked]], at: list[int]
) -> None:
    assert found(tampered([*WHOLE])) == at


def test_a_chain_that_was_written_anew_holds_in_itself_and_not_against_the_kept_head() -> None:
    anew = chain(6, "alias.removed")
    assert found(anew, stored=Head(6, anew[-1].link)) == []
    assert found(anew, stored=Head(6, anew[-1].link), kept=Head(3, WHOLE[2].link)) == [3]
    assert found(anew[:2], stored=Head(2, anew[1].link), kept=Head(3, WHOLE[2].link)) == [3]


def test_a_break_is_told_once_with_the_row() -> None:
    rows = [*WHOLE]
    rows[0] = replace(rows[0], entry=replace(rows[0].entry, actor="eve"))
    [told] = breaks(rows, HEAD)
    assert told == Break(1, "row 11 (alias.moved team/bot1) is not what was chained here: changed, or moved")


def test_a_head_is_written_as_it_is_read() -> None:
    assert Head.parse(str(HEAD)) == HEAD
    for wrong in ("", "6", "six:" + START, "6:b3", START, "-1:" + START, "٣:" + START, "1:b3:" + "0" * 64):
        with pytest.raises(BadRequest):
            Head.parse(wrong)
