"""The campaign: every route of one adapter through an upgrade, and that every route ends once."""

from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.core.campaign import (
    Abort,
    Action,
    EvaluateBare,
    EvaluateBareOld,
    EvaluateCandidate,
    EvaluateServing,
    Expected,
    Facts,
    Fail,
    FitClass,
    Freeze,
    Item,
    Judge,
    Produce,
    Progress,
    Promote,
    Replan,
    Retire,
    Settle,
    State,
    Step,
    SuiteFacts,
    TierFacts,
    Wait,
    WaitForApproval,
    cost,
    explain,
    next_actions,
    plan_line,
    possible_tiers,
    tier_alphas,
)
from registry.core.gate import Criterion, Name, Verdict, Zone
from registry.core.lifecycle import JobState
from registry.core.policy import Gate, Margin, Policy
from registry.core.recipes import TIERS, Tier
from registry.core.route import Signals

OLD, NEW = "b3:" + "1" * 64, "b3:" + "2" * 64
SERVING, OTHER = "sha256:" + "a" * 64, "sha256:" + "f" * 64
MADE: dict[Tier, str] = {tier: "sha256:" + str(i) * 64 for i, tier in enumerate(TIERS, start=1)}
GATE = Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.01))
OF_GAIN = Gate(suite="team/suite", metric="likelihood", margin=Margin(value=0.02, of_gain=True))
POLICY = Policy(gates=(GATE,))
DONE, RUNS = Progress(job=JobState.SUCCEEDED), Progress(job=JobState.RUNNING)
LOST = Progress(job=JobState.FAILED, error="broke")
FACTS = Facts(
    adapter="team/bot", line="demo", old=OLD, new=NEW, serving=SERVING, serving_now=SERVING, policy=POLICY,
    fit="same-shape", recipe=True, datasets=True, suites=(SuiteFacts(suite="team/suite", gate_n=1000),),
)  # fmt: skip
READY = FACTS.model_copy(update={"serving_scores": DONE, "bare_scores": DONE})


def criterion(name: Name, zone: Zone, estimate: float = 0.0) -> Criterion:
    return Criterion(
        name=name, suite="team/suite", metric="accuracy", estimate=estimate, lower=estimate - 0.01,
        upper=estimate + 0.01, bound=-0.01, zone=zone, n=1000,
    )  # fmt: skip


def verdict(
    zone: Zone, *, adds: Zone = Zone.PASS, bare: Zone = Zone.FAIL, estimate: float = 0.0, reason: str = "because"
) -> Verdict:
    criteria = (criterion("not-worse", zone, estimate), criterion("adds-value", adds))
    return Verdict(zone=zone, criteria=criteria, reason=reason, alpha=0.02, bare=(criterion("not-worse", bare),))


def judged(tier: Tier, outcome: Verdict, **changes: object) -> TierFacts:
    known = {"produce": DONE, "version": MADE[tier], "evaluate": DONE, "verdict": outcome}
    return TierFacts.model_validate({"tier": tier, **known, **changes})


def having(*tiers: TierFacts, base: Facts = READY, **changes: object) -> Facts:
    return base.model_copy(update={"tiers": tiers, **changes})


def only(step: Step) -> Action:
    assert len(step.actions) == 1
    return step.actions[0]


# ── the usual way ────────────────────────────────────────────────────────────


def test_it_begins_with_the_cheapest_tier_and_what_it_is_compared_with() -> None:
    step = next_actions(State.PLANNED, FACTS)
    assert step == Step(
        State.RUNNING, (EvaluateServing(SERVING, OLD), EvaluateBare(NEW), Produce("carry", SERVING, OLD, NEW))
    )


def test_a_margin_of_gain_needs_the_bare_old_base_too() -> None:
    facts = FACTS.model_copy(update={"policy": Policy(gates=(OF_GAIN,))})
    assert EvaluateBareOld(OLD) in next_actions(State.PLANNED, facts).actions
    ready = having(judged("carry", verdict(Zone.PASS), verdict=None), policy=Policy(gates=(OF_GAIN,)))
    assert next_actions(State.RUNNING, ready).actions == (EvaluateBareOld(OLD),)
    assert isinstance(only(next_actions(State.RUNNING, ready.model_copy(update={"bare_old_scores": DONE}))), Judge)


def test_what_was_made_is_evaluated_then_judged_then_promoted_then_settled() -> None:
    made = TierFacts(tier="carry", produce=DONE, version=MADE["carry"])
    assert only(next_actions(State.RUNNING, having(made))) == EvaluateCandidate("carry", MADE["carry"], NEW)
    scored = made.model_copy(update={"evaluate": DONE})
    assert only(next_actions(State.RUNNING, having(scored))) == Judge("carry", 0.01)
    passed = having(judged("carry", verdict(Zone.PASS)))
    assert only(next_actions(State.RUNNING, passed)) == Promote("carry", MADE["carry"], "prod", 0, SERVING)
    moved = passed.model_copy(update={"new_alias": MADE["carry"], "generation": 1})
    final = next_actions(State.RUNNING, moved)
    assert final.state is State.PROMOTED
    assert isinstance(only(final), Settle)
    assert next_actions(State.PROMOTED, moved) == Step(State.PROMOTED)


def test_running_jobs_are_waited_for() -> None:
    for mine in (
        TierFacts(tier="carry", produce=RUNS),
        TierFacts(tier="carry", produce=DONE),  # the version is not yet registered
        TierFacts(tier="carry", produce=DONE, version=MADE["carry"], evaluate=RUNS),
    ):
        assert isinstance(only(next_actions(State.RUNNING, having(mine))), Wait)
    scored = judged("carry", verdict(Zone.PASS), verdict=None)
    assert isinstance(only(next_actions(State.RUNNING, having(scored, bare_scores=RUNS))), Wait)


@pytest.mark.parametrize("zone", [Zone.FAIL, Zone.UNRESOLVED])
def test_what_does_not_pass_gives_way_to_the_next_tier(zone: Zone) -> None:
    step = next_actions(State.RUNNING, having(judged("carry", verdict(zone))))
    assert only(step) == Produce("warm-start", SERVING, OLD, NEW)


def test_a_tier_whose_job_failed_gives_way_to_the_next_one() -> None:
    unscored = TierFacts(tier="carry", produce=DONE, version=MADE["carry"], evaluate=LOST)
    for lost in (TierFacts(tier="carry", produce=LOST), unscored):
        assert only(next_actions(State.RUNNING, having(lost))) == Produce("warm-start", SERVING, OLD, NEW)


def test_a_carried_version_is_carried_on_from_the_original() -> None:
    facts = READY.model_copy(update={"source": OTHER})
    assert only(next_actions(State.PLANNED, facts)) == Produce("carry", OTHER, OLD, NEW)


# ── the other ends ───────────────────────────────────────────────────────────


def test_when_no_tier_passes_it_freezes_with_the_reason_of_the_nearest() -> None:
    facts = having(
        judged("carry", verdict(Zone.FAIL, reason="far off")),
        judged("warm-start", verdict(Zone.UNRESOLVED, estimate=-0.02, reason="nearly")),
        judged("retrain", verdict(Zone.UNRESOLVED, estimate=-0.01, reason="nearer")),
    )
    step = next_actions(State.RUNNING, facts)
    assert step.state is State.FROZEN
    assert step.reason == "no tier passed; nearest was retrain: nearer"


def test_when_nothing_could_be_judged_it_failed() -> None:
    step = next_actions(State.RUNNING, having(*(TierFacts(tier=tier, produce=LOST) for tier in TIERS)))
    assert step.state is State.FAILED
    assert step.reason.startswith("no tier could be judged; carry: making it broke")
    step = next_actions(State.RUNNING, FACTS.model_copy(update={"serving_scores": LOST}))
    assert isinstance(only(step), Fail)
    assert step.reason == "the serving version on the old base could not be evaluated: broke"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": None}, "no suite gates it"),
        ({"policy": Policy()}, "loractl policy set team/bot --suite"),
        ({"policy": POLICY.model_copy(update={"action": "frozen"})}, "the policy says frozen"),
        ({"suites": ()}, "suite team/suite is not there: loractl suite push FILE team/suite"),
        ({"suites": (SuiteFacts(suite="team/suite", gate_n=535),)}, "nothing can pass below 536"),
        ({"runnable": False}, "cannot be computed with here"),
        ({"new_weights": False}, "loractl base push DIR --line demo"),
        ({"old_weights": False}, "loractl base push DIR --line demo"),
        ({"fit": "incompatible", "fit_reason": "q_proj 8 × 8", "recipe": False}, "incompatible (q_proj 8 × 8)"),
        ({"fit": "unknown", "datasets": False}, "retrain needs the recipe's datasets: loractl dataset push"),
    ],
)
def test_what_cannot_be_accepted_freezes_at_once_and_says_what_helps(changes: dict[str, object], says: str) -> None:
    facts = FACTS.model_copy(update=changes)
    step = next_actions(State.PLANNED, facts)
    assert step.state is State.FROZEN
    assert isinstance(only(step), Freeze)
    assert says in step.reason
    assert plan_line(facts).route == "freeze"
    assert any(says in missing for missing in plan_line(facts).missing)


def test_old_weights_are_not_needed_where_the_old_records_are_there() -> None:
    facts = FACTS.model_copy(update={"old_weights": False, "serving_scores": DONE})
    assert next_actions(State.PLANNED, facts).state is State.RUNNING
    of_gain = facts.model_copy(update={"policy": Policy(gates=(OF_GAIN,))})
    assert next_actions(State.PLANNED, of_gain).state is State.FROZEN
    assert next_actions(State.PLANNED, of_gain.model_copy(update={"bare_old_scores": DONE})).state is State.RUNNING


def test_other_shapes_leave_what_trains() -> None:
    facts = READY.model_copy(update={"fit": "incompatible"})
    assert possible_tiers(facts) == ("warm-start", "retrain")
    assert only(next_actions(State.PLANNED, facts)) == Produce("warm-start", SERVING, OLD, NEW)


@pytest.mark.parametrize("fit", ["exact", "derived", "targets-equal", "same-shape"])
def test_the_best_of_fits_is_gated_like_any_other(fit: FitClass) -> None:
    facts = READY.model_copy(update={"fit": fit})
    assert only(next_actions(State.PLANNED, facts)) == Produce("carry", SERVING, OLD, NEW)


def test_without_a_recipe_only_the_carry_is_tried() -> None:
    facts = READY.model_copy(update={"recipe": False})
    assert possible_tiers(facts) == ("carry",)
    after = next_actions(State.RUNNING, having(judged("carry", verdict(Zone.UNRESOLVED)), base=facts))
    assert after.state is State.FROZEN
    assert "warm-start needs a recipe: loractl policy set team/bot --recipe RECIPE.toml" in plan_line(facts).missing


def test_a_base_of_other_shapes_is_reached_by_transport_where_the_policy_names_it() -> None:
    reshaped = {"fit": "incompatible", "fit_reason": "model.norm.weight 32 became 48", "recipe": False}
    assert next_actions(State.PLANNED, READY.model_copy(update=reshaped)).state is State.FROZEN
    policy = POLICY.model_copy(update={"tiers": ("carry", "transport", "warm-start", "retrain")})
    facts = READY.model_copy(update=reshaped | {"policy": policy})
    assert possible_tiers(facts) == ("transport",)
    assert Produce("transport", SERVING, OLD, NEW) in next_actions(State.PLANNED, facts).actions
    unknown = facts.model_copy(update={"fit": "unknown", "fit_reason": ""})
    assert possible_tiers(unknown) == ()
    assert "transport needs to know both bases' shapes" in plan_line(unknown).missing[0]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"recipe": False, "datasets": False}, None),
        ({"recipe": False, "retained": True}, None),
        ({"retained": False}, "distil needs the retained inputs team/questions: loractl dataset push"),
        ({"old_weights": False, "serving_scores": DONE}, "distil reads the old weights, which are not here"),
        ({"fit": "incompatible"}, None),
        ({"fit": "unknown"}, "distil needs to know both bases' shapes"),
    ],
)
def test_distilling_needs_the_old_weights_and_neither_recipe_nor_labels(
    changes: dict[str, object], missing: str | None
) -> None:
    policy = POLICY.model_copy(update={"tiers": ("carry", "distil"), "retained": "team/questions"})
    facts = READY.model_copy(update={"policy": policy, **changes})
    assert ("distil" in possible_tiers(facts)) is (missing is None)
    assert missing is None or any(missing in told for told in plan_line(facts).missing)


def test_it_retires_when_the_new_base_is_as_good_and_no_tier_adds_to_it() -> None:
    shown = verdict(Zone.UNRESOLVED, adds=Zone.UNRESOLVED, bare=Zone.PASS)
    step = next_actions(State.RUNNING, having(judged("carry", shown)))
    assert step.state is State.RETIRED
    assert isinstance(only(step), Retire)
    assert "the new base alone is as good as what serves" in step.reason
    adds = verdict(Zone.UNRESOLVED, adds=Zone.PASS, bare=Zone.PASS)
    assert next_actions(State.RUNNING, having(judged("carry", adds))).state is State.RUNNING
    unsure = verdict(Zone.UNRESOLVED, adds=Zone.UNRESOLVED, bare=Zone.UNRESOLVED)
    assert next_actions(State.RUNNING, having(judged("carry", unsure))).state is State.RUNNING


def test_a_spent_budget_begins_no_tier_but_finishes_the_one_that_runs() -> None:
    policy = POLICY.model_copy(update={"budget_seconds": 60.0})
    first = judged("carry", verdict(Zone.FAIL, reason="too far"), seconds=60.0)
    step = next_actions(State.RUNNING, having(first, policy=policy))
    assert step.state is State.FROZEN
    assert step.reason == "budget: 60 of 60 seconds are spent before warm-start; nearest was carry: too far"
    running = TierFacts(tier="warm-start", produce=DONE, version=MADE["warm-start"])
    assert isinstance(only(next_actions(State.RUNNING, having(first, running, policy=policy))), EvaluateCandidate)


def test_the_action_ask_waits_for_a_person() -> None:
    ask = POLICY.model_copy(update={"action": "ask"})
    facts = having(judged("carry", verdict(Zone.PASS)), policy=ask)
    step = next_actions(State.RUNNING, facts)
    assert step.state is State.WAITING
    assert only(step) == WaitForApproval("carry", MADE["carry"], "carry passed: because")
    yes = next_actions(State.WAITING, facts.model_copy(update={"approved": True}))
    assert isinstance(only(yes), Promote)
    no = next_actions(State.WAITING, facts.model_copy(update={"approved": False, "decided_by": "ada"}))
    assert (no.state, no.reason) == (State.FROZEN, "declined by ada, although carry passed: because")


def test_a_policy_that_was_frozen_or_removed_in_between_holds_a_pass_back() -> None:
    passed = having(judged("carry", verdict(Zone.PASS)))
    frozen = passed.model_copy(update={"policy": POLICY.model_copy(update={"action": "frozen"})})
    assert next_actions(State.RUNNING, frozen).state is State.FROZEN
    assert next_actions(State.RUNNING, passed.model_copy(update={"policy": None})).state is State.FROZEN


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aborted_because": "wrong base"}, "ended by hand: wrong base"),
        ({"superseded_by": "demo@r3"}, "superseded: the line moved on to demo@r3"),
        ({"serving_now": None}, "'prod' on the old base is gone"),
        ({"new_alias": OTHER, "generation": 1}, "by somebody else"),
    ],
)
def test_others_can_end_it_even_after_a_pass(changes: dict[str, object], says: str) -> None:
    passed = having(judged("carry", verdict(Zone.PASS)))
    step = next_actions(State.RUNNING, passed.model_copy(update=changes))
    assert step.state is State.ABORTED
    assert isinstance(only(step), Abort)
    assert says in step.reason


def test_a_new_serving_version_is_compared_with_anew() -> None:
    facts = having(judged("carry", verdict(Zone.PASS)), serving_now=OTHER, approved=True)
    step = next_actions(State.RUNNING, facts)
    assert step.state is State.PLANNED
    assert isinstance(only(step), Replan)
    again = facts.replanned()
    assert (again.serving, again.tiers, again.approved, again.bare_scores) == (OTHER, (), None, DONE)
    assert next_actions(step.state, again).actions == (EvaluateServing(OTHER, OLD), Produce("carry", OTHER, OLD, NEW))


# ── laws ─────────────────────────────────────────────────────────────────────

JOBS = st.sampled_from([JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
VERDICTS = st.builds(verdict, st.sampled_from(Zone), adds=st.sampled_from(Zone), bare=st.sampled_from(Zone))
SETTINGS = st.fixed_dictionaries(
    {
        "fit": st.sampled_from(get_args(FitClass)), "recipe": st.booleans(), "datasets": st.booleans(),
        "old_weights": st.booleans(), "new_weights": st.booleans(),
        "runnable": st.sampled_from([True, True, True, False]),
    }
)
POLICIES = st.none() | st.builds(
    Policy,
    gates=st.sampled_from([(GATE,), (OF_GAIN,)]),
    action=st.sampled_from(["auto", "ask", "frozen"]),
    tiers=st.permutations(TIERS).map(tuple),
    budget_seconds=st.none() | st.floats(1, 100),
)


class World:
    """Does what it is asked, with luck drawn by hypothesis."""

    def __init__(self, facts: Facts, draw: Callable[[st.SearchStrategy[object]], object]) -> None:
        self.facts, self.draw, self.promoted = facts, draw, 0

    def changed(self, **changes: object) -> None:
        self.facts = self.facts.model_copy(update=changes)

    def work(self, progress: Progress) -> Progress:
        """A job a little later; what waited twice is done, so that time passes."""
        if progress.job in (JobState.QUEUED, JobState.RUNNING):
            return Progress.model_validate({"job": self.draw(st.sampled_from(["succeeded", "succeeded", "failed"]))})
        return progress

    def tick(self) -> None:
        for mine in self.facts.tiers:
            produce, version = self.work(mine.produce), mine.version
            if produce.done:
                version = MADE[mine.tier]
            seconds = mine.seconds + 10 * (produce is not mine.produce)
            self.tier(mine, produce=produce, version=version, evaluate=self.work(mine.evaluate), seconds=seconds)
        for name in ("serving_scores", "bare_scores", "bare_old_scores"):
            self.changed(**{name: self.work(getattr(self.facts, name))})

    def tier(self, mine: TierFacts, **changes: object) -> None:
        self.facts = self.facts.with_tier(mine.model_copy(update=changes))

    def do(self, action: Action) -> None:
        begun = Progress(job=self.draw(JOBS))
        match action:
            case Produce(tier=tier):
                mine = self.facts.tier(tier)
                assert mine.produce.job is None, "made twice"
                self.tier(mine, produce=begun, version=MADE[tier] if begun.done else None, seconds=10.0)
            case EvaluateCandidate(tier=tier, version=version):
                assert version == MADE[tier]
                self.tier(self.facts.tier(tier), evaluate=begun)
            case EvaluateServing():
                self.changed(serving_scores=begun)
            case EvaluateBare():
                self.changed(bare_scores=begun)
            case EvaluateBareOld():
                self.changed(bare_old_scores=begun)
            case Judge(tier=tier):
                assert self.facts.serving_scores.done
                assert self.facts.bare_scores.done
                self.tier(self.facts.tier(tier), verdict=self.draw(VERDICTS))
            case Promote(version=version):
                mine = next(mine for mine in self.facts.tiers if mine.version == version)
                assert mine.verdict is not None
                assert mine.verdict.zone is Zone.PASS
                if self.draw(st.booleans()):
                    self.promoted += 1
                    self.changed(new_alias=version, generation=1)
                else:
                    self.changed(new_alias=OTHER, generation=1)
            case WaitForApproval():
                self.changed(approved=self.draw(st.sampled_from([None, True, False])))
            case Replan():
                self.facts = self.facts.replanned()
            case _:
                pass


@settings(max_examples=200)
@given(st.data(), POLICIES, SETTINGS, st.integers(0, 30))
def test_every_route_ends_once_and_none_promotes_without_a_pass(
    data: st.DataObject, policy: Policy | None, changes: dict[str, object], moves_at: int
) -> None:
    world = World(FACTS.model_copy(update={"policy": policy, **changes}), data.draw)
    state, ends = State.PLANNED, []
    for turn in range(60):
        before = world.facts.model_copy(deep=True)
        step = next_actions(state, world.facts)
        assert step == next_actions(state, Facts.model_validate_json(before.model_dump_json()))
        assert world.facts == before
        assert step.actions, "a living item always has something to do or to wait for"
        state = step.state
        if state.final:
            ends.append(only(step))
            break
        for action in step.actions:
            world.do(action)
        if turn == moves_at and data.draw(st.booleans()):
            world.changed(serving_now=OTHER)
        world.tick()
        if world.facts.approved is None and state is State.WAITING and turn > 40:
            world.changed(approved=False)
    assert len(ends) == 1
    assert next_actions(state, world.facts) == Step(state)
    kinds = {
        State.PROMOTED: Settle, State.FROZEN: Freeze, State.RETIRED: Retire, State.FAILED: Fail, State.ABORTED: Abort,
    }  # fmt: skip
    assert isinstance(ends[0], kinds[state])
    assert (state is State.PROMOTED) == (world.promoted == 1)
    if state is State.PROMOTED:
        assert any(mine.verdict and mine.verdict.zone is Zone.PASS for mine in world.facts.tiers)
    assert explain(Item(state=state, reason="x", facts=world.facts))


@given(POLICIES, SETTINGS)
def test_the_plan_says_what_the_campaign_does_first(policy: Policy | None, changes: dict[str, object]) -> None:
    facts = FACTS.model_copy(update={"policy": policy, **changes})
    plan, step = plan_line(facts), next_actions(State.PLANNED, facts)
    assert (plan.route == "freeze") == (step.state is State.FROZEN)
    if plan.tiers:
        assert Produce(plan.tiers[0], SERVING, OLD, NEW) in step.actions
    else:
        assert plan.missing


# ── plan and report ──────────────────────────────────────────────────────────


def test_the_plan_shows_route_sizes_and_what_retraining_costs() -> None:
    plan = plan_line(FACTS.model_copy(update={"trained_steps": 400, "trained_seconds": 610.0}))
    assert plan.route == "carry → warm-start → retrain"
    assert plan.suites == (("team/suite", 1000, 536),)
    assert (plan.action, plan.missing, plan.retrain_steps, plan.retrain_seconds) == ("auto", (), 400, 610.0)


def test_the_report_tells_each_tier_and_its_cost_against_training_anew() -> None:
    facts = having(
        judged("carry", verdict(Zone.FAIL, reason="lost 4 points"), seconds=12.0),
        judged("warm-start", verdict(Zone.PASS, reason="gained"), steps=20, seconds=48.0),
        trained_steps=400, trained_seconds=600.0,
    )  # fmt: skip
    assert explain(Item(state=State.PROMOTED, reason="passed", facts=facts)).splitlines() == [
        "team/bot:prod (same-shape) is promoted: passed",
        "  carry (0 steps, 12.0 s): lost 4 points",
        "  warm-start (20 steps, 48.0 s): gained",
        "  in all 20 steps, 60.0 s; training anew: 400 steps, 600.0 s",
    ]
    assert cost(facts).share == pytest.approx(0.1)
    assert cost(having(judged("carry", verdict(Zone.FAIL)))).share is None


def test_a_retraining_done_here_says_what_retraining_costs() -> None:
    anew = judged("retrain", verdict(Zone.PASS), steps=100, seconds=50.0)
    facts = having(anew, trained_steps=400, trained_seconds=600.0)
    assert (cost(facts).retrain_steps, cost(facts).retrain_seconds) == (100, 50.0)


def test_items_survive_json() -> None:
    item = Item(state=State.RUNNING, facts=having(judged("carry", verdict(Zone.FAIL)), policy=Policy(gates=(OF_GAIN,))))
    assert Item.model_validate_json(item.model_dump_json()) == item
    assert Item.model_validate(item.model_dump(mode="json")) == item


# ── routes ───────────────────────────────────────────────────────────────────


def test_while_the_bases_are_compared_only_references_are_scored_and_the_route_waits() -> None:
    facts = FACTS.model_copy(update={"measuring": True})
    step = next_actions(State.PLANNED, facts)
    assert step == Step(State.PLANNED, (EvaluateServing(SERVING, OLD), EvaluateBare(NEW)))
    ready = READY.model_copy(update={"measuring": True})
    assert isinstance(only(next_actions(State.PLANNED, ready)), Wait)


def test_what_the_signals_leave_out_is_not_tried_and_has_no_share_of_alpha() -> None:
    facts = READY.model_copy(update={"signals": Signals(lineage="continued", drift=0.5, most=0.6)})
    assert only(next_actions(State.PLANNED, facts)) == Produce("warm-start", SERVING, OLD, NEW)
    assert tier_alphas(facts) == {"warm-start": 0.01, "retrain": 0.01}
    plan = plan_line(facts)
    assert plan.route == "warm-start → retrain"
    assert any("carry is left out: drift 0.5" in why for why in plan.because)
    failed = [judged(tier, verdict(Zone.FAIL)) for tier in ("warm-start", "retrain")]
    frozen = next_actions(State.RUNNING, having(*failed, base=facts))
    assert "carry was not tried: drift 0.5" in frozen.reason


def test_without_the_old_weights_retraining_from_scratch_remains_where_what_serves_was_scored() -> None:
    facts = READY.model_copy(update={"old_weights": False})
    assert possible_tiers(facts) == ("retrain",)
    assert any("carry reads the old weights" in missing for missing in plan_line(facts).missing)
    untrained = next_actions(State.PLANNED, facts.model_copy(update={"recipe": False}))
    assert untrained.state is State.FROZEN
    assert "loractl base push DIR --line demo" in untrained.reason
    assert "retrain needs a recipe: loractl policy set" in untrained.reason


def test_a_plan_says_what_tiers_took_before_and_what_there_is() -> None:
    seen = (Expected(tier="carry", steps=0, seconds=3, seen=4), Expected(tier="align", steps=0, seconds=9, seen=1))
    plan = plan_line(FACTS.model_copy(update={"expected": seen}))
    assert plan.expected == seen[:1]  # align is not on its route
    assert plan.data == ("recipe", "datasets", "old weights", "new weights")
