"""The ledger of upgrades: each decision as it is made, with what it rested on; written once, never changed.

Of a campaign    started · paused · resumed · aborted · finished
Of an adapter    route        what may be tried, in which order, and the signals that say so
                 replanned    another version serves: what was compared with the old one is forgotten
                 verdict      a tier's candidate before the gate: intervals, steps, device seconds
                 lost         a tier's job failed, or the pool's answers: why
             asked        the pool was answered: how many of how many differ, and the file to be labelled
             labelled     by whom, and how
             pool         the candidate before the gate on the pool
                 approved, declined
                 outcome      how it ended, what it cost, and its score on the split that nothing was chosen by
                 rolled-back  a promotion taken back

What an adapter's step decided is the difference between two looks at its item, so a step that is repeated after a crash
writes nothing twice. Expected costs (`registry.services.ledger`) and the thresholds of routing are read from here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from .campaign import Item, PoolFacts, State, TierFacts, cost, routed, tier_alphas
from .gate import Zone
from .manifest import Frozen
from .recipes import Tier
from .route import Outcome, Signals

Kind = Literal[
    "started", "paused", "resumed", "aborted", "finished", "route", "replanned", "verdict", "lost", "asked", "labelled",
    "pool", "approved", "declined", "outcome", "rolled-back",
]  # fmt: skip


class Entry(Frozen):
    """One decision."""

    kind: Kind
    tier: Tier | None = None
    data: dict[str, Any] = Field(default_factory=dict)


def decided(before: Item, after: Item) -> list[Entry]:
    """What was decided about one adapter between two looks at it, in order."""
    entries = []
    if before.facts.serving != after.facts.serving:
        entries.append(Entry(kind="replanned", data={"from": before.facts.serving, "to": after.facts.serving}))
    if before.state is State.PLANNED and after.state not in (State.PLANNED, State.ABORTED):
        entries.append(Entry(kind="route", data=_route(after)))
    for mine in after.facts.tiers:
        was = before.facts.tier(mine.tier)
        if mine.verdict and mine.verdict != was.verdict:
            entries.append(Entry(kind="verdict", tier=mine.tier, data=_tried(mine, after)))
        elif (mine.produce.lost or mine.evaluate.lost) and not (was.produce.lost or was.evaluate.lost):
            entries.append(Entry(kind="lost", tier=mine.tier, data=_tried(mine, after)))
    entries += _of_pool(before.facts.pool, after)
    if after.state.final and not before.state.final:
        entries.append(Entry(kind="outcome", data=outcome(after)))
    return entries


def outcomes(rows: Iterable[Mapping[str, Any]]) -> list[Outcome]:
    """What routing can be refitted from (`registry.core.route.refitted`): one per adapter of a campaign that ended.

    ``rows`` are the ledger's, in order, as ``loractl upgrade ledger --json`` gives them. An adapter of which nothing
    was tried, or of which nobody knows what a training takes, says nothing and is left out.
    """
    of: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["adapter"] is not None:
            of.setdefault((row["campaign"], row["adapter"], row["alias"]), []).append(row)
    return [found for decisions in of.values() if (found := _outcome_of(decisions))]


def _outcome_of(decisions: list[Mapping[str, Any]]) -> Outcome | None:
    signals, retraining = None, None
    tried: dict[Tier, Mapping[str, Any]] = {}
    for row in decisions:
        match row["kind"]:
            case "replanned":
                tried = {}
            case "route":
                signals = Signals.model_validate(row["data"]["signals"])
            case "verdict":
                tried[row["tier"]] = row["data"]
            case "pool" if row["tier"] in tried:
                mine, seconds = tried[row["tier"]], row["data"]["seconds"]
                tried[row["tier"]] = {**mine, "verdict": row["data"]["verdict"], "seconds": mine["seconds"] + seconds}
            case "outcome":
                retraining = row["data"]["cost"]["retrain_seconds"]
    if signals is None or not tried or not retraining:
        return None
    return Outcome(
        signals=signals,
        seconds={tier: data["seconds"] for tier, data in tried.items()},
        passed=frozenset(tier for tier, data in tried.items() if data["verdict"]["zone"] == Zone.PASS),
        retrain_seconds=retraining,
    )


def outcome(item: Item) -> dict[str, Any]:
    """How an adapter ended."""
    spent = cost(item.facts)
    return {
        "state": str(item.state),
        "reason": item.reason,
        "cost": spent.model_dump(mode="json"),
        "report": [quoted.model_dump(mode="json") for quoted in item.facts.quoted],
    }


def _route(item: Item) -> dict[str, Any]:
    facts, way = item.facts, routed(item.facts)
    return {
        "old": facts.old,
        "new": facts.new,
        "serving": facts.serving,
        "source": facts.source or facts.serving,
        "fit": facts.fit,
        "why": facts.fit_reason,
        "signals": facts.signals.model_dump(mode="json", exclude_none=True),
        "tiers": list(way.tiers),
        "because": list(way.reasons),
        "skipped": dict(way.skipped),
        "alpha": tier_alphas(facts),
        "suites": {suite.suite: suite.gate_n for suite in facts.suites},
    }


def _of_pool(was: PoolFacts | None, after: Item) -> list[Entry]:
    pool, was = after.facts.pool, was or PoolFacts(name="")
    if pool is None or pool.tier is None:
        return []
    data = {
        "pool": pool.name, "data": pool.data, "version": pool.version, "n": pool.n, "differ": pool.differ,
        "seconds": round(pool.seconds, 3),
    }  # fmt: skip
    entries = []
    if pool.paper and pool.paper != was.paper:
        entries.append(Entry(kind="asked", tier=pool.tier, data=data | {"paper": pool.paper}))
    if pool.verdict and pool.verdict != was.verdict:
        told = {"labels": pool.labels, "by": pool.labelled_by, "verdict": pool.verdict.model_dump(mode="json")}
        entries.append(Entry(kind="pool", tier=pool.tier, data=data | told))
    if pool.lost and not was.lost:
        entries.append(Entry(kind="lost", tier=pool.tier, data=data | {"error": f"the pool: {pool.lost}"}))
    return entries


def _tried(mine: TierFacts, item: Item) -> dict[str, Any]:
    return {
        "base": item.facts.new,
        "shape": item.facts.shape,
        "version": mine.version,
        "label": mine.label,
        "steps": mine.steps,
        "seconds": round(mine.seconds, 3),
        "told": mine.told,
        "verdict": mine.verdict.model_dump(mode="json") if mine.verdict else None,
        "error": mine.produce.error or mine.evaluate.error,
    }
