"""Every way through a campaign and every end of it, on real jobs, pushes, records and alias moves."""

import json
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from sqlmodel import Session, col, select

from registry.core.campaign import Facts, Promote, State
from registry.core.errors import (
    BadRequest,
    BaseNotFound,
    CampaignExists,
    CampaignNotFound,
    MoveNotAllowed,
    NotASuccessor,
    ScopeMissing,
    Unavailable,
)
from registry.core.lifecycle import VersionState
from registry.core.manifest import Lineage
from registry.core.names import SeriesName
from registry.core.policy import Evidence, Gate, Margin, Policy
from registry.core.recipes import FineTune
from registry.db.models import (
    Adapter,
    AliasMove,
    Base,
    Campaign,
    CampaignItem,
    Decision,
    Evaluation,
    Job,
    StoredPolicy,
    Token,
    Version,
)
from registry.files import scan_folder
from registry.schemas import ClaimRequest, JobRequest, UpgradeRequest
from registry.services import aliases, campaigns, jobs, withdrawals
from registry.services.campaigns import reading, running
from registry.services.references import find_adapter
from registry.services.tokens import Caller
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.upgrade import GATE, HARNESS, OTHER_HARNESS, POLICY, ROWS, WORKER, Upgrade
from tests.world import ADMIN, World, caller, request_of

GOOD = {"serving": 1.0, "bare-old": 0.0, "bare": 0.0}


@pytest.fixture
def upgrade(embedded: World, tmp_path: Path) -> Upgrade:
    """One adapter in service on the old base, its policy set, the new base not there yet."""
    made = Upgrade(embedded, tmp_path, dict(GOOD))
    made.policy(POLICY)
    made.serve()
    return made


# ── routes ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("skills", "tier", "route"),
    [
        ({"carry": 1.0}, "carry", ["carry"]),
        ({"carry": 0.5, "warm-start": 1.0}, "warm-start", ["carry", "warm-start"]),
        ({"retrain": 1.0}, "retrain", ["carry", "warm-start", "retrain"]),
    ],
)
def test_the_cheapest_tier_that_passes_is_promoted(
    upgrade: Upgrade, skills: dict[str, float], tier: str, route: list[str]
) -> None:
    upgrade.skills |= skills
    campaign = upgrade.begin()
    upgrade.run()
    item = upgrade.item()
    assert (item.state, item.tier) == ("promoted", tier), item.reason
    assert list(item.verdicts) == route
    assert {name: verdict["zone"] == "pass" for name, verdict in item.verdicts.items()}[tier]
    assert upgrade.prod(upgrade.new) == tier
    assert upgrade.prod(upgrade.old) == "serving"
    assert upgrade.info(campaign).state == "finished"
    assert upgrade.info(campaign).reason == "1 promoted"
    assert item.scores[tier] == item.scores["final"] == 1.0
    assert item.scores["serving_old"] == 1.0
    assert item.cost["retrain_steps"] is not None or tier != "retrain"


def test_both_databases_and_stores_carry_an_upgrade_through(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path, GOOD | {"warm-start": 1.0})
    upgrade.policy(POLICY)
    upgrade.serve()
    upgrade.serve("team/other", seed=1)
    upgrade.begin()
    upgrade.run()
    assert {upgrade.state(name) for name in ("team/bot", "team/other")} == {"promoted"}
    moved = world.all(select(AliasMove).where(col(AliasMove.campaign_id).is_not(None)))[0]
    assert moved.verdict["zone"] == "pass"


def test_nothing_passes_so_the_old_base_keeps_serving(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 0.6
    upgrade.begin()
    upgrade.run()
    item = upgrade.item()
    assert item.state == "frozen"
    assert "no tier passed; nearest was carry" in item.reason
    assert upgrade.prod(upgrade.new) is None


def test_an_adapter_without_a_recipe_is_distilled_on_the_inputs_that_its_policy_retains(upgrade: Upgrade) -> None:
    changes = {"tiers": ("carry", "distil"), "retained": "team/questions"}
    upgrade.policy(POLICY.model_copy(update=changes), name="bot")
    upgrade.skills["distil"] = 1.0
    upgrade.set_alias(upgrade.push(seed=5, recipe=False))
    upgrade.begin()
    assert upgrade.item().plan["route"] == "carry"
    assert any("retained inputs team/questions" in missing for missing in upgrade.item().plan["missing"])
    upgrade.world.push_rows("dataset", "team/questions", b'{"prompt": "1+1=", "completion": " ?"}\n')
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "distil")
    distilled = next(job for job in upgrade.jobs() if job.recipe.get("tier") == "distil")
    assert distilled.recipe["inputs"] is not None
    assert distilled.recipe["suite"] is None


def test_a_base_that_needs_no_adapter_retires_it(upgrade: Upgrade) -> None:
    upgrade.skills |= {"bare": 1.0, "carry": 1.0}
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "retired"
    assert upgrade.prod(upgrade.new) is None


def test_an_incompatible_base_leaves_what_trains(upgrade: Upgrade, tmp_path: Path) -> None:
    wide = tiny_base(tmp_path / "wide", width=32)
    upgrade.skills["retrain"] = 1.0
    upgrade.begin(folder=wide)
    assert upgrade.item().plan["route"] == "warm-start → retrain"
    upgrade.run()
    assert (upgrade.state(), upgrade.item().fit) == ("promoted", "incompatible")
    assert upgrade.prod(str(base_of(wide).digest)) == "retrain"
    assert {job.recipe["tier"] for job in upgrade.jobs() if job.kind == "rebase"} == {"warm-start", "retrain"}


def test_without_a_recipe_only_the_carry_is_tried(upgrade: Upgrade) -> None:
    upgrade.set_alias(upgrade.push(seed=5, recipe=False))
    upgrade.begin()
    assert upgrade.item().plan["route"] == "carry"
    upgrade.run()
    assert upgrade.state() == "frozen"


# ── frozen from the start ────────────────────────────────────────────────────


def _ends_at_once(upgrade: Upgrade, reason: str) -> None:
    before = len(upgrade.jobs())
    upgrade.begin()
    upgrade.tick()
    item = upgrade.item()
    assert item.state == "frozen"
    assert reason in item.reason
    assert {job.kind for job in upgrade.jobs()[before:]} == {"compare"}


def test_an_adapter_without_a_suite_is_frozen(upgrade: Upgrade) -> None:
    upgrade.policy(Policy(), name="bot")
    _ends_at_once(upgrade, "no suite gates it")


def test_a_suite_that_became_too_small_freezes(upgrade: Upgrade) -> None:
    upgrade.world.push_rows("suite", "team/suite", b'{"prompt": "1+1=", "choices": [" 1", " 2"], "answer": 1}\n')
    _ends_at_once(upgrade, "nothing can pass below")


def test_a_policy_that_says_frozen_freezes(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"action": "frozen"}), name="bot")
    _ends_at_once(upgrade, "the policy says frozen")


# ── people ───────────────────────────────────────────────────────────────────


@pytest.fixture
def asking(upgrade: Upgrade) -> str:
    """The campaign of an adapter whose policy asks, once it waits."""
    upgrade.policy(POLICY.model_copy(update={"action": "ask"}), name="bot")
    upgrade.skills["carry"] = 1.0
    campaign = upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "waiting"
    assert upgrade.prod(upgrade.new) is None
    return campaign


def _answer(upgrade: Upgrade, campaign: str, *, approved: bool = True) -> None:
    with upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now, approved=approved)


def test_what_is_approved_is_promoted(upgrade: Upgrade, asking: str) -> None:
    _answer(upgrade, asking)
    upgrade.run(1)
    assert upgrade.state() == "promoted"
    with pytest.raises(MoveNotAllowed):
        _answer(upgrade, asking)


def test_what_is_declined_is_frozen_with_who_said_so(upgrade: Upgrade, asking: str) -> None:
    _answer(upgrade, asking, approved=False)
    upgrade.run(1)
    assert upgrade.state() == "frozen"
    assert "declined by admin" in upgrade.item().reason


def test_an_aborted_campaign_ends_its_items_and_its_jobs(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    assert upgrade.jobs("queued")
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, campaign, "not today", upgrade.world.now)
    assert upgrade.state() == "aborted"
    assert upgrade.item().reason == "ended by hand: not today"
    assert not upgrade.jobs("queued")
    upgrade.run(2)
    assert (upgrade.info(campaign).state, upgrade.state()) == ("aborted", "aborted")


# ── what others do meanwhile ─────────────────────────────────────────────────


def test_a_new_version_in_between_is_what_counts(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.begin(compare=False)
    upgrade.tick()
    assert upgrade.work_one() is not None
    second = upgrade.serve(seed=7)
    upgrade.run()
    assert (upgrade.state(), upgrade.item().serving) == ("promoted", "v2")
    carried = [job for job in upgrade.jobs("succeeded") if job.kind == "rebase"]
    assert carried[-1].recipe["adapter"] == second


def test_a_new_version_while_somebody_is_asked_takes_the_question_back(upgrade: Upgrade, asking: str) -> None:
    upgrade.serve(seed=7)
    upgrade.run()
    assert (upgrade.state(), upgrade.item().serving) == ("waiting", "v3")
    _answer(upgrade, asking)
    upgrade.run(1)
    assert upgrade.state() == "promoted"


def test_an_alias_that_somebody_set_is_never_overwritten(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.tick()
    upgrade.serve(seed=9, base=upgrade.v2)
    upgrade.run()
    assert upgrade.state() == "aborted"
    assert "by somebody else" in upgrade.item().reason
    assert upgrade.prod(upgrade.new) == "serving"
    assert not upgrade.jobs("queued")


def test_an_alias_that_moves_in_the_very_step_is_looked_at_again(upgrade: Upgrade, asking: str) -> None:
    """The old alias moves after the facts were read and before the promotion: nothing is promoted on old facts."""
    _answer(upgrade, asking)
    item = upgrade.items()[0]
    facts = Facts.model_validate(item.facts)
    second = upgrade.push(seed=8)
    upgrade.set_alias(second)
    with upgrade.world.database.write() as session:
        row, campaign = session.get_one(CampaignItem, item.id), session.get_one(Campaign, asking)
        work = running.Work(session, upgrade.world.store, campaign, row, upgrade.world.now)
        stale = Promote("carry", str(facts.tiers[0].version), "prod", 0, facts.serving)
        assert work._promote(stale, facts) == (facts, True)
    assert upgrade.prod(upgrade.new) is None


def test_a_newer_revision_supersedes(upgrade: Upgrade, tmp_path: Path) -> None:
    first = upgrade.begin()
    upgrade.tick()
    upgrade.world.push_base(tiny_base(tmp_path / "v3", seed=3), line="demo")
    upgrade.run(2)
    assert upgrade.info(first).items[0].state == "aborted"
    assert "superseded: the line moved on to demo@r3" in upgrade.info(first).items[0].reason
    assert not [job for job in upgrade.jobs("queued") if job.kind != "compare"]


def test_the_old_alias_may_go_back_after_a_promotion(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    again = upgrade.push(seed=11, base=upgrade.v2)
    upgrade.set_alias(again)
    with upgrade.world.database.write() as session:
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        base = session.exec(select(Base).where(Base.digest == upgrade.new)).one()
        aliases.roll_back(session, ADMIN, adapter=adapter, base=base, alias="prod", reason="", now=upgrade.world.now)
    upgrade.run(2)
    assert upgrade.prod(upgrade.new) == "carry"
    assert upgrade.state() == "promoted"


# ── failures ─────────────────────────────────────────────────────────────────


def test_tiers_whose_jobs_fail_are_passed_over(upgrade: Upgrade) -> None:
    upgrade.fails, upgrade.skills["warm-start"] = {"carry"}, 1.0
    upgrade.begin()
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "warm-start")


def test_when_every_tiers_job_fails_the_item_failed(upgrade: Upgrade) -> None:
    upgrade.fails = {"rebase"}
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "failed"
    assert "making it it broke" in upgrade.item().reason


def test_without_reference_scores_the_item_failed(upgrade: Upgrade) -> None:
    upgrade.fails = {"evaluate"}
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "failed"
    assert "could not be evaluated" in upgrade.item().reason
    assert not upgrade.jobs("queued")


def test_a_failed_scoring_of_one_adapter_is_no_news_of_the_bare_base(upgrade: Upgrade) -> None:
    upgrade.serve("team/other", seed=1)
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    failed: list[str] = []
    for _ in range(12):
        upgrade.tick()
        while job := next(iter(upgrade.jobs("queued")), None):
            first = not failed and job.kind == "evaluate" and job.base == upgrade.new and job.recipe["bare"]
            upgrade.fails = {"evaluate"} if first else set()
            if first:
                failed.append(job.id)
            upgrade.work_one()
    upgrade.tick()
    assert failed
    assert "failed" not in {upgrade.state(name) for name in ("team/bot", "team/other")}


def test_scores_of_another_harness_are_taken_again(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.harness = lambda job: HARNESS if job.base == upgrade.new or len(upgrade.jobs()) > 5 else OTHER_HARNESS
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "promoted", upgrade.item().reason


def test_harnesses_that_never_agree_end_the_tier_not_the_world(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.harness = lambda job: HARNESS if job.base == upgrade.new else OTHER_HARNESS
    upgrade.begin()
    upgrade.run(25)
    assert upgrade.state() == "failed"
    assert "in one harness" in upgrade.item().reason
    assert len([job for job in upgrade.jobs() if job.kind == "evaluate" and job.base == upgrade.old]) <= 4


def test_a_metric_that_the_suite_does_not_measure_ends_in_words(upgrade: Upgrade) -> None:
    policy = POLICY.model_copy(update={"gates": (GATE.model_copy(update={"metric": "exact-match"}),)})
    with upgrade.world.database.write() as session:  # as the release before took it
        session.add(
            StoredPolicy(
                namespace="team", name="bot", revision=1, body=policy.model_dump(mode="json"),
                created_by=ADMIN.token_id, created_at=upgrade.world.now,
            )
        )  # fmt: skip
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "failed"
    assert "lack 'exact-match'" in upgrade.item().reason


def test_a_binding_too_weak_for_the_policy_is_frozen_with_the_reason(upgrade: Upgrade, asking: str) -> None:
    upgrade.policy(POLICY.model_copy(update={"action": "ask", "evidence": Evidence.RECORDED}), name="bot")
    version = next(i for i in upgrade.items()).facts["tiers"][0]["version"]
    with upgrade.world.database.write() as session:
        row = session.exec(select(Version).where(Version.digest == version)).one()
        row.evidence = "declared"
        session.add(row)
    _answer(upgrade, asking)
    upgrade.run(1)
    assert upgrade.state() == "frozen"
    assert "needs evidence 'recorded'" in upgrade.item().reason
    assert upgrade.prod(upgrade.new) is None


def test_what_ends_one_item_leaves_the_jobs_of_another(upgrade: Upgrade) -> None:
    upgrade.serve("team/other", seed=1)
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.tick()
    upgrade.serve(seed=9, base=upgrade.v2)
    upgrade.tick()
    assert upgrade.state() == "aborted"
    cancelled = upgrade.jobs("cancelled")
    assert {job.output["adapter"] for job in cancelled if job.kind == "rebase"} == {"team/bot"}
    upgrade.run()
    assert upgrade.state("team/other") == "promoted"


# ── crashes and races ────────────────────────────────────────────────────────


class _CrashError(Exception):
    pass


def test_a_crash_after_any_step_ends_in_the_same_single_end(upgrade: Upgrade) -> None:
    """Every step is taken once and lost, once and kept, once again: jobs are made once, the alias moves once."""
    upgrade.skills["warm-start"] = 1.0
    upgrade.begin()
    for _ in range(30):
        for item in upgrade.items():
            assert item.id is not None
            for crash in (True, False, False):
                with suppress(_CrashError), upgrade.world.database.write() as session:
                    campaigns.step(session, upgrade.world.store, item.id, upgrade.world.now)
                    if crash:
                        raise _CrashError
        if upgrade.work_one() is None and upgrade.state() == "promoted":
            break
    assert upgrade.state() == "promoted"
    assert [job.recipe["tier"] for job in upgrade.jobs() if job.kind == "rebase"] == ["carry", "warm-start"]
    moves = upgrade.world.all(select(AliasMove).where(AliasMove.name == "prod"))
    assert len(moves) == 2
    assert len({job.key for job in upgrade.jobs()}) == len(upgrade.jobs())


def test_two_schedulers_take_a_step_at_once(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path, GOOD | {"carry": 1.0})
    upgrade.policy(POLICY)
    upgrade.serve()
    upgrade.begin()
    for _ in range(6):
        crowd = [threading.Thread(target=_patient_tick, args=(upgrade,)) for _ in range(2)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        upgrade.work()
    assert upgrade.state() == "promoted"
    assert len(world.all(select(AliasMove).where(AliasMove.name == "prod"))) == 2


def _patient_tick(upgrade: Upgrade) -> None:
    while True:
        try:
            upgrade.tick()
        except Unavailable:
            continue
        return


def test_an_abort_and_a_promotion_at_once_agree(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path, GOOD | {"carry": 1.0})
    upgrade.policy(POLICY)
    upgrade.serve()
    campaign = upgrade.begin()
    for _ in range(8):
        if upgrade.items()[0].facts.get("tiers") and not upgrade.jobs("queued"):
            break
        upgrade.tick()
        upgrade.work()

    def abort() -> None:
        with world.database.write() as session:
            campaigns.abort(session, ADMIN, campaign, "", world.now)

    crowd = [threading.Thread(target=_patient_tick, args=(upgrade,)), threading.Thread(target=abort)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    promoted = upgrade.prod(upgrade.new) == "carry"
    assert upgrade.state() == ("promoted" if promoted else "aborted")


# ── planning and access ──────────────────────────────────────────────────────


def test_a_plan_stores_nothing_and_says_the_route(upgrade: Upgrade) -> None:
    upgrade.world.push_base(upgrade.v2, line="demo")
    with upgrade.world.database.read() as session:
        request = UpgradeRequest(line="demo", to="demo")
        campaign, items = campaigns.plan(session, ADMIN, request, upgrade.world.now)
        info = campaigns.info(session, ADMIN, campaign, items)
    assert [item.plan["route"] for item in info.items] == ["carry → warm-start → retrain"]
    assert upgrade.items() == []


def test_a_line_has_one_unfinished_campaign(upgrade: Upgrade) -> None:
    upgrade.begin()
    with pytest.raises(CampaignExists):
        upgrade.begin()


def test_a_line_that_is_not_there_is_named_with_the_nearest(upgrade: Upgrade) -> None:
    with upgrade.world.database.write() as session, pytest.raises(BaseNotFound, match="Did you mean 'demo'"):
        campaigns.create(session, ADMIN, UpgradeRequest(line="demoo", to="demo"), upgrade.world.now)


def test_a_campaign_takes_only_what_its_creator_may_run_and_promote(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY, namespace="other")
    upgrade.serve("other/bot", seed=1)
    alice = caller("alice", team=["run", "promote", "read"])
    with pytest.raises(ScopeMissing):
        upgrade.begin(alice, namespaces=["other"])
    with pytest.raises(ScopeMissing):
        upgrade.begin(alice, namespaces=["nothing-there"])
    with pytest.raises(ScopeMissing):
        upgrade.begin(caller("reader", team=["read"]))
    campaign = upgrade.begin(alice)
    assert [item.adapter for item in upgrade.info(campaign).items] == ["team/bot"]
    with pytest.raises(CampaignNotFound):
        upgrade.info(campaign, caller("bob", other=["admin"]))
    with upgrade.world.database.write() as session, pytest.raises(ScopeMissing):
        campaigns.abort(session, caller("carol", team=["read"]), campaign, "", upgrade.world.now)


def test_two_gated_aliases_share_their_work(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"aliases": ("prod", "canary")}), name="bot")
    serving = next(digest for digest, tier in upgrade.tiers.items() if tier == "serving")
    upgrade.set_alias(serving, alias="canary")
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    assert {item.state for item in upgrade.items()} == {State.PROMOTED}
    assert len([job for job in upgrade.jobs() if job.kind == "rebase"]) == 1


@pytest.mark.parametrize("status", [VersionState.LIVE, VersionState.QUARANTINED])
def test_what_was_carried_is_where_a_training_begins_if_it_is_still_there(
    upgrade: Upgrade, status: VersionState
) -> None:
    upgrade.skills |= {"carry": 0.3, "warm-start": 1.0}
    upgrade.begin()
    while not (carried := [digest for digest, tier in upgrade.tiers.items() if tier == "carry"]):
        upgrade.tick()
        upgrade.work_one()
    with upgrade.world.database.write() as session:
        version = session.exec(select(Version).where(Version.digest == carried[0])).one()
        version.status = status
        session.add(version)
    upgrade.run()
    assert upgrade.item().tier == "warm-start"
    [asked] = [job.recipe for job in upgrade.jobs() if job.recipe.get("tier") == "warm-start"]
    assert asked.get("made") == ({"carry": carried[0]} if status == VersionState.LIVE else None)


def test_a_carried_version_is_rebased_from_its_original(upgrade: Upgrade, tmp_path: Path) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    original = next(digest for digest, tier in upgrade.tiers.items() if tier == "serving")
    upgrade.begin(folder=tiny_base(tmp_path / "v3", seed=3))
    upgrade.run()
    last = [job for job in upgrade.jobs("succeeded") if job.kind == "rebase"][-1]
    assert (last.recipe["adapter"], last.recipe["old"]) == (original, upgrade.old)
    facts = Facts.model_validate(upgrade.items()[-1].facts)
    assert facts.serving != facts.source == original


def test_what_a_carried_version_starts_from_is_the_base_that_its_original_was_made_on(
    upgrade: Upgrade, tmp_path: Path
) -> None:
    """Of three revisions the first has no weights any more; the second, which serves, has."""
    upgrade.skills |= {"carry": 1.0, "retrain": 1.0}
    upgrade.begin()
    upgrade.run()
    with upgrade.world.database.write() as session:
        base = session.exec(select(Base).where(Base.digest == upgrade.old)).one()
        base.weights = "absent"
        session.add(base)
    upgrade.begin(folder=tiny_base(tmp_path / "v3", seed=3))
    assert upgrade.item().plan["route"] == "retrain"
    assert any("carry reads the old weights" in missing for missing in upgrade.item().plan["missing"])
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "retrain")


def test_on_a_base_in_fewer_bits_nothing_is_carried_before_its_shapes_are_known(
    upgrade: Upgrade, tmp_path: Path
) -> None:
    folder = tiny_base(tmp_path / "packed", seed=4)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("q_proj.weight")]:
        stored[name.replace(".weight", ".qweight")] = stored.pop(name)[: 2].copy()
    save_file(stored, folder / "model.safetensors")
    upgrade.begin(folder=folder, compare=False)
    item = upgrade.item()
    assert (item.fit, item.plan["route"]) == ("unknown", "retrain")
    assert [told for told in item.plan["missing"] if told.startswith("carry needs a base of the same shapes")]


def test_a_margin_of_gain_scores_the_bare_old_base_and_a_guard_is_held(upgrade: Upgrade) -> None:
    gate = GATE.model_copy(update={"margin": Margin(value=0.2, of_gain=True)})
    guard = Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.3))
    upgrade.policy(POLICY.model_copy(update={"gates": (gate,), "guard": guard}), name="bot")
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    item = upgrade.item()
    assert item.state == "promoted", item.reason
    names = [criterion["name"] for criterion in item.verdicts["carry"]["criteria"]]
    assert names.count("guard") == 1
    assert item.scores["bare_old"] == 0.0


def test_reference_seconds_are_kept_apart_from_the_budget(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"budget_seconds": 2.5}), name="bot")
    upgrade.begin()
    upgrade.run()
    assert "budget: 3 of 2 seconds" in upgrade.item().reason
    assert Facts.model_validate(upgrade.items()[0].facts).reference_seconds == 3.0
    assert upgrade.jobs("queued") == []


def test_two_gates_on_one_suite_are_both_judged(upgrade: Upgrade) -> None:
    stricter = GATE.model_copy(update={"margin": Margin(value=0.15)})
    upgrade.policy(POLICY.model_copy(update={"gates": (GATE, stricter)}), name="bot")
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "promoted", upgrade.item().reason
    criteria = upgrade.item().verdicts["carry"]["criteria"]
    assert [c["bound"] for c in criteria if c["name"] == "not-worse"] == [-0.2, -0.15]


# ── whose rights, which rules ────────────────────────────────────────────────


def _private(upgrade: Upgrade) -> tuple[Caller, str]:
    """Somebody of namespace ``bob``, and a dataset that is not his, recorded in his own adapter's manifest."""
    secret = upgrade.world.push_rows("dataset", "secret/data", b'{"prompt": "p", "completion": " s"}\n')["digest"]
    bob = caller("bob", bob=["read", "publish", "run", "promote"])
    upgrade.policy(POLICY, namespace="bob")
    folder = tiny_adapter(upgrade.folder / "bobs", upgrade.v1, seed=77, record_base=True)
    trained = FineTune(base=upgrade.old, datasets=(secret,), steps=4).model_dump(mode="json")
    scan = scan_folder("adapter", folder, base=base_of(upgrade.v1).digest, lineage=Lineage(recipe=trained))
    request, contents = request_of(scan)
    digest = upgrade.world.push("adapter", "bob/bot", request, contents, bob)["digest"]
    upgrade.tiers[digest] = "serving"
    upgrade.set_alias(digest, "bob/bot")
    return bob, secret


def test_a_campaign_trains_on_nothing_that_its_creator_may_not_read(upgrade: Upgrade) -> None:
    bob, secret = _private(upgrade)
    upgrade.begin(bob)
    assert "the right to read them" in " ".join(upgrade.item("bob/bot").plan["missing"])
    upgrade.run()
    assert upgrade.item("bob/bot").state == "frozen"  # on the suite that an admin named, which bob may not read
    assert [job.recipe["tier"] for job in upgrade.jobs() if job.kind == "rebase"] == ["carry"]
    assert secret not in json.dumps([job.recipe for job in upgrade.jobs()])


@pytest.mark.parametrize("how", ["revoked", "expired", "narrowed"])
def test_a_campaign_ends_with_its_creators_rights(upgrade: Upgrade, how: str) -> None:
    upgrade.skills["carry"] = 1.0
    alice = caller("alice", team=["read", "run", "promote"])
    campaign = upgrade.begin(alice)
    upgrade.tick()
    with upgrade.world.database.write() as session:
        token = session.get_one(Token, "alice")
        match how:
            case "revoked":
                token.revoked_at = upgrade.world.now
            case "expired":
                token.expires_at = upgrade.world.now
            case _:
                token.scopes = {"team": ["read", "run"]}
        session.add(token)
    upgrade.run()
    item = upgrade.item()
    assert item.state == "aborted"
    assert "in its creator's name, who may no more" in item.reason
    assert upgrade.prod(upgrade.new) is None
    assert upgrade.info(campaign).state == "finished"
    assert {job.state for job in upgrade.jobs() if job.kind == "rebase"} == {"cancelled"}


def test_a_verdict_counts_for_the_rules_that_gave_it(upgrade: Upgrade) -> None:
    upgrade.skills |= {"carry": 0.93}
    upgrade.policy(POLICY.model_copy(update={"action": "ask", "tiers": ("carry",)}))
    campaign = upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "waiting"
    strict = POLICY.model_copy(update={"action": "ask", "tiers": ("carry",), "max_negative_flips": 0.06})
    upgrade.policy(strict)
    with upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now)
    upgrade.run()
    item = upgrade.item()
    assert (item.state, item.verdicts["carry"]["zone"]) == ("frozen", "unresolved"), item.reason
    assert upgrade.prod(upgrade.new) is None


def test_another_margin_is_another_verdict_and_the_yes_was_to_the_old_one(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    asking = POLICY.model_copy(update={"action": "ask"})
    upgrade.policy(asking)
    campaign = upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "waiting"
    wider = GATE.model_copy(update={"margin": Margin(value=0.25)})
    upgrade.policy(asking.model_copy(update={"gates": (wider,)}))
    with upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now)
    upgrade.run()
    assert upgrade.state() == "waiting"
    assert upgrade.item().verdicts["carry"]["criteria"][0]["bound"] == -0.25
    with upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now)
    upgrade.run()
    assert upgrade.state() == "promoted"


def test_a_plan_that_nobody_started_makes_room_for_a_newer_revision(upgrade: Upgrade, tmp_path: Path) -> None:
    upgrade.world.push_base(upgrade.v2, line="demo")
    request = UpgradeRequest(line="demo", to="demo")
    with upgrade.world.database.write() as session:
        forgotten = campaigns.create(session, ADMIN, request, upgrade.world.now).id
    upgrade.world.later(seconds=1)
    upgrade.begin(folder=tiny_base(tmp_path / "v3", seed=3), old="demo@r1")
    ended = upgrade.info(forgotten)
    assert (ended.state, ended.items[0].state) == ("aborted", "aborted")
    assert "the line moved on to demo@r3" in ended.reason


def test_a_plan_is_no_start_so_it_keeps_nobody_from_starting_the_same(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path, GOOD | {"carry": 1.0})
    upgrade.policy(POLICY)
    upgrade.serve()
    upgrade.world.push_base(upgrade.v2, line="demo")
    with upgrade.world.database.write() as session:
        forgotten = campaigns.create(session, ADMIN, UpgradeRequest(line="demo", to="demo"), upgrade.world.now).id
    upgrade.world.later(seconds=1)
    started = upgrade.begin()
    ended = upgrade.info(forgotten)
    assert (ended.state, ended.items[0].state) == ("aborted", "aborted")
    assert ended.reason == f"superseded: planned again as {started}, and nobody had started it"
    with world.database.write() as session, pytest.raises(MoveNotAllowed):
        campaigns.start(session, ADMIN, forgotten, world.now)
    with pytest.raises(CampaignExists):
        upgrade.begin()
    upgrade.run()
    assert upgrade.info(started).state == "finished"


# ── equal content, and what breaks ───────────────────────────────────────────


def test_a_suite_pushed_to_two_namespaces_is_one_suite(upgrade: Upgrade) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    upgrade.world.push_rows("suite", "team/twin", rows)
    upgrade.policy(Policy(gates=(GATE.model_copy(update={"suite": "team/twin"}), GATE), max_negative_flips=0.3))
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "promoted", upgrade.item().reason
    assert len([job for job in upgrade.jobs() if job.kind == "evaluate"]) == 2


def _forget(upgrade: Upgrade) -> None:
    with upgrade.world.database.write() as session:
        for row in session.exec(select(Evaluation)):
            session.delete(row)


def test_a_scoring_of_which_nothing_is_left_is_done_again(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    serving = next(iter(upgrade.tiers))
    asked = {"kind": "evaluate", "base": upgrade.old, "suite": "team/suite", "adapters": [serving], "bare": True}
    with upgrade.world.database.write() as session:
        jobs.submit(session, ADMIN, JobRequest(recipe=asked, namespace="team"), upgrade.world.now)
    upgrade.work()
    _forget(upgrade)
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "promoted", upgrade.item().reason


def test_what_is_scored_again_and_again_and_leaves_nothing_is_given_up(upgrade: Upgrade) -> None:
    upgrade.begin()
    for _ in range(5):
        upgrade.tick()
        upgrade.work()
        _forget(upgrade)
    assert upgrade.state() == "failed"
    assert "3 were done, and nothing is left of them" in upgrade.item().reason


def test_an_adapter_that_cannot_be_planned_keeps_nobody_else_from_it(
    upgrade: Upgrade, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = upgrade.serve("team/odd", seed=5)
    upgrade.skills["carry"] = 1.0
    real = jobs.training_of

    def breaks(session: Session, version: Version, base: str) -> FineTune | None:
        if version.digest == odd:
            raise ValueError("what nobody foresaw")
        return real(session, version, base)

    monkeypatch.setattr(jobs, "training_of", breaks)
    upgrade.begin()
    assert upgrade.item("team/odd").reason == "it cannot be planned: ValueError: what nobody foresaw"
    upgrade.run()
    assert (upgrade.state(), upgrade.state("team/odd")) == ("promoted", "failed")


def test_the_seconds_of_shared_references_are_told_and_counted_once(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.push("other/twin")  # the same content is scored by the same job
    upgrade.begin()
    upgrade.run()
    cost = upgrade.item().cost
    assert cost["reference_seconds"] == 3.0  # what serves on the old base, and the two bare bases
    assert cost["tiers"]["carry"]["seconds"] == 3.0


# ── pausing ──────────────────────────────────────────────────────────────────


def _pause(upgrade: Upgrade, campaign: str, *, running: bool = False) -> None:
    with upgrade.world.database.write() as session:
        campaigns.pause(session, ADMIN, campaign, upgrade.world.now, running=running)


def _resume(upgrade: Upgrade, campaign: str) -> set[str]:
    with upgrade.world.database.write() as session:
        return campaigns.resume(session, ADMIN, campaign, upgrade.world.now)[1]


def test_a_paused_campaign_begins_nothing_and_ends_the_same_when_it_goes_on(upgrade: Upgrade) -> None:
    upgrade.skills |= {"carry": 0.5, "warm-start": 1.0}
    campaign = upgrade.begin()
    upgrade.tick()
    _pause(upgrade, campaign)
    _pause(upgrade, campaign)  # twice is once
    assert upgrade.info(campaign).state == "paused"
    waiting = len(upgrade.jobs("queued"))
    assert waiting
    upgrade.run(3)
    assert (len(upgrade.jobs("queued")), upgrade.state()) == (waiting, "running")
    assert _resume(upgrade, campaign) == {"cpu"}
    assert _resume(upgrade, campaign) == set()
    upgrade.run()
    assert (upgrade.state(), upgrade.info(campaign).state) == ("promoted", "finished")


def _claimed(upgrade: Upgrade) -> Job:
    with upgrade.world.database.write() as session:
        request = ClaimRequest(queue="cpu", worker="w")
        job = jobs.claim(session, WORKER, request, upgrade.world.settings.lease_s, upgrade.world.now)
    assert job is not None
    return job


def test_a_running_job_goes_on_to_its_end_in_a_paused_campaign(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    job = _claimed(upgrade)
    _pause(upgrade, campaign)
    with upgrade.world.database.write() as session:
        jobs.finish(session, upgrade.world.store, WORKER, job.id, upgrade.results(job), upgrade.world.now)
    assert [found.state for found in upgrade.jobs() if found.id == job.id] == ["succeeded"]
    assert upgrade.work_one() is None


def test_a_job_that_a_pause_stopped_goes_on_later_and_has_used_up_no_attempt(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    campaign = upgrade.begin()
    upgrade.tick()
    for round_ in range(4):  # as often as one likes
        job = _claimed(upgrade)
        _pause(upgrade, campaign, running=True)
        _stops(upgrade, job)
        assert upgrade.work_one() is None, round_
        _resume(upgrade, campaign)
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "carry")


def _stops(upgrade: Upgrade, job: Job) -> None:
    """The worker heard that it is to stop."""
    with upgrade.world.database.write() as session:
        jobs.fail(
            session, WORKER, job.id, attempt=job.attempt, problem={"code": "work-failed", "detail": "cancelled"},
            retryable=False, cancelled=True, now=upgrade.world.now,
        )  # fmt: skip


def test_a_campaign_that_goes_on_before_its_worker_stopped_loses_nothing(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    campaign = upgrade.begin()
    upgrade.tick()
    job = _claimed(upgrade)
    _pause(upgrade, campaign, running=True)
    _resume(upgrade, campaign)
    _stops(upgrade, job)
    upgrade.run()
    assert upgrade.state() == "promoted"


def test_a_job_that_a_person_cancels_is_cancelled_in_a_paused_campaign_too(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    job = _claimed(upgrade)
    _pause(upgrade, campaign, running=True)
    with upgrade.world.database.write() as session:
        jobs.cancel(session, ADMIN, job.id, upgrade.world.now)
    _stops(upgrade, job)
    assert [found.state for found in upgrade.jobs() if found.id == job.id] == ["cancelled"]


def test_who_asks_for_the_same_work_is_not_kept_waiting_by_a_pause(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    _pause(upgrade, campaign)
    scoring = next(job for job in upgrade.jobs("queued") if job.kind == "evaluate")
    with upgrade.world.database.write() as session:
        request = JobRequest(recipe=scoring.recipe, namespace=scoring.namespace)
        assert jobs.submit(session, ADMIN, request, upgrade.world.now)[0].id == scoring.id
    done = upgrade.work_one()
    assert done is not None
    assert done.id == scoring.id


def test_a_paused_campaign_can_be_ended_and_one_that_is_not_running_not_paused(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    _pause(upgrade, campaign)
    with pytest.raises(CampaignExists):
        upgrade.begin()
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, campaign, "", upgrade.world.now)
    assert (upgrade.info(campaign).state, upgrade.state()) == ("aborted", "aborted")
    for move in (_pause, _resume):
        with pytest.raises(MoveNotAllowed, match="aborted"):
            move(upgrade, campaign)


# ── bounds ───────────────────────────────────────────────────────────────────


def test_no_more_adapters_are_begun_at_once_than_asked_for(upgrade: Upgrade) -> None:
    upgrade.serve("team/second", seed=1)
    upgrade.serve("team/third", seed=2)
    upgrade.skills["carry"] = 1.0
    upgrade.begin(parallel=2)
    upgrade.tick()
    assert sorted(item.state for item in upgrade.items()) == ["planned", "running", "running"]
    upgrade.run()
    assert {item.state for item in upgrade.items()} == {"promoted"}


def test_who_waits_for_a_word_takes_no_place(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"action": "ask"}))
    upgrade.serve("team/second", seed=1)
    upgrade.skills["carry"] = 1.0
    upgrade.begin(parallel=1)
    upgrade.run()
    assert {item.state for item in upgrade.items()} == {"waiting"}


def test_what_is_not_final_at_the_deadline_is_frozen(upgrade: Upgrade) -> None:
    campaign = upgrade.begin(deadline=upgrade.world.now + timedelta(minutes=5))
    upgrade.tick()
    upgrade.world.later(minutes=6)
    upgrade.tick()
    assert upgrade.state() == "frozen"
    assert "the deadline" in upgrade.item().reason
    assert not [job for job in upgrade.jobs("queued") if job.kind != "compare"]
    upgrade.tick()
    assert upgrade.info(campaign).state == "finished"


def test_a_promotion_that_nobody_approved_by_the_deadline_is_frozen(upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"action": "ask"}))
    upgrade.skills["carry"] = 1.0
    upgrade.begin(deadline=upgrade.world.now + timedelta(minutes=5))
    upgrade.run()
    assert upgrade.state() == "waiting"
    upgrade.world.later(minutes=6)
    upgrade.tick()
    assert "nobody approved it before the deadline" in upgrade.item().reason


def test_a_deadline_that_has_passed_is_refused(upgrade: Upgrade) -> None:
    with pytest.raises(BadRequest, match="has passed already"):
        upgrade.begin(deadline=upgrade.world.now)


def test_a_campaign_whose_budget_is_spent_begins_no_further_tier(upgrade: Upgrade) -> None:
    campaign = upgrade.begin(budget_seconds=2.0)
    upgrade.run()
    assert upgrade.state() == "frozen"
    assert "of the campaign's 2 seconds are spent before warm-start" in upgrade.item().reason
    assert upgrade.info(campaign).spent_seconds >= 2


# ── taking back ──────────────────────────────────────────────────────────────


def _roll_back(upgrade: Upgrade, campaign: str, adapter: str | None = None, who: Caller = ADMIN) -> None:
    with upgrade.world.database.write() as session:
        campaigns.roll_back(
            session, who, campaign, upgrade.world.now, adapter=adapter, alias="prod", reason="wrong answers"
        )


def _promoted(upgrade: Upgrade) -> str:
    upgrade.serve("team/second", seed=1)
    upgrade.skills["carry"] = 1.0
    campaign = upgrade.begin()
    upgrade.run()
    assert {item.state for item in upgrade.items()} == {"promoted"}
    return campaign


def test_one_adapter_is_taken_back_and_the_others_stay(upgrade: Upgrade) -> None:
    campaign = _promoted(upgrade)
    _roll_back(upgrade, campaign, "team/bot")
    _roll_back(upgrade, campaign, "team/bot")  # twice is once
    assert (upgrade.prod(upgrade.new), upgrade.prod(upgrade.old)) == (None, "serving")
    assert upgrade.prod(upgrade.new, "team/second") == "carry"
    assert upgrade.item().state == "frozen"
    assert upgrade.item().reason == "rolled back by admin: wrong answers"
    moves = upgrade.world.all(select(AliasMove).where(col(AliasMove.to_version_id).is_(None)))
    assert [(move.campaign_id, move.generation) for move in moves] == [(campaign, 2)]


def test_a_whole_campaign_is_taken_back_in_one_call_but_what_somebody_moved_since(upgrade: Upgrade) -> None:
    campaign = _promoted(upgrade)
    newer = upgrade.push("team/second", seed=9, base=upgrade.v2)
    upgrade.set_alias(newer, "team/second")
    _roll_back(upgrade, campaign)
    assert (upgrade.prod(upgrade.new), upgrade.state()) == (None, "frozen")
    assert upgrade.prod(upgrade.new, "team/second") == "serving"
    assert "somebody moved 'prod'" in upgrade.item("team/second").reason


def test_an_alias_that_was_taken_back_can_be_set_again_and_its_history_goes_on(upgrade: Upgrade) -> None:
    campaign = _promoted(upgrade)
    _roll_back(upgrade, campaign)
    upgrade.begin_again()
    upgrade.run()
    assert {item.state for item in upgrade.items()[-2:]} == {"promoted"}
    assert upgrade.prod(upgrade.new) == "carry"
    generations = select(AliasMove.generation).where(AliasMove.base_id == upgrade.world.one(
        select(Base.id).where(Base.digest == upgrade.new)
    ), AliasMove.adapter_id == 1).order_by(col(AliasMove.generation))  # fmt: skip
    assert upgrade.world.all(generations) == [1, 2, 3]


def test_a_campaign_that_runs_is_ended_before_all_of_it_is_taken_back(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    _roll_back(upgrade, campaign)
    assert (upgrade.info(campaign).state, upgrade.state()) == ("aborted", "aborted")
    with pytest.raises(MoveNotAllowed, match="roll back"):
        _roll_back(upgrade, campaign, "team/bot")


def test_taking_back_needs_the_right_to_promote(upgrade: Upgrade) -> None:
    campaign = _promoted(upgrade)
    for adapter in ("team/bot", None):
        with pytest.raises(ScopeMissing):
            _roll_back(upgrade, campaign, adapter, caller("reader", team=["read", "publish"]))


# ── routes ───────────────────────────────────────────────────────────────────


def test_a_route_waits_for_the_comparison_of_the_bases_and_follows_it(upgrade: Upgrade) -> None:
    upgrade.drift = 0.5
    upgrade.skills |= {"carry": 1.0, "warm-start": 1.0}
    upgrade.begin(compare=False)
    upgrade.tick()
    assert upgrade.state() == "planned"
    assert {job.kind for job in upgrade.jobs("queued")} == {"compare", "evaluate"}
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "warm-start")
    assert upgrade.item().plan["signals"]["drift"] == upgrade.item().plan["signals"]["most"] == 0.5
    assert not [job for job in upgrade.jobs() if job.recipe.get("tier") == "carry"]


def _retaining(upgrade: Upgrade) -> str:
    """Its policy retains inputs; their digest."""
    digest = upgrade.world.push_rows("dataset", "team/kept", b'{"prompt": "1+1="}\n')["digest"]
    upgrade.policy(POLICY.model_copy(update={"retained": "team/kept"}))
    return str(digest)


@pytest.mark.parametrize(
    ("signals", "tier"),
    [
        ({"cosine": 0.99, "alpha": 1.0, "excess": 0.1, "inside": 0.2}, "carry"),
        ({"cosine": 0.7, "alpha": 0.25}, "warm-start"),
        ({"cosine": "no number"}, "warm-start"),
        ({}, "warm-start"),
    ],
)
def test_where_inputs_are_retained_forward_passes_choose_the_route(
    upgrade: Upgrade, signals: dict[str, object], tier: str
) -> None:
    kept = _retaining(upgrade)
    upgrade.drift, upgrade.signals = 0.5, signals
    upgrade.skills |= {"carry": 1.0, "warm-start": 1.0}
    upgrade.begin()
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", tier)
    asked = [job for job in upgrade.jobs() if job.kind == "compare" and job.recipe["adapters"]]
    assert [(job.recipe["inputs"], job.namespace, len(job.recipe["adapters"])) for job in asked] == [(kept, "team", 1)]


def test_a_carry_chooses_nothing_where_that_costs_as_much_as_a_short_training(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    [carried] = [job.recipe for job in upgrade.jobs() if job.recipe.get("tier") == "carry"]
    assert carried["suite"] is None


def test_a_campaigns_carry_chooses_by_its_suite_and_the_inputs_that_are_retained(upgrade: Upgrade) -> None:
    kept = _retaining(upgrade)
    upgrade.serve(seed=1, steps=5000)
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    [carried] = [job.recipe for job in upgrade.jobs() if job.recipe.get("tier") == "carry"]
    assert (carried["inputs"], carried["training"]) == (kept, None)
    assert carried["suite"] == next(job.recipe["suite"] for job in upgrade.jobs() if job.kind == "evaluate")


def test_a_comparison_that_fails_leaves_the_route_as_it_is(upgrade: Upgrade) -> None:
    upgrade.fails.add("compare")
    upgrade.skills["carry"] = 1.0
    upgrade.begin()
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "carry")


def test_where_the_old_weights_are_gone_what_was_scored_before_is_retrained_from_scratch(upgrade: Upgrade) -> None:
    upgrade.skills["retrain"] = 1.0
    first = upgrade.begin()
    upgrade.tick()
    upgrade.work()
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, first, "", upgrade.world.now)
        base = session.exec(select(Base).where(Base.digest == upgrade.old)).one()
        base.weights = "absent"
        session.add(base)
    upgrade.begin_again(compare=False)
    assert upgrade.item().plan["route"] == "retrain"
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "retrain")
    assert [job.kind for job in upgrade.jobs("succeeded") if job.output["adapter"]][-1] == "finetune"


# ── bases that are none to go to ─────────────────────────────────────────────


def _plan(upgrade: Upgrade, **request: str) -> None:
    with upgrade.world.database.write() as session:
        campaigns.create(session, ADMIN, UpgradeRequest(line="demo", **request), upgrade.world.now)


def test_a_base_that_is_no_revision_of_the_line_is_no_successor(upgrade: Upgrade, tmp_path: Path) -> None:
    upgrade.world.push_base(tiny_base(tmp_path / "foreign", seed=9), line="other")
    with pytest.raises(NotASuccessor, match="other@r1 is no successor of demo@r1 in line 'demo': it is no revision"):
        _plan(upgrade, to="other@r1")
    with upgrade.world.database.read() as session:  # what it would do may be asked all the same
        request = UpgradeRequest(line="demo", to="other@r1")
        assert len(campaigns.plan(session, ADMIN, request, upgrade.world.now)[1]) == 1


def test_an_older_revision_is_no_successor(upgrade: Upgrade) -> None:
    upgrade.world.push_base(upgrade.v2, line="demo")
    with pytest.raises(NotASuccessor, match="it is r1, and the other r2"):
        _plan(upgrade, to="demo@r1", old="demo@r2")
    with pytest.raises(BadRequest, match="nothing changes"):
        _plan(upgrade, to="demo@r2", old="demo@r2")


def test_a_campaign_that_is_started_twice_is_started_once(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    before = len(upgrade.jobs())
    with upgrade.world.database.write() as session:
        campaigns.start(session, ADMIN, campaign, upgrade.world.now)
    assert len(upgrade.jobs()) == before
    assert len(upgrade.world.all(select(Decision).where(Decision.kind == "started"))) == 1


# ── work that others want too, and what is taken back ────────────────────────


def _offered(upgrade: Upgrade) -> Job | None:
    upgrade.world.later(seconds=1)
    with upgrade.world.database.write() as session:
        request = ClaimRequest(queue="cpu", worker="w")
        return jobs.claim(session, WORKER, request, upgrade.world.settings.lease_s, upgrade.world.now)


def _handed_back(upgrade: Upgrade, job: Job, *, again: bool = True) -> None:
    problem = {"code": "work-failed", "detail": "its worker stopped"}
    with upgrade.world.database.write() as session:
        jobs.fail(
            session, WORKER, job.id, attempt=job.attempt, problem=problem, retryable=again, cancelled=again,
            now=upgrade.world.now,
        )  # fmt: skip


def _aborted(upgrade: Upgrade, campaign: str) -> None:
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, campaign, "again", upgrade.world.now)


def test_work_that_is_being_stopped_goes_on_for_who_asks_for_it_again(upgrade: Upgrade) -> None:
    upgrade.skills["carry"] = 1.0
    campaign = upgrade.begin()
    upgrade.tick()
    while (job := _claimed(upgrade)).kind != "rebase":
        with upgrade.world.database.write() as session:
            done = upgrade.results(job)
            jobs.finish(session, upgrade.world.store, WORKER, job.id, done, upgrade.world.now)
    _aborted(upgrade, campaign)
    assert upgrade.world.one(select(Job.cancel_requested).where(Job.id == job.id))
    upgrade.begin_again(compare=False)
    upgrade.tick()
    assert not upgrade.world.one(select(Job.cancel_requested).where(Job.id == job.id))
    _handed_back(upgrade, job)  # its worker had heard that it shall stop
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "carry")
    assert len([one for one in upgrade.jobs() if one.kind == "rebase"]) == 1


def test_who_was_given_a_campaigns_job_keeps_it_when_the_campaign_ends(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    queued = next(job for job in upgrade.jobs("queued") if job.kind == "evaluate")
    others = [job for job in upgrade.jobs("queued") if job.id != queued.id]
    ann = upgrade.world.grant(caller("ann", team=["run", "read"], base=["run"]))
    for _ in range(2):  # asking twice says nothing new
        with upgrade.world.database.write() as session:
            request = JobRequest(recipe=queued.recipe, namespace=queued.namespace)
            found, reused = jobs.submit(session, ann, request, upgrade.world.now)
        assert (found.id, reused) == (queued.id, True)
    _aborted(upgrade, campaign)
    states = {job.id: job.state for job in upgrade.jobs()}
    assert states[queued.id] == "queued"
    assert {states[job.id] for job in others} <= {"cancelled"}


def test_a_candidate_that_was_taken_back_is_passed_over(upgrade: Upgrade) -> None:
    upgrade.skills |= {"carry": 1.0, "warm-start": 1.0}
    campaign = upgrade.begin()
    upgrade.run()
    assert upgrade.item().tier == "carry"
    with upgrade.world.database.write() as session:
        campaigns.roll_back(session, ADMIN, campaign, upgrade.world.now, adapter=None, alias="prod", reason="bad")
    with upgrade.world.database.write() as session:
        version = session.get_one(Version, upgrade.items()[0].final_id)
        adapter = session.get_one(Adapter, version.adapter_id)
        withdrawals.move(
            session, ADMIN, adapter, version, "yank", reason="bad", force=True, now=upgrade.world.now
        )
    upgrade.begin_again(compare=False)
    upgrade.run()
    assert (upgrade.state(), upgrade.item().tier) == ("promoted", "warm-start"), upgrade.item().reason


def test_what_was_spent_before_the_alias_moved_is_spent(upgrade: Upgrade) -> None:
    upgrade.begin()
    upgrade.run(rounds=3)
    before = Facts.model_validate(upgrade.items()[0].facts).spent
    assert before > 0
    upgrade.serve(seed=7)
    upgrade.tick()
    facts = Facts.model_validate(upgrade.items()[0].facts)
    assert facts.spent_before == before
    assert facts.spent >= before


def test_a_pause_also_holds_what_goes_back_to_the_queue(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    upgrade.tick()
    job = _claimed(upgrade)
    with upgrade.world.database.write() as session:
        campaigns.pause(session, ADMIN, campaign, upgrade.world.now)
    _handed_back(upgrade, job)
    assert _offered(upgrade) is None
    with upgrade.world.database.write() as session:
        campaigns.resume(session, ADMIN, campaign, upgrade.world.now)
    again = _offered(upgrade)
    assert again is not None
    assert again.id == job.id


def test_what_attempts_without_a_result_took_is_spent(upgrade: Upgrade) -> None:
    campaign = upgrade.begin(budget_seconds=100.0)
    upgrade.tick()
    while (job := _claimed(upgrade)).kind != "rebase":
        with upgrade.world.database.write() as session:
            done = upgrade.results(job)
            jobs.finish(session, upgrade.world.store, WORKER, job.id, done, upgrade.world.now)
    with upgrade.world.database.read() as session:
        before = reading.spent_by(session, session.get_one(Campaign, campaign))
    upgrade.world.later(seconds=40)
    _handed_back(upgrade, job)
    with upgrade.world.database.read() as session:
        assert reading.spent_by(session, session.get_one(Campaign, campaign)) == pytest.approx(before + 40)
    again = _offered(upgrade)
    assert again is not None
    upgrade.world.later(seconds=70)
    _handed_back(upgrade, again, again=False)
    upgrade.tick()
    assert Facts.model_validate(upgrade.items()[0].facts).tier("carry").seconds == pytest.approx(110)
    upgrade.run()
    assert (upgrade.state(), "seconds are spent" in upgrade.item().reason) == ("frozen", True)
