"""Downloads: signed GETs of a version's files, for whoever may read it; the bytes never pass the API."""

from collections.abc import Iterable

from sqlmodel import Session, col, select

from registry.core.errors import VersionNotFound
from registry.core.manifest import Manifest
from registry.db.models import StoredManifest
from registry.schemas import Download, DownloadInfo
from registry.settings import Settings
from registry.storage.base import BlobStore

from . import blobs, pushes, standing
from .tokens import Caller


def download(
    session: Session, store: BlobStore, settings: Settings, caller: Caller, manifests: Iterable[str]
) -> DownloadInfo:
    """The files of all ``manifests``; `VersionNotFound` for one that is not there, or not the caller's to read."""
    wanted = sorted(set(manifests))
    readable = blobs.readable_manifests(caller).where(col(StoredManifest.digest).in_(wanted))
    allowed = set(session.exec(readable))
    for digest in wanted:
        if digest not in allowed:
            mine = caller.readable()
            standing.require_content(session, [digest], mine)
            raise VersionNotFound(ref=digest, name="NAME", nearest="")
    return DownloadInfo(files=files(session, store, settings, wanted))


def files(
    session: Session, store: BlobStore, settings: Settings, manifests: Iterable[str]
) -> dict[str, list[Download]]:
    """Manifest digest -> its files with signed GETs, whoever asks: the caller has checked who may."""
    standing.require_content(session, manifests := list(manifests))
    rows = session.exec(select(StoredManifest).where(col(StoredManifest.digest).in_(manifests))).all()
    return {row.digest: signed_files(store, settings, Manifest.parse(row.body)) for row in rows}


def signed_files(store: BlobStore, settings: Settings, manifest: Manifest) -> list[Download]:
    """Every file of a manifest with a signed GET."""
    expires_s = int(settings.url_ttl_s)
    return [
        Download(
            path=entry.path,
            size=entry.size,
            digest=entry.digest,
            get=pushes.signed(store.presign_get(blobs.blob_key(entry.digest), expires_s=expires_s)),
        )
        for entry in manifest.files
    ]
