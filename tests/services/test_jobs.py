"""Laws of jobs: one claim a job, one result, nothing from an attempt that is over, nothing lost but time."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlmodel import Session, col, select

from registry.core.errors import (
    BadRequest,
    JobNotFound,
    LeaseLost,
    LoractlError,
    MoveNotAllowed,
    NotRunnable,
    NotYourJob,
    OtherBase,
    RankTooHigh,
    ScopeMissing,
    SuiteTooSmall,
    UnknownTargets,
    WeightsAbsent,
)
from registry.core.manifest import Lineage
from registry.core.policy import Gate, Margin, Policy
from registry.core.recipes import FineTune
from registry.core.records import Record, item_id, split_of, to_jsonl
from registry.db.engine import Database
from registry.db.models import Alias, DatasetVersion, Evaluation, Job, JobEvent, Version
from registry.files import scan_folder
from registry.schemas import ClaimRequest, FinishRequest, JobRequest, Output, ScoredInfo
from registry.services import jobs, policies
from registry.services.jobs import access
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import ADMIN, World, adapter_push, caller, files_push, request_of

ROWS = b'{"prompt": "2+2=", "completion": " 4"}\n'
ITEMS = b"".join(b'{"prompt": "%d is ", "choices": ["e", "o"], "answer": %d}\n' % (i, i % 2) for i in range(20))
HARNESS = "sha256:" + "7" * 64
LEASE_S = 60
Made = TypeVar("Made")


def worker(name: str, *queues: str) -> Caller:
    return Caller(name, name, "worker", {"queues": list(queues or ("cpu",))})


ANN, BEN = worker("ann"), worker("ben")


@dataclass
class Shop:
    """A registry with a base, an adapter on it, a dataset and a suite; and the verbs of jobs, each a transaction."""

    world: World
    base: Path
    adapter: Path

    def submit(self, who: Caller = ADMIN, *, fresh: bool = False, salt: str = "", **changes: Any) -> tuple[Job, bool]:
        recipe = {"kind": "finetune", "base": "demo", "datasets": ["team/rows"], "steps": 2} | changes.pop("recipe", {})
        output = Output(**({"adapter": "team/bot"} | changes.pop("output", {})))
        request = JobRequest(recipe=recipe, output=output, fresh=fresh, **changes)
        return self.do(lambda s: jobs.submit(s, who, request, self.world.now, salt=salt))

    def asked(self, recipe: dict[str, Any], who: Caller = ADMIN, **output: Any) -> Job:
        request = JobRequest(recipe=recipe, output=Output(**output))
        return self.do(lambda s: jobs.submit(s, who, request, self.world.now))[0]

    def claim(self, who: Caller = ANN, *cached: str) -> Job | None:
        request = ClaimRequest(queue=who.queues()[0], worker=who.name, cached=list(cached))
        return self.do(lambda s: jobs.claim(s, who, request, LEASE_S, self.world.now))

    def claim_many(self, group: int, who: Caller = ANN) -> list[Job]:
        request = ClaimRequest(queue=who.queues()[0], worker=who.name, group=group)

        def claim(session: Session) -> list[Job]:
            first = jobs.claim(session, who, request, LEASE_S, self.world.now)
            if first is None:
                return []
            return [first, *jobs.claim_beside(session, who, request, first, LEASE_S, self.world.now)]

        return self.do(claim)

    def beat(self, job: Job, who: Caller = ANN, **more: Any) -> Job:
        said = {"attempt": job.attempt, "progress": None, "reported": []} | more
        return self.do(lambda s: jobs.heartbeat(s, who, job.id, lease_s=LEASE_S, now=self.world.now, **said))

    def finish(self, job: Job, who: Caller = ANN, **more: Any) -> Job:
        request = FinishRequest(**({"attempt": job.attempt, "result": {"steps": 2}} | more))
        return self.do(lambda s: jobs.finish(s, self.world.store, who, job.id, request, self.world.now))

    def fail(self, job: Job, who: Caller = ANN, *, retryable: bool = False) -> Job:
        problem = BadRequest(problems="no").problem()
        said: dict[str, Any] = {"problem": problem, "retryable": retryable, "cancelled": False}
        return self.do(lambda s: jobs.fail(s, who, job.id, attempt=job.attempt, now=self.world.now, **said))

    def cancel(self, job: Job, who: Caller = ADMIN) -> Job:
        return self.do(lambda s: jobs.cancel(s, who, job.id, self.world.now))

    def retry(self, job: Job, who: Caller = ADMIN) -> Job:
        return self.do(lambda s: jobs.retry(s, who, job.id, self.world.now))

    def reconcile(self) -> list[Job]:
        return self.do(lambda s: jobs.requeue_expired(s, self.world.now))

    def page(self, who: Caller = ADMIN, **more: Any) -> Sequence[Job]:
        said: dict[str, Any] = {"state": None, "campaign": None, "after": None, "limit": 2} | more
        return self.do(lambda s: jobs.page(s, who, **said))

    def do(self, what: Callable[[Session], Made]) -> Made:
        with self.world.database.write() as session:
            return what(session)

    def push(self, job: Job, who: Caller = ANN, folder: Path | None = None) -> str:
        """The job's output, verified."""
        request, contents = adapter_push(folder or self.adapter, self.base)
        info = self.world.open("adapter", job.output["adapter"], request, who, job=job)
        self.world.send(info, contents)
        self.world.commit(info.id, who)
        return info.id

    def now(self, job: Job) -> Job:
        found: Job = self.world.one(select(Job).where(Job.id == job.id))
        return found

    def told(self, job: Job) -> list[str]:
        return [row.kind for row in self.world.all(select(JobEvent).where(JobEvent.job_id == job.id))]


def _shop(world: World, folder: Path) -> Shop:
    base = tiny_base(folder / "base")
    world.push_base(base, line="demo")
    world.push_rows("dataset", "team/rows", ROWS)
    return Shop(world, base, tiny_adapter(folder / "adapter", base, record_base=True))


@pytest.fixture
def shop(database: Database, local_store: LocalStore, tmp_path: Path) -> Shop:
    return _shop(World(database, local_store), tmp_path)


@pytest.fixture
def small(embedded: World, tmp_path: Path) -> Shop:
    """The same on SQLite alone, for what does not depend on the database."""
    return _shop(embedded, tmp_path)


# ── asking ───────────────────────────────────────────────────────────────────


def test_a_job_names_everything_by_digest(shop: Shop) -> None:
    job, reused = shop.submit()
    assert not reused
    assert job.state == "queued"
    assert job.namespace == "team"
    assert job.recipe["base"] == job.base == str(base_of(shop.base).digest)
    assert job.recipe["datasets"][0].startswith("sha256:")


def test_equal_work_is_one_job_while_it_waits_or_runs(shop: Shop) -> None:
    job, _ = shop.submit()
    assert shop.submit() == (job, True)
    shop.claim()
    again, reused = shop.submit(fresh=True)
    assert (again.id, reused) == (job.id, True)
    assert shop.submit(recipe={"seed": 1})[0].id != job.id
    assert shop.submit(output={"adapter": "team/other"})[0].id != job.id


def test_equal_work_asked_for_at_once_is_one_job(shop: Shop) -> None:
    ready = threading.Barrier(4)

    def ask(_: int) -> str:
        ready.wait()
        return shop.submit()[0].id

    with ThreadPoolExecutor(4) as crew:
        assert len(set(crew.map(ask, range(4)))) == 1


def test_a_succeeded_job_is_reused_unless_fresh_or_fired_by_a_schedule(shop: Shop) -> None:
    job, _ = shop.submit()
    claimed = shop.claim()
    assert claimed is not None
    shop.finish(claimed, pushes=[shop.push(claimed)])
    assert shop.submit()[1]
    fired, reused = shop.submit(salt="s1 v2")
    assert not reused
    assert fired.id != job.id
    assert not shop.submit(fresh=True)[1]


def test_a_failed_job_is_not_reused(small: Shop) -> None:
    job, _ = small.submit()
    claimed = small.claim()
    assert claimed is not None
    assert small.fail(claimed).state == "failed"
    assert small.submit()[0].id != job.id


def test_equal_work_of_two_namespaces_is_two_jobs_for_each_must_see_its_own(small: Shop) -> None:
    recipe = {"kind": "evaluate", "base": "demo", "suite": "team/suite"}
    small.world.push_rows("suite", "team/suite", ITEMS)
    mine = small.do(lambda s: jobs.submit(s, ADMIN, JobRequest(recipe=recipe, namespace="team"), small.world.now))[0]
    theirs = small.do(lambda s: jobs.submit(s, ADMIN, JobRequest(recipe=recipe, namespace="other"), small.world.now))[0]
    assert mine.id != theirs.id


@pytest.mark.parametrize(
    ("changes", "problem", "says"),
    [
        ({"recipe": {"kind": "nonsense"}}, BadRequest, "kind"),
        ({"recipe": {"steps": 0}}, BadRequest, "steps"),
        ({"recipe": {"targets": ["q\0"]}}, BadRequest, "NUL"),
        ({"recipe": {"datasets": ["team/nothing"]}}, LoractlError, "team/nothing"),
        ({"recipe": {"datasets": ["sha256:" + "0" * 64]}}, BadRequest, "no dataset"),
        ({"recipe": {"base": "other"}}, LoractlError, "other"),
        ({"output": {"adapter": None}}, BadRequest, "output.adapter"),
        ({"output": {"aliases": ["v7!"]}}, LoractlError, "v7!"),
        ({"output": {"task": "x" * 201}}, BadRequest, "output.task"),
        ({"output": {"message": "x" * 2001}}, BadRequest, "output.message"),
        ({"recipe": {"kind": "merge", "adapter": "team/bot"}}, LoractlError, "team/bot"),
        ({"queue": "No Queue"}, LoractlError, "queue"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(
    small: Shop, changes: dict[str, Any], problem: type[LoractlError], says: str
) -> None:
    with pytest.raises(problem, match=says):
        small.submit(**changes)
    assert small.world.all(select(Job)) == []


def test_asking_needs_run_publish_and_read_where_it_touches(small: Shop) -> None:
    with pytest.raises(ScopeMissing, match="'run' on 'team'"):
        small.submit(caller("a", team=["read", "publish"]))
    with pytest.raises(ScopeMissing, match="'publish' on 'team'"):
        small.submit(caller("b", team=["read", "run"]))
    with pytest.raises(LoractlError, match="team/rows"):
        small.submit(caller("c", mine=["read", "run", "publish"]), output={"adapter": "mine/bot"})
    with pytest.raises(LoractlError, match="team/rows"):
        small.submit(ANN)


def test_a_base_without_weights_and_an_adapter_that_is_no_lora_run_nowhere(small: Shop, tmp_path: Path) -> None:
    small.world.register(base_of(tiny_base(tmp_path / "bare", seed=5)), line="bare")
    with pytest.raises(WeightsAbsent):
        small.submit(recipe={"base": "bare"})
    small.world.push_adapter(
        tiny_adapter(tmp_path / "odd", small.base, peft_type="LOHA"), "team/odd", small.base
    )
    with pytest.raises(NotRunnable):
        small.asked({"kind": "merge", "adapter": "team/odd"}, line="merged")


FULL = {"kind": "full-finetune", "base": "demo", "datasets": ["team/rows"], "steps": 2}


def test_what_the_tensor_table_of_a_base_shows_to_be_wrong_is_refused_when_it_is_asked_for(small: Shop) -> None:
    with pytest.raises(UnknownTargets, match=r"'q_prj' match no module of the base\. Did you mean 'q_proj'"):
        small.submit(recipe={"targets": ["v_proj", "q_prj"]})
    with pytest.raises(RankTooHigh, match=r"Rank 17 .*at most"):
        small.submit(recipe={"targets": ["k_proj"], "rank": 17})
    with pytest.raises(UnknownTargets, match="'norms'"):
        small.submit(recipe={"whole": ["norms"]})
    with pytest.raises(UnknownTargets, match="'nothing'"):
        small.asked(FULL | {"parameters": ["q_proj", "nothing"]}, line="tuned")
    assert small.world.all(select(Job)) == []
    for targets in (["layers.0.mlp.up_proj", "lm_head", "embed_tokens"], ["all-linear"]):
        small.submit(recipe={"targets": targets})
    small.asked(FULL | {"parameters": ["q_proj", "model.norm", "layers.1", "lm_head"]}, line="tuned")


def test_a_base_of_an_unknown_type_is_looked_at_by_the_worker(small: Shop, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "strange", seed=9)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    small.world.push_base(folder, line="strange")
    assert small.submit(recipe={"base": "strange", "targets": ["whatever"]})[0].state == "queued"


def test_a_suite_whose_calibration_split_chooses_nothing_is_refused_when_a_search_asks_for_it(small: Shop) -> None:
    search = {"kind": "search", "over": "rank", "base": "demo", "training": {"datasets": ["team/rows"], "steps": 2}}
    items = b"".join(b'{"prompt": "%d+1=", "completion": " %d"}\n' % (i, i + 1) for i in range(300))
    small.world.push_rows("suite", "team/small", ITEMS)
    small.world.push_rows("suite", "team/large", items)
    n = sum(split_of(item_id(json.loads(line))) == "calibration" for line in ITEMS.splitlines())
    with pytest.raises(SuiteTooSmall, match=f"has {n} items"):
        small.asked(search | {"suite": "team/small"}, adapter="team/bot")
    with small.world.database.write() as session:  # from before they were counted: at most all but the gate's
        for version in session.exec(select(DatasetVersion)):
            version.calibration_rows = None
    with pytest.raises(SuiteTooSmall):
        small.asked(search | {"suite": "team/small"}, adapter="team/bot")
    assert small.asked(search | {"suite": "team/large"}, adapter="team/bot").state == "queued"


def test_a_retraining_takes_the_policys_recipe_where_none_is_recorded(small: Shop, tmp_path: Path) -> None:
    small.world.push_adapter(small.adapter, "team/bot", small.base)
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    asked = {"tier": "retrain", "adapter": "team/bot", "base": "demo@r2", "kind": "rebase"}
    with pytest.raises(NotRunnable, match="has a recipe"):
        small.asked(asked, adapter="team/bot")
    recipe = small.submit(recipe={"base": "demo@r1", "steps": 500})[0].recipe
    policy = Policy(recipe=json.dumps(recipe), warm_steps=7)
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", policy, small.world.now))
    whole = small.asked(asked, adapter="team/bot").recipe
    assert whole["training"]["steps"] == 500
    assert whole["training"]["base"] == whole["base"] != whole["old"]
    short = small.asked(asked | {"tier": "warm-start"}, adapter="team/bot").recipe
    assert (short["training"]["steps"], short["candidates"]) == (7, 3)
    shorter = json.dumps(recipe | {"steps": 30})
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", Policy(recipe=shorter), small.world.now))
    few = small.asked(asked | {"tier": "warm-start"}, adapter="team/bot").recipe
    assert (few["training"]["steps"], few["candidates"]) == (7, 2)


def test_a_transport_reads_what_the_policy_retains_else_what_the_adapter_was_trained_on(
    small: Shop, tmp_path: Path
) -> None:
    small.world.push_adapter(small.adapter, "team/bot", small.base)
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    asked = {"tier": "transport", "adapter": "team/bot", "base": "demo@r2", "kind": "rebase"}
    assert small.asked(asked, adapter="team/bot").recipe["inputs"] is None
    recipe = small.submit(recipe={"base": "demo@r1"})[0].recipe
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", Policy(recipe=json.dumps(recipe)), small.world.now))
    assert small.asked(asked, adapter="team/bot").recipe["inputs"] == recipe["datasets"][0]
    kept = small.world.push_rows("dataset", "team/kept", b'{"prompt": "p", "completion": " s"}\n')["digest"]
    policy = Policy(recipe=json.dumps(recipe), retained="team/kept")
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", policy, small.world.now))
    job = small.asked(asked, adapter="team/bot")
    assert small.do(lambda s: jobs.inputs(s, job))["inputs"] == kept


def test_a_distillation_is_asked_as_the_adapter_was_trained_on_the_inputs_that_its_policy_retains(
    small: Shop, tmp_path: Path
) -> None:
    small.world.push_adapter(small.adapter, "team/bot", small.base)
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    asked = {"kind": "rebase", "tier": "distil", "adapter": "team/bot", "base": "demo@r2"}
    alone = small.asked(asked, adapter="team/bot").recipe
    assert (alone["inputs"], alone["training"], alone["distil"]["learning_rate"]) == (None, None, None)
    kept = small.world.push_rows("dataset", "team/questions", b'{"prompt": "p", "completion": " s"}\n')["digest"]
    other = small.world.push_rows("dataset", "team/others", b'{"prompt": "q", "completion": " s"}\n')["digest"]
    recipe = small.submit(recipe={"base": "demo@r1", "learning_rate": 3e-3, "batch_tokens": 64})[0].recipe
    policy = Policy(recipe=json.dumps(recipe), retained="team/questions")
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", policy, small.world.now))
    job = small.asked(asked | {"distil": {"texts": 9, "batch_tokens": 32}}, adapter="team/bot")
    assert job.recipe["inputs"] == small.do(lambda s: jobs.inputs(s, job))["inputs"] == kept
    told = job.recipe["distil"]
    assert (told["learning_rate"], told["batch_tokens"], told["texts"]) == (3e-3, 32, 9)
    assert small.asked(asked | {"inputs": "team/others"}, adapter="team/bot").recipe["inputs"] == other
    assert (alone["distil"]["temperature"], told["temperature"]) == (1, 1)
    answers = b"".join(b'{"prompt": "p%d", "completion": " s"}\n' % number for number in range(200))
    scored = files_push("suite", {"data.jsonl": answers}, config={"metrics": ["exact-match", "likelihood"]})
    small.world.push("suite", "team/answers", *scored)
    gate = Gate(suite="team/answers", metric="exact-match", margin=Margin(value=0.3))
    right = policy.model_copy(update={"gates": (gate,), "max_negative_flips": 0.3})
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", right, small.world.now))
    many = b"".join(b'{"prompt": "q%d", "completion": " s"}\n' % number for number in range(9))
    small.world.push_rows("dataset", "team/many", many)
    ways = [{"texts": 9}, {"texts": 10}, {"texts": 9, "temperature": 0.7}]
    found = [small.asked(asked | {"inputs": "team/many", "distil": way}, adapter="team/bot").recipe for way in ways]
    assert [one["distil"]["temperature"] for one in found] == [0, 1, 0.7]
    likely = right.model_copy(update={"gates": (gate.model_copy(update={"metric": "likelihood"}), gate)})
    small.do(lambda s: policies.put(s, ADMIN, "team", "bot", likely, small.world.now))
    first = asked | {"inputs": "team/many", "distil": {"texts": 9, "seed": 1}}
    assert small.asked(first, adapter="team/bot").recipe["distil"]["temperature"] == 1


def test_recorded_datasets_are_trained_on_by_those_who_may_read_them(small: Shop, tmp_path: Path) -> None:
    """A digest in a manifest or a policy is its author's word, and gives no right."""
    secret = small.world.push_rows("dataset", "secret/rows", b'{"prompt": "p", "completion": " s"}\n')["digest"]
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    trained = FineTune(base=str(base_of(small.base).digest), datasets=(secret,)).model_dump(mode="json")
    scan = scan_folder("adapter", small.adapter, base=base_of(small.base).digest, lineage=Lineage(recipe=trained))
    request, contents = request_of(scan)
    bob = caller("bob", bob=["read", "publish", "promote", "run"])
    small.world.push("adapter", "bob/bot", request, contents, bob)
    asked = {"kind": "rebase", "tier": "retrain", "adapter": "bob/bot@v1", "base": "demo@r2"}
    with pytest.raises(BadRequest, match="no dataset"):
        small.asked(asked, bob, adapter="bob/new")
    policy = Policy(recipe=json.dumps(trained))
    with pytest.raises(BadRequest, match="no dataset"):
        small.do(lambda s: policies.put(s, bob, "bob", "", policy, small.world.now))
    job = small.asked(asked, adapter="bob/new")
    assert secret in small.do(lambda s: jobs.inputs(s, job)).values()


@pytest.mark.parametrize("recipe", [{"kind": "rebase", "training": [1]}, {"kind": "finetune", "datasets": 7}])
def test_a_recipe_of_any_form_is_no_recipe(small: Shop, tmp_path: Path, recipe: dict[str, Any]) -> None:
    scan = scan_folder("adapter", small.adapter, base=base_of(small.base).digest, lineage=Lineage(recipe=recipe))
    request, contents = request_of(scan)
    small.world.push("adapter", "team/odd", request, contents)
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    with pytest.raises(NotRunnable, match="has a recipe"):
        small.asked(
            {"kind": "rebase", "tier": "retrain", "adapter": "team/odd", "base": "demo@r2"}, adapter="team/odd"
        )


def test_an_adapter_is_merged_into_its_own_base_and_rebased_from_it(small: Shop, tmp_path: Path) -> None:
    small.world.push_adapter(small.adapter, "team/bot", small.base)
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    with pytest.raises(OtherBase, match="belongs to base demo@r1"):
        small.asked({"kind": "merge", "base": "demo@r2", "adapter": "team/bot@v1"}, line="merged")
    compared = small.asked({"kind": "compare", "old": "demo@r1", "base": "demo@r2", "adapters": ["team/bot@v1"]})
    assert list(small.do(lambda s: jobs.inputs(s, compared))) == ["base", "old", "adapter.0"]
    with pytest.raises(OtherBase, match="a job of kind 'compare'"):
        small.asked({"kind": "compare", "old": "demo@r2", "base": "demo@r1", "adapters": ["team/bot@v1"]})
    with pytest.raises(OtherBase):
        small.asked(
            {"kind": "rebase", "tier": "carry", "old": "demo@r2", "base": "demo@r1", "adapter": "team/bot@v1"},
            adapter="team/bot",
        )
    small.asked({"kind": "merge", "base": "demo@r1", "adapter": "team/bot@v1"}, line="merged")


def test_only_what_a_tier_made_of_the_adapter_is_a_start_for_another(small: Shop, tmp_path: Path) -> None:
    version = small.world.push_adapter(small.adapter, "team/bot", small.base)
    new = tiny_base(tmp_path / "next", seed=2)
    small.world.push_base(new, line="demo")
    carried = {"kind": "rebase", "tier": "carry", "adapter": version["digest"], "old": str(base_of(small.base).digest),
               "base": str(base_of(new).digest)}  # fmt: skip
    folder = tiny_adapter(tmp_path / "made", new, seed=7)
    scan = scan_folder("adapter", folder, base=base_of(new).digest, lineage=Lineage(recipe=carried))
    made = small.world.push("adapter", "team/bot", *request_of(scan))
    asked = {"kind": "rebase", "tier": "distil", "adapter": "team/bot@v1", "base": "demo@r2"}
    job = small.asked(asked | {"made": {"carry": "team/bot@v2"}}, adapter="team/bot")
    assert job.recipe["made"] == {"carry": made["digest"]}
    assert "made.carry" in small.do(lambda s: jobs.inputs(s, job))
    for wrong in ({"align": "team/bot@v2"}, {"carry": "team/bot@v1"}):
        with pytest.raises(BadRequest, match="is not what that tier makes of the adapter on this base"):
            small.asked(asked | {"made": wrong}, adapter="team/bot")
    with pytest.raises(BadRequest, match="begins at nothing that others made"):
        small.asked(asked | {"tier": "align", "made": {"carry": "team/bot@v2"}}, adapter="team/bot")


def test_adapters_are_combined_and_compressed_on_their_own_base_which_needs_no_weights(
    small: Shop, tmp_path: Path
) -> None:
    bare = tiny_base(tmp_path / "bare", seed=5)
    small.world.register(base_of(bare), line="bare")
    for name, base in (("one", bare), ("two", bare), ("other", small.base)):
        small.world.push_adapter(tiny_adapter(tmp_path / name, base, seed=len(name)), f"team/{name}", base)
    combined = small.asked({"kind": "combine", "adapters": ["team/one@v1", "team/two@v1"]}, adapter="team/both")
    assert combined.recipe["base"] == str(base_of(bare).digest)
    assert list(small.do(lambda s: jobs.inputs(s, combined))) == ["adapter.0", "adapter.1"]
    compressed = small.asked({"kind": "compress", "adapter": "team/one@v1"}, adapter="team/small")
    assert (compressed.recipe["base"], compressed.recipe["energy"]) == (combined.recipe["base"], 0.95)
    with pytest.raises(OtherBase, match="a job of kind 'combine'"):
        small.asked({"kind": "combine", "adapters": ["team/one@v1", "team/other@v1"]}, adapter="team/both")
    with pytest.raises(BadRequest, match=r"output\.adapter"):
        small.asked({"kind": "compress", "adapter": "team/one@v1"})


def test_an_extraction_needs_the_weights_of_both_bases(small: Shop, tmp_path: Path) -> None:
    small.world.register(base_of(tiny_base(tmp_path / "bare", seed=5)), line="bare")
    small.world.push_base(tiny_base(tmp_path / "tuned", seed=6), line="tuned")
    with pytest.raises(WeightsAbsent):
        small.asked({"kind": "extract", "base": "demo@r1", "tuned": "bare@r1"}, adapter="team/tuned")
    job = small.asked({"kind": "extract", "base": "demo@r1", "tuned": "tuned@r1"}, adapter="team/tuned")
    assert {role: text[:7] for role, text in small.do(lambda s: jobs.inputs(s, job)).items()} == {
        "base": "sha256:", "tuned": "sha256:"
    }  # fmt: skip


def test_work_for_other_aliases_is_other_work(small: Shop) -> None:
    plain, _ = small.submit()
    wished, reused = small.submit(output={"aliases": ["prod", "canary"]})
    assert not reused
    assert wished.id != plain.id
    assert small.submit(output={"aliases": ["canary", "prod"]})[0].id == wished.id


# ── claiming ─────────────────────────────────────────────────────────────────


def test_two_that_claim_at_once_get_two_jobs(shop: Shop) -> None:
    asked = {shop.submit(recipe={"seed": seed})[0].id for seed in range(4)}
    ready = threading.Barrier(6)

    def take(index: int) -> str | None:
        ready.wait()
        found = shop.claim(worker(f"w{index}"))
        return found.id if found else None

    with ThreadPoolExecutor(6) as crew:
        taken = list(crew.map(take, range(6)))
    got = [job for job in taken if job is not None]
    assert len(got) == len(set(got))
    assert set(got) <= asked
    while (job := shop.claim()) is not None:  # a locked row may have been skipped; it is still there
        got.append(job.id)
    assert sorted(got) == sorted(asked)


def test_a_claim_is_a_lease_of_one_attempt(small: Shop) -> None:
    small.submit()
    job = small.claim()
    assert job is not None
    assert (job.state, job.attempt, job.token_id, job.worker) == ("running", 1, "ann", "ann")
    assert job.lease_until is not None
    assert (job.lease_until - small.world.now).total_seconds() == LEASE_S
    assert small.claim(BEN) is None


def test_a_claim_says_what_who_asked_may_call_the_data(shop: Shop) -> None:
    for name in ("other/copy", "team/rows"):
        shop.world.push_rows("dataset", name, ROWS)
    shop.world.push_rows("suite", "other/items", ITEMS)
    suite = shop.world.one(select(DatasetVersion.digest).where(DatasetVersion.rows == 20))
    rights = ["read", "run", "publish"]
    everywhere, here = (shop.world.grant(caller(name, **{name: rights})) for name in ("*", "team"))
    evaluation: dict[str, Any] = {"kind": "evaluate", "base": "demo", "suite": suite, "bare": True}

    def called(job: Job) -> dict[str, str]:
        return shop.do(lambda s: jobs.called(s, job, shop.world.now))

    mine = shop.submit(here)[0]
    assert called(mine) == {"dataset.0": "team/rows@v1"}
    theirs = shop.asked(evaluation, everywhere)
    assert called(theirs) == {"suite": "other/items@v1"}
    request = JobRequest(recipe=evaluation, output=Output(), namespace="team")
    named = shop.do(lambda s: jobs.submit(s, here, request, shop.world.now, suites=[suite]))[0]
    assert called(named) == {}  # a policy named it, and whoever asked may not read it


def test_fine_tunings_on_one_base_are_claimed_together_each_with_its_lease(small: Shop) -> None:
    asked = []
    for recipe in (*({"seed": seed} for seed in range(4)), {"precision": "fp32"}, {"sharded": True}):
        asked.append(small.submit(recipe=recipe)[0].id)
        small.world.later(seconds=1)
    other = asked[4]
    found = small.claim_many(3)
    assert [job.id for job in found] == asked[:3]
    assert {(job.state, job.attempt, job.token_id) for job in found} == {("running", 1, "ann")}
    small.world.later(seconds=9)
    small.fail(found[1], retryable=True)
    assert [small.now(job).state for job in found] == ["running", "queued", "running"]
    assert small.now(found[1]).lost_seconds == 3.0  # its share of nine
    assert {job.id for job in small.claim_many(9, BEN)} == {asked[1], asked[3]}
    assert [job.id for job in small.claim_many(9)] == [other]  # its precision is another
    assert len(small.claim_many(9)) == 1  # it divides the base among all GPUs
    assert small.claim_many(9) == []


def test_a_last_attempt_is_made_alone(small: Shop) -> None:
    for seed in range(2):
        small.submit(recipe={"seed": seed})
    for _ in range(2):
        found = small.claim_many(8)
        assert len(found) == 2
        for job in found:
            small.fail(job, retryable=True)
    assert [len(small.claim_many(8)) for _ in range(3)] == [1, 1, 0]


def test_a_worker_claims_from_its_queues_only(small: Shop) -> None:
    small.submit(queue="gpu")
    assert small.claim() is None
    assert small.claim(worker("gus", "gpu")) is not None
    with pytest.raises(NotYourJob):
        small.do(lambda s: jobs.claim(s, ANN, ClaimRequest(queue="gpu", worker="x"), LEASE_S, small.world.now))
    with pytest.raises(NotYourJob):
        small.do(lambda s: jobs.claim(s, ADMIN, ClaimRequest(queue="cpu", worker="x"), LEASE_S, small.world.now))


def test_jobs_on_a_cached_base_come_first_until_others_have_waited_for_long(shop: Shop, tmp_path: Path) -> None:
    shop.world.push_base(tiny_base(tmp_path / "second", seed=3), line="second")
    oldest, _ = shop.submit()
    shop.world.later(seconds=1)
    cached, _ = shop.submit(recipe={"base": "second"})
    manifest = shop.do(lambda s: jobs.inputs(s, cached))["base"]
    first = shop.claim(ANN, manifest)
    assert first is not None
    assert first.id == cached.id
    shop.fail(first, retryable=True)
    shop.world.later(hours=2)
    assert shop.submit(recipe={"base": "second", "seed": 9})[0].state == "queued"
    second = shop.claim(ANN, manifest)
    assert second is not None
    assert second.id == oldest.id


# ── the end, once ────────────────────────────────────────────────────────────


def test_the_result_is_committed_with_the_jobs_end_and_saying_so_twice_changes_nothing(shop: Shop) -> None:
    shop.submit(output={"aliases": ["live"]})
    job = shop.claim()
    assert job is not None
    push = shop.push(job)
    assert shop.world.all(select(Version)) == []
    done = shop.finish(job, pushes=[push])
    again = shop.finish(job, pushes=[push])
    assert done.state == again.state == "succeeded"
    assert done.result == again.result
    version = shop.world.one(select(Version))
    assert (version.number, version.job_id, version.created_by) == (1, job.id, "admin")
    assert shop.world.one(select(Alias)).version_id == version.id
    assert shop.told(job) == ["queued", "claimed", "succeeded"]


def test_two_ends_at_once_are_one(shop: Shop) -> None:
    shop.submit()
    job = shop.claim()
    assert job is not None
    push = shop.push(job)
    ready = threading.Barrier(3)

    def end(_: int) -> str:
        ready.wait()
        return shop.finish(job, pushes=[push]).state

    with ThreadPoolExecutor(3) as crew:
        assert set(crew.map(end, range(3))) == {"succeeded"}
    assert len(shop.world.all(select(Version))) == 1
    assert shop.told(job).count("succeeded") == 1


def test_a_worker_that_lost_its_lease_is_refused_and_its_push_is_not_committed(shop: Shop) -> None:
    shop.submit()
    lost = shop.claim()
    assert lost is not None
    push = shop.push(lost)
    shop.world.later(seconds=LEASE_S + 1)
    assert [job.id for job in shop.reconcile()] == [lost.id]
    with pytest.raises(LeaseLost):
        shop.finish(lost, pushes=[push])
    second = shop.claim(BEN)
    assert second is not None
    assert (second.id, second.attempt) == (lost.id, 2)
    for refused in (shop.finish, shop.fail, shop.beat):
        with pytest.raises(NotYourJob):
            refused(lost)
        with pytest.raises(LeaseLost):
            refused(lost, BEN)  # the same token in another hand: the attempt tells them apart
    assert shop.world.all(select(Version)) == []
    assert shop.finish(second, BEN, pushes=[shop.push(second, BEN)]).state == "succeeded"
    assert len(shop.world.all(select(Version))) == 1


def test_a_lease_taken_back_while_the_end_is_on_its_way_is_seen_by_it(
    postgres_database: Database, local_store: LocalStore, tmp_path: Path
) -> None:
    """The end waits for the row's lock; what the session saw of the row before does not count."""
    shop = _shop(World(postgres_database, local_store), tmp_path)
    shop.submit()
    job = shop.claim()
    assert job is not None
    push = shop.push(job)
    refused: list[LoractlError] = []

    def end() -> None:
        try:
            shop.finish(job, pushes=[push])
        except LoractlError as error:
            refused.append(error)

    with shop.world.database.write() as session:
        assert jobs.held(session, ANN, job.id, 1).id == job.id
        ending = threading.Thread(target=end)
        ending.start()
        ending.join(0.3)
        shop.world.later(seconds=LEASE_S + 1)
        assert len(jobs.requeue_expired(session, shop.world.now)) == 1
    ending.join()
    assert [type(error) for error in refused] == [LeaseLost]
    assert shop.world.all(select(Version)) == []


def test_work_done_again_gives_the_version_that_is_there(shop: Shop) -> None:
    for fresh in (False, True):
        shop.submit(fresh=fresh)
        job = shop.claim()
        assert job is not None
        done = shop.finish(job, pushes=[shop.push(job)])
        assert done.result is not None
        assert done.result["made"][0]["ref"] == "team/bot@v1"
    assert len(shop.world.all(select(Version))) == 1


def test_a_job_that_makes_something_does_not_succeed_without_it(small: Shop) -> None:
    small.submit()
    job = small.claim()
    assert job is not None
    with pytest.raises(BadRequest, match="one adapter"):
        small.finish(job)
    assert small.now(job).state == "running"


def test_an_evaluation_counts_once_for_what_was_asked(shop: Shop) -> None:
    shop.world.push_rows("suite", "team/suite", ITEMS)
    shop.world.push_adapter(shop.adapter, "team/bot", shop.base)
    asked = shop.asked({"kind": "evaluate", "suite": "team/suite", "adapters": ["team/bot"]})
    job = shop.claim()
    assert job is not None
    [digest] = asked.recipe["adapters"]
    text = _records()
    of_bare = ScoredInfo(adapter=None, records=text, harness=HARNESS)
    of_bot = ScoredInfo(adapter=digest, records=text, harness=HARNESS, seconds=1.5)
    other = ScoredInfo(adapter="sha256:" + "0" * 64, records=text, harness=HARNESS)
    for wrong in ([of_bare], [of_bot, of_bot, of_bare], [of_bot, of_bare, other]):
        with pytest.raises(BadRequest):
            shop.finish(job, evaluations=wrong)
    assert shop.world.all(select(Evaluation)) == []
    shop.finish(job, evaluations=[of_bare, of_bot])
    shop.finish(job, evaluations=[of_bare, of_bot])
    assert [row.seconds for row in shop.world.all(select(Evaluation).order_by(col(Evaluation.seconds)))] == [0.0, 1.5]


def _records() -> str:
    items = [f"{number:016x}" for number in range(40)]
    return to_jsonl(Record(item=item, split=split_of(item), metrics={"accuracy": 1}) for item in items).decode()


def test_a_comparison_is_kept_as_a_measured_derivation(small: Shop, tmp_path: Path) -> None:
    small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    small.asked({"kind": "compare", "old": "demo@r1", "base": "demo@r2"})
    job = small.claim()
    assert job is not None
    drift = {"model.norm.weight": 0.5}
    done = small.finish(job, result={"drift": drift, "median": 0.5, "cast": None})
    assert done.state == "succeeded"


# ── the end of an attempt ────────────────────────────────────────────────────


def test_a_lost_lease_is_another_attempt_until_they_are_used_up(shop: Shop) -> None:
    shop.submit()
    for attempt in (1, 2, 3):
        job = shop.claim()
        assert job is not None
        assert job.attempt == attempt
        assert shop.reconcile() == []
        shop.world.later(seconds=LEASE_S + 1)
        [taken] = shop.reconcile()
        assert taken.state == ("queued" if attempt < 3 else "failed")
    assert shop.claim() is None
    error = shop.now(taken).error
    assert error is not None
    assert error["code"] == "lease-lost"


def test_a_heartbeat_keeps_the_lease(small: Shop) -> None:
    small.submit()
    job = small.claim()
    assert job is not None
    for step in range(3):
        small.world.later(seconds=LEASE_S - 1)
        small.beat(job, progress={"step": step})
        assert small.reconcile() == []
    assert small.now(job).progress == {"step": 2}


def test_a_failure_is_another_attempt_only_if_it_may_pass(small: Shop) -> None:
    small.submit()
    first = small.claim()
    assert first is not None
    assert small.fail(first, retryable=True).state == "queued"
    second = small.claim()
    assert second is not None
    failed = small.fail(second)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "bad-request"


def test_any_progress_can_be_kept_and_events_are_bounded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_EVENTS", 6)
    shop.submit()
    job = shop.claim()
    assert job is not None
    odd = {"line": "a\0b \ud800", "loss": float("nan"), "rate": float("inf")}
    shop.beat(job, progress=odd, reported=[{"kind": "succeeded", **odd}, {"kind": "log", "line": "x" * 5000}])
    assert shop.now(job).progress == {"line": "a\N{REPLACEMENT CHARACTER}b ?", "loss": None, "rate": None}
    assert shop.told(job) == ["queued", "claimed", "progress"]  # a worker cannot say that it succeeded
    shop.beat(job, reported=[{"kind": "log", "line": str(i)} for i in range(10)])
    shop.beat(job, reported=[{"kind": "log", "line": "late"}])
    assert shop.told(job)[3:] == ["log"] * 3


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part)
)


@given(JSON)
@settings(deadline=None, max_examples=50)
def test_what_is_plain_stays_as_it_is(value: Any) -> None:
    once = jobs.plain(value)
    assert jobs.plain(once) == once


# ── a person's words ─────────────────────────────────────────────────────────


def test_a_waiting_job_is_cancelled_at_once_and_nobody_claims_it(small: Shop) -> None:
    job, _ = small.submit()
    assert small.cancel(job).state == "cancelled"
    assert small.cancel(job).state == "cancelled"
    assert small.claim() is None


def test_a_running_job_is_cancelled_through_its_worker(small: Shop) -> None:
    small.submit()
    job = small.claim()
    assert job is not None
    assert not small.beat(job).cancel_requested
    assert small.cancel(job).state == "running"
    assert small.beat(job).cancel_requested
    assert small.fail(job, retryable=True).state == "cancelled"


def test_what_a_cancelled_job_made_is_not_kept(shop: Shop) -> None:
    shop.submit()
    job = shop.claim()
    assert job is not None
    push = shop.push(job)
    shop.cancel(job)
    assert shop.finish(job, pushes=[push]).state == "cancelled"
    assert shop.world.all(select(Version)) == []


def test_a_cancelled_job_whose_worker_is_gone_ends_with_its_lease(small: Shop) -> None:
    small.submit()
    job = small.claim()
    assert job is not None
    small.cancel(job)
    small.world.later(seconds=LEASE_S + 1)
    small.reconcile()
    assert small.now(job).state == "cancelled"


def test_an_ended_job_is_tried_again_with_fresh_attempts_unless_an_equal_one_runs(small: Shop) -> None:
    job, _ = small.submit()
    small.cancel(job)
    again = small.retry(job)
    assert (again.state, again.finished_at) == ("queued", None)
    assert small.retry(job).state == "queued"
    claimed = small.claim()
    assert claimed is not None
    small.fail(claimed)
    newer, _ = small.submit()
    with pytest.raises(MoveNotAllowed, match=newer.id):
        small.retry(job)
    small.cancel(newer)
    assert small.retry(job).max_attempts == 4


def test_a_job_is_seen_cancelled_and_retried_by_who_may(small: Shop) -> None:
    job, _ = small.submit()
    reader, stranger = caller("r", team=["read"]), caller("s", other=["admin"])
    assert small.do(lambda s: jobs.get(s, reader, job.id)).id == job.id
    with pytest.raises(JobNotFound):
        small.do(lambda s: jobs.get(s, stranger, job.id))
    with pytest.raises(ScopeMissing):
        small.cancel(job, reader)
    with pytest.raises(JobNotFound):
        small.retry(job, stranger)

    def listed(who: Caller, **more: Any) -> list[str]:
        return [row.id for row in small.page(who, **more)]

    assert listed(reader) == [job.id]
    assert listed(stranger) == []
    assert listed(ADMIN, state="running") == []
    with pytest.raises(BadRequest, match="cursor"):
        listed(ADMIN, after=("yesterday", "j"))


def test_pages_go_on_where_the_last_one_ended(shop: Shop) -> None:
    made = []
    for seed in range(5):
        shop.world.later(seconds=seed % 2)
        made.append(shop.submit(recipe={"seed": seed})[0])
    seen: list[str] = []
    after: tuple[str, str] | None = None
    while True:
        rows = shop.page(after=after)
        if not rows:
            break
        seen += [row.id for row in rows]
        after = (rows[-1].created_at.isoformat(), rows[-1].id)
    assert sorted(seen) == sorted(job.id for job in made)


def test_what_waits_is_counted_by_queue(small: Shop) -> None:
    for seed in range(3):
        small.submit(recipe={"seed": seed}, queue="cpu" if seed else "gpu")
    assert small.do(jobs.waiting) == {"cpu": 2, "gpu": 1}
