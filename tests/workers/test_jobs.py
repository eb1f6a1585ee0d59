"""A worker against a real registry: every kind of job, and what a kill, a cancellation or a full disk changes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import structlog
from prometheus_client import generate_latest
from structlog.typing import EventDict

from cli.main import run
from registry import files
from registry.client import RegistryClient
from registry.core.errors import DatabaseDown, RegistryUnreachable
from registry.daemons import gc
from registry.db.models import Checkpoint, Job
from registry.files import digest_base
from registry.schemas import ClaimRequest, FinishRequest, JobInfo, JobRequest, Output, TokenRequest, Wishes
from registry.services import jobs
from registry.settings import WorkerSettings
from registry.transfer import push_adapter, push_base, push_dataset
from tests import live, servers
from tests.factories import tiny_adapter, tiny_llama
from workers.jobs import Worker
from workers.metrics import Meters

PATIENCE_S = 90.0
ROWS = "".join(json.dumps({"prompt": f"{i}+1=", "completion": f" {i + 1}"}) + "\n" for i in range(24))
ITEMS = "".join(
    json.dumps({"prompt": f"{i} is ", "choices": ["even", "odd"], "answer": i % 2}) + "\n" for i in range(24)
)
TRAINING = {
    "kind": "finetune", "base": "demo@r1", "datasets": ["team/rows"], "rank": 2, "batch_tokens": 32, "steps": 3,
    "max_length": 32, "precision": "fp32", "learning_rate": 1e-2,
}  # fmt: skip


@dataclass
class House:
    """A registry behind a socket with a base, a dataset and a suite; and what a worker of it is told."""

    registry: live.Live
    client: RegistryClient
    worker: WorkerSettings

    def submit(self, recipe: dict[str, Any], *, fresh: bool = False, **output: Any) -> JobInfo:
        return self.client.submit(JobRequest(recipe=recipe, output=Output(**output), fresh=fresh))

    def train(self, name: str = "team/bot", *, fresh: bool = False, **changes: Any) -> JobInfo:
        return self.submit(TRAINING | changes, fresh=fresh, adapter=name)

    def await_state(self, job: JobInfo, *states: str) -> JobInfo:
        return self.wait(job, lambda now: now.state in states)

    def wait(self, job: JobInfo, until: Callable[[JobInfo], bool]) -> JobInfo:
        deadline = time.monotonic() + PATIENCE_S
        while not until(now := self.client.job(job.id)):
            assert time.monotonic() < deadline, now
            time.sleep(0.05)
        return now

    def logged(self, job: JobInfo, attempt: int, kind: str) -> list[dict[str, Any]]:
        told = self.client.events(job.id, follow=False)
        return [event.data for event in told if (event.attempt, event.kind) == (attempt, kind)]

    @contextmanager
    def working(self) -> Iterator[None]:
        """A worker in a thread, until it finds nothing more to do."""
        with Worker(self.worker) as worker:
            thread = threading.Thread(target=worker.work, args=("cpu",), daemon=True)
            thread.start()
            yield
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@contextmanager
def house(folder: Path, base: Path, broker: str = "memory://", **changes: Any) -> Iterator[House]:
    made = live.registry(folder / "registry", broker_url=broker, lease_s=4, **changes)
    with made as found, found.client() as client:
        push_base(client, base, Wishes(line="demo"))
        for kind, text in (("dataset", ROWS), ("suite", ITEMS)):
            (folder / f"{kind}.jsonl").write_text(text)
        push_dataset(client, "dataset", folder / "dataset.jsonl", "team/rows")
        (folder / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 200}) + "\n")
        push_dataset(client, "dataset", folder / "long.jsonl", "team/too-long")
        push_dataset(client, "suite", folder / "suite.jsonl", "team/parity")
        token = client.create_token(TokenRequest(name="w", kind="worker", queues=["cpu"])).token
        settings = WorkerSettings(found.url, token, broker, folder / "cache", 1 << 30, "w")
        yield House(found, client, settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def home(tmp_path: Path, base: Path) -> Iterator[House]:
    (tmp_path / "registry").mkdir()
    with house(tmp_path, base) as made:
        yield made


def children(parent: int | None = None) -> list[psutil.Process]:
    """Run children below ``parent``, this process unless named."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "workers.run" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def eventually(question: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := question()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


# ── every kind ───────────────────────────────────────────────────────────────


def test_a_merged_base_is_hashed_while_it_is_sent(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LATE_FROM", 0)
    (tmp_path / "registry").mkdir()
    with house(tmp_path, base, multipart_from=4096, part_size=4096) as home:
        adapter = tiny_adapter(tmp_path / "adapter", base)
        push_adapter(home.client, adapter, "team/bot", str(digest_base(base).digest))
        home.registry.seen.clear()
        job = home.submit({"kind": "merge", "adapter": "team/bot"}, line="demo")
        with home.working():
            done = home.await_state(job, "succeeded", "failed")
        assert done.state == "succeeded", done.error
        sealed = [request for request in home.registry.seen if request.path.endswith("/seal")]
        assert [request.status for request in sealed] == [200]
        parts = [request for request in home.registry.puts() if "/staging/" in request.path]
        assert home.registry.seen.index(parts[0]) < home.registry.seen.index(sealed[0])
        merged = home.client.base("demo@r2")
        assert (merged.weights, merged.revisions) == ("full", ["demo@r2"])


def test_a_search_makes_a_version_with_the_recipe_that_it_found(home: House, tmp_path: Path) -> None:
    items = "".join(json.dumps({"prompt": f"{i}+2=", "completion": f" {i + 2}"}) + "\n" for i in range(160))
    (tmp_path / "sums.jsonl").write_text(items)
    push_dataset(home.client, "suite", tmp_path / "sums.jsonl", "team/sums")
    words = {"kind": "search", "over": "scale", "base": "demo@r1", "training": TRAINING, "suite": "team/sums"}
    job = home.submit(words | {"scales": [1.0], "rates": [0.5, 2.0]}, adapter="team/found")
    with home.working():
        done = home.await_state(job, "succeeded", "failed")
    assert done.state == "succeeded", done.error
    result = done.result or {}
    assert result["found"]["learning_rate"] == result["candidates"][result["chosen"]]["learning_rate"]
    assert result["made"][0]["ref"] == "team/found@v1"
    again = {"kind": "rebase", "tier": "retrain", "adapter": "team/found@v1", "old": "demo@r1", "base": "demo@r1"}
    retrained = home.submit(again, adapter="team/found")
    told = ("learning_rate", "alpha", "rank", "targets", "steps")
    assert {key: retrained.recipe["training"][key] for key in told} == {key: result["found"][key] for key in told}


def test_a_worker_trains_evaluates_merges_and_rebases(home: House) -> None:
    trained = home.train(checkpoint_every=0)
    with home.working():
        home.await_state(trained, "succeeded")
        evaluated = home.submit({"kind": "evaluate", "suite": "team/parity", "adapters": ["team/bot"]})
        merged = home.submit({"kind": "merge", "adapter": "team/bot"}, line="demo")
    with home.working():
        pass
    assert [home.client.job(job.id).state for job in (evaluated, merged)] == ["succeeded"] * 2
    words = {"kind": "rebase", "adapter": "team/bot@v1", "base": "demo@r2"}
    rebased = home.submit(words | {"tier": "carry"}, adapter="team/bot")
    with home.working():
        pass
    assert home.client.job(rebased.id).state == "succeeded"
    training = TRAINING | {"base": "demo@r2", "steps": 60}
    trained_on = [
        home.submit(words | {"tier": tier, "training": training}, adapter=f"team/{tier}")
        for tier in ("warm-start", "retrain")
    ]
    asked = {"texts": 24, "max_new_tokens": 4, "steps": 60}
    trained_on.append(home.submit(words | {"tier": "distil", "distil": asked}, adapter="team/distil"))
    with home.working():
        for one in trained_on:
            home.wait(one, lambda now: (now.progress or {}).get("step", 0) >= 1)
        assert len(children()) == 1  # on the base loaded once
    results = [home.client.job(one.id).result or {} for one in trained_on]
    assert [(one["tier"], one["made"][0]["ref"]) for one in results] == [
        ("warm-start", "team/warm-start@v1"), ("retrain", "team/retrain@v1"), ("distil", "team/distil@v1")
    ]  # fmt: skip
    assert results[2]["lesson"]["source"] == "inputs"
    assert home.client.job(trained_on[2].id).recipe["distil"]["learning_rate"] == TRAINING["learning_rate"]
    first, second = home.client.version("team/bot", "v1"), home.client.version("team/bot", "v2")
    assert (first.evidence, second.evidence, first.job) == ("recorded", "recorded", trained.id)
    assert second.base == home.client.base("demo@r2").digest != first.base
    found = home.client.evaluations("team/bot").items
    assert [row.version for row in found] == ["team/bot@v1"]
    assert {node.ref for node in home.client.lineage("team/bot", "v2").nodes} >= {"team/bot@v1", "team/bot@v2"}
    result = home.client.job(trained.id).result
    assert result is not None
    assert len(result["loss"]) == 3
    assert home.logged(trained, 1, "progress")[-1]["step"] == 3
    assert list((home.worker.cache / "jobs").iterdir()) == []  # nothing of a job that succeeded stays behind


def test_a_full_fine_tune_becomes_a_base_and_an_adapter_is_extracted_from_it(home: House) -> None:
    full = {key: value for key, value in TRAINING.items() if key != "rank"} | {"kind": "full-finetune"}
    tuned = home.submit(full | {"parameters": ["q_proj", "mlp"]}, line="tuned")
    with home.working():
        pass
    done = home.client.job(tuned.id)
    assert (done.state, (done.result or {})["made"][0]["ref"]) == ("succeeded", "tuned@r1")
    assert home.logged(tuned, 1, "progress")[-1]["step"] == 3
    shown = home.client.base("tuned@r1")
    parent = home.client.base("demo@r1")
    assert shown.digest != parent.digest
    diff = home.client.diff_bases("demo@r1", "tuned@r1")
    assert diff.derivation == {"kind": "continued", "evidence": "declared", "detail": {}}
    assert all("q_proj" in name or "mlp" in name for name in diff.changed)
    extracted = home.submit({"kind": "extract", "base": "demo@r1", "tuned": "tuned@r1"}, adapter="team/extracted")
    with home.working():
        pass
    assert home.client.job(extracted.id).state == "succeeded"
    assert home.client.version("team/extracted", "v1").base == parent.digest


# ── what may happen to it ────────────────────────────────────────────────────


def test_a_killed_attempt_is_gone_on_with_to_the_same_bytes(home: House) -> None:
    job = home.train(steps=40, checkpoint_every=1)
    with home.working():
        home.wait(job, lambda now: (now.progress or {}).get("step", 0) >= 2)
        [child] = children()
        told = child.environ()
        child.kill()
        home.await_state(job, "queued")
    assert not [text for text in (*told, *told.values()) if "LORACTL" in text or home.worker.token in text]
    error = home.client.job(job.id).error
    assert error is not None
    assert "SIGKILL" in error["detail"]
    with home.working():
        pass
    done = home.client.job(job.id)
    assert (done.state, done.attempt) == ("succeeded", 2)
    assert home.logged(job, 2, "progress")[0]["step"] > 1
    again = home.train(steps=40, checkpoint_every=1, fresh=True)
    with home.working():
        pass
    made = home.client.job(again.id).result
    assert made is not None
    assert made["made"][0]["ref"] == "team/bot@v1"  # equal bytes are the same version


def test_jobs_on_one_base_are_trained_in_one_process_and_each_ends_by_itself(home: House) -> None:
    short, wrong = home.train("team/short", steps=3), home.train("team/wrong", datasets=["team/too-long"])
    stopped, long = home.train("team/stopped", steps=100_000), home.train("team/long", steps=150, checkpoint_every=1)
    with home.working():
        home.await_state(short, "succeeded")  # while the others go on
        home.wait(long, lambda now: (now.progress or {}).get("step", 0) >= 1)
        assert len(children()) == 1
        assert home.client.job(long.id).state == "running"
        home.client.cancel_job(stopped.id)
        home.await_state(stopped, "cancelled")
        home.await_state(long, "succeeded")
    assert (failed := home.client.job(wrong.id)).state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "bad-dataset"
    assert failed.error["facts"]["path"] == "team/too-long@v1"
    made = [home.client.job(job.id) for job in (short, long)]
    assert [(job.result or {})["made"][0]["ref"] for job in made] == ["team/short@v1", "team/long@v1"]
    assert [home.logged(job, 1, "progress")[-1]["step"] for job in (short, long)] == [3, 150]


@pytest.mark.parametrize("whom", ["child", "worker"])
def test_a_killed_group_is_gone_on_with_to_the_same_bytes(home: House, whom: str) -> None:
    asked = [home.train(f"team/bot-{seed}", steps=30, checkpoint_every=1, seed=seed) for seed in range(3)]
    script = "import os; from registry.settings import WorkerSettings; from workers.jobs import Worker\n"
    script += "Worker(WorkerSettings.from_environment(os.environ)).work('cpu')"
    with subprocess.Popen([sys.executable, "-c", script], env=environment(home)) as worker:
        for job in asked:
            home.wait(job, lambda now: (now.progress or {}).get("step", 0) >= 2)
        [child] = children(worker.pid)
        (child if whom == "child" else worker).kill()
        psutil.wait_procs([child], timeout=PATIENCE_S)
    for job in asked:
        home.await_state(job, "queued")
    with home.working():
        pass
    done = [home.client.job(job.id) for job in asked]
    assert [(job.state, job.attempt) for job in done] == [("succeeded", 2)] * 3
    assert all(home.logged(job, 2, "progress")[0]["step"] > 1 for job in asked)
    again = [
        home.train(f"team/bot-{seed}", steps=30, checkpoint_every=1, seed=seed, fresh=True) for seed in range(3)
    ]
    with home.working():
        pass
    refs = [(home.client.job(job.id).result or {})["made"][0]["ref"] for job in again]
    assert refs == [f"team/bot-{seed}@v1" for seed in range(3)]  # equal bytes are the same version
    assert list((home.worker.cache / "jobs").iterdir()) == []


def recorded(home: House, job: JobInfo) -> int:
    """Steps that storage holds of a job."""
    with home.registry.parts.database.read() as session:
        row = session.get(Checkpoint, job.id)
        return row.step if row is not None else 0


def stored(home: House) -> list[Path]:
    folder = home.registry.parts.settings.data
    assert folder is not None
    return [path for path in (folder / "store" / "checkpoints").rglob("*") if path.is_file()]


def elsewhere(home: House, tmp_path: Path) -> House:
    """The same registry, and a worker that has nothing on its disk."""
    return replace(home, worker=replace(home.worker, cache=tmp_path / "elsewhere", checkpoint_s=0.05))


def test_another_worker_goes_on_where_a_killed_ones_disk_is_gone_to_the_same_bytes(home: House, tmp_path: Path) -> None:
    asked = [home.train(f"team/bot-{seed}", steps=120, checkpoint_every=1, seed=seed) for seed in range(2)]
    script = "import os; from dataclasses import replace; from registry.settings import WorkerSettings\n"
    script += "from workers.jobs import Worker\n"
    script += "Worker(replace(WorkerSettings.from_environment(os.environ), checkpoint_s=0.05)).work('cpu')"
    with subprocess.Popen([sys.executable, "-c", script], env=environment(home)) as worker:
        eventually(lambda: all(recorded(home, job) >= 2 for job in asked))
        [child] = children(worker.pid)
        worker.kill()
        psutil.wait_procs([child], timeout=PATIENCE_S)
    shutil.rmtree(home.worker.cache)
    left = [recorded(home, job) for job in asked]
    assert left[0] == left[1]  # of one moment
    for job in asked:
        home.await_state(job, "queued")
    other = elsewhere(home, tmp_path)
    with other.working():
        pass
    done = [home.client.job(job.id) for job in asked]
    assert [(job.state, job.attempt) for job in done] == [("succeeded", 2)] * 2
    assert all(home.logged(job, 2, "progress")[0]["step"] > left[0] for job in asked)
    assert f"Goes on from step {left[0]}," in home.logged(asked[0], 2, "log")[0]["line"]
    assert [recorded(home, job) for job in asked] == [0, 0]  # what succeeded needs none
    gc.step(home.registry.parts)
    assert stored(home) == []
    again = [
        home.train(f"team/bot-{seed}", steps=120, checkpoint_every=1, seed=seed, fresh=True) for seed in range(2)
    ]
    with other.working():
        pass
    refs = [(home.client.job(job.id).result or {})["made"][0]["ref"] for job in again]
    assert refs == [f"team/bot-{seed}@v1" for seed in range(2)]  # equal bytes are the same version


def test_a_damaged_checkpoint_is_not_used_and_the_job_begins_again(home: House, tmp_path: Path) -> None:
    job = home.train(steps=100_000)
    with home.working():
        home.wait(job, lambda now: (now.progress or {}).get("step", 0) >= 1)
        home.client.cancel_job(job.id)
    assert recorded(home, job) >= 1
    for path in stored(home):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    home.client.retry_job(job.id)
    other = elsewhere(home, tmp_path)
    with other.working():
        home.wait(job, lambda now: now.attempt == 2 and (now.progress or {}).get("step", 0) >= 1)
        home.client.cancel_job(job.id)
    assert "is damaged; the job begins again" in home.logged(job, 2, "log")[0]["line"]
    assert home.logged(job, 2, "progress")[0]["step"] == 1


def test_a_cancelled_job_ends_within_seconds_and_a_refusal_fails_as_it_was(home: House) -> None:
    wrong = home.train("team/wrong", datasets=["team/too-long"])
    with home.working():
        failed = home.await_state(wrong, "failed")
        assert failed.attempt == 1
        assert failed.error is not None
        assert failed.error["code"] == "bad-dataset"
        assert failed.error["detail"].startswith("'team/too-long@v1', line 1: the completion has 201 tokens")
    long = home.train("team/long", steps=100_000)
    with home.working():
        home.wait(long, lambda now: (now.progress or {}).get("step", 0) >= 1)
        home.client.cancel_job(long.id)
    ended = home.client.job(long.id)
    assert ended.state == "cancelled"
    assert children() == []
    assert list((home.worker.cache / "jobs").glob("*/attempt-*")) == []
    assert (home.worker.cache / "jobs" / long.id / "checkpoint").is_dir()  # for a retry
    assert recorded(home, long) >= 1  # and for one on another machine


def test_what_a_pause_stops_goes_on_from_its_checkpoint_and_has_used_up_no_attempt(home: House) -> None:
    job = home.train(steps=100_000, checkpoint_every=1)
    with home.registry.parts.database.write() as session:
        row = session.get_one(Job, job.id)
        row.campaign_id = "c1"
        session.add(row)
    with home.working():
        home.wait(job, lambda now: (now.progress or {}).get("step", 0) >= 2)
        with home.registry.parts.database.write() as session:
            jobs.hold(session, "c1", home.registry.parts.clock(), running=True)
        home.await_state(job, "queued")
    assert children() == []
    held = home.client.job(job.id)
    assert (held.held_by, held.attempt, held.max_attempts) == ("c1", 1, job.max_attempts + 1)
    with home.registry.parts.database.write() as session:
        assert jobs.let_go(session, "c1", home.registry.parts.clock()) == {"cpu"}
    with home.working():
        home.wait(job, lambda now: now.attempt == 2 and (now.progress or {}).get("step", 0) >= 1)
        home.client.cancel_job(job.id)
    assert home.client.job(job.id).state == "cancelled"
    assert home.logged(job, 2, "progress")[0]["step"] > 2


def test_a_cancellation_ends_a_download_too(home: House) -> None:
    job = home.train()
    with Worker(home.worker) as worker:
        claimed = worker.client.claim(ClaimRequest(queue="cpu", worker="w"))
        home.client.cancel_job(job.id)
        assert worker.run(claimed)
    assert home.client.job(job.id).state == "cancelled"


def test_a_full_disk_is_another_attempt_elsewhere(home: House, tmp_path: Path) -> None:
    job = home.train()
    script = "import os; from registry.settings import WorkerSettings; from workers.jobs import Worker\n"
    script += "from registry import logs; logs.configure()\n"
    script += "print(Worker(WorkerSettings.from_environment(os.environ)).work('cpu'))"
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment(home), capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    now = home.client.job(job.id)
    assert (said.stdout.strip(), now.state) == ("1", "queued"), said.stderr
    assert now.error is not None
    assert now.error["code"] == "disk-full"
    assert home.worker.token not in said.stdout + said.stderr


class Faltering(RegistryClient):
    """A way to the registry on which the database is down at the first finish, and the second one's answer is lost."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.asked: list[str] = []

    def finish(self, job_id: str, request: FinishRequest) -> JobInfo:
        self.asked.append(job_id)
        if len(self.asked) == 1:
            raise DatabaseDown(reason="gone")
        done = super().finish(job_id, request)
        if len(self.asked) == 2:
            raise RegistryUnreachable(url=self.url, reason="the answer was lost")
        return done


def test_finished_work_waits_for_a_registry_that_is_away(home: House) -> None:
    job = home.submit({"kind": "evaluate", "base": "demo@r1", "suite": "team/parity"})
    way, meters = Faltering(home.registry.url, home.worker.token), Meters()
    with Worker(home.worker, way, meters=meters) as worker:
        assert worker.work("cpu") == 1
    lines = generate_latest(meters.registry).decode().splitlines()
    assert 'loractl_worker_attempt_seconds_count{kind="evaluate",outcome="succeeded"} 1.0' in lines
    assert 'loractl_worker_jobs{kind="evaluate"} 0.0' in lines
    done = home.client.job(job.id)
    assert (done.state, done.attempt, way.asked) == ("succeeded", 1, [job.id] * 3)


# ── following ────────────────────────────────────────────────────────────────


def test_one_request_is_followed_from_a_command_through_api_and_worker_and_back(
    home: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORACTL_URL", home.registry.url)
    monkeypatch.setenv("LORACTL_TOKEN", home.registry.token)
    lines: list[EventDict] = []

    def kept(_logger: Any, _method: str, event: EventDict) -> EventDict:
        lines.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, kept])
    assert run(["evaluate", "--for", "demo@r1", "--suite", "team/parity", "--no-wait", "--json"]) == 0
    job = json.loads(capsys.readouterr().out)
    with home.working():
        assert home.await_state(JobInfo.model_validate(job), "succeeded", "failed").state == "succeeded"
    asked = next(line for line in lines if line["event"] == "job-queued")
    assert (asked["job"], asked["request"]) == (job["id"], job["origin"])
    told = {"attempt-begins", "attempt-ended", "job-claimed", "job-ended"}  # the worker's, and the API's
    found = [line for line in lines if line["event"] in told]
    assert {line["event"] for line in found} == told
    assert {(line["job"], line["origin"]) for line in found} == {(job["id"], job["origin"])}
    back = {line["path"].rpartition("/")[2]: line for line in lines if line["event"] == "request" and "job" in line}
    assert set(back) >= {"inputs", "finish"}
    assert {(line["job"], line["origin"]) for line in back.values()} == {(job["id"], job["origin"])}
    assert all(line["request"] != job["origin"] for line in back.values())


# ── Celery and brokers ───────────────────────────────────────────────────────


def environment(home: House) -> dict[str, str]:
    return os.environ | {
        "LORACTL_URL": home.registry.url,
        "LORACTL_TOKEN": home.worker.token,
        "LORACTL_BROKER_URL": home.worker.broker_url,
        "LORACTL_CACHE_DIR": str(home.worker.cache),
    }


@contextmanager
def celery(home: House, log: Path, **more: str) -> Iterator[psutil.Process]:
    """A real Celery worker; killed on leaving if it lives."""
    command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", "cpu", "--loglevel", "INFO"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment(home) | more, stdout=output, stderr=output
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["sqlite", "valkey"])
def test_killing_the_worker_changes_nothing_but_time(
    kind: str, tmp_path: Path, base: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "registry").mkdir()
    broker = f"sqla+sqlite:///{tmp_path / 'broker.db'}" if kind == "sqlite" else request.getfixturevalue("valkey_url")
    log = tmp_path / "celery.log"
    with house(tmp_path, base, broker) as home:
        with celery(home, log) as idle:
            eventually(lambda: b"ready" in log.read_bytes())
            idle.kill()
        job = home.train()
        with celery(home, log) as busy:
            [child] = eventually(lambda: children(busy.pid))
            family = busy.children(recursive=True)
            busy.kill()
            psutil.wait_procs(family, timeout=PATIENCE_S)
            assert not [process for process in family if process.is_running()]
            assert not child.is_running()
        with celery(home, log) as third:
            home.wait(job, lambda now: now.state == "running" and now.attempt == 2)
            [child] = eventually(lambda: children(third.pid))
            [pool] = [process for process in third.children() if process.children()]
            pool.kill()  # Celery starts another one; the job's child goes with its parent
            psutil.wait_procs([child], timeout=PATIENCE_S)
            done = home.await_state(job, "succeeded", "failed")
        assert (done.state, done.attempt) == ("succeeded", 3)
        assert [row.ref for row in home.client.versions("team/bot").items] == ["team/bot@v1"]
        assert home.worker.token not in log.read_text()
        if kind == "valkey":
            [password] = re.findall(r"://:([^@]+)@", broker)
            assert password not in log.read_text()


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_a_worker_that_is_told_to_stop_hands_its_jobs_back_and_they_go_on_elsewhere(
    together: bool, tmp_path: Path, base: Path, valkey_url: str
) -> None:
    (tmp_path / "registry").mkdir()
    with house(tmp_path, base, valkey_url) as home:
        names = ("team/one", "team/two") if together else ("team/one",)
        jobs = [home.train(name, steps=100_000, checkpoint_every=1) for name in names]
        with celery(home, tmp_path / "celery.log", LORACTL_GRACE_S="0") as worker:
            for job in jobs:
                home.wait(job, lambda now: (now.progress or {}).get("step", 0) >= 1)
            worker.terminate()
            assert worker.wait(PATIENCE_S) == 0
        for job in jobs:
            now = home.client.job(job.id)
            assert (now.state, now.attempt, now.max_attempts) == ("queued", 1, 4)
            assert now.error is not None and "its worker stopped" in now.error["detail"]
            assert recorded(home, job) >= 1
        other = elsewhere(home, tmp_path)
        with other.working():
            for job in jobs:
                home.wait(job, lambda now: now.attempt == 2 and (now.progress or {}).get("step", 0) >= 1)
                home.client.cancel_job(job.id)
        for job in jobs:
            assert home.logged(job, 2, "progress")[0]["step"] > 1  # not from the beginning


def test_a_job_that_ends_within_the_grace_is_let_end(tmp_path: Path, base: Path, valkey_url: str) -> None:
    (tmp_path / "registry").mkdir()
    with house(tmp_path, base, valkey_url) as home:
        job = home.train()
        [port] = servers.free_ports(1)
        more = {"LORACTL_GRACE_S": "90", "LORACTL_WORKER_METRICS_PORT": str(port)}
        with celery(home, tmp_path / "celery.log", **more) as worker:
            eventually(lambda: children(worker.pid))
            told = httpx.get(f"http://127.0.0.1:{port}/metrics").text  # by the parent, of what its pool is at
            assert 'loractl_worker_jobs{kind="finetune"} 1.0' in told
            worker.terminate()
            assert worker.wait(PATIENCE_S) == 0
        done = home.client.job(job.id)
        assert (done.state, done.attempt) == ("succeeded", 1)


def test_a_run_child_ends_with_the_process_that_started_it(home: House, tmp_path: Path) -> None:
    home.train(steps=100_000)
    script = "import os; from registry.settings import WorkerSettings; from workers.jobs import Worker\n"
    script += "Worker(WorkerSettings.from_environment(os.environ)).work('cpu')"
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment(home))
    [child] = eventually(lambda: children(parent.pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=PATIENCE_S)
    assert not child.is_running()
