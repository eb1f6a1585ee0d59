"""Upgrade campaigns: persist and carry out what `registry.core.campaign` decides.

Each step of an item runs in one transaction under the item's lock: facts are read afresh from the
database, the pure machine says what to do, the action is carried out, and state and facts are written.
Actions are jobs (equal work is one job), verdicts, and alias moves by compare-and-set, so a step may be
repeated by any scheduler after any crash.
"""

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import or_
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session, col, func, select
from sqlmodel.sql.expression import SelectOfScalar

from registry.core import campaign as machine
from registry.core.campaign import Facts, PoolFacts, Progress, State, SuiteFacts, TierFacts
from registry.core.digest import Digest
from registry.core.errors import (
    AliasMoved,
    BadRequest,
    BaseNotFound,
    CampaignExists,
    CampaignNotFound,
    EvidenceTooWeak,
    LoractlError,
    MoveNotAllowed,
    NoLabelsWanted,
    NotASuccessor,
    ScopeMissing,
    SignatureRequired,
    TokenRefused,
    Unavailable,
    WorkFailed,
)
from registry.core.gate import Quoted, Verdict
from registry.core.lifecycle import CAMPAIGN, CampaignState, JobState
from registry.core.manifest import canonical_json
from registry.core.names import SeriesName
from registry.core.policy import Gate, Policy, variants_pay
from registry.core.pool import gate_of
from registry.core.recipes import TRAINED
from registry.core.route import AS_THEY_WERE, Signals
from registry.db import queries
from registry.db.models import (
    Adapter,
    Alias,
    Base,
    Campaign,
    CampaignItem,
    Dataset,
    DatasetVersion,
    Evaluation,
    Job,
    Line,
    Revision,
    TargetSet,
    Version,
)
from registry.schemas import (
    CampaignInfo,
    CampaignItemInfo,
    DisagreementsInfo,
    JobRequest,
    LabelsRequest,
    Output,
    PoolInfo,
    Scope,
    UpgradeRequest,
)
from registry.storage.base import BlobStore

from . import aliases, audit, bases, fits, gates, jobs, ledger, policies, pools, signatures
from .adapters import fit_of
from .gates import Lacking, Scored, every_gate, suite_of
from .references import find_data, nearest
from .tokens import EVERYWHERE, Caller, acting

_STEPS_AT_ONCE = 8
"""Actions that need no waiting (a verdict, a promotion, its settling) follow one another in one call."""
_SCORINGS = 3
"""How often one thing is scored for a campaign before its differing harnesses are given up."""
_COMPARED = 100
"""Adapters that one comparison of two bases takes."""
_STUMBLES = 10
"""Steps of one item that may break in a row, on what nobody foresaw, before the item is given up."""
_MEASURED = ("inside", "cosine", "excess", "alpha")
"""Signals of a comparison with adapters beyond those of their tensors."""
_TAKEN_BACK = "rolled back"
_NEEDED: tuple[Scope, ...] = ("run", "promote")
"""What a campaign does in a namespace in its creator's name."""
_ACTIVE = (JobState.QUEUED, JobState.RUNNING)


# ── plan ─────────────────────────────────────────────────────────────────────


def plan(
    session: Session, caller: Caller, request: UpgradeRequest, now: datetime
) -> tuple[Campaign, list[CampaignItem]]:
    """What an upgrade would do, as rows that nobody has stored."""
    for namespace in request.namespaces or ():
        for scope in _NEEDED:
            caller.require(scope, namespace)
    if not all(caller.can_somewhere(scope) for scope in _NEEDED):
        raise ScopeMissing(scope="promote", namespace=EVERYWHERE, granted="neither run nor promote anywhere")
    line = session.exec(select(Line).where(Line.name == request.line)).first()
    if line is None or line.id is None:
        known = queries.line_names(session)
        raise BaseNotFound(ref=request.line[:100], nearest=nearest(request.line, known))
    new = bases.find(session, request.to)
    old = bases.find(session, request.old) if request.old else _before(session, request.line, new)
    assert new.id is not None and old.id is not None
    if new.id == old.id:
        raise BadRequest(problems=f"{request.to} is what the line had before: nothing changes")
    numbers = _numbers(session, line.id)
    if numbers.get(new.id, math.inf) < numbers.get(old.id, 0):
        why = f"it is r{numbers[new.id]}, and the other r{numbers[old.id]}"
        raise _no_successor(session, line.name, old, new, why)
    campaign = Campaign(
        id=f"c{secrets.token_hex(8)}",
        line_id=line.id,
        old_id=old.id,
        new_id=new.id,
        state=CampaignState.PLANNED,
        queue=request.queue,
        parallel=request.parallel,
        budget_seconds=request.budget_seconds,
        deadline=request.deadline,
        created_by=caller.token_id,
        created_at=now,
    )
    if request.deadline is not None and request.deadline <= now:
        raise BadRequest(problems=f"deadline: {request.deadline:%Y-%m-%d %H:%M %Z} has passed already")
    items = []
    for adapter, alias in _gated(session, old):
        if request.namespaces is not None and adapter.namespace not in request.namespaces:
            continue
        if not all(caller.can(scope, adapter.namespace) for scope in _NEEDED):
            continue
        assert adapter.id is not None
        item = CampaignItem(
            campaign_id=campaign.id,
            adapter_id=adapter.id,
            alias=alias.name,
            serving_id=alias.version_id,
            state=State.PLANNED,
            facts={},
            changed_at=now,
        )
        _plan_item(session, caller, campaign, item, adapter)
        items.append(item)
    return campaign, items


def _plan_item(session: Session, caller: Caller, campaign: Campaign, item: CampaignItem, adapter: Adapter) -> None:
    """Read the item's first facts; an adapter that breaks them has failed, and keeps nobody else's from a plan."""
    try:
        facts = _facts(session, _behalf(caller, campaign, adapter), campaign, item, None)
    except (SQLAlchemyError, Unavailable):
        raise
    except Exception as error:  # noqa: BLE001  # its manifest and policy are people's words: any may be wrong
        item.state, item.reason = State.FAILED, f"it cannot be planned: {_told(error)}"
        serving = session.get_one(Version, item.serving_id).digest
        facts = Facts(
            adapter=f"{adapter.namespace}/{adapter.name}",
            alias=item.alias,
            old=session.get_one(Base, campaign.old_id).digest,
            new=session.get_one(Base, campaign.new_id).digest,
            serving=serving,
            serving_now=serving,
        )
    item.facts = facts.model_dump(mode="json")


def _told(error: Exception) -> str:
    return error.message if isinstance(error, LoractlError) else f"{type(error).__name__}: {error}"[:500]


def _numbers(session: Session, line_id: int) -> dict[int, int]:
    """base -> the newest revision of the line that it is."""
    query = select(Revision.base_id, Revision.number).where(Revision.line_id == line_id)
    return dict(session.exec(query.order_by(col(Revision.number))).all())


def _no_successor(session: Session, line: str, old: Base, new: Base, why: str) -> NotASuccessor:
    assert old.id is not None and new.id is not None
    called = bases.labels(session, [old, new])
    return NotASuccessor(base=called[new.id], old=called[old.id], line=line, why=why)


def _before(session: Session, line: str, new: Base) -> Base:
    query = select(Base, Revision.number).join(Revision).join(Line).where(Line.name == line)
    rows = session.exec(query.order_by(col(Revision.number).desc())).all()
    numbers = [number for base, number in rows if base.id == new.id]
    for base, number in rows:
        if base.id != new.id and (not numbers or number < numbers[0]):
            return base
    raise BadRequest(problems=f"line '{line}' has no revision before {new.digest[:15]}; name one with --from")


def _gated(session: Session, old: Base) -> list[tuple[Adapter, Alias]]:
    """Adapters served on ``old`` by an alias that their policy names."""
    query = select(Adapter, Alias).join(Alias, col(Alias.adapter_id) == Adapter.id).where(Alias.base_id == old.id)
    rows = session.exec(query.order_by(col(Adapter.namespace), col(Adapter.name), col(Alias.name))).all()
    known: dict[int | None, Policy] = {}
    found = []
    for adapter, alias in rows:
        if adapter.id not in known:
            known[adapter.id] = policies.effective(session, adapter.namespace, adapter.name)
        if alias.name in known[adapter.id].aliases:
            found.append((adapter, alias))
    return found


def create(session: Session, caller: Caller, request: UpgradeRequest, now: datetime) -> Campaign:
    """Store the plan; `CampaignExists` while another one of the line runs. One that nobody started makes room."""
    campaign, items = plan(session, caller, request, now)
    if campaign.new_id not in _numbers(session, campaign.line_id):
        old, new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
        raise _no_successor(session, request.line, old, new, "it is no revision of that line")
    active = _active(session, campaign.line_id)
    if active is not None and not _makes_room(session, active, campaign, now):
        raise _exists(session, active)
    try:
        with session.begin_nested():
            session.add(campaign)
    except IntegrityError as error:  # two planned at once
        active = _active(session, campaign.line_id)
        assert active is not None
        raise _exists(session, active) from error
    session.add_all(items)
    session.flush()
    planned = {"line": request.line, "old": campaign.old_id, "new": campaign.new_id, "adapters": len(items)}
    audit.record(session, "upgrade.planned", campaign.id, actor=caller.token_id, now=now, after=planned)
    for item in items:
        if State(item.state).final:
            unplanned = _look(item)
            ledger.note_step(
                session, campaign, item, unplanned.model_copy(update={"state": State.PLANNED}), unplanned, now
            )
    return campaign


def _look(item: CampaignItem) -> machine.Item:
    return machine.Item(state=State(item.state), reason=item.reason, facts=Facts.model_validate(item.facts))


def _active(session: Session, line_id: int) -> Campaign | None:
    states = (CampaignState.PLANNED, CampaignState.RUNNING)
    return session.exec(select(Campaign).where(Campaign.line_id == line_id, col(Campaign.state).in_(states))).first()


def _makes_room(session: Session, active: Campaign, wanted: Campaign, now: datetime) -> bool:
    active = _row(session, active.id)
    if active.state != CampaignState.PLANNED:
        return False
    newer = _superseded(session, active)
    why = f"the line moved on to {newer}" if newer else f"planned again as {wanted.id}"
    _end(session, active, f"superseded: {why}, and nobody had started it", now)
    session.flush()
    return True


def _exists(session: Session, campaign: Campaign) -> CampaignExists:
    line, new = session.get_one(Line, campaign.line_id), session.get_one(Base, campaign.new_id)
    return CampaignExists(line=line.name, id=campaign.id, base=new.digest[:15])


# ── a person's side ──────────────────────────────────────────────────────────


def get(session: Session, caller: Caller, identity: str) -> Campaign:
    """A campaign; `CampaignNotFound`. Its items are shown as far as the caller reads their namespaces."""
    campaign = session.exec(_visible(caller).where(Campaign.id == identity)).first()
    if campaign is None:
        raise CampaignNotFound(id=identity[:64])
    return campaign


def newest(session: Session, caller: Caller, *, line: str | None, limit: int) -> Sequence[Campaign]:
    """Campaigns that the caller may see, newest first."""
    query = _visible(caller)
    if line is not None:
        query = query.join(Line).where(Line.name == line)
    return session.exec(query.order_by(col(Campaign.created_at).desc(), col(Campaign.id)).limit(limit)).all()


def _visible(caller: Caller) -> SelectOfScalar[Campaign]:
    """Campaigns of the caller's own, and those with an adapter that the caller may read."""
    namespaces = caller.readable()
    if namespaces is None:
        return select(Campaign)
    items = select(CampaignItem.campaign_id).join(Adapter).where(col(Adapter.namespace).in_(namespaces))
    return select(Campaign).where(or_(col(Campaign.created_by) == caller.token_id, col(Campaign.id).in_(items)))


def start(
    session: Session, caller: Caller, identity: str, now: datetime, *, origin: jobs.Origin = jobs.UNKNOWN
) -> Campaign:
    """Let it run; starting a running one again is fine. ``origin``: what its jobs will say that they come from."""
    campaign = _locked(session, caller, identity)
    if campaign.state == CampaignState.RUNNING:
        return campaign
    campaign.state = CAMPAIGN.after("start", campaign.state, identity)
    campaign.started_at = now
    campaign.origin, campaign.traceparent = origin.id, origin.traceparent
    session.add(campaign)
    ledger.note(session, campaign, "started", now, by=caller)
    _measure_drift(session, campaign, now)
    return campaign


def pause(session: Session, caller: Caller, identity: str, now: datetime, *, running: bool = False) -> Campaign:
    """Let nothing further begin: no step is taken, queued jobs wait. Jobs that run go on to their end.

    With ``running`` they too are stopped, and go on from their checkpoints when it is resumed. Pausing again is fine.
    """
    campaign = _locked(session, caller, identity)
    if campaign.state != CampaignState.RUNNING:
        raise MoveNotAllowed(
            noun="campaign", id=identity, state=campaign.state, move="pause", allowed=CampaignState.RUNNING
        )
    if campaign.paused_at is None:
        campaign.paused_at = now
        session.add(campaign)
        ledger.note(session, campaign, "paused", now, by=caller, running=running)
    jobs.hold(session, identity, now, running=running)
    return campaign


def resume(session: Session, caller: Caller, identity: str, now: datetime) -> tuple[Campaign, set[str]]:
    """Go on with a paused campaign; queues that have work again. Resuming a running one is fine."""
    campaign = _locked(session, caller, identity)
    if campaign.state != CampaignState.RUNNING:
        raise MoveNotAllowed(
            noun="campaign", id=identity, state=campaign.state, move="resume", allowed=CampaignState.RUNNING
        )
    if campaign.paused_at is not None:
        campaign.paused_at = None
        session.add(campaign)
        ledger.note(session, campaign, "resumed", now, by=caller)
    return campaign, jobs.let_go(session, identity, now)


def roll_back(
    session: Session, caller: Caller, identity: str, now: datetime, *, adapter: str | None, alias: str, reason: str
) -> Campaign:
    """Take promotions back, one adapter's or all: the alias on the new base goes, the old base keeps serving.

    A campaign that is not over is aborted first when all are taken back. An alias that somebody moved since stays where
    it is, and the item says so. Taking back again changes nothing.
    """
    if adapter is None:
        campaign = _locked(session, caller, identity)
        if campaign.state in (CampaignState.PLANNED, CampaignState.RUNNING):
            _end(session, campaign, reason or "rolled back", now, told=f"ended by hand: {reason or 'rolled back'}")
            ledger.note(session, campaign, "aborted", now, by=caller, reason=reason or "rolled back")
        items = [item for item in _items(session, campaign, lock=True) if item.state == State.PROMOTED]
    else:
        campaign = get(session, caller, identity)
        items = [_named_item(session, caller, identity, adapter, alias)]
        if items[0].state != State.PROMOTED and items[0].reason.startswith(_TAKEN_BACK):
            return campaign
        if items[0].state != State.PROMOTED:
            raise MoveNotAllowed(
                noun="adapter", id=adapter, state=items[0].state, move="roll back", allowed=State.PROMOTED
            )
    for item in items:
        _take_back(session, caller, campaign, item, reason, now)
    return campaign


def _take_back(
    session: Session, caller: Caller, campaign: Campaign, item: CampaignItem, reason: str, now: datetime
) -> None:
    adapter, new = session.get_one(Adapter, item.adapter_id), session.get_one(Base, campaign.new_id)
    row = aliases.locked(session, adapter, new, item.alias)
    why = f"{_TAKEN_BACK} by {caller.name}{f': {reason}' if reason else ''}"
    if row is not None and row.version_id == item.final_id:
        told = f"rollback of campaign {campaign.id}{f': {reason}' if reason else ''}"
        aliases.take_away(session, row, actor=caller.token_id, reason=told, now=now, campaign_id=campaign.id)
        item.state, item.reason = State.FROZEN, why
    else:
        item.reason = f"not rolled back: somebody moved '{item.alias}' on the new base since"
    item.changed_at = now
    item.revision += 1
    session.add(item)
    ledger.note(session, campaign, "rolled-back", now, by=caller, item=item, state=item.state, reason=item.reason)


def abort(session: Session, caller: Caller, identity: str, reason: str, now: datetime) -> Campaign:
    """End it: items that are not final become aborted, their jobs are cancelled; what was promoted stays."""
    campaign = _locked(session, caller, identity)
    if campaign.state == CampaignState.ABORTED:
        return campaign
    _end(session, campaign, reason or "by hand", now, told=f"ended by hand: {reason or 'by hand'}")
    ledger.note(session, campaign, "aborted", now, by=caller, reason=campaign.reason)
    return campaign


def _end(session: Session, campaign: Campaign, reason: str, now: datetime, *, told: str | None = None) -> None:
    campaign.state = CAMPAIGN.after("abort", campaign.state, campaign.id)
    campaign.finished_at, campaign.reason = now, reason
    for item in _items(session, campaign, lock=True):
        if not State(item.state).final:
            before = _look(item)
            item.state, item.reason, item.changed_at = State.ABORTED, told or reason, now
            item.revision += 1
            session.add(item)
            ledger.note_step(session, campaign, item, before, _look(item), now)
    query = select(Job.id).where(Job.campaign_id == campaign.id, col(Job.state).in_(_ACTIVE))
    for job in session.exec(query.order_by(col(Job.id))).all():
        jobs.withdraw(session, campaign.id, job, now)
    session.add(campaign)


def approve(
    session: Session, caller: Caller, identity: str, adapter: str, alias: str, now: datetime, *, approved: bool = True
) -> Campaign:
    """Say yes or no to an adapter whose policy asks."""
    campaign = get(session, caller, identity)
    item = _named_item(session, caller, identity, adapter, alias)
    if item.state != State.WAITING:
        raise MoveNotAllowed(noun="adapter", id=adapter, state=item.state, move="approve", allowed=State.WAITING)
    facts = Facts.model_validate(item.facts)
    if facts.pool is not None and facts.pool.waits:
        wanted = "a candidate that passed; it waits for labels: loractl upgrade label"
        raise MoveNotAllowed(noun="adapter", id=adapter, state=item.state, move="approve", allowed=wanted)
    if facts.unsigned and facts.policy is not None and facts.policy.action != "ask":
        wanted = f"a policy that asks; it {item.reason}"
        raise MoveNotAllowed(noun="adapter", id=adapter, state=item.state, move="approve", allowed=wanted)
    item.facts = facts.model_copy(update={"approved": approved, "decided_by": caller.name}).model_dump(mode="json")
    item.revision += 1
    item.changed_at = now
    session.add(item)
    ledger.note(session, campaign, "approved" if approved else "declined", now, by=caller, item=item)
    return campaign


def disagreements(
    session: Session, store: BlobStore, caller: Caller, identity: str, adapter: str, alias: str
) -> DisagreementsInfo:
    """Inputs on which an adapter's candidate and what serves differ; `NoLabelsWanted` where there are none to label.

    Whoever may promote may see them, and must be able to read the inputs.
    """
    get(session, caller, identity)
    item = _named_item(session, caller, identity, adapter, alias, lock=False)
    pool = Facts.model_validate(item.facts).pool
    if pool is None or pool.paper is None or pool.data is None:
        raise NoLabelsWanted(campaign=identity, adapter=adapter, reason=_no_labels(item, pool))
    find_data(session, caller, "dataset", pool.data)
    return DisagreementsInfo(
        adapter=adapter,
        alias=alias,
        n=pool.n or 0,
        differ=pool.differ or 0,
        paper=pool.paper,
        lines=pools.read_blob(store, pool.paper).decode(),
    )


def label(
    session: Session, store: BlobStore, caller: Caller, identity: str, request: LabelsRequest, now: datetime
) -> Campaign:
    """Take the labels of an adapter's differing answers; the same ones again change nothing.

    `NoLabelsWanted` when it is too early or too late for them; what `registry.core.pool.parse_labels` refuses, and
    `LabelsContradict` for others than were taken: the gate's error allows one look.
    """
    campaign = get(session, caller, identity)
    item = _named_item(session, caller, identity, request.adapter, request.alias)
    facts = Facts.model_validate(item.facts)
    pool, assigned = facts.pool, item.id
    assert assigned is not None
    late = State(item.state).final and (pool is None or pool.labels is None)
    if pool is None or pool.paper is None or late:
        raise NoLabelsWanted(campaign=identity, adapter=request.adapter, reason=_no_labels(item, pool))
    names = (identity, request.adapter)
    labelled = pools.label(
        session, store, caller, item_id=assigned, pool=pool, lines=request.lines, names=names, now=now
    )
    if labelled == pool:
        return campaign
    item.facts = facts.model_copy(update={"pool": labelled}).model_dump(mode="json")
    item.revision += 1
    item.changed_at = now
    session.add(item)
    told = {"pool": labelled.name, "paper": labelled.paper, "labels": labelled.labels, "differ": labelled.differ}
    ledger.note(session, campaign, "labelled", now, by=caller, item=item, **told)
    return campaign


def _no_labels(item: CampaignItem, pool: PoolFacts | None) -> str:
    if State(item.state).final:
        return f"it is {item.state} already"
    if pool is None:
        return "its policy names no pool"
    if pool.verdict is not None:
        return "no label would change the verdict"
    return pool.missing or f"it is {item.state}, and the pool is asked when no tier passes and one is unresolved"


def _named_item(
    session: Session, caller: Caller, identity: str, adapter: str, alias: str, *, lock: bool = True
) -> CampaignItem:
    """An adapter's part of a campaign, locked, for who may promote it."""
    series = SeriesName.parse(adapter)
    caller.require("promote", series.namespace)
    row = queries.adapter_by_name(session, series.namespace, series.name)
    query = select(CampaignItem).where(
        CampaignItem.campaign_id == identity,
        CampaignItem.adapter_id == (row.id if row else None),
        CampaignItem.alias == alias,
    )
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    item = session.exec(query).first()
    if item is None:
        raise BadRequest(problems=f"{adapter}:{alias} is not in campaign {identity}")
    return item


def _locked(session: Session, caller: Caller, identity: str) -> Campaign:
    get(session, caller, identity)
    campaign = _row(session, identity)
    if campaign.created_by != caller.token_id:
        query_ = select(Adapter.namespace).join(CampaignItem).where(CampaignItem.campaign_id == identity)
        for namespace in sorted(set(session.exec(query_))) or [EVERYWHERE]:
            caller.require("promote", namespace)
    return campaign


def _row(session: Session, identity: str) -> Campaign:
    """The campaign as it is now, held until the end of the transaction."""
    query = select(Campaign).where(Campaign.id == identity).with_for_update()
    return session.exec(query.execution_options(populate_existing=True)).one()


def _items(session: Session, campaign: Campaign, *, lock: bool = False) -> Sequence[CampaignItem]:
    query = select(CampaignItem).where(CampaignItem.campaign_id == campaign.id).order_by(col(CampaignItem.id))
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return session.exec(query).all()


# ── running ──────────────────────────────────────────────────────────────────


def unfinished(session: Session) -> list[tuple[str, int]]:
    """(campaign, item) of running campaigns that are not final, and (campaign, 0) where all items are.

    Of a campaign that works on so many adapters at once, no more are begun than have ended; one that waits for a
    person's word takes up no place. A paused campaign is left alone.
    """
    found = []
    going = select(Campaign).where(Campaign.state == CampaignState.RUNNING, col(Campaign.paused_at).is_(None))
    for campaign in session.exec(going):
        items = [item for item in _items(session, campaign) if not State(item.state).final]
        planned = [item for item in items if item.state == State.PLANNED]
        begun = [item for item in items if item.state != State.PLANNED]
        if campaign.parallel is not None:
            free = campaign.parallel - sum(item.state == State.RUNNING for item in begun)
            planned = planned[: max(free, 0)]
        found += [(campaign.id, item.id or 0) for item in (*begun, *planned)] or ([] if items else [(campaign.id, 0)])
    return found


def finish(session: Session, identity: str, now: datetime) -> None:
    """End a running campaign whose items are all final."""
    campaign = session.exec(select(Campaign).where(Campaign.id == identity).with_for_update()).one()
    items = _items(session, campaign)
    if campaign.state != CampaignState.RUNNING or campaign.paused_at is not None:
        return
    if any(not State(item.state).final for item in items):
        return
    campaign.state = CAMPAIGN.after("finish", campaign.state, identity)
    campaign.finished_at = now
    counts = {state: sum(item.state == state for item in items) for state in State if state.final}
    campaign.reason = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "no adapter was served there"
    session.add(campaign)
    ledger.note(session, campaign, "finished", now, reason=campaign.reason)


def step(session: Session, store: BlobStore, item_id: int, now: datetime) -> list[Job]:
    """Bring one item as far as it goes without waiting; the jobs that it asked for."""
    item = session.exec(select(CampaignItem).where(CampaignItem.id == item_id).with_for_update()).one()
    campaign = session.get_one(Campaign, item.campaign_id)
    if campaign.state != CampaignState.RUNNING or campaign.paused_at is not None or State(item.state).final:
        return []
    before = (item.state, item.facts, item.reason)
    was = _look(item)
    work = _Work(session, store, campaign, item, now)
    for _ in range(_STEPS_AT_ONCE):
        if not work.once():
            break
    if State(item.state).final:
        work.cancel_own()
    if (item.state, item.facts, item.reason) != before:
        item.revision += 1
        item.changed_at = now
        session.add(item)
        ledger.note_step(session, campaign, item, was, _look(item), now)
    return work.asked


def stumble(session: Session, item_id: int, error: Exception, now: datetime) -> None:
    """A step of the item broke on what nobody foresaw: after `_STUMBLES` in a row it has failed, with the reason.

    What it had asked for is left to end by itself: what broke may be the very facts that name it.
    """
    item = session.exec(select(CampaignItem).where(CampaignItem.id == item_id).with_for_update()).one()
    if State(item.state).final:
        return
    was = _look(item)
    known = item.facts.get("stumbled")
    stumbled = (known if isinstance(known, int) else 0) + 1
    item.facts = {**item.facts, "stumbled": stumbled}
    if stumbled >= _STUMBLES:
        item.state, item.reason = State.FAILED, f"its step broke {stumbled} times in a row: {_told(error)}"
    item.revision += 1
    item.changed_at = now
    session.add(item)
    ledger.note_step(session, session.get_one(Campaign, item.campaign_id), item, was, _look(item), now)


class _Work:
    """One call of `step`: facts, the machine's word, and the hands that carry it out."""

    def __init__(
        self, session: Session, store: BlobStore, campaign: Campaign, item: CampaignItem, now: datetime
    ) -> None:
        self.session, self.store, self.campaign, self.item, self.now = session, store, campaign, item, now
        self.adapter = session.get_one(Adapter, item.adapter_id)
        self.old, self.new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
        self.asked: list[Job] = []
        self.revoked: str | None = None
        try:
            self.actor = _actor(session, campaign, self.adapter, now)
        except (TokenRefused, ScopeMissing) as error:
            self.actor, self.revoked = Caller(campaign.created_by, campaign.id, "user", {}), error.message

    def once(self) -> bool:
        """Take one step; whether another may follow at once."""
        facts = _facts(self.session, self.actor, self.campaign, self.item, Facts.model_validate(self.item.facts))
        facts = facts.model_copy(update={"revoked": self.revoked, **_bounds(self.session, self.campaign, self.now)})
        step = machine.next_actions(State(self.item.state), facts)
        self.item.state, self.item.reason = step.state, step.reason
        follow = False
        for action in step.actions:
            facts, again = self._do(action, facts)
            follow = follow or again
        self.item.facts = facts.model_dump(mode="json")
        return follow and not State(self.item.state).final

    def cancel_own(self) -> None:
        """Cancel jobs that run for this item alone; what another adapter waits for goes on."""
        facts = Facts.model_validate(self.item.facts)
        mine = _things(facts)
        others = [
            Facts.model_validate(item.facts)
            for item in _items(self.session, self.campaign)
            if item.id != self.item.id and not State(item.state).final
        ]
        shared = {thing for other in others for thing in _things(other)}
        made = _made(facts) - {job for other in others for job in _made(other)}
        query = select(Job).where(Job.campaign_id == self.campaign.id, col(Job.state).in_(_ACTIVE))
        query = query.execution_options(populate_existing=True)
        for job in self.session.exec(query.order_by(col(Job.id))).all():
            scored = set(job.recipe.get("adapters", ())) if job.kind == "evaluate" else set()
            alone = scored <= mine - shared and not (others and job.recipe.get("bare"))
            if job.id in made or (job.kind == "evaluate" and alone):
                jobs.withdraw(self.session, self.campaign.id, job.id, self.now)

    def _do(self, action: machine.Action, facts: Facts) -> tuple[Facts, bool]:
        match action:
            case machine.Produce():
                return self._produce(action, facts), False
            case machine.EvaluateServing():
                self._evaluate(facts, self.old, action.version)
            case machine.EvaluateBareOld():
                self._evaluate(facts, self.old, None)
            case machine.EvaluateBare():
                if not self._candidate_comes(facts):  # else scored together with it: the base is loaded once
                    self._evaluate(facts, self.new, None)
            case machine.EvaluateCandidate():
                self._evaluate(facts, self.new, action.version)
            case machine.Judge():
                return self._judge(action, facts)
            case machine.Promote():
                return self._promote(action, facts)
            case machine.AskPool():
                return self._ask_pool(action, facts), False
            case machine.ComparePool():
                return self._compare_pool(action, facts)
            case machine.JudgePool():
                return self._judge_pool(action, facts)
            case machine.Replan():
                self.cancel_own()
                self.item.serving_id = self._version(action.serving).id or 0
                return facts.replanned(), True
            case machine.Settle():
                version = self._version(action.version)
                self.item.final_id = version.id
                return facts.model_copy(update={"quoted": self._quoted(facts, version)}), False
            case _:  # Wait and WaitFor…, Freeze, Retire, Fail, Abort: the state says it all
                pass
        return facts, False

    def _version(self, digest: str) -> Version:
        found = queries.version_by_digest(self.session, self.item.adapter_id, digest)
        assert found is not None
        return found

    def _candidate_comes(self, facts: Facts) -> bool:
        """Whether a candidate is being made, or is made and not asked to be scored."""
        return any(
            mine.verdict is None and not mine.produce.lost and mine.evaluate.job is None
            and (mine.produce.job in _ACTIVE or mine.produce.done)
            for mine in facts.tiers
        ) or not facts.tiers  # fmt: skip

    def _produce(self, action: machine.Produce, facts: Facts) -> Facts:
        assert facts.policy is not None
        recipe: dict[str, Any] = {
            "kind": "rebase",
            "tier": action.tier,
            "adapter": action.adapter,
            "base": self.new.digest,
        }
        if action.tier in TRAINED:
            recipe["suite"] = suite_of(self.session, facts.policy.gates[0]).digest
        if action.tier == "carry" and facts.signals.lineage not in AS_THEY_WERE:
            recipe |= self._chosen_by(facts, action.adapter)
        if not facts.starts:  # nothing to begin from: the recorded recipe, from scratch
            recipe = self._anew(action.adapter)
        message = f"{action.tier} to {bases.labels(self.session, [self.new])[self.campaign.new_id]}"
        output = Output(adapter=facts.adapter, message=f"{message}, campaign {self.campaign.id}")
        try:
            progress = self._ask(recipe, output)
        except LoractlError as error:  # it cannot even be planned: the next tier
            progress = Progress(job=JobState.FAILED, error=error.message)
        return facts.with_tier(facts.tier(action.tier).model_copy(update={"produce": progress}))

    def _chosen_by(self, facts: Facts, adapter: str) -> dict[str, Any]:
        """What a carry chooses among its variants by: the suite's calibration split, and texts where some are kept.

        Nothing where the choice would cost nearly as much as the training that it may save.
        """
        assert facts.policy is not None
        suite = suite_of(self.session, facts.policy.gates[0])
        training = jobs.training_of(self.session, self._version(adapter), self.new.digest)
        if training is not None and not variants_pay(training.steps, training.batch_tokens, suite.size):
            return {}
        found = {"suite": suite.digest}
        if facts.policy.retained and facts.retained:
            found["inputs"] = facts.policy.retained
        return found

    def _anew(self, adapter: str) -> dict[str, Any]:
        training = jobs.training_of(self.session, self._version(adapter), self.new.digest)
        assert training is not None  # else the machine does not ask for it
        return training.model_dump(mode="json")

    def _evaluate(self, facts: Facts, base: Base, version: str | None) -> None:
        """Ask for what has no evaluation yet, the bare base in the same job."""
        for suite in _suites(self.session, facts.policy):
            evaluated = _scored_by(self.session, self.campaign, base, suite)
            wanted = [version] if version and version not in evaluated else []
            bare = None not in evaluated
            if wanted or (bare and version is None):
                self._score(base, suite, wanted, bare=bare)

    def _score(self, base: Base, suite: DatasetVersion, named: list[str], *, bare: bool, fresh: bool = False) -> None:
        recipe = {"kind": "evaluate", "base": base.digest, "suite": suite.digest, "adapters": named, "bare": bare}
        things = [*named, *([None] if bare else [])]
        try:
            if self._ask(recipe, Output(), fresh=fresh).done:  # equal work, of which no evaluation is left
                tried = max(self._tried(base, thing, suite) for thing in things)
                if tried >= _SCORINGS:
                    raise WorkFailed(id="to evaluate it", reason=f"{tried} were done, and nothing is left of them")
                self._ask(recipe, Output(), fresh=True)
        except LoractlError as error:
            self.item.state, self.item.reason = State.FAILED, f"it cannot be evaluated: {error.message}"

    def _ask(self, recipe: dict[str, Any], output: Output, *, fresh: bool = False) -> Progress:
        request = JobRequest(
            recipe=recipe, output=output, queue=self.campaign.queue, namespace=self.adapter.namespace, fresh=fresh
        )
        with self.session.begin_nested():
            job, reused = jobs.submit(
                self.session, self.actor, request, self.now,
                campaign_id=self.campaign.id, suites=self._named(), origin=_origin(self.campaign),
            )  # fmt: skip
        if not reused:
            self.asked.append(job)
        return Progress(job=JobState(job.state), id=job.id)

    def _named(self) -> list[str]:
        """Digests of the suites that the adapter's policy names."""
        policy = policies.effective(self.session, self.adapter.namespace, self.adapter.name)
        return [suite.digest for suite in _suites(self.session, policy)]

    def _judge(self, action: machine.Judge, facts: Facts) -> tuple[Facts, bool]:
        assert facts.policy is not None
        mine = facts.tier(action.tier)
        found = gates.verdict(
            self.session,
            self.store,
            facts.policy,
            candidate=Scored(self.new, self._version(str(mine.version))),
            serving=Scored(self.old, self.session.get_one(Version, self.item.serving_id)),
            alpha=action.alpha,
        )
        if isinstance(found, Verdict):
            rules = _rules(facts.policy, _suites(self.session, facts.policy))
            return facts.with_tier(mine.model_copy(update={"verdict": found, "rules": rules})), True
        assert found is not None  # without gates the machine froze it
        if found.evaluations and all(
            self._tried(scored.base, scored.digest, suite) < _SCORINGS for scored, suite in found.evaluations
        ):
            self._score_again(found)
            return facts, False
        lost = Progress(job=JobState.FAILED, error=found.reason)
        closed = Progress(job=JobState.SUCCEEDED)
        return facts.with_tier(mine.model_copy(update={"produce": closed, "evaluate": lost})), True

    def _ask_pool(self, action: machine.AskPool, facts: Facts) -> Facts:
        """Two jobs, one a base; who answers is what the candidate's tier made and what serves."""
        pool, policy = facts.pool, facts.policy
        assert pool is not None and pool.data is not None and policy is not None
        gate = gate_of(policy)
        assert gate is not None
        how = {
            "kind": "answers", "suite": suite_of(self.session, gate).digest, "metric": gate.metric,
            "inputs": pool.data, "apart": self._learnt(facts),
        }  # fmt: skip
        who_made = {"tier": action.tier, "version": action.version, "bare": action.bare}
        asked = pool.unasked().model_copy(update=who_made)
        sides = {
            "serving": {"base": self.old.digest, "adapters": [facts.serving], "bare": False},
            "candidate": {"base": self.new.digest, "adapters": [action.version], "bare": action.bare},
        }
        for side, who in sides.items():
            try:
                progress = self._ask(how | who, Output())
            except LoractlError as error:
                progress = Progress(job=JobState.FAILED, error=error.message)
            asked = asked.model_copy(update={side: progress})
        return facts.model_copy(update={"pool": asked})

    def _learnt(self, facts: Facts) -> list[str]:
        """Datasets that what is compared was made with, as far as they are there to be left out."""
        assert facts.policy is not None
        version = self._version(facts.source or facts.serving)
        training = jobs.training_of(self.session, version, self.new.digest)
        named = [*(training.datasets if training else ()), *([facts.policy.retained] if facts.policy.retained else [])]
        found = []
        for text in named:
            with suppress(LoractlError):
                found.append(find_data(self.session, self.actor, "dataset", text).digest)
        return sorted(set(found))

    def _compare_pool(self, action: machine.ComparePool, facts: Facts) -> tuple[Facts, bool]:
        pool, suite = facts.pool, self._undecided(facts)
        assert pool is not None and facts.policy is not None and self.item.id is not None
        found, problem = pools.compare(
            self.session,
            self.store,
            item_id=self.item.id,
            pool=pool,
            serving=facts.serving,
            suite=suite,
            policy=facts.policy,
            alpha=action.alpha,
            now=self.now,
        )
        if problem is not None:
            lost = Progress(job=JobState.FAILED, error=problem)
            return facts.model_copy(update={"pool": found.model_copy(update={"candidate": lost})}), True
        rules = self._pool_rules(facts) if found.verdict else None
        return facts.model_copy(update={"pool": found.model_copy(update={"rules": rules})}), True

    def _judge_pool(self, action: machine.JudgePool, facts: Facts) -> tuple[Facts, bool]:
        pool = facts.pool
        assert pool is not None and facts.policy is not None
        found = pools.judge(
            self.session,
            self.store,
            pool=pool,
            serving=facts.serving,
            suite=self._undecided(facts),
            policy=facts.policy,
            alpha=action.alpha,
        )
        changes = {"verdict": found, "rules": self._pool_rules(facts)}
        return facts.model_copy(update={"pool": pool.model_copy(update=changes)}), True

    def _undecided(self, facts: Facts) -> Verdict:
        """What the suites said of the candidate that the pool is asked about."""
        assert facts.pool is not None and facts.pool.tier is not None
        verdict = facts.tier(facts.pool.tier).verdict
        assert verdict is not None
        return verdict

    def _pool_rules(self, facts: Facts) -> str:
        assert facts.policy is not None
        return _rules(facts.policy, _suites(self.session, facts.policy))

    def _quoted(self, facts: Facts, version: Version) -> tuple[Quoted, ...]:
        assert facts.policy is not None
        serving = Scored(self.old, self.session.get_one(Version, self.item.serving_id))
        candidate = Scored(self.new, version)
        return gates.quoted(self.session, self.store, facts.policy, candidate=candidate, serving=serving)

    def _score_again(self, found: Lacking) -> None:
        """Old records are of another harness than the candidate's: score them anew."""
        for scored, suite in found.evaluations:
            named = [scored.digest] if scored.digest else []
            self._score(scored.base, suite, named, bare=not named, fresh=True)
        self.item.reason = found.reason

    def _tried(self, base: Base, digest: str | None, suite: DatasetVersion) -> int:
        done = [job for job in _scoring(self.session, self.campaign, base, suite) if job.state not in _ACTIVE]
        return sum(digest in job.recipe["adapters"] if digest else job.recipe["bare"] for job in done)

    def _promote(self, action: machine.Promote, facts: Facts) -> tuple[Facts, bool]:
        assert facts.policy is not None
        before = aliases.locked(self.session, self.adapter, self.old, action.alias)
        if before is None or before.version_id != self._version(action.serving).id:
            return facts, True  # it moved since the facts were read: read them again
        version, verdict = self._version(action.version), machine.passing_verdict(facts)
        try:
            aliases.require_evidence(facts.policy, self.adapter, action.alias, version)
            aliases.move(
                self.session,
                adapter=self.adapter,
                base=self.new,
                alias=action.alias,
                version=version,
                expected=action.expected,
                actor=self.campaign.created_by,
                reason=f"{action.tier} passed the gate",
                now=self.now,
                verdict=verdict.model_dump(mode="json") if verdict else None,
                campaign_id=self.campaign.id,
            )
        except (AliasMoved, SignatureRequired):
            return facts, True  # the machine sees from fresh facts what to wait for
        except EvidenceTooWeak as error:
            self.item.state, self.item.reason = State.FROZEN, error.message
        return facts, True


def _bounds(session: Session, campaign: Campaign, now: datetime) -> dict[str, str | None]:
    """Why a campaign may begin nothing more: its deadline, and its budget."""
    late = campaign.deadline is not None and now >= campaign.deadline
    found: dict[str, str | None] = {
        "overdue": f"{campaign.deadline:%Y-%m-%d %H:%M} UTC" if late else None,
        "exhausted": None,
    }
    if campaign.budget_seconds is not None and (spent := _spent(session, campaign)) >= campaign.budget_seconds:
        found["exhausted"] = f"{spent:.0f} of the campaign's {campaign.budget_seconds:.0f} seconds are spent"
    return found


def _spent(session: Session, campaign: Campaign) -> float:
    """Device seconds of all the campaign's jobs that came to a result."""
    seconds = col(Job.result)["seconds"].as_float()
    query = select(func.sum(seconds)).where(Job.campaign_id == campaign.id, Job.state == JobState.SUCCEEDED)
    return session.exec(query).one() or 0.0


def _made(facts: Facts) -> set[str | None]:
    """Jobs that make its candidates, and that answer its pool."""
    pool = facts.pool
    return {*(mine.produce.id for mine in facts.tiers), *((pool.serving.id, pool.candidate.id) if pool else ())}


def _things(facts: Facts) -> set[str]:
    """Versions that are scored for an item."""
    return {facts.serving, *(mine.version for mine in facts.tiers if mine.version)}


def _actor(session: Session, campaign: Campaign, adapter: Adapter, now: datetime) -> Caller:
    """The campaign's creator with the rights that are left by now; `TokenRefused`, `ScopeMissing`."""
    creator = acting(session, campaign.created_by, now)
    for scope in _NEEDED:
        creator.require(scope, adapter.namespace)
    return _behalf(creator, campaign, adapter)


def _behalf(creator: Caller, campaign: Campaign, adapter: Adapter) -> Caller:
    """The campaign on one adapter: who may run and promote there, may have candidates made of it, and nothing else."""
    own = sorted({*creator.scopes.get(adapter.namespace, ()), "read", "publish"})
    return replace(creator, name=f"campaign {campaign.id}", scopes={**creator.scopes, adapter.namespace: own})


def _measure_drift(session: Session, campaign: Campaign, now: datetime) -> None:
    """Ask for the measured drift between the two bases, a signal for the plan and the report."""
    old, new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
    if old.weights == new.weights == "full":
        recipe = {"kind": "compare", "old": old.digest, "base": new.digest}
        request = JobRequest(recipe=recipe, queue=campaign.queue, namespace="base")
        itself = Caller(campaign.created_by, f"campaign {campaign.id}", "user", {"base": ["run"]})
        jobs.submit(session, itself, request, now, campaign_id=campaign.id, origin=_origin(campaign))
        _measure_adapters(session, campaign, old, new, now)


def _measure_adapters(session: Session, campaign: Campaign, old: Base, new: Base, now: datetime) -> None:
    """Ask what forward passes say of adapters whose policy retains inputs: some in one job, in their own namespace.

    Adapters first made on another base than ``old`` are left to the drift, as all are whose inputs nobody may read.
    """
    together: dict[tuple[str, str], set[str]] = {}
    actors: dict[str, Caller] = {}
    for item in _items(session, campaign):
        adapter = session.get_one(Adapter, item.adapter_id)
        retained = policies.effective(session, adapter.namespace, adapter.name).retained
        source = _original(session, session.get_one(Version, item.serving_id))
        if State(item.state).final or retained is None or not source.runnable or source.base_id != old.id:
            continue
        try:
            actor = actors[adapter.namespace] = _actor(session, campaign, adapter, now)
            inputs = find_data(session, actor, "dataset", retained).digest
        except LoractlError:
            continue
        together.setdefault((adapter.namespace, inputs), set()).add(source.digest)
    for (namespace, inputs), versions in together.items():
        for some in _parts(sorted(versions), _COMPARED):
            recipe = {"kind": "compare", "old": old.digest, "base": new.digest, "adapters": some, "inputs": inputs}
            request = JobRequest(recipe=recipe, queue=campaign.queue, namespace=namespace)
            with suppress(LoractlError), session.begin_nested():
                actor, origin = actors[namespace], _origin(campaign)
                jobs.submit(session, actor, request, now, campaign_id=campaign.id, origin=origin)


def _origin(campaign: Campaign) -> jobs.Origin:
    return jobs.Origin(campaign.origin, campaign.traceparent)


def _parts(values: list[str], most: int) -> list[list[str]]:
    return [values[first : first + most] for first in range(0, len(values), most)]


# ── facts ────────────────────────────────────────────────────────────────────


def _facts(
    session: Session, actor: Caller, campaign: Campaign, item: CampaignItem, known: Facts | None
) -> Facts:
    """All that a decision rests on, read afresh; verdicts and approvals are kept from ``known``, while they count."""
    adapter = session.get_one(Adapter, item.adapter_id)
    old, new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
    assert adapter.id is not None and old.id is not None and new.id is not None
    policy = policies.effective(session, adapter.namespace, adapter.name)
    suites = _suites(session, policy)
    serving = session.get_one(Version, item.serving_id)
    source = _original(session, serving)
    now_old = queries.alias_row(session, adapter.id, old.id, item.alias)
    now_new = queries.alias_row(session, adapter.id, new.id, item.alias)
    training = jobs.training_of(session, source, new.digest)
    made = session.get(Job, source.job_id) if source.job_id else None
    fit = fit_of(session, source, new)
    line = session.get_one(Line, campaign.line_id)
    old_of_source = session.get_one(Base, source.base_id)
    shape = f"{new.model_type} {new.parameters} {_targets(session, source)} r{source.rank}"
    begun = known if item.state != State.PLANNED else None  # what it was begun on stays
    facts = Facts(
        adapter=f"{adapter.namespace}/{adapter.name}",
        alias=item.alias,
        line=line.name,
        old=old.digest,
        new=new.digest,
        serving=serving.digest,
        source=source.digest if source.id != serving.id else None,
        serving_now=session.get_one(Version, now_old.version_id).digest if now_old else None,
        new_alias=session.get_one(Version, now_new.version_id).digest if now_new else None,
        generation=now_new.generation if now_new else 0,
        policy=policy,
        fit=fit.fit,
        fit_reason="; ".join(f"{r['subject']} {r['text']}".strip() for r in fit.reasons[:2]),
        signals=begun.signals
        if begun
        else _signals(session, old_of_source, new, source),
        measuring=begun is None and _compares(session, old_of_source, new),
        expected=begun.expected if begun else ledger.expected(session, shape),
        shape=shape,
        runnable=serving.runnable,
        old_weights=old.weights == "full",
        source_weights=old_of_source.weights == "full",
        new_weights=new.weights == "full",
        recipe=training is not None,
        datasets=training is not None and _all_there(session, actor, training.datasets),
        retained=_is_there(session, actor, policy.retained) if policy.retained else None,
        suites=tuple(_suite_facts(session, gate) for gate in every_gate(policy)),
        pool=pools.facts_of(session, actor, policy, old, known.pool if known else None),
        superseded_by=_superseded(session, campaign),
        trained_steps=int(_number(made.result.get("steps"))) if made and made.result else None,
        trained_seconds=_number(made.result.get("seconds")) if made and made.result else None,
        approved=known.approved if known else None,
        decided_by=known.decided_by if known else "",
    )
    rules = _rules(policy, suites)
    if any(suite.gate_n is None for suite in facts.suites):  # the machine freezes it with the reason
        return facts.model_copy(update={"tiers": known.tiers if known else ()}).under(rules)
    found = facts.model_copy(
        update={
            "serving_scores": _progress(session, campaign, old, serving.digest, suites),
            "bare_scores": _progress(session, campaign, new, None, suites),
            "bare_old_scores": _progress(session, campaign, old, None, suites),
            "reference_seconds": _scoring_seconds(session, old, serving.digest, suites)
            + _scoring_seconds(session, old, None, suites)
            + _scoring_seconds(session, new, None, suites),
            "tiers": tuple(_tier_facts(session, campaign, item, new, mine, suites) for mine in known.tiers)
            if known
            else (),
        }
    )
    candidates = [mine.version for mine in found.tiers if mine.version]
    unsigned = signatures.unsigned(session, adapter.namespace, adapter.id, candidates) if candidates else []
    return found.model_copy(update={"unsigned": tuple(unsigned)}).under(rules)


def _signals(session: Session, old: Base, new: Base, source: Version) -> Signals:
    """What was measured for the adapter: by the tensors that it patches, and by a comparison that it took part in."""
    found = fits.signals(session, old=old, new=new, target_set_id=source.target_set_id)
    query = select(Job).where(Job.kind == "compare", Job.base == new.digest, Job.state == JobState.SUCCEEDED)
    for job in session.exec(query.order_by(col(Job.finished_at).desc())):
        named = job.recipe.get("adapters") or []
        told = (job.result or {}).get("adapters")
        if job.recipe.get("old") != old.digest or source.digest not in named or not isinstance(told, list):
            continue
        with suppress(IndexError, AttributeError, ValidationError):  # a worker's words
            own = told[named.index(source.digest)]
            measured = {name: own[name] for name in _MEASURED if own.get(name) is not None}
            return Signals.model_validate(found.model_dump() | measured)
    return found


def _compares(session: Session, old: Base, new: Base) -> bool:
    """Whether a job compares the two right now."""
    query = select(Job.recipe).where(col(Job.state).in_(_ACTIVE), Job.kind == "compare", Job.base == new.digest)
    return any(recipe.get("old") == old.digest for recipe in session.exec(query))


def _original(session: Session, version: Version) -> Version:
    """What a carried version was first made from: rebases start from the original, they never stack."""
    seen = set()
    while version.digest not in seen:
        seen.add(version.digest)
        recipe = jobs.recorded_recipe(session, version)
        if recipe.get("kind") != "rebase" or recipe.get("tier") == "retrain":
            return version
        parent = queries.version_by_digest(session, version.adapter_id, str(recipe.get("adapter")))
        if parent is None:
            return version
        version = parent
    return version


def _targets(session: Session, version: Version) -> str:
    found = session.get(TargetSet, version.target_set_id) if version.target_set_id else None
    return found.digest[7:19] if found else "none"


def _suite_facts(session: Session, gate: Gate) -> SuiteFacts:
    try:
        return SuiteFacts(suite=gate.suite, gate_n=suite_of(session, gate).gate_rows)
    except LoractlError:
        return SuiteFacts(suite=gate.suite, gate_n=None)


def _suites(session: Session, policy: Policy | None) -> list[DatasetVersion]:
    """The suites that a policy names, each content once."""
    found: dict[str, DatasetVersion] = {}
    for gate in every_gate(policy) if policy else ():
        try:
            suite = suite_of(session, gate)
        except LoractlError:
            continue
        found[suite.digest] = suite
    return list(found.values())


def _rules(policy: Policy, suites: Sequence[DatasetVersion]) -> str:
    """Digest of what a verdict rests on besides the records and its share of α: gates, guard, limits, the suites."""
    words = policy.model_dump(mode="json", include={"gates", "guard", "max_negative_flips"})
    return str(Digest.sha256(canonical_json([words, [suite.digest for suite in suites]])))


def _is_there(session: Session, actor: Caller, dataset: str) -> bool:
    """Whether ``actor`` can read this dataset."""
    try:
        find_data(session, actor, "dataset", dataset)
    except LoractlError:
        return False
    return True


def _all_there(session: Session, actor: Caller, digests: Sequence[str]) -> bool:
    """Whether all these datasets are there for ``actor`` to read."""
    query = select(DatasetVersion.digest, Dataset.namespace).join(Dataset).where(Dataset.kind == "dataset")
    rows = session.exec(query.where(col(DatasetVersion.digest).in_(digests)))
    return {digest for digest, namespace in rows if actor.can("read", namespace)} == set(digests)


def _number(value: object) -> float:
    """What a worker reported as a number; 0 for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def _superseded(session: Session, campaign: Campaign) -> str | None:
    query = select(Revision).where(Revision.line_id == campaign.line_id).order_by(col(Revision.number).desc())
    rows = session.exec(query).all()
    mine = [row.number for row in rows if row.base_id == campaign.new_id]
    if not mine or rows[0].number == max(mine):
        return None
    return f"{session.get_one(Line, campaign.line_id).name}@r{rows[0].number}"


def _scored_by(session: Session, campaign: Campaign, base: Base, suite: DatasetVersion) -> set[str | None]:
    """Versions (None: the bare base) that are scored on a suite, or are being scored for this campaign."""
    query = select(Evaluation.version_id, Version.digest).join(Version, isouter=True)
    rows = session.exec(query.where(Evaluation.base_id == base.id, queries.on_suite(suite.digest)))
    found: set[str | None] = {digest if version_id is not None else None for version_id, digest in rows}
    for job in _scoring(session, campaign, base, suite):
        if job.state in _ACTIVE:
            found |= set(job.recipe["adapters"]) | ({None} if job.recipe["bare"] else set())
    return found


def _scoring(session: Session, campaign: Campaign, base: Base, suite: DatasetVersion) -> list[Job]:
    query = select(Job).where(Job.campaign_id == campaign.id, Job.kind == "evaluate", Job.base == base.digest)
    rows = session.exec(query.order_by(col(Job.created_at)))
    return [job for job in rows if job.recipe["suite"] == suite.digest]


def _progress(
    session: Session, campaign: Campaign, base: Base, digest: str | None, suites: Sequence[DatasetVersion]
) -> Progress:
    """How far the scoring of a version (None: the bare base) is, on all suites together.

    The bare base is lost only when a job of its own failed: one that failed on an adapter says nothing of it.
    """
    found = Progress(job=JobState.SUCCEEDED)
    for suite in suites:
        assert base.id is not None
        if queries.newest_evaluation(session, base_id=base.id, digest=digest, suite=suite.digest) is not None:
            continue
        found = Progress()
        mine = [
            job
            for job in _scoring(session, campaign, base, suite)
            if (digest in job.recipe["adapters"] if digest else job.recipe["bare"])
        ]
        if not mine or mine[-1].state == JobState.SUCCEEDED:
            continue
        last = mine[-1]
        if last.state in _ACTIVE or digest or not last.recipe["adapters"]:
            return Progress(job=JobState(last.state), id=last.id, error=str((last.error or {}).get("detail", "")))
    return found


def _tier_facts(
    session: Session,
    campaign: Campaign,
    item: CampaignItem,
    new: Base,
    mine: TierFacts,
    suites: Sequence[DatasetVersion],
) -> TierFacts:
    job = session.get(Job, mine.produce.id) if mine.produce.id else None
    if job is None:
        return mine
    produce = Progress(job=JobState(job.state), id=job.id, error=str((job.error or {}).get("detail", "")))
    made = (job.result or {}).get("made") or []
    if not produce.done or not made:
        return mine.model_copy(update={"produce": produce})
    digest = str(made[0]["digest"])
    version = queries.version_by_digest(session, item.adapter_id, digest)
    evaluate = _progress(session, campaign, new, digest, suites)
    result = job.result or {}
    return mine.model_copy(
        update={
            "produce": produce,
            "version": digest,
            "label": f"@v{version.number}" if version else digest[:19],
            "evaluate": evaluate,
            "steps": int(_number(result.get("steps"))),
            "told": {key: result[key] for key in ("start", "candidates", "signals") if key in result},
            "seconds": _number(result.get("seconds")) + _scoring_seconds(session, new, digest, suites),
        }
    )


def _scoring_seconds(session: Session, base: Base, digest: str | None, suites: Sequence[DatasetVersion]) -> float:
    """Device seconds that went into scoring a version (None: the bare base) on these suites, each job's once."""
    on = queries.on_suite(*(suite.digest for suite in suites))
    query = select(Evaluation.job_id, func.max(Evaluation.seconds)).where(Evaluation.base_id == base.id, on)
    if digest is None:
        query = query.where(col(Evaluation.version_id).is_(None))
    else:
        query = query.where(col(Evaluation.version_id).in_(select(Version.id).where(Version.digest == digest)))
    return math.fsum(seconds for _, seconds in session.exec(query.group_by(Evaluation.job_id)))


# ── show ─────────────────────────────────────────────────────────────────────


def info(
    session: Session, caller: Caller, campaign: Campaign, items: Sequence[CampaignItem] | None = None
) -> CampaignInfo:
    """A campaign in the words of the wire; items of namespaces that the caller may not read are left out."""
    names = bases.named(session, [campaign.old_id, campaign.new_id])
    rows = _items(session, campaign) if items is None else items
    shown = [(row, session.get_one(Adapter, row.adapter_id)) for row in rows]
    return CampaignInfo(
        id=campaign.id,
        line=session.get_one(Line, campaign.line_id).name,
        old=names[campaign.old_id][0],
        new=names[campaign.new_id][0],
        old_ref=names[campaign.old_id][1],
        new_ref=names[campaign.new_id][1],
        state="paused" if campaign.paused_at and campaign.state == CampaignState.RUNNING else campaign.state,
        reason=campaign.reason,
        parallel=campaign.parallel,
        budget_seconds=campaign.budget_seconds,
        spent_seconds=round(_spent(session, campaign), 2),
        deadline=campaign.deadline,
        items=[
            _item_info(session, campaign, row)
            for row, adapter in shown
            if caller.can("read", adapter.namespace)
        ],
        created_by=campaign.created_by,
        created_at=campaign.created_at,
        started_at=campaign.started_at,
        finished_at=campaign.finished_at,
    )


def _item_info(session: Session, campaign: Campaign, item: CampaignItem) -> CampaignItemInfo:
    facts = Facts.model_validate(item.facts)
    final = session.get(Version, item.final_id) if item.final_id else None
    serving = session.get_one(Version, item.serving_id)
    spent = machine.cost(facts)
    current = next((mine.tier for mine in reversed(facts.tiers)), None)
    return CampaignItemInfo(
        adapter=facts.adapter,
        alias=item.alias,
        serving=f"v{serving.number}",
        state=item.state,
        tier=current,
        fit=facts.fit,
        final=f"v{final.number}" if final else None,
        reason=item.reason,
        plan={**machine.plan_line(facts).model_dump(mode="json"), "route": machine.plan_line(facts).route},
        scores=_scores(session, campaign, facts, final),
        cost={
            "tiers": {mine.tier: {"steps": mine.steps, "seconds": round(mine.seconds, 2)} for mine in facts.tiers},
            **spent.model_dump(mode="json"),
            "share": spent.share,
            "reference_seconds": round(facts.reference_seconds, 2),
        },
        verdicts={mine.tier: mine.verdict.model_dump(mode="json") for mine in facts.tiers if mine.verdict},
        report=[quoted.model_dump(mode="json") for quoted in facts.quoted],
        pool=_pool_info(item, facts.pool),
    )


def _pool_info(item: CampaignItem, pool: PoolFacts | None) -> PoolInfo | None:
    if pool is None:
        return None
    return PoolInfo(
        **pool.model_dump(include={"name", "missing", "tier", "n", "differ", "labelled_by"}),
        waits=pool.waits and item.state == State.WAITING,
        verdict=pool.verdict.model_dump(mode="json") if pool.verdict else None,
    )


def _scores(session: Session, campaign: Campaign, facts: Facts, final: Version | None) -> dict[str, Any]:
    if facts.policy is None or not facts.policy.gates:
        return {}
    gate = facts.policy.gates[0]
    suites = _suites(session, facts.policy)
    if not suites:
        return {}
    def mean(base_id: int, digest: str | None) -> float | None:
        row = queries.newest_evaluation(session, base_id=base_id, digest=digest, suite=suites[0].digest)
        return row.summary.get(gate.metric, {}).get("gate", {}).get("mean") if row else None

    return {
        "metric": gate.metric,
        "suite": gate.suite,
        "serving_old": mean(campaign.old_id, facts.serving),
        "bare_old": mean(campaign.old_id, None),
        "bare_new": mean(campaign.new_id, None),
        **{mine.tier: mean(campaign.new_id, mine.version) for mine in facts.tiers if mine.version},
        "final": mean(campaign.new_id, final.digest) if final else None,
    }
