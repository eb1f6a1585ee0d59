"""Adapters over HTTP, on both databases: pages, filters, tags of what never changes, moves by compare-and-set."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from registry.api.app import create_app
from registry.api.deps import AppParts
from registry.api.pages import cursor
from registry.broker import Broker
from registry.services import tokens
from tests.factories import base_of, tiny_adapter, tiny_base
from tests.world import SETTINGS, World

TOKEN = tokens.make_text()


@pytest.fixture
def api(world: World) -> Iterator[TestClient]:
    parts = AppParts(replace(SETTINGS, bootstrap_token=TOKEN), world.database, world.store, Broker("memory://"))
    with TestClient(create_app(parts), headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    """The first of two revisions of a line, of the same shapes."""
    for revision in range(2):
        world.register(base_of(tiny_base(tmp_path / f"base{revision}", revision)), line="llama")
    return tmp_path / "base0"


@pytest.fixture
def zoo(world: World, base: Path, tmp_path: Path) -> Path:
    """Three adapters; the first has three versions."""
    for seed in range(3):
        world.push_adapter(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed), "team/a", base, task="sum")
        world.later(seconds=1)
    wide = tiny_adapter(tmp_path / "b", base, rank=8, seed=4, record_base=True)
    world.push_adapter(wide, "team/b", base, aliases=["prod"])
    world.push_adapter(tiny_adapter(tmp_path / "c", base, seed=5, use_dora=False), "zoo/c", base)
    return base


def walk(api: TestClient, path: str, limit: int, items: str = "items", **query: Any) -> list[Any]:
    """All items of all pages."""
    found: list[Any] = []
    after: dict[str, str] = {}
    while True:
        answer = api.get(path, params={**query, **after, "limit": limit})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page[items]) <= limit
        found += page[items]
        if page["cursor"] is None:
            return found
        after = {"cursor": page["cursor"]}


PAGES = {
    "/v1/adapters": 3,
    "/v1/adapters/team/a/versions": 3,
    "/v1/adapters/team/a/log": 5,
    "/v1/adapters/team/a/evaluations": 0,
    "/v1/bases/llama@r1/adapters": 3,
    "/v1/bases": 2,
    "/v1/jobs": 0,
    "/v1/datasets": 0,
}


def test_pages_are_complete_and_without_repeats_and_refuse_foreign_cursors(api: TestClient, zoo: Path) -> None:
    for version in ("v1", "v2"):
        api.put("/v1/adapters/team/a/aliases/beta", json={"version": version}).raise_for_status()
    for path, count in PAGES.items():
        items = "entries" if path.endswith("log") else "items"
        whole = walk(api, path, 500, items)
        assert len(whole) == count, path
        for limit in (1, 2, 3):
            assert walk(api, path, limit, items) == whole, (path, limit)
        ours = (("a", "b", "c"), (-1,), (-1, -1), (None,), ("\ud800",), ("\0",))
        for foreign in ("nonsense", *(cursor(*key) for key in ours)):
            assert api.get(path, params={"cursor": foreign}).status_code == 400, (path, foreign)


def test_the_log_leaves_nothing_out_where_clocks_differ(
    world: World, api: TestClient, base: Path, tmp_path: Path
) -> None:
    for seed in range(6):
        world.push_adapter(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed), "team/a", base, aliases=["prod"])
        world.later(seconds=-5 if seed % 2 else 3)
    path = "/v1/adapters/team/a/log"
    whole = walk(api, path, 500, "entries")
    assert sorted(entry["event"] for entry in whole) == ["alias"] * 6 + ["version"] * 6
    assert [entry["facts"]["version"] for entry in whole if entry["event"] == "version"] == [6, 5, 4, 3, 2, 1]
    for limit in (1, 2, 5):
        assert walk(api, path, limit, "entries") == whole


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, ["team/a@v3", "team/b@v1", "zoo/c@v1"]),
        ({"fit": "exact"}, ["team/a@v3", "team/b@v1", "zoo/c@v1"]),
        ({"fit": "derived,targets-equal"}, []),
        ({"engine": "peft", "max_rank": "4"}, ["team/a@v3", "zoo/c@v1"]),
        ({"alias": "prod"}, ["team/b@v1"]),
        ({"alias": "none"}, []),
        ({"evidence": "recorded"}, ["team/b@v1"]),
        ({"namespace": "zoo"}, ["zoo/c@v1"]),
        ({"namespace": "nowhere"}, []),
        ({"task": "sum"}, ["team/a@v3"]),
        ({"fit": "best"}, 400),
        ({"engine": "none"}, 400),
        ({"max_rank": "0"}, 400),
        ({"evidence": "hearsay"}, 400),
    ],
)
def test_what_is_compatible_is_narrowed_by_what_is_asked(
    api: TestClient, zoo: Path, query: dict[str, str], found: list[str] | int
) -> None:
    path = "/v1/bases/llama@r1/adapters"
    if isinstance(found, int):
        assert api.get(path, params=query).status_code == found
        return
    items = walk(api, path, 1, **query)
    assert sorted(item["version"]["ref"] for item in items) == found
    assert {item["fit"]["fit"] for item in items} <= {"exact"}


def test_another_base_is_given_only_by_name_of_the_class(api: TestClient, zoo: Path) -> None:
    path = "/v1/bases/llama@r2/adapters"
    assert walk(api, path, 2) == []
    assert {item["fit"]["fit"] for item in walk(api, path, 2, fit="same-shape")} == {"same-shape"}
    assert len(walk(api, path, 2, fit="same-shape")) == 3


def test_a_move_says_what_it_expects_and_is_refused_where_somebody_was_first(api: TestClient, zoo: Path) -> None:
    path = "/v1/adapters/team/a/aliases/beta"

    def move(version: str, expected: str) -> tuple[int, Any]:
        answer = api.put(path, json={"version": version}, headers={"if-match": expected})
        return answer.status_code, answer.json()

    assert move("v1", "1")[0] == 412
    status, made = move("v1", "0")
    assert (status, made["generation"], made["version"]) == (200, 1, 1)
    status, refused = move("v2", "0")
    assert (status, refused["code"]) == (412, "alias-moved")
    assert "v1" in refused["detail"]
    assert move("v2", '"1"')[1]["generation"] == 2
    assert move("v3", "1")[0] == 412
    assert api.get("/v1/adapters/team/a/aliases").json()[0]["version"] == 2
    for nonsense in ("*", "one", "-1"):
        assert move("v3", nonsense)[0] == 400


@pytest.mark.parametrize("move", ["yank", "quarantine", "delete"])
def test_whose_reply_was_lost_moves_again_and_changes_nothing(api: TestClient, zoo: Path, move: str) -> None:
    path, asked = "/v1/adapters/team/b/versions/v1", {"reason": "an old mistake", "force": True}
    first = api.post(f"{path}/{move}", json=asked)
    told = api.get("/v1/adapters/team/b/log").json()
    again = api.post(f"{path}/{move}", json=asked)
    assert first.status_code == again.status_code == 200, again.text
    assert first.json()["follows"] and not again.json()["follows"]
    assert again.json()["version"] == first.json()["version"]
    assert api.get("/v1/adapters/team/b/log").json() == told


@pytest.mark.parametrize("path", ["/v1/adapters/team/b/versions/v1/manifest", "/v1/bases/llama@r1/table"])
def test_what_never_changes_has_a_tag_and_is_sent_once(api: TestClient, zoo: Path, path: str) -> None:
    first = api.get(path)
    tag = first.headers["etag"]
    assert first.content
    again = api.get(path, headers={"if-none-match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    other = api.get(path, headers={"if-none-match": '"b3:0"'})
    assert (other.status_code, other.content) == (200, first.content)
