"""One step of an item: facts, the word of the pure machine, and the hands that carry it out.

Each runs in one transaction under the item's lock. Actions are jobs (equal work is one job), verdicts, and alias moves
by compare-and-set, so a step may be repeated by any scheduler after any crash."""

from contextlib import suppress
from datetime import datetime
from typing import Any

from sqlmodel import Session, col, select

from registry.core import campaign as machine
from registry.core.campaign import Facts, Progress, State
from registry.core.errors import (
    AliasMoved,
    EvidenceTooWeak,
    LoractlError,
    ScopeMissing,
    SignatureRequired,
    TokenRefused,
    WorkFailed,
)
from registry.core.gate import Quoted, Verdict
from registry.core.lifecycle import CAMPAIGN, CampaignState, JobState, VersionState
from registry.core.policy import variants_pay
from registry.core.pool import gate_of
from registry.core.recipes import TRAINED, UNTRAINED
from registry.core.route import AS_THEY_WERE
from registry.db import queries
from registry.db.models import Adapter, Base, Campaign, CampaignItem, DatasetVersion, Job, Version
from registry.schemas import JobRequest, Output
from registry.storage.base import BlobStore

from .. import aliases, bases, gates, jobs, ledger, policies, pools
from ..gates import Lacking, Scored, suite_of
from ..references import find_data
from ..tokens import Caller
from . import access, actors, reading

_STEPS_AT_ONCE = 8
"""Actions that need no waiting (a verdict, a promotion, its settling) follow one another in one call."""
_SCORINGS = 3
"""How often one thing is scored for a campaign before its differing harnesses are given up."""
_STUMBLES = 10
"""Steps of one item that may break in a row, on what nobody foresaw, before the item is given up."""


def unfinished(session: Session) -> list[tuple[str, int]]:
    """(campaign, item) of running campaigns that are not final, and (campaign, 0) where all items are.

    Of a campaign that works on so many adapters at once, no more are begun than have ended; one that waits for a
    person's word takes up no place. A paused campaign is left alone.
    """
    found = []
    going = select(Campaign).where(Campaign.state == CampaignState.RUNNING, col(Campaign.paused_at).is_(None))
    for campaign in session.exec(going):
        items = [item for item in access.items_of(session, campaign) if not State(item.state).final]
        planned = [item for item in items if item.state == State.PLANNED]
        begun = [item for item in items if item.state != State.PLANNED]
        if campaign.parallel is not None:
            free = campaign.parallel - sum(item.state == State.RUNNING for item in begun)
            planned = planned[: max(free, 0)]
        found += [(campaign.id, item.id or 0) for item in (*begun, *planned)] or ([] if items else [(campaign.id, 0)])
    return found


def finish(session: Session, identity: str, now: datetime) -> None:
    """End a running campaign whose items are all final."""
    campaign = session.exec(select(Campaign).where(Campaign.id == identity).with_for_update()).one()
    items = access.items_of(session, campaign)
    if campaign.state != CampaignState.RUNNING or campaign.paused_at is not None:
        return
    if any(not State(item.state).final for item in items):
        return
    campaign.state = CAMPAIGN.after("finish", campaign.state, identity)
    campaign.finished_at = now
    counts = {state: sum(item.state == state for item in items) for state in State if state.final}
    campaign.reason = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "no adapter was served there"
    session.add(campaign)
    ledger.note(session, campaign, "finished", now, reason=campaign.reason)


def step(session: Session, store: BlobStore, item_id: int, now: datetime) -> list[Job]:
    """Bring one item as far as it goes without waiting; the jobs that it asked for."""
    item = session.exec(select(CampaignItem).where(CampaignItem.id == item_id).with_for_update()).one()
    campaign = session.get_one(Campaign, item.campaign_id)
    if campaign.state != CampaignState.RUNNING or campaign.paused_at is not None or State(item.state).final:
        return []
    before = (item.state, item.facts, item.reason)
    was = access.look(item)
    work = Work(session, store, campaign, item, now)
    for _ in range(_STEPS_AT_ONCE):
        if not work.once():
            break
    if State(item.state).final:
        work.cancel_own()
    if (item.state, item.facts, item.reason) != before:
        item.revision += 1
        item.changed_at = now
        session.add(item)
        ledger.note_step(session, campaign, item, was, access.look(item), now)
    return work.asked


def stumble(session: Session, item_id: int, error: Exception, now: datetime) -> None:
    """A step of the item broke on what nobody foresaw: after `_STUMBLES` in a row it has failed, with the reason.

    What it had asked for is left to end by itself: what broke may be the very facts that name it.
    """
    item = session.exec(select(CampaignItem).where(CampaignItem.id == item_id).with_for_update()).one()
    if State(item.state).final:
        return
    was = access.look(item)
    known = item.facts.get("stumbled")
    stumbled = (known if isinstance(known, int) else 0) + 1
    item.facts = {**item.facts, "stumbled": stumbled}
    if stumbled >= _STUMBLES:
        item.state, item.reason = State.FAILED, f"its step broke {stumbled} times in a row: {access.told(error)}"
    item.revision += 1
    item.changed_at = now
    session.add(item)
    ledger.note_step(session, session.get_one(Campaign, item.campaign_id), item, was, access.look(item), now)


class Work:
    """One call of `step`: facts, the machine's word, and the hands that carry it out."""

    def __init__(
        self, session: Session, store: BlobStore, campaign: Campaign, item: CampaignItem, now: datetime
    ) -> None:
        self.session, self.store, self.campaign, self.item, self.now = session, store, campaign, item, now
        self.adapter = session.get_one(Adapter, item.adapter_id)
        self.old, self.new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
        self.asked: list[Job] = []
        self.revoked: str | None = None
        try:
            self.actor = actors.actor_of(session, campaign, self.adapter, now)
        except (TokenRefused, ScopeMissing) as error:
            self.actor, self.revoked = Caller(campaign.created_by, campaign.id, "user", {}), error.message

    def once(self) -> bool:
        """Take one step; whether another may follow at once."""
        facts = reading.facts_of(
            self.session, self.actor, self.campaign, self.item, Facts.model_validate(self.item.facts)
        )
        facts = facts.model_copy(update={"revoked": self.revoked, **_bounds(self.session, self.campaign, self.now)})
        step = machine.next_actions(State(self.item.state), facts)
        self.item.state, self.item.reason = step.state, step.reason
        follow = False
        for action in step.actions:
            facts, again = self._do(action, facts)
            follow = follow or again
        self.item.facts = facts.model_dump(mode="json")
        return follow and not State(self.item.state).final

    def cancel_own(self) -> None:
        """Cancel jobs that run for this item alone; what another adapter waits for goes on."""
        facts = Facts.model_validate(self.item.facts)
        mine = _things(facts)
        others = [
            Facts.model_validate(item.facts)
            for item in access.items_of(self.session, self.campaign)
            if item.id != self.item.id and not State(item.state).final
        ]
        shared = {thing for other in others for thing in _things(other)}
        made = _made(facts) - {job for other in others for job in _made(other)}
        query = select(Job).where(Job.campaign_id == self.campaign.id, col(Job.state).in_(access.ACTIVE))
        query = query.execution_options(populate_existing=True)
        for job in self.session.exec(query.order_by(col(Job.id))).all():
            scored = set(job.recipe.get("adapters", ())) if job.kind == "evaluate" else set()
            alone = scored <= mine - shared and not (others and job.recipe.get("bare"))
            if job.id in made or (job.kind == "evaluate" and alone):
                jobs.withdraw(self.session, self.campaign.id, job.id, self.now)

    def _do(self, action: machine.Action, facts: Facts) -> tuple[Facts, bool]:
        match action:
            case machine.Produce():
                return self._produce(action, facts), False
            case machine.EvaluateServing():
                self._evaluate(facts, self.old, action.version)
            case machine.EvaluateBareOld():
                self._evaluate(facts, self.old, None)
            case machine.EvaluateBare():
                if not self._candidate_comes(facts):  # else scored together with it: the base is loaded once
                    self._evaluate(facts, self.new, None)
            case machine.EvaluateCandidate():
                self._evaluate(facts, self.new, action.version)
            case machine.Judge():
                return self._judge(action, facts)
            case machine.Promote():
                return self._promote(action, facts)
            case machine.AskPool():
                return self._ask_pool(action, facts), False
            case machine.ComparePool():
                return self._compare_pool(action, facts)
            case machine.JudgePool():
                return self._judge_pool(action, facts)
            case machine.Replan():
                self.cancel_own()
                self.item.serving_id = self._version(action.serving).id or 0
                return facts.replanned(), True
            case machine.Settle():
                version = self._version(action.version)
                self.item.final_id = version.id
                return facts.model_copy(update={"quoted": self._quoted(facts, version)}), False
            case _:  # Wait and WaitFor…, Freeze, Retire, Fail, Abort: the state says it all
                pass
        return facts, False

    def _version(self, digest: str) -> Version:
        found = queries.version_by_digest(self.session, self.item.adapter_id, digest)
        assert found is not None
        return found

    def _candidate_comes(self, facts: Facts) -> bool:
        """Whether a candidate is being made, or is made and not asked to be scored."""
        return any(
            mine.verdict is None and not mine.produce.lost and mine.evaluate.job is None
            and (mine.produce.job in access.ACTIVE or mine.produce.done)
            for mine in facts.tiers
        ) or not facts.tiers  # fmt: skip

    def _produce(self, action: machine.Produce, facts: Facts) -> Facts:
        assert facts.policy is not None
        recipe: dict[str, Any] = {
            "kind": "rebase",
            "tier": action.tier,
            "adapter": action.adapter,
            "base": self.new.digest,
        }
        if action.tier in TRAINED:
            recipe["suite"] = suite_of(self.session, facts.policy.gates[0]).digest
        if action.tier not in UNTRAINED:
            recipe["made"] = self._made_before(facts)
        if action.tier == "carry" and facts.signals.lineage not in AS_THEY_WERE:
            recipe |= self._chosen_by(facts, action.adapter)
        if not facts.starts:  # nothing to begin from: the recorded recipe, from scratch
            recipe = self._anew(action.adapter)
        message = f"{action.tier} to {bases.labels(self.session, [self.new])[self.campaign.new_id]}"
        output = Output(adapter=facts.adapter, message=f"{message}, campaign {self.campaign.id}")
        try:
            progress = self._ask(recipe, output)
        except LoractlError as error:  # it cannot even be planned: the next tier
            progress = Progress(job=JobState.FAILED, error=error.message)
        return facts.with_tier(facts.tier(action.tier).model_copy(update={"produce": progress}))

    def _chosen_by(self, facts: Facts, adapter: str) -> dict[str, Any]:
        """What a carry chooses among its variants by: the suite's calibration split, and texts where some are kept.

        Nothing where the choice would cost nearly as much as the training that it may save.
        """
        assert facts.policy is not None
        suite = suite_of(self.session, facts.policy.gates[0])
        training = jobs.training_of(self.session, self._version(adapter), self.new.digest)
        if training is not None and not variants_pay(training.steps, training.batch_tokens, suite.size):
            return {}
        found = {"suite": suite.digest}
        if facts.policy.retained and facts.retained:
            found["inputs"] = facts.policy.retained
        return found

    def _made_before(self, facts: Facts) -> dict[str, str]:
        """What the tiers without training made, as far as it is there to begin at: it need not be made again."""
        made = {mine.tier: mine.version for mine in facts.tiers if mine.tier in UNTRAINED and mine.version}
        return {tier: v for tier, v in made.items() if self._version(v).status == VersionState.LIVE}

    def _anew(self, adapter: str) -> dict[str, Any]:
        training = jobs.training_of(self.session, self._version(adapter), self.new.digest)
        assert training is not None  # else the machine does not ask for it
        return training.model_dump(mode="json")

    def _evaluate(self, facts: Facts, base: Base, version: str | None) -> None:
        """Ask for what has no evaluation yet, the bare base in the same job."""
        for suite in reading.suites_of(self.session, facts.policy):
            evaluated = reading.scored_by(self.session, self.campaign, base, suite)
            wanted = [version] if version and version not in evaluated else []
            bare = None not in evaluated
            if wanted or (bare and version is None):
                self._score(base, suite, wanted, bare=bare)

    def _score(self, base: Base, suite: DatasetVersion, named: list[str], *, bare: bool, fresh: bool = False) -> None:
        recipe = {"kind": "evaluate", "base": base.digest, "suite": suite.digest, "adapters": named, "bare": bare}
        things = [*named, *([None] if bare else [])]
        try:
            if self._ask(recipe, Output(), fresh=fresh).done:  # equal work, of which no evaluation is left
                tried = max(self._tried(base, thing, suite) for thing in things)
                if tried >= _SCORINGS:
                    raise WorkFailed(id="to evaluate it", reason=f"{tried} were done, and nothing is left of them")
                self._ask(recipe, Output(), fresh=True)
        except LoractlError as error:
            self.item.state, self.item.reason = State.FAILED, f"it cannot be evaluated: {error.message}"

    def _ask(self, recipe: dict[str, Any], output: Output, *, fresh: bool = False) -> Progress:
        request = JobRequest(
            recipe=recipe, output=output, queue=self.campaign.queue, namespace=self.adapter.namespace, fresh=fresh
        )
        with self.session.begin_nested():
            job, reused = jobs.submit(
                self.session, self.actor, request, self.now,
                campaign_id=self.campaign.id, suites=self._named(), origin=actors.origin_of(self.campaign),
            )  # fmt: skip
        if not reused:
            self.asked.append(job)
        return Progress(job=JobState(job.state), id=job.id)

    def _named(self) -> list[str]:
        """Digests of the suites that the adapter's policy names."""
        policy = policies.effective(self.session, self.adapter.namespace, self.adapter.name)
        return [suite.digest for suite in reading.suites_of(self.session, policy)]

    def _judge(self, action: machine.Judge, facts: Facts) -> tuple[Facts, bool]:
        assert facts.policy is not None
        mine = facts.tier(action.tier)
        found = gates.verdict(
            self.session,
            self.store,
            facts.policy,
            candidate=Scored(self.new, self._version(str(mine.version))),
            serving=Scored(self.old, self.session.get_one(Version, self.item.serving_id)),
            alpha=action.alpha,
        )
        if isinstance(found, Verdict):
            rules = reading.rules_of(facts.policy, reading.suites_of(self.session, facts.policy))
            return facts.with_tier(mine.model_copy(update={"verdict": found, "rules": rules})), True
        assert found is not None  # without gates the machine froze it
        if found.evaluations and all(
            self._tried(scored.base, scored.digest, suite) < _SCORINGS for scored, suite in found.evaluations
        ):
            self._score_again(found)
            return facts, False
        lost = Progress(job=JobState.FAILED, error=found.reason)
        closed = Progress(job=JobState.SUCCEEDED)
        return facts.with_tier(mine.model_copy(update={"produce": closed, "evaluate": lost})), True

    def _ask_pool(self, action: machine.AskPool, facts: Facts) -> Facts:
        """Two jobs, one a base; who answers is what the candidate's tier made and what serves."""
        pool, policy = facts.pool, facts.policy
        assert pool is not None and pool.data is not None and policy is not None
        gate = gate_of(policy)
        assert gate is not None
        how = {
            "kind": "answers", "suite": suite_of(self.session, gate).digest, "metric": gate.metric,
            "inputs": pool.data, "apart": self._learnt(facts),
        }  # fmt: skip
        who_made = {"tier": action.tier, "version": action.version, "bare": action.bare}
        asked = pool.unasked().model_copy(update=who_made)
        sides = {
            "serving": {"base": self.old.digest, "adapters": [facts.serving], "bare": False},
            "candidate": {"base": self.new.digest, "adapters": [action.version], "bare": action.bare},
        }
        for side, who in sides.items():
            try:
                progress = self._ask(how | who, Output())
            except LoractlError as error:
                progress = Progress(job=JobState.FAILED, error=error.message)
            asked = asked.model_copy(update={side: progress})
        return facts.model_copy(update={"pool": asked})

    def _learnt(self, facts: Facts) -> list[str]:
        """Datasets that what is compared was made with, as far as they are there to be left out."""
        assert facts.policy is not None
        version = self._version(facts.source or facts.serving)
        training = jobs.training_of(self.session, version, self.new.digest)
        named = [*(training.datasets if training else ()), *([facts.policy.retained] if facts.policy.retained else [])]
        found = []
        for text in named:
            with suppress(LoractlError):
                found.append(find_data(self.session, self.actor, "dataset", text).digest)
        return sorted(set(found))

    def _compare_pool(self, action: machine.ComparePool, facts: Facts) -> tuple[Facts, bool]:
        pool, suite = facts.pool, self._undecided(facts)
        assert pool is not None and facts.policy is not None and self.item.id is not None
        found, problem = pools.compare(
            self.session,
            self.store,
            item_id=self.item.id,
            pool=pool,
            serving=facts.serving,
            suite=suite,
            policy=facts.policy,
            alpha=action.alpha,
            now=self.now,
        )
        if problem is not None:
            lost = Progress(job=JobState.FAILED, error=problem)
            return facts.model_copy(update={"pool": found.model_copy(update={"candidate": lost})}), True
        rules = self._pool_rules(facts) if found.verdict else None
        return facts.model_copy(update={"pool": found.model_copy(update={"rules": rules})}), True

    def _judge_pool(self, action: machine.JudgePool, facts: Facts) -> tuple[Facts, bool]:
        pool = facts.pool
        assert pool is not None and facts.policy is not None
        found = pools.judge(
            self.session,
            self.store,
            pool=pool,
            serving=facts.serving,
            suite=self._undecided(facts),
            policy=facts.policy,
            alpha=action.alpha,
        )
        changes = {"verdict": found, "rules": self._pool_rules(facts)}
        return facts.model_copy(update={"pool": pool.model_copy(update=changes)}), True

    def _undecided(self, facts: Facts) -> Verdict:
        """What the suites said of the candidate that the pool is asked about."""
        assert facts.pool is not None and facts.pool.tier is not None
        verdict = facts.tier(facts.pool.tier).verdict
        assert verdict is not None
        return verdict

    def _pool_rules(self, facts: Facts) -> str:
        assert facts.policy is not None
        return reading.rules_of(facts.policy, reading.suites_of(self.session, facts.policy))

    def _quoted(self, facts: Facts, version: Version) -> tuple[Quoted, ...]:
        assert facts.policy is not None
        serving = Scored(self.old, self.session.get_one(Version, self.item.serving_id))
        candidate = Scored(self.new, version)
        return gates.quoted(self.session, self.store, facts.policy, candidate=candidate, serving=serving)

    def _score_again(self, found: Lacking) -> None:
        """Old records are of another harness than the candidate's: score them anew."""
        for scored, suite in found.evaluations:
            named = [scored.digest] if scored.digest else []
            self._score(scored.base, suite, named, bare=not named, fresh=True)
        self.item.reason = found.reason

    def _tried(self, base: Base, digest: str | None, suite: DatasetVersion) -> int:
        done = [
            job for job in reading.scoring(self.session, self.campaign, base, suite) if job.state not in access.ACTIVE
        ]
        return sum(digest in job.recipe["adapters"] if digest else job.recipe["bare"] for job in done)

    def _promote(self, action: machine.Promote, facts: Facts) -> tuple[Facts, bool]:
        assert facts.policy is not None
        before = aliases.locked(self.session, self.adapter, self.old, action.alias)
        if before is None or before.version_id != self._version(action.serving).id:
            return facts, True  # it moved since the facts were read: read them again
        version, verdict = self._version(action.version), machine.passing_verdict(facts)
        try:
            aliases.require_evidence(facts.policy, self.adapter, action.alias, version)
            aliases.move(
                self.session,
                adapter=self.adapter,
                base=self.new,
                alias=action.alias,
                version=version,
                expected=action.expected,
                actor=self.campaign.created_by,
                reason=f"{action.tier} passed the gate",
                now=self.now,
                verdict=verdict.model_dump(mode="json") if verdict else None,
                campaign_id=self.campaign.id,
            )
        except (AliasMoved, SignatureRequired):
            return facts, True  # the machine sees from fresh facts what to wait for
        except EvidenceTooWeak as error:
            self.item.state, self.item.reason = State.FROZEN, error.message
        return facts, True


def _bounds(session: Session, campaign: Campaign, now: datetime) -> dict[str, str | None]:
    """Why a campaign may begin nothing more: its deadline, and its budget."""
    late = campaign.deadline is not None and now >= campaign.deadline
    found: dict[str, str | None] = {
        "overdue": f"{campaign.deadline:%Y-%m-%d %H:%M} UTC" if late else None,
        "exhausted": None,
    }
    if (
        campaign.budget_seconds is not None
        and (spent := reading.spent_by(session, campaign)) >= campaign.budget_seconds
    ):
        found["exhausted"] = f"{spent:.0f} of the campaign's {campaign.budget_seconds:.0f} seconds are spent"
    return found


def _made(facts: Facts) -> set[str | None]:
    """Jobs that make its candidates, and that answer its pool."""
    pool = facts.pool
    return {*(mine.produce.id for mine in facts.tiers), *((pool.serving.id, pool.candidate.id) if pool else ())}


def _things(facts: Facts) -> set[str]:
    """Versions that are scored for an item."""
    return {facts.serving, *(mine.version for mine in facts.tiers if mine.version)}
