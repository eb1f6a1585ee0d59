"""Routes of upgrade campaigns: plan, create, start, pause, resume, abort, approve, label, roll back; their ledger."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Body, Query

from registry.schemas import (
    ApproveRequest,
    CampaignInfo,
    DecisionInfo,
    DisagreementsInfo,
    LabelsRequest,
    Page,
    PauseRequest,
    UndoRequest,
    UpgradeRequest,
)
from registry.services import campaigns, ledger

from .deps import Asked, Parts, User
from .pages import Limit, behind, cursor

router = APIRouter(prefix="/v1/upgrades", tags=["upgrades"])
log = structlog.get_logger()


@router.post("/plan")
def plan_upgrade(request: UpgradeRequest, parts: Parts, caller: User) -> CampaignInfo:
    """What an upgrade would do, adapter by adapter; nothing is stored and nothing runs."""
    with parts.database.read() as session:
        campaign, items = campaigns.plan(session, caller, request, parts.clock())
        return campaigns.info(session, caller, campaign, items)


@router.post("", status_code=201)
def create_upgrade(request: UpgradeRequest, parts: Parts, caller: User) -> CampaignInfo:
    """Store the plan as a campaign that waits for its start."""
    with parts.database.write() as session:
        return campaigns.info(session, caller, campaigns.create(session, caller, request, parts.clock()))


@router.get("")
def list_upgrades(parts: Parts, caller: User, line: str | None = None, limit: Limit = 20) -> Page[CampaignInfo]:
    """Campaigns, newest first."""
    with parts.database.read() as session:
        rows = campaigns.newest(session, caller, line=line, limit=limit)
        return Page(items=[campaigns.info(session, caller, row) for row in rows])


@router.get("/ledger")
def list_decisions(
    parts: Parts,
    caller: User,
    campaign: str | None = None,
    line: str | None = None,
    adapter: str | None = None,
    limit: Limit = 200,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[DecisionInfo]:
    """The ledger: every decision of campaigns, in the order in which they were made."""
    (start,) = behind(after, (0,))
    with parts.database.read() as session:
        rows = ledger.page(
            session, caller, campaign=campaign, line=line, adapter=adapter, after=start, limit=limit
        )
        return Page(items=rows, cursor=cursor(rows[-1].id) if len(rows) == limit else None)


@router.get("/{identity}")
def show_upgrade(identity: str, parts: Parts, caller: User) -> CampaignInfo:
    """A campaign with every adapter's state, scores, cost and verdicts."""
    with parts.database.read() as session:
        return campaigns.info(session, caller, campaigns.get(session, caller, identity))


@router.post("/{identity}/start")
def start_upgrade(identity: str, parts: Parts, caller: User, asked: Asked) -> CampaignInfo:
    """Let it run."""
    with parts.database.write() as session:
        campaign = campaigns.start(session, caller, identity, parts.clock(), origin=asked)
        info = campaigns.info(session, caller, campaign)
    log.info("campaign-started", campaign=campaign.id, origin=campaign.origin)
    parts.broker.wake(campaign.queue)
    return info


@router.post("/{identity}/pause")
def pause_upgrade(identity: str, request: PauseRequest, parts: Parts, caller: User) -> CampaignInfo:
    """Let nothing further begin; with ``running`` also stop the jobs that run, to go on from their checkpoints."""
    with parts.database.write() as session:
        campaign = campaigns.pause(session, caller, identity, parts.clock(), running=request.running)
        return campaigns.info(session, caller, campaign)


@router.post("/{identity}/resume")
def resume_upgrade(identity: str, parts: Parts, caller: User) -> CampaignInfo:
    """Go on with a paused campaign."""
    with parts.database.write() as session:
        campaign, queues = campaigns.resume(session, caller, identity, parts.clock())
        info = campaigns.info(session, caller, campaign)
    for queue in queues:
        parts.broker.wake(queue)
    return info


@router.post("/{identity}/rollback")
def roll_back_upgrade(identity: str, request: UndoRequest, parts: Parts, caller: User) -> CampaignInfo:
    """Take promotions back: one adapter's, or all of the campaign."""
    with parts.database.write() as session:
        campaign = campaigns.roll_back(session, caller, identity, parts.clock(), **request.model_dump())
        return campaigns.info(session, caller, campaign)


@router.post("/{identity}/abort")
def abort_upgrade(
    identity: str, parts: Parts, caller: User, reason: Annotated[str, Body(embed=True, max_length=2000)] = ""
) -> CampaignInfo:
    """End it: what was promoted stays, everything else is left as it was."""
    with parts.database.write() as session:
        return campaigns.info(session, caller, campaigns.abort(session, caller, identity, reason, parts.clock()))


@router.post("/{identity}/approve")
def approve(identity: str, request: ApproveRequest, parts: Parts, caller: User) -> CampaignInfo:
    """Say yes or no to an adapter whose policy asks."""
    with parts.database.write() as session:
        campaign = campaigns.approve(
            session,
            caller,
            identity,
            request.adapter,
            request.alias,
            parts.clock(),
            approved=request.approved,
        )
        return campaigns.info(session, caller, campaign)


@router.get("/{identity}/disagreements")
def show_disagreements(
    identity: str, adapter: str, parts: Parts, caller: User, alias: str = "prod"
) -> DisagreementsInfo:
    """The pool's inputs on which an adapter's candidate and what serves differ, as a file to be labelled."""
    with parts.database.read() as session:
        return campaigns.disagreements(session, parts.store, caller, identity, adapter, alias)


@router.post("/{identity}/labels")
def label(identity: str, request: LabelsRequest, parts: Parts, caller: User) -> CampaignInfo:
    """Take the labels of all these inputs; the same ones again change nothing."""
    with parts.database.write() as session:
        campaign = campaigns.label(session, parts.store, caller, identity, request, parts.clock())
        return campaigns.info(session, caller, campaign)
