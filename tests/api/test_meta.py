"""Health, who am I, the doctor, and the description of all routes, kept as a golden file."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.daemons import reconciler, sequencer
from registry.daemons.run import probe
from registry.db.engine import Database
from registry.db.models import Job
from registry.parts import Parts
from registry.schemas import ClaimRequest, Finding, WebhookRequest
from registry.services import doctor, gauges, jobs, tokens, webhooks
from registry.services.seals import Seals
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests import servers
from tests.golden.make import OPENAPI, openapi
from tests.storage.test_probe import Gullible
from tests.world import ADMIN, SETTINGS, World

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
    of_work = {"workers", "worker versions", "daemons", "webhook secrets"}
    assert checks == {"database", "migrations", "store", "broker", *of_work}
    assert all(finding["ok"] or finding["check"] == "store" for finding in findings), findings


@pytest.fixture
def told(world: World, parts: AppParts) -> Callable[[], dict[str, Finding]]:
    """What the doctor finds, by check."""
    return lambda: looked(parts, world.now)


def looked(parts: AppParts, now: datetime) -> dict[str, Finding]:
    """What the doctor finds, by check; of several under one check the last."""
    seals = Seals(parts.settings.seal_keys)
    with parts.http() as http:
        found = doctor.findings(parts.database, parts.store, parts.broker, http, now, seals)
    return {finding.check: finding for finding in found}


def test_the_doctor_finds_migrations_that_were_not_applied(local_store: LocalStore, tmp_path: Path) -> None:
    empty = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    found = looked(AppParts(SETTINGS, empty, local_store, Broker("memory://")), datetime.now(UTC))
    empty.close()
    assert (found["migrations"].ok, found["database"].ok) == (False, True)
    assert "0001" in found["migrations"].detail
    assert "registry.db.migrate" in found["migrations"].help


def test_the_doctor_finds_a_database_that_is_down_and_tells_no_password(local_store: LocalStore) -> None:
    nowhere = Database("postgresql+psycopg://nobody:secret@127.0.0.1:9/none")
    found = looked(AppParts(SETTINGS, nowhere, local_store, Broker("memory://")), datetime.now(UTC))
    nowhere.close()
    assert not found["database"].ok
    assert "secret" not in found["database"].detail


def test_the_doctor_finds_a_broker_that_is_down(embedded: World) -> None:
    found = looked(AppParts(SETTINGS, embedded.database, embedded.store, Broker("redis://127.0.0.1:9/0")), embedded.now)
    assert not found["broker"].ok


def test_the_doctor_finds_a_store_that_is_down(embedded: World, tmp_path: Path) -> None:
    unreachable = LocalStore(tmp_path / "store", "http://127.0.0.1:9", b"key")
    assert not looked(AppParts(SETTINGS, embedded.database, unreachable, Broker("memory://")), embedded.now)["store"].ok


def test_the_doctor_finds_a_store_that_lacks_what_the_registry_needs(embedded: World, tmp_path: Path) -> None:
    with servers.local_store(tmp_path / "store", Gullible) as gullible:
        found = looked(AppParts(SETTINGS, embedded.database, gullible, Broker("memory://")), embedded.now)
    assert not found["store"].ok
    assert "checksum" in found["store"].detail


def test_the_doctor_finds_a_clock_that_is_off(postgres_database: Database, local_store: LocalStore) -> None:
    parts = AppParts(SETTINGS, postgres_database, local_store, Broker("memory://"))
    assert looked(parts, datetime.now(UTC))["clock"].ok
    for wrong in (timedelta(hours=1), timedelta(seconds=-30)):
        found = looked(parts, datetime.now(UTC) + wrong)["clock"]
        assert not found.ok
        assert found.detail.startswith("-" if wrong < timedelta() else "+")


def test_the_doctor_finds_a_gpu_job_that_no_gpu_worker_takes(
    world: World, told: Callable[[], dict[str, Finding]]
) -> None:
    with world.database.write() as session:
        session.add(job_row("j1", world.now))
    assert told()["workers"].ok  # it is young
    world.later(seconds=120)
    waits = told()["workers"]
    assert (waits.ok, "'gpu'" in waits.detail, "-Q gpu" in waits.help) == (False, True, True)
    claimed(world, "a-gpu", f"loractl/{version('loractl')}")
    assert told()["workers"].ok


def test_the_doctor_finds_workers_of_another_version(world: World, told: Callable[[], dict[str, Finding]]) -> None:
    for number, (worker, agent) in enumerate(
        [("old-box", "loractl/0.0.1"), ("new-box", f"loractl/{version('loractl')}")]
    ):
        with world.database.write() as session:
            session.add(job_row(f"j{number}", world.now))
        claimed(world, worker, agent)
    found = told()["worker versions"]
    assert (found.ok, found.detail.endswith(": old-box (loractl/0.0.1)")) == (False, True)


def test_the_doctor_finds_what_daemons_leave_undone(world: World, told: Callable[[], dict[str, Finding]]) -> None:
    with world.database.write() as session:
        session.add(job_row("j1", world.now))
    claimed(world, "w", "")
    assert told()["daemons"].ok
    world.later(seconds=200)
    found = told()["daemons"]
    assert not found.ok
    assert found.detail == "leases that ran out are not taken back since 140 s; the audit is not chained since 200 s"
    parts = Parts(SETTINGS, world.database, world.store, Broker("memory://"), world.clock)
    reconciler.step(parts)
    sequencer.step(parts)
    assert told()["daemons"].ok


def test_the_doctor_says_how_secrets_of_webhooks_are_kept_and_finds_one_that_no_key_opens(embedded: World) -> None:
    keys = [Fernet.generate_key().decode() for _ in range(2)]
    for sealing in ((), keys[:1]):
        with embedded.database.write() as session:
            asked = WebhookRequest(url="http://receiver.test/")
            hook, _ = webhooks.add(session, ADMIN, asked, embedded.now, Seals(sealing))

    def found(*given: str) -> Finding:
        settings = replace(SETTINGS, seal_keys=given)
        parts = AppParts(settings, embedded.database, embedded.store, Broker("memory://"), embedded.clock)
        return looked(parts, embedded.now)["webhook secrets"]

    assert (found(keys[0]).ok, found(keys[0]).detail) == (True, "1 sealed, 1 kept as they are: soon sealed")
    for given in ((), keys[1:]):
        lacking = found(*given)
        assert (lacking.ok, hook.id in lacking.detail) == (False, True)
    with embedded.database.write() as session:
        webhooks.remove(session, ADMIN, hook.id, embedded.now)
    assert (found().ok, found().detail) == (True, "0 sealed, 1 kept as they are: LORACTL_SEAL_KEYS is not set")


def claimed(world: World, worker: str, agent: str) -> None:
    """A worker takes the next job of the queue ``gpu``."""
    caller, request = Caller("w", "w", "worker", {"queues": ["gpu"]}), ClaimRequest(queue="gpu", worker=worker)
    with world.database.write() as session:
        assert jobs.claim(session, caller, request, 60, world.now, agent) is not None


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
