"""Signatures: which keys a namespace trusts, what they signed, and what is refused without.

A signature counts while its key is living. Keys are revoked for good: what a stolen key signed before cannot be told
from what it signs afterwards, so nothing of it counts any more, and the key is not taken again. In a namespace that
requires signatures, versions without one that counts are not pushed by people, no alias moves to them, and they are
given to nobody who does not name just this version. What workers make comes unsigned and waits for a person
(docs/adr/0022).

Whatever rests on a signature holds its key's row until the end of the transaction, and a revocation waits for that: of
a move and a revocation at once one is first, and the other one knows.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, exists
from sqlalchemy import select as columns
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel, col, select

from registry.core.errors import (
    BadSignature,
    LoractlError,
    NoSigningKey,
    SignatureRequired,
    SigningKeyNotFound,
    SigningKeyRevoked,
)
from registry.core.lifecycle import VersionState
from registry.core.manifest import Manifest, canonical_json
from registry.core.names import check_name
from registry.core.signatures import MAX_BUNDLE_BYTES, Bundle
from registry.db.among import among
from registry.db.models import Adapter, Alias, Namespace, Signature, SigningKey, StoredManifest, Version
from registry.keys import PublicKey
from registry.schemas import KeyInfo, KeyRequest, SignatureInfo, SignaturesInfo, SigningInfo

from . import audit, standing
from .blobs import add_once
from .tokens import Caller

_NAMED = 10
"""So many of what a change concerns are named."""

Accepted = tuple[SigningKey, Bundle]
"""A signature that holds, and its living key."""


# ── keys ─────────────────────────────────────────────────────────────────────


def add_key(session: Session, caller: Caller, namespace: str, request: KeyRequest, now: datetime) -> SigningKey:
    """Trust a key in the namespace; the one that is there already stays as it is. `SigningKeyRevoked`."""
    check_name(namespace, "namespace")
    caller.require("admin", namespace)
    key = PublicKey.parse(request.public, "public")
    made = SigningKey(
        namespace=namespace,
        fingerprint=key.fingerprint,
        name=request.name,
        public=key.pem,
        created_by=caller.token_id,
        created_at=now,
    )
    if _added(session, made):
        told = {"name": made.name}
        audit.record(
            session, "key.added", made.fingerprint, actor=caller.token_id, namespace=namespace, now=now, after=told
        )
    [row] = _keys(session, namespace, [key.fingerprint])
    _require_living(row)
    return row


def _added(session: Session, row: SQLModel) -> bool:
    """Whether a row was new; one with its unique key stays as it is."""
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return False
    return True


def keys(session: Session, caller: Caller, namespace: str) -> Sequence[SigningKey]:
    """Every key of the namespace, revoked ones too, oldest first; for whoever reads there."""
    check_name(namespace, "namespace")
    caller.require("read", namespace)
    query = select(SigningKey).where(SigningKey.namespace == namespace).order_by(col(SigningKey.id))
    return session.exec(query).all()


def key_info(row: SigningKey, follows: Sequence[str] = ()) -> KeyInfo:
    """A key in the words of the wire."""
    return KeyInfo.model_validate(row.model_dump() | {"follows": list(follows)})


def revoke(
    session: Session, caller: Caller, namespace: str, fingerprint: str, reason: str, now: datetime
) -> tuple[SigningKey, list[str]]:
    """Let nothing count that the key signed, and nothing that it will; what follows, in words. Again is fine."""
    check_name(namespace, "namespace")
    caller.require("admin", namespace)
    query = select(SigningKey).where(SigningKey.namespace == namespace, SigningKey.fingerprint == fingerprint)
    row = session.exec(query.with_for_update().execution_options(populate_existing=True)).first()
    if row is None:
        raise SigningKeyNotFound(id=fingerprint[:80], namespace=namespace)
    if row.revoked_at is not None:
        return row, []
    row.revoked_at, row.revoked_by, row.revoked_reason = now, caller.token_id, reason
    session.add(row)
    session.flush()
    follows = _fallen(session, namespace, row.id)
    after = {"name": row.name, "follows": follows}
    audit.record(
        session, "key.revoked", fingerprint, actor=caller.token_id, namespace=namespace, reason=reason, now=now,
        after=after,
    )  # fmt: skip
    return row, follows


def _fallen(session: Session, namespace: str, key_id: int | None = None) -> list[str]:
    """Versions (that ``key_id`` signed) without a signature that counts, and aliases that resolve no more by that."""
    without: list[ColumnElement[bool]] = [
        col(Adapter.namespace) == namespace, col(Version.status) != VersionState.DELETED, ~_signed()
    ]  # fmt: skip
    told = []
    if key_id is not None:
        without.append(col(Version.id).in_(select(Signature.version_id).where(Signature.key_id == key_id)))
        versions = select(Version, Adapter).join(Adapter).where(*without).order_by(col(Version.id))
        for version, adapter in session.exec(versions.limit(_NAMED + 1)):
            told.append(f"{standing.ref(adapter, version)} has no signature that counts")
    if is_required(session, namespace):
        pointing = select(Alias, Version, Adapter).join(Version, col(Version.id) == Alias.version_id)
        pointing = pointing.join(Adapter, col(Adapter.id) == Version.adapter_id).where(*without)
        for alias, version, adapter in session.exec(pointing.order_by(col(Alias.id)).limit(_NAMED + 1)):
            told.append(f"{_series(adapter)}:{alias.name} resolves no more until v{version.number} is signed")
    return told[:_NAMED] + (["and more"] if len(told) > _NAMED else [])


# ── what a namespace asks for ────────────────────────────────────────────────


def is_required(session: Session, namespace: str) -> bool:
    """Whether the namespace requires signatures."""
    row = session.get(Namespace, namespace)
    return row is not None and row.require_signature


def required_in(session: Session, namespaces: Iterable[str]) -> set[str]:
    """Those of the namespaces that require signatures."""
    wanted = col(Namespace.name).in_(set(namespaces))
    return set(session.exec(select(Namespace.name).where(wanted, col(Namespace.require_signature))))


def signing(session: Session, caller: Caller, namespace: str) -> SigningInfo:
    """Whether the namespace requires signatures, for whoever reads there."""
    check_name(namespace, "namespace")
    caller.require("read", namespace)
    return SigningInfo(namespace=namespace, required=is_required(session, namespace))


def set_required(session: Session, caller: Caller, namespace: str, required: bool, now: datetime) -> SigningInfo:
    """Require signatures in the namespace, or no more; what follows, in words. `NoSigningKey` without a living key."""
    check_name(namespace, "namespace")
    caller.require("admin", namespace)
    living = select(SigningKey.id).where(SigningKey.namespace == namespace, col(SigningKey.revoked_at).is_(None))
    if required and session.exec(living.limit(1).with_for_update(read=True)).first() is None:
        raise NoSigningKey(namespace=namespace)
    add_once(session, Namespace, {"name": namespace, "quota_bytes": None, "keep_days": None})
    query = select(Namespace).where(Namespace.name == namespace).with_for_update()
    row = session.exec(query.execution_options(populate_existing=True)).one()
    before, row.require_signature = row.require_signature, required
    session.add(row)
    session.flush()
    follows = _fallen(session, namespace) if required and not before else []
    audit.record(
        session, "namespace.signing", namespace, actor=caller.token_id, namespace=namespace, now=now,
        before={"required": before}, after={"required": required, "follows": follows},
    )  # fmt: skip
    return SigningInfo(namespace=namespace, required=required, follows=follows)


# ── signatures ───────────────────────────────────────────────────────────────


def accept(
    session: Session, namespace: str, series: str, manifest: Manifest, documents: Collection[dict[str, Any]]
) -> list[Accepted]:
    """The signatures in ``documents``, each by a living key of the namespace over just this version, the keys held.

    Raises:
        BadSignature: one does not hold, or is of something else.
        SigningKeyNotFound: nobody trusts its key here.
        SigningKeyRevoked: its key is.
    """
    bundles = [_parsed(document, series) for document in documents]
    held = {row.fingerprint: row for row in _keys(session, namespace, sorted({bundle.key for bundle in bundles}))}
    found = {}
    for bundle in bundles:
        row = held.get(bundle.key)
        if row is None:
            raise SigningKeyNotFound(id=bundle.key, namespace=namespace)
        _require_living(row)
        PublicKey.parse(row.public, row.name).verify(bundle, series, manifest)
        found[bundle.key] = (row, bundle)
    return list(found.values())


def _parsed(document: dict[str, Any], series: str) -> Bundle:
    if len(canonical_json(document)) > MAX_BUNDLE_BYTES:
        raise BadSignature(ref=series, reason=f"it is over {MAX_BUNDLE_BYTES} bytes")
    return Bundle.parse(document, series)


def _keys(session: Session, namespace: str, fingerprints: Collection[str]) -> Sequence[SigningKey]:
    """Keys by fingerprint, as they are now; a revocation waits until the transaction ends."""
    if not fingerprints:
        return []
    query = select(SigningKey).where(SigningKey.namespace == namespace)
    query = query.where(col(SigningKey.fingerprint).in_(fingerprints)).order_by(col(SigningKey.id))
    return session.exec(query.with_for_update(read=True).execution_options(populate_existing=True)).all()


def _require_living(row: SigningKey) -> None:
    if row.revoked_at is not None:
        raise SigningKeyRevoked(
            id=row.fingerprint,
            namespace=row.namespace,
            by=row.revoked_by or "",
            at=f"{row.revoked_at:%Y-%m-%d %H:%M} UTC",
            reason=row.revoked_reason or "no reason was given",
        )


def keep(
    session: Session, adapter: Adapter, version: Version, accepted: Iterable[Accepted], actor: str, now: datetime
) -> None:
    """Store signatures beside their version; of one key the first stays."""
    assert version.id is not None
    had = set(session.exec(select(Signature.key_id).where(Signature.version_id == version.id)))
    for key, bundle in accepted:
        if key.id in had:
            continue
        assert key.id is not None
        body = canonical_json(bundle.document())
        row = Signature(version_id=version.id, key_id=key.id, bundle=body, created_by=actor, created_at=now)
        if not _added(session, row):  # two sent it at once
            continue
        told = {"key": key.fingerprint, "name": key.name, "digest": version.digest}
        audit.record(
            session, "version.signed", standing.ref(adapter, version), actor=actor, namespace=adapter.namespace,
            now=now, after=told,
        )  # fmt: skip


def sign(
    session: Session, caller: Caller, adapter: Adapter, version: Version, document: dict[str, Any], now: datetime
) -> SignatureInfo:
    """Add a signature to a version that is there; as `accept`. By whoever publishes there. Again is fine."""
    caller.require("publish", adapter.namespace)
    accepted = accept(
        session, adapter.namespace, _series(adapter), manifest_of(session, version), [document]
    )
    keep(session, adapter, version, accepted, caller.token_id, now)
    return next(info for info in _listed(session, version) if info.key == accepted[0][0].fingerprint)


def manifest_of(session: Session, version: Version) -> Manifest:
    """The manifest of a version, as it is stored."""
    return Manifest.parse(session.get_one(StoredManifest, version.digest).body)


def show(session: Session, adapter: Adapter, version: Version) -> SignaturesInfo:
    """All signatures of a version, and whether its namespace requires one."""
    return SignaturesInfo(
        ref=standing.ref(adapter, version),
        digest=version.digest,
        required=is_required(session, adapter.namespace),
        signatures=_listed(session, version),
    )


def _listed(session: Session, version: Version) -> list[SignatureInfo]:
    query = select(Signature, SigningKey).join(SigningKey).where(Signature.version_id == version.id)
    return [
        SignatureInfo(
            key=key.fingerprint,
            name=key.name,
            public=key.public,
            revoked_at=key.revoked_at,
            bundle=json.loads(row.bundle),
            created_by=row.created_by,
            created_at=row.created_at,
        )
        for row, key in session.exec(query.order_by(col(Signature.id)))
    ]


def signers(session: Session, version_ids: Iterable[int]) -> dict[int, list[str]]:
    """version id -> names of the living keys that signed it."""
    found: dict[int, list[str]] = {}
    for version_id, name in session.execute(_signers(), {"versions": {*version_ids}}):
        found.setdefault(version_id, []).append(name)
    return found


@cache
def _signers() -> Select[int, str]:
    query = columns(col(Signature.version_id), col(SigningKey.name)).join(SigningKey)
    living = col(SigningKey.revoked_at).is_(None)
    return query.where(among(col(Signature.version_id), "versions"), living).order_by(col(Signature.id))


class Sound(NamedTuple):
    """A stored signature, looked at again."""

    id: int
    ref: str
    digest: str
    problem: str
    """Empty: it holds."""


def looked_at_again(session: Session, *, after: int, limit: int) -> list[Sound]:
    """Some stored signatures behind an id, verified again as when they came."""
    query = select(Signature, SigningKey, Version, Adapter).join(SigningKey)
    query = query.join(Version, col(Version.id) == Signature.version_id).join(
        Adapter, col(Adapter.id) == Version.adapter_id
    )
    rows = session.exec(query.where(col(Signature.id) > after).order_by(col(Signature.id)).limit(limit))
    found = []
    for row, key, version, adapter in rows:
        ref, problem = standing.ref(adapter, version), ""
        try:
            bundle = Bundle.parse(json.loads(row.bundle), ref)
            manifest = manifest_of(session, version)
            if str(manifest.digest) != version.digest:
                raise BadSignature(ref=ref, reason=f"the stored manifest has digest {manifest.digest}")
            PublicKey.parse(key.public, key.name).verify(bundle, _series(adapter), manifest)
        except (LoractlError, ValueError) as error:
            problem = str(error)
        found.append(Sound(row.id or 0, ref, version.digest, problem))
    return found


# ── what is refused without ──────────────────────────────────────────────────


def require_at_push(
    session: Session, namespace: str, series: str, digest: str, accepted: Collection[Accepted]
) -> None:
    """`SignatureRequired` when the namespace wants one, and neither the push nor the version that is there has it."""
    if accepted or not is_required(session, namespace):
        return
    same = select(Version.id).join(Adapter).where(Adapter.namespace == namespace, Version.digest == digest)
    named = col(Adapter.name) == series.partition("/")[2]
    if session.exec(same.where(named, _signed()).limit(1)).first() is None:
        raise SignatureRequired(ref=series, namespace=namespace)


def require_signed(session: Session, adapter: Adapter, version: Version, *, hold: bool = False) -> None:
    """`SignatureRequired` when the namespace wants a signature and none of ``version`` counts.

    With ``hold`` the keys are held: what is written in this transaction rests on them.
    """
    if not is_required(session, adapter.namespace):
        return
    living = select(SigningKey.id).join(Signature).where(Signature.version_id == version.id)
    living = living.where(col(SigningKey.revoked_at).is_(None)).order_by(col(SigningKey.id))
    if hold:
        living = living.with_for_update(read=True, of=SigningKey)
    if not session.exec(living).all():
        raise SignatureRequired(ref=standing.ref(adapter, version), namespace=adapter.namespace)


def unsigned(session: Session, namespace: str, adapter_id: int, digests: Iterable[str]) -> list[str]:
    """Those of the series' versions that the namespace wants a signature of, and that have none that counts."""
    if not is_required(session, namespace):
        return []
    query = select(Version.digest).where(Version.adapter_id == adapter_id, col(Version.digest).in_(set(digests)))
    return sorted(session.exec(query.where(~_signed())))


def _signed() -> ColumnElement[bool]:
    """The condition that a version has a signature that counts."""
    return exists().where(
        col(Signature.version_id) == Version.id,
        col(Signature.key_id) == SigningKey.id,
        col(SigningKey.revoked_at).is_(None),
    )


def _series(adapter: Adapter) -> str:
    return f"{adapter.namespace}/{adapter.name}"
