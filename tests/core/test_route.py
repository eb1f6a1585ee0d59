from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.recipes import TIERS, Tier
from registry.core.route import Outcome, Signals, Thresholds, refitted, regret, route

ALL: tuple[Tier, ...] = ("carry", "align", "warm-start", "retrain")
SHARES = st.none() | st.floats(0, 2)
SIGNALS = st.builds(
    Signals, lineage=st.sampled_from(["same", "cast", "merged", "continued", "unknown"]), drift=SHARES, most=SHARES,
    cosine=st.none() | st.floats(-1, 1), alpha=SHARES,
)  # fmt: skip


@given(SIGNALS, st.lists(st.sampled_from(ALL), unique=True, min_size=1))
def test_a_route_keeps_the_policys_order_and_accounts_for_every_tier(signals: Signals, tiers: list[Tier]) -> None:
    found = route(signals, tiers)
    left_out = [tier for tier, _ in found.skipped]
    assert list(found.tiers) == [tier for tier in tiers if tier not in left_out]
    assert sorted([*found.tiers, *left_out]) == sorted(tiers)
    assert found.start == found.tiers[0]
    assert all(found.reasons)
    assert all(why for _, why in found.skipped)


@given(st.floats(0, 2), st.floats(0, 2))
def test_what_is_carried_at_some_drift_is_carried_at_less(one: float, other: float) -> None:
    less, more = sorted((one, other))
    if route(Signals(drift=more), ALL).start == "carry":
        assert route(Signals(drift=less), ALL).start == "carry"


@pytest.mark.parametrize(
    ("signals", "start"),
    [
        ({"drift": 0.02}, "carry"),
        ({"drift": 0.10}, "carry"),
        ({"drift": 0.31, "most": 0.4}, "warm-start"),
        ({"drift": 1.41, "most": 1.42}, "align"),
        ({"drift": 0.31, "most": 1.41}, "align"),  # some modules lie in other coordinates
        ({"drift": 0.31, "most": 0.4, "cosine": 0.97}, "carry"),
        ({"drift": 0.05, "most": 0.4, "cosine": 0.2}, "warm-start"),
        ({"drift": 0.31, "most": 0.4, "cosine": 0.8, "alpha": 0.75}, "carry"),
        ({"drift": 0.05, "most": 0.4, "cosine": 0.8, "alpha": 0.25}, "warm-start"),
        ({"drift": 0.05, "most": 0.4, "cosine": 0.97, "alpha": 0.25}, "carry"),
        ({"lineage": "cast", "drift": 0.31}, "carry"),
        ({}, "carry"),  # nothing is known: cheapest first
    ],
)
def test_the_signals_choose_where_to_begin(signals: dict[str, Any], start: str) -> None:
    assert route(Signals(**signals), ALL).start == start


def test_a_policy_restricts_the_route_and_is_never_left_without_a_tier() -> None:
    assert route(Signals(drift=1.41, most=1.41), TIERS).tiers == ("warm-start", "retrain")
    only = route(Signals(drift=1.41, most=1.41), ("carry",))
    assert only.tiers == ("carry",)
    assert "the last tier that the policy names" in only.reasons[-1]
    assert route(Signals(), ()).start is None


def test_thresholds_move_the_route() -> None:
    assert route(Signals(drift=0.31, most=0.31), ALL, Thresholds(carry=0.4)).start == "carry"


def upgrade(drift: float, *passed: Tier) -> Outcome:
    seconds: dict[Tier, float] = {"carry": 1.0, "warm-start": 5.0, "retrain": 100.0}
    return Outcome(
        signals=Signals(drift=drift, most=drift), seconds=seconds, passed=frozenset(passed), retrain_seconds=100.0
    )


def test_regret_is_what_is_spent_beyond_the_cheapest_tier_that_passes() -> None:
    limits = Thresholds(carry=0.1)
    assert regret(upgrade(0.05, "carry", "retrain"), TIERS, limits) == 0.0
    assert regret(upgrade(0.05, "warm-start"), TIERS, limits) == pytest.approx(0.01)
    assert regret(upgrade(0.5, "carry", "warm-start"), TIERS, limits) == pytest.approx(0.04)
    assert regret(upgrade(0.5, "carry"), TIERS, limits) == pytest.approx(2.05)  # it trains for nothing, and misses it
    assert regret(upgrade(0.05), TIERS, limits) == pytest.approx(1.06)  # nothing passes, all is tried


def test_refitted_thresholds_find_where_the_ledger_turns() -> None:
    ledger = [upgrade(drift, "carry") for drift in (0.05, 0.2, 0.3)]
    ledger += [upgrade(drift, "warm-start") for drift in (0.4, 0.6)]
    found = refitted(ledger, TIERS)
    assert found.thresholds.carry == pytest.approx(0.35)
    assert (found.after, found.outcomes) == (0.0, 5)
    assert found.before > 0.4
    assert refitted(ledger, TIERS, found.thresholds).thresholds == found.thresholds


@given(st.lists(st.builds(upgrade, st.floats(0, 2), st.sampled_from(TIERS)), max_size=8))
def test_refitting_never_makes_it_worse_and_stays_where_nothing_is_gained(ledger: list[Outcome]) -> None:
    found = refitted(ledger, TIERS)
    assert found.after <= found.before
    if found.before == found.after:
        assert found.thresholds == Thresholds()
