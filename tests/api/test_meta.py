"""Health, who am I, the doctor, and the description of all routes, kept as a golden file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.daemons.run import probe
from registry.db.engine import Database
from registry.db.models import Job
from registry.schemas import ClaimRequest, Finding
from registry.services import doctor, gauges, jobs, tokens
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests.golden.make import OPENAPI, openapi
from tests.world import SETTINGS, World

TOKEN = tokens.make_text()


@pytest.fixture
def parts(world: World) -> AppParts:
    settings = replace(SETTINGS, bootstrap_token=TOKEN)
    return AppParts(settings, world.database, world.store, Broker("memory://"))


@pytest.fixture
def api(parts: AppParts) -> Iterator[TestClient]:
    with TestClient(create_app(parts), headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def test_the_description_of_the_routes_is_the_golden_one() -> None:
    """A change of the wire is a change of this file: python -m tests.golden.make, and look at the difference."""
    assert json.loads(OPENAPI.read_text()) == json.loads(openapi())


def test_health_needs_no_token_and_everything_else_of_meta_does(api: TestClient) -> None:
    assert api.get("/health", headers={"authorization": ""}).json()["status"] == "ok"
    assert api.get("/openapi.json", headers={"authorization": ""}).status_code == 401
    assert "/v1/resolve" in api.get("/openapi.json").json()["paths"]
    assert api.get("/docs").status_code == 404


def test_who_am_i(api: TestClient) -> None:
    me = api.get("/v1/whoami").json()
    assert (me["id"], me["kind"], me["scopes"]) == (TOKEN.split("_")[1], "user", {"*": ["admin"]})


def test_the_doctor_finds_nothing_where_all_is_well(api: TestClient) -> None:
    findings = api.get("/v1/doctor").json()["findings"]
    checks = {finding["check"] for finding in findings} - {"clock"}  # SQLite has ours
    assert checks == {"database", "migrations", "store", "broker", "workers", "worker versions"}
    assert all(finding["ok"] or finding["check"] == "store" for finding in findings), findings


def test_the_doctor_says_what_is_missing_and_what_helps(
    embedded: World, local_store: LocalStore, tmp_path: Path
) -> None:
    empty = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    broken = AppParts(SETTINGS, empty, local_store, Broker("redis://127.0.0.1:9/0"))
    with broken.http() as http:
        found = {f.check: f for f in doctor.findings(empty, local_store, broken.broker, http, embedded.now)}
    assert not found["migrations"].ok
    assert "registry.db.migrate" in found["migrations"].help
    assert not found["broker"].ok
    nowhere = Database("postgresql+psycopg://nobody:secret@127.0.0.1:9/none")
    with broken.http() as http:
        down = doctor.findings(nowhere, local_store, broken.broker, http, embedded.now)[0]
    assert (down.check, down.ok) == ("database", False)
    assert "secret" not in down.detail
    unreachable = LocalStore(tmp_path / "store", "http://127.0.0.1:9", b"key")
    with broken.http() as http:
        told = {f.check: f for f in doctor.findings(embedded.database, unreachable, broken.broker, http, embedded.now)}
    assert not told["store"].ok
    for database in (empty, nowhere):
        database.close()


def test_the_doctor_finds_a_queue_without_a_worker_a_worker_of_another_version_and_a_clock_that_is_off(
    world: World, parts: AppParts
) -> None:
    def told(now: datetime) -> dict[str, Finding]:
        with parts.http() as http:
            return {f.check: f for f in doctor.findings(world.database, world.store, parts.broker, http, now)}

    with world.database.write() as session:
        session.add(job_row("j1", world.now))
    assert told(world.now)["workers"].ok  # it is young
    world.later(seconds=120)
    waits = told(world.now)["workers"]
    assert (waits.ok, "-Q gpu" in waits.help) == (False, True)
    worker = Caller("w", "w", "worker", {"queues": ["gpu"]})
    request = ClaimRequest(queue="gpu", worker="old-box")
    with world.database.write() as session:
        assert jobs.claim(session, worker, request, 60, world.now, "loractl/0.0.1") is not None
    found = told(world.now)
    assert found["workers"].ok
    assert (found["worker versions"].ok, "old-box (loractl/0.0.1)" in found["worker versions"].detail) == (False, True)
    if world.database.dialect == "postgresql":
        assert not told(datetime.now(UTC) + timedelta(hours=1))["clock"].ok
        assert told(datetime.now(UTC))["clock"].ok


def job_row(identity: str, now: datetime) -> Job:
    digest = "sha256:" + "1" * 64
    return Job(
        id=identity, kind="evaluate", queue="gpu", state="queued", namespace="team", recipe={}, recipe_digest=digest,
        key=identity, output={}, base=digest, created_by="admin", created_at=now,
    )  # fmt: skip


def test_metrics_tell_queues_from_the_rows_and_requests_by_their_template(world: World, api: TestClient) -> None:
    with world.database.write() as session:
        for number in range(3):
            session.add(job_row(f"j{number}", datetime.now(UTC) - timedelta(seconds=90)))
    for name in ("one", "two"):
        api.get(f"/v1/adapters/team/{name}")
    api.get("/nowhere/at/all")
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'loractl_jobs{queue="gpu",state="queued"} 3.0' in lines
    [wait] = [float(line.split()[1]) for line in lines if line.startswith('loractl_job_wait_seconds{queue="gpu"}')]
    assert 89 < wait < 600
    template = 'loractl_request_seconds_count{method="GET",route="/v1/adapters/{namespace}/{name}",status="404"} 2.0'
    assert template in lines
    assert 'loractl_request_seconds_count{method="GET",route="(none)",status="404"} 1.0' in lines
    assert "team" not in answer.text


def test_queues_that_people_invent_do_not_multiply_the_series(world: World) -> None:
    with world.database.write() as session:
        for number in range(gauges.MOST_QUEUES + 5):
            row = job_row(f"j{number}", world.now)
            row.queue = f"q{number}"
            session.add(row)
    with world.database.read() as session:
        found = gauges.queues(session, world.now)
    assert len(found) == gauges.MOST_QUEUES + 1
    assert (found[-1].name, found[-1].waiting) == (gauges.OTHERS, 5)


def test_daemons_look_once_and_start_whatever_they_find(parts: AppParts) -> None:
    probe(parts)


def test_processes_that_start_at_once_make_the_first_token_once(world: World, parts: AppParts) -> None:
    with TestClient(create_app(parts)), TestClient(create_app(parts)):
        assert parts.caller(TOKEN).name == "admin"
