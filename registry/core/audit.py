"""The audit's chain: every entry is tied to all before it, so that none can be changed, left out or moved unseen.

    link(n) = sha256("loractl/1 audit" 00 link(n − 1) 00 n 00 canonical JSON of entry n)        link(0) = sha256:00…0

Whoever kept one ``n:link`` elsewhere can tell whether the first n entries are still the ones they were. The idea is
that of certificate transparency and of git, with a chain in place of a tree: entries are read in order anyway.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from .digest import Digest
from .errors import BadRequest
from .manifest import canonical_json

START = "sha256:" + "0" * 64
"""What stands before the first entry."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is said: who did what to what, when, why, and how it was before and after (canonical JSON)."""

    id: int
    at: datetime
    actor: str
    namespace: str | None
    event: str
    subject: str
    reason: str
    before: str | None
    after: str | None

    def canonical(self) -> bytes:
        """The bytes that the chain covers."""
        said = [self.id, self.at.isoformat(), self.actor, self.namespace, self.event, self.subject, self.reason]
        return canonical_json([*said, self.before, self.after])


@dataclass(frozen=True, slots=True)
class Linked:
    """An entry with its place in the chain, as it is stored."""

    seq: int
    link: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain, or a place in it: what to keep elsewhere."""

    seq: int = 0
    link: str = START

    @classmethod
    def parse(cls, text: str) -> "Head":
        """``N:sha256:…``, as ``loractl audit verify`` prints it; `BadRequest`."""
        match = re.fullmatch(r"(0|[1-9][0-9]{0,17}):(sha256:[0-9a-f]{64})", text)
        if match is None:
            raise BadRequest(problems=f"'{text[:100]}' is not a head; expected N:sha256:…")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.seq}:{self.link}"


@dataclass(frozen=True, slots=True)
class Break:
    """Where the chain does not hold, and what was seen there."""

    seq: int
    reason: str


def link(before: str, seq: int, entry: Entry) -> str:
    """The digest that ties ``entry``, at place ``seq``, to everything before it."""
    parts = (b"loractl/1 audit", before.encode(), str(seq).encode(), entry.canonical())
    return str(Digest.sha256(b"\0".join(parts)))


def breaks(rows: Iterable[Linked], stored: Head, kept: Head | None = None) -> Iterator[Break]:
    """Every place where ``rows``, in order of ``seq`` from 1, are not what was chained.

    ``stored`` is the head that the registry claims, ``kept`` one that was written down elsewhere. After a break the
    look goes on from what is stored there, so that each break is told once.
    """
    at = Head()
    met = kept is None or kept.seq == 0
    for row in rows:
        if row.seq != at.seq + 1:
            yield Break(at.seq + 1, f"missing up to {row.seq - 1}: removed")
        elif row.link != link(at.link, row.seq, row.entry):
            told = f"row {row.entry.id} ({row.entry.event} {row.entry.subject})"
            yield Break(row.seq, f"{told} is not what was chained here: changed, or moved")
        if kept is not None and row.seq == kept.seq:
            met = True
            if row.link != kept.link:
                yield Break(row.seq, "not the head that was kept: everything up to here may have been written anew")
        at = Head(row.seq, row.link)
    if at.seq < stored.seq:
        yield Break(at.seq + 1, f"missing up to {stored.seq}: removed from the end")
    elif at != stored:
        yield Break(at.seq, "the stored head is another")
    if kept is not None and not met:
        yield Break(at.seq + 1, f"missing up to {kept.seq}, which was kept: removed from the end")
