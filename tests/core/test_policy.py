"""Policies: how they print, what they refuse, and the order of evidence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from registry.core.metrics import NAMED
from registry.core.policy import Evidence, Gate, Margin, Policy, loosened, variants_pay
from registry.core.recipes import TIERS

METRICS = st.sampled_from([*NAMED, "custom:sql", "custom-binary:runs", "lm-eval:exact_match,strict-match"])
GATE = Gate(suite="team/suite@v2", metric="likelihood", margin=Margin(value=0.02, of_gain=True))
FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
POLICIES = st.builds(
    Policy,
    gates=st.lists(
        st.builds(Gate, suite=st.just("team/s"), metric=METRICS, margin=st.builds(Margin, value=FRACTIONS)), max_size=3
    ).map(tuple),
    max_negative_flips=st.floats(0, 1),
    alpha=st.floats(0, 0.5, exclude_min=True, exclude_max=True),
    tiers=st.permutations(TIERS).map(tuple),
    budget_seconds=st.none() | st.floats(1, 1e6),
)


@given(POLICIES)
def test_a_policy_survives_json(policy: Policy) -> None:
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


@given(st.sampled_from(Evidence), st.sampled_from(Evidence), st.sampled_from(Evidence))
def test_evidence_is_ordered_by_strength(a: Evidence, b: Evidence, c: Evidence) -> None:
    assert a.at_least(b) or b.at_least(a)
    assert (a.at_least(b) and b.at_least(a)) == (a is b)
    assert a.at_least(c) or not (a.at_least(b) and b.at_least(c))


def test_recorded_is_the_strongest_evidence_and_declared_the_weakest() -> None:
    assert all(Evidence.RECORDED.at_least(evidence) and evidence.at_least(Evidence.DECLARED) for evidence in Evidence)


def test_margins_print_as_people_type_them() -> None:
    assert str(Margin(value=0.01)) == "0.01"
    assert str(Margin(value=0.02, of_gain=True)) == "2%gain"


def test_the_default_gates_nothing_and_tries_the_cheapest_tier_first() -> None:
    policy = Policy()
    assert policy.gates == ()
    assert policy.tiers == ("carry", "warm-start", "retrain")
    assert (policy.action, policy.aliases, policy.alpha) == ("auto", ("prod",), 0.02)


@pytest.mark.parametrize(
    ("told", "recorded", "found"),
    [
        (None, 9000, (60, 3)), (None, 800, (40, 3)), (None, 120, (20, 3)), (None, 119, (20, 2)), (None, 80, (20, 2)),
        (None, 40, (10, 2)), (None, 30, (7, 2)), (None, 1, (1, 2)), (7, 9000, (7, 3)), (7, 4, (4, 2)),
        (30, 100, (30, 2)),
    ],
)  # fmt: skip
def test_a_warm_start_is_a_twentieth_of_the_training_within_bounds(
    told: int | None, recorded: int, found: tuple[int, int]
) -> None:
    assert Policy(warm_steps=told).warm_start(recorded) == found


@given(st.integers(4, 100_000))
def test_all_candidates_of_a_warm_start_together_take_at_most_half_of_a_retraining(recorded: int) -> None:
    steps, candidates = Policy().warm_start(recorded)
    assert steps >= 1
    assert candidates * steps <= recorded / 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 0.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"max_negative_flips": 1.5}, "max_negative_flips"),
        ({"tiers": []}, "tiers"),
        ({"tiers": ["teleport"]}, "tiers"),
        ({"action": "maybe"}, "action"),
        ({"budget_seconds": 0}, "budget_seconds"),
        ({"warm_steps": 0}, "warm_steps"),
        ({"gates": [{"suite": "s", "metric": "beauty", "margin": {"value": 0.01}}]}, "metric"),
        ({"gates": [{"suite": "s", "metric": "accuracy", "margin": {"value": 0.0}}]}, "margin"),
        ({"gates": [{"suite": "s", "metric": "accuracy", "margin": {"value": 1.0}}]}, "margin"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Policy.model_validate(changes)


def test_a_policy_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Policy().alpha = 0.1  # type: ignore[misc]  # that it must not is the point


@given(POLICIES)
def test_a_policy_asks_no_less_than_itself(policy: Policy) -> None:
    assert loosened(policy, policy) == []


@given(POLICIES, POLICIES, POLICIES)
def test_what_asks_no_less_twice_asks_no_less(a: Policy, b: Policy, c: Policy) -> None:
    b, c = (policy.model_copy(update={"gates": policy.gates + a.gates}) for policy in (b, c))
    if not loosened(a, b) and not loosened(b, c):
        assert loosened(a, c) == []


@given(POLICIES)
def test_more_flips_from_right_to_wrong_are_less(policy: Policy) -> None:
    gated = policy.model_copy(update={"gates": (GATE,), "max_negative_flips": 0.02})
    [told] = loosened(gated, gated.model_copy(update={"max_negative_flips": 1.0}))
    assert "flips" in told
    assert loosened(gated, gated.model_copy(update={"max_negative_flips": 0.0})) == []


@given(POLICIES)
def test_nothing_is_looser_than_no_policy(policy: Policy) -> None:
    assert loosened(Policy(), policy) == []


@pytest.mark.parametrize(
    ("steps", "size", "pays"), [(30, 50_000, False), (2000, 50_000, True), (2000, 5_000_000, False)]
)
def test_a_carry_looks_at_its_variants_where_that_is_cheap_beside_a_retraining(
    steps: int, size: int, *, pays: bool
) -> None:
    assert variants_pay(steps, 1024, size) is pays
