"""States and moves: what may follow what, and that every noun comes to an end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import MoveNotAllowed
from registry.core.lifecycle import CAMPAIGN, JOB, PUSH, CampaignState, JobState, Machine, PushState

CASES: list[tuple[Machine, list[str], str, set[str]]] = [
    (
        PUSH, list(PushState), PushState.OPEN,
        {PushState.COMMITTED, PushState.REJECTED, PushState.EXPIRED, PushState.ABORTED},
    ),
    (JOB, list(JobState), JobState.QUEUED, {JobState.SUCCEEDED}),  # a failed or cancelled job may be tried again
    (CAMPAIGN, list(CampaignState), CampaignState.PLANNED, {CampaignState.FINISHED, CampaignState.ABORTED}),
]
"""A machine, its states, the first and the final ones."""

each = pytest.mark.parametrize(("machine", "states", "first", "ends"), CASES, ids=["push", "job", "campaign"])


@each
def test_moves_lead_between_known_states_only(machine: Machine, states: list[str], first: str, ends: set[str]) -> None:
    for starts, target in machine.moves.values():
        assert starts
        assert starts <= set(states)
        assert target in states


@each
def test_every_state_is_reached_from_the_first(machine: Machine, states: list[str], first: str, ends: set[str]) -> None:
    reached = {first}
    for _ in states:
        reached |= {target for starts, target in machine.moves.values() if starts & reached}
    assert reached == set(states)


@each
def test_exactly_the_final_states_have_no_way_out(
    machine: Machine, states: list[str], first: str, ends: set[str]
) -> None:
    leaving = {start for starts, target in machine.moves.values() for start in starts if start != target}
    assert set(states) - leaving == ends


@given(st.data(), st.sampled_from(CASES))
def test_a_move_that_is_not_in_the_table_is_refused_with_what_is(
    data: st.DataObject, case: tuple[Machine, list[str], str, set[str]]
) -> None:
    machine, states, _, _ = case
    move, state = data.draw(st.sampled_from(sorted(machine.moves))), data.draw(st.sampled_from(states))
    starts, target = machine.moves[move]
    if state in starts:
        assert machine.after(move, state, "x1") == target
    else:
        with pytest.raises(MoveNotAllowed) as refusal:
            machine.after(move, state, "x1")
        assert refusal.value.message == (
            f"The {machine.noun} x1 is {state}; '{move}' is allowed from {', '.join(sorted(starts))}."
        )


def test_a_lost_lease_puts_a_job_back_into_the_queue() -> None:
    assert JOB.after("requeue", JobState.RUNNING, "j") == JobState.QUEUED
    with pytest.raises(MoveNotAllowed):
        JOB.after("succeed", JobState.QUEUED, "j")


def test_nothing_becomes_visible_before_it_is_verified() -> None:
    assert PUSH.moves["commit"] == (frozenset({PushState.VERIFIED}), PushState.COMMITTED)


def test_an_unknown_move_is_a_programming_error() -> None:
    with pytest.raises(KeyError):
        JOB.after("explode", JobState.RUNNING, "j")
