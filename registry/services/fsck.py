"""Fsck: compares the bucket with the rows, both ways, while everything runs; bounded memory, however many blobs.

    row → bytes      missing · wrong-size · corrupt (``deep``: every byte is read; else where the store kept a SHA-256)
    bytes → row      orphan: nothing knows them, and they are older than a grace, so that nobody is placing them
    manifest → row   unknown: a version names a blob that has no row
    signature        bad-signature (``deep``): one that held when it came does not hold any more; nothing repairs that

``repair`` removes orphans, and marks what is lost: a blob that is *missing* is not offered as present, and whoever
pushes the same content again brings its bytes (`blobs.place`). Each repair is a transaction that holds the blob's lock
and looks again, for things move on while this looks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Literal

from sqlalchemy import ColumnElement, exists
from sqlmodel import Session, col, func, or_, select

from registry.core.digest import Digest
from registry.core.errors import BlobNotFound
from registry.core.lifecycle import VersionState
from registry.db.engine import Database
from registry.db.models import Adapter, Base, Blob, Dataset, DatasetVersion, ManifestBlob, Version
from registry.schemas import FsckLine
from registry.storage.base import BlobStore, Stat

from . import audit, signatures
from .blobs import add_once, blob_key

GRACE = timedelta(hours=1)
_PAGE = 500
_TELL_EVERY = 256 << 20
"""Bytes of one blob after which progress is told."""
_NAMES = 5

Kind = Literal["missing", "wrong-size", "corrupt", "orphan", "unknown", "bad-signature"]


def check(
    database: Database, store: BlobStore, *, deep: bool, repair: bool, actor: str, now: datetime
) -> Iterator[FsckLine]:
    """Findings as they are made, with progress in between."""
    yield from _rows(database, store, deep=deep, repair=repair, actor=actor, now=now)
    yield from _bucket(database, store, repair=repair, actor=actor, now=now)
    yield from _manifests(database, repair=repair, actor=actor, now=now)
    if deep:
        yield from _signatures(database)


# ── from rows to bytes ───────────────────────────────────────────────────────


def _rows(
    database: Database, store: BlobStore, *, deep: bool, repair: bool, actor: str, now: datetime
) -> Iterator[FsckLine]:
    with database.read() as session:
        total = session.exec(select(func.count()).select_from(Blob)).one()
    done, last = 0, ""
    while page := _page(database, last):
        for row in page:
            problem, detail = "", ""
            for told in _look(store, row, deep=deep):
                if isinstance(told, int):
                    yield FsckLine(what="rows", done=done, total=total, bytes=told)
                else:
                    problem, detail = told
            done += 1
            if problem:
                repaired = repair and _lose(database, store, row, problem, deep=deep, actor=actor, now=now)
                yield _finding(database, row.digest, problem, detail, repaired=repaired, done=done, total=total)
        last = page[-1].digest
        yield FsckLine(what="rows", done=done, total=total)


def _page(database: Database, after: str) -> Sequence[Blob]:
    with database.read() as session:
        return session.exec(select(Blob).where(Blob.digest > after).order_by(col(Blob.digest)).limit(_PAGE)).all()


def _look(store: BlobStore, row: Blob, *, deep: bool) -> Iterator[int | tuple[Kind, str]]:
    """Bytes read so far, and what is wrong with the blob, if anything."""
    key = blob_key(row.digest)
    stat = store.head(key)
    if stat is None:
        yield "missing", "no bytes"
    elif stat.size != row.size:
        yield "wrong-size", f"{stat.size} bytes; expected {row.size}"
    elif stat.sha256 is not None and str(stat.sha256) != row.digest:
        yield "corrupt", f"the store says {stat.sha256}"
    elif deep:
        yield from _read(store, key, row.digest)


def _read(store: BlobStore, key: str, digest: str) -> Iterator[int | tuple[Kind, str]]:
    sha256, read, told = hashlib.sha256(), 0, 0
    try:
        with store.open(key) as reader:
            for chunk in reader.chunks():
                sha256.update(chunk)
                read += len(chunk)
                if read - told >= _TELL_EVERY:
                    told = read
                    yield read
    except BlobNotFound:  # collected since
        return
    yield read
    if (actual := f"sha256:{sha256.hexdigest()}") != digest:
        yield "corrupt", f"its bytes are {actual}"


def _lose(
    database: Database, store: BlobStore, row: Blob, problem: str, *, deep: bool, actor: str, now: datetime
) -> bool:
    """Mark a blob as lost, if it is so still; bytes that are not its own go, for nobody may be given them."""
    with database.write() as session:
        query = select(Blob).where(Blob.digest == row.digest).with_for_update()
        locked = session.exec(query.execution_options(populate_existing=True)).first()
        if locked is None:
            return False
        found = [told for told in _look(store, locked, deep=deep) if not isinstance(told, int)]
        if not found or locked.missing_since is not None:
            return bool(found)
        store.delete(blob_key(row.digest))
        locked.missing_since = now
        session.add(locked)
        audit.record(session, "blob.lost", row.digest, actor=actor, reason=problem, now=now)
        return True


# ── from bytes to rows ───────────────────────────────────────────────────────


def _bucket(database: Database, store: BlobStore, *, repair: bool, actor: str, now: datetime) -> Iterator[FsckLine]:
    walked, done = store.walk("blobs/"), 0
    while stats := list(islice(walked, _PAGE)):
        with database.read() as session:
            wanted = [_digest(stat) for stat in stats]
            known = set(session.exec(select(Blob.digest).where(col(Blob.digest).in_(wanted))))
        for stat in stats:
            old = stat.modified_at < (now - GRACE).timestamp()
            if (digest := _digest(stat)) not in known and old:
                repaired = repair and _remove(database, store, stat.key, digest, actor, now)
                detail = f"{stat.size} bytes that no row knows"
                yield _finding(database, digest, "orphan", detail, repaired=repaired, done=done, total=0)
        done += len(stats)
        yield FsckLine(what="bucket", done=done, total=0)


def _digest(stat: Stat) -> str:
    return f"sha256:{stat.key.rpartition('/')[2]}"


def _remove(database: Database, store: BlobStore, key: str, digest: str, actor: str, now: datetime) -> bool:
    """Remove bytes under the key of the row that they lack: whoever places them waits, and places them anew."""
    if key != f"blobs/{digest.partition(':')[2]}" or len(key) != len("blobs/") + 64:
        store.delete(key)  # no blob can be called so
        return True
    with database.write() as session:
        if session.get(Blob, digest) is not None:
            return False
        add_once(session, Blob, {"digest": digest, "size": 0, "verified": "parts", "created_at": now})
        row = session.exec(select(Blob).where(Blob.digest == digest).with_for_update()).one()
        if row.created_at != now or row.size != 0:  # placed in between
            return False
        store.delete(key)
        session.delete(row)
        audit.record(session, "blob.orphan-removed", digest, actor=actor, now=now)
        return True


# ── from manifests to rows ───────────────────────────────────────────────────


def _manifests(database: Database, *, repair: bool, actor: str, now: datetime) -> Iterator[FsckLine]:
    last, done = "", 0
    while True:
        with database.read() as session:
            query = select(ManifestBlob.blob).where(ManifestBlob.blob > last, _living(), ~_known()).distinct()
            unknown = session.exec(query.order_by(col(ManifestBlob.blob)).limit(_PAGE)).all()
        for digest in unknown:
            repaired = repair and _write_down(database, digest, actor, now)
            done += 1
            yield _finding(database, digest, "unknown", "it has no row", repaired=repaired, done=done, total=0)
        if len(unknown) < _PAGE:
            return
        last = unknown[-1]


# ── signatures ───────────────────────────────────────────────────────────────


def _signatures(database: Database) -> Iterator[FsckLine]:
    last, done = 0, 0
    while True:
        with database.read() as session:
            page = signatures.looked_at_again(session, after=last, limit=_PAGE)
        for row in page:
            done, last = done + 1, row.id
            if row.problem:
                yield FsckLine(
                    kind="finding", what="signatures", done=done, blob=row.digest, problem="bad-signature",
                    detail=row.problem, named_by=[row.ref],
                )  # fmt: skip
        yield FsckLine(what="signatures", done=done)
        if len(page) < _PAGE:
            return


def _known() -> ColumnElement[bool]:
    return exists().where(col(Blob.digest) == ManifestBlob.blob)


def _living() -> ColumnElement[bool]:
    manifest = col(ManifestBlob.manifest)
    return or_(
        exists().where(col(Version.digest) == manifest, col(Version.status) != VersionState.DELETED),
        exists().where(col(DatasetVersion.digest) == manifest),
        exists().where(col(Base.manifest) == manifest),
    )


def _write_down(database: Database, digest: str, actor: str, now: datetime) -> bool:
    """Give a named blob its row, as one that is missing: a push of the same content brings it."""
    with database.write() as session:
        row = {"digest": digest, "size": 0, "verified": "parts", "created_at": now, "missing_since": now}
        add_once(session, Blob, row)
        audit.record(session, "blob.lost", digest, actor=actor, reason="unknown", now=now)
    return True


def _finding(
    database: Database, digest: str, problem: str, detail: str, *, repaired: bool, done: int, total: int
) -> FsckLine:
    with database.read() as session:
        names = _names(session, digest)
    return FsckLine(
        kind="finding", what="rows" if total else "bucket", done=done, total=total, blob=digest, problem=problem,
        detail=detail, named_by=names, repaired=repaired,
    )  # fmt: skip


def _names(session: Session, digest: str) -> list[str]:
    """Some of what names the blob, for people."""
    manifests = select(ManifestBlob.manifest).where(ManifestBlob.blob == digest)
    versions = session.exec(
        select(Adapter.namespace, Adapter.name, Version.number)
        .join(Version, col(Version.adapter_id) == Adapter.id)
        .where(col(Version.digest).in_(manifests), Version.status != VersionState.DELETED)
        .limit(_NAMES)
    ).all()
    data = session.exec(
        select(Dataset.namespace, Dataset.name, DatasetVersion.number)
        .join(DatasetVersion, col(DatasetVersion.dataset_id) == Dataset.id)
        .where(col(DatasetVersion.digest).in_(manifests))
        .limit(_NAMES)
    ).all()
    bases = session.exec(select(Base.digest).where(col(Base.manifest).in_(manifests)).limit(_NAMES)).all()
    return [f"{namespace}/{name}@v{number}" for namespace, name, number in (*versions, *data)] + [
        Digest.parse(base).short for base in bases
    ]
