"""The main story on a fleet: the very commands of docker-compose.yml as processes, and its servers failing in between.

One test, because its parts share what is dear (a database, a store, workers that load torch); it reads as a protocol.
Models are tiny and learn in seconds; which way the adapter goes is decided by the gate.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.factories import letters, readable_base
from tests.fleet.fleet import Fleet, fleet
from tests.servers import S3Server

WIDTH = 288
"""Wide enough that the weights go in two parts, the first of the smallest size that S3 takes."""
PART = 5 << 20


def test_a_fleet_lives_through_the_main_story_and_the_death_of_its_parts(tmp_path: Path, seaweed: S3Server) -> None:
    old = readable_base(tmp_path / "base-1", width=WIDTH)
    new = readable_base(tmp_path / "base-2", width=WIDTH, drift=0.01)
    letters(tmp_path)
    more = {"LEASE_S": "8", "PART_SIZE": str(PART), "MULTIPART_FROM": str(PART + 1), "LOG_LEVEL": "debug"}
    with fleet(tmp_path, seaweed, **{f"LORACTL_{name}": value for name, value in more.items()}) as here:
        everything_starts(here)
        pushed(here, old)
        trained_while_postgres_restarts(here)
        evaluated_after_redis_lost_everything(here)
        promoted_and_upgraded_while_a_worker_is_killed(here, new)
        two_bases_pull_two_versions(here, old, new)
        bytes_went_past_the_api_and_secrets_into_no_log(here, old, new)


def everything_starts(here: Fleet) -> None:
    """Migrate, then two of each: API, daemons; and a worker."""
    migrate = here.start("migrate", "migrate")
    assert migrate.process.wait(60) == 0, migrate.log_tail()
    for name in ("api-1", "api-2"):
        here.start("api", name, here.ports[name])
    for name in ("daemons-1", "daemons-2"):
        here.start("daemons", name)
    for name in ("api-1", "api-2"):
        here.lives[name][0].wait_until(lambda name=name: answers(here.ports[name]))  # type: ignore[misc]
    here.start("worker-cpu", "worker-1")
    here.loractl("login", here.url, "--token", here.values["LORACTL_BOOTSTRAP_TOKEN"])
    assert here.loractl("whoami")["name"] == "admin"
    assert here.loractl("doctor")["ok"]


def pushed(here: Fleet, old: Path) -> None:
    """The base in parts, data in one; again: nothing is sent."""
    assert here.loractl("base", "push", old, "--line", "demo")["outcome"]["ref"] == "demo@r1"
    asked = [line["path"] for name in ("api-1", "api-2") for line in requests(here, name)]
    assert [path for path in asked if path.startswith("/v1/pushes/") and path.endswith("/parts")]
    here.loractl("dataset", "push", "data.jsonl", "team/letters")
    here.loractl("suite", "push", "suite.jsonl", "team/letters-test", "--metric", "accuracy")
    before = here.front.passed
    assert here.loractl("base", "push", old, "--line", "demo")["state"] == "committed"
    assert here.front.passed - before < 100_000


def trained_while_postgres_restarts(here: Fleet) -> None:
    job = here.loractl("train", recipe(here), "--output", "team/bot", "--no-wait")["id"]
    here.until(lambda: any("workers.run" in member.cmdline() for member in family(here, "worker-1")), "the job runs")
    the_worker_knows_no_secret(here, "worker-1")
    here.stop("postgres")
    assert here.healths() == [503, 503]
    assert here.loractl("list", code=3)["error"]["code"] == "database-down"
    here.start_postgres()
    here.until(lambda: here.healths() == [200, 200], "the API finds its database again")
    assert here.loractl("jobs", "watch", job)["state"] == "succeeded"


def the_worker_knows_no_secret(here: Fleet, name: str) -> None:
    """Neither it nor its children can reach the database or the store but through the API."""
    secrets = {
        value for key, value in here.values.items()
        if key in ("POSTGRES_PASSWORD", "REDIS_REGISTRY_PASSWORD", "LORACTL_BOOTSTRAP_TOKEN", "LORACTL_SIGNING_KEY")
        or key.startswith("LORACTL_S3")
    }  # fmt: skip
    for member in family(here, name):
        environment = member.environ()
        assert not [key for key in environment if "DATABASE" in key or "S3" in key or "SIGNING" in key]
        assert not [value for value in environment.values() if any(secret in value for secret in secrets)]


def evaluated_after_redis_lost_everything(here: Fleet) -> None:
    """The wake-up of this job never arrives: the reconciler repeats it."""
    here.stop("redis")
    asked = ("evaluate", "team/bot@v1", "--suite", "team/letters-test", "--no-wait")
    job = here.loractl(*asked)["id"]
    wrong = [finding["check"] for finding in here.loractl("doctor", code=1)["findings"] if not finding["ok"]]
    assert wrong == ["broker"]
    here.start_redis()
    assert here.loractl("jobs", "watch", job)["state"] == "succeeded"


def promoted_and_upgraded_while_a_worker_is_killed(here: Fleet, new: Path) -> None:
    """A gate, an alias, a schedule; the new revision does the rest, once: two schedulers, two workers, one version."""
    here.loractl("policy", "set", "team", "--suite", "team/letters-test", "--metric", "accuracy", "--margin", "0.1")
    assert here.loractl("promote", "team/bot@v1", "prod")["version"] == 1
    here.loractl("schedule", "add", "base-upgrade", "demo", "--namespace", "team", "--upgrade")
    assert here.loractl("base", "push", new, "--line", "demo")["outcome"]["ref"] == "demo@r2"
    [campaign] = here.until(lambda: here.loractl("upgrade", "status"), "the schedule fires")
    running = "/v1/jobs?state=running"
    [carry] = here.until(
        lambda: [job["id"] for job in here.get(running)["items"] if job["kind"] == "rebase"], "the carry runs"
    )
    os.killpg(here.lives["worker-1"][0].process.pid, signal.SIGKILL)  # with its children, as a container's end
    here.start("worker-cpu", "worker-2")
    ended = here.loractl("upgrade", "status", campaign["id"], "--watch")
    assert ended["state"] == "finished"
    [item] = ended["items"]
    assert (item["adapter"], item["state"]) == ("team/bot", "promoted"), item["reason"]
    job = here.get(f"/v1/jobs/{carry}")
    assert (job["state"], job["attempt"], job["worker"]) == ("succeeded", 2, "worker-2")
    assert [version["version"] for version in here.loractl("show", "team/bot")["versions"]] == [2, 1]
    assert len(here.loractl("upgrade", "status")) == 1


def two_bases_pull_two_versions(here: Fleet, old: Path, new: Path) -> None:
    pulled = [
        here.loractl("pull", "team/bot:prod", "--for", base, "--out", here.folder / f"for-{base.name}")
        for base in (old, new)
    ]
    assert [answer["ref"] for answer in pulled] == ["team/bot@v1", "team/bot@v2"]
    assert [answer["fit"]["fit"] for answer in pulled] == ["exact", "exact"]
    assert all(Path(file).is_file() for answer in pulled for file in answer["files"])


def bytes_went_past_the_api_and_secrets_into_no_log(here: Fleet, old: Path, new: Path) -> None:
    """Two pushes and three fetches of bases went between client, workers and store; the front saw a fraction of one."""
    size = sum(file.stat().st_size for folder in (old, new) for file in folder.iterdir())
    assert here.front.passed < size / 4
    assert all(here.front.served.values())
    assert httpx.get(f"{here.url}/store/blobs/x").json()["code"] == "route-not-found"
    alive = ("api-1", "api-2", "daemons-1", "daemons-2", "worker-2")
    assert [name for name in alive if here.lives[name][0].process.poll() is not None] == []
    secrets = {key: value for key, value in here.values.items() if len(value) >= 32 and "URL" not in key}
    secrets |= {f"half of {key}": value.split("_", 2)[2] for key, value in secrets.items() if "TOKEN" in key}
    logs = {name: here.log(name) for name in (*alive, "migrate", "worker-1")}
    assert [(name, key) for name, log in logs.items() for key, value in secrets.items() if value in log] == []
    assert [name for name, log in logs.items() if "X-Amz-Signature=" in log.replace("X-Amz-Signature=***", "")] == []


# ── what it is made from ─────────────────────────────────────────────────────


def recipe(here: Fleet) -> Path:
    file = here.folder / "recipe.toml"
    file.write_text(
        'base = "demo@r1"\ndatasets = ["team/letters"]\ntargets = ["all-linear"]\nrank = 4\nalpha = 8.0\n'
        'learning_rate = 0.005\nsteps = 15\nbatch_tokens = 256\nmax_length = 32\nprecision = "fp32"\n'
    )
    return file


def family(here: Fleet, name: str) -> list[psutil.Process]:
    """A process and all its children."""
    process = psutil.Process(here.lives[name][0].process.pid)
    return [process, *process.children(recursive=True)]


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def requests(here: Fleet, name: str) -> list[dict[str, Any]]:
    """The requests that an API process has logged."""
    lines = [line for line in here.log(name).splitlines() if line.startswith("{")]
    return [line for line in map(json.loads, lines) if line["event"] == "request"]
