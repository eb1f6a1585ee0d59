"""The ledger: what an upgrade decided, written once, in order, and seen by whoever may see the adapters."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.rebase import refit
from registry.schemas import DecisionInfo
from registry.services import campaigns, ledger
from registry.services.tokens import Caller
from tests.factories import tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, World, caller


@pytest.fixture
def upgrade(embedded: World, tmp_path: Path) -> Upgrade:
    """One adapter in service, whose carry does not do and whose warm start does."""
    made = Upgrade(embedded, tmp_path, {"serving": 1.0, "carry": 0.5, "warm-start": 1.0})
    made.policy(POLICY)
    made.serve()
    return made


def rows(upgrade: Upgrade, who: Caller = ADMIN, **which: str | None) -> Sequence[DecisionInfo]:
    wanted = {"campaign": None, "line": None, "adapter": None} | which
    with upgrade.world.database.read() as session:
        return ledger.page(session, who, after=0, limit=500, **wanted)


def test_every_decision_of_an_upgrade_is_there_once_with_what_it_rested_on(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.run()
    found = rows(upgrade, campaign=campaign)
    assert [(row.kind, row.tier) for row in found] == [
        ("started", None), ("route", None), ("verdict", "carry"), ("verdict", "warm-start"), ("outcome", None),
        ("finished", None),
    ]  # fmt: skip
    started, route, failed, passed, outcome, finished = (row.data for row in found)
    assert route["fit"] == "same-shape"
    assert route["tiers"] == ["carry", "warm-start", "retrain"]
    assert route["alpha"]["carry"] == 0.01
    assert failed["verdict"]["zone"] == "fail"
    assert (passed["verdict"]["zone"], passed["steps"], passed["seconds"]) == ("pass", 20, 3.0)
    assert outcome["state"] == "promoted"
    assert outcome["cost"]["seconds"] == 6.0
    assert outcome["report"][0]["before"] == outcome["report"][0]["after"] == 1.0
    assert (started, finished) == ({}, {"reason": "1 promoted"})


def test_a_lost_tier_and_an_end_by_hand_are_there_with_who_and_why(upgrade: Upgrade) -> None:
    upgrade.fails.add("carry")
    campaign = upgrade.begin()
    upgrade.tick()
    upgrade.work()
    upgrade.tick()
    with upgrade.world.database.write() as session:
        campaigns.abort(session, upgrade.world.grant(ADMIN), campaign, "enough", upgrade.world.now)
    found = {row.kind: row for row in rows(upgrade)}
    assert (found["lost"].tier, found["lost"].data["error"]) == ("carry", "it broke")
    assert (found["outcome"].data["state"], found["outcome"].data["reason"]) == ("aborted", "ended by hand: enough")
    assert (found["aborted"].actor, found["aborted"].data) == ("admin", {"reason": "enough"})


def test_another_version_in_between_is_a_decision_too(upgrade: Upgrade) -> None:
    upgrade.begin()
    upgrade.tick()
    upgrade.serve(seed=7)
    upgrade.run()
    assert [row.kind for row in rows(upgrade)].count("replanned") == 1


def test_what_an_adapter_decided_is_shown_to_its_readers_only(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY, namespace="other")
    upgrade.serve("other/bot", seed=1)
    upgrade.begin()
    upgrade.run()
    mine = rows(upgrade, caller("me", other=["read"]))
    assert {row.adapter for row in mine} == {"other/bot", None}
    assert rows(upgrade, caller("nobody", nowhere=["read"])) == []
    assert {row.adapter for row in rows(upgrade, adapter="team/bot")} == {"team/bot"}
    assert rows(upgrade, line="demo") == rows(upgrade)
    assert rows(upgrade, line="other") == []


def test_a_plan_expects_what_the_same_tiers_took_before(upgrade: Upgrade, tmp_path: Path) -> None:
    upgrade.serve("team/other", seed=1)
    upgrade.begin()
    assert upgrade.item().plan["expected"] == []
    upgrade.run()
    upgrade.begin(folder=tiny_base(tmp_path / "v3", seed=3))
    assert upgrade.item().plan["expected"] == [
        {"tier": "carry", "steps": 0.0, "seconds": 3.0, "seen": 2},
        {"tier": "warm-start", "steps": 20.0, "seconds": 3.0, "seen": 2},
    ]


def test_routing_is_refitted_from_a_ledger(upgrade: Upgrade, tmp_path: Path) -> None:
    """At a drift of 0.02 the carry does, at 0.08 it is tried in vain: a threshold between them saves its cost."""
    upgrade.skills = {"serving": 1.0, "carry": 1.0, "warm-start": 0.5, "retrain": 1.0}
    upgrade.drift = 0.08
    upgrade.skills["carry"] = 0.5
    upgrade.begin()
    upgrade.run()
    upgrade.drift = 0.02
    upgrade.skills["carry"] = 1.0
    upgrade.begin(folder=tiny_base(tmp_path / "v3", seed=3))
    upgrade.run()
    file = tmp_path / "ledger.json"
    file.write_text(json.dumps([row.model_dump(mode="json") for row in rows(upgrade)]))
    found = refit.refit(file)
    assert (found.outcomes, found.after < found.before) == (2, True)
    assert found.thresholds.carry == pytest.approx(0.05)
    file.write_text("[]")
    assert "Nothing to refit from" in refit.told(refit.refit(file))


def test_a_plan_looks_through_the_newest_of_a_long_ledger(upgrade: Upgrade, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade.begin()
    upgrade.run()
    shape = next(row.data["shape"] for row in rows(upgrade) if row.kind == "verdict")
    with upgrade.world.database.read() as session:
        assert [found.tier for found in ledger.expected(session, shape)] == ["carry", "warm-start"]
        monkeypatch.setattr(ledger, "_LOOKED_AT", 3)  # finished, outcome, and the verdict on the warm start
        assert [found.tier for found in ledger.expected(session, shape)] == ["warm-start"]
        assert ledger.expected(session, "another") == ()
