"""Health, who am I, the doctor, and the description of all routes, kept as a golden file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.daemons.run import probe
from registry.db.engine import Database
from registry.services import doctor, tokens
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
    assert {finding["check"] for finding in findings} == {"database", "migrations", "store", "broker"}
    assert all(finding["ok"] or finding["check"] == "store" for finding in findings), findings


def test_the_doctor_says_what_is_missing_and_what_helps(
    embedded: World, local_store: LocalStore, tmp_path: Path
) -> None:
    empty = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    broken = AppParts(SETTINGS, empty, local_store, Broker("redis://127.0.0.1:9/0"))
    with broken.http() as http:
        found = {f.check: f for f in doctor.findings(empty, local_store, broken.broker, http)}
    assert not found["migrations"].ok
    assert "registry.db.migrate" in found["migrations"].help
    assert not found["broker"].ok
    nowhere = Database("postgresql+psycopg://nobody:secret@127.0.0.1:9/none")
    with broken.http() as http:
        down = doctor.findings(nowhere, local_store, broken.broker, http)[0]
    assert (down.check, down.ok) == ("database", False)
    assert "secret" not in down.detail
    unreachable = LocalStore(tmp_path / "store", "http://127.0.0.1:9", b"key")
    with broken.http() as http:
        told = {f.check: f for f in doctor.findings(embedded.database, unreachable, broken.broker, http)}
    assert not told["store"].ok
    for database in (empty, nowhere):
        database.close()


def test_daemons_look_once_and_start_whatever_they_find(parts: AppParts) -> None:
    probe(parts)


def test_processes_that_start_at_once_make_the_first_token_once(world: World, parts: AppParts) -> None:
    with TestClient(create_app(parts)), TestClient(create_app(parts)):
        assert parts.caller(TOKEN).name == "admin"
