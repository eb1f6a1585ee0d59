"""The garbage collector ends what is over and empties staging; what somebody may still commit it leaves alone."""

import os
import threading

import pytest

from registry.broker import Broker
from registry.core.digest import Digest
from registry.core.errors import DatabaseDown, UploadNotFound
from registry.daemons import gc, run
from registry.parts import Parts
from registry.schemas import PartsRequest, PartWanted
from registry.services import blobs, pushes
from tests.world import ADMIN, World, files_push, put

ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'


def parts_of(world: World) -> Parts:
    return Parts(world.settings, world.database, world.store, Broker("memory://"), world.clock)


def _staged(world: World, push_id: str) -> list[str]:
    return [stat.key for stat in world.store.walk(f"staging/{push_id}/")]


def _open(world: World, *more: bytes) -> str:
    data = ROWS + b"".join(more)
    request, contents = files_push("dataset", {"data.jsonl": data})
    info = world.open("dataset", "team/rows", request)
    world.send(info, contents)
    return info.id


def test_a_living_push_is_left_alone(world: World) -> None:
    push_id = _open(world)
    gc.step(parts_of(world))
    assert len(_staged(world, push_id)) == 1
    assert world.commit(push_id).state == "committed"


def test_an_expired_push_is_ended_and_emptied(world: World) -> None:
    push_id = _open(world)
    world.later(hours=25)
    assert gc.step(parts_of(world))
    assert world.describe(push_id).state == "expired"
    assert _staged(world, push_id) == []


def test_a_late_put_into_an_ended_push_is_removed_in_the_next_round(world: World) -> None:
    request, contents = files_push("dataset", {"data.jsonl": ROWS})
    info = world.open("dataset", "team/rows", request)
    with world.database.write() as session:
        pushes.abort(session, ADMIN, info.id, world.now)
    world.send(info, contents)
    assert len(_staged(world, info.id)) == 1
    gc.step(parts_of(world))
    assert _staged(world, info.id) == []


def test_open_multipart_uploads_of_ended_pushes_are_aborted(world: World) -> None:
    world = world.with_settings(multipart_from=100, part_size=5 << 20)
    data = ROWS * 10
    request, _ = files_push("dataset", {"data.jsonl": data})
    info = world.open("dataset", "team/rows", request)
    digest, wanted = str(Digest.sha256(data)), PartWanted(number=1, sha256=str(Digest.sha256(data)))
    ask = PartsRequest(digest=digest, parts=[wanted])
    signed = pushes.parts(world.database, world.store, world.settings, ADMIN, info.id, ask, world.now).put[1]
    put(signed, data).raise_for_status()
    with world.database.read() as session:
        [(_, upload_id)] = pushes.uploads_of(session, info.id)
    with world.database.write() as session:
        pushes.abort(session, ADMIN, info.id, world.now)
    assert gc.step(parts_of(world))
    with pytest.raises(UploadNotFound):
        world.store.list_parts(blobs.staging_key(info.id, digest), upload_id)
    with world.database.read() as session:
        assert pushes.uploads_of(session, info.id) == []


def test_what_no_push_knows_goes_after_its_grace(world: World) -> None:
    key = f"staging/p{os.urandom(12).hex()}/{Digest.sha256(ROWS).hex}"
    world.store.put(key, ROWS, Digest.sha256(ROWS))
    gc.step(parts_of(world))
    assert world.store.head(key) is not None
    world.later(hours=2)
    gc.step(parts_of(world))
    assert world.store.head(key) is None


def test_an_upload_that_no_push_knows_goes_after_its_grace_and_a_living_ones_stays(world: World) -> None:
    world = world.with_settings(multipart_from=100, part_size=5 << 20)
    data = ROWS * 10
    request, _ = files_push("dataset", {"data.jsonl": data})
    info = world.open("dataset", "team/rows", request)
    digest = str(Digest.sha256(data))
    ask = PartsRequest(digest=digest, parts=[PartWanted(number=1, sha256=digest)])
    pushes.parts(world.database, world.store, world.settings, ADMIN, info.id, ask, world.now)
    key = blobs.staging_key(info.id, digest)
    with world.database.read() as session:
        [(_, living)] = pushes.uploads_of(session, info.id)
    orphan = world.store.start_multipart(key, size=len(data), part_size=5 << 20)  # died before the row knew of it
    gc.step(parts_of(world))
    assert world.store.list_parts(key, orphan) == []
    world.later(hours=2)
    assert gc.step(parts_of(world))
    with pytest.raises(UploadNotFound):
        world.store.list_parts(key, orphan)
    assert world.store.list_parts(key, living) == []


def test_blobs_in_their_place_are_never_touched(world: World) -> None:
    outcome = world.push_rows("dataset", "team/rows", ROWS)
    world.later(days=400)
    gc.step(parts_of(world))
    assert outcome["ref"] == "team/rows@v1"
    assert world.store.head(blobs.blob_key(str(Digest.sha256(ROWS)))) is not None


def test_daemons_outlive_a_database_that_is_down_and_stop_when_told(
    embedded: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_PAUSE_S", 0.001)
    calls: list[int] = []
    stop = threading.Event()

    def step(parts: Parts) -> bool:
        calls.append(len(calls))
        if len(calls) == 1:
            raise DatabaseDown(reason="connection refused")
        if len(calls) == 2:
            raise ValueError("a row that nobody expected")
        stop.set()
        return False

    run.run(parts_of(embedded), stop, (run.Daemon("test", step, 0.01),))
    assert len(calls) == 3


def test_every_daemon_has_a_name_and_a_pause() -> None:
    names = [daemon.name for daemon in run.DAEMONS]
    assert len(set(names)) == len(names)
    assert {"verifier", "gc"} <= set(names)
    assert all(daemon.pause_s > 0 for daemon in run.DAEMONS)
