"""In whose name a campaign acts: its creator's, with the rights that are left by now, and no others."""

from dataclasses import replace
from datetime import datetime

from sqlmodel import Session

from registry.db.models import Adapter, Campaign
from registry.schemas import Scope

from .. import jobs
from ..tokens import Caller, acting

NEEDED: tuple[Scope, ...] = ("run", "promote")
"""What a campaign does in a namespace in its creator's name."""


def actor_of(session: Session, campaign: Campaign, adapter: Adapter, now: datetime) -> Caller:
    """The campaign's creator with the rights that are left by now; `TokenRefused`, `ScopeMissing`."""
    creator = acting(session, campaign.created_by, now)
    for scope in NEEDED:
        creator.require(scope, adapter.namespace)
    return on_behalf(creator, campaign, adapter)


def on_behalf(creator: Caller, campaign: Campaign, adapter: Adapter) -> Caller:
    """The campaign on one adapter: who may run and promote there, may have candidates made of it, and nothing else."""
    own = sorted({*creator.scopes.get(adapter.namespace, ()), "read", "publish"})
    return replace(creator, name=f"campaign {campaign.id}", scopes={**creator.scopes, adapter.namespace: own})


def origin_of(campaign: Campaign) -> jobs.Origin:
    """What its jobs say that they come from."""
    return jobs.Origin(campaign.origin, campaign.traceparent)
