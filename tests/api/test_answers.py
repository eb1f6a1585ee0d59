"""Remembered answers: `Answers` itself, and that a changed fact never gets the answer of before."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.api.answers import Answers
from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.broker import Broker
from registry.services import tokens
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import SETTINGS, World

TOKEN, OTHER = tokens.make_text(), tokens.make_text()


def test_bodies_that_are_kept_are_bounded_in_bytes() -> None:
    answers = Answers(most=10)
    answers.keep("a", b"1234")
    answers.keep("b", b"1234")
    answers.keep("a", b"12")  # instead of what was there
    answers.keep("c", b"1234")
    assert [answers.get(key) for key in "abc"] == [b"12", b"1234", b"1234"]
    answers.keep("d", b"1")
    assert [answers.get(key) for key in "abcd"] == [None, b"1234", b"1234", b"1"]
    answers.keep("e", bytes(11))
    assert [answers.get(key) for key in "abcde"] == [None, b"1234", b"1234", b"1", None]
    answers.keep("f", bytes(10))
    assert [answers.get(key) for key in "bcdf"] == [None, None, None, bytes(10)]


def test_what_was_longest_not_asked_for_goes_first() -> None:
    answers = Answers(room=2)
    answers.keep("a", b"1")
    answers.keep("b", b"2")
    assert answers.get("a") == b"1"
    answers.keep("c", b"3")
    assert [answers.get(key) for key in "abc"] == [b"1", None, b"3"]


def test_what_outlived_its_life_is_gone() -> None:
    answers = Answers()
    answers.keep("a", b"1", life_s=0)
    assert answers.get("a") is None


@pytest.fixture
def parts(world: World) -> AppParts:
    return AppParts(replace(SETTINGS, bootstrap_token=TOKEN), world.database, world.store, Broker("memory://"))


@pytest.fixture
def api(parts: AppParts) -> Iterator[TestClient]:
    with TestClient(create_app(parts), headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    folder = tiny_base(tmp_path / "base")
    world.register(base_of(folder), line="llama")
    return folder


def test_an_answer_is_given_again_until_a_fact_changes(
    world: World, parts: AppParts, api: TestClient, base: Path, tmp_path: Path
) -> None:
    digest = str(base_of(base).digest)
    asked = {"ref": "team/bot:prod", "base": digest}
    world.push_adapter(tiny_adapter(tmp_path / "one", base, seed=1), "team/bot", base, aliases=["prod"])
    first = api.get("/v1/resolve", params=asked)
    assert first.json()["version"]["version"] == 1
    assert api.get("/v1/resolve", params=asked).content == first.content
    assert len(parts.reads.resolutions._bodies) == 1

    world.push_adapter(tiny_adapter(tmp_path / "two", base, seed=2), "team/bot", base, aliases=["prod"])
    assert api.get("/v1/resolve", params=asked).json()["version"]["version"] == 2
    api.post("/v1/adapters/team/bot/aliases/prod/rollback", json={"base": digest}).raise_for_status()
    assert api.get("/v1/resolve", params=asked).json()["version"]["version"] == 1

    api.put("/v1/adapters/team/bot/aliases/canary", json={"version": "v1"}).raise_for_status()
    assert api.get("/v1/resolve", params=asked).json()["version"]["aliases"] == ["canary", "prod"]
    world.register(base_of(base), line="other")
    assert api.get("/v1/resolve", params=asked).json()["version"]["base_ref"] == "other@r1"


def test_what_is_remembered_is_shown_only_to_who_may_read_it(
    world: World, api: TestClient, base: Path, tmp_path: Path
) -> None:
    pushed = world.push_adapter(tiny_adapter(tmp_path / "one", base), "team/bot", base, aliases=["prod"])
    with world.database.write() as session:
        tokens.ensure(session, OTHER, name="other", kind="user", scopes={"elsewhere": ["read"]}, now=world.now)
    stranger = {"authorization": f"Bearer {OTHER}"}
    manifest = f"/v1/adapters/team/bot/versions/{pushed['digest']}/manifest"
    question = f"/v1/resolve?ref=team/bot:prod&base={base_of(base).digest}"
    for path in (manifest, question):
        assert api.get(path).status_code == api.get(path).status_code == 200
        assert api.get(path, headers=stranger).status_code == 404
        assert api.get(path, headers={"authorization": ""}).status_code == 401


def test_the_manifest_is_the_same_from_memory_and_knows_its_tag(
    world: World, api: TestClient, base: Path, tmp_path: Path
) -> None:
    pushed = world.push_adapter(tiny_adapter(tmp_path / "one", base), "team/bot", base)
    path = f"/v1/adapters/team/bot/versions/{pushed['digest']}/manifest"
    first, again, by_number = api.get(path), api.get(path), api.get(path.replace(pushed["digest"], "v1"))
    assert first.content == again.content == by_number.content
    assert first.headers["etag"] == again.headers["etag"] == by_number.headers["etag"] == f'"{pushed["digest"]}"'
    assert api.get(path, headers={"if-none-match": first.headers["etag"]}).status_code == 304


def test_a_question_without_its_subject_is_refused(api: TestClient) -> None:
    answer = api.get("/v1/resolve")
    assert answer.status_code == 400
    assert "ref" in answer.json()["detail"]
