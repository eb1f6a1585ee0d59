"""Aliases: kept per base, moved by compare-and-set, gated by the policy, rolled back in one call."""

import threading
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from registry.core.errors import (
    AliasMoved,
    AliasNotFound,
    BadName,
    EvidenceTooWeak,
    GateNotPassed,
    LoractlError,
    NothingToRollBack,
    ScopeMissing,
)
from registry.core.names import Reference, SeriesName
from registry.core.policy import Evidence
from registry.db.models import Alias, AliasMove, Base
from registry.schemas import JobRequest
from registry.services import aliases, jobs
from registry.services.references import find_adapter, find_version
from registry.services.tokens import Caller
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, World, caller

PUBLISHER = caller("publisher", team=["read", "publish"])
PROMOTER = caller("promoter", team=["read", "promote"])


@pytest.fixture
def here(world: World, tmp_path: Path) -> Upgrade:
    """Two versions of an adapter on one base; no policy."""
    made = Upgrade(world, tmp_path)
    made.push(seed=1)
    made.push(seed=2)
    return made


def move(here: Upgrade, version: str, who: Caller = ADMIN, alias: str = "prod", **more: Any) -> Alias:
    given: dict[str, Any] = {"expected": aliases.ANY, "force": False, "reason": ""} | more
    with here.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        row = find_version(session, adapter, Reference.parse(f"team/bot@{version}"))
        return aliases.set_alias(
            session, here.world.store, who, adapter=adapter, version=row, alias=alias, now=here.world.now, **given
        )


def roll_back(here: Upgrade, who: Caller = ADMIN, alias: str = "prod") -> Alias:
    with here.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        base = session.exec(select(Base).where(Base.digest == here.old)).one()
        return aliases.roll_back(
            session, who, adapter=adapter, base=base, alias=alias, reason="oops", now=here.world.now
        )


def evaluate(here: Upgrade, *versions: str) -> None:
    request = JobRequest(
        recipe={"kind": "evaluate", "suite": "team/suite", "adapters": [f"team/bot@{v}" for v in versions]}
    )
    with here.world.database.write() as session:
        jobs.submit(session, ADMIN, request, here.world.now)
    here.work()


def test_a_move_names_what_it_expects_and_is_on_record(here: Upgrade) -> None:
    assert move(here, "v1", expected=0).generation == 1
    assert move(here, "v2", expected=1, reason="better").generation == 2
    moves = here.world.all(select(AliasMove).order_by(AliasMove.id))  # type: ignore[arg-type]  # a column
    assert [(m.generation, m.reason, m.actor) for m in moves] == [(1, "", "admin"), (2, "better", "admin")]
    for expected in (0, 1, 3):
        with pytest.raises(AliasMoved) as refused:
            move(here, "v1", expected=expected)
        assert (refused.value.current, refused.value.generation) == ("v2", 2)


def test_moving_to_where_it_points_changes_nothing(here: Upgrade) -> None:
    move(here, "v1")
    assert move(here, "v1", expected=0).generation == 1
    assert len(here.world.all(select(AliasMove))) == 1


@pytest.mark.parametrize("known", [False, True])
def test_of_two_moves_at_once_one_wins_and_the_other_is_told(here: Upgrade, *, known: bool) -> None:
    if known:
        here.push(seed=3)
        move(here, "v3")
    results: list[object] = []
    both = threading.Barrier(2)

    def race(version: str) -> None:
        both.wait()
        try:
            results.append(move(here, version, expected=int(known)).generation)
        except LoractlError as error:
            results.append(type(error))

    crowd = [threading.Thread(target=race, args=(version,)) for version in ("v1", "v2")]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert sorted(map(str, results)) == sorted([str(1 + known), str(AliasMoved)])


def test_a_rollback_points_to_where_it_pointed_before(here: Upgrade) -> None:
    with pytest.raises(AliasNotFound):
        roll_back(here)
    move(here, "v1")
    with pytest.raises(NothingToRollBack):
        roll_back(here)
    move(here, "v2")
    row = roll_back(here)
    assert row.generation == 3
    assert here.world.all(select(AliasMove))[-1].reason == "rollback: oops"
    with pytest.raises(AliasNotFound, match="Did you mean 'prod'"):
        roll_back(here, alias="prodd")


def test_an_ungated_alias_needs_publish_and_a_gated_one_promote(here: Upgrade) -> None:
    move(here, "v1", PUBLISHER)
    here.policy(POLICY)
    move(here, "v1", PUBLISHER, alias="beta")
    with pytest.raises(ScopeMissing):
        move(here, "v2", PUBLISHER)
    with pytest.raises(ScopeMissing):
        roll_back(here, PUBLISHER)
    with pytest.raises(ScopeMissing):
        move(here, "v1", PROMOTER, alias="beta")


def test_a_gate_wants_evaluations_names_them_and_lets_pass_what_is_better(here: Upgrade) -> None:
    here.policy(POLICY)
    with pytest.raises(GateNotPassed, match=r"v1 on .* has no evaluation on team/suite .*loractl evaluate"):
        move(here, "v1", PROMOTER)
    here.skills = {"serving": 1.0}
    evaluate(here, "v1")
    move(here, "v1", PROMOTER)
    passed = here.world.one(select(AliasMove))
    assert passed.verdict["zone"] == "pass"
    here.skills = {"serving": 0.3}
    evaluate(here, "v2")
    with pytest.raises(GateNotPassed, match="against what serves"):
        move(here, "v2", PROMOTER)


def test_only_an_admin_forces_and_that_is_on_record(here: Upgrade) -> None:
    here.policy(POLICY)
    with pytest.raises(ScopeMissing):
        move(here, "v1", PROMOTER, force=True)
    move(here, "v1", force=True, reason="x" * 2000)
    recorded = here.world.one(select(AliasMove))
    assert recorded.reason.startswith("forced: xxx")
    assert len(recorded.reason) == 2000
    assert recorded.verdict is None


def test_a_policy_that_wants_evidence_gets_it(here: Upgrade) -> None:
    here.policy(POLICY.model_copy(update={"gates": (), "evidence": Evidence.RECORDED}))
    move(here, "v1", PROMOTER)
    with here.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        row = find_version(session, adapter, Reference.parse("team/bot@v2"))
        row.evidence = "declared"
        session.add(row)
    with pytest.raises(EvidenceTooWeak, match="needs evidence 'recorded'"):
        move(here, "v2", PROMOTER)


def test_a_declared_binding_that_adds_value_becomes_behavioural(here: Upgrade) -> None:
    here.policy(POLICY)
    with here.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        for number in ("v1", "v2"):
            row = find_version(session, adapter, Reference.parse(f"team/bot@{number}"))
            row.evidence = "declared"
            session.add(row)
    here.skills = {"serving": 1.0}
    evaluate(here, "v1")
    with here.world.database.read() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        found = [find_version(session, adapter, Reference.parse(f"team/bot@{n}")) for n in ("v1", "v2")]
    assert [row.evidence for row in found] == ["behavioural", "declared"]
    assert "over the bare base" in found[0].binding["behavioural"]


def test_a_name_that_is_none_is_refused(here: Upgrade) -> None:
    with pytest.raises(BadName):
        move(here, "v1", alias="Not A Name")
