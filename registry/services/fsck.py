"""Fsck: compares the bucket with the rows, both ways, while everything runs; bounded memory, however many blobs.

    row → bytes      missing · wrong-size · corrupt (``deep``: every byte is read; else where the store kept a SHA-256)
    bytes → row      orphan: nothing knows them, and they are older than a grace, so that nobody is placing them
    manifest → row   unknown: a version names a blob that has no row
    signature        bad-signature (``deep``): one that held when it came does not hold any more; nothing repairs that

``repair`` removes orphans, and marks what is lost: a blob that is *missing* is not offered as present, and whoever
pushes the same content again brings its bytes (`blobs.place`). Where there is a replica, its bytes are brought at once:

    replica → staging, verified on the way → the blob is marked as lost → staging → its place

Each repair is a transaction that holds the blob's lock and looks again, for things move on while this looks. Dying
anywhere leaves a blob that is marked as lost, which the next repair heals, and bytes in staging, which the collector
removes; two repairs at once bring the same bytes.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Literal

from sqlalchemy import ColumnElement, exists
from sqlmodel import Session, col, func, or_, select

from registry.core.digest import Digest
from registry.core.errors import BlobNotFound, ChecksumRefused, StorageDown
from registry.core.lifecycle import VersionState
from registry.db.engine import Database
from registry.db.models import Adapter, Base, Blob, Dataset, DatasetVersion, ManifestBlob, Version
from registry.schemas import FsckLine
from registry.storage.base import BlobReader, BlobSource, BlobStore, Stat

from . import audit, signatures
from .blobs import add_once, blob_key

GRACE = timedelta(hours=1)
_PAGE = 500
_TELL_EVERY = 256 << 20
"""Bytes of one blob after which progress is told."""
_NAMES = 5

Kind = Literal["missing", "wrong-size", "corrupt", "orphan", "unknown", "bad-signature"]


def check(
    database: Database,
    store: BlobStore,
    replica: BlobSource | None = None,
    *,
    deep: bool,
    repair: bool,
    actor: str,
    now: datetime,
) -> Iterator[FsckLine]:
    """Findings as they are made, with progress in between; a repair reads ``replica`` for what is lost."""
    yield from _rows(database, store, replica, deep=deep, repair=repair, actor=actor, now=now)
    yield from _bucket(database, store, repair=repair, actor=actor, now=now)
    yield from _manifests(database, store, replica, repair=repair, actor=actor, now=now)
    if deep:
        yield from _signatures(database)


# ── from rows to bytes ───────────────────────────────────────────────────────


def _rows(
    database: Database,
    store: BlobStore,
    replica: BlobSource | None,
    *,
    deep: bool,
    repair: bool,
    actor: str,
    now: datetime,
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
                lose = partial(_lose, database, store, row, problem, deep=deep, actor=actor, now=now)
                mend = partial(_mend, database, store, replica, row.digest, lose, actor, now)
                repaired, had = mend() if repair else (False, None)
                yield _finding(database, row.digest, problem, detail, had, repaired=repaired, done=done, total=total)
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


# ── what a replica has ───────────────────────────────────────────────────────

Had = Literal["healed", "missing", "damaged", "down"]


class _Down(Exception):  # noqa: N818  # an answer, not an error
    """The replica stopped answering while it was read."""


def _mend(
    database: Database,
    store: BlobStore,
    replica: BlobSource | None,
    digest: str,
    lose: Callable[[], bool],
    actor: str,
    now: datetime,
) -> tuple[bool, Had | None]:
    """Mark the blob as lost, and bring it from the replica; whether it was repaired, and what the replica had of it."""
    if replica is None:
        return lose(), None
    staged = f"staging/fsck-{secrets.token_hex(8)}/{Digest.parse(digest).hex}"
    had, size = _fetch(store, replica, digest, staged)
    try:
        repaired = lose()
        if repaired and had == "healed":
            _bring(database, store, staged, digest, size, actor, now)
        return repaired, had if repaired else None
    finally:
        store.delete(staged)


def _fetch(store: BlobStore, replica: BlobSource, digest: str, staged: str) -> tuple[Had, int]:
    """Copy the replica's bytes under ``staged``, verified as they come; "healed" and their size when they are right."""
    try:
        with _opened(replica, digest) as reader:
            store.put_stream(staged, _told(reader), size=reader.size, sha256=Digest.parse(digest))
            return "healed", reader.size
    except BlobNotFound:
        return "missing", 0
    except ChecksumRefused:
        return "damaged", 0
    except _Down:
        return "down", 0


def _opened(replica: BlobSource, digest: str) -> BlobReader:
    try:
        return replica.open(blob_key(digest))
    except StorageDown as error:
        raise _Down from error


def _told(reader: BlobReader) -> Iterator[bytes]:
    try:
        yield from reader.chunks()
    except StorageDown as error:
        raise _Down from error


def _bring(
    database: Database, store: BlobStore, staged: str, digest: str, size: int, actor: str, now: datetime
) -> None:
    """Give staged bytes their place, unless somebody brought them meanwhile."""
    with database.write() as session:
        query = select(Blob).where(Blob.digest == digest).with_for_update()
        row = session.exec(query.execution_options(populate_existing=True)).first()
        if row is None or row.missing_since is None:
            return
        store.copy(staged, blob_key(digest))
        row.verified, row.size, row.missing_since = "full", size, None
        session.add(row)
        audit.record(session, "blob.healed", digest, actor=actor, reason="from the replica", now=now)


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
                yield _finding(database, digest, "orphan", detail, None, repaired=repaired, done=done, total=0)
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


def _manifests(
    database: Database, store: BlobStore, replica: BlobSource | None, *, repair: bool, actor: str, now: datetime
) -> Iterator[FsckLine]:
    last, done = "", 0
    while True:
        with database.read() as session:
            query = select(ManifestBlob.blob).where(ManifestBlob.blob > last, _living(), ~_known()).distinct()
            unknown = session.exec(query.order_by(col(ManifestBlob.blob)).limit(_PAGE)).all()
        for digest in unknown:
            lose = partial(_write_down, database, digest, actor, now)
            repaired, had = _mend(database, store, replica, digest, lose, actor, now) if repair else (False, None)
            done += 1
            yield _finding(database, digest, "unknown", "it has no row", had, repaired=repaired, done=done, total=0)
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
    database: Database,
    digest: str,
    problem: str,
    detail: str,
    had: Had | None,
    *,
    repaired: bool,
    done: int,
    total: int,
) -> FsckLine:
    with database.read() as session:
        names = _names(session, digest)
    return FsckLine(
        kind="finding", what="rows" if total else "bucket", done=done, total=total, blob=digest, problem=problem,
        detail=detail, named_by=names, repaired=repaired, replica=had,
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
