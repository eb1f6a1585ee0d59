"""Commands of the audit: what was changed, by whom and why; and whether the record of it is whole."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from . import config
from .output import Output, command, fields, table

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.core.audit import Head, Linked
    from registry.schemas import ChainInfo, LinkedInfo

_FACTS = 60
"""Characters of before and after that a line of the table shows."""


@click.group("audit", short_help="The audit: list, verify.")
def audit() -> None:
    """Every change of state: who, what, when, why, before and after; in a chain that shows what was tampered with."""


@command(
    audit,
    "loractl audit list --namespace team",
    "loractl audit list --subject team/bot:prod --limit 10",
    "loractl audit list --event alias. --json",
    name="list",
)
@click.option("--namespace", help="Only changes in this namespace.")
@click.option("--event", help="Only this kind, or kinds that begin so: alias.moved, job., token.")
@click.option("--subject", help="Only changes of this: a reference, or the id of a job, push, upgrade, token.")
@click.option("--actor", metavar="TOKEN_ID", help="Only changes by this token; 'registry': by itself.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_changes(out: Output, limit: int, **filters: str | None) -> None:
    """List changes, newest first."""
    from registry.client import every

    with config.connect() as client:
        found = list(islice(every(
            lambda cursor: client.audit(**filters, limit=min(limit, 500), cursor=cursor)
        ), limit))  # fmt: skip
    out.emit(found, lambda: table(
        ["at", "by", "what", "subject", "before", "after", "why"],
        (
            [f"{row.at:%Y-%m-%d %H:%M:%S}", row.name or row.actor, row.event, row.subject, _short(row.before),
             _short(row.after), row.reason[:_FACTS]]
            for row in found
        ),
        empty="No changes.",
    ))  # fmt: skip


def _short(facts: dict[str, Any] | None) -> str:
    text = ", ".join(
        f"{name} {value if isinstance(value, str | int) else json.dumps(value)}"
        for name, value in (facts or {}).items()
        if value is not None
    )
    return text if len(text) <= _FACTS else text[: _FACTS - 1] + "…"


@command(
    audit,
    "loractl audit verify",
    'loractl audit verify --head "$(cat head.txt)"',
    "loractl audit verify --json",
)
@click.option("--head", metavar="N:DIGEST", help="A head that was printed before and kept elsewhere.")
def verify(out: Output, head: str | None) -> None:
    """Compute the whole chain anew, here, and say where it does not hold; exits with 1 if so.

    Keep the head that it prints where the registry's operators cannot change it, and give it the next time: then also
    a chain that was written anew from its beginning is found out.
    """
    from registry.core.audit import Head, breaks

    kept = Head.parse(head) if head else None
    with config.connect() as client, out.progress() as bar:
        first = client.audit_chain(0)
        stored = Head(first.seq, first.link)

        def rows() -> "Iterator[Linked]":
            for done, row in enumerate(_rows(client, first, stored.seq), 1):
                bar.count("chain", done, stored.seq, "rows")
                yield row

        found = [{"seq": at.seq, "reason": at.reason} for at in breaks(rows(), stored, kept)]
    document = {"ok": not found, "head": str(stored), "waiting": first.waiting, "breaks": found}
    out.emit(document, lambda: _verified(stored, first.waiting, found))
    if found:
        raise click.exceptions.Exit(1)


def _rows(client: "RegistryClient", first: "ChainInfo", last: int) -> "Iterator[Linked]":
    """The chain up to ``last``, page by page; what is chained meanwhile is another look's."""
    page = first
    while page.rows:
        for row in page.rows:
            if row.seq > last:
                return
            yield _linked(row)
        page = client.audit_chain(page.rows[-1].seq)


def _linked(row: "LinkedInfo") -> "Linked":
    said = (row.id, row.at, row.actor, row.namespace, row.event, row.subject, row.reason, row.before, row.after)
    from registry.core.audit import Entry, Linked

    return Linked(row.seq, row.link, Entry(*said))


def _verified(stored: "Head", waiting: int, found: list[dict[str, Any]]) -> None:
    fields({
        "chain": "broken" if found else "whole",
        "rows": stored.seq,
        "waiting": f"{waiting} (they get their place within seconds)" if waiting else "none",
        "head": str(stored),
    })  # fmt: skip
    if found:
        table(["at", "what was found"], ([at["seq"], at["reason"]] for at in found))


COMMANDS: dict[str, click.Command] = {"audit": audit}
