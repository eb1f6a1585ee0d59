"""What a person does with a campaign: start, pause, resume, abort, approve, roll back."""

from datetime import datetime

from sqlmodel import Session, col, select

from registry.core.campaign import Facts, State
from registry.core.errors import MoveNotAllowed
from registry.core.lifecycle import CAMPAIGN, CampaignState
from registry.db.models import Adapter, Base, Campaign, CampaignItem, Job

from .. import aliases, jobs, ledger
from ..tokens import Caller
from . import access, measures

_TAKEN_BACK = "rolled back"


def start(
    session: Session, caller: Caller, identity: str, now: datetime, *, origin: jobs.Origin = jobs.UNKNOWN
) -> Campaign:
    """Let it run; starting a running one again is fine. ``origin``: what its jobs will say that they come from."""
    campaign = access.locked(session, caller, identity)
    if campaign.state == CampaignState.RUNNING:
        return campaign
    campaign.state = CAMPAIGN.after("start", campaign.state, identity)
    campaign.started_at = now
    campaign.origin, campaign.traceparent = origin.id, origin.traceparent
    session.add(campaign)
    ledger.note(session, campaign, "started", now, by=caller)
    measures.measure(session, campaign, now)
    return campaign


def pause(session: Session, caller: Caller, identity: str, now: datetime, *, running: bool = False) -> Campaign:
    """Let nothing further begin: no step is taken, queued jobs wait. Jobs that run go on to their end.

    With ``running`` they too are stopped, and go on from their checkpoints when it is resumed. Pausing again is fine.
    """
    campaign = access.locked(session, caller, identity)
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
    campaign = access.locked(session, caller, identity)
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
        campaign = access.locked(session, caller, identity)
        if campaign.state in (CampaignState.PLANNED, CampaignState.RUNNING):
            end(session, campaign, reason or "rolled back", now, told=f"ended by hand: {reason or 'rolled back'}")
            ledger.note(session, campaign, "aborted", now, by=caller, reason=reason or "rolled back")
        items = [item for item in access.items_of(session, campaign, lock=True) if item.state == State.PROMOTED]
    else:
        campaign = access.get(session, caller, identity)
        items = [access.named_item(session, caller, identity, adapter, alias)]
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
    campaign = access.locked(session, caller, identity)
    if campaign.state == CampaignState.ABORTED:
        return campaign
    end(session, campaign, reason or "by hand", now, told=f"ended by hand: {reason or 'by hand'}")
    ledger.note(session, campaign, "aborted", now, by=caller, reason=campaign.reason)
    return campaign


def end(session: Session, campaign: Campaign, reason: str, now: datetime, *, told: str | None = None) -> None:
    """Abort it: what is not final is aborted for ``reason`` (its items say ``told``), and its jobs are withdrawn."""
    campaign.state = CAMPAIGN.after("abort", campaign.state, campaign.id)
    campaign.finished_at, campaign.reason = now, reason
    for item in access.items_of(session, campaign, lock=True):
        if not State(item.state).final:
            before = access.look(item)
            item.state, item.reason, item.changed_at = State.ABORTED, told or reason, now
            item.revision += 1
            session.add(item)
            ledger.note_step(session, campaign, item, before, access.look(item), now)
    query = select(Job.id).where(Job.campaign_id == campaign.id, col(Job.state).in_(access.ACTIVE))
    for job in session.exec(query.order_by(col(Job.id))).all():
        jobs.withdraw(session, campaign.id, job, now)
    session.add(campaign)


def approve(
    session: Session, caller: Caller, identity: str, adapter: str, alias: str, now: datetime, *, approved: bool = True
) -> Campaign:
    """Say yes or no to an adapter whose policy asks."""
    campaign = access.get(session, caller, identity)
    item = access.named_item(session, caller, identity, adapter, alias)
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
