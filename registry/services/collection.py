"""Collecting blobs that nothing names any more, while everything runs: marked, left for a grace, looked at again.

A blob is *named* by a manifest of a version that is not deleted, of a dataset or of a base, by a push that is not over,
by an evaluation, whose records it is, and by a pool: answers, the file to be labelled, labels. `mark` writes down since
when a blob is named by nothing; `collect` removes what was so for the whole grace: by then every signed URL of it is
over. Each removal is a transaction that holds the
lock of the blob's row and asks once more, so

- a push that says ``present`` holds the same lock while it names the blob (`blobs.keep`): one of the two waits;
- bytes are put into place under that lock (`blobs.place`): what is placed after a removal is placed anew;
- bytes go before their row: whoever dies in between leaves a row that nothing names, and the next one goes on.

While a backup copies (`registry.services.backup`) nothing is removed: see `held_off`.
"""

import secrets
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, exists, text
from sqlmodel import Session, col, or_, select, update

from registry.core.lifecycle import UNFINISHED, VersionState
from registry.db.engine import Database
from registry.db.models import (
    Base,
    Blob,
    DatasetVersion,
    Evaluation,
    Hold,
    ManifestBlob,
    PoolAnswers,
    PoolPaper,
    Push,
    PushBlob,
    Version,
)
from registry.storage.base import BlobStore

from .blobs import blob_key

STRETCH = 5000
"""Blobs that one look at marks goes through."""
_AT_ONCE = 200


def named() -> ColumnElement[bool]:
    """The condition that something names a `Blob`."""
    manifest = col(ManifestBlob.manifest)
    by_manifest = or_(
        exists().where(col(Version.digest) == manifest, col(Version.status) != VersionState.DELETED),
        exists().where(col(DatasetVersion.digest) == manifest),
        exists().where(col(Base.manifest) == manifest),
    )
    return or_(
        exists().where(col(ManifestBlob.blob) == Blob.digest, by_manifest),
        exists().where(
            col(PushBlob.digest) == Blob.digest, col(PushBlob.push_id) == Push.id, col(Push.state).in_(UNFINISHED)
        ),
        exists().where(col(Evaluation.records) == Blob.digest),
        exists().where(col(PoolAnswers.answers) == Blob.digest),
        exists().where(col(PoolPaper.paper) == Blob.digest),
        exists().where(col(PoolPaper.labels) == Blob.digest),
    )


def mark(database: Database, now: datetime, start: str | None = None) -> int:
    """Look at a stretch of blobs, from a random one on; how many are newly named by nothing, or named again.

    So no collector needs to remember where it was, and any number of them share the work.
    """
    start = start if start is not None else f"sha256:{secrets.token_hex(32)}"
    with database.read() as session:
        query = select(Blob.digest, Blob.unnamed_since, named()).order_by(col(Blob.digest))
        rows = list(session.exec(query.where(col(Blob.digest) >= start).limit(STRETCH)))
        if len(rows) < STRETCH:
            rows += session.exec(query.where(col(Blob.digest) < start).limit(STRETCH - len(rows))).all()
    fallen = [digest for digest, since, is_named in rows if not is_named and since is None]
    risen = [digest for digest, since, is_named in rows if is_named and since is not None]
    for digests, since in ((fallen, now), (risen, None)):
        for first in range(0, len(digests), _AT_ONCE):
            with database.write() as session:
                some = col(Blob.digest).in_(digests[first : first + _AT_ONCE])
                session.exec(update(Blob).where(some).values(unnamed_since=since))
    return len(fallen) + len(risen)


def collect(database: Database, store: BlobStore, now: datetime, grace: timedelta) -> int:
    """Remove some blobs that nothing named for ``grace``; how many went."""
    with database.read() as session:
        waiting = select(Blob.digest).where(col(Blob.unnamed_since) <= now - grace)
        digests = session.exec(waiting.order_by(col(Blob.unnamed_since)).limit(_AT_ONCE)).all()
    gone = 0
    for digest in digests:
        with database.write() as session:
            if held_off(session, now):
                break
            gone += _remove(session, store, digest, now - grace)
    return gone


def _remove(session: Session, store: BlobStore, digest: str, before: datetime) -> bool:
    query = select(Blob).where(Blob.digest == digest, col(Blob.unnamed_since) <= before)
    row = session.exec(query.with_for_update(skip_locked=True).execution_options(populate_existing=True)).first()
    if row is None:
        return False
    if session.exec(select(named()).where(Blob.digest == digest)).one():  # since it was marked
        row.unnamed_since = None
        session.add(row)
        return False
    store.delete(blob_key(digest))
    session.delete(row)
    session.flush()
    return True


# ── while a backup copies ────────────────────────────────────────────────────


def held_off(session: Session, now: datetime) -> bool:
    """Whether somebody needs all blobs to stay, now and until the end of this transaction."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(text("LOCK TABLE holds IN SHARE MODE"))  # who wants one waits for us
    return session.exec(select(Hold.id).where(col(Hold.until) > now).limit(1)).first() is not None


def hold(database: Database, identity: str, reason: str, until: datetime) -> None:
    """Keep every blob until then; again under the same id prolongs it. One whose owner died ends by itself."""
    with database.write() as session:
        session.merge(Hold(id=identity, reason=reason, until=until))


def let_go(database: Database, identity: str) -> None:
    """End a hold."""
    with database.write() as session:
        row = session.get(Hold, identity)
        if row is not None:
            session.delete(row)
