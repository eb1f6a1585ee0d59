"""A base upgrade in one process: two revisions of a line, a suite, adapters that serve, and a worker by hand.

The worker claims, pushes and finishes through the services as a real one does; only what it would compute
is made up here: the factors come from a seed, and how well a version does is what the test says.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlmodel import col, select

from registry.core.manifest import Lineage
from registry.core.names import Reference
from registry.core.policy import Gate, Margin, Policy
from registry.core.pool import Answered, input_id
from registry.core.pool import to_jsonl as to_answers
from registry.core.recipes import FineTune
from registry.core.records import Record, Split, item_id, split_of, to_jsonl
from registry.db.models import Campaign, CampaignItem, Job
from registry.files import scan_folder
from registry.schemas import (
    AnsweredInfo,
    CampaignInfo,
    CampaignItemInfo,
    ClaimRequest,
    FinishRequest,
    ScoredInfo,
    UpgradeRequest,
)
from registry.services import adapters, aliases, campaigns, jobs, policies
from registry.services.references import find_adapter, find_version
from registry.services.tokens import Caller
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import ADMIN, World, request_of

WORKER = Caller("worker", "worker", "worker", {"queues": ["cpu"]})
HARNESS = "sha256:" + "1" * 64
OTHER_HARNESS = "sha256:" + "2" * 64
ROWS = [{"prompt": f"question {n}", "choices": [" a", " b"], "answer": n % 2} for n in range(120)]
GATE = Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.2))
POLICY = Policy(gates=(GATE,), max_negative_flips=0.3)
INPUTS = [{"prompt": f"input {n}", "choices": [" a", " b"]} for n in range(600)]
Skill = float
"""The share of items that come out right."""


def records(skill: Skill, rows: list[dict[str, Any]] = ROWS) -> str:
    """Records of a version that gets the first ``skill`` of all items right, in order of their names."""
    items = sorted(item_id(row) for row in rows)
    found = []
    splits: tuple[Split, ...] = ("calibration", "gate", "report")
    for split in splits:
        mine = [item for item in items if split_of(item) == split]
        right = round(skill * len(mine))
        found += [Record(item=i, split=split, metrics={"accuracy": int(n < right)}) for n, i in enumerate(mine)]
    return to_jsonl(found).decode()


@dataclass
class Upgrade:
    """The registry, the bases' folders, and what the worker finds when it scores."""

    world: World
    folder: Path
    skills: dict[str, Skill] = field(default_factory=dict)
    """``bare`` and ``bare-old``, a tier (what it makes), or ``serving``: how well that does; else 0."""
    fails: set[str] = field(default_factory=set)
    """Kinds of jobs or tiers that fail."""
    harness: Callable[[Job], str] = lambda _: HARNESS
    tiers: dict[str, str] = field(default_factory=dict)
    """digest -> the tier that made it"""
    drift: float | None = None
    """Of every tensor between the bases, where it is measured."""
    rows: list[dict[str, Any]] = field(default_factory=lambda: ROWS)
    """Of the suite."""
    signals: dict[str, object] = field(default_factory=dict)
    """What a comparison says of every adapter that takes part in it."""
    differs: dict[str, int] = field(default_factory=dict)
    """``bare``, ``serving`` or a tier: to how many of the pool's inputs it answers otherwise; else to none."""
    names: int = 0

    def __post_init__(self) -> None:
        self.v1, self.v2 = tiny_base(self.folder / "v1"), tiny_base(self.folder / "v2", seed=1)
        self.world.push_base(self.v1, line="demo")
        self.old, self.new = str(base_of(self.v1).digest), str(base_of(self.v2).digest)
        self.world.push_rows("suite", "team/suite", lines(ROWS))
        row = {"prompt": "1+1=", "completion": " 2"}
        self.data = self.world.push_rows("dataset", "team/data", lines([row]))["digest"]

    # ── what people do ───────────────────────────────────────────────────────

    def push(
        self, name: str = "team/bot", seed: int = 0, *, recipe: bool = True, base: Path | None = None, steps: int = 40
    ) -> str:
        """A version of an adapter on the old base, with its training recipe; its digest."""
        on = base or self.v1
        folder = tiny_adapter(self._folder(), on, seed=seed, record_base=True)
        trained = FineTune(base=str(base_of(on).digest), datasets=(self.data,), steps=steps).model_dump(mode="json")
        scan = scan_folder(
            "adapter",
            folder,
            base=base_of(on).digest,
            lineage=Lineage(datasets=(self.data,), recipe=trained) if recipe else Lineage(),
        )
        request, contents = request_of(scan)
        digest: str = self.world.push("adapter", name, request, contents)["digest"]
        self.tiers[digest] = "serving"
        return digest

    def policy(self, policy: Policy, namespace: str = "team", name: str = "") -> None:
        with self.world.database.write() as session:
            policies.put(session, ADMIN, namespace, name, policy, self.world.now)

    def set_alias(self, digest: str, name: str = "team/bot", alias: str = "prod") -> None:
        """As an admin, by force: nothing is scored yet."""
        with self.world.database.write() as session:
            adapter = find_adapter(session, ADMIN, Reference.parse(name).series)
            version = find_version(session, adapter, Reference.parse(f"{name}@{digest}"))
            aliases.set_alias(
                session, self.world.store, ADMIN, adapter=adapter, version=version, alias=alias,
                expected=aliases.ANY, force=True, reason="", now=self.world.now,
            )  # fmt: skip

    def serve(self, name: str = "team/bot", seed: int = 0, **more: Any) -> str:
        """Push and serve."""
        digest = self.push(name, seed, **more)
        self.set_alias(digest, name)
        return digest

    def begin(self, who: Caller = ADMIN, folder: Path | None = None, **request: Any) -> str:
        """Push the new base, plan and start; the campaign's id."""
        self.world.push_base(folder or self.v2, line="demo")
        return self.begin_again(who, **request)

    def begin_again(self, who: Caller = ADMIN, *, compare: bool = True, **request: Any) -> str:
        """Plan and start on the bases that are there; with ``compare`` the drift between them is measured at once."""
        self.world.grant(who)
        with self.world.database.write() as session:
            asked = UpgradeRequest(line="demo", to="demo", **request)
            campaign = campaigns.create(session, who, asked, self.world.now)
            campaigns.start(session, who, campaign.id, self.world.now)
        if compare:
            self.work_one()
        return campaign.id

    # ── what the daemons and the worker do ───────────────────────────────────

    def tick(self) -> None:
        """One look of the scheduler, a second later."""
        self.world.later(seconds=1)
        with self.world.database.read() as session:
            found = campaigns.unfinished(session)
        for campaign, item in found:
            with self.world.database.write() as session:
                if item:
                    campaigns.step(session, self.world.store, item, self.world.now)
                else:
                    campaigns.finish(session, campaign, self.world.now)

    def work_one(self) -> Job | None:
        """Claim one job and end it, a second later; None when there is none."""
        self.world.later(seconds=1)
        with self.world.database.write() as session:
            request = ClaimRequest(queue="cpu", worker="w")
            job = jobs.claim(session, WORKER, request, self.world.settings.lease_s, self.world.now)
        if job is None:
            return None
        if {job.kind, job.recipe.get("tier")} & self.fails:
            problem = {"code": "work-failed", "detail": "it broke"}
            with self.world.database.write() as session:
                jobs.fail(
                    session, WORKER, job.id, attempt=job.attempt, problem=problem, retryable=False, cancelled=False,
                    now=self.world.now,
                )  # fmt: skip
            return job
        request_ = self.results(job)
        with self.world.database.write() as session:
            jobs.finish(session, self.world.store, WORKER, job.id, request_, self.world.now)
        return job

    def work(self) -> int:
        """Until no job waits; how many were ended."""
        done = 0
        while self.work_one():
            done += 1
        return done

    def run(self, rounds: int = 25) -> None:
        """Scheduler and worker in turn, until nothing more happens."""
        for _ in range(rounds):
            before = [(item.id, item.revision) for item in self.items()]
            self.tick()
            if not self.work() and before == [(item.id, item.revision) for item in self.items()]:
                break
        self.tick()

    def results(self, job: Job) -> FinishRequest:
        """What the worker finishes a job with."""
        match job.kind:
            case "compare":
                names = base_of(self.v1).by_name if self.drift is not None else ()
                drift = dict.fromkeys(names, self.drift)
                signals = [self.signals] * len(job.recipe["adapters"])
                result = {"cast": None, "drift": drift, "median": self.drift, "adapters": signals}
                return FinishRequest(attempt=job.attempt, result=result)
            case "evaluate":
                wanted = [*job.recipe["adapters"], *([None] if job.recipe["bare"] else [])]
                harness = self.harness(job)
                scored = [
                    ScoredInfo(adapter=d, records=records(self._skill(job, d), self.rows), harness=harness, seconds=1.0)
                    for d in wanted
                ]
                return FinishRequest(attempt=job.attempt, result={"seconds": 1.0}, evaluations=scored)
            case "answers":
                asked = [*job.recipe["adapters"], *([None] if job.recipe["bare"] else [])]
                harness = self.harness(job)
                told = [AnsweredInfo(adapter=d, answers=self._answers(d), harness=harness) for d in asked]
                return FinishRequest(attempt=job.attempt, result={"seconds": 1.5}, answers=told)
            case _:
                push = self._make(job)
                steps = {"carry": 0, "warm-start": 20, "distil": 30, "retrain": 40}[_tier(job)]
                return FinishRequest(attempt=job.attempt, result={"steps": steps, "seconds": 2.0}, pushes=[push])

    def _skill(self, job: Job, digest: str | None) -> Skill:
        bare = "bare-old" if job.recipe["base"] == self.old else "bare"
        return self.skills.get(self.tiers[digest] if digest else bare, 0.0)

    def _answers(self, digest: str | None) -> str:
        """The first answer to all inputs but the first so many, by their names."""
        other = self.differs.get(self.tiers[digest] if digest else "bare", 0)
        items = sorted((input_id(row), row) for row in INPUTS)
        return to_answers([
            Answered(item=item, input=row, answer=" b" if n < other else " a") for n, (item, row) in enumerate(items)
        ]).decode()  # fmt: skip

    def _make(self, job: Job) -> str:
        """Push what a tier makes; the push waits for the job's end."""
        self.names += 1
        on = next(f for f in self.folder.iterdir() if (f / "config.json").exists() and _digest(f) == job.base)
        folder = tiny_adapter(self._folder(), on, seed=100 + self.names, record_base=True)
        parents = (job.recipe["adapter"],) if job.kind == "rebase" else ()
        lineage = Lineage(parents=parents, recipe=job.recipe)
        request, contents = request_of(scan_folder("adapter", folder, base=base_of(on).digest, lineage=lineage))
        info = self.world.open("adapter", job.output["adapter"], request, WORKER, job=job)
        self.world.send(info, contents)
        self.world.commit(info.id, WORKER)
        self.tiers[info.version_digest] = _tier(job)
        return info.id

    def _folder(self) -> Path:
        self.names += 1
        return self.folder / "adapters" / str(self.names)

    # ── looking ──────────────────────────────────────────────────────────────

    def info(self, campaign: str, who: Caller = ADMIN) -> CampaignInfo:
        with self.world.database.read() as session:
            return campaigns.info(session, who, campaigns.get(session, who, campaign))

    def item(self, name: str = "team/bot", alias: str = "prod") -> CampaignItemInfo:
        """The adapter's part in the newest campaign."""
        newest = self.world.all(select(Campaign).order_by(col(Campaign.created_at), col(Campaign.id)))[-1]
        return next(i for i in self.info(newest.id).items if (i.adapter, i.alias) == (name, alias))

    def state(self, name: str = "team/bot") -> str:
        return self.item(name).state

    def prod(self, base: str, name: str = "team/bot", alias: str = "prod") -> str | None:
        """What made the version that serves on ``base``: a tier, ``serving``, or None."""
        with self.world.database.read() as session:
            adapter = find_adapter(session, ADMIN, Reference.parse(name).series)
            for found in adapters.describe_aliases(session, adapter):
                if (found.alias, found.base) == (alias, base):
                    return self.tiers[found.digest]
        return None

    def jobs(self, state: str | None = None) -> list[Job]:
        found = self.world.all(select(Job).order_by(col(Job.created_at), col(Job.id)))
        return [job for job in found if state in (None, job.state)]

    def items(self) -> list[CampaignItem]:
        return self.world.all(select(CampaignItem).order_by(col(CampaignItem.id)))


def _tier(job: Job) -> str:
    """The tier that a job is for; a training that nothing was left to start from is a retraining."""
    return str(job.recipe.get("tier", "retrain"))


def _digest(folder: Path) -> str:
    return str(base_of(folder).digest)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
