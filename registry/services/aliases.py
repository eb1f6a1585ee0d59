"""Aliases: movable pointers, kept per base; compare-and-set moves with history and one-call rollback.

An alias that the adapter's policy gates moves only with a passing verdict on the target base
(`registry.services.gates`), or by force of an admin, on record.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select, update

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
from registry.db import queries
from registry.db.models import Adapter, Alias, AliasMove, Base, Version

from .tokens import Caller

ANY = -1
"""Expected generation of a move that takes whatever is there."""


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
    target. Moving an alias to where it points already changes nothing.
    """
    assert adapter.id is not None and base.id is not None and version.id is not None
    check_name(alias, "alias")
    row = queries.alias_row(session, adapter.id, base.id, alias)
    generation = row.generation if row else 0
    if row is not None and row.version_id == version.id:
        return row
    if expected not in (ANY, generation):
        raise _moved(session, adapter, alias, row)
    before = row.version_id if row else None
    if row is None:
        row = Alias(adapter_id=adapter.id, base_id=base.id, name=alias, version_id=version.id, generation=1)
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError as error:  # two made it at once
            raise _moved(session, adapter, alias, queries.alias_row(session, adapter.id, base.id, alias)) from error
    else:
        moved = session.exec(
            update(Alias)
            .where(col(Alias.id) == row.id, col(Alias.generation) == generation)
            .values(version_id=version.id, generation=generation + 1)
            .execution_options(synchronize_session=False)
        )
        session.refresh(row)
        if moved.rowcount == 0:
            raise _moved(session, adapter, alias, row)
    session.add(
        AliasMove(
            adapter_id=adapter.id,
            base_id=base.id,
            name=alias,
            generation=generation + 1,
            from_version_id=before,
            to_version_id=version.id,
            actor=actor,
            reason=reason,
            verdict=verdict,
            campaign_id=campaign_id,
            at=now,
        )
    )
    session.flush()
    return row


def set_alias(
    session: Session,
    caller: Caller,
    *,
    adapter: Adapter,
    base: Base,
    alias: str,
    version: Version,
    expected: int,
    policy: Policy,
    judge: Callable[[], Verdict | str | None],
    force: bool,
    reason: str,
    now: datetime,
) -> Alias:
    """A person's move: gated by the policy where it names the alias, else open to whoever may publish.

    ``judge`` gives the verdict on ``version`` on ``base``, a text saying what is missing for one, or None where
    the policy has no gates. `GateNotPassed`, `EvidenceTooWeak`, `ScopeMissing`.
    """
    gated = alias in policy.aliases and bool(policy.gates or policy.evidence)
    caller.require("promote" if gated else "publish", adapter.namespace)
    verdict: Verdict | None = None
    if gated and force:
        caller.require("admin", adapter.namespace)
        reason = f"forced: {reason}" if reason else "forced"
    elif gated:
        verdict = passing_verdict(judge(), adapter, alias, version)
        require_evidence(policy, adapter, alias, version)
    return move(
        session,
        adapter=adapter,
        base=base,
        alias=alias,
        version=version,
        expected=expected,
        actor=caller.token_id,
        reason=reason,
        now=now,
        verdict=verdict.model_dump(mode="json") if verdict else None,
    )


def serving(session: Session, adapter: Adapter, base: Base, alias: str, *, other_than: Version) -> Version | None:
    """What the alias points to on ``base`` now, unless that is ``other_than``."""
    assert adapter.id is not None and base.id is not None
    row = queries.alias_row(session, adapter.id, base.id, alias)
    return None if row is None or row.version_id == other_than.id else session.get(Version, row.version_id)


def passing_verdict(found: Verdict | str | None, adapter: Adapter, alias: str, version: Version) -> Verdict | None:
    """``found`` when it allows the move; `GateNotPassed` with the deciding criterion, or what is missing."""
    reason = found if isinstance(found, str) else None if found is None or found.zone is Zone.PASS else found.reason
    if reason is not None:
        raise GateNotPassed(
            alias=alias, name=f"{adapter.namespace}/{adapter.name}", version=f"v{version.number}", reason=reason
        )
    return found if isinstance(found, Verdict) else None


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
    caller.require("promote", adapter.namespace)
    name = SeriesName(adapter.namespace, adapter.name)
    row = queries.alias_row(session, adapter.id, base.id, alias)
    if row is None:
        raise AliasNotFound(name=str(name), alias=alias, base=base.digest[:15], nearest="")
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
        raise NothingToRollBack(alias=alias, name=str(name), base=base.digest[:15])
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
