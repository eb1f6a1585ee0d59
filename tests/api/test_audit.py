"""Every route that changes anything leaves a row of the audit; those that change nothing say why they are let off."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from sqlmodel import func, select

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.core.manifest import Manifest
from registry.core.policy import Policy
from registry.db.models import AuditRow, StoredManifest
from registry.keys import PrivateKey
from registry.services import tokens
from tests.api.test_access import ROWS, routes_of
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import ADMIN, SETTINGS, World, adapter_push, base_push, files_push, put, table_of

QUIET = {
    "POST /v1/downloads": "it signs URLs",
    "POST /v1/upgrades/plan": "it stores nothing",
    "POST /v1/pushes/{push_id}/parts": "bytes on their way are no change of state",
    "POST /v1/jobs/{identity}/heartbeat": "progress",
    "POST /v1/jobs/{identity}/checkpoint": "progress",
    "POST /v1/jobs/checkpoints": "progress",
    "PUT /store/{key:path}": "bytes on their way",
}
ELSEWHERE = {
    "POST /v1/upgrades/{identity}/labels": "tests/services/test_pools.py: an upgrade has to wait for labels first",
}
KEY = PrivateKey.generate()
LINES = b'{"prompt": "1+1=", "completion": " 3"}\n'


@dataclass
class Walk:
    """Calls by an administrator, or a worker; each must succeed, and be in the audit."""

    client: TestClient
    world: World
    token: str
    worker: str
    walked: set[str] = field(default_factory=set)

    def __call__(
        self, route: str, json: Any = None, at: dict[str, str] | None = None, *, worker: bool = False
    ) -> Any:
        method, _, path = route.partition(" ")
        before = self._rows()
        headers = {"authorization": f"Bearer {self.worker if worker else self.token}"}
        answer = self.client.request(method, path.format(**(at or {})), json=json, headers=headers)
        assert answer.is_success, (route, answer.text)
        assert self._rows() > before, f"{route} left no row"
        self.walked.add(route)
        plain = answer.headers.get("content-type") == "application/json" and answer.content
        return answer.json() if plain else None

    def _rows(self) -> int:
        return int(self.world.one(select(func.count()).select_from(AuditRow)))

    def sent(self, info: dict[str, Any], contents: dict[str, bytes]) -> str:
        """A push whose bytes were sent; its id."""
        shown = self.world.describe(info["id"])
        for blob in shown.blobs:
            if blob.put is not None:
                put(blob.put, contents[blob.digest]).raise_for_status()
        return shown.id


def walk_of(upgrade: Upgrade) -> Walk:
    world = upgrade.world
    more: dict[str, Any] = {"expires_in": None, "now": upgrade.world.now}
    with world.database.write() as session:
        _, user = tokens.create(
            session, ADMIN, name="u", kind="user", scopes={"*": ["admin"]}, queues=[], **more
        )
        _, worker = tokens.create(session, ADMIN, name="w", kind="worker", scopes={}, queues=["cpu"], **more)
    parts = AppParts(SETTINGS, world.database, world.store, Broker("memory://"), world.clock)
    return Walk(TestClient(create_app(parts)), world, user, worker)


def test_every_route_that_changes_anything_leaves_a_row(embedded: World, tmp_path: Path) -> None:
    upgrade = Upgrade(embedded, tmp_path)
    call = walk_of(upgrade)
    _access(call)
    _pushes(call, upgrade, tmp_path)
    _aliases(call, upgrade)
    _jobs(call, upgrade, tmp_path)
    _upgrades(call, upgrade)
    changing = {route for route in routes_of(call.client.app) if not route.startswith(("GET", "HEAD"))}
    assert changing - call.walked - QUIET.keys() - ELSEWHERE.keys() == set()
    assert QUIET.keys() <= ROWS.keys()


def signed_by(world: World, digest: str) -> dict[str, Any]:
    body = world.one(select(StoredManifest.body).where(StoredManifest.digest == digest))
    return KEY.sign("team/bot", Manifest.parse(body)).document()


def _access(call: Walk) -> None:
    asked = {"name": "x", "scopes": {"team": ["read"]}}
    made = call("POST /v1/tokens", asked)
    call("POST /v1/tokens/{identity}/rotate", {}, at={"identity": made["id"]})
    call("DELETE /v1/tokens/{identity}", at={"identity": made["id"]})
    action = {"job": {"recipe": {"kind": "evaluate", "base": "demo@r1", "suite": "team/suite"}}}
    added = call(
        "POST /v1/schedules", {"namespace": "team", "trigger": "cron", "subject": "0 3 * * 1", "action": action}
    )
    call("DELETE /v1/schedules/{identity}", at={"identity": added["id"]})
    hook = call("POST /v1/webhooks", {"url": "https://x.example", "namespace": "team"})
    call("POST /v1/webhooks/{identity}/test", at={"identity": hook["id"]})
    call("DELETE /v1/webhooks/{identity}", at={"identity": hook["id"]})
    call("PUT /v1/namespaces/{namespace}/quota", {"quota_bytes": 1 << 40}, at={"namespace": "team"})
    added = [
        call("POST /v1/namespaces/{namespace}/keys", {"public": key.public.pem, "name": "k"}, at={"namespace": "team"})
        for key in (KEY, PrivateKey.generate())
    ]
    call("PUT /v1/namespaces/{namespace}/signing", {"required": False}, at={"namespace": "team"})
    revoked = {"namespace": "team", "fingerprint": added[1]["fingerprint"]}
    call("POST /v1/namespaces/{namespace}/keys/{fingerprint}/revoke", {"reason": "why"}, at=revoked)
    call("POST /v1/fsck", {})
    call("PUT /v1/namespaces/{namespace}/policy", POLICY.model_dump(mode="json"), at={"namespace": "team"})
    policy = Policy(aliases=()).model_dump(mode="json")
    call("PUT /v1/adapters/{namespace}/{name}/policy", policy, at={"namespace": "team", "name": "other"})


def _pushes(call: Walk, upgrade: Upgrade, folder: Path) -> None:
    third = tiny_base(folder / "third", seed=7)
    call("POST /v1/bases", {"table": table_of(base_of(third))})
    derived = {"parent": "demo@r1", "kind": "continued"}
    call("POST /v1/bases/{ref}/derivations", derived, at={"ref": str(base_of(third).digest)})
    call("POST /v1/bases/pushes", base_push(third)[0].model_dump(mode="json"))
    draft = base_push(tiny_base(folder / "fourth", seed=8))[0].model_dump(mode="json")
    late = {f["path"]: f.pop("digest") for f in draft["manifest"]["files"] if f["path"].endswith(".safetensors")}
    opened = call("POST /v1/bases/pushes", draft)
    call("POST /v1/pushes/{push_id}/seal", {"digests": late}, at={"push_id": opened["id"]})
    adapter, contents = adapter_push(tiny_adapter(folder / "a", upgrade.v1, seed=50), upgrade.v1)
    where = {"namespace": "team", "name": "bot"}
    opened = call("POST /v1/adapters/{namespace}/{name}/pushes", adapter.model_dump(mode="json"), at=where)
    call("POST /v1/pushes/{push_id}/commit", at={"push_id": call.sent(opened, contents)})
    call.world.verify()
    for kind in ("dataset", "suite"):
        request = files_push(kind, {"data.jsonl": LINES})[0].model_dump(mode="json")
        opened = call(f"POST /v1/{kind}s/{{namespace}}/{{name}}/pushes", request, at=where)
    call("DELETE /v1/pushes/{push_id}", at={"push_id": opened["id"]})


def _aliases(call: Walk, upgrade: Upgrade) -> None:
    digest = upgrade.push("team/bot", seed=3)
    alias = {"namespace": "team", "name": "bot", "alias": "dev"}
    for version in ("v1", digest):
        call("PUT /v1/adapters/{namespace}/{name}/aliases/{alias}", {"version": version}, at=alias)
    call("POST /v1/adapters/{namespace}/{name}/aliases/{alias}/rollback", {"base": "demo@r1"}, at=alias)
    signed = {"bundle": signed_by(call.world, digest)}
    call("POST /v1/adapters/{namespace}/{name}/versions/{version}/signatures", signed, at=alias | {"version": digest})
    third = {"namespace": "team", "name": "bot", "version": digest, "move": "yank"}
    call("POST /v1/adapters/{namespace}/{name}/versions/{version}/{move}", {"reason": "why"}, at=third)


def _jobs(call: Walk, upgrade: Upgrade, folder: Path) -> None:
    recipe = {"kind": "finetune", "base": "demo", "datasets": ["team/data"], "steps": 2}
    asked = {"recipe": recipe, "output": {"adapter": "team/bot"}}
    job = call("POST /v1/jobs", asked)["id"]
    call("POST /v1/jobs/{identity}/cancel", at={"identity": job})
    call("POST /v1/jobs/{identity}/retry", at={"identity": job})
    call("POST /v1/jobs/claim", {"queue": "cpu", "worker": "w"}, worker=True)
    adapter, contents = adapter_push(tiny_adapter(folder / "b", upgrade.v1, seed=51), upgrade.v1)
    pushed = {"attempt": 1, "push": adapter.model_dump(mode="json")}
    opened = call("POST /v1/jobs/{identity}/pushes", pushed, worker=True, at={"identity": job})
    push = call.sent(opened, contents)
    call("POST /v1/pushes/{push_id}/commit", worker=True, at={"push_id": push})
    call.world.verify()
    finished = {"attempt": 1, "result": {}, "pushes": [push]}
    call("POST /v1/jobs/{identity}/finish", finished, worker=True, at={"identity": job})
    job = call("POST /v1/jobs", asked | {"fresh": True})["id"]
    call("POST /v1/jobs/claim", {"queue": "cpu", "worker": "w"}, worker=True)
    failed = {"attempt": 1, "problem": {"detail": "no"}, "retryable": False}
    call("POST /v1/jobs/{identity}/fail", failed, worker=True, at={"identity": job})


def _upgrades(call: Walk, upgrade: Upgrade) -> None:
    upgrade.policy(POLICY.model_copy(update={"action": "ask"}))
    upgrade.serve("team/bot", seed=4)
    call.world.push_base(upgrade.v2, line="demo")
    campaign = call("POST /v1/upgrades", {"line": "demo", "to": "demo"})["id"]
    call("POST /v1/upgrades/{identity}/start", at={"identity": campaign})
    call("POST /v1/upgrades/{identity}/pause", {}, at={"identity": campaign})
    call("POST /v1/upgrades/{identity}/resume", at={"identity": campaign})
    upgrade.skills = {"serving": 0.9, "carry": 0.9}
    upgrade.run()
    call("POST /v1/upgrades/{identity}/approve", {"adapter": "team/bot"}, at={"identity": campaign})
    call("POST /v1/upgrades/{identity}/rollback", {}, at={"identity": campaign})
    campaign = call("POST /v1/upgrades", {"line": "demo", "to": "demo"})["id"]
    call("POST /v1/upgrades/{identity}/abort", {}, at={"identity": campaign})
    call("POST /v1/lines/{line}/revisions", {"revision": 1}, at={"line": "demo"})
