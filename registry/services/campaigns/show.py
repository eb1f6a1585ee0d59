"""A campaign in the words of the wire."""

from collections.abc import Sequence
from typing import Any

from sqlmodel import Session

from registry.core import campaign as machine
from registry.core.campaign import Facts, PoolFacts, State
from registry.core.lifecycle import CampaignState
from registry.db import queries
from registry.db.models import Adapter, Campaign, CampaignItem, Line, Version
from registry.schemas import CampaignInfo, CampaignItemInfo, PoolInfo

from .. import bases
from ..tokens import Caller
from . import access, reading


def info(
    session: Session, caller: Caller, campaign: Campaign, items: Sequence[CampaignItem] | None = None
) -> CampaignInfo:
    """A campaign in the words of the wire; items of namespaces that the caller may not read are left out."""
    names = bases.named(session, [campaign.old_id, campaign.new_id])
    rows = access.items_of(session, campaign) if items is None else items
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
        spent_seconds=round(reading.spent_by(session, campaign), 2),
        deadline=campaign.deadline,
        items=[_item_info(session, campaign, row) for row, adapter in shown if caller.can("read", adapter.namespace)],
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
    suites = reading.suites_of(session, facts.policy)
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
