"""What an upgrade would do, and the campaign that it becomes."""

import math
import secrets
from datetime import datetime

from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Session, col, select

from registry.core.campaign import Facts, State
from registry.core.errors import BadRequest, BaseNotFound, CampaignExists, NotASuccessor, ScopeMissing, Unavailable
from registry.core.lifecycle import CampaignState
from registry.core.policy import Policy
from registry.db import queries
from registry.db.models import Adapter, Alias, Base, Campaign, CampaignItem, Line, Revision, Version
from registry.schemas import UpgradeRequest

from .. import audit, bases, ledger, policies
from ..references import nearest
from ..tokens import EVERYWHERE, Caller
from . import access, actors, moves, reading


def plan(
    session: Session, caller: Caller, request: UpgradeRequest, now: datetime
) -> tuple[Campaign, list[CampaignItem]]:
    """What an upgrade would do, as rows that nobody has stored."""
    for namespace in request.namespaces or ():
        for scope in actors.NEEDED:
            caller.require(scope, namespace)
    if not all(caller.can_somewhere(scope) for scope in actors.NEEDED):
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
        if not all(caller.can(scope, adapter.namespace) for scope in actors.NEEDED):
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
        facts = reading.facts_of(session, actors.on_behalf(caller, campaign, adapter), campaign, item, None)
    except (SQLAlchemyError, Unavailable):
        raise
    except Exception as error:  # noqa: BLE001  # its manifest and policy are people's words: any may be wrong
        item.state, item.reason = State.FAILED, f"it cannot be planned: {access.told(error)}"
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
            unplanned = access.look(item)
            ledger.note_step(
                session, campaign, item, unplanned.model_copy(update={"state": State.PLANNED}), unplanned, now
            )
    return campaign


def _active(session: Session, line_id: int) -> Campaign | None:
    states = (CampaignState.PLANNED, CampaignState.RUNNING)
    return session.exec(select(Campaign).where(Campaign.line_id == line_id, col(Campaign.state).in_(states))).first()


def _makes_room(session: Session, active: Campaign, wanted: Campaign, now: datetime) -> bool:
    active = access.row(session, active.id)
    if active.state != CampaignState.PLANNED:
        return False
    newer = reading.superseded_by(session, active)
    why = f"the line moved on to {newer}" if newer else f"planned again as {wanted.id}"
    moves.end(session, active, f"superseded: {why}, and nobody had started it", now)
    session.flush()
    return True


def _exists(session: Session, campaign: Campaign) -> CampaignExists:
    line, new = session.get_one(Line, campaign.line_id), session.get_one(Base, campaign.new_id)
    return CampaignExists(line=line.name, id=campaign.id, base=new.digest[:15])
