"""Blobs that nothing names are collected after their grace, under lock; whatever is named, or about to be, stays."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import col, select

from registry.core.digest import Digest
from registry.core.errors import LoractlError
from registry.core.names import Reference
from registry.db.models import Blob
from registry.services import blobs, collection, pushes, withdrawals
from registry.services.references import find_adapter, find_version
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, adapter_push, caller, files_push

GRACE = timedelta(hours=2)
ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'


def lose(world: World, ref: str) -> None:
    reference = Reference.parse(ref)
    with world.database.write() as session:
        adapter = find_adapter(session, ADMIN, reference.series)
        version = find_version(session, adapter, reference)
        withdrawals.move(session, ADMIN, adapter, version, "delete", reason="", force=True, now=world.now)


def collect(world: World, grace: timedelta = GRACE) -> int:
    collection.mark(world.database, world.now)
    return collection.collect(world.database, world.store, world.now, grace)


def digests(world: World) -> set[str]:
    return set(world.all(select(Blob.digest)))


def stored(world: World, digest: str) -> bool:
    return world.store.head(blobs.blob_key(digest)) is not None


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    folder = tiny_base(tmp_path / "base")
    world.push_base(folder, line="demo")
    return folder


def test_what_a_deleted_version_named_alone_goes_after_the_grace_and_not_before(
    world: World, base: Path, tmp_path: Path
) -> None:
    before = digests(world)
    world.push_adapter(tiny_adapter(tmp_path / "a", base, seed=1), "team/bot", base)
    made = digests(world) - before
    lose(world, "team/bot@v1")
    assert collect(world) == 0
    world.later(hours=1)
    assert collect(world) == 0
    world.later(hours=1)
    assert collect(world) == len(made) == 2
    assert digests(world) == before
    assert not any(stored(world, digest) for digest in made)
    assert all(stored(world, digest) for digest in before)


def test_what_another_version_names_too_stays(world: World, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "a", base, seed=1)
    for name in ("team/bot", "other/bot"):
        world.push_adapter(folder, name, base)
    lose(world, "team/bot@v1")
    collect(world)
    world.later(days=9)
    assert collect(world) == 0
    lose(world, "other/bot@v1")
    collect(world)
    world.later(days=9)
    assert collect(world) == 2


def test_what_is_named_again_within_the_grace_stays(world: World, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "a", base, seed=1)
    world.push_adapter(folder, "team/bot", base)
    lose(world, "team/bot@v1")
    collect(world)
    world.later(hours=1)
    world.push_adapter(folder, "team/again", base)
    world.later(hours=2)
    assert collect(world) == 0
    assert world.all(select(Blob).where(col(Blob.unnamed_since).is_not(None))) == []


def test_what_an_open_push_says_is_present_stays_until_it_is_over(world: World, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "a", base, seed=1)
    world.push_adapter(folder, "team/bot", base)
    request, _ = adapter_push(folder, base)
    info = world.open("adapter", "team/again", request)
    assert {blob.state for blob in info.blobs} == {"present"}
    lose(world, "team/bot@v1")
    collect(world)
    world.later(hours=3)
    assert collect(world) == 0
    assert world.commit(info.id).state == "committed"


def test_a_collection_and_a_push_of_the_same_content_at_once_lose_nothing(
    world: World, base: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "a", base, seed=1)
    ada = caller("ada", team=["read", "publish"], base=["read", "publish"])
    for round_ in range(6):
        world.push_adapter(folder, f"team/bot{round_}", base, who=ada)
        lose(world, f"team/bot{round_}@v1")
        collection.mark(world.database, world.now)
        failed: list[str] = []

        def push(name: str, failed: list[str]) -> None:
            try:
                world.push_adapter(folder, name, base, who=ada)
            except LoractlError as error:
                failed.append(error.code)

        name = f"team/next{round_}"
        crowd = [
            threading.Thread(target=push, args=(name, failed)),
            *(
                threading.Thread(
                    target=collection.collect, args=(world.database, world.store, world.now, timedelta(0))
                )
                for _ in range(2)
            ),
        ]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        assert failed == []
        assert all(stored(world, digest) for digest in digests(world))
        lose(world, f"{name}@v1")


def test_whoever_dies_between_the_bytes_and_the_row_is_followed_by_another(
    world: World, base: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "a", base, seed=1)
    world.push_adapter(folder, "team/bot", base)
    lose(world, "team/bot@v1")
    collect(world)
    [digest, *_] = world.all(select(Blob.digest).where(col(Blob.unnamed_since).is_not(None)))
    world.store.delete(blobs.blob_key(digest))  # and then it died
    world.push_adapter(folder, "team/again", base)
    assert stored(world, digest)
    world.later(hours=3)
    assert collect(world) == 0


def test_while_somebody_holds_all_blobs_nothing_goes_and_a_hold_ends_by_itself(
    world: World, base: Path, tmp_path: Path
) -> None:
    world.push_adapter(tiny_adapter(tmp_path / "a", base, seed=1), "team/bot", base)
    lose(world, "team/bot@v1")
    collect(world)
    world.later(hours=3)
    collection.hold(world.database, "backup", "a test", world.now + timedelta(minutes=5))
    assert collect(world) == 0
    collection.hold(world.database, "backup", "a test", world.now + timedelta(minutes=10))
    world.later(minutes=6)
    assert collect(world) == 0
    world.later(minutes=5)
    assert collect(world) == 2


def test_datasets_and_bases_are_named_for_good(world: World, base: Path) -> None:
    world.push_rows("dataset", "team/rows", ROWS)
    collect(world)
    world.later(days=999)
    assert collect(world) == 0
    assert stored(world, str(Digest.sha256(ROWS)))


def test_an_expired_pushs_blobs_in_their_place_are_collected(world: World) -> None:
    request, contents = files_push("dataset", {"data.jsonl": ROWS})
    info = world.open("dataset", "team/rows", request)
    world.send(info, contents)
    digest = str(Digest.sha256(ROWS))
    blobs.place(
        world.database, world.store, blobs.staging_key(info.id, digest),
        digest=digest, size=len(ROWS), verified="full", now=world.now,
    )  # fmt: skip
    world.later(hours=3)
    assert collect(world, timedelta(0)) == 0
    with world.database.write() as session:
        pushes.abort(session, ADMIN, info.id, world.now)
    assert collect(world, timedelta(0)) == 1


def test_a_stretch_begins_anywhere_and_covers_all(world: World, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.database.write() as session:
        for number in range(10):
            digest = f"sha256:{number:064x}"
            session.add(Blob(digest=digest, size=1, verified="full", created_at=world.now))
    monkeypatch.setattr(collection, "STRETCH", 6)
    starts = [f"sha256:{number:064x}" for number in (0, 3, 6, 9)]
    assert [collection.mark(world.database, world.now, start) for start in starts[:1]] == [6]
    assert sum(collection.mark(world.database, world.now, start) for start in starts[1:]) == 4
