"""The campaign: one base upgrade over many adapters, as a pure state machine.

    planned → running ⇄ waiting → promoted | frozen | retired | failed | aborted

Everything is decided from facts, so a step may be taken any number of times, by any number of schedulers, after
any crash: equal state and facts give equal actions, and an action that was done shows in the facts. The
services carry actions out (jobs, verdicts, alias moves) and write down what came of them; nothing here looks.

An adapter takes part when a gated alias serves it on the old base. Its tiers are tried in the policy's order,
cheapest first. What ends it:

promoted   a tier's verdict is PASS and the alias on the new base points to its version
frozen     the old base keeps serving: nothing passed, the gate is missing or can never pass, the policy or a
           person says so, the budget is spent, or the deadline has passed. An unresolved tier never promotes: the next
           one is tried, and when none is left the reason is that of the tier that came nearest. Where the policy
           names a pool, people are first asked for labels that may resolve that tier (`pool`): one look more
retired    the bare new base is shown to be no worse than what serves (rule 1 of the gate), and no tier so far
           is shown to add value over it: an adapter that costs something and shows nothing. Tried before a
           dearer tier, because what a person would gain by training on is not what the gate asks for
failed     nothing could be judged: every tier's job failed, or the reference could not be evaluated
aborted    somebody ended it: by hand, by a newer revision of the line, by taking its creator's rights, by removing
           the alias on the old base, or by setting the alias on the new one, which a campaign never overwrites

A verdict counts for the gates and suites that gave it; when the policy or a suite changes, it is given anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from .gate import Quoted, Verdict, Zone, shares, smallest_n
from .lifecycle import JobState
from .manifest import BaseDigest, Frozen, Sha256
from .policy import Policy
from .pool import POOL, asks_bare, gate_of, settles
from .recipes import RESHAPES, TRAINED, Tier
from .route import Route, Signals, route

FitClass = Literal["exact", "derived", "targets-equal", "same-shape", "incompatible", "unknown"]
CARRIES: frozenset[FitClass] = frozenset({"exact", "derived", "targets-equal", "same-shape"})
"""Fits in which the factors of the old version have the new base's shapes."""


class State(StrEnum):
    """Where one adapter of a campaign stands."""

    PLANNED = "planned"
    RUNNING = "running"
    WAITING = "waiting"
    PROMOTED = "promoted"
    FROZEN = "frozen"
    RETIRED = "retired"
    FAILED = "failed"
    ABORTED = "aborted"

    @property
    def final(self) -> bool:
        """Whether nothing moves it any more."""
        return self not in (State.PLANNED, State.RUNNING, State.WAITING)


class Progress(Frozen):
    """How far a piece of work is: a job's state, None while nobody asked for it."""

    job: JobState | None = None
    id: str | None = None
    """The job's id, where one was made; equal work that was done before has none."""
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return self.job is JobState.SUCCEEDED

    @property
    def lost(self) -> bool:
        """Whether it ended without a result; jobs have used up their attempts by then."""
        return self.job in (JobState.FAILED, JobState.CANCELLED)


class TierFacts(Frozen):
    """What came of one tier so far."""

    tier: Tier
    produce: Progress = Progress()
    version: Sha256 | None = None
    """The version that it made."""
    label: str = ""
    """That version for people, such as ``@v7``."""
    evaluate: Progress = Progress()
    verdict: Verdict | None = None
    rules: Sha256 | None = None
    """Digest of the gates and suites that the verdict rests on: it counts for no others."""
    steps: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Device seconds of its jobs, evaluation included."""
    told: dict[str, Any] = Field(default_factory=dict)
    """What its job said of how it went: where it started, its candidates, its signals."""


class Expected(Frozen):
    """What a tier took, evaluation included: the median over ``seen`` adapters of the same base, targets and rank."""

    tier: Tier
    steps: float
    seconds: float
    seen: int


class SuiteFacts(Frozen):
    """A suite that the policy names."""

    suite: str
    gate_n: int | None = None
    """Items in its gate split; None: there is no such suite."""


class PoolFacts(Frozen):
    """The policy's pool, and what came of asking it (`registry.core.pool`)."""

    name: str
    data: Sha256 | None = None
    """The dataset; once it was asked, the one that was."""
    missing: str = ""
    """Why it cannot be asked, with what helps."""
    tier: Tier | None = None
    """Whose candidate it decides on, and that candidate; None: it was not asked."""
    version: Sha256 | None = None
    bare: bool = False
    """Whether the bare new base was asked too."""
    serving: Progress = Progress()
    candidate: Progress = Progress()
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Device seconds of answering."""
    n: int | None = None
    """Inputs that were answered."""
    differ: int | None = None
    """Those of them that need a label."""
    paper: Sha256 | None = None
    """The file to be labelled."""
    labels: Sha256 | None = None
    labelled_by: str = ""
    verdict: Verdict | None = None
    rules: Sha256 | None = None

    @property
    def lost(self) -> str | None:
        """Why there are no answers and there will be none."""
        ended = next((one for one in (self.serving, self.candidate) if one.lost), None)
        return (ended.error or str(ended.job)) if ended else None

    @property
    def waits(self) -> bool:
        """Whether a person's labels are all that it lacks."""
        return self.paper is not None and self.labels is None and self.verdict is None

    def unasked(self) -> "PoolFacts":
        """The pool as it was before anything was asked of it."""
        return PoolFacts(name=self.name, data=self.data, missing=self.missing)


class Facts(Frozen):
    """All that a decision about one adapter rests on. Persisted as JSON with the item."""

    adapter: str
    """``team/bot``"""
    alias: str = "prod"
    line: str = ""
    old: BaseDigest
    new: BaseDigest
    serving: Sha256
    """The version behind the alias on the old base when this was planned: what a candidate is compared with."""
    source: Sha256 | None = None
    """What tiers start from, when not ``serving``: the original, where serving is itself carried (never stacked)."""
    serving_now: Sha256 | None
    """The version behind that alias now; None: the alias is gone."""
    new_alias: Sha256 | None = None
    """The version behind the alias on the new base now."""
    generation: Annotated[int, Field(ge=0)] = 0
    """That alias's generation; 0 while there is none."""

    policy: Policy | None = None
    fit: FitClass = "unknown"
    """How the serving version stands to the new base."""
    fit_reason: str = ""
    signals: Signals = Signals()
    """What was measured between the two bases for what this adapter patches, as it was when the work began."""
    measuring: bool = False
    """Whether the two bases are just being compared: the route waits for it."""
    expected: tuple["Expected", ...] = ()
    """What tiers took for adapters of this shape before."""
    shape: str = ""
    """What costs are alike for: the new base's architecture and size, the adapter's targets and rank."""
    runnable: bool = True
    """Whether adapters of this kind can be computed with."""
    old_weights: bool = True
    """Of the base that serves now."""
    source_weights: bool | None = None
    """Of the base that ``source`` was made on: what tiers read; None: the same as ``old_weights``."""
    new_weights: bool = True
    recipe: bool = False
    """Whether there is a training recipe: the version's own, or the policy's."""
    datasets: bool = False
    """Whether the recipe's datasets are there, and the campaign's creator may read them."""
    retained: bool | None = None
    """Whether the inputs that the policy retains are there for the campaign's creator; None: it retains none."""
    suites: tuple[SuiteFacts, ...] = ()
    """One for each of the policy's gates, then the guard."""

    serving_scores: Progress = Progress()
    """Records of ``serving`` on the old base, of every suite, in the harness of this campaign."""
    bare_scores: Progress = Progress()
    bare_old_scores: Progress = Progress()
    """Needed for margins of gain only."""
    tiers: tuple[TierFacts, ...] = ()
    pool: PoolFacts | None = None
    """None: the policy names none."""
    reference_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Device seconds of the evaluations that all tiers share; not counted against the budget."""

    unsigned: Annotated[tuple[Sha256, ...], Field(exclude_if=lambda them: not them)] = ()
    """Versions that tiers made, where the namespace requires a signature and none of theirs counts."""
    approved: bool | None = None
    """With the action ``ask``: what a person said."""
    decided_by: str = ""
    quoted: tuple[Quoted, ...] = ()
    """Once promoted: per gate, what the report split says."""
    overdue: str | None = None
    """The deadline that has passed."""
    exhausted: str | None = None
    """Why the campaign may begin no further tier."""
    superseded_by: str | None = None
    """A newer revision of the line."""
    aborted_because: str | None = None
    """The campaign was ended by hand."""
    revoked: str | None = None
    """Why the campaign's creator may no more do what it does in his name."""
    stumbled: Annotated[int, Field(ge=0)] = 0
    """How many steps in a row broke on something that nobody foresaw."""
    trained_steps: int | None = None
    """Steps of the serving version's own training, where recorded: what retraining costs."""
    trained_seconds: float | None = None
    spent_before: Annotated[float, Field(ge=0)] = 0.0
    """Device seconds that went into tiers which count no more: what served moved meanwhile."""

    def tier(self, tier: Tier) -> TierFacts:
        """What came of ``tier``."""
        return next((facts for facts in self.tiers if facts.tier == tier), TierFacts(tier=tier))

    def with_tier(self, changed: TierFacts) -> "Facts":
        """These facts with one tier's outcome replaced or added."""
        others = tuple(facts for facts in self.tiers if facts.tier != changed.tier)
        return self.model_copy(update={"tiers": (*others, changed)})

    def replanned(self) -> "Facts":
        """These facts with everything forgotten that was measured against a version that serves no more."""
        nothing = Progress()
        return self.model_copy(
            update={
                "serving": self.serving_now or self.serving, "source": None, "serving_scores": nothing, "tiers": (),
                "approved": None, "decided_by": "", "bare_old_scores": nothing,
                "pool": self.pool and self.pool.unasked(), "spent_before": self.spent,
            }
        )

    def under(self, rules: str) -> "Facts":
        """These facts without verdicts of other rules or another share of α, and what a person said to them."""
        alphas = tier_alphas(self)
        stale = {
            mine.tier
            for mine in self.tiers
            if mine.verdict and (mine.rules != rules or mine.verdict.alpha != alphas.get(mine.tier, mine.verdict.alpha))
        }
        pool = self.pool
        is_old = pool is not None and pool.verdict is not None and (
            pool.rules != rules or pool.verdict.alpha != pool_alpha(self) or pool.tier in stale
        )  # fmt: skip
        if pool is not None and is_old:
            pool = pool.model_copy(update={"verdict": None, "rules": None})
        if not stale and not is_old:
            return self
        kept = tuple(
            mine.model_copy(update={"verdict": None, "rules": None}) if mine.tier in stale else mine
            for mine in self.tiers
        )
        return self.model_copy(update={"tiers": kept, "approved": None, "decided_by": "", "pool": pool})

    @property
    def starts(self) -> bool:
        """Whether there are weights to begin from: of the base that the original was made on."""
        return self.old_weights if self.source_weights is None else self.source_weights

    @property
    def spent(self) -> float:
        """Device seconds of all tiers, and of the pool, whatever they were tried against."""
        tiers = sum(facts.seconds for facts in self.tiers)
        return self.spent_before + tiers + (self.pool.seconds if self.pool else 0.0)


# ── actions ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Produce:
    """Make the tier's candidate for ``new`` from ``adapter`` (a job)."""

    tier: Tier
    adapter: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class EvaluateServing:
    """Score ``version`` on the old base, or take its records when all digests match."""

    version: str
    base: str


@dataclass(frozen=True, slots=True)
class EvaluateBare:
    """Score the new base alone."""

    base: str


@dataclass(frozen=True, slots=True)
class EvaluateBareOld:
    """Score the old base alone: a margin is a share of the gain over it."""

    base: str


@dataclass(frozen=True, slots=True)
class EvaluateCandidate:
    """Score what a tier made on the new base."""

    tier: Tier
    version: str
    base: str


@dataclass(frozen=True, slots=True)
class Judge:
    """Put a tier's records before the gate, on every suite of the policy, at this tier's share of α."""

    tier: Tier
    alpha: float


@dataclass(frozen=True, slots=True)
class Promote:
    """Move ``alias`` on the new base to ``version``, by compare-and-set.

    Only if that alias is still at generation ``expected`` and the one on the old base still points to
    ``serving``, both in the move's own transaction; else take fresh facts and step again.
    """

    tier: Tier
    version: str
    alias: str
    expected: int
    serving: str


@dataclass(frozen=True, slots=True)
class WaitForApproval:
    """Ask a person whether ``version`` may serve."""

    tier: Tier
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class WaitForSignature:
    """Ask a person to sign ``version``, without which no alias moves to it."""

    tier: Tier
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class AskPool:
    """Have the serving version on the old base, and what ``tier`` made on the new one, answer the pool's inputs."""

    tier: Tier
    version: str
    bare: bool
    """Whether the new base alone answers too: its value over it is open."""


@dataclass(frozen=True, slots=True)
class ComparePool:
    """Everybody has answered: write down on what they differ, for people to label, and how many that are."""

    alpha: float


@dataclass(frozen=True, slots=True)
class WaitForLabels:
    """Ask a person which of the differing answers are right."""

    reason: str


@dataclass(frozen=True, slots=True)
class JudgePool:
    """Put the labelled pool before the gate."""

    alpha: float


@dataclass(frozen=True, slots=True)
class Replan:
    """Another version serves now: forget what was compared with the old one (`Facts.replanned`)."""

    serving: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before a running job reports."""

    reason: str


@dataclass(frozen=True, slots=True)
class Freeze:
    """Leave the old base serving."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    """The new base needs no adapter here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up: nothing could be judged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """End it, and cancel its jobs that still run."""

    reason: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The alias points to what passed: write it down."""

    tier: Tier
    version: str
    reason: str


Action = (
    Produce | EvaluateServing | EvaluateBare | EvaluateBareOld | EvaluateCandidate | Judge | Promote
    | WaitForApproval | WaitForSignature | AskPool | ComparePool | WaitForLabels | JudgePool | Replan | Wait | Freeze
    | Retire | Fail | Abort | Settle
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """The state that follows from the facts, and what to do now; a final state has its reason in the action."""

    state: State
    actions: tuple[Action, ...] = ()

    @property
    def reason(self) -> str:
        """Why it stands where it stands."""
        return next((action.reason for action in self.actions if hasattr(action, "reason")), "")


# ── the machine ──────────────────────────────────────────────────────────────


def next_actions(state: State, facts: Facts) -> Step:
    """What to do for one adapter now; nothing once its state is final."""
    if state.final:
        return Step(state)
    return _ended_by_others(facts) or _frozen_from_the_start(facts) or _cascade(facts)


def _ended_by_others(facts: Facts) -> Step | None:
    passed = _passed(facts)
    if passed and passed.version == facts.new_alias:
        reason = f"{facts.alias} on the new base is {_label(passed)} by {passed.tier}: {_reason(passed)}"
        return Step(State.PROMOTED, (Settle(passed.tier, str(passed.version), reason),))
    reason = ""
    if facts.aborted_because is not None:
        reason = f"ended by hand: {facts.aborted_because}"
    elif facts.superseded_by is not None:
        reason = f"superseded: the line moved on to {facts.superseded_by}"
    elif facts.revoked is not None:
        reason = f"it acts in its creator's name, who may no more: {facts.revoked}"
    elif facts.new_alias is not None:
        reason = f"'{facts.alias}' on the new base was set to {facts.new_alias[:19]} by somebody else, and stays there"
    elif facts.serving_now is None:
        reason = f"'{facts.alias}' on the old base is gone: nothing serves there that could be carried over"
    if reason:
        return Step(State.ABORTED, (Abort(reason),))
    if facts.serving_now is not None and facts.serving_now != facts.serving:
        reason = f"'{facts.alias}' on the old base moved to {facts.serving_now[:19]}, which counts from now on"
        return Step(State.PLANNED, (Replan(facts.serving_now, reason),))
    return None


def _frozen_from_the_start(facts: Facts) -> Step | None:
    if _passed(facts) and facts.policy and facts.policy.gates:
        return None
    missing = _blockers(facts)
    return Step(State.FROZEN, (Freeze(missing[0]),)) if missing else None


def _cascade(facts: Facts) -> Step:
    policy = facts.policy
    assert policy is not None
    if passed := _passed(facts):
        return _promotion(facts, policy, passed)
    if any(facts.tier(tier).verdict for tier in policy.tiers) and (reason := _retirement(facts)):
        return Step(State.RETIRED, (Retire(reason),))
    if facts.overdue is not None:
        return Step(State.FROZEN, (Freeze(_overdue(facts)),))
    references, lost = _references(facts, policy)
    if lost:
        return Step(State.FAILED, (Fail(lost),))
    if facts.measuring and not facts.tiers:
        return Step(State.PLANNED, references or (Wait("the drift between the bases is being measured"),))
    for tier in routed(facts).tiers:
        mine = facts.tier(tier)
        if mine.verdict or mine.produce.lost or mine.evaluate.lost:
            continue
        if mine.produce.job is None and (spent := _spent(facts, policy)):
            return Step(State.FROZEN, (Freeze(f"budget: {spent} before {tier}; {_nearest(facts)}"),))
        actions = (*references, *_one_tier(facts, mine, policy))
        working = tuple(action for action in actions if not isinstance(action, Wait))
        return Step(State.RUNNING, working or actions[:1])
    if step := _pool(facts, policy):
        return step
    if any(mine.verdict for mine in facts.tiers):
        skipped = "".join(f"; {tier} was not tried: {why}" for tier, why in routed(facts).skipped)
        return Step(State.FROZEN, (Freeze(f"no tier passed; {_nearest(facts)}{skipped}"),))
    return Step(State.FAILED, (Fail(f"no tier could be judged; {_nearest(facts)}"),))


def _spent(facts: Facts, policy: Policy) -> str | None:
    """Why nothing more may be begun for this adapter."""
    if policy.budget_seconds is not None and facts.spent >= policy.budget_seconds:
        return f"{facts.spent:.0f} of {policy.budget_seconds:.0f} seconds are spent"
    return facts.exhausted


def _promotion(facts: Facts, policy: Policy, passed: TierFacts) -> Step:
    version, why = str(passed.version), _reason(passed)
    if policy.action == "frozen":
        return Step(State.FROZEN, (Freeze(f"the policy says frozen, although {passed.tier} passed: {why}"),))
    if policy.action == "ask" and facts.approved is None and facts.overdue is not None:
        nobody = f"nobody approved it before the deadline {facts.overdue}"
        return Step(State.FROZEN, (Freeze(f"{nobody}, although {passed.tier} passed: {why}"),))
    if policy.action == "ask" and facts.approved is None:
        return Step(State.WAITING, (WaitForApproval(passed.tier, version, f"{passed.tier} passed: {why}"),))
    if policy.action == "ask" and facts.approved is False:
        by = f" by {facts.decided_by}" if facts.decided_by else ""
        return Step(State.FROZEN, (Freeze(f"declined{by}, although {passed.tier} passed: {why}"),))
    if version in facts.unsigned and facts.overdue is not None:
        nobody = f"nobody signed {_label(passed)} before the deadline {facts.overdue}"
        return Step(State.FROZEN, (Freeze(f"{nobody}, although {passed.tier} passed: {why}"),))
    if version in facts.unsigned:
        ask = f"waits for a signature: loractl sign {facts.adapter}{_named(passed)} --key KEY"
        return Step(State.WAITING, (WaitForSignature(passed.tier, version, f"{ask}; {passed.tier} passed: {why}"),))
    return Step(State.RUNNING, (Promote(passed.tier, version, facts.alias, facts.generation, facts.serving),))


def _named(mine: TierFacts) -> str:
    """``@v7``, as a reference names it."""
    return mine.label if mine.label.startswith("@") else f"@{mine.version}"


def _pool(facts: Facts, policy: Policy) -> Step | None:
    """What to do about a tier that nothing but more items can resolve; None: there is no pool, or nothing to decide."""
    pool, mine = facts.pool, _undecided(facts)
    if pool is None or mine is None:
        return None
    nearest = _nearest(facts)
    if pool.missing:
        return Step(State.FROZEN, (Freeze(f"no tier passed; {nearest}; the pool was not asked: {pool.missing}"),))
    alpha, gate = pool_alpha(facts), gate_of(policy)
    assert gate is not None and mine.verdict is not None
    bare = asks_bare(mine.verdict, gate)
    if (pool.tier, pool.version) != (mine.tier, mine.version) or (bare and not pool.bare):
        if spent := _spent(facts, policy):
            return Step(State.FROZEN, (Freeze(f"budget: {spent} before the pool was asked; {nearest}"),))
        return Step(State.RUNNING, (AskPool(mine.tier, str(mine.version), bare),))
    if pool.lost:
        return Step(State.FROZEN, (Freeze(f"no tier passed; {nearest}; the pool was not answered: {pool.lost}"),))
    if pool.verdict:
        told = f"{pool.differ} of {pool.n} inputs of {pool.name} differ, and labelled they say {pool.verdict.reason}"
        return Step(State.FROZEN, (Freeze(f"no tier passed, nor did the pool for {mine.tier}: {told}"),))
    if not (pool.serving.done and pool.candidate.done):
        return Step(State.RUNNING, (Wait(f"the pool answers for {mine.tier}"),))
    if pool.paper is None:
        return Step(State.RUNNING, (ComparePool(alpha),))
    if pool.labels is None:
        return Step(State.WAITING, (WaitForLabels(f"waits for labels: {_differ(facts)}; {nearest}"),))
    return Step(State.RUNNING, (JudgePool(alpha),))


def _differ(facts: Facts) -> str:
    assert facts.pool is not None
    return f"{facts.pool.differ} of {facts.pool.n} answers differ between {facts.pool.tier} and what serves"


def _undecided(facts: Facts) -> TierFacts | None:
    """Of the tiers that a pool could still let pass the one that came nearest."""
    gate = gate_of(facts.policy) if facts.policy else None
    found = [mine for mine in facts.tiers if mine.version and mine.verdict and gate and settles(mine.verdict, gate)]
    return max(found, key=_lost, default=None)


def _overdue(facts: Facts) -> str:
    if facts.pool is not None and facts.pool.waits:
        return f"nobody labelled by the deadline {facts.overdue}: {_differ(facts)}; {_nearest(facts)}"
    return f"the deadline {facts.overdue} has passed; {_nearest(facts)}"


def passing_verdict(facts: Facts) -> Verdict | None:
    """The verdict that a promotion rests on."""
    passed = _passed(facts)
    return passed.verdict if passed else None


def _references(facts: Facts, policy: Policy) -> tuple[tuple[Action, ...], str | None]:
    """Evaluations that every tier's verdict needs and nobody asked for yet; and why there can be no verdict."""
    needed: list[tuple[Progress, Action, str]] = [
        (facts.serving_scores, EvaluateServing(facts.serving, facts.old), "the serving version on the old base"),
        (facts.bare_scores, EvaluateBare(facts.new), "the bare new base"),
    ]
    if _needs_gain(policy):
        needed.append((facts.bare_old_scores, EvaluateBareOld(facts.old), "the bare old base"))
    for progress, _, what in needed:
        if progress.lost:
            return (), f"{what} could not be evaluated: {progress.error or progress.job}"
    return tuple(action for progress, action, _ in needed if progress.job is None), None


def _one_tier(facts: Facts, mine: TierFacts, policy: Policy) -> tuple[Action, ...]:
    if mine.produce.job is None:
        return (Produce(mine.tier, facts.source or facts.serving, facts.old, facts.new),)
    if not mine.produce.done or mine.version is None:
        return (Wait(f"{mine.tier} is {mine.produce.job}"),)
    if mine.evaluate.job is None:
        return (EvaluateCandidate(mine.tier, mine.version, facts.new),)
    if not mine.evaluate.done:
        return (Wait(f"the evaluation of {mine.tier} is {mine.evaluate.job}"),)
    references = [facts.serving_scores, facts.bare_scores, *([facts.bare_old_scores] if _needs_gain(policy) else [])]
    if not all(progress.done for progress in references):
        return (Wait("the evaluation of what it is compared with is not done"),)
    return (Judge(mine.tier, tier_alphas(facts)[mine.tier]),)


def _needs_gain(policy: Policy) -> bool:
    return any(gate.margin.of_gain for gate in policy.gates)


def _passed(facts: Facts) -> TierFacts | None:
    """What may be promoted, with the verdict that says so: a tier's own, or the pool's on its candidate."""
    found = (mine for mine in facts.tiers if mine.version and mine.verdict and mine.verdict.zone is Zone.PASS)
    if passed := next(found, None):
        return passed
    pool = facts.pool
    if pool is None or pool.tier is None or pool.verdict is None or pool.verdict.zone is not Zone.PASS:
        return None
    mine = facts.tier(pool.tier)
    return mine.model_copy(update={"verdict": pool.verdict}) if mine.version == pool.version else None


def _retirement(facts: Facts) -> str | None:
    verdicts = [mine.verdict for mine in facts.tiers if mine.verdict]
    suffices = next((verdict for verdict in verdicts if verdict.bare_suffices), None)
    if suffices is None or any(verdict.adds_value for verdict in verdicts):
        return None
    return f"the new base alone is as good as what serves: bare base {suffices.bare[0]}"


def _nearest(facts: Facts) -> str:
    """The reason of the tier that came nearest to passing: unresolved before failed, then by what it lost."""

    def rank(mine: TierFacts) -> tuple[bool, float]:
        return mine.verdict is not None and mine.verdict.zone is Zone.UNRESOLVED, _lost(mine)

    if judged := [mine for mine in facts.tiers if mine.verdict]:
        best = max(judged, key=rank)
        return f"nearest was {best.tier}: {_reason(best)}"
    lost = [f"{mine.tier}: {_error(mine)}" for mine in facts.tiers if mine.produce.lost or mine.evaluate.lost]
    return "; ".join(lost) or "nothing was tried"


def _lost(mine: TierFacts) -> float:
    """By how much it seems better than what serves, on the suite that suits it least."""
    criteria = mine.verdict.criteria if mine.verdict else ()
    return min((told.estimate for told in criteria if told.name == "not-worse"), default=0.0)


def _error(mine: TierFacts) -> str:
    ended = mine.produce if mine.produce.lost else mine.evaluate
    return f"{'making' if mine.produce.lost else 'evaluating'} it {ended.error or ended.job}"


def _reason(mine: TierFacts) -> str:
    return mine.verdict.reason if mine.verdict else "not judged"


def _label(mine: TierFacts) -> str:
    return mine.label or str(mine.version)[:19]


# ── what is possible, and what is missing ────────────────────────────────────


def possible_tiers(facts: Facts) -> tuple[Tier, ...]:
    """The policy's tiers that can be run for this adapter, in their order."""
    if facts.policy is None or not facts.runnable or not facts.new_weights:
        return ()
    return tuple(tier for tier in facts.policy.tiers if not _missing_for(tier, facts))


def routed(facts: Facts) -> Route:
    """Which of the tiers that can be run are tried, in which order, and why the others are not."""
    return route(facts.signals, possible_tiers(facts))


def tier_alphas(facts: Facts) -> dict[Tier, float]:
    """What each tier that is tried may spend of the policy's α; of all the policy's tiers, where none can be run."""
    return {look: alpha for look, alpha in _alphas(facts).items() if look != POOL}


def pool_alpha(facts: Facts) -> float:
    """What the look at the pool may spend; 0 where there is none."""
    return _alphas(facts).get(POOL, 0.0)


def _alphas(facts: Facts) -> dict[Tier | Literal["pool"], float]:
    policy = facts.policy
    if policy is None:
        return {}
    tiers = routed(facts).tiers or policy.tiers
    looks: tuple[Tier | Literal["pool"], ...] = (*tiers, POOL) if facts.pool and not facts.pool.missing else tiers
    return shares(policy.alpha, looks)


def _missing_for(tier: Tier, facts: Facts) -> str | None:
    """Why ``tier`` cannot be run, with the command that helps."""
    if tier in RESHAPES and facts.fit == "unknown":
        return f"{tier} needs to know both bases' shapes ({facts.fit_reason or 'they are not known'})"
    if tier != "retrain" and tier not in RESHAPES and facts.fit not in CARRIES:
        detail = f" ({facts.fit_reason})" if facts.fit_reason else ""
        return f"{tier} needs a base of the same shapes; this one is {facts.fit}{detail}"
    if not facts.starts and tier != "retrain":
        return f"{tier} reads the old weights, which are not here: loractl base push DIR --line {facts.line or 'LINE'}"
    if tier in TRAINED and not facts.recipe:
        return f"{tier} needs a recipe: loractl policy set {facts.adapter} --recipe RECIPE.toml"
    if tier in TRAINED and not facts.datasets:
        return f"{tier} needs the recipe's datasets: loractl dataset push FILE NAME, or the right to read them"
    if tier == "distil" and facts.retained is False and facts.policy:
        return f"{tier} needs the retained inputs {facts.policy.retained}: loractl dataset push FILE NAME, or none"
    return None


def _blockers(facts: Facts) -> tuple[str, ...]:
    """Why nothing can be promoted, whichever tier is tried: gravest first, each with the command that helps."""
    policy, found = facts.policy, []
    if policy is None or not policy.gates:
        setting = f"loractl policy set {facts.adapter} --suite SUITE --metric METRIC --margin MARGIN"
        return (f"no suite gates it, so nothing can be accepted: {setting}",)
    if policy.action == "frozen":
        return ("the policy says frozen",)
    if not facts.runnable:
        found.append("adapters of this kind are stored, but cannot be computed with here")
    sizes = {suite.suite: suite.gate_n for suite in facts.suites}
    alpha = max(tier_alphas(facts).values())
    for gate in (*policy.gates, *([policy.guard] if policy.guard else [])):
        n, needed = sizes.get(gate.suite), smallest_n(gate, policy, alpha=alpha)
        if n is None:
            found.append(f"suite {gate.suite} is not there: loractl suite push FILE {gate.suite}")
        elif needed is None or n < needed:
            found.append(
                f"suite {gate.suite} has {n} gate items; with margin {gate.margin} nothing can pass below "
                f"{needed or 'any number'}: push a larger one with loractl suite push FILE {gate.suite}, or widen it"
            )
    scored = facts.serving_scores.done and (facts.bare_old_scores.done or not _needs_gain(policy))
    for absent, base in ((not facts.new_weights, facts.new), (not facts.old_weights and not scored, facts.old)):
        if absent:
            upload = f"loractl base push DIR --line {facts.line or 'LINE'}"
            found.append(f"the weights of base {base[:15]} are not here: {upload}")
    if not found and not possible_tiers(facts):
        found.append("; ".join(missing for tier in policy.tiers if (missing := _missing_for(tier, facts))))
    return tuple(found)


class PlanLine(Frozen):
    """What an upgrade would do with one adapter, before it does anything."""

    adapter: str
    alias: str
    fit: FitClass
    signals: Signals
    tiers: tuple[Tier, ...]
    """What would be tried, in this order; empty when it would be frozen at once."""
    because: tuple[str, ...]
    """Why in this order, and why what is left out is."""
    expected: tuple[Expected, ...]
    """What those tiers took before; a tier without a line is not known yet."""
    data: tuple[str, ...]
    """What there is to train and to carry with: its recipe, the recipe's datasets, retained inputs."""
    action: Literal["auto", "ask", "frozen"]
    missing: tuple[str, ...]
    """What keeps it, or its dearer tiers, from running, each with the command that supplies it."""
    suites: tuple[tuple[str, int | None, int | None], ...]
    """Per gate: suite, items in its gate split, and the smallest number at which anything passes."""
    retrain_steps: int | None
    retrain_seconds: float | None

    @property
    def route(self) -> str:
        """The tiers as an arrow, or that it freezes."""
        return " → ".join(self.tiers) or "freeze"


def plan_line(facts: Facts) -> PlanLine:
    """The plan for one adapter."""
    policy = facts.policy
    blockers = _blockers(facts)
    sizes = {suite.suite: suite.gate_n for suite in facts.suites}
    gates = () if policy is None else (*policy.gates, *([policy.guard] if policy.guard else []))
    lacking = () if policy is None else tuple(why for tier in policy.tiers if (why := _missing_for(tier, facts)))
    route_ = routed(facts)
    unasked = (f"the pool is not asked: {facts.pool.missing}",) if facts.pool and facts.pool.missing else ()
    return PlanLine(
        adapter=facts.adapter,
        alias=facts.alias,
        fit=facts.fit,
        signals=facts.signals,
        tiers=() if blockers else route_.tiers,
        because=(*route_.reasons, *(f"{tier} is left out: {why}" for tier, why in route_.skipped)),
        expected=tuple(known for known in facts.expected if known.tier in route_.tiers),
        data=_data(facts),
        action="frozen" if policy is None else policy.action,
        missing=blockers + (lacking if not blockers or possible_tiers(facts) else ()) + unasked,
        suites=tuple(
            (gate.suite, sizes.get(gate.suite), smallest_n(gate, policy, alpha=max(tier_alphas(facts).values())))
            for gate in gates
            if policy
        ),
        retrain_steps=facts.trained_steps,
        retrain_seconds=facts.trained_seconds,
    )


def _data(facts: Facts) -> tuple[str, ...]:
    there = {
        "recipe": facts.recipe, "datasets": facts.datasets, "old weights": facts.old_weights,
        "new weights": facts.new_weights, "retained inputs": facts.retained is True,
    }  # fmt: skip
    return tuple(what for what, has in there.items() if has)


# ── the report ───────────────────────────────────────────────────────────────


class Item(Frozen):
    """One adapter of a campaign as it is kept: where it stands, why, and all it rests on."""

    state: State = State.PLANNED
    reason: str = ""
    facts: Facts


class Cost(Frozen):
    """Steps and device seconds of the tiers that were run, beside those of training anew."""

    steps: int
    seconds: float
    retrain_steps: int | None
    retrain_seconds: float | None

    @property
    def share(self) -> float | None:
        """Seconds as a share of retraining's; None where those are not known."""
        return self.seconds / self.retrain_seconds if self.retrain_seconds else None


def cost(facts: Facts) -> Cost:
    """What the upgrade of one adapter cost; a retraining done here says what retraining costs."""
    own = next((mine for mine in facts.tiers if mine.tier == "retrain" and mine.produce.done), None)
    return Cost(
        steps=sum(mine.steps for mine in facts.tiers),
        seconds=facts.spent,
        retrain_steps=own.steps if own else facts.trained_steps,
        retrain_seconds=own.seconds if own else facts.trained_seconds,
    )


def explain(item: Item) -> str:
    """The item in words, a line per tier: for the report and the log."""
    facts = item.facts
    why = f": {item.reason}" if item.reason else ""
    lines = [f"{facts.adapter}:{facts.alias} ({facts.fit}) is {item.state}{why}"]
    order: Sequence[Tier] = facts.policy.tiers if facts.policy else ()
    for mine in sorted(facts.tiers, key=lambda mine: order.index(mine.tier) if mine.tier in order else len(order)):
        if mine.verdict:
            outcome = mine.verdict.reason
        elif mine.produce.lost or mine.evaluate.lost:
            outcome = _error(mine)
        else:
            outcome = f"{mine.produce.job or 'not started'}"
        lines.append(f"  {mine.tier} ({mine.steps} steps, {mine.seconds:.1f} s): {outcome}")
    spent = cost(facts)
    if spent.retrain_steps is not None and spent.retrain_seconds is not None and facts.tiers:
        anew = f"training anew: {spent.retrain_steps} steps, {spent.retrain_seconds:.1f} s"
        lines.append(f"  in all {spent.steps} steps, {spent.seconds:.1f} s; {anew}")
    return "\n".join(lines)
