"""Routes of upgrade campaigns: plan, create, start, abort, approve, look."""

from typing import Annotated

from fastapi import APIRouter, Body

from registry.schemas import ApproveRequest, CampaignInfo, Page, UpgradeRequest
from registry.services import campaigns

from .deps import Parts, User
from .pages import Limit

router = APIRouter(prefix="/v1/upgrades", tags=["upgrades"])


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


@router.get("/{identity}")
def show_upgrade(identity: str, parts: Parts, caller: User) -> CampaignInfo:
    """A campaign with every adapter's state, scores, cost and verdicts."""
    with parts.database.read() as session:
        return campaigns.info(session, caller, campaigns.get(session, caller, identity))


@router.post("/{identity}/start")
def start_upgrade(identity: str, parts: Parts, caller: User) -> CampaignInfo:
    """Let it run."""
    with parts.database.write() as session:
        campaign = campaigns.start(session, caller, identity, parts.clock())
        info = campaigns.info(session, caller, campaign)
    parts.broker.wake(campaign.queue)
    return info


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
