"""What is asked at the same moment is answered together: each as if alone, and all in a part of the statements."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.api import reads
from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.services import tokens
from tests.api.test_access import statements
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import SETTINGS, World

ADMIN, READER = tokens.make_text(), tokens.make_text()
NAMES = [f"team/bot-{number}" for number in range(6)]


@pytest.fixture
def questions(world: World, tmp_path: Path) -> list[str]:
    """Of every kind, good ones and bad ones."""
    base = tiny_base(tmp_path / "base")
    world.register(base_of(base), line="llama")
    digest, paths = base_of(base).digest, []
    for number, name in enumerate(NAMES):
        made = [tiny_adapter(tmp_path / str(number) / str(seed), base, seed=seed) for seed in (number, 9 + number)]
        first, _ = (world.push_adapter(folder, name, base, aliases=["prod"]) for folder in made)
        paths += [
            f"/v1/resolve?ref={name}:prod&base={digest}",
            f"/v1/resolve?ref={name}:prod&base={digest}&engine=vllm",
            f"/v1/resolve?ref={name}:prod&base={digest}&fit=derived",
            f"/v1/adapters/{name}",
            f"/v1/adapters/{name}/versions",
            f"/v1/adapters/{name}/versions?limit=1",
            f"/v1/adapters/{name}/versions/{first['digest']}/manifest",
            f"/v1/adapters/{name}/versions/v2/manifest",
        ]
    return [
        *paths,
        f"/v1/resolve?ref=team/bot-0:other&base={digest}",
        f"/v1/resolve?ref=team/bot-0:prod&base={digest}&engine=none",
        f"/v1/resolve?ref=team/none:prod&base={digest}",
        "/v1/adapters/team/none",
        "/v1/adapters/team/none/versions",
        "/v1/adapters/hidden/bot-0",
        f"/v1/adapters/team/none/versions/sha256:{'0' * 64}/manifest",
        "/v1/adapters/team/bot-0/versions/sha256:0/manifest",
        "/v1/adapters?namespace=team&limit=4",
        "/v1/adapters?q=bot-1",
        "/v1/adapters?q=%00",
        "/v1/adapters?task=none",
    ]


def parts_of(world: World) -> AppParts:
    settings = replace(SETTINGS, bootstrap_token=ADMIN)
    return AppParts(settings, world.database, world.store, Broker("memory://"), world.clock)


def answers(parts: AppParts, paths: Sequence[str], token: str, *, at_once: bool) -> list[tuple[int, Any]]:
    """Status and body of each, asked one after the other or all at once."""
    app = create_app(parts)
    head = {"authorization": f"Bearer {token}"}

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://registry", headers=head) as client:
            if at_once:
                return await asyncio.gather(*map(client.get, paths))
            return [await client.get(path) for path in paths]

    async def lives() -> list[httpx.Response]:
        async with app.router.lifespan_context(app):
            return await ask()

    return [(answer.status_code, _without_chance(answer.json())) for answer in asyncio.run(lives())]


def _without_chance(body: Any) -> Any:
    """Signed URLs differ by when they were signed, refusals by the request's id."""
    if isinstance(body, dict):
        return {key: _without_chance(value) for key, value in body.items() if key not in ("get", "request", "instance")}
    return [_without_chance(value) for value in body] if isinstance(body, list) else body


@pytest.mark.parametrize("token", [ADMIN, READER], ids=["admin", "reader"])
def test_who_asks_among_others_is_told_what_they_would_be_told_alone(
    world: World, questions: list[str], token: str
) -> None:
    with world.database.write() as session:
        tokens.ensure(session, READER, name="reader", kind="user", scopes={"team": ["read"]}, now=world.now)
    alone = answers(parts_of(world), questions, token, at_once=False)
    together = answers(parts_of(world), [*questions, *questions], token, at_once=True)
    assert together == [*alone, *alone]
    assert {status for status, _ in alone} == {200, 400, 404, 409}


@pytest.mark.parametrize("kind", ["resolve", "show", "manifest"])
def test_many_who_ask_at_once_cost_a_part_of_the_statements(world: World, questions: list[str], kind: str) -> None:
    asked = {
        "resolve": r"/v1/resolve\?ref=team/bot-\d:prod&base=[^&]+",
        "show": r"/v1/adapters/team/bot-\d",
        "manifest": r"/v1/adapters/team/bot-\d/versions/sha256:[0-9a-f]{64}/manifest",
    }
    paths = [path for path in questions if re.fullmatch(asked[kind], path)]
    assert len(paths) == len(NAMES)
    with statements(world.database) as for_one:
        assert [status for status, _ in answers(parts_of(world), paths[:1], ADMIN, at_once=True)] == [200]
    with statements(world.database) as for_all:
        assert {status for status, _ in answers(parts_of(world), paths * 5, ADMIN, at_once=True)} == {200}
    assert len(for_all) <= len(paths) * len(for_one)  # a fifth of what they cost alone


def test_what_is_taken_out_of_use_is_refused_at_once(world: World, questions: list[str]) -> None:
    path = next(path for path in questions if path.startswith("/v1/resolve"))
    move = "/v1/adapters/team/bot-0/versions/v2/yank"

    async def yank_and_ask(client: httpx.AsyncClient) -> tuple[int, str]:
        assert (await client.get(path)).status_code == 200
        (await client.post(move, json={"reason": "wrong", "force": True})).raise_for_status()
        answer = await client.get(path)
        return answer.status_code, answer.json()["code"]

    assert asking(world, yank_and_ask) == (409, "version-yanked")


def test_the_manifest_of_a_deleted_version_is_given_no_longer_than_a_moment(
    world: World, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "_MANIFEST_S", 0.05)
    path = next(path for path in questions if re.search(r"bot-0/versions/sha256:\w{64}/manifest", path))

    async def delete_and_ask(client: httpx.AsyncClient) -> tuple[int, str]:
        assert (await client.get(path)).status_code == 200
        move = path.replace("/manifest", "/delete")
        (await client.post(move, json={"reason": "wrong", "force": True})).raise_for_status()
        await asyncio.sleep(0.1)
        answer = await client.get(path)
        return answer.status_code, answer.json()["code"]

    assert asking(world, delete_and_ask) == (410, "version-deleted")


def asking(world: World, what: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """What comes of it on an API process of its own."""

    async def ask() -> Any:
        app = create_app(parts_of(world))
        transport, head = httpx.ASGITransport(app), {"authorization": f"Bearer {ADMIN}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://registry", headers=head) as client,
        ):
            return await what(client)

    return asyncio.run(ask())
