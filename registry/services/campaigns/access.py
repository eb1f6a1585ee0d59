"""Campaigns and their items as rows: who may see them, and how they are held while something changes."""

from collections.abc import Sequence

from sqlalchemy import or_
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from registry.core import campaign as machine
from registry.core.campaign import Facts, State
from registry.core.errors import BadRequest, CampaignNotFound, LoractlError
from registry.core.lifecycle import JobState
from registry.core.names import SeriesName
from registry.db import queries
from registry.db.models import Adapter, Campaign, CampaignItem, Line

from ..tokens import EVERYWHERE, Caller

ACTIVE = (JobState.QUEUED, JobState.RUNNING)


def told(error: Exception) -> str:
    """What broke, for the reason of an item."""
    return error.message if isinstance(error, LoractlError) else f"{type(error).__name__}: {error}"[:500]


def look(item: CampaignItem) -> machine.Item:
    """The item as the machine knows it."""
    return machine.Item(state=State(item.state), reason=item.reason, facts=Facts.model_validate(item.facts))


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


def named_item(
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


def locked(session: Session, caller: Caller, identity: str) -> Campaign:
    """The campaign, held, for who began it or may promote all of its adapters; `CampaignNotFound`, `ScopeMissing`."""
    get(session, caller, identity)
    campaign = row(session, identity)
    if campaign.created_by != caller.token_id:
        query_ = select(Adapter.namespace).join(CampaignItem).where(CampaignItem.campaign_id == identity)
        for namespace in sorted(set(session.exec(query_))) or [EVERYWHERE]:
            caller.require("promote", namespace)
    return campaign


def row(session: Session, identity: str) -> Campaign:
    """The campaign as it is now, held until the end of the transaction."""
    query = select(Campaign).where(Campaign.id == identity).with_for_update()
    return session.exec(query.execution_options(populate_existing=True)).one()


def items_of(session: Session, campaign: Campaign, *, lock: bool = False) -> Sequence[CampaignItem]:
    """Its items, in the order in which they were planned."""
    query = select(CampaignItem).where(CampaignItem.campaign_id == campaign.id).order_by(col(CampaignItem.id))
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return session.exec(query).all()
