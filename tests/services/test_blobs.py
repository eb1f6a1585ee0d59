"""Where blobs lie, who may read them, and the one way into their final place."""

import hashlib
import threading

from sqlmodel import select

from registry.core.digest import Digest
from registry.db.models import Blob
from registry.services import blobs
from tests.world import World, caller

ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'
DIGEST = str(Digest.sha256(ROWS))


def _held(world: World, **scopes: list[str]) -> set[str]:
    with world.database.read() as session:
        return blobs.held(session, caller("x", **scopes), [DIGEST])


def test_a_blob_is_read_by_whoever_reads_a_version_that_names_it(world: World) -> None:
    world.push_rows("dataset", "team/rows", ROWS)
    assert _held(world, team=["read"]) == {DIGEST}
    assert _held(world, team=["admin"]) == {DIGEST}
    assert _held(world, **{"*": ["read"]}) == {DIGEST}
    assert _held(world, team=["publish"]) == set()
    assert _held(world, other=["read"]) == set()
    world.push_rows("suite", "other/suite", ROWS)
    assert _held(world, other=["read"]) == {DIGEST}


def test_a_blob_without_a_committed_manifest_is_nobodys(world: World) -> None:
    with world.database.write() as session:
        session.add(Blob(digest=DIGEST, size=len(ROWS), verified="full", created_at=world.now))
    assert _held(world, **{"*": ["admin"]}) == set()


def test_what_was_only_checked_by_parts_is_not_offered_and_gives_way_to_what_was_read(world: World) -> None:
    staged = {}
    for level in ("parts", "full"):
        staged[level] = f"staging/{hashlib.sha256(level.encode()).hexdigest()[:16]}/{Digest.parse(DIGEST).hex}"
        world.store.put(staged[level], ROWS, Digest.sha256(ROWS))

    def place(level: str) -> None:
        blobs.place(
            world.database, world.store, staged[level], digest=DIGEST, size=len(ROWS), verified=level, now=world.now
        )

    for level, kept in (("parts", "parts"), ("full", "full"), ("parts", "full")):
        place(level)
        assert world.one(select(Blob)).verified == kept


def test_bytes_checked_by_parts_give_way_only_to_bytes_that_were_read(world: World) -> None:
    source = f"staging/by-parts/{Digest.parse(DIGEST).hex}"
    kept = []
    for level, data in (("parts", ROWS), ("parts", b"other"), ("full", b"read"), ("full", b"later"), ("parts", b"x")):
        world.store.put(source, data, Digest.sha256(data))
        blobs.place(
            world.database, world.store, source, digest=DIGEST, size=len(ROWS), verified=level, now=world.now
        )
        with world.store.open(blobs.blob_key(DIGEST)) as reader:
            kept.append(b"".join(reader.chunks()))
    assert kept == [ROWS, ROWS, b"read", b"read", b"read"]


def test_placing_at_once_is_placing_once(world: World) -> None:
    source = f"staging/at-once/{Digest.parse(DIGEST).hex}"
    world.store.put(source, ROWS, Digest.sha256(ROWS))

    def place() -> None:
        blobs.place(
            world.database, world.store, source, digest=DIGEST, size=len(ROWS), verified="full", now=world.now
        )

    threads = [threading.Thread(target=place) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.one(select(Blob)).size == len(ROWS)
    with world.store.open(blobs.blob_key(DIGEST)) as reader:
        assert b"".join(reader.chunks()) == ROWS
