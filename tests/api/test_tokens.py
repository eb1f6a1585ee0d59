"""The life of a token over HTTP, on both databases: shown once, used, limited, expired, revoked."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlmodel import Session, select

from registry.api import deps
from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.api.together import Together
from registry.api.turns import Turns
from registry.broker import Broker
from registry.db.models import Token
from registry.services import tokens
from tests.waiting import wait_for
from tests.world import SETTINGS, World

ADMIN = tokens.make_text()
READER = {"name": "reader", "scopes": {"team": ["read"]}}


@pytest.fixture
def api(world: World) -> Iterator[TestClient]:
    with TestClient(create_app(parts_of(world)), headers=bearer(ADMIN)) as client:
        yield client


def parts_of(world: World) -> AppParts:
    """Those of a process."""
    settings = replace(SETTINGS, bootstrap_token=ADMIN)
    return AppParts(settings, world.database, world.store, Broker("memory://"), world.clock)


def written(parts: AppParts) -> None:
    """Wait until every use of a token is written down that is to be."""
    parts._clerk.submit(lambda: None).result()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def make(api: TestClient, **changes: Any) -> dict[str, Any]:
    answer = api.post("/v1/tokens", json=READER | changes)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_a_token_is_shown_once_and_begins_with_its_id(world: World, api: TestClient) -> None:
    made = make(api)
    secret = made["token"].split("_", 2)[2]
    assert made["token"].startswith(f"lora_{made['id']}_")
    listed = api.get("/v1/tokens")
    assert made["id"] in {token["id"] for token in listed.json()["items"]}
    revoked = api.delete(f"/v1/tokens/{made['id']}")
    for answer in (listed.text, revoked.text):
        assert secret not in answer
    stored = world.one(select(Token).where(Token.id == made["id"]))
    assert secret not in str(stored.model_dump())


def test_a_token_is_who_it_was_made_for_and_may_what_it_was_given(api: TestClient) -> None:
    token = bearer(make(api)["token"])
    me = api.get("/v1/whoami", headers=token).json()
    assert (me["name"], me["kind"], me["scopes"]) == ("reader", "user", {"team": ["read"]})
    assert api.get("/v1/adapters", headers=token).status_code == 200
    for ask in (
        api.put("/v1/namespaces/team/policy", json={}, headers=token),
        api.get("/v1/tokens", headers=token),
        api.post("/v1/tokens", json=READER, headers=token),
    ):
        assert (ask.status_code, ask.json()["code"]) == (403, "scope-missing")


def test_an_admin_of_a_namespace_gives_scopes_there_and_nowhere_else(api: TestClient) -> None:
    token = bearer(make(api, scopes={"team": ["admin"]})["token"])
    assert api.post("/v1/tokens", json=READER, headers=token).status_code == 201
    for scopes in ({"other": ["read"]}, {"*": ["read"]}, {"team": ["read"], "other": ["read"]}):
        assert api.post("/v1/tokens", json=READER | {"scopes": scopes}, headers=token).status_code == 403
    assert {tuple(t["scopes"]) for t in api.get("/v1/tokens", headers=token).json()["items"]} == {("team",)}


def test_a_token_expires_when_it_was_said_to(world: World, api: TestClient) -> None:
    made = make(api, expires_in=60)
    assert datetime.fromisoformat(made["expires_at"]) == world.now + timedelta(seconds=60)
    world.later(seconds=61)
    answer = api.get("/v1/whoami", headers=bearer(made["token"]))
    assert (answer.status_code, answer.json()["code"]) == (401, "token-refused")
    assert "expired" in answer.json()["detail"]
    for never in (0, -1):
        assert api.post("/v1/tokens", json=READER | {"expires_in": never}).status_code == 400


def test_a_revoked_token_opens_nothing_though_it_was_just_used(world: World, api: TestClient) -> None:
    made = make(api)
    token = bearer(made["token"])
    assert api.get("/v1/whoami", headers=token).status_code == 200
    gone = api.delete(f"/v1/tokens/{made['id']}", headers=token)  # its own, which needs no scope
    assert (gone.status_code, datetime.fromisoformat(gone.json()["revoked_at"])) == (200, world.now)
    answer = api.get("/v1/whoami", headers=token)
    assert (answer.status_code, answer.json()["code"]) == (401, "token-refused")
    assert "revoked" in answer.json()["detail"]
    assert api.delete(f"/v1/tokens/{made['id']}").json()["code"] == "move-not-allowed"
    assert api.delete("/v1/tokens/absent").status_code == 404


def test_one_look_finds_all_who_are_at_work_again_and_forgets_whose_token_was_revoked(world: World) -> None:
    parts = parts_of(world)
    looks: list[str] = []

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM tokens" in statement:
            looks.append(statement)

    with TestClient(create_app(parts), headers=bearer(ADMIN)) as api:
        made = [make(api) for _ in range(3)]
        texts = [one["token"] for one in made]

        def ask(text: str) -> int:
            return api.get("/v1/whoami", headers=bearer(text)).status_code

        assert [ask(text) for text in texts * 2] == [200] * 6
        ask(texts[0])
        written(parts)
        with world.database.write() as session:  # by another process
            session.get_one(Token, made[2]["id"]).revoked_at = world.now
        event.listen(world.database.engine, "before_cursor_execute", look)
        try:
            for known in parts.callers.values():
                known.until = time.monotonic()
            assert ask(texts[0]) == 200
            assert len(looks) == 1
            assert texts[1] in parts.callers
            assert parts.callers[texts[1]].until > time.monotonic()
            assert texts[2] not in parts.callers
            assert ask(texts[2]) == 401
        finally:
            event.remove(world.database.engine, "before_cursor_execute", look)


def test_who_asked_for_nothing_of_late_is_not_looked_up_with_others_and_seems_not_at_work(world: World) -> None:
    parts = parts_of(world)
    with TestClient(create_app(parts), headers=bearer(ADMIN)) as api:
        one, two = make(api), make(api)
        for text in (one["token"], two["token"]) * 2:
            assert api.get("/v1/whoami", headers=bearer(text)).is_success
        written(parts)
        before = world.one(select(Token).where(Token.id == one["id"])).last_used_at
        world.later(seconds=3600)
        parts.callers[one["token"]].until = time.monotonic() - 1
        parts.callers.move_to_end(one["token"], last=False)
        del parts.callers[two["token"]]
        assert api.get("/v1/whoami", headers=bearer(two["token"])).is_success
        written(parts)
        assert world.one(select(Token).where(Token.id == two["id"])).last_used_at == world.now
        assert world.one(select(Token).where(Token.id == one["id"])).last_used_at == before


def test_a_look_that_began_before_a_token_was_forgotten_brings_it_not_back(world: World) -> None:
    parts = parts_of(world)
    with world.database.write() as session:
        tokens.ensure(session, ADMIN, name="admin", kind="user", scopes={"*": ["admin"]}, now=world.now)
    asked = tokens.authenticate_all

    def slow(session: Session, texts: Sequence[str], now: datetime) -> Any:
        found = asked(session, texts, now)
        parts.forget(ADMIN.split("_")[1])  # revoked in between, by this very process
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deps, "authenticate_all", slow)
        [caller] = parts._authenticated([ADMIN])
    assert isinstance(caller, tokens.Caller)
    assert parts.known(ADMIN) is None
    parts._authenticated([ADMIN])
    assert parts.known(ADMIN) is not None
    parts.close()


def test_who_is_behind_a_token_is_found_before_a_turn_is_taken(world: World) -> None:
    parts = parts_of(world)
    parts.turns = Turns(1, 60)
    parts._authentications = Together(parts._authenticated, parts.turns)
    with TestClient(create_app(parts), headers=bearer(ADMIN)) as api:
        began = time.monotonic()
        assert api.get("/v1/bases").is_success
        assert time.monotonic() - began < 30


def test_a_rotated_token_has_a_new_secret_and_the_old_one_for_the_grace(world: World, api: TestClient) -> None:
    made = make(api)
    old = bearer(made["token"])
    rotated = api.post(f"/v1/tokens/{made['id']}/rotate", json={"grace_s": 60}, headers=old).json()  # its own
    new = bearer(rotated["token"])
    assert (rotated["id"], rotated["scopes"]) == (made["id"], made["scopes"])
    assert datetime.fromisoformat(rotated["previous_until"]) == world.now + timedelta(seconds=60)
    assert rotated["token"] != made["token"]
    for token in (old, new):
        assert api.get("/v1/whoami", headers=token).json()["id"] == made["id"]
    world.later(seconds=61)
    wait_for(lambda: api.get("/v1/whoami", headers=old).status_code == 401)
    assert api.get("/v1/whoami", headers=new).status_code == 200
    assert rotated["token"].split("_", 2)[2] not in api.get("/v1/tokens").text


def test_a_rotation_without_a_grace_or_a_second_one_ends_the_old_secret(api: TestClient) -> None:
    made = make(api)
    first = api.post(f"/v1/tokens/{made['id']}/rotate", json={"grace_s": 600}).json()["token"]
    second = api.post(f"/v1/tokens/{made['id']}/rotate", json={"grace_s": 600}).json()["token"]
    good = {token: api.get("/v1/whoami", headers=bearer(token)).status_code for token in (made["token"], first, second)}
    assert good == {made["token"]: 401, first: 200, second: 200}
    third = api.post(f"/v1/tokens/{made['id']}/rotate", json={"grace_s": 0}).json()["token"]
    assert api.get("/v1/whoami", headers=bearer(second)).status_code == 401
    assert api.get("/v1/whoami", headers=bearer(third)).status_code == 200


def test_what_the_settings_name_or_is_over_is_not_rotated(world: World, api: TestClient) -> None:
    revoked, expired = make(api), make(api, expires_in=1)
    api.delete(f"/v1/tokens/{revoked['id']}")
    world.later(seconds=2)
    for identity, state in (
        (ADMIN.split("_")[1], "named by the settings"), (revoked["id"], "revoked"), (expired["id"], "expired"),
    ):  # fmt: skip
        answer = api.post(f"/v1/tokens/{identity}/rotate", json={})
        assert (answer.status_code, answer.json()["facts"]["state"]) == (409, state)
    assert api.get("/v1/whoami").status_code == 200


def test_what_a_leak_shows_of_a_token_finds_it(api: TestClient) -> None:
    made = make(api)
    for prefix in (made["id"][:4], f"lora_{made['id'][:4]}", f"lora_{made['id']}", made["id"]):
        found = api.get("/v1/tokens", params={"prefix": prefix}).json()["items"]
        assert made["id"] in {token["id"] for token in found}
    assert api.get("/v1/tokens", params={"prefix": "%"}).json()["items"] == []
    assert api.get("/v1/tokens", params={"prefix": made["token"]}).status_code == 400


def test_the_last_use_is_written_down_about_once_a_minute(world: World, api: TestClient) -> None:
    made = make(api)
    assert made["last_used_at"] is None
    began = world.now
    for seconds, seen in ((0, 0), (30, 0), (40, 70)):
        world.later(seconds=seconds)
        with TestClient(create_app(parts_of(world))) as other:  # its end waits for what is to be written
            assert other.get("/v1/whoami", headers=bearer(made["token"])).status_code == 200
        used = world.one(select(Token).where(Token.id == made["id"])).last_used_at
        assert used == began + timedelta(seconds=seen)


def test_a_workers_token_has_queues_and_no_scopes(api: TestClient) -> None:
    made = make(api, kind="worker", scopes={}, queues=["gpu"])
    assert api.get("/v1/adapters", headers=bearer(made["token"])).status_code == 403
    asked = {"queue": "gpu", "worker": "w"}
    assert api.post("/v1/jobs/claim", json=asked, headers=bearer(made["token"])).json()["job"] is None
    wrong: list[dict[str, Any]] = [
        {"kind": "worker", "queues": ["gpu"]}, {"queues": ["gpu"]}, {"scopes": {}}, {"scopes": {"team": ["all"]}},
    ]  # fmt: skip
    for changes in wrong:
        assert api.post("/v1/tokens", json=READER | changes).status_code == 400
