"""A pool from its policy to the verdict: asked, compared, labelled by a person, judged once."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import select

from registry.core.errors import (
    BadRequest,
    DatasetNotFound,
    LabelsContradict,
    LabelsForeign,
    LabelsMissing,
    MoveNotAllowed,
    NoLabelsWanted,
    PoolUnusable,
    ScopeMissing,
)
from registry.core.policy import Gate, Margin, Policy
from registry.db.models import AuditRow, Decision, PoolAnswers, PoolPaper
from registry.schemas import ClaimRequest, LabelsRequest
from registry.services import campaigns, collection, jobs
from registry.services.blobs import blob_key
from registry.services.tokens import Caller
from tests.upgrade import HARNESS, INPUTS, OTHER_HARNESS, POLICY, ROWS, WORKER, Upgrade
from tests.world import ADMIN, World, caller

GOOD = {"serving": 1.0, "bare-old": 0.0, "bare": 0.0}
WITH_POOL = POLICY.model_copy(
    update={
        "pool": "team/inputs",
        "tiers": ("carry",),
        "gates": (POLICY.gates[0].model_copy(update={"margin": Margin(value=0.1)}),),
    }
)
UNSURE = 0.93
"""The share of items that a candidate gets right that the suite cannot tell from one that is a margin worse."""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prepared(world: World, folder: Path, policy: Policy = WITH_POOL) -> Upgrade:
    made = Upgrade(world, folder, GOOD | {"carry": UNSURE})
    world.push_rows("dataset", "team/inputs", lines(INPUTS))
    made.policy(policy)
    made.serve()
    made.differs["carry"] = 60
    return made


@pytest.fixture
def upgrade(embedded: World, tmp_path: Path) -> Upgrade:
    """An adapter whose carry the suite cannot tell from a worse one, with a pool of 600 inputs, of which 60 differ."""
    return prepared(embedded, tmp_path)


@pytest.fixture
def asking(upgrade: Upgrade) -> str:
    """The campaign, once it waits for labels."""
    campaign = upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "waiting", upgrade.item().reason
    return campaign


def paper(upgrade: Upgrade, campaign: str, who: Caller = ADMIN) -> list[dict[str, Any]]:
    with upgrade.world.database.read() as session:
        info = campaigns.disagreements(session, upgrade.world.store, who, campaign, "team/bot", "prod")
    return [json.loads(line) for line in info.lines.splitlines()]


def filled(rows: list[dict[str, Any]], right: str = "b", but: int = 0) -> list[dict[str, Any]]:
    """Labelled so that ``right`` is the right answer, but in the last few rows."""
    found = []
    for n, row in enumerate(rows):
        letter = {text: letter for letter, text in row["answers"].items()}
        text = right if n < len(rows) - but else {"a": "b", "b": "a"}[right]
        found.append(row | {"right": letter[text]})
    return found


def give(upgrade: Upgrade, campaign: str, rows: list[dict[str, Any]], who: Caller = ADMIN) -> None:
    with upgrade.world.database.write() as session:
        request = LabelsRequest(adapter="team/bot", lines=lines(rows).decode())
        campaigns.label(session, upgrade.world.store, who, campaign, request, upgrade.world.now)


def kinds(upgrade: Upgrade) -> list[str]:
    return [row.kind for row in upgrade.world.all(select(Decision).order_by(Decision.id)) if row.adapter_id]  # type: ignore[arg-type]  # a column


# ── the way through ──────────────────────────────────────────────────────────


def test_what_the_suite_cannot_tell_waits_for_labels_and_shows_how_many(upgrade: Upgrade, asking: str) -> None:
    item = upgrade.item()
    assert item.pool is not None
    assert (item.pool.n, item.pool.differ, item.pool.waits, item.pool.tier) == (600, 60, True, "carry")
    assert "waits for labels: 60 of 600 answers differ between carry and what serves" in item.reason
    assert upgrade.prod(upgrade.new) is None
    answered = [job for job in upgrade.jobs() if job.kind == "answers"]
    assert {job.base for job in answered} == {upgrade.old, upgrade.new}
    assert item.cost["seconds"] == 2.0 + 1.0 + 2 * 1.5


def test_the_file_says_nothing_of_whose_an_answer_is(upgrade: Upgrade, asking: str) -> None:
    rows = paper(upgrade, asking)
    assert len(rows) == 60
    assert all(set(row) == {"item", "prompt", "choices", "answers", "right"} and row["right"] is None for row in rows)
    assert {row["answers"]["a"] for row in rows} == {"a", "b"} == {row["answers"]["b"] for row in rows}


def test_labels_that_favour_the_candidate_promote_it_by_a_verdict_on_all_inputs(upgrade: Upgrade, asking: str) -> None:
    give(upgrade, asking, filled(paper(upgrade, asking), but=30))
    upgrade.run()
    item = upgrade.item()
    assert (item.state, upgrade.prod(upgrade.new)) == ("promoted", "carry"), item.reason
    assert item.pool is not None and item.pool.verdict is not None
    judged = {told["name"]: told for told in item.pool.verdict["criteria"]}
    assert (judged["not-worse"]["n"], judged["not-worse"]["suite"], judged["not-worse"]["estimate"]) == (
        600, "team/inputs", 0.0,
    )  # fmt: skip
    assert judged["adds-value"]["suite"] == "team/suite"
    assert item.pool.verdict["alpha"] == item.verdicts["carry"]["alpha"] == POLICY.alpha / 2
    assert kinds(upgrade) == ["route", "verdict", "asked", "labelled", "pool", "outcome"]
    labelled = next(row for row in upgrade.world.all(select(Decision)) if row.kind == "labelled")
    assert labelled.actor == ADMIN.token_id
    moved = upgrade.info(asking)
    assert moved.state == "finished"


def test_labels_that_favour_what_serves_leave_it_where_it_is(embedded: World, tmp_path: Path) -> None:
    upgrade = prepared(embedded, tmp_path)
    upgrade.differs["carry"] = 150
    campaign = upgrade.begin()
    upgrade.run()
    give(upgrade, campaign, filled(paper(upgrade, campaign), "a"))
    upgrade.run()
    assert upgrade.state() == "frozen"
    told = "no tier passed, nor did the pool for carry: 150 of 600 inputs of team/inputs differ"
    assert told in upgrade.item().reason
    assert upgrade.prod(upgrade.new) is None


def test_where_nothing_differs_nobody_is_asked(upgrade: Upgrade) -> None:
    upgrade.differs["carry"] = 0
    upgrade.begin()
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "carry")
    assert not upgrade.world.all(select(PoolPaper))


def test_where_no_label_would_help_nobody_is_asked(upgrade: Upgrade) -> None:
    """A candidate that differs from what serves nowhere but adds nothing over the bare base, which answers the same."""
    upgrade.skills |= {"bare": 0.9}
    upgrade.differs |= {"carry": 0, "bare": 0}
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "frozen", upgrade.item().reason
    assert "adds-value unresolved" in upgrade.item().reason
    assert not upgrade.world.all(select(PoolPaper))


def test_the_bare_base_is_asked_where_its_value_is_open_and_on_few_inputs(upgrade: Upgrade) -> None:
    upgrade.skills |= {"bare": 0.88}
    upgrade.differs |= {"carry": 0, "bare": 500}
    campaign = upgrade.begin()
    upgrade.run()
    item = upgrade.item()
    assert item.pool is not None
    assert item.state == "waiting", item.reason
    assert (item.pool.differ, item.pool.n) == (300, 600)
    give(upgrade, campaign, filled(paper(upgrade, campaign), "a"))
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "carry"), upgrade.item().reason
    verdict = upgrade.item().pool.verdict  # type: ignore[union-attr]  # it is there, as above
    assert verdict is not None
    assert {told["name"]: told["n"] for told in verdict["criteria"]}["adds-value"] == 300


def test_a_policy_that_asks_asks_again_after_the_labels(embedded: World, tmp_path: Path) -> None:
    upgrade = prepared(embedded, tmp_path, WITH_POOL.model_copy(update={"action": "ask"}))
    campaign = upgrade.begin()
    upgrade.run()
    with pytest.raises(MoveNotAllowed, match="it waits for labels"), upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now)
    give(upgrade, campaign, filled(paper(upgrade, campaign), but=30))
    upgrade.run()
    assert upgrade.state() == "waiting"
    assert upgrade.item().pool.waits is False  # type: ignore[union-attr]  # it is there
    with upgrade.world.database.write() as session:
        campaigns.approve(session, ADMIN, campaign, "team/bot", "prod", upgrade.world.now)
    upgrade.run()
    assert upgrade.state() == "promoted"


def test_both_databases_and_stores_carry_labels_through(world: World, tmp_path: Path) -> None:
    upgrade = prepared(world, tmp_path)
    campaign = upgrade.begin()
    upgrade.run()
    give(upgrade, campaign, filled(paper(upgrade, campaign), but=30))
    upgrade.run()
    assert upgrade.state() == "promoted"
    assert world.one(select(AuditRow.subject).where(AuditRow.event == "upgrade.labelled")) == campaign


def test_what_a_pool_names_is_not_collected(upgrade: Upgrade, asking: str) -> None:
    rows, world = filled(paper(upgrade, asking), but=30), upgrade.world

    def collect() -> None:
        for _ in range(2):
            collection.mark(world.database, world.now, "sha256:")
            world.later(hours=3)
            collection.collect(world.database, world.store, world.now, timedelta(hours=2))

    collect()
    give(upgrade, asking, rows)
    collect()
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "carry")
    kept = world.all(select(PoolAnswers.answers)) + [
        digest for row in world.all(select(PoolPaper)) for digest in (row.paper, row.labels)
    ]
    assert len(kept) == 4
    assert all(world.store.head(blob_key(digest)) is not None for digest in kept)


# ── labels that are refused ──────────────────────────────────────────────────


def test_missing_foreign_and_contradicting_labels_are_refused_and_change_nothing(upgrade: Upgrade, asking: str) -> None:
    rows = filled(paper(upgrade, asking))
    with pytest.raises(LabelsMissing, match="1 of the 60"):
        give(upgrade, asking, rows[1:])
    with pytest.raises(LabelsForeign, match="Line 61"):
        give(upgrade, asking, [*rows, rows[0] | {"item": "0" * 16}])
    other = "a" if rows[0]["right"] == "b" else "b"
    with pytest.raises(LabelsContradict, match=rows[0]["item"]):
        give(upgrade, asking, [*rows, rows[0] | {"right": other}])
    upgrade.run(2)
    assert upgrade.state() == "waiting"
    assert "labelled" not in kinds(upgrade)


def test_the_same_labels_again_change_nothing_and_others_are_refused(upgrade: Upgrade, asking: str) -> None:
    rows = filled(paper(upgrade, asking), but=30)
    give(upgrade, asking, rows)
    give(upgrade, asking, list(reversed(rows)))
    with pytest.raises(LabelsContradict):
        give(upgrade, asking, filled(rows))
    upgrade.run()
    give(upgrade, asking, rows)
    with pytest.raises(LabelsContradict):
        give(upgrade, asking, filled(rows))
    assert kinds(upgrade).count("labelled") == 1
    assert upgrade.state() == "promoted"


def test_labels_that_come_too_early_or_too_late_are_refused(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    with pytest.raises(NoLabelsWanted, match="it is planned"):
        give(upgrade, campaign, [])
    upgrade.run()
    rows = filled(paper(upgrade, campaign))
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, campaign, "", upgrade.world.now)
    with pytest.raises(NoLabelsWanted, match="aborted already"):
        give(upgrade, campaign, rows)
    assert upgrade.state() == "aborted"


def test_labelling_takes_the_right_to_promote_and_looking_the_right_to_read_the_inputs(
    upgrade: Upgrade, asking: str
) -> None:
    rows = filled(paper(upgrade, asking))
    with pytest.raises(ScopeMissing):
        give(upgrade, asking, rows, caller("reader", team=["read"]))
    with pytest.raises(ScopeMissing):
        paper(upgrade, asking, caller("reader", team=["read"]))


# ── what happens meanwhile ───────────────────────────────────────────────────


def test_nobody_labelled_by_the_deadline_so_it_is_frozen(upgrade: Upgrade) -> None:
    campaign = upgrade.begin(deadline=upgrade.world.now + timedelta(hours=1))
    upgrade.run()
    rows = filled(paper(upgrade, campaign))
    upgrade.world.later(hours=2)
    upgrade.run()
    assert upgrade.state() == "frozen"
    assert "nobody labelled by the deadline" in upgrade.item().reason
    with pytest.raises(NoLabelsWanted):
        give(upgrade, campaign, rows)


def test_labels_that_come_while_it_is_paused_are_judged_when_it_goes_on(upgrade: Upgrade, asking: str) -> None:
    with upgrade.world.database.write() as session:
        campaigns.pause(session, ADMIN, asking, upgrade.world.now)
    give(upgrade, asking, filled(paper(upgrade, asking), but=30))
    upgrade.run(2)
    assert upgrade.state() == "waiting"
    with upgrade.world.database.write() as session:
        campaigns.resume(session, ADMIN, asking, upgrade.world.now)
    upgrade.run()
    assert upgrade.state() == "promoted"


def test_a_new_version_meanwhile_makes_labels_of_the_old_one_useless(upgrade: Upgrade, asking: str) -> None:
    upgrade.serve(seed=7)
    upgrade.differs["carry"] = 70
    upgrade.run()
    item = upgrade.item()
    assert (item.state, item.serving) == ("waiting", "v3")
    assert item.pool is not None and item.pool.differ == 70
    assert len(upgrade.world.all(select(PoolAnswers))) == 4


def test_a_wider_margin_meanwhile_judges_the_same_answers_anew(upgrade: Upgrade, asking: str) -> None:
    wider = WITH_POOL.gates[0].model_copy(update={"margin": Margin(value=0.3)})
    upgrade.policy(WITH_POOL.model_copy(update={"gates": (wider,)}))
    upgrade.run()
    assert (upgrade.state(), upgrade.prod(upgrade.new)) == ("promoted", "carry")


def test_a_suite_that_grows_doubtful_of_the_value_has_the_bare_base_asked_too(upgrade: Upgrade, asking: str) -> None:
    """Answers are there, of the two alone; then the suite changes, and its verdict leaves the value open as well."""
    upgrade.skills["bare"] = 0.88
    upgrade.differs["bare"] = 500
    suite = [*ROWS, {"prompt": "one more", "choices": [" a", " b"], "answer": 0}]
    upgrade.rows = suite
    upgrade.world.push_rows("suite", "team/suite", lines(suite))
    upgrade.run()
    item = upgrade.item()
    assert item.pool is not None
    assert (item.state, item.pool.waits) == ("waiting", True), item.reason
    answered = [job for job in upgrade.jobs() if job.kind == "answers"]
    assert [job.recipe["bare"] for job in answered].count(True) == 1


def test_a_policy_that_names_no_pool_any_more_freezes_what_waits(upgrade: Upgrade, asking: str) -> None:
    upgrade.policy(WITH_POOL.model_copy(update={"pool": None}))
    upgrade.run()
    assert upgrade.state() == "frozen"


def test_a_pool_that_cannot_be_answered_is_told_and_nothing_moves(upgrade: Upgrade) -> None:
    upgrade.fails = {"answers"}
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "frozen"
    assert "the pool was not answered: it broke" in upgrade.item().reason
    assert kinds(upgrade).count("lost") == 1


def test_answers_of_two_harnesses_are_not_compared(upgrade: Upgrade) -> None:
    upgrade.harness = lambda job: OTHER_HARNESS if job.kind == "answers" and job.base == upgrade.old else HARNESS
    upgrade.begin()
    upgrade.run()
    assert upgrade.state() == "frozen"
    assert "two harnesses" in upgrade.item().reason


def test_an_adapter_that_is_aborted_ends_its_answers_too(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    for _ in range(10):
        upgrade.tick()
        if any(job.kind == "answers" for job in upgrade.jobs("queued")):
            break
        upgrade.work()
    with upgrade.world.database.write() as session:
        campaigns.abort(session, ADMIN, campaign, "", upgrade.world.now)
    assert {job.state for job in upgrade.jobs() if job.kind == "answers"} == {"cancelled"}


def test_a_crash_after_any_step_asks_once_and_judges_once(upgrade: Upgrade) -> None:
    campaign = upgrade.begin()
    for _ in range(20):
        for item in upgrade.items():
            assert item.id is not None
            for crash in (True, False, False):
                try:
                    with upgrade.world.database.write() as session:
                        campaigns.step(session, upgrade.world.store, item.id, upgrade.world.now)
                        if crash:
                            raise RuntimeError
                except RuntimeError:
                    pass
        if upgrade.work_one() is None:
            if upgrade.state() != "waiting":
                break
            give(upgrade, campaign, filled(paper(upgrade, campaign), but=30))
    assert upgrade.state() == "promoted"
    assert [job.kind for job in upgrade.jobs()].count("answers") == 2
    assert len(upgrade.world.all(select(PoolPaper))) == 1
    assert [kinds(upgrade).count(kind) for kind in ("asked", "labelled", "pool", "outcome")] == [1, 1, 1, 1]


def test_what_was_trained_on_is_left_out_of_the_pool(upgrade: Upgrade, asking: str) -> None:
    answered = [job for job in upgrade.jobs() if job.kind == "answers"]
    assert [job.recipe["apart"] for job in answered] == [[upgrade.data]] * 2


def test_answers_that_nobody_asked_for_or_to_other_inputs_are_refused(upgrade: Upgrade) -> None:
    upgrade.skills["bare"] = 0.88
    upgrade.begin()
    for _ in range(10):
        upgrade.tick()
        if job := next((job for job in upgrade.jobs("queued") if job.kind == "answers" and job.recipe["bare"]), None):
            break
        upgrade.work()
    assert job is not None
    with upgrade.world.database.write() as session:
        while (claimed := jobs.claim(session, WORKER, ClaimRequest(queue="cpu", worker="w"), 60, upgrade.world.now)):
            if claimed.id == job.id:
                break
        assert claimed is not None
        good = upgrade.results(claimed)
    first, second = good.answers
    short = first.model_copy(update={"answers": first.answers.split("\n", 1)[1]})
    for told in ([first], [first, first], [short, second]):
        request = good.model_copy(update={"answers": told})
        with pytest.raises(BadRequest), upgrade.world.database.write() as session:
            jobs.finish(session, upgrade.world.store, WORKER, job.id, request, upgrade.world.now)
    assert not upgrade.world.all(select(PoolAnswers))


# ── policies ─────────────────────────────────────────────────────────────────


def test_a_pool_that_can_decide_nothing_is_refused_with_the_reason(upgrade: Upgrade) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(PoolUnusable, match=match):
            upgrade.policy(WITH_POOL.model_copy(update=changes))

    likely = Gate(suite="team/suite", metric="likelihood", margin=Margin(value=0.1))
    for metric in ("likelihood", "f1", "bleu", "custom:mine"):
        refused("equal texts prove nothing", gates=(likely.model_copy(update={"metric": metric}),))
    refused("lm-eval makes its questions", gates=(likely.model_copy(update={"metric": "lm-eval:acc"}),))
    match = POLICY.gates[0].model_copy(update={"metric": "exact-match"})
    refused("exactly one", gates=(WITH_POOL.gates[0], match))
    refused("no suite gates it", gates=())
    refused("it is what the policy retains", retained="team/inputs")
    upgrade.world.push_rows("dataset", "team/few", lines(INPUTS[:20]))
    refused("it has 20 rows; with the gate's margin nothing can pass below", pool="team/few")
    with pytest.raises(DatasetNotFound):
        upgrade.policy(WITH_POOL.model_copy(update={"pool": "team/input"}))


def test_a_pool_takes_its_share_of_alpha_from_the_tiers(upgrade: Upgrade) -> None:
    upgrade.policy(WITH_POOL.model_copy(update={"tiers": ("carry", "warm-start", "retrain")}))
    upgrade.begin()
    upgrade.run()
    alphas = {tier: verdict["alpha"] for tier, verdict in upgrade.item().verdicts.items()}
    assert alphas["carry"] == POLICY.alpha / 2
    assert alphas["retrain"] == pytest.approx(POLICY.alpha / 6)


def test_a_plan_says_that_the_pool_is_gone(upgrade: Upgrade) -> None:
    """Whoever runs the campaign must be able to read it."""
    upgrade.world.push_rows("dataset", "other/inputs", lines(INPUTS))
    upgrade.policy(WITH_POOL.model_copy(update={"pool": "other/inputs"}))
    upgrade.begin(caller("runner", team=["read", "run", "promote"]))
    item = upgrade.item()
    assert item.pool is not None
    assert "other/inputs" in item.pool.missing
    assert any(told.startswith("the pool is not asked") for told in item.plan["missing"])
    upgrade.run()
    assert "the pool was not asked" in upgrade.item().reason
