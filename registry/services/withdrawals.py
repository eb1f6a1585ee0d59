"""Withdrawals: how the standing of a version changes; its number and digest mean the same for ever.

    live → yanked         given to nobody who does not name its number or digest, and with a warning to those who do
    live, yanked → quarantined     its bytes are given to nobody, with the reason; what points at it stays
    yanked, quarantined → live     reinstated
    any of them → deleted          a tombstone: number, digest, who, when and why stay, the bytes are collected

So the newest live version of a series on a base is its *latest*, and moves back when the one before it falls. A
deleted version's content is refused when it is pushed to the series again: nobody brings back by accident what
somebody took away on purpose. What still refers to a version stops it from being deleted or yanked, unless an admin
insists; every consequence is then named.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Text, cast
from sqlmodel import Session, col, or_, select, update

from registry.core.errors import VersionInUse
from registry.core.lifecycle import VERSION, CampaignState, JobState, VersionState
from registry.db.models import Adapter, Alias, Base, Campaign, CampaignItem, Job, Version, VersionParent

from . import aliases, audit, bases
from .standing import ref
from .tokens import Caller

_ACTIVE = (JobState.QUEUED, JobState.RUNNING)
_NAMED = 10
"""Of each kind of reference, so many are named."""


def move(
    session: Session,
    caller: Caller,
    adapter: Adapter,
    version: Version,
    name: str,
    *,
    reason: str,
    force: bool,
    now: datetime,
) -> list[str]:
    """``yank``, ``quarantine``, ``reinstate`` or ``delete`` a version; what follows from it, in words.

    `VersionInUse` names what refers to it. Whoever publishes may yank and take that back; the rest is for admins,
    and so is ``force``. Moving to where it stands changes nothing.
    """
    assert version.id is not None
    caller.require("publish", adapter.namespace)
    admin = force or name in ("quarantine", "delete") or version.status == VersionState.QUARANTINED
    if admin:
        caller.require("admin", adapter.namespace)
    _pointing(session, version)  # locked before the version, as a move of an alias does it
    session.exec(select(Adapter).where(Adapter.id == adapter.id).with_for_update())  # commits queue behind it
    query = select(Version).where(Version.id == version.id).with_for_update()
    version = session.exec(query.execution_options(populate_existing=True)).one()
    pointing = _pointing(session, version)  # also those that moved to it while this waited; from here on none does
    if version.status == VersionState.QUARANTINED:  # perhaps since this was asked
        caller.require("admin", adapter.namespace)
    target = VERSION.moves[name][1]
    if version.status == target:
        return []
    state = VERSION.after(name, version.status, ref(adapter, version))
    follows = _consequences(session, caller, adapter, version, name, pointing, force=force)
    if name == "delete":
        for alias in pointing:
            aliases.take_away(session, alias, actor=caller.token_id, reason=f"deleted: {reason}"[:2000], now=now)
    before = {"status": version.status, "reason": version.status_reason}
    version.status, version.status_reason = state, reason
    version.status_by, version.status_at = caller.token_id, now
    session.add(version)
    session.flush()
    _mark_latest(session, version)
    audit.record(
        session,
        f"version.{'reinstated' if name == 'reinstate' else state}",
        ref(adapter, version),
        actor=caller.token_id,
        namespace=adapter.namespace,
        reason=reason,
        now=now,
        before=before,
        after={"status": state, "digest": version.digest, "follows": follows},
    )
    return follows


def _pointing(session: Session, version: Version) -> Sequence[Alias]:
    """Aliases that point at the version, locked: a move waits, and finds the version as it is afterwards."""
    query = select(Alias).where(Alias.version_id == version.id).order_by(col(Alias.id))
    return session.exec(query.with_for_update().execution_options(populate_existing=True)).all()


def _consequences(
    session: Session,
    caller: Caller,
    adapter: Adapter,
    version: Version,
    name: str,
    pointing: Sequence[Alias],
    *,
    force: bool,
) -> list[str]:
    """What a move does to others, in words; `VersionInUse` when nobody insists, or a campaign rests on it."""
    if name == "reinstate":
        return []
    called = bases.labels(session, [session.get_one(Base, alias.base_id) for alias in pointing])
    becomes = "is taken away" if name == "delete" else "resolves no more until it is moved"
    told = [f"alias '{alias.name}' on {called[alias.base_id]} {becomes}" for alias in pointing]
    working = _campaigns(session, version)
    if name == "delete":
        told += [f"{child} was made from it and stays" for child in _children(session, caller, version)]
        told += [f"upgrade {campaign} works on it" for campaign in working]
    told += [f"job {job} reads it, and fails" for job in _jobs(session, version)] if name != "yank" else []
    in_the_way = name == "delete" and bool(working)
    if told and name != "quarantine" and (in_the_way or not force):
        mine = ref(adapter, version)
        helps = "abort the upgrade first" if in_the_way else f"repeat with --force: loractl {name} {mine} --force"
        raise VersionInUse(ref=mine, move=name, holders="; ".join(told), helps=helps, listed=told)
    return told


def _children(session: Session, caller: Caller, version: Version) -> list[str]:
    query = (
        select(Version, Adapter)
        .join(Adapter)
        .join(VersionParent, col(VersionParent.version_id) == Version.id)
        .where(VersionParent.parent == version.digest, Version.status != VersionState.DELETED)
        .order_by(col(Version.id))
    )
    rows = session.exec(query).all()
    seen = [ref(adapter, child) for child, adapter in rows if caller.can("read", adapter.namespace)]
    unseen = len(rows) - len(seen)
    return _some(seen) + ([f"{unseen} versions of other namespaces"] if unseen else [])


def _jobs(session: Session, version: Version) -> list[str]:
    """Jobs that wait or run and name the version's digest."""
    names_it = cast(col(Job.recipe), Text).contains(version.digest)  # thousands may wait: none is read for this
    query = select(Job.id).where(col(Job.state).in_(_ACTIVE), names_it)
    return _some(list(session.exec(query.order_by(col(Job.id)))))


def _campaigns(session: Session, version: Version) -> list[str]:
    going = (CampaignState.PLANNED, CampaignState.RUNNING)
    query = select(CampaignItem.campaign_id).join(Campaign).where(col(Campaign.state).in_(going))
    query = query.where(or_(col(CampaignItem.serving_id) == version.id, col(CampaignItem.final_id) == version.id))
    return _some(sorted(set(session.exec(query))))


def _some(names: list[str]) -> list[str]:
    return names[:_NAMED] + ([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])


def _mark_latest(session: Session, version: Version) -> None:
    """Let the newest live version of the series on that base be its latest."""
    mine = (col(Version.adapter_id) == version.adapter_id, col(Version.base_id) == version.base_id)
    live = select(Version.id).where(*mine, Version.status == VersionState.LIVE)
    newest = session.exec(live.order_by(col(Version.number).desc()).limit(1)).first()
    fallen = update(Version).where(*mine, col(Version.latest), col(Version.id) != (newest or 0))
    session.exec(fallen.values(latest=False).execution_options(synchronize_session="fetch"))
    if newest is not None:
        risen = update(Version).where(col(Version.id) == newest).values(latest=True)
        session.exec(risen.execution_options(synchronize_session="fetch"))
