"""Policies: revisions, what is in force, what is told when one is set, and who may ask less than before."""

import json
from pathlib import Path

import pytest
from sqlmodel import col, select

from registry.core.errors import BadName, BadRequest, GateLoosened, PolicyNotFound, ScopeMissing
from registry.core.policy import Evidence, Gate, Margin, Policy
from registry.db.models import StoredPolicy
from registry.services import policies
from registry.services.tokens import Caller
from tests.upgrade import GATE, POLICY, ROWS, Upgrade
from tests.world import ADMIN, World, caller

PROMOTER = caller("promoter", team=["read", "promote"])
STRICT = POLICY.model_copy(update={"guard": GATE, "evidence": Evidence.RESOLVED})


@pytest.fixture
def here(world: World, tmp_path: Path) -> Upgrade:
    return Upgrade(world, tmp_path)


def put(here: Upgrade, policy: Policy, who: Caller = ADMIN, namespace: str = "team", name: str = "") -> list[str]:
    with here.world.database.write() as session:
        return policies.put(session, who, namespace, name, policy, here.world.now)[1]


def test_every_setting_is_a_revision_and_the_newest_is_in_force(here: Upgrade) -> None:
    for flips in (0.3, 0.4, 0.5):
        put(here, POLICY.model_copy(update={"max_negative_flips": flips}), name="bot")
    rows = here.world.all(select(StoredPolicy).order_by(col(StoredPolicy.revision)))
    assert [(row.revision, row.body["max_negative_flips"]) for row in rows] == [(1, 0.3), (2, 0.4), (3, 0.5)]
    with here.world.database.read() as session:
        assert policies.effective(session, "team", "bot").max_negative_flips == 0.5
        with pytest.raises(PolicyNotFound):
            policies.show(session, ADMIN, "team", "other")
        with pytest.raises(ScopeMissing):
            policies.show(session, caller("a", other=["read"]), "team", "bot")


def test_a_gate_on_what_its_suite_does_not_measure_is_refused(here: Upgrade) -> None:
    with pytest.raises(BadRequest, match="does not measure chrf, so its gate could never open; what it measures: accu"):
        put(here, POLICY.model_copy(update={"gates": (GATE.model_copy(update={"metric": "chrf"}),)}))
    assert here.world.all(select(StoredPolicy)) == []


def test_a_policy_of_an_adapter_that_is_not_there_says_so(here: Upgrade) -> None:
    assert put(here, POLICY, name="bto")[-1].startswith("there is no adapter team/bto yet")


def test_the_answer_says_how_many_items_can_pass(here: Upgrade) -> None:
    [note, guarded] = put(here, POLICY.model_copy(update={"guard": GATE}))
    assert "team/suite: " in note
    assert "gate items; without a flip, at least" in note
    assert "margin 0.2" in guarded


@pytest.mark.parametrize(("namespace", "name"), [("No", ""), ("team", "No Name")])
def test_a_name_that_is_none_has_no_policy(here: Upgrade, namespace: str, name: str) -> None:
    with pytest.raises(BadName):
        put(here, POLICY, namespace=namespace, name=name)
    with pytest.raises(BadName):
        put(here, POLICY.model_copy(update={"aliases": ("Not One",)}))


def wider(gate: Gate, **margin: object) -> Gate:
    return gate.model_copy(update={"margin": Margin.model_validate({"value": 0.3} | margin)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gates": (wider(GATE),)}, "the gate team/suite (accuracy) had the margin 0.2 and has 0.3"),
        ({"gates": (wider(GATE, value=0.2, of_gain=True),)}, "has 20%gain"),
        ({"gates": (GATE.model_copy(update={"suite": "team/twin"}),)}, "the gate team/suite (accuracy) is gone"),
        ({"guard": None}, "the guard team/suite (accuracy) is gone"),
        ({"guard": wider(GATE)}, "the guard team/suite (accuracy) had the margin 0.2"),
        ({"alpha": 0.4}, "alpha was 0.02 and is 0.4"),
        ({"evidence": Evidence.DECLARED}, "the evidence was resolved and is declared"),
    ],
)
def test_asking_less_than_before_needs_admin(here: Upgrade, changes: dict[str, object], told: str) -> None:
    here.world.push_rows("suite", "team/twin", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    put(here, STRICT)
    for name in ("", "bot"):  # an adapter's own policy goes before its namespace's
        with pytest.raises(GateLoosened) as refused:
            put(here, STRICT.model_copy(update=changes), PROMOTER, name=name)
        assert told in refused.value.message
        assert "needs 'admin' on 'team'" in refused.value.message
    assert len(here.world.all(select(StoredPolicy))) == 1
    put(here, STRICT.model_copy(update=changes), name="bot")


def test_whoever_may_promote_asks_more_and_changes_what_asks_nothing(here: Upgrade) -> None:
    put(here, STRICT)
    for changes in (
        {"alpha": 0.01},
        {"evidence": Evidence.RECORDED},
        {"gates": (*STRICT.gates, wider(GATE))},
        {"gates": (GATE.model_copy(update={"suite": "team/suite@v1"}),)},
        {"aliases": ("prod", "beta"), "action": "ask", "warm_steps": 7},
    ):
        put(here, STRICT.model_copy(update=changes), PROMOTER, name="bot")
        put(here, STRICT, name="bot")
    fresh = caller("fresh", fresh=["read", "promote"])
    put(here, Policy(alpha=0.3), fresh, namespace="fresh")
    put(here, Policy(alpha=0.4, guard=None), fresh, namespace="fresh")
