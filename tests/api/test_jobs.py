"""Jobs over HTTP: who may ask and claim, what a worker's token opens, events as a stream, and parts that are down."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from kombu import Connection

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.client import RegistryClient
from registry.core.errors import TokenRefused
from registry.daemons import reconciler
from registry.db.engine import Database
from registry.services.tokens import make_text
from registry.storage.local import LocalStore
from tests import live
from tests.factories import tiny_base
from tests.world import SETTINGS, World

ROWS = b'{"prompt": "2+2=", "completion": " 4"}\n'
TOKEN, WORKER = make_text(), make_text()
RECIPE = {"kind": "finetune", "base": "demo", "datasets": ["team/rows"], "steps": 2}
ASKED = {"recipe": RECIPE, "output": {"adapter": "team/bot"}}
NOWHERE = "redis://127.0.0.1:9/0"


def served(database: Database, store: LocalStore, broker: str = "memory://") -> TestClient:
    settings = replace(SETTINGS, bootstrap_token=TOKEN, bootstrap_worker_token=WORKER, broker_url=broker)
    parts = AppParts(settings, database, store, Broker(broker))
    return TestClient(create_app(parts), headers={"authorization": f"Bearer {TOKEN}"})


@pytest.fixture
def api(embedded: World, local_store: LocalStore, tmp_path: Path) -> Iterator[TestClient]:
    embedded.push_base(tiny_base(tmp_path / "base"), line="demo")
    embedded.push_rows("dataset", "team/rows", ROWS)
    with served(embedded.database, local_store) as client:
        yield client


AS_WORKER = {"authorization": f"Bearer {WORKER}"}


def claim(api: TestClient) -> Any:
    return api.post("/v1/jobs/claim", json={"queue": "cpu", "worker": "w"}, headers=AS_WORKER).json()["job"]


# ── asking and watching ──────────────────────────────────────────────────────


def test_asking_is_201_and_asking_again_is_200_and_the_same_job(api: TestClient) -> None:
    first, second = api.post("/v1/jobs", json=ASKED), api.post("/v1/jobs", json=ASKED)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    assert second.json()["reused"]
    job = api.get(f"/v1/jobs/{first.json()['id']}").json()
    assert job["state"] == "queued"
    assert job["names"][job["recipe"]["base"]] == "demo@r1"
    assert [job["names"][digest] for digest in job["recipe"]["datasets"]] == ["team/rows@v1"]
    assert [job["id"] for job in api.get("/v1/jobs").json()["items"]] == [first.json()["id"]]


def test_lists_go_on_at_their_cursor_and_refuse_one_of_others(api: TestClient) -> None:
    for seed in range(3):
        api.post("/v1/jobs", json=ASKED | {"recipe": RECIPE | {"seed": seed}})
    first = api.get("/v1/jobs", params={"limit": 2}).json()
    second = api.get("/v1/jobs", params={"limit": 2, "cursor": first["cursor"]}).json()
    assert len({job["id"] for job in first["items"] + second["items"]}) == 3
    assert second["cursor"] is None
    for cursor in ("nonsense", "WyJ5ZXN0ZXJkYXkiLCAiaiJd"):
        assert api.get("/v1/jobs", params={"cursor": cursor}).status_code == 400
    assert api.get("/v1/jobs", params={"state": "asleep"}).status_code == 400


def test_a_job_goes_from_hand_to_hand(api: TestClient) -> None:
    identity = api.post("/v1/jobs", json=ASKED).json()["id"]
    job = claim(api)
    assert (job["id"], job["attempt"]) == (identity, 1)
    assert claim(api) is None
    files = api.get(f"/v1/jobs/{identity}/inputs", params={"attempt": 1}, headers=AS_WORKER).json()["files"]
    assert {file["path"] for listed in files.values() for file in listed} >= {"config.json", "data.jsonl"}
    said = {"attempt": 1, "progress": {"step": 1}}
    assert not api.post(f"/v1/jobs/{identity}/heartbeat", json=said, headers=AS_WORKER).json()["cancel"]
    assert api.get(f"/v1/jobs/{identity}").json()["progress"] == {"step": 1}
    assert api.post(f"/v1/jobs/{identity}/cancel").json()["cancel_requested"]
    assert api.post(f"/v1/jobs/{identity}/heartbeat", json=said, headers=AS_WORKER).json()["cancel"]
    ended = {"attempt": 1, "problem": {"code": "work-failed"}, "retryable": True, "cancelled": True}
    assert api.post(f"/v1/jobs/{identity}/fail", json=ended, headers=AS_WORKER).json()["state"] == "cancelled"
    assert api.post(f"/v1/jobs/{identity}/retry").json()["state"] == "queued"
    late = api.post(f"/v1/jobs/{identity}/heartbeat", json=said, headers=AS_WORKER)
    assert (late.status_code, late.json()["code"]) == (409, "lease-lost")


def messages(text: str) -> list[tuple[int, str]]:
    found = re.findall(r"id: (\d+)\nevent: job\ndata: (.*)\n\n", text)
    return [(int(number), json.loads(data)["kind"]) for number, data in found]


def test_events_go_on_behind_the_last_one_seen_and_end_with_the_job(api: TestClient) -> None:
    url = f"/v1/jobs/{api.post('/v1/jobs', json=ASKED).json()['id']}"
    claim(api)
    report = [{"kind": "progress", "step": step} for step in range(600)]
    api.post(f"{url}/heartbeat", json={"attempt": 1, "events": report}, headers=AS_WORKER)
    so_far = messages(api.get(f"{url}/events", params={"follow": False}).text)
    assert [kind for _, kind in so_far] == ["queued", "claimed", *["progress"] * 600]
    ended = {"attempt": 1, "problem": {}, "retryable": False}
    api.post(f"{url}/fail", json=ended, headers=AS_WORKER)
    rest = api.get(f"{url}/events", headers={"last-event-id": str(so_far[-2][0])})
    assert [kind for _, kind in messages(rest.text)] == ["progress", "failed"]
    assert rest.text.endswith("event: end\ndata: {}\n\n")
    for odd in ("9" * 40, "-1", "x", "٣"):
        answer = api.get(f"{url}/events", headers=[(b"last-event-id", odd.encode())])
        assert messages(answer.text)[0][1] == "queued"
    assert api.get("/v1/jobs/nope/events").status_code == 404


def test_whoever_watches_hears_of_it_as_it_happens_until_the_token_is_revoked(tmp_path: Path) -> None:
    with live.registry(tmp_path) as house, house.client() as admin:
        folder = tiny_base(tmp_path / "base")
        world = World(house.parts.database, house.parts.store)
        world.push_base(folder, line="demo")
        world.push_rows("dataset", "team/rows", ROWS)
        job = httpx.post(f"{house.url}/v1/jobs", json=ASKED, headers={"authorization": f"Bearer {house.token}"}).json()
        body = {"name": "watcher", "scopes": {"team": ["read"]}}
        made = httpx.post(
            f"{house.url}/v1/tokens", json=body, headers={"authorization": f"Bearer {house.token}"}
        ).json()
        kinds: list[str] = []
        refused: list[Exception] = []

        def watch() -> None:
            with RegistryClient(house.url, made["token"]) as client:
                try:
                    for event in client.events(job["id"]):
                        kinds.append(event.kind)
                        heard.set()
                except TokenRefused as error:
                    refused.append(error)

        heard = threading.Event()
        watching = threading.Thread(target=watch)
        watching.start()
        assert heard.wait(30)
        admin.revoke_token(made["id"])
        watching.join(30)
        assert not watching.is_alive()
        assert kinds == ["queued"]
        assert len(refused) == 1


# ── a worker's token ─────────────────────────────────────────────────────────


OPEN = {("get", "/health"), ("get", "/v1/sign-in"), ("get", "/v1/whoami")}
"""Without anything in them that the token does not say itself."""
CLAIMED = {
    ("post", "/v1/jobs/claim"), ("post", "/v1/jobs/{identity}/heartbeat"), ("get", "/v1/jobs/{identity}/inputs"),
    ("post", "/v1/jobs/{identity}/pushes"), ("post", "/v1/jobs/{identity}/finish"),
    ("post", "/v1/jobs/{identity}/fail"), ("post", "/v1/jobs/checkpoints"),
    ("post", "/v1/jobs/{identity}/checkpoint"), ("get", "/v1/jobs/{identity}/checkpoint"),
}  # fmt: skip


def test_a_workers_token_opens_nothing_but_its_claimed_work(api: TestClient) -> None:
    app: FastAPI = api.app  # type: ignore[assignment]
    routes = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]
    assert len(routes) > 50
    assert set(routes) >= OPEN | CLAIMED
    for method, path in routes:
        url = re.sub(r"\{\w+\}", "x1", path)
        answer = api.request(method, url, headers=AS_WORKER, json={})
        told = (method, path, answer.status_code, answer.json().get("code"))
        if (method, path) in OPEN:
            assert told[2] == 200, told
            continue
        if (method, path) in CLAIMED:  # the body is read first, then whether the job is claimed
            assert told[2:] in [(400, "bad-request"), (403, "not-your-job")], told
        elif path.startswith("/v1/pushes/"):
            assert told[2:] in [(400, "bad-request"), (404, "push-not-found")], told
        else:
            assert told[2:] == (403, "scope-missing"), told
        assert api.request(method, url, headers={"authorization": ""}, json={}).status_code == 401, told


def test_a_worker_touches_only_what_it_claimed(api: TestClient) -> None:
    identity = api.post("/v1/jobs", json=ASKED).json()["id"]
    attempts: dict[str, dict[str, Any]] = {
        "heartbeat": {"attempt": 0},
        "pushes": {"attempt": 0, "push": {"manifest": {}}},
        "checkpoint": {"attempt": 0, "step": 1, "files": [{"path": "a", "size": 0, "digest": "sha256:" + "0" * 64}]},
        "finish": {"attempt": 0, "result": {}},
        "fail": {"attempt": 0, "problem": {}, "retryable": True},
    }
    for verb, body in attempts.items():
        answer = api.post(f"/v1/jobs/{identity}/{verb}", json=body, headers=AS_WORKER)
        assert (verb, answer.json()["code"]) == (verb, "not-your-job")
        assert api.post(f"/v1/jobs/{identity}/{verb}", json=body).status_code == 403  # not even an admin's token
    answer = api.get(f"/v1/jobs/{identity}/inputs", params={"attempt": 0}, headers=AS_WORKER)
    assert answer.json()["code"] == "not-your-job"
    other = api.post("/v1/jobs/claim", json={"queue": "secret", "worker": "w"}, headers=AS_WORKER)
    assert other.json()["code"] == "not-your-job"


def test_a_claimed_job_pushes_to_its_own_output_only(api: TestClient) -> None:
    api.post("/v1/jobs", json=ASKED)
    job = claim(api)
    for kind in ("base", "dataset"):
        push = {"manifest": {"kind": kind}, "wishes": {"line": "demo"}}
        answer = api.post(f"/v1/jobs/{job['id']}/pushes", json={"attempt": 1, "push": push}, headers=AS_WORKER)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad-request")


# ── parts that are down ──────────────────────────────────────────────────────


def test_without_a_broker_a_job_is_taken_and_the_reconciler_wakes_later(
    embedded: World, local_store: LocalStore, tmp_path: Path
) -> None:
    embedded.push_base(tiny_base(tmp_path / "base"), line="demo")
    embedded.push_rows("dataset", "team/rows", ROWS)
    with served(embedded.database, local_store, NOWHERE) as api:
        assert api.post("/v1/jobs", json=ASKED).status_code == 201
        broken: AppParts = api.app.state.parts  # type: ignore[attr-defined]
        assert broken.broker.ping() is not None
        reconciler.step(broken)
    url = f"sqla+sqlite:///{tmp_path / 'broker.db'}"
    working = replace(broken, broker=Broker(url))
    reconciler.step(working)
    reconciler.step(working)
    with Connection(url) as connection:
        assert connection.SimpleQueue("cpu").qsize() == 1  # said once, as long as nobody heard it


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("POST", "/v1/jobs/claim")])
def test_without_a_database_every_answer_is_a_503_that_says_so(
    api: TestClient, tmp_path: Path, local_store: LocalStore, method: str, path: str
) -> None:
    gone = AppParts.of(
        replace(SETTINGS, database_url="postgresql+psycopg://x:y@127.0.0.1:9/z?connect_timeout=2", data=tmp_path)
    )
    app = create_app(gone)
    client = TestClient(app, headers={"authorization": f"Bearer {TOKEN}"})  # not entered: the start needs a database
    answer = client.request(method, path, json=ASKED)
    assert (answer.status_code, answer.json()["code"]) == (503, "database-down")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "y@" not in answer.text
