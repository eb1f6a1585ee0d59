"""Aliases: movable pointers, kept per base; compare-and-set moves with history and one-call rollback.

An alias that the adapter's policy gates moves only with a passing verdict on the target base
(`registry.services.gates`), or by force of an admin, on record.
"""

from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, bindparam
from sqlalchemy import select as columns
from sqlmodel import Session, col, func, select

from registry.core.errors import (
    AliasMoved,
    AliasNotFound,
    EvidenceTooWeak,
    GateNotPassed,
    NothingToRollBack,
)
from registry.core.gate import Verdict, Zone
from registry.core.names import SeriesName, check_name
from registry.core.policy import Evidence, Policy
from registry.db.models import Adapter, Alias, AliasMove, Base, Version
from registry.storage.base import BlobStore

from . import audit, bases, gates, policies, signatures, standing
from .blobs import add_new
from .gates import Lacking, Scored
from .references import nearest
from .tokens import Caller

ANY = -1
"""Expected generation of a move that takes whatever is there."""
_REASON = 2000


def locked(session: Session, adapter: Adapter, base: Base, alias: str) -> Alias | None:
    """The alias as it is now, held until the end of the transaction: what is judged against it stays true."""
    which = {"adapter": adapter.id, "base": base.id, "alias": alias}
    return session.execute(_locked(), which).scalars().first()


@cache
def _locked() -> Select[Alias]:
    query = columns(Alias).where(
        col(Alias.adapter_id) == bindparam("adapter"),
        col(Alias.base_id) == bindparam("base"),
        col(Alias.name) == bindparam("alias"),
    )
    return query.with_for_update().execution_options(populate_existing=True)


def move(
    session: Session,
    *,
    adapter: Adapter,
    base: Base,
    alias: str,
    version: Version,
    expected: int,
    actor: str,
    reason: str,
    now: datetime,
    verdict: dict[str, Any] | None = None,
    campaign_id: str | None = None,
) -> Alias:
    """Point ``alias`` of ``adapter`` on ``base`` to ``version``, if its generation is still ``expected``.

    ``expected`` 0: the alias must not exist yet; `ANY`: whatever is there. `AliasMoved` names the current
    target. Moving an alias to where it points already changes nothing. `SignatureRequired` where the namespace wants
    a signature that the version has not.
    """
    check_name(alias, "alias")
    row = locked(session, adapter, base, alias)
    if row is not None and row.version_id == version.id:
        return row
    _expect(session, adapter, alias, row, expected)
    return _point(
        session, row, adapter=adapter, base=base, alias=alias, version=version, actor=actor, reason=reason, now=now,
        verdict=verdict, campaign_id=campaign_id,
    )  # fmt: skip


def _point(
    session: Session,
    row: Alias | None,
    *,
    adapter: Adapter,
    base: Base,
    alias: str,
    version: Version,
    actor: str,
    reason: str,
    now: datetime,
    verdict: dict[str, Any] | None = None,
    campaign_id: str | None = None,
) -> Alias:
    """Point a locked alias (None: it is not there) to another version than it points to."""
    assert adapter.id is not None and base.id is not None and version.id is not None
    target = select(Version).where(Version.id == version.id).with_for_update(read=True)
    version = session.exec(target.execution_options(populate_existing=True)).one()
    assert version.id is not None
    standing.require_live(version, standing.ref(adapter, version))
    signatures.require_signed(session, adapter, version, hold=True)
    before = row.version_id if row else None
    if row is None:
        made = {
            "adapter_id": adapter.id,
            "base_id": base.id,
            "name": alias,
            "version_id": version.id,
            "target_set_id": version.target_set_id,
            "generation": _next_generation(adapter, base, alias),
        }
        row = add_new(session, Alias, made)
        if row is None:  # two made it at once
            raise _moved(session, adapter, alias, locked(session, adapter, base, alias))
    else:
        row.version_id = version.id
        row.target_set_id = version.target_set_id
        row.generation += 1
        session.add(row)
    session.add(
        AliasMove(
            adapter_id=adapter.id,
            base_id=base.id,
            name=alias,
            generation=row.generation,
            from_version_id=before,
            to_version_id=version.id,
            actor=actor,
            reason=reason[:_REASON],
            verdict=verdict,
            campaign_id=campaign_id,
            at=now,
        )
    )
    session.flush()
    _audit(session, adapter, row, actor, reason, now, before, version.id, campaign_id)
    return row


def take_away(
    session: Session, row: Alias, *, actor: str, reason: str, now: datetime, campaign_id: str | None = None
) -> None:
    """Remove a locked alias: it was not there before what is undone. Its history stays, and its generations go on."""
    gone = AliasMove(
        adapter_id=row.adapter_id,
        base_id=row.base_id,
        name=row.name,
        generation=row.generation + 1,
        from_version_id=row.version_id,
        to_version_id=None,
        actor=actor,
        reason=reason[:_REASON],
        campaign_id=campaign_id,
        at=now,
    )
    session.add(gone)
    session.delete(row)
    session.flush()
    adapter = session.get_one(Adapter, row.adapter_id)
    _audit(session, adapter, row, actor, reason, now, row.version_id, None, campaign_id)


def _audit(
    session: Session,
    adapter: Adapter,
    row: Alias,
    actor: str,
    reason: str,
    now: datetime,
    old: int | None,
    new: int | None,
    campaign_id: str | None,
) -> None:
    base = session.get_one(Base, row.base_id).digest

    def at(version_id: int | None) -> dict[str, Any] | None:
        return {"base": base, "version": session.get_one(Version, version_id).number} if version_id else None

    audit.record(
        session,
        "alias.moved" if new else "alias.removed",
        f"{adapter.namespace}/{adapter.name}:{row.name}",
        actor=actor,
        namespace=adapter.namespace,
        reason=reason,
        now=now,
        before=at(old),
        after=(at(new) or {}) | {"campaign": campaign_id},
    )


def _next_generation(adapter: Adapter, base: Base, alias: str) -> ColumnElement[int]:
    """Of an alias that is not there: it may have been."""
    last = select(func.max(AliasMove.generation)).where(
        AliasMove.adapter_id == adapter.id, AliasMove.base_id == base.id, AliasMove.name == alias
    )
    return func.coalesce(last.scalar_subquery(), 0) + 1


def set_alias(
    session: Session,
    store: BlobStore,
    caller: Caller,
    *,
    adapter: Adapter,
    version: Version,
    alias: str,
    expected: int,
    force: bool,
    reason: str,
    now: datetime,
) -> Alias:
    """A person's move, on the version's base: gated where the policy names the alias, else for whoever may publish.

    `GateNotPassed`, `EvidenceTooWeak`, `ScopeMissing`, `AliasMoved`. The verdict is against what the alias
    points to in this very transaction.
    """
    check_name(alias, "alias")
    base = session.get_one(Base, version.base_id)
    policy = policies.effective(session, adapter.namespace, adapter.name)
    gated = _require(caller, adapter, alias, policy)
    row = locked(session, adapter, base, alias)
    if row is not None and row.version_id == version.id:
        return row
    _expect(session, adapter, alias, row, expected)
    verdict: Verdict | None = None
    if gated and force:
        caller.require("admin", adapter.namespace)
        reason = f"forced: {reason}" if reason else "forced"
    elif gated:
        serving = Scored(base, session.get_one(Version, row.version_id)) if row else None
        found = gates.verdict(session, store, policy, candidate=Scored(base, version), serving=serving)
        verdict = _passing(found, adapter, alias, version)
        require_evidence(policy, adapter, alias, version)
    return _point(
        session,
        row,
        adapter=adapter,
        base=base,
        alias=alias,
        version=version,
        actor=caller.token_id,
        reason=reason,
        now=now,
        verdict=verdict.model_dump(mode="json") if verdict else None,
    )


def _require(caller: Caller, adapter: Adapter, alias: str, policy: Policy) -> bool:
    """Whether the policy gates the alias; `ScopeMissing` when the caller may not move it."""
    gated = policy.is_gated(alias)
    caller.require("promote" if gated else "publish", adapter.namespace)
    return gated


def _expect(session: Session, adapter: Adapter, alias: str, row: Alias | None, expected: int) -> None:
    if expected not in (ANY, row.generation if row else 0):
        raise _moved(session, adapter, alias, row)


def _passing(found: Verdict | Lacking | None, adapter: Adapter, alias: str, version: Version) -> Verdict | None:
    """``found`` when it allows the move; `GateNotPassed` with the deciding criterion, or what is missing."""
    if found is None or (isinstance(found, Verdict) and found.zone is Zone.PASS):
        return found
    raise GateNotPassed(
        alias=alias, name=f"{adapter.namespace}/{adapter.name}", version=f"v{version.number}", reason=found.reason
    )


def require_evidence(policy: Policy, adapter: Adapter, alias: str, version: Version) -> None:
    """`EvidenceTooWeak` when the policy wants a stronger binding than ``version`` has."""
    if policy.evidence is not None and not Evidence(version.evidence).at_least(policy.evidence):
        raise EvidenceTooWeak(
            alias=alias,
            name=f"{adapter.namespace}/{adapter.name}",
            version=f"v{version.number}",
            required=str(policy.evidence),
            actual=version.evidence,
        )


def roll_back(
    session: Session, caller: Caller, *, adapter: Adapter, base: Base, alias: str, reason: str, now: datetime
) -> Alias:
    """Point the alias to where it pointed before its last move; `NothingToRollBack` when there was none."""
    assert adapter.id is not None and base.id is not None
    _require(caller, adapter, alias, policies.effective(session, adapter.namespace, adapter.name))
    name = SeriesName(adapter.namespace, adapter.name)
    called = bases.labels(session, [base])[base.id]
    row = locked(session, adapter, base, alias)
    if row is None:
        others = session.exec(select(Alias.name).where(Alias.adapter_id == adapter.id, Alias.base_id == base.id)).all()
        raise AliasNotFound(name=str(name), alias=alias, base=called, nearest=nearest(alias, others))
    last = session.exec(
        select(AliasMove).where(
            AliasMove.adapter_id == adapter.id,
            AliasMove.base_id == base.id,
            AliasMove.name == alias,
            AliasMove.generation == row.generation,
        )
    ).one()
    before = session.get(Version, last.from_version_id) if last.from_version_id else None
    if before is None:
        raise NothingToRollBack(alias=alias, name=str(name), base=called)
    return move(
        session,
        adapter=adapter,
        base=base,
        alias=alias,
        version=before,
        expected=row.generation,
        actor=caller.token_id,
        reason=f"rollback{': ' + reason if reason else ''}",
        now=now,
    )


def _moved(session: Session, adapter: Adapter, alias: str, row: Alias | None) -> AliasMoved:
    target = session.get(Version, row.version_id) if row else None
    return AliasMoved(
        alias=alias,
        name=f"{adapter.namespace}/{adapter.name}",
        current=f"v{target.number}" if target else "not set",
        generation=row.generation if row else 0,
    )
