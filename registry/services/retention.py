"""Retention: a namespace deletes by itself what it keeps no longer, as tombstones like any other deletion.

Kept is what is younger than the namespace says, the newest of its series on a base, what an alias points at, what a
version that stays was made from, and what an upgrade or a job works on. A namespace that says nothing keeps everything.
"""

from datetime import datetime, timedelta

import structlog
from sqlalchemy import exists
from sqlmodel import Session, col, select

from registry.core.errors import LoractlError, Unavailable
from registry.core.lifecycle import VersionState
from registry.db.engine import Database
from registry.db.models import Adapter, Alias, Namespace, Version, VersionParent

from . import audit, withdrawals
from .standing import ref
from .tokens import Caller

_AT_ONCE = 50
log = structlog.get_logger()


def retire(database: Database, now: datetime) -> int:
    """Delete some versions that their namespaces keep no longer; how many."""
    with database.read() as session:
        bounded = session.exec(select(Namespace).where(col(Namespace.keep_days).is_not(None))).all()
    gone = 0
    for row in bounded:
        gone += _retire_some(database, row.name, row.keep_days or 0, now)
    return gone


def _retire_some(database: Database, namespace: str, days: int, now: datetime) -> int:
    """Of those that are old, the first that nothing refers to; those before them are in use."""
    gone = after = 0
    while not gone:
        with database.read() as session:
            old = _old(session, namespace, now - timedelta(days=days), after)
        if not old:
            break
        gone = sum(_retire(database, namespace, version_id, f"kept for {days} days", now) for version_id in old)
        after = old[-1]
    return gone


def _old(session: Session, namespace: str, before: datetime, after: int) -> list[int]:
    child = exists().where(
        col(VersionParent.parent) == Version.digest,
        col(VersionParent.version_id).in_(select(Version.id).where(Version.status != VersionState.DELETED)),
    )
    query = (
        select(Version.id)
        .join(Adapter)
        .where(Adapter.namespace == namespace, col(Version.created_at) < before, ~col(Version.latest))
        .where(col(Version.id) > after)
        .where(col(Version.status).in_((VersionState.LIVE, VersionState.YANKED)))
        .where(~exists().where(col(Alias.version_id) == Version.id), ~child)
    )
    return [found for found in session.exec(query.order_by(col(Version.id)).limit(_AT_ONCE)) if found is not None]


def _retire(database: Database, namespace: str, version_id: int, reason: str, now: datetime) -> bool:
    itself = Caller(audit.ITSELF, audit.ITSELF, "user", {namespace: ["admin"]})
    try:
        with database.write() as session:
            version = session.get_one(Version, version_id)
            adapter = session.get_one(Adapter, version.adapter_id)
            withdrawals.move(session, itself, adapter, version, "delete", reason=reason, force=False, now=now)
            log.info("version-retired", version=ref(adapter, version))
    except Unavailable:
        raise
    except LoractlError as error:  # somebody refers to it since
        log.debug("version-kept", version=version_id, reason=error.message)
        return False
    return True
