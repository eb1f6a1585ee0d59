"""Who may use which route: one row a route, and a test that fails for a route without a row.

What belongs to another namespace is answered exactly as what is not there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.core.campaign import State
from registry.db.engine import Database
from registry.schemas import ScheduleRequest, Scope
from registry.services import schedules, tokens
from tests.factories import base_of, tiny_adapter
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, SETTINGS, World, adapter_push, base_push, files_push, table_of

Facts = dict[str, Any]
ZERO = "sha256:" + "0" * 64
CHECKPOINT = {"attempt": 1, "step": 1, "files": [{"path": "checkpoint.json", "size": 2, "digest": ZERO}]}


@dataclass(frozen=True)
class Row:
    """How a route answers; ``body`` is made of the facts of the seeded registry."""

    who: str
    """open, signed, anyone, user or worker"""
    weak: tuple[dict[str, list[Scope]], int] | None = None
    """Scopes that are not enough, and the answer to them."""
    body: Callable[[Facts], Any] | None = None
    query: str = ""
    named: bool = True
    """Whether the route names something of a namespace: a stranger must not tell it from nothing."""


def only(*scopes: Scope) -> dict[str, list[Scope]]:
    return {"team": list(scopes)}


def read(status: int = 404) -> Row:
    return Row("user", (only("publish"), status))


REFUSED = (only("read"), 403)
ROWS: dict[str, Row] = {
    "GET /health": Row("open"),
    "PUT /store/{key:path}": Row("signed"),
    "GET /store/{key:path}": Row("signed"),
    "GET /v1/whoami": Row("anyone", named=False),
    "GET /openapi.json": Row("anyone", named=False),
    "GET /v1/doctor": Row("user", (only("admin"), 403), named=False),
    "POST /v1/tokens": Row("user", REFUSED, lambda f: {"name": "x", "scopes": {f["namespace"]: ["read"]}}),
    "GET /v1/tokens": Row("user", REFUSED, named=False),
    "DELETE /v1/tokens/{identity}": Row("user", (only("read"), 404)),
    "POST /v1/adapters/{namespace}/{name}/pushes": Row("user", REFUSED, lambda f: f["adapter_push"]),
    "POST /v1/datasets/{namespace}/{name}/pushes": Row("user", REFUSED, lambda f: f["dataset_push"]),
    "POST /v1/suites/{namespace}/{name}/pushes": Row("user", REFUSED, lambda f: f["suite_push"]),
    "POST /v1/bases/pushes": Row("user", REFUSED, lambda f: f["base_push"], named=False),
    "POST /v1/pushes/{push_id}/parts": Row("anyone", (only("read"), 404), lambda _: {"digest": ZERO}),
    "GET /v1/pushes/{push_id}": Row("anyone", (only("read"), 404)),
    "POST /v1/pushes/{push_id}/commit": Row("anyone", (only("read"), 404)),
    "DELETE /v1/pushes/{push_id}": Row("anyone", (only("read"), 404)),
    "POST /v1/downloads": Row("user", (only("publish"), 404), lambda f: {"manifests": [f["version"]]}),
    "POST /v1/bases": Row("user", REFUSED, lambda f: {"table": f["table"]}, named=False),
    "GET /v1/bases": replace(read(403), named=False),
    "GET /v1/bases/{ref}": replace(read(403), named=False),
    "GET /v1/bases/{ref}/table": replace(read(403), named=False),
    "GET /v1/bases/{a}/diff/{b}": replace(read(403), named=False),
    "POST /v1/bases/{ref}/derivations": Row(
        "user", REFUSED, lambda _: {"parent": "demo@r1", "kind": "cast"}, named=False
    ),
    "GET /v1/datasets": Row("user", named=False),
    "GET /v1/datasets/{namespace}/{name}": read(),
    "GET /v1/suites": Row("user", named=False),
    "GET /v1/suites/{namespace}/{name}": read(),
    "GET /v1/adapters": Row("user", named=False),
    "GET /v1/adapters/{namespace}/{name}": read(),
    "GET /v1/adapters/{namespace}/{name}/versions": read(),
    "GET /v1/adapters/{namespace}/{name}/versions/{version}": read(),
    "GET /v1/adapters/{namespace}/{name}/versions/{version}/manifest": read(),
    "GET /v1/adapters/{namespace}/{name}/log": read(),
    "GET /v1/adapters/{namespace}/{name}/lineage": read(),
    "GET /v1/adapters/{namespace}/{name}/evaluations": read(),
    "GET /v1/adapters/{namespace}/{name}/aliases": read(),
    "PUT /v1/adapters/{namespace}/{name}/aliases/{alias}": Row("user", REFUSED, lambda _: {"version": "v1"}),
    "POST /v1/adapters/{namespace}/{name}/aliases/{alias}/rollback": Row(
        "user", REFUSED, lambda _: {"base": "demo@r1"}
    ),
    "GET /v1/bases/{base}/adapters": Row("user", named=False),
    "GET /v1/resolve": replace(read(), query="ref={namespace}/{name}:prod&base=demo@r1"),
    "GET /v1/adapters/{namespace}/{name}/policy": read(403),
    "PUT /v1/adapters/{namespace}/{name}/policy": Row("user", REFUSED, lambda _: {}),
    "GET /v1/namespaces/{namespace}/policy": read(403),
    "PUT /v1/namespaces/{namespace}/policy": Row("user", REFUSED, lambda _: {}),
    "POST /v1/jobs": Row(
        "user",
        REFUSED,
        lambda f: {
            "recipe": {"kind": "evaluate", "suite": "team/suite", "adapters": [f"{f['namespace']}/{f['name']}@v1"]}
        },
    ),
    "GET /v1/jobs": Row("user", named=False),
    "POST /v1/jobs/claim": Row("worker", None, lambda _: {"queue": "cpu", "worker": "w"}),
    "GET /v1/jobs/{identity}": read(),
    "GET /v1/jobs/{identity}/events": read(),
    "POST /v1/jobs/{identity}/cancel": Row("user", REFUSED),
    "POST /v1/jobs/{identity}/retry": Row("user", REFUSED),
    "POST /v1/jobs/{identity}/heartbeat": Row("worker", None, lambda _: {"attempt": 1}),
    "GET /v1/jobs/{identity}/inputs": Row("worker", query="attempt=1"),
    "POST /v1/jobs/{identity}/pushes": Row("worker", None, lambda f: {"attempt": 1, "push": f["adapter_push"]}),
    "POST /v1/jobs/{identity}/checkpoint": Row("worker", None, lambda _: CHECKPOINT),
    "GET /v1/jobs/{identity}/checkpoint": Row("worker", query="attempt=1"),
    "POST /v1/jobs/checkpoints": Row("worker", None, lambda f: {"checkpoints": {f["ids"]["jobs"]: CHECKPOINT}}),
    "POST /v1/jobs/{identity}/finish": Row("worker", None, lambda _: {"attempt": 1, "result": {}}),
    "POST /v1/jobs/{identity}/fail": Row("worker", None, lambda _: {"attempt": 1, "problem": {}, "retryable": False}),
    "POST /v1/upgrades/plan": Row(
        "user", REFUSED, lambda f: {"line": "demo", "to": "demo", "namespaces": [f["namespace"]]}
    ),
    "POST /v1/upgrades": Row("user", REFUSED, lambda f: {"line": "demo", "to": "demo", "namespaces": [f["namespace"]]}),
    "GET /v1/upgrades": Row("user", named=False),
    "GET /v1/upgrades/{identity}": read(),
    "POST /v1/upgrades/{identity}/start": Row("user", REFUSED),
    "GET /v1/upgrades/ledger": Row("user", named=False),
    "POST /v1/upgrades/{identity}/pause": Row("user", REFUSED, lambda _: {}),
    "POST /v1/upgrades/{identity}/resume": Row("user", REFUSED),
    "POST /v1/upgrades/{identity}/rollback": Row(
        "user", REFUSED, lambda f: {"adapter": f"{f['namespace']}/{f['name']}"}
    ),
    "POST /v1/upgrades/{identity}/abort": Row("user", REFUSED, lambda _: {}),
    "POST /v1/upgrades/{identity}/approve": Row(
        "user", REFUSED, lambda f: {"adapter": f"{f['namespace']}/{f['name']}"}
    ),
    "POST /v1/schedules": Row(
        "user",
        REFUSED,
        lambda f: {
            "namespace": f["namespace"],
            "trigger": "base-upgrade",
            "subject": "demo",
            "action": {"upgrade": {}},
        },
    ),
    "GET /v1/schedules": Row("user", named=False),
    "DELETE /v1/schedules/{identity}": Row("user", REFUSED),
}
LISTS = [route for route, row in ROWS.items() if route.startswith("GET") and not row.named and row.who == "user"]


@dataclass
class Api:
    client: TestClient
    world: World
    facts: Facts
    missing: Facts
    made: dict[str, str] = field(default_factory=dict)

    def token(self, kind: str = "user", scopes: Any = None, **more: Any) -> str:
        """A token's text."""
        key = repr((kind, scopes, more))
        if key not in self.made:
            with self.world.database.write() as session:
                expires, revoked = more.pop("expires_in", None), more.pop("revoked", False)
                token, text = tokens.create(
                    session, ADMIN, name="t", kind="worker" if kind == "worker" else "user",
                    scopes={} if kind == "worker" else scopes or {"*": ["admin"]},
                    queues=["cpu"] if kind == "worker" else [], expires_in=expires, now=self.world.now,
                )  # fmt: skip
                if revoked:
                    token.revoked_at = self.world.now
            self.made[key] = text
        return self.made[key]

    def ask(self, route: str, token: str | None, facts: Facts | None = None) -> tuple[int, dict[str, Any]]:
        method, _, path = route.partition(" ")
        facts, row = facts or self.facts, ROWS[route]
        ids = facts["ids"].get(path.split("/")[2] if path.count("/") > 1 else "", "")
        names = {**facts, "identity": ids, "push_id": ids}
        url = path.replace("{key:path}", "blobs/x").format(**names)
        if row.query:
            url += "?" + row.query.format(**names)
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        answer = self.client.request(method, url, json=row.body(facts) if row.body else None, headers=headers)
        body = answer.json() if "json" in answer.headers.get("content-type", "") and answer.content else {}
        return answer.status_code, body


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, local_store: Any) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "registry.db").write_bytes(sqlite_template.read_bytes())
    world = World(Database(f"sqlite:///{folder / 'registry.db'}"), local_store)
    upgrade = Upgrade(world, folder)
    upgrade.policy(POLICY)
    digest = upgrade.serve()
    campaign = upgrade.begin()
    upgrade.tick()
    assert upgrade.state() == State.RUNNING
    job = next(job for job in upgrade.jobs() if job.kind == "rebase")
    open_push = world.open(
        "adapter", "team/bot", adapter_push(tiny_adapter(folder / "new", upgrade.v1, seed=77), upgrade.v1)[0]
    )
    with world.database.write() as session:
        request = ScheduleRequest(namespace="team", trigger="cron", subject="0 3 * * 1", action={"job": {"recipe": {}}})
        schedule = schedules.add(session, ADMIN, request, world.now)
        reader, _ = tokens.create(
            session, ADMIN, name="r", kind="user", scopes={"team": ["read"]}, queues=[], expires_in=None, now=world.now
        )
    rows = b'{"prompt": "1+1=", "completion": " 3"}\n'
    facts: Facts = {
        "namespace": "team", "name": "bot", "version": digest, "alias": "prod", "ref": "demo", "base": "demo",
        "a": "demo@r1", "b": "demo@r2",
        "ids": {
            "tokens": reader.id, "pushes": open_push.id, "jobs": job.id, "upgrades": campaign, "schedules": schedule.id,
        },
        "table": table_of(base_of(upgrade.v1)),
        "adapter_push": adapter_push(tiny_adapter(folder / "x", upgrade.v1, seed=78), upgrade.v1)[0].model_dump(mode="json"),
        "dataset_push": files_push("dataset", {"data.jsonl": rows})[0].model_dump(mode="json"),
        "suite_push": files_push("suite", {"data.jsonl": rows})[0].model_dump(mode="json"),
        "base_push": base_push(upgrade.v1)[0].model_dump(mode="json"),
    }  # fmt: skip
    missing = facts | {"namespace": "absent", "version": ZERO, "ids": dict.fromkeys(facts["ids"], "missing")}
    parts = AppParts(SETTINGS, world.database, local_store, Broker("memory://"), world.clock)
    with TestClient(create_app(parts), raise_server_exceptions=False) as client:
        yield Api(client, world, facts, missing)


def routes_of(app: Any, prefix: str = "") -> list[str]:
    found = []
    for route in app.routes:
        if hasattr(route, "methods"):
            found += [f"{method} {prefix}{route.path}" for method in route.methods]
        else:
            found += routes_of(route.original_router, prefix + route.include_context.prefix)
    return found


def test_every_route_has_a_row(api: Api) -> None:
    app: Any = api.client.app
    assert isinstance(app, FastAPI)
    found = routes_of(app)
    assert sorted(found) == sorted(ROWS)


@pytest.mark.parametrize("route", ROWS)
def test_without_a_living_token_nothing_is_answered(api: Api, route: str) -> None:
    row = ROWS[route]
    if row.who == "open":
        assert api.ask(route, None)[0] == 200
        return
    if row.who == "signed":
        assert (api.ask(route, None)[0], api.ask(route, api.token())[0]) == (403, 403)
        return
    assert (api.ask(route, None)[0], api.ask(route, None)[1]["code"]) == (401, "token-missing")
    gone = api.token(expires_in=1.0)
    revoked = api.token(revoked=True)
    api.world.later(seconds=2)
    identity = api.token().split("_")[1]
    for token in ("x", "lora_x_y", tokens.make_text(), f"lora_{identity}_{'A' * 43}", gone, revoked):
        status, body = api.ask(route, token)
        assert (status, body["code"]) == (401, "token-refused"), token


@pytest.mark.parametrize("route", [route for route, row in ROWS.items() if row.who in ("user", "worker")])
def test_people_and_workers_have_their_own_routes(api: Api, route: str) -> None:
    wrong = api.token("worker") if ROWS[route].who == "user" else api.token()
    assert api.ask(route, wrong)[0] == 403
    assert api.ask(route, wrong)[1]["code"] == "scope-missing"


@pytest.mark.parametrize("route", [route for route, row in ROWS.items() if row.weak])
def test_a_weak_token_is_not_enough(api: Api, route: str) -> None:
    weak = ROWS[route].weak
    assert weak is not None
    status, body = api.ask(route, api.token(scopes=weak[0]))
    assert status == weak[1], body
    assert body["code"] == "scope-missing" or body["code"].endswith("-not-found")


@pytest.mark.parametrize(
    "route", [r for r, row in ROWS.items() if row.named and row.who in ("user", "anyone", "worker")]
)
def test_what_belongs_to_others_is_answered_as_what_is_not_there(api: Api, route: str) -> None:
    stranger = api.token("worker") if ROWS[route].who == "worker" else api.token(scopes={"other": ["admin"]})
    if route == "POST /v1/jobs/claim":
        return
    real, missing = api.ask(route, stranger), api.ask(route, stranger, api.missing)
    assert real[0] == missing[0]
    assert real[0] in (403, 404), real
    told = [_blank(body, facts) for (_, body), facts in ((real, api.facts), (missing, api.missing))]
    assert told[0] == told[1]


def _blank(body: dict[str, Any], facts: Facts) -> tuple[str, str]:
    text = str(body.get("detail"))
    for word in (*facts["ids"].values(), facts["version"], f"{facts['namespace']}/{facts['name']}", facts["namespace"]):
        text = text.replace(word, "…")
    return str(body.get("code")), text


@pytest.mark.parametrize("route", LISTS)
def test_lists_show_nothing_of_others(api: Api, route: str) -> None:
    status, body = api.ask(route, api.token(scopes={"other": ["admin"]}))
    assert status in (200, 403)
    assert "team" not in str(body)


def test_a_job_of_another_worker_is_not_ours(api: Api) -> None:
    job = api.client.post(
        "/v1/jobs/claim",
        json={"queue": "cpu", "worker": "w"},
        headers={"authorization": f"Bearer {api.token('worker')}"},
    ).json()["job"]
    with api.world.database.write() as session:
        _, other = tokens.create(
            session, ADMIN, name="o", kind="worker", scopes={}, queues=["gpu"], expires_in=None, now=api.world.now
        )
    claimed = api.facts | {"ids": api.facts["ids"] | {"jobs": job["id"]}}
    for route, row in ROWS.items():
        if row.who == "worker":
            assert api.ask(route, other, claimed)[0] == 403, route

