"""The standing of a version, asked: may its bytes be had, and is it given to who did not name it?

How it changes, and what follows from that, is in `registry.services.withdrawals`.
"""

from collections.abc import Iterable, Sequence

from sqlmodel import Session, col, select

from registry.core.errors import VersionDeleted, VersionQuarantined, VersionYanked
from registry.core.lifecycle import VersionState
from registry.db.models import Adapter, Version


def ref(adapter: Adapter, version: Version) -> str:
    """``namespace/name@vN``."""
    return f"{adapter.namespace}/{adapter.name}@v{version.number}"


def require_bytes(version: Version, name: str) -> None:
    """`VersionDeleted` or `VersionQuarantined` when nobody may have the bytes of ``version``."""
    facts = {
        "ref": name,
        "reason": version.status_reason or "no reason was given",
        "by": version.status_by or "",
        "at": f"{version.status_at:%Y-%m-%d %H:%M} UTC" if version.status_at else "",
    }
    if version.status == VersionState.DELETED:
        raise VersionDeleted(**facts)
    if version.status == VersionState.QUARANTINED:
        raise VersionQuarantined(**facts)


def require_live(version: Version, name: str) -> None:
    """As `require_bytes`, and `VersionYanked`: for who did not ask for just this version."""
    require_bytes(version, name)
    if version.status == VersionState.YANKED:
        raise VersionYanked(ref=name, reason=version.status_reason or "no reason was given")


def require_content(session: Session, manifests: Iterable[str], namespaces: Sequence[str] | None = None) -> None:
    """`require_bytes` of what each manifest is, in ``namespaces`` (None: all).

    Content that is at hand in one series may be had there.
    """
    query = select(Version, Adapter).join(Adapter).where(col(Version.digest).in_(list(manifests)))
    if namespaces is not None:
        query = query.where(col(Adapter.namespace).in_(namespaces))
    rows = session.exec(query).all()
    given = {version.digest for version, _ in rows if version.status in (VersionState.LIVE, VersionState.YANKED)}
    for version, adapter in rows:
        if version.digest not in given:
            require_bytes(version, ref(adapter, version))
