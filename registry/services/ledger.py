"""The ledger of campaigns: written in each decision's own transaction; people, plans and who refits routing read it."""

from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Any, get_args

from sqlmodel import Session, col, func, select

from registry.core.campaign import Expected, Item
from registry.core.ledger import Entry, Kind, decided
from registry.core.names import SeriesName
from registry.core.recipes import Tier
from registry.db.models import Adapter, Campaign, CampaignItem, Decision, Line, Token
from registry.schemas import DecisionInfo

from . import audit
from .tokens import Caller

_REMEMBERED = 500
_LOOKED_AT = 50_000
"""Rows of the ledger that a plan looks through for an adapter's shape: however long the ledger, a plan stays quick."""


def note(
    session: Session,
    campaign: Campaign,
    kind: Kind,
    now: datetime,
    *,
    by: Caller | None = None,
    item: CampaignItem | None = None,
    **data: Any,
) -> None:
    """Write one decision down."""
    _write(session, campaign, item, Entry(kind=kind, data=data), now, by)


def note_step(
    session: Session,
    campaign: Campaign,
    item: CampaignItem,
    before: Item,
    after: Item,
    now: datetime,
    *,
    by: Caller | None = None,
) -> None:
    """Write down what was decided about an adapter between two looks at it."""
    for entry in decided(before, after):
        _write(session, campaign, item, entry, now, by)


def _write(
    session: Session, campaign: Campaign, item: CampaignItem | None, entry: Entry, now: datetime, by: Caller | None
) -> None:
    session.add(
        Decision(
            campaign_id=campaign.id,
            adapter_id=item.adapter_id if item else None,
            alias=item.alias if item else None,
            kind=entry.kind,
            tier=entry.tier,
            data=entry.data,
            actor=by.token_id if by else None,
            at=now,
        )
    )
    adapter = session.get_one(Adapter, item.adapter_id) if item else None
    audit.record(
        session,
        f"upgrade.{entry.kind}",
        campaign.id,
        actor=by.token_id if by else audit.ITSELF,
        namespace=adapter.namespace if adapter else None,
        now=now,
        after={
            "adapter": f"{adapter.namespace}/{adapter.name}:{item.alias}" if adapter and item else None,
            "state": item.state if item else campaign.state,
            "tier": entry.tier,
            **entry.data,
        },
    )


def expected(session: Session, shape: str) -> tuple[Expected, ...]:
    """What tiers took for adapters of this shape: medians over its newest verdicts."""
    newest = select(func.max(Decision.id)).scalar_subquery()
    query = select(Decision.tier, Decision.data).where(Decision.kind == "verdict")
    query = query.where(col(Decision.id) > newest - _LOOKED_AT)
    query = query.where(col(Decision.data)["shape"].as_string() == shape).order_by(col(Decision.id).desc())
    took: dict[str | None, list[tuple[float, float]]] = {}
    for tier, data in session.exec(query.limit(_REMEMBERED)):
        took.setdefault(tier, []).append((data["steps"], data["seconds"]))
    return tuple(
        Expected(tier=tier, steps=median(s for s, _ in all_), seconds=median(s for _, s in all_), seen=len(all_))
        for tier in get_args(Tier)
        if (all_ := took.get(tier))
    )


def page(
    session: Session,
    caller: Caller,
    *,
    campaign: str | None,
    line: str | None,
    adapter: str | None,
    after: int,
    limit: int,
) -> Sequence[DecisionInfo]:
    """Decisions in the order they were made, of the adapters that the caller may read and the campaigns they are in."""
    query = (
        select(Decision, Adapter.namespace, Adapter.name, Token.name)
        .join(Adapter, col(Adapter.id) == Decision.adapter_id, isouter=True)
        .join(Token, col(Token.id) == Decision.actor, isouter=True)
        .where(col(Decision.id) > after)
    )
    namespaces = caller.readable()
    if namespaces is not None:
        seen = select(CampaignItem.campaign_id).join(Adapter).where(col(Adapter.namespace).in_(namespaces))
        query = query.where(col(Decision.campaign_id).in_(seen))
        query = query.where(col(Decision.adapter_id).is_(None) | col(Adapter.namespace).in_(namespaces))
    if campaign is not None:
        query = query.where(Decision.campaign_id == campaign)
    if line is not None:
        query = query.where(col(Decision.campaign_id).in_(select(Campaign.id).join(Line).where(Line.name == line)))
    if adapter is not None:
        series = SeriesName.parse(adapter)
        query = query.where(Adapter.namespace == series.namespace, Adapter.name == series.name)
    return [
        DecisionInfo(
            id=row.id or 0,
            campaign=row.campaign_id,
            adapter=f"{namespace}/{name}" if name else None,
            alias=row.alias,
            kind=row.kind,
            tier=row.tier,
            data=row.data,
            actor=actor or row.actor,
            at=row.at,
        )
        for row, namespace, name, actor in session.exec(query.order_by(col(Decision.id)).limit(limit)).all()
    ]
