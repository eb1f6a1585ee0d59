"""Verdicts from stored evaluations: which records are paired, and what is said where some are missing."""

from pathlib import Path
from typing import Any

import pytest

from registry.core.digest import Digest
from registry.core.gate import Verdict
from registry.core.names import Reference, SeriesName
from registry.core.policy import Gate, Margin, Policy
from registry.db.models import Base, Version
from registry.schemas import JobRequest
from registry.services import gates, jobs
from registry.services.gates import Lacking, Scored
from registry.services.references import find_adapter, find_version
from tests.upgrade import GATE, HARNESS, OTHER_HARNESS, POLICY, Upgrade
from tests.world import ADMIN, World


@pytest.fixture
def here(world: World, tmp_path: Path) -> Upgrade:
    """Two versions of an adapter on one base."""
    made = Upgrade(world, tmp_path, {"serving": 1.0})
    made.push(seed=1)
    made.push(seed=2)
    return made


def evaluate(here: Upgrade, *versions: str, suite: str = "team/suite", fresh: bool = False) -> None:
    recipe = {"kind": "evaluate", "suite": suite, "adapters": [f"team/bot@{v}" for v in versions]}
    with here.world.database.write() as session:
        jobs.submit(session, ADMIN, JobRequest(recipe=recipe, fresh=fresh), here.world.now)
    here.work()


def scored(here: Upgrade, version: str | None) -> Scored:
    with here.world.database.read() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        row: Version = find_version(session, adapter, Reference.parse(f"team/bot@{version or 'v1'}"))
        return Scored(session.get_one(Base, row.base_id), row if version else None)


def verdict(here: Upgrade, policy: Policy, serving: str | None = None, **more: Any) -> Verdict | Lacking | None:
    ours, theirs = scored(here, "v1"), scored(here, serving) if serving else None
    with here.world.database.read() as session:
        return gates.verdict(session, here.world.store, policy, candidate=ours, serving=theirs, **more)


def test_without_gates_there_is_nothing_to_judge(here: Upgrade) -> None:
    assert verdict(here, Policy()) is None


def test_what_is_missing_is_named_with_the_command_that_supplies_it(here: Upgrade) -> None:
    lacking = verdict(here, POLICY, serving="v2")
    assert isinstance(lacking, Lacking)
    assert [str(of) for of, _ in lacking.evaluations] == [
        str(scored(here, "v1")), str(scored(here, None)), str(scored(here, "v2")),
    ]  # fmt: skip
    assert "v1 on" in lacking.reason
    assert "the bare base" in lacking.reason
    base = Digest.parse(scored(here, None).base.digest).short  # which names it well enough
    run = f"loractl evaluate team/bot@v1 team/bot@v2 --for {base} --suite team/suite"
    assert lacking.reason.endswith(f"Run: {run}")
    evaluate(here, "v1")
    lacking = verdict(here, POLICY, serving="v2")
    assert isinstance(lacking, Lacking)
    assert [str(of) for of, _ in lacking.evaluations] == [str(scored(here, "v2"))]


def test_a_suite_that_is_gone_is_said_not_raised(here: Upgrade) -> None:
    lacking = verdict(here, Policy(gates=(GATE.model_copy(update={"suite": "team/gone"}),)))
    assert isinstance(lacking, Lacking)
    assert "team/gone" in lacking.reason
    assert lacking.evaluations == ()


def test_what_is_as_good_as_what_serves_and_better_than_nothing_passes(here: Upgrade) -> None:
    evaluate(here, "v1", "v2")
    passed = verdict(here, POLICY, serving="v2")
    assert isinstance(passed, Verdict)
    assert (passed.zone, passed.adds_value) == ("pass", True)


def test_what_is_no_better_than_the_bare_base_does_not_pass(here: Upgrade) -> None:
    here.skills = {"serving": 0.5, "bare-old": 0.5}
    evaluate(here, "v1")
    found = verdict(here, POLICY)
    assert isinstance(found, Verdict)
    assert (found.zone == "pass", found.adds_value) == (False, False)


def test_records_are_paired_within_the_harness_that_scored_the_candidate_last(here: Upgrade) -> None:
    evaluate(here, "v2")
    here.harness = lambda _: OTHER_HARNESS
    evaluate(here, "v1")
    lacking = verdict(here, POLICY, serving="v2")
    assert isinstance(lacking, Lacking)
    assert [str(of) for of, _ in lacking.evaluations] == [str(scored(here, "v2"))]
    here.harness = lambda _: HARNESS
    evaluate(here, "v1", fresh=True)
    assert isinstance(verdict(here, POLICY, serving="v2"), Verdict)


def test_a_margin_of_gain_needs_what_served_and_its_bare_base(here: Upgrade) -> None:
    of_gain = Policy(gates=(Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.2, of_gain=True)),))
    evaluate(here, "v1", "v2")
    found = verdict(here, of_gain, serving="v2")
    assert isinstance(found, Verdict)
    assert found.criteria[0].bound == pytest.approx(-0.2)


def test_a_guard_is_judged_once_however_many_gates_there_are(here: Upgrade) -> None:
    evaluate(here, "v1", "v2")
    looser = GATE.model_copy(update={"margin": Margin(value=0.3)})
    guarded = POLICY.model_copy(update={"gates": (GATE, looser), "guard": GATE})
    found = verdict(here, guarded, serving="v2")
    assert isinstance(found, Verdict)
    names = [criterion.name for criterion in found.criteria]
    assert sum("guard" in name for name in names) == 1, names
    assert sum("adds-value" in name for name in names) == 2, names


def test_every_gate_is_the_gates_and_the_guard() -> None:
    assert gates.every_gate(POLICY) == (GATE,)
    assert gates.every_gate(POLICY.model_copy(update={"guard": GATE})) == (GATE, GATE)
