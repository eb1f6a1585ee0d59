"""Quotas: how many bytes a namespace may hold.

    used = Σ size(b) over the blobs b that a version of the namespace, or an open push to it, names, each counted once

A push is refused when it is opened, under the lock of the namespace's row: two at once cannot both take the last
bytes. A namespace without a row has no bound.
"""

from datetime import datetime

from sqlalchemy import select as columns
from sqlalchemy import union
from sqlmodel import Session, col, func, select

from registry.core.errors import QuotaExceeded
from registry.core.lifecycle import UNFINISHED, VersionState
from registry.core.names import check_name
from registry.db.models import (
    Adapter,
    Base,
    Blob,
    Dataset,
    DatasetVersion,
    ManifestBlob,
    Namespace,
    Push,
    PushBlob,
    Version,
)
from registry.schemas import QuotaInfo, QuotaRequest

from . import audit
from .bases import NAMESPACE as BASES
from .blobs import add_once
from .tokens import EVERYWHERE, Caller


def used(session: Session, namespace: str, now: datetime) -> int:
    """Bytes that the namespace holds, and that pushes to it have been promised."""
    versions = columns(col(Version.digest)).join(Adapter).where(col(Adapter.namespace) == namespace)
    held = versions.where(col(Version.status) != VersionState.DELETED).union_all(
        columns(col(DatasetVersion.digest)).join(Dataset).where(col(Dataset.namespace) == namespace),
        *([columns(col(Base.manifest)).where(col(Base.manifest).is_not(None))] if namespace == BASES else []),
    )
    kept = (
        columns(col(Blob.digest), col(Blob.size))
        .join(ManifestBlob, col(ManifestBlob.blob) == Blob.digest)
        .where(col(ManifestBlob.manifest).in_(held))
    )
    coming = (
        columns(col(PushBlob.digest), col(PushBlob.size))
        .join(Push, col(Push.id) == PushBlob.push_id)
        .where(col(Push.namespace) == namespace, col(Push.state).in_(UNFINISHED), col(Push.expires_at) > now)
    )
    every = union(kept, coming).subquery()
    return int(session.execute(columns(func.coalesce(func.sum(every.c.size), 0))).scalar_one())


def require_room(session: Session, push: Push, now: datetime) -> None:
    """`QuotaExceeded` when the namespace cannot take a push whose blobs are written down in this transaction."""
    row = session.exec(select(Namespace).where(Namespace.name == push.namespace).with_for_update()).first()
    if row is None or row.quota_bytes is None:
        return
    total = used(session, push.namespace, now)
    if total > row.quota_bytes:
        raise QuotaExceeded(namespace=push.namespace, used=total, allowed=row.quota_bytes)


def show(session: Session, caller: Caller, namespace: str, now: datetime) -> QuotaInfo:
    """What the namespace holds and may hold."""
    check_name(namespace, "namespace")
    caller.require("read", namespace)
    row = session.get(Namespace, namespace)
    return QuotaInfo(
        namespace=namespace,
        used=used(session, namespace, now),
        quota_bytes=row.quota_bytes if row else None,
        keep_days=row.keep_days if row else None,
    )


def put(session: Session, caller: Caller, namespace: str, request: QuotaRequest, now: datetime) -> QuotaInfo:
    """Set both bounds; None takes one away. For admins of everything: a namespace does not bound itself."""
    check_name(namespace, "namespace")
    caller.require("admin", EVERYWHERE)
    add_once(session, Namespace, {"name": namespace, "quota_bytes": None, "keep_days": None})
    row = session.exec(select(Namespace).where(Namespace.name == namespace).with_for_update()).one()
    before = {"quota_bytes": row.quota_bytes, "keep_days": row.keep_days}
    row.quota_bytes, row.keep_days = request.quota_bytes, request.keep_days
    session.add(row)
    session.flush()
    audit.record(
        session,
        "namespace.bounded",
        namespace,
        actor=caller.token_id,
        namespace=namespace,
        now=now,
        before=before,
        after=request.model_dump(),
    )
    return show(session, caller, namespace, now)
