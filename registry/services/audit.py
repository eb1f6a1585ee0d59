"""The audit: who changed what, when and why, how it was before and after, in rows that are only ever added.

`record` is the one way in, called by every verb in the transaction of its change: both are there, or neither. Rows
get their place in the chain (`registry.core.audit`) afterwards, in batches, by `chain`: under the lock of the head's
row, so that sequencers at once queue, and by what has no place yet, so that a row whose transaction was slow to
commit gets the next one. The database refuses to change what was said and to remove a row (migration 0007).

Heartbeats, progress, checkpoints and bytes on their way are no changes of state, and leave no rows.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlmodel import Session, SQLModel, col, func, select

from registry.core.audit import Entry, Head, Linked, link
from registry.core.manifest import canonical_json
from registry.db.models import AuditHead, AuditRow, Token

if TYPE_CHECKING:
    from .tokens import Caller  # which writes its own rows here

ITSELF = "registry"
"""The actor of what the registry does by itself."""
_SUBJECT, _REASON = 300, 2000
BATCH = 1000
"""Rows that get their place in one transaction."""


SUBJECTS = (
    "adapter", "alias", "base", "blob", "dataset", "evaluation", "fsck", "job", "key", "line", "namespace", "policy",
    "push", "registry", "schedule", "suite", "token", "upgrade", "version", "webhook",
)  # fmt: skip
"""What events are about: the word before their point."""


def record(
    session: Session,
    event: str,
    subject: str,
    *,
    actor: str,
    now: datetime,
    namespace: str | None = None,
    reason: str = "",
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """Write down one change, in the transaction that makes it. ``actor``: a token's id, or `ITSELF`."""
    row = AuditRow(
        at=now,
        actor=actor,
        namespace=namespace,
        event=event,
        subject=subject[:_SUBJECT],
        reason=reason[:_REASON],
        before=_text(before),
        after=_text(after),
    )
    session.add(row)


def changed(row: SQLModel, *names: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Those of the named columns of ``row`` that are changed and not written yet, as they were and as they will be."""
    attributes = inspect(row).attrs
    found = {name: attributes[name].history for name in names}
    moved = {name: history for name, history in found.items() if history.has_changes()}
    before = {name: history.deleted[0] for name, history in moved.items() if history.deleted}
    return before or None, {name: history.added[0] for name, history in moved.items() if history.added} or None


def _text(facts: dict[str, Any] | None) -> str | None:
    return None if facts is None else canonical_json({key: _plain(value) for key, value in facts.items()}).decode()


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


# ── the chain ────────────────────────────────────────────────────────────────


def chain(session: Session, limit: int = BATCH) -> int:
    """Give their places to some rows that have none, oldest first; how many."""
    head = session.exec(select(AuditHead).with_for_update().execution_options(populate_existing=True)).one()
    waiting = select(AuditRow).where(col(AuditRow.seq).is_(None)).order_by(col(AuditRow.id)).limit(limit)
    rows = session.exec(waiting).all()
    for row in rows:
        head.seq += 1
        head.link = row.link = link(head.link, head.seq, entry(row))
        row.seq = head.seq
    return len(rows)


def entry(row: AuditRow) -> Entry:
    """What a row says."""
    assert row.id is not None
    said = (row.id, row.at, row.actor, row.namespace, row.event, row.subject, row.reason, row.before, row.after)
    return Entry(*said)


def chained(session: Session, caller: "Caller", *, after: int, limit: int) -> tuple[Head, int, list[Linked]]:
    """The stored head, how many rows have no place yet, and the links behind ``after``; for admins of everything."""
    caller.require("admin", "*")
    head = session.exec(select(AuditHead)).one()
    waiting = session.exec(select(func.count()).select_from(AuditRow).where(col(AuditRow.seq).is_(None))).one()
    query = select(AuditRow).where(col(AuditRow.seq) > after).order_by(col(AuditRow.seq)).limit(limit)
    rows = [Linked(row.seq or 0, row.link or "", entry(row)) for row in session.exec(query)]
    return Head(head.seq, head.link), waiting, rows


# ── looking ──────────────────────────────────────────────────────────────────


def page(
    session: Session,
    caller: "Caller",
    *,
    namespace: str | None,
    event: str | None,
    subject: str | None,
    actor: str | None,
    before: int,
    limit: int,
) -> Sequence[tuple[AuditRow, str | None]]:
    """Rows with the names of their actors, newest first, of the namespaces that the caller administers."""
    query = select(AuditRow, Token.name).join(Token, col(Token.id) == AuditRow.actor, isouter=True)
    query = query.where(col(AuditRow.id) < before)
    if namespace is not None or not caller.can("admin", "*"):
        mine = [name for name in caller.scopes if caller.can("admin", name)]
        if namespace is not None or not mine:
            caller.require("admin", namespace or "*")
        query = query.where(col(AuditRow.namespace).in_([namespace] if namespace else mine))
    if event is not None:
        query = query.where(col(AuditRow.event).startswith(event, autoescape=True))
    if subject is not None:
        query = query.where(AuditRow.subject == subject)
    if actor is not None:
        query = query.where(AuditRow.actor == actor)
    return session.exec(query.order_by(col(AuditRow.id).desc()).limit(limit)).all()
