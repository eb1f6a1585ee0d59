"""Blobs: where they lie in the store, who may read them, and the one way into their final place.

A caller may read a blob when a committed manifest that names it belongs to a version in a namespace the caller
reads (not to a quarantined or deleted one), or to a base model (bases are open to whoever reads anything). So a
push says ``present`` only of bytes its author could have pulled: nobody learns or takes what exists elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import false, or_
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel, col, select
from sqlmodel.sql.expression import SelectOfScalar

from registry.core.digest import Digest
from registry.core.lifecycle import VersionState
from registry.core.manifest import FileEntry, Listing, Manifest
from registry.db.engine import Database
from registry.db.models import (
    Adapter,
    Base,
    Blob,
    Dataset,
    DatasetVersion,
    ManifestBlob,
    PushBlob,
    StoredManifest,
    Version,
)
from registry.storage.base import BlobStore

from .tokens import Caller

Row = TypeVar("Row", bound=SQLModel)


def staging_key(push_id: str, digest: str) -> str:
    """Where clients write the blob ``digest`` of a push."""
    return f"staging/{push_id}/{Digest.parse(digest).hex}"


def late_name(push_id: str, path: str) -> str:
    """What stands for the digest of a late file until it is known; nobody can choose bytes that have it as digest."""
    return str(Digest.sha256(f"loractl/1 late\0{push_id}\0{path}".encode()))


def staged_at(row: PushBlob) -> str:
    """Where the bytes of a push's blob are staged: what was sent before it had its digest stays where it is."""
    return staging_key(row.push_id, late_name(row.push_id, row.path) if row.path else row.digest)


def blob_key(digest: str) -> str:
    """Where the blob lies for good."""
    return f"blobs/{Digest.parse(digest).hex}"


def readable_manifests(caller: Caller) -> SelectOfScalar[str]:
    """The query for digests of manifests that ``caller`` may read."""
    digest = col(StoredManifest.digest)
    given = col(Version.status).in_((VersionState.LIVE, VersionState.YANKED))
    adapters = select(Version.id).join(Adapter).where(col(Version.digest) == digest, given)
    datasets = select(DatasetVersion.id).join(Dataset).where(col(DatasetVersion.digest) == digest)
    bases = select(Base.id).where(col(Base.manifest) == digest)
    namespaces = caller.readable()
    if namespaces is not None:
        adapters = adapters.where(col(Adapter.namespace).in_(namespaces))
        datasets = datasets.where(col(Dataset.namespace).in_(namespaces))
        if not namespaces:
            bases = bases.where(false())
    # each looked up by its index: sets of all that there is would grow with the registry
    return select(StoredManifest.digest).where(or_(adapters.exists(), datasets.exists(), bases.exists()))


def held(session: Session, caller: Caller, digests: Iterable[str]) -> set[str]:
    """Those of ``digests`` that are here, were read completely, and may be read by ``caller``."""
    readable = readable_manifests(caller).where(col(StoredManifest.digest) == ManifestBlob.manifest).exists()
    naming = select(ManifestBlob.blob).where(ManifestBlob.blob == Blob.digest, readable).exists()  # one is enough
    query = select(Blob.digest).where(col(Blob.digest).in_(list(digests)), Blob.verified == "full", naming)
    return _kept(session, session.exec(query).all())


def _kept(session: Session, digests: Sequence[str]) -> set[str]:
    """Those that are not lost, locked until the end of the transaction: the collector leaves what is named by then."""
    query = select(Blob.digest).where(col(Blob.digest).in_(digests), col(Blob.missing_since).is_(None))
    return set(session.exec(query.order_by(col(Blob.digest)).with_for_update(read=True)))


def lacking(session: Session, manifest: Listing) -> bool:
    """Whether bytes of a version that is here are lost, so that a push of it has to bring them."""
    digests = [entry.digest for entry in manifest.files if isinstance(entry, FileEntry)]
    lost = select(Blob.digest).where(col(Blob.digest).in_(digests), col(Blob.missing_since).is_not(None))
    return session.exec(lost.limit(1)).first() is not None


def place(
    database: Database, store: BlobStore, source: str, *, digest: str, size: int, verified: str, now: datetime
) -> None:
    """Copy staged bytes to their final key under the lock of the blob's row.

    Doing it again changes nothing, so a crash anywhere is healed by the next try: bytes without a row are
    copied over. What was only checked by parts is replaced by what was read, and by nothing else: somebody may
    be reading it.
    """
    with database.write() as session:
        add_once(session, Blob, {"digest": digest, "size": size, "verified": "parts", "created_at": now})
        row = session.exec(select(Blob).where(Blob.digest == digest).with_for_update()).one()
        better = (verified == "full" and row.verified == "parts") or row.missing_since is not None
        if not better and store.head(blob_key(digest)) is not None:
            return
        store.copy(source, blob_key(digest))
        row.verified, row.size, row.missing_since = verified, size, None
        session.add(row)


def remove_damaged(session: Session, store: BlobStore, digest: str) -> None:
    """Take away bytes that are not what their name says, unless they were read meanwhile, or a base rests on them.

    The bytes go while the row is locked, so that what somebody else places afterwards stays.
    """
    query = select(Blob).where(Blob.digest == digest, Blob.verified == "parts").with_for_update()
    row = session.exec(query.execution_options(populate_existing=True)).first()
    used = select(Base.id).join(ManifestBlob, col(ManifestBlob.manifest) == Base.manifest)
    if row is None or session.exec(used.where(ManifestBlob.blob == digest).limit(1)).first() is not None:
        return
    store.delete(blob_key(digest))
    session.delete(row)
    session.flush()


def keep_manifest(session: Session, manifest: Manifest) -> None:
    """Store the manifest's canonical bytes and which blobs it names, once."""
    digest = str(manifest.digest)
    body = manifest.canonical()
    add_once(session, StoredManifest, {"digest": digest, "kind": manifest.kind, "body": body, "size": manifest.size})
    blobs = sorted({entry.digest for entry in manifest.files})
    add_once(session, ManifestBlob, *({"manifest": digest, "blob": blob} for blob in blobs))


def add_once(session: Session, table: type[SQLModel], *rows: Mapping[str, Any]) -> None:
    """Insert ``rows`` where no row with the same unique key exists."""
    if rows:
        session.exec(_insert(session, table).on_conflict_do_nothing(), params=rows)


def add_new(session: Session, table: type[Row], values: Mapping[str, Any]) -> Row | None:
    """Insert one row, unless one with the same unique key exists, which is waited for while it is being written."""
    insert = _insert(session, table).values(values).on_conflict_do_nothing()
    return session.execute(insert.returning(table)).scalars().first()


def _insert(session: Session, table: type[SQLModel]) -> postgresql.Insert | sqlite.Insert:
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    return insert(table)



def put(session: Session, store: BlobStore, digest: Digest, data: bytes, now: datetime) -> None:
    """Keep small bytes of the registry's own making (records of an evaluation); again is fine.

    The row is locked first, so that the collector waits; a crash in between leaves bytes that no row knows, which the
    next try overwrites.
    """
    add_once(session, Blob, {"digest": str(digest), "size": len(data), "verified": "full", "created_at": now})
    row = session.exec(select(Blob).where(Blob.digest == str(digest)).with_for_update()).one()
    store.put(blob_key(str(digest)), data, digest)
    row.missing_since = None
    session.add(row)
