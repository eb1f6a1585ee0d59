"""The ledger's entries: the difference between two looks at an adapter, so that nothing is written twice."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.campaign import Facts, Item, Progress, State, TierFacts
from registry.core.gate import Criterion, Verdict, Zone
from registry.core.ledger import decided, outcomes
from registry.core.lifecycle import JobState
from registry.core.policy import Gate, Margin, Policy
from registry.core.recipes import TIERS
from registry.core.route import refitted

SERVING, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
POLICY = Policy(gates=(Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.01)),))
FACTS = Facts(
    adapter="team/bot", old="b3:" + "1" * 64, new="b3:" + "2" * 64, serving=SERVING, serving_now=SERVING, policy=POLICY
)
ZERO = Criterion(
    name="not-worse", suite="team/suite", metric="accuracy", estimate=0, lower=-0.1, upper=0.1, bound=-0.01,
    zone=Zone.UNRESOLVED, n=100,
)  # fmt: skip


def judged(zone: Zone) -> TierFacts:
    verdict = Verdict(zone=zone, criteria=(ZERO,), reason="because", alpha=0.01)
    return TierFacts(tier="carry", produce=Progress(job=JobState.SUCCEEDED), verdict=verdict, steps=3, seconds=1.5)


def look(state: State, *tiers: TierFacts, **changes: object) -> Item:
    return Item(state=state, reason="why", facts=FACTS.model_copy(update={"tiers": tiers, **changes}))


PATH = [
    look(State.PLANNED),
    look(State.RUNNING),
    look(State.RUNNING, TierFacts(tier="carry", produce=Progress(job=JobState.RUNNING))),
    look(State.RUNNING, judged(Zone.UNRESOLVED)),
    look(State.RUNNING, judged(Zone.PASS)),
    look(State.PROMOTED, judged(Zone.PASS)),
]


def kinds(path: list[Item]) -> list[str]:
    return [entry.kind for before, after in pairwise(path) for entry in decided(before, after)]


@given(st.lists(st.integers(0, 4), max_size=4))
def test_a_step_that_is_taken_again_writes_nothing_again(again: list[int]) -> None:
    path = list(PATH)
    for place in sorted(again, reverse=True):
        path.insert(place, path[place])
    assert kinds(path) == kinds(PATH) == ["route", "verdict", "verdict", "outcome"]


def test_steps_taken_in_one_go_write_what_they_came_to() -> None:
    assert kinds([PATH[0], PATH[-1]]) == ["route", "verdict", "outcome"]


@pytest.mark.parametrize("lost", ["produce", "evaluate"])
def test_a_lost_tier_says_why(lost: str) -> None:
    failed = TierFacts.model_validate({"tier": "carry", lost: Progress(job=JobState.FAILED, error="no memory")})
    [entry] = decided(PATH[1], look(State.RUNNING, failed))
    assert (entry.kind, entry.tier, entry.data["error"]) == ("lost", "carry", "no memory")


def test_a_version_that_serves_instead_is_written_down() -> None:
    assert kinds([PATH[3], look(State.RUNNING, serving=OTHER)]) == ["replanned"]


def rows(campaign: str, drift: float, *, passed: bool) -> list[dict[str, Any]]:
    """A ledger's rows of one adapter whose carry passed, or failed and was retrained."""
    of: dict[str, Any] = {"campaign": campaign, "adapter": "team/bot", "alias": "prod", "tier": None}
    carry = {"seconds": 3.0, "verdict": {"zone": "pass" if passed else "fail"}}
    found: list[dict[str, Any]] = [
        {"campaign": campaign, "adapter": None, "alias": None, "kind": "started", "tier": None, "data": {}},
        of | {"kind": "route", "data": {"signals": {"lineage": "continued", "drift": drift}}},
        of | {"kind": "verdict", "tier": "carry", "data": carry},
    ]
    if not passed:
        retrained = {"seconds": 60.0, "verdict": {"zone": "pass"}}
        found.append(of | {"kind": "verdict", "tier": "retrain", "data": retrained})
    return [*found, of | {"kind": "outcome", "data": {"cost": {"retrain_seconds": 60.0}}}]


def test_thresholds_are_refitted_from_what_a_ledger_says() -> None:
    """At a drift of 0.02 the carry does, at 0.08 it is tried in vain: a threshold between them saves its cost."""
    ledger = [*rows("c1", 0.02, passed=True), *rows("c2", 0.08, passed=False)]
    found = refitted(outcomes(ledger), TIERS)
    assert found.thresholds.carry == pytest.approx(0.05)
    assert found.before == pytest.approx(3 / 60 / 2)
    assert found.after == 0


def test_what_says_nothing_of_routing_is_left_out() -> None:
    unknown = rows("c1", 0.02, passed=True)
    unknown[-1]["data"] = {"cost": {"retrain_seconds": None}}
    assert outcomes(unknown) == []
    assert outcomes(rows("c1", 0.02, passed=True)[:2]) == []
    anew = rows("c1", 0.02, passed=False)
    replanned = {**anew[1], "kind": "replanned", "data": {}}
    [found] = outcomes([*anew[:-1], replanned, *anew[1:3], anew[-1]])
    assert set(found.seconds) == {"carry"}, "what was tried for the version before says nothing of this one"
