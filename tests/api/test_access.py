"""Who may use which route: one row a route, and a test that fails for a route without a row.

What belongs to another namespace is answered exactly as what is not there.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlmodel import select

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.core.campaign import State
from registry.core.manifest import Manifest
from registry.db.engine import Database
from registry.db.models import StoredManifest
from registry.keys import PrivateKey
from registry.schemas import SCOPES, KeyRequest, ScheduleRequest, Scope, WebhookRequest
from registry.services import schedules, signatures, tokens, webhooks
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, SETTINGS, World, adapter_push, base_push, files_push, table_of

Facts = dict[str, Any]
ZERO = "sha256:" + "0" * 64
KEY, REVOKED = PrivateKey.generate(), PrivateKey.generate()
CHECKPOINT = {"attempt": 1, "step": 1, "files": [{"path": "checkpoint.json", "size": 2, "digest": ZERO}]}


@dataclass(frozen=True)
class Row:
    """How a route answers; ``body`` is made of the facts of the seeded registry."""

    who: str
    """open, signed, anyone, user or worker"""
    needs: tuple[Scope, ...] = ()
    """Scopes without any of which a user is refused; all of them together are enough, and so is admin."""
    why: str = ""
    """Why just these: what a reviewer of the row has to agree with."""
    body: Callable[[Facts], Any] | None = None
    query: str = ""
    named: bool = True
    """Whether the route names something of a namespace: a stranger must not tell it from nothing."""
    refused: int = 404
    """How a user is answered who holds every scope but one that is needed, admin aside."""
    where: tuple[str, ...] = ("team",)
    """The namespaces whose scopes decide."""


SEES = "shows what belongs to a namespace, to who reads there"
LISTED = "every user may ask; the answer holds only what the caller reads"
BASES = "bases are shared: read on any namespace is enough"
PUBLISH = "bytes enter a namespace by who publishes there"
TO_BASES = "bases are everybody's: publish on the namespace 'base' decides"
PROMOTE = "what production loads is moved by who promotes"
LABELS = "labels decide what is promoted, so who promotes gives them and sees what they are about"
GATES = "a policy decides what may be promoted, so who promotes sets it"
RUN = "work costs time of workers: run, on what the caller reads"
CAMPAIGN = "a campaign spends work and moves aliases, so it takes the right to both"
STEERS_CAMPAIGN = "its work rests on its creator's rights, asked again each time; who may move aliases steers it"
STEERED = "seen by who reads, steered by who runs"
STANDING = "who publishes may yank and take that back; the service asks for admin where bytes are withheld or removed"
OWN_PUSH = "a push is its author's; the namespace's admin may look and end it"
CLAIMED = "a worker touches jobs that it claimed, and nothing else"
BOUNDS = "a namespace does not set its own bounds"
HOOKS = "a webhook tells what the audit holds, so it takes the same right"
AUDITED = "who administers a namespace sees what was done in it, and by whom"
TRUSTS = "who administers a namespace says whose signatures count there, and whether one is needed"
SIGNS = "a signature holds by its key, not by who brings it; it is stored by who publishes there"
GIVEN = "nobody gives what no admin of that namespace gave them"


def sees(refused: int = 404, **more: Any) -> Row:
    return Row("user", ("read",), SEES, refused=refused, **more)


def of_bases(**more: Any) -> Row:
    return Row("user", ("read",), BASES, named=False, refused=403, **more)


def listed() -> Row:
    return Row("user", (), LISTED, named=False)


def claimed(**more: Any) -> Row:
    return Row("worker", (), CLAIMED, **more)


ROWS: dict[str, Row] = {
    "GET /health": Row("open", (), "load balancers ask it, and it tells a version and no more"),
    "GET /v1/sign-in": Row("open", (), "who has no token yet must learn where to get one"),
    "PUT /store/{key:path}": Row("signed", (), "the signature is the right: method, key, length, checksum, time"),
    "GET /store/{key:path}": Row("signed", (), "the signature is the right: method, key, time"),
    "GET /v1/whoami": Row("anyone", (), "tells a token about itself", named=False),
    "GET /openapi.json": Row("anyone", (), "the same for everybody who has a token", named=False),
    "GET /metrics": Row("user", ("admin",), "tells of all queues and of how busy everything is", named=False, refused=403, where=("*",)),
    "GET /v1/doctor": Row("user", ("admin",), "looks at the whole installation", named=False, refused=403, where=("*",)),
    "POST /v1/tokens": Row("user", ("admin",), GIVEN, lambda f: {"name": "x", "scopes": {f["namespace"]: ["read"]}}, refused=403),
    "GET /v1/tokens": Row("user", ("admin",), "shows the tokens that the caller administers", named=False, refused=403),
    "POST /v1/tokens/{identity}/rotate": Row("user", ("admin",), "a secret is replaced by who administers all of its namespaces", lambda _: {}),
    "DELETE /v1/tokens/{identity}": Row("user", ("admin",), "a token is ended by who administers all of its namespaces"),
    "POST /v1/adapters/{namespace}/{name}/pushes": Row("user", ("publish",), PUBLISH, lambda f: f["adapter_push"], refused=403),
    "POST /v1/datasets/{namespace}/{name}/pushes": Row("user", ("publish",), PUBLISH, lambda f: f["dataset_push"], refused=403),
    "POST /v1/suites/{namespace}/{name}/pushes": Row("user", ("publish",), PUBLISH, lambda f: f["suite_push"], refused=403),
    "POST /v1/bases/pushes": Row("user", ("publish",), TO_BASES, lambda f: f["base_push"], named=False, refused=403, where=("base",)),
    "POST /v1/pushes/{push_id}/parts": Row("anyone", ("admin",), OWN_PUSH, lambda _: {"digest": ZERO}),
    "POST /v1/pushes/{push_id}/seal": Row("anyone", ("admin",), OWN_PUSH, lambda _: {"digests": {"a": ZERO}}),
    "GET /v1/pushes/{push_id}": Row("anyone", ("admin",), OWN_PUSH),
    "POST /v1/pushes/{push_id}/commit": Row("anyone", ("admin",), OWN_PUSH),
    "DELETE /v1/pushes/{push_id}": Row("anyone", ("admin",), OWN_PUSH),
    "POST /v1/downloads": sees(body=lambda f: {"manifests": [f["version"]]}),
    "POST /v1/bases": Row("user", ("publish",), TO_BASES, lambda f: {"table": f["table"]}, named=False, refused=403, where=("base",)),
    "POST /v1/lines/{line}/revisions": Row(
        "user", ("publish",), TO_BASES, lambda _: {"revision": 1}, named=False, refused=403, where=("base",)
    ),
    "GET /v1/bases": of_bases(),
    "GET /v1/bases/{ref}": of_bases(),
    "GET /v1/bases/{ref}/table": of_bases(),
    "GET /v1/bases/{a}/diff/{b}": of_bases(),
    "POST /v1/bases/{ref}/derivations": Row(
        "user", ("publish",), TO_BASES, lambda _: {"parent": "demo@r1", "kind": "cast"}, named=False, refused=403, where=("base",)
    ),
    "GET /v1/datasets": listed(),
    "GET /v1/datasets/{namespace}/{name}": sees(),
    "GET /v1/suites": listed(),
    "GET /v1/suites/{namespace}/{name}": sees(),
    "GET /v1/adapters": listed(),
    "GET /v1/adapters/{namespace}/{name}": sees(),
    "GET /v1/adapters/{namespace}/{name}/versions": sees(),
    "GET /v1/adapters/{namespace}/{name}/versions/{version}": sees(),
    "GET /v1/adapters/{namespace}/{name}/versions/{version}/manifest": sees(),
    "GET /v1/adapters/{namespace}/{name}/versions/{version}/signatures": sees(),
    "POST /v1/adapters/{namespace}/{name}/versions/{version}/signatures": Row("user", ("read", "publish"), SIGNS, lambda f: {"bundle": f["bundle"]}, refused=403),
    "POST /v1/adapters/{namespace}/{name}/versions/{version}/{move}": Row("user", ("read", "publish"), STANDING, lambda _: {}, refused=403),
    "GET /v1/adapters/{namespace}/{name}/log": sees(),
    "GET /v1/adapters/{namespace}/{name}/lineage": sees(),
    "GET /v1/adapters/{namespace}/{name}/evaluations": sees(),
    "GET /v1/adapters/{namespace}/{name}/aliases": sees(),
    "PUT /v1/adapters/{namespace}/{name}/aliases/{alias}": Row("user", ("read", "promote"), PROMOTE, lambda _: {"version": "v1"}, refused=403),
    "POST /v1/adapters/{namespace}/{name}/aliases/{alias}/rollback": Row("user", ("read", "promote"), PROMOTE, lambda _: {"base": "demo@r1"}, refused=403),
    "GET /v1/bases/{base}/adapters": listed(),
    "GET /v1/resolve": sees(query="ref={namespace}/{name}:prod&base=demo@r1"),
    "GET /v1/adapters/{namespace}/{name}/policy": sees(403),
    "PUT /v1/adapters/{namespace}/{name}/policy": Row("user", ("read", "promote"), GATES, lambda _: POLICY.model_dump(mode="json"), refused=403),
    "GET /v1/namespaces/{namespace}/policy": sees(403),
    "PUT /v1/namespaces/{namespace}/policy": Row("user", ("read", "promote"), GATES, lambda _: POLICY.model_dump(mode="json"), refused=403),
    "POST /v1/jobs": Row(
        "user",
        ("read", "run"),
        RUN,
        lambda f: {"recipe": {"kind": "evaluate", "suite": "team/suite", "adapters": [f"{f['namespace']}/{f['name']}@v1"]}},
        refused=403,
    ),
    "GET /v1/jobs": listed(),
    "POST /v1/jobs/claim": claimed(body=lambda _: {"queue": "cpu", "worker": "w"}),
    "GET /v1/jobs/{identity}": sees(),
    "GET /v1/jobs/{identity}/events": sees(query="follow=false"),
    "POST /v1/jobs/{identity}/cancel": Row("user", ("read", "run"), STEERED, refused=403),
    "POST /v1/jobs/{identity}/retry": Row("user", ("read", "run"), STEERED, refused=403),
    "POST /v1/jobs/{identity}/heartbeat": claimed(body=lambda _: {"attempt": 1}),
    "GET /v1/jobs/{identity}/inputs": claimed(query="attempt=1"),
    "POST /v1/jobs/{identity}/pushes": claimed(body=lambda f: {"attempt": 1, "push": f["adapter_push"]}),
    "POST /v1/jobs/{identity}/checkpoint": claimed(body=lambda _: CHECKPOINT),
    "GET /v1/jobs/{identity}/checkpoint": claimed(query="attempt=1"),
    "POST /v1/jobs/checkpoints": claimed(body=lambda f: {"checkpoints": {f["ids"]["jobs"]: CHECKPOINT}}),
    "POST /v1/jobs/{identity}/finish": claimed(body=lambda _: {"attempt": 1, "result": {}}),
    "POST /v1/jobs/{identity}/fail": claimed(body=lambda _: {"attempt": 1, "problem": {}, "retryable": False}),
    "POST /v1/upgrades/plan": Row("user", ("run", "promote"), CAMPAIGN, lambda f: {"line": "demo", "to": "demo", "namespaces": [f["namespace"]]}, refused=403),
    "POST /v1/upgrades": Row("user", ("run", "promote"), CAMPAIGN, lambda f: {"line": "demo", "to": "demo", "namespaces": [f["namespace"]]}, refused=403),
    "GET /v1/upgrades": listed(),
    "GET /v1/upgrades/{identity}": sees(),
    "POST /v1/upgrades/{identity}/start": Row("user", ("read", "promote"), STEERS_CAMPAIGN, refused=403),
    "GET /v1/upgrades/ledger": listed(),
    "POST /v1/upgrades/{identity}/pause": Row("user", ("read", "promote"), STEERS_CAMPAIGN, lambda _: {}, refused=403),
    "POST /v1/upgrades/{identity}/resume": Row("user", ("read", "promote"), STEERS_CAMPAIGN, refused=403),
    "POST /v1/upgrades/{identity}/rollback": Row(
        "user", ("read", "promote"), PROMOTE, lambda f: {"adapter": f"{f['namespace']}/{f['name']}"}, refused=403
    ),
    "POST /v1/upgrades/{identity}/abort": Row("user", ("read", "promote"), STEERS_CAMPAIGN, lambda _: {}, refused=403),
    "POST /v1/upgrades/{identity}/approve": Row(
        "user", ("read", "promote"), PROMOTE, lambda f: {"adapter": f"{f['namespace']}/{f['name']}"}, refused=403
    ),
    "GET /v1/upgrades/{identity}/disagreements": Row(
        "user", ("read", "promote"), LABELS, query="adapter={namespace}/{name}", refused=403
    ),
    "POST /v1/upgrades/{identity}/labels": Row(
        "user", ("read", "promote"), LABELS, lambda f: {"adapter": f"{f['namespace']}/{f['name']}", "lines": ""}, refused=403
    ),
    "POST /v1/schedules": Row(
        "user",
        ("run", "promote"),
        CAMPAIGN,
        lambda f: {"namespace": f["namespace"], "trigger": "base-upgrade", "subject": "demo", "action": {"upgrade": {}}},
        refused=403,
    ),
    "GET /v1/schedules": listed(),
    "DELETE /v1/schedules/{identity}": Row("user", ("read", "run"), STEERED, refused=403),
    "GET /v1/namespaces/{namespace}/quota": sees(403),
    "PUT /v1/namespaces/{namespace}/quota": Row("user", ("admin",), BOUNDS, lambda _: {}, named=False, refused=403, where=("*",)),
    "GET /v1/namespaces/{namespace}/keys": sees(403),
    "POST /v1/namespaces/{namespace}/keys": Row("user", ("admin",), TRUSTS, lambda f: {"public": f["public"], "name": "x"}, refused=403),
    "POST /v1/namespaces/{namespace}/keys/{fingerprint}/revoke": Row("user", ("admin",), TRUSTS, lambda _: {}, refused=403),
    "GET /v1/namespaces/{namespace}/signing": sees(403),
    "PUT /v1/namespaces/{namespace}/signing": Row("user", ("admin",), TRUSTS, lambda _: {"required": False}, refused=403),
    "POST /v1/fsck": Row("user", ("admin",), "it reads and repairs what belongs to everybody", lambda _: {}, named=False, refused=403, where=("*",)),
    "POST /v1/webhooks": Row("user", ("admin",), HOOKS, lambda f: {"url": "https://x.example", "namespace": f["namespace"]}, refused=403),
    "GET /v1/webhooks": Row("user", ("admin",), HOOKS, named=False, refused=403),
    "DELETE /v1/webhooks/{identity}": Row("user", ("admin",), HOOKS),
    "POST /v1/webhooks/{identity}/test": Row("user", ("admin",), HOOKS),
    "GET /v1/audit": Row("user", ("admin",), AUDITED, named=False, refused=403),
    "GET /v1/audit/chain": Row("user", ("admin",), "the chain runs through all namespaces", named=False, refused=403, where=("*",)),
}
NAMES = {"GET  v1 datasets": "data", "GET  v1 suites": "suite"}
"""Series of the seeded registry that are no adapters."""
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
                    scopes={} if kind == "worker" else {"*": ["admin"]} if scopes is None else scopes,
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
        name = NAMES.get(" ".join(route.split("/")[:3]), facts["name"])
        names = {**facts, "identity": ids, "push_id": ids, "name": name}
        url = path.replace("{key:path}", "blobs/x").format(**names)
        if row.query:
            url += "?" + row.query.format(**names)
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        answer = self.client.request(method, url, json=row.body(facts) if row.body else None, headers=headers)
        plain = answer.headers.get("content-type") in ("application/json", "application/problem+json")
        body = answer.json() if plain and answer.content else {}
        return answer.status_code, body


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, local_store: Any) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "registry.db").write_bytes(sqlite_template.read_bytes())
    with seeded(World(Database(f"sqlite:///{folder / 'registry.db'}"), local_store), folder) as found:
        yield found


@contextmanager
def seeded(world: World, folder: Path) -> Iterator[Api]:
    """A registry with one of each thing that a route can name, in a campaign, and its API."""
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
        request = ScheduleRequest(namespace="team", trigger="base-upgrade", subject="demo", action={"upgrade": {}})
        schedule = schedules.add(session, ADMIN, request, world.now)
        asked = WebhookRequest(url="https://x.example", namespace="team")
        hook, _ = webhooks.add(session, ADMIN, asked, world.now)
        for key in (KEY, REVOKED):
            signatures.add_key(session, ADMIN, "team", KeyRequest(public=key.public.pem, name="k"), world.now)
        reader, _ = tokens.create(
            session, ADMIN, name="r", kind="user", scopes={"team": ["read"]}, queues=[], expires_in=None, now=world.now
        )
    rows = b'{"prompt": "1+1=", "completion": " 3"}\n'
    facts: Facts = {
        "namespace": "team", "name": "bot", "version": digest, "alias": "prod", "ref": "demo", "base": "demo", "line": "demo",
        "fingerprint": REVOKED.public.fingerprint, "public": KEY.public.pem, "bundle": signed(world, digest),
        "a": "demo@r1", "b": "demo@r2", "move": "reinstate",
        "ids": {
            "tokens": reader.id, "pushes": open_push.id, "jobs": job.id, "upgrades": campaign, "schedules": schedule.id, "webhooks": hook.id,
        },
        "table": table_of(base_of(upgrade.v1)),
        "adapter_push": adapter_push(tiny_adapter(folder / "x", upgrade.v1, seed=78), upgrade.v1)[0].model_dump(mode="json"),
        "dataset_push": files_push("dataset", {"data.jsonl": rows})[0].model_dump(mode="json"),
        "suite_push": files_push("suite", {"data.jsonl": rows})[0].model_dump(mode="json"),
        "base_push": base_push(upgrade.v1)[0].model_dump(mode="json"),
    }  # fmt: skip
    missing = facts | {"namespace": "absent", "version": ZERO, "fingerprint": ZERO, "ids": dict.fromkeys(facts["ids"], "missing")}
    parts = AppParts(world.settings, world.database, world.store, Broker("memory://"), world.clock)
    with TestClient(create_app(parts), raise_server_exceptions=False) as client:
        yield Api(client, world, facts, missing)


def signed(world: World, digest: str) -> Facts:
    body = world.one(select(StoredManifest.body).where(StoredManifest.digest == digest))
    return KEY.sign("team/bot", Manifest.parse(body)).document()


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
    assert [route for route, row in ROWS.items() if not row.why] == []


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


PEOPLES = [route for route, row in ROWS.items() if row.who in ("user", "anyone")]
OTHERS = tuple(scope for scope in SCOPES if scope != "admin")
REFUSED = "scope-missing"
NOT_THERE = {f"{noun}-not-found" for noun in ("adapter", "version", "dataset", "job", "campaign", "push", "schedule", "token", "webhook", "key")}


def scoped(row: Row, scopes: Sequence[Scope]) -> dict[str, list[Scope]]:
    return {namespace: list(scopes) for namespace in row.where}


def is_refusal(status: int, body: dict[str, Any]) -> bool:
    return status in (403, 404) and (body["code"] == REFUSED or body["code"] in NOT_THERE)


@pytest.mark.parametrize("route", PEOPLES)
def test_what_a_row_needs_is_enough_and_so_is_admin(api: Api, route: str) -> None:
    row = ROWS[route]
    for scopes in (row.needs or ("read",), ("admin",)):
        status, body = api.ask(route, api.token(scopes=scoped(row, scopes)))
        assert not is_refusal(status, body), (scopes, body)
        assert status < 500, body


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("route", [route for route in PEOPLES if ROWS[route].needs])
def test_every_scope_alone_and_all_but_it_open_what_their_row_says(api: Api, route: str, scope: Scope) -> None:
    row = ROWS[route]
    alone = api.ask(route, api.token(scopes=scoped(row, [scope])))
    assert is_refusal(*alone) == (scope != "admin" and row.needs != (scope,)), alone
    if scope == "admin":
        return
    status, body = api.ask(route, api.token(scopes=scoped(row, [other for other in OTHERS if other != scope])))
    assert is_refusal(status, body) == (scope in row.needs or row.needs == ("admin",)), body
    if row.needs in ((scope,), ("admin",)):
        assert status == row.refused, body


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


@pytest.mark.parametrize("route", [r for r, row in ROWS.items() if row.named and row.who in ("user", "anyone")])
def test_what_belongs_to_others_takes_the_same_queries_as_what_is_not_there(api: Api, route: str) -> None:
    stranger = api.token(scopes={"other": ["admin"]})
    asked = []
    for facts in (api.facts, api.missing):
        with statements(api.world.database) as seen:
            api.ask(route, stranger, facts)
        asked.append(seen)
    assert asked[0] == asked[1]


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        clerks = threading.current_thread().name.startswith("last-use")
        if not clerks and "FROM tokens" not in statement:  # who asks is looked up, or remembered for a moment
            seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def test_another_namespace_learns_nothing_of_bytes_that_are_here_nor_commits_them_unsent(
    world: World, tmp_path: Path
) -> None:
    here = tiny_adapter(tmp_path / "here", tiny_base(tmp_path / "base"), seed=1)
    new = tiny_adapter(tmp_path / "new", tmp_path / "base", seed=2)
    world.push_base(tmp_path / "base", line="demo")
    world.push_adapter(here, "team/bot", tmp_path / "base")
    parts = AppParts(SETTINGS, world.database, world.store, Broker("memory://"), world.clock)
    with world.database.write() as session:
        _, text = tokens.create(
            session, ADMIN, name="b", kind="user", scopes={"other": ["read", "publish"]}, queues=[], expires_in=None,
            now=world.now,
        )  # fmt: skip
    with TestClient(create_app(parts), headers={"authorization": f"Bearer {text}"}) as client:
        told, asked = [], []
        for folder in (here, new):
            request, _ = adapter_push(folder, tmp_path / "base")
            with statements(world.database) as seen:
                opened = client.post("/v1/adapters/other/bot/pushes", json=request.model_dump(mode="json"))
                early = client.post(f"/v1/pushes/{opened.json()['id']}/commit")
            told.append((opened.status_code, [(b["size"], b["state"]) for b in by_size(opened)], early.status_code, early.json()["code"]))
            asked.append(seen)
            assert client.post("/v1/downloads", json={"manifests": [opened.json()["version_digest"]]}).status_code == 404
        assert told[0] == told[1]
        assert {state for _, state in told[0][1]} == {"needed"}
        assert told[0][2:] == (409, "blobs-missing")
        assert asked[0] == asked[1]


def by_size(answer: Any) -> list[Any]:
    return sorted(answer.json()["blobs"], key=lambda blob: blob["size"])


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
    api.ask("POST /v1/jobs/{identity}/retry", api.token())  # other tests may have cancelled it
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

