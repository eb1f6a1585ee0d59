"""Laws of a push: pushing twice is one version, nothing is visible before the commit, possession is proved."""

import json
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlmodel import col, select

from registry.core.digest import Digest
from registry.core.errors import (
    AdapterDoesNotFit,
    AliasMoved,
    BadHeader,
    BadManifest,
    BadName,
    BadPath,
    BadRequest,
    BadTensor,
    BaseNotFound,
    BlobsMissing,
    DatabaseDown,
    DigestMismatch,
    EvidenceContradicts,
    FileTooLarge,
    GateNotPassed,
    LeftOverTensors,
    LfsPointer,
    LoractlError,
    MoveNotAllowed,
    NonFinite,
    NotAnAdapter,
    PartBusy,
    PickleRefused,
    PushExpired,
    PushNotFound,
    RevisionTaken,
    ScopeMissing,
    StorageDown,
    ZeroUpdate,
)
from registry.core.manifest import MAX_ORIGINS, Manifest
from registry.core.names import SeriesName
from registry.core.policy import Evidence, Gate, Margin, Policy
from registry.db import queries
from registry.db.engine import Database
from registry.db.models import (
    Adapter,
    Alias,
    Base,
    Blob,
    Job,
    Push,
    PushBlob,
    StoredManifest,
    StoredPolicy,
    TargetFit,
    Version,
    VersionParent,
)
from registry.schemas import PartsRequest, PartWanted, PushRequest, SignedRequest
from registry.services import aliases, blobs, commits, pushes, verification
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests.factories import adapter_config, base_of, tiny_adapter, tiny_base, write_json, write_safetensors
from tests.world import ADMIN, World, adapter_push, base_push, caller, files_push, put

ALICE = caller("alice", team=["read", "publish"])
BOB = caller("bob", other=["read", "publish"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter", base, record_base=True)


# ── laws ─────────────────────────────────────────────────────────────────────


def test_pushing_twice_is_one_version_and_the_second_time_no_byte(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base, line="demo")
    first = world.push_adapter(adapter, "team/bot", base)
    request, _ = adapter_push(adapter, base)
    again = world.open("adapter", "team/bot", request)
    assert again.state == "committed"
    assert again.blobs == []
    assert again.outcome == first
    assert len(world.all(select(Version))) == 1


def test_nothing_is_visible_before_the_commit(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)
    for table in (Adapter, Version):
        assert world.all(select(table)) == []
    assert [kept.kind for kept in world.all(select(StoredManifest))] == ["base"]
    world.verify()
    assert world.one(select(Version)).number == 1


def test_present_is_said_only_of_what_the_caller_may_read(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    world.push_adapter(adapter, "team/bot", base, ALICE)
    request, contents = adapter_push(adapter, base)
    stranger = world.open("adapter", "other/bot", request, BOB)
    assert {blob.state for blob in stranger.blobs} == {"needed"}
    both = caller("carol", team=["read"], other=["publish"])
    assert {blob.state for blob in world.open("adapter", "other/bot", request, both).blobs} == {"present"}
    assert world.send(stranger, contents) == sum(map(len, contents.values()))


def test_a_version_made_of_present_blobs_sends_nothing(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    first = world.push_adapter(adapter, "team/bot", base)
    second = world.push_adapter(adapter, "team/copy", base)
    assert second["ref"] == "team/copy@v1"
    assert second["digest"] == first["digest"]


def test_opening_again_is_resuming(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    blob = info.blobs[0]
    assert blob.put is not None
    put(blob.put, contents[blob.digest]).raise_for_status()
    again = world.open("adapter", "team/bot", request)
    assert again.id == info.id
    assert {found.digest: found.state for found in again.blobs}[blob.digest] == "arrived"
    assert world.open("adapter", "team/bot", request, ALICE).id != info.id


def test_whoever_publishes_learns_that_the_version_exists(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    outcome = world.push_adapter(adapter, "team/bot", base)
    info = world.open("adapter", "team/bot", adapter_push(adapter, base)[0], ALICE)
    assert (info.state, info.outcome, info.blobs) == ("committed", outcome, [])


def test_a_base_is_its_content_and_other_files_of_it_bring_nothing(world: World, tmp_path: Path, base: Path) -> None:
    sharded = tiny_base(tmp_path / "sharded", shards=3)
    first = world.push_base(base, line="demo")
    request, _ = base_push(sharded, line="twin")
    info = world.open("base", None, request)
    assert (info.state, info.blobs, info.version_digest) == ("committed", [], first["digest"])
    assert info.outcome is not None
    assert info.outcome["ref"] == "twin@r1"


def test_versions_are_numbered_and_only_the_newest_per_base_is_latest(
    world: World, tmp_path: Path, base: Path
) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    for folder in (base, other):
        world.push_base(folder)
    for seed, on in ((0, base), (1, base), (2, other)):
        world.push_adapter(tiny_adapter(tmp_path / f"a{seed}", on, seed=seed), "team/bot", on)
    rows = world.all(select(Version).order_by(Version.number))  # type: ignore[arg-type]
    assert [(row.number, row.latest) for row in rows] == [(1, False), (2, True), (3, True)]
    assert len(world.all(select(TargetFit))) == 2  # either base to the other; the target set is one


def test_two_pushes_at_once_make_one_version(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    opened = [world.open("adapter", "team/bot", request, who) for who in (ALICE, ADMIN)]
    for info, who in zip(opened, (ALICE, ADMIN), strict=True):
        world.send(info, contents)
        world.ask(info.id, who)
    threads = [threading.Thread(target=world.verify) for _ in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while world.verify():
        pass
    assert len(world.all(select(Version))) == 1
    refs = {world.describe(info.id).outcome["ref"] for info in opened}  # type: ignore[index]
    assert refs == {"team/bot@v1"}


def test_many_verifiers_at_once_number_without_gaps(world: World, tmp_path: Path, base: Path) -> None:
    world.push_base(base)
    for seed in range(6):
        request, contents = adapter_push(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed), base)
        info = world.open("adapter", "team/bot", request)
        world.send(info, contents)
        world.ask(info.id)

    def drain() -> None:
        while world.verify():
            pass

    threads = [threading.Thread(target=drain) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drain()
    rows = world.all(select(Version))
    assert sorted(row.number for row in rows) == [1, 2, 3, 4, 5, 6]
    assert sum(row.latest for row in rows) == 1


@pytest.mark.parametrize("moment", ["before the first copy", "between copy and row", "between copies and commit"])
def test_a_verifier_that_dies_is_followed_by_another(
    world: World, base: Path, adapter: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)
    with monkeypatch.context() as patch:
        _die(patch, world, moment)
        with pytest.raises(KeyboardInterrupt):
            world.verify()
    assert not world.verify()  # its lease still holds
    world.later(minutes=2)
    assert world.verify()
    assert world.describe(info.id).state == "committed"
    assert {blob.verified for blob in world.all(select(Blob))} == {"full"}


def _die(patch: pytest.MonkeyPatch, world: World, moment: str) -> None:
    def dying(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    copy = world.store.copy

    def copy_and_die(source: str, target: str) -> None:
        copy(source, target)
        raise KeyboardInterrupt

    match moment:
        case "before the first copy":
            patch.setattr(world.store, "copy", dying)
        case "between copy and row":
            patch.setattr(world.store, "copy", copy_and_die)
        case _:
            patch.setattr(verification, "_pass", dying)


def test_a_store_that_is_down_rejects_nothing(
    world: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)

    def down(*_: Any) -> Any:
        raise StorageDown(reason="connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "open", down)
        with pytest.raises(StorageDown):
            world.verify()
        for _ in range(verification.MOST_LOOKS + 1):  # which is nothing that a push can help
            world.later(seconds=30)
            with pytest.raises(StorageDown):
                world.verify()
    assert world.describe(info.id).state == "verifying"
    world.later(seconds=30)
    assert world.verify()
    assert world.describe(info.id).state == "committed"


def test_one_who_still_seems_to_send_keeps_nobody_elses_staging(
    embedded: World, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ids, uploads = embedded, [], []
    for seed in range(2):
        request, contents = base_push(tiny_base(base.parent / f"s{seed}", seed=seed))
        info = world.open("base", None, request)
        world.send(info, contents)
        ids.append(info.id)
        with world.database.write() as session:
            row = session.exec(select(PushBlob).where(PushBlob.push_id == info.id).limit(1)).one()
            key = f"staging/{info.id}/open"
            row.upload_id = world.store.start_multipart(key, size=row.size, part_size=row.size)
            uploads.append(row.upload_id)
            pushes.abort(session, ADMIN, info.id, world.now)
    abort, open_, busy = world.store.abort_multipart, col(PushBlob.upload_id).is_not(None), uploads[0]

    def held(key: str, upload_id: str) -> None:
        if upload_id == busy:
            raise PartBusy(key=key, what="a part")
        abort(key, upload_id)

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "abort_multipart", held)
        pushes.sweep(world.database, world.store, world.now, timedelta(hours=1))
    left = world.all(select(PushBlob.upload_id).where(open_))
    assert left == [busy]  # for the next round
    assert list(world.store.walk(f"staging/{ids[1]}/")) == []


def test_a_push_that_is_the_end_of_its_verifiers_is_given_up(
    world: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(verification, "_read", out_of_memory)
        for _ in range(verification.MOST_LOOKS):
            with pytest.raises(MemoryError):
                world.verify()
            world.later(seconds=61)
        assert world.verify()
    found = world.describe(info.id)
    assert (found.state, [finding["code"] for finding in found.findings]) == ("rejected", ["given-up"])
    assert not world.verify()
    assert world.push("adapter", "team/bot", request, contents)["version"] == "v1"  # another machine may do


def test_a_push_that_cannot_be_read_holds_nobody_up(
    embedded: World, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded.push_base(base)
    ids = []
    for seed in range(2):
        request, contents = adapter_push(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed), base)
        info = embedded.open("adapter", f"team/bot{seed}", request)
        embedded.send(info, contents)
        embedded.ask(info.id)
        embedded.later(seconds=1)
        ids.append(info.id)
    open_blob = embedded.store.open

    def open_most(key: str) -> Any:
        if ids[0] in key:
            raise StorageDown(reason="too many open files")
        return open_blob(key)

    with monkeypatch.context() as patch:
        patch.setattr(embedded.store, "open", open_most)
        with pytest.raises(StorageDown):
            embedded.verify()
        assert embedded.verify()
        assert not embedded.verify()
        for _ in range(3):
            embedded.later(seconds=30)  # the longest rest, however often it failed
            with pytest.raises(StorageDown):
                embedded.verify()
    assert [embedded.describe(push).state for push in ids] == ["verifying", "committed"]
    embedded.later(seconds=30)
    assert embedded.verify()
    assert embedded.describe(ids[0]).state == "committed"


def test_what_is_in_its_place_is_not_placed_again(
    world: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)
    placed: list[str] = []
    place = blobs.place

    def counting(*args: Any, digest: str, **facts: Any) -> None:
        placed.append(digest)
        if len(placed) == 2:
            raise KeyboardInterrupt
        place(*args, digest=digest, **facts)

    monkeypatch.setattr(blobs, "place", counting)
    with pytest.raises(KeyboardInterrupt):
        world.verify()
    world.later(minutes=2)
    assert world.verify()
    assert world.describe(info.id).state == "committed"
    assert len(contents) == 2
    assert placed[0] != placed[1] == placed[2]
    assert len(placed) == 3


def test_a_long_copy_keeps_its_lease(
    postgres_database: Database, local_store: LocalStore, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(postgres_database, local_store)
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)
    mine = select(Push.lease_until).where(Push.id == info.id)
    renewed = []
    copy = local_store.copy

    def slowly(source: str, target: str) -> None:
        before = world.one(mine)
        world.later(seconds=1)
        for _ in range(1000):
            if world.one(mine) != before:
                renewed.append(target)
                break
            time.sleep(0.01)
        copy(source, target)

    monkeypatch.setattr(local_store, "copy", slowly)
    assert world.verify(lease=timedelta(seconds=0.2))
    assert len(renewed) == len(contents)
    assert world.describe(info.id).state == "committed"


def test_a_database_that_goes_away_during_verification_rejects_nothing(
    world: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.ask(info.id)

    def down(*_: Any) -> Any:
        raise DatabaseDown(reason="server closed the connection")

    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit", down)
        with pytest.raises(DatabaseDown):
            world.verify()
    assert world.describe(info.id).state == "verifying"
    world.later(minutes=2)
    assert world.verify()
    assert world.describe(info.id).state == "committed"


# ── parts ────────────────────────────────────────────────────────────────────

PART = 5 << 20  # S3 takes no smaller part but the last


def _in_parts(world: World, tmp_path: Path, base: Path) -> tuple[World, PushRequest, dict[str, bytes], str]:
    world = world.with_settings(multipart_from=1 << 20, part_size=PART)
    world.push_base(base)
    folder = tiny_adapter(tmp_path / "large", base)
    write_safetensors(
        folder / "adapter_model.safetensors",
        _with_saved_head(np.random.default_rng(0).standard_normal((90_000, 16)).astype(np.float32), folder),
    )
    write_json(folder / "adapter_config.json", adapter_config(base, modules_to_save=["embed_tokens"]))
    request, contents = adapter_push(folder, base)
    return world, request, contents, next(digest for digest, data in contents.items() if len(data) > PART)


def _with_saved_head(rows: Any, folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors") | {"base_model.model.model.embed_tokens.weight": rows}


def _wanted(data: bytes) -> list[PartWanted]:
    return [
        PartWanted(number=number, sha256=str(Digest.sha256(data[start : start + PART])))
        for number, start in enumerate(range(0, len(data), PART), 1)
    ]


def test_a_killed_upload_in_parts_resumes_and_sends_no_part_twice(world: World, tmp_path: Path, base: Path) -> None:
    world, request, contents, large = _in_parts(world, tmp_path, base)
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    data, ask = contents[large], PartsRequest(digest=large, parts=_wanted(contents[large]))

    def parts() -> Any:
        return pushes.parts(world.database, world.store, world.settings, ADMIN, info.id, ask, world.now)

    first = parts()
    assert first.arrived == {}
    assert world.describe(info.id).state == "uploading"
    put(first.put[1], data[:PART]).raise_for_status()
    with pytest.raises(BlobsMissing):
        world.ask(info.id)
    again = world.open("adapter", "team/bot", request)
    assert again.id == info.id
    second = parts()
    assert list(second.arrived) == [1]
    assert 1 not in second.put
    for number, signed in second.put.items():
        put(signed, data[(number - 1) * PART : number * PART]).raise_for_status()
    assert {blob.state for blob in world.describe(info.id).blobs} == {"arrived"}
    world.commit(info.id)
    assert world.describe(info.id).state == "committed"
    assert world.store.head(blobs.blob_key(large)).size == len(data)  # type: ignore[union-attr]


def test_what_was_signed_later_and_never_sent_does_not_change_what_is_committed(world: World) -> None:
    world = world.with_settings(multipart_from=100, part_size=PART)
    data = b'{"prompt": "1+1=", "completion": " 2"}\n' * 10
    request, contents = files_push("dataset", {"data.jsonl": data})
    info = world.open("dataset", "team/rows", request)
    [digest] = contents

    def sign(promised: bytes) -> SignedRequest:
        ask = PartsRequest(digest=digest, parts=[PartWanted(number=1, sha256=str(Digest.sha256(promised)))])
        return pushes.parts(world.database, world.store, world.settings, ADMIN, info.id, ask, world.now).put[1]

    signed = sign(data)
    sign(data[::-1])
    sign(data[::-1])
    put(signed, data).raise_for_status()
    world.commit(info.id)
    assert world.describe(info.id).state == "committed"


def test_two_who_begin_the_same_upload_share_one(world: World, tmp_path: Path, base: Path) -> None:
    world, request, contents, large = _in_parts(world, tmp_path, base)
    info = world.open("adapter", "team/bot", request)
    ask, found = PartsRequest(digest=large, parts=_wanted(contents[large])), []

    def begin() -> None:
        found.append(pushes.parts(world.database, world.store, world.settings, ADMIN, info.id, ask, world.now))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = contents[large]
    for number in found[0].put:  # any of the answers serves any part
        put(found[number % 4].put[number], data[(number - 1) * PART : number * PART]).raise_for_status()
    world.send(info, contents)
    world.commit(info.id)
    assert world.describe(info.id).state == "committed"


# ── rights and ends ──────────────────────────────────────────────────────────


def test_publishing_needs_the_scope_of_the_namespace(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    request, _ = adapter_push(adapter, base)
    with pytest.raises(ScopeMissing):
        embedded.open("adapter", "team/bot", request, BOB)
    with pytest.raises(ScopeMissing):
        embedded.open("base", None, base_push(base)[0], ALICE)


def test_a_push_is_seen_by_its_author_and_admins_only(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    info = embedded.open("adapter", "team/bot", adapter_push(adapter, base)[0], ALICE)
    embedded.describe(info.id, ADMIN)
    with pytest.raises(PushNotFound):
        embedded.describe(info.id, BOB)
    with pytest.raises(PushNotFound):
        embedded.ask(info.id, BOB)


def test_an_expired_push_is_gone_and_says_since_when(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    request, contents = adapter_push(adapter, base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    embedded.later(hours=25)
    assert embedded.describe(info.id).state == "expired"
    with pytest.raises(PushExpired):
        embedded.ask(info.id)
    assert embedded.open("adapter", "team/bot", request).id != info.id


def test_an_aborted_push_stays_aborted(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    info = embedded.open("adapter", "team/bot", adapter_push(adapter, base)[0])
    with embedded.database.write() as session:
        pushes.abort(session, ADMIN, info.id, embedded.now)
    with pytest.raises(PushExpired):
        embedded.ask(info.id)
    with embedded.database.write() as session, pytest.raises(MoveNotAllowed):
        pushes.abort(session, ADMIN, info.id, embedded.now)


def test_a_commit_names_the_blobs_that_have_not_arrived(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    info = embedded.open("adapter", "team/bot", adapter_push(adapter, base)[0])
    with pytest.raises(BlobsMissing) as refused:
        embedded.ask(info.id)
    assert refused.value.count == len(info.blobs)


# ── aliases ──────────────────────────────────────────────────────────────────


def _alias(world: World, name: str = "prod") -> Alias:
    found: Alias = world.one(select(Alias).where(Alias.name == name))
    return found


def test_a_wished_alias_moves_with_the_commit(world: World, tmp_path: Path, base: Path) -> None:
    world.push_base(base)
    for seed in range(2):
        folder = tiny_adapter(tmp_path / f"a{seed}", base, seed=seed)
        assert world.push_adapter(folder, "team/bot", base, aliases=["live"])["aliases"] == ["live"]
    assert _alias(world, "live").generation == 2


def test_an_alias_that_moved_in_between_stops_the_commit_until_the_push_is_repeated(
    world: World, tmp_path: Path, base: Path
) -> None:
    world.push_base(base)
    world.push_adapter(tiny_adapter(tmp_path / "a", base, seed=0), "team/bot", base, aliases=["live"])
    request, contents = adapter_push(tiny_adapter(tmp_path / "b", base, seed=1), base, aliases=["live"])
    info = world.open("adapter", "team/bot", request)
    world.send(info, contents)
    world.push_adapter(tiny_adapter(tmp_path / "c", base, seed=2), "team/bot", base, aliases=["live"])
    world.ask(info.id)
    world.verify()
    found = world.describe(info.id)
    assert found.state == "verified"
    assert found.findings[0]["code"] == "alias-moved"
    with pytest.raises(AliasMoved, match="now v2"):
        world.ask(info.id)
    assert _alias(world, "live").generation == 2
    assert world.open("adapter", "team/bot", request).id == info.id  # looked, and repeated
    assert world.ask(info.id).state == "committed"
    assert world.describe(info.id).outcome["ref"] == "team/bot@v3"  # type: ignore[index]
    assert _alias(world, "live").generation == 3


def test_a_repeated_push_moves_the_alias_it_wishes(world: World, tmp_path: Path, base: Path) -> None:
    world.push_base(base)
    folder = tiny_adapter(tmp_path / "a", base)
    world.push_adapter(folder, "team/bot", base)
    assert world.push_adapter(folder, "team/bot", base, aliases=["live"])["aliases"] == ["live"]
    assert _alias(world, "live").generation == 1


SCORED = Policy(gates=(Gate(suite="team/suite", metric="accuracy", margin=Margin(value=0.1)),))
PROVEN = Policy(evidence=Evidence.DECLARED)
"""Any evidence will do, but somebody who may promote looks."""


def _put_policy(world: World, policy: Policy) -> None:
    body = policy.model_dump(mode="json")
    with world.database.write() as session:
        session.add(
            StoredPolicy(namespace="team", name="", revision=1, body=body, created_by="admin", created_at=world.now)
        )


@pytest.mark.parametrize("policy", [SCORED, PROVEN], ids=["scored", "proven"])
def test_a_gated_alias_cannot_come_with_a_push(embedded: World, tmp_path: Path, base: Path, policy: Policy) -> None:
    embedded.push_base(base)
    _put_policy(embedded, policy)
    folder = tiny_adapter(tmp_path / "a", base)
    with pytest.raises(GateNotPassed, match="promote"):
        embedded.push_adapter(folder, "team/bot", base, aliases=["prod"])
    assert embedded.push_adapter(folder, "team/bot", base, aliases=["live"])["aliases"] == ["live"]


@pytest.mark.parametrize("policy", [SCORED, PROVEN], ids=["scored", "proven"])
def test_an_alias_that_became_gated_after_the_opening_does_not_move(
    embedded: World, tmp_path: Path, base: Path, policy: Policy
) -> None:
    embedded.push_base(base)
    request, contents = adapter_push(tiny_adapter(tmp_path / "a", base), base, aliases=["prod", "live"])
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    _put_policy(embedded, policy)
    outcome = embedded.commit(info.id).outcome
    assert outcome is not None
    assert outcome["aliases"] == ["live"]
    assert any("loractl promote team/bot@v1 prod" in warning for warning in outcome["warnings"])
    assert [row.name for row in embedded.all(select(Alias))] == ["live"]


# ── binding ──────────────────────────────────────────────────────────────────


def test_evidence_is_recorded_resolved_or_declared(embedded: World, tmp_path: Path, base: Path) -> None:
    embedded.push_base(base, names=["org/tiny"])
    recorded = tiny_adapter(tmp_path / "recorded", base, record_base=True)
    resolved = tiny_adapter(tmp_path / "resolved", base, base_model_name_or_path="org/tiny")
    declared = tiny_adapter(tmp_path / "declared", base)
    found = [
        embedded.push_adapter(folder, f"team/{folder.name}", base)["evidence"]
        for folder in (recorded, resolved, declared)
    ]
    assert found == ["recorded", "resolved", "declared"]


def test_the_same_shapes_with_other_weights_contradict_what_training_recorded(
    embedded: World, tmp_path: Path, base: Path, adapter: Path
) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    embedded.push_base(base, line="demo")
    embedded.push_base(other, line="twin")
    request, contents = adapter_push(adapter, other)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    with pytest.raises(EvidenceContradicts, match="demo@r1"):
        embedded.commit(info.id)
    assert embedded.describe(info.id).state == "rejected"
    outcome = embedded.push_adapter(adapter, "team/bot", other, trust_base=True)
    assert any("trusted on record" in warning for warning in outcome["warnings"])
    assert embedded.one(select(Version)).binding["trusted_by"] == "admin"


def test_a_declared_name_that_stands_for_other_weights_is_refused_before_any_byte(
    embedded: World, tmp_path: Path, base: Path
) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    embedded.push_base(base, names=["org/tiny"])
    embedded.push_base(other)
    folder = tiny_adapter(tmp_path / "a", other, base_model_name_or_path="org/tiny")
    with pytest.raises(EvidenceContradicts, match="org/tiny"):
        embedded.open("adapter", "team/bot", adapter_push(folder, other)[0])


def test_other_shapes_do_not_fit_and_the_refusal_names_the_base_that_would(
    embedded: World, tmp_path: Path, base: Path
) -> None:
    wide = tiny_base(tmp_path / "wide", width=32)
    embedded.push_base(base, line="small")
    embedded.push_base(wide, line="wide")
    request, contents = adapter_push(tiny_adapter(tmp_path / "a", wide), base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    with pytest.raises(AdapterDoesNotFit, match="wide@r1") as refused:
        embedded.commit(info.id)
    assert "q_proj" in refused.value.reasons


def test_an_adapter_may_be_bound_to_a_base_without_weights(embedded: World, tmp_path: Path, base: Path) -> None:
    embedded.register(base_of(base), ALICE)
    outcome = embedded.push_adapter(tiny_adapter(tmp_path / "a", base), "team/bot", base, ALICE)
    assert any("without its weights" in warning for warning in outcome["warnings"])


def test_an_unknown_peft_type_is_stored_and_marked(embedded: World, tmp_path: Path, base: Path) -> None:
    embedded.push_base(base)
    folder = tiny_adapter(tmp_path / "a", base, peft_type="VERA")
    outcome = embedded.push_adapter(folder, "team/bot", base)
    assert any("not runnable here" in warning for warning in outcome["warnings"])
    version = embedded.one(select(Version))
    assert (version.runnable, version.target_set_id, version.peft_type) == (False, None, "VERA")


def test_lineage_is_kept_by_digest(embedded: World, tmp_path: Path, base: Path) -> None:
    embedded.push_base(base)
    first = embedded.push_adapter(tiny_adapter(tmp_path / "a", base), "team/bot", base)
    data = embedded.push_rows("dataset", "team/rows", b'{"prompt": "a", "completion": "b"}\n')
    request, contents = adapter_push(tiny_adapter(tmp_path / "b", base, seed=1), base)
    lineage = {"parents": [first["digest"]], "datasets": [data["digest"]], "recipe": None}
    request = request.model_copy(update={"manifest": request.manifest | {"lineage": lineage}})
    embedded.push("adapter", "team/bot", request, contents)
    found = {(row.parent, row.relation) for row in embedded.all(select(VersionParent))}
    assert found == {(first["digest"], "parent"), (data["digest"], "dataset")}


def test_all_origins_of_a_version_are_kept_by_one_statement(
    world: World, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.push_base(base)
    request, contents = adapter_push(tiny_adapter(tmp_path / "a", base), base)
    parents = [f"sha256:{number:064x}" for number in range(MAX_ORIGINS)]
    lineage = {"parents": parents, "datasets": parents, "recipe": None}
    request = request.model_copy(update={"manifest": request.manifest | {"lineage": lineage}})
    calls = []
    add_once = blobs.add_once

    def counting(session: Any, table: Any, *rows: Any) -> None:
        calls.append(table)
        add_once(session, table, *rows)

    monkeypatch.setattr(blobs, "add_once", counting)
    world.push("adapter", "team/bot", request, contents)
    assert calls.count(VersionParent) == 1
    assert len(world.all(select(VersionParent))) == 2 * MAX_ORIGINS


# ── bad input: neither database nor store has a say in it ─────────────────────


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def _edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    tensors: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    return tensors


def _first(tensors: dict[str, Any], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _set(part: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[_first(tensors, part)][1, 1] = value

    return change


def _rank(tensors: dict[str, Any]) -> None:
    name = _first(tensors, "lora_A")
    tensors[name] = tensors[name][:2].copy()


def _zero(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:] = 0


def _odd_name(tensors: dict[str, Any]) -> None:
    tensors["../../x"] = np.ones((2, 2), np.float32)


def _left_over(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.surprise"] = np.ones((2, 2), np.float32)


def _lonely(tensors: dict[str, Any]) -> None:
    del tensors[_first(tensors, "lora_B")]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_set("lora_A", float("nan")), NonFinite),
        (_set("lora_B", float("inf")), NonFinite),
        (_zero, ZeroUpdate),
        (_rank, BadTensor),
        (_lonely, BadTensor),
        (_odd_name, BadTensor),
        (_left_over, LeftOverTensors),
    ],
)
def test_values_and_tensors_that_cannot_be_are_refused(
    embedded: World, base: Path, adapter: Path, change: Callable[[dict[str, Any]], None], refusal: type[LoractlError]
) -> None:
    embedded.push_base(base)
    write_safetensors(adapter / "adapter_model.safetensors", _edited(adapter, change))
    request, contents = adapter_push(adapter, base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    with pytest.raises(refusal):
        embedded.commit(info.id)
    found = embedded.describe(info.id)
    assert (found.state, found.findings[0]["code"]) == ("rejected", refusal.code)
    assert list(embedded.store.walk(f"staging/{info.id}/")) == []
    assert embedded.all(select(Adapter)) == []


def test_an_all_zero_update_may_be_meant(embedded: World, tmp_path: Path, base: Path) -> None:
    embedded.push_base(base)
    folder = tiny_adapter(tmp_path / "fresh", base, zero=True)
    assert embedded.push_adapter(folder, "team/bot", base, allow_zero=True)["ref"] == "team/bot@v1"


def _overlapping(data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    first, second = names[:2]
    length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    start = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [start, start + length]
    text = json.dumps(header).encode().ljust(size)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    ("forge", "refusal"),
    [
        (lambda data: b"\x80\x04\x95" + b"\0" * 400, PickleRefused),
        (lambda data: b"PK\x03\x04" + b"\0" * 400, PickleRefused),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", LfsPointer),
        (lambda data: data[:-4], BadHeader),
        (lambda data: data[:100], BadHeader),
        (lambda data: b"\xff" * 8 + data[8:], BadHeader),
        (_overlapping, BadTensor),
    ],
)
def test_what_poses_as_safetensors_is_refused_by_its_bytes(
    embedded: World, base: Path, adapter: Path, forge: Callable[[bytes], bytes], refusal: type[LoractlError]
) -> None:
    outcome = embedded.push_base(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    files = {
        "adapter_config.json": (adapter / "adapter_config.json").read_bytes(),
        "adapter_model.safetensors": forge(_weights(adapter)),
    }
    request, contents = files_push("adapter", files, outcome["base"], config)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    with pytest.raises(refusal):
        embedded.commit(info.id)


@pytest.mark.parametrize("path", ["training.bin", "model.pt", "state.pkl"])
def test_pickles_are_refused_by_name_before_any_byte(embedded: World, base: Path, adapter: Path, path: str) -> None:
    outcome = embedded.push_base(base)
    request, _ = files_push("adapter", {path: b"x"}, outcome["base"])
    with pytest.raises(PickleRefused) as refused:
        embedded.open("adapter", "team/bot", request)
    assert path in refused.value.hint


@pytest.mark.parametrize("path", [".loractl/pulled.json", ".partial/x"])
def test_what_a_pull_keeps_beside_a_version_is_no_part_of_one(embedded: World, path: str) -> None:
    request, _ = files_push("adapter", {path: b"{}"}, base=f"b3:{'0' * 64}")
    with pytest.raises(BadPath, match="where a pull keeps its own"):
        embedded.open("adapter", "team/bot", request)


def test_a_pickle_beside_the_weights_is_refused_by_its_bytes(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    (adapter / "README.md").write_bytes(b"\x80\x04\x95" + b"\0" * 40)
    request, contents = adapter_push(adapter, base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    with pytest.raises(PickleRefused):
        embedded.commit(info.id)


def test_the_weight_files_of_an_adapter_are_few(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    files |= {f"m{number:02}.safetensors": b"x" for number in range(pushes.MAX_ADAPTER_WEIGHTS)}
    config = json.loads(files["adapter_config.json"])
    request, _ = files_push("adapter", files, str(base_of(base).digest), config)
    with pytest.raises(BadManifest, match=r"65 .*at most 64"):
        embedded.open("adapter", "team/bot", request)


def _in_files(adapter: Path, count: int) -> None:
    """Spread the weights over ``count`` files."""
    whole = adapter / "adapter_model.safetensors"
    tensors = sorted(load_file(whole).items())
    whole.unlink()
    for number in range(count):
        name = f"adapter_model-{number + 1:05}-of-{count:05}.safetensors"
        write_safetensors(adapter / name, dict(tensors[number::count]))


def test_the_weight_files_of_an_adapter_are_read_one_at_a_time(
    embedded: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded.push_base(base)
    _in_files(adapter, 3)
    held: set[int] = set()
    most = []
    open_blob = embedded.store.open

    def counting(key: str) -> Any:
        reader = open_blob(key)
        held.add(id(reader))
        most.append(len(held))
        close = reader.close

        def closing() -> None:
            held.discard(id(reader))
            close()

        monkeypatch.setattr(reader, "close", closing)
        return reader

    monkeypatch.setattr(embedded.store, "open", counting)
    assert embedded.push_adapter(adapter, "team/bot", base)["version"] == "v1"
    assert max(most) == 1
    assert held == set()


def test_every_weight_file_must_be_what_the_manifest_promised(
    embedded: World, base: Path, adapter: Path, tmp_path: Path
) -> None:
    embedded.push_base(base)
    _in_files(adapter, 3)
    other = tiny_adapter(tmp_path / "other", base, seed=5)
    _in_files(other, 3)
    request, contents = adapter_push(adapter, base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    last = request.manifest["files"][-1]
    data = (other / last["path"]).read_bytes()
    embedded.store.put(blobs.staging_key(info.id, last["digest"]), data, Digest.sha256(data))
    with pytest.raises(DigestMismatch, match="00003-of-00003"):
        embedded.commit(info.id)


def test_the_headers_of_an_adapter_are_bounded_together(
    embedded: World, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded.push_base(base)
    _in_files(adapter, 3)
    monkeypatch.setattr(verification, "MAX_ADAPTER_HEADERS", 700)
    with pytest.raises(NotAnAdapter, match="over 700 bytes together"):
        embedded.push_adapter(adapter, "team/bot", base)


def test_a_config_that_is_not_the_manifests_is_refused(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    request, contents = adapter_push(adapter, base)
    manifest = request.manifest | {"config": request.manifest["config"] | {"lora_alpha": 99}}
    info = embedded.open("adapter", "team/bot", request.model_copy(update={"manifest": manifest}))
    embedded.send(info, contents)
    with pytest.raises(BadManifest, match="config"):
        embedded.commit(info.id)


def test_an_adapter_needs_its_config_and_its_weights(embedded: World, base: Path) -> None:
    outcome = embedded.push_base(base)
    for files in ({"README.md": b"hello"}, {"adapter_config.json": b"{}"}):
        request, contents = files_push("adapter", files, outcome["base"])
        info = embedded.open("adapter", "team/bot", request)
        embedded.send(info, contents)
        with pytest.raises(NotAnAdapter):
            embedded.commit(info.id)


def test_an_unknown_base_is_refused_before_any_byte(embedded: World, base: Path, adapter: Path) -> None:
    with pytest.raises(BaseNotFound) as refused:
        embedded.open("adapter", "team/bot", adapter_push(adapter, base)[0])
    assert "loractl base push" in refused.value.hint


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "a//b", "a\\b", "a/./b"])
def test_paths_out_of_the_folder_are_refused(embedded: World, path: str) -> None:
    manifest = {
        "schema": "loractl/1", "kind": "dataset", "base": None,
        "files": [{"path": path, "size": 1, "digest": "sha256:" + "0" * 64}],
    }  # fmt: skip
    with pytest.raises(BadPath):
        embedded.open("dataset", "team/rows", PushRequest(manifest=manifest))


def test_manifests_that_lie_about_themselves_are_refused(embedded: World, base: Path) -> None:
    entry = {"size": 1, "digest": "sha256:" + "0" * 64}
    for files in (
        [{"path": "a"} | entry, {"path": "a"} | entry],
        [{"path": "A"} | entry, {"path": "a"} | entry],
        [{"path": "a"} | entry, {"path": "b", "size": 2, "digest": entry["digest"]}],
    ):
        request = PushRequest(manifest={"kind": "dataset", "files": files})
        with pytest.raises(BadManifest):
            embedded.open("dataset", "team/rows", request)
    with pytest.raises(BadManifest, match="kind"):
        embedded.open("suite", "team/rows", PushRequest(manifest={"kind": "dataset", "files": [{"path": "a"} | entry]}))


@pytest.mark.parametrize("name", ["Team/bot", "team/..", "team/a b", "team/-x", "a/b/c", "team"])
def test_names_follow_their_rule(embedded: World, name: str) -> None:
    with pytest.raises(BadName):
        SeriesName.parse(name)


def test_an_alias_name_follows_the_rule_too(embedded: World, base: Path, adapter: Path) -> None:
    embedded.push_base(base)
    with pytest.raises(BadName):
        embedded.open("adapter", "team/bot", adapter_push(adapter, base, aliases=["../x"])[0])


def test_files_over_the_limit_are_refused_before_any_byte(embedded: World) -> None:
    small = embedded.with_settings(max_file_bytes=10)
    request, _ = files_push("dataset", {"data.jsonl": b"x" * 11})
    with pytest.raises(FileTooLarge) as refused:
        small.open("dataset", "team/rows", request)
    assert refused.value.limit == 10


def test_bytes_that_are_not_the_promised_ones_do_not_enter_the_store(embedded: World) -> None:
    request, contents = files_push("dataset", {"data.jsonl": b'{"prompt": "a", "completion": "b"}\n'})
    info = embedded.open("dataset", "team/rows", request)
    [blob] = info.blobs
    assert blob.put is not None
    wrong = contents[blob.digest].replace(b"a", b"z")
    assert put(blob.put, wrong).status_code >= 400
    with pytest.raises(BlobsMissing):
        embedded.ask(info.id)


# ── jobs ─────────────────────────────────────────────────────────────────────


def _job(world: World) -> Job:
    job = Job(
        id="j1", kind="finetune", queue="cpu", state="running", namespace="team", recipe={},
        recipe_digest="sha256:" + "0" * 64, key="k",
        output={"adapter": "team/bot", "aliases": ["live"]}, base="b3:" + "0" * 64, attempt=1,
        lease_until=world.now + timedelta(minutes=1), token_id="worker", created_by="alice", created_at=world.now,
    )  # fmt: skip
    with world.database.write() as session:
        session.add(job)
    return job


def test_a_jobs_push_waits_verified_for_the_jobs_end(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    job, worker = _job(world), Caller("worker", "worker", "worker", {"queues": ["cpu"]})
    request, contents = adapter_push(adapter, base)
    info = world.open("adapter", "team/bot", request, worker, job=job)
    world.send(info, contents)
    assert world.commit(info.id, worker).state == "verified"
    assert world.all(select(Version)) == []
    with world.database.write() as session:
        outcome = commits.commit_verified(session, info.id, job, world.now)
    assert outcome["ref"] == "team/bot@v1"
    version = world.one(select(Version))
    assert (version.job_id, version.created_by) == ("j1", "alice")


def test_a_jobs_pushes_are_committed_all_or_none(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    job, worker = _job(world), Caller("worker", "worker", "worker", {"queues": ["cpu"]})
    request, contents = adapter_push(adapter, base)
    done = world.open("adapter", "team/bot", request, worker, job=job)
    world.send(done, contents)
    world.commit(done.id, worker)
    unsent = world.open("adapter", "team/late", request, worker, job=job)

    def finish() -> None:
        with world.database.write() as session:
            for push_id in (done.id, unsent.id):
                commits.commit_verified(session, push_id, job, world.now)

    with pytest.raises(MoveNotAllowed):
        finish()
    assert world.all(select(Version)) == []
    assert world.describe(done.id).state == "verified"


def test_equal_work_is_committed_once_and_grants_what_the_second_job_wished(
    world: World, base: Path, adapter: Path
) -> None:
    world.push_base(base)
    job, worker = _job(world), Caller("worker", "worker", "worker", {"queues": ["cpu"]})
    first = world.push_adapter(adapter, "team/bot", base, ALICE)
    info = world.open("adapter", "team/bot", adapter_push(adapter, base)[0], worker, job=job)
    assert (info.state, info.blobs) == ("committed", [])
    with world.database.write() as session:
        assert commits.commit_verified(session, info.id, job, world.now)["ref"] == first["ref"]
    assert _alias(world, "live").generation == 1
    elsewhere = world.push_adapter(adapter, "team/other", base, ALICE)
    other = world.one(select(Push).where(Push.name == "other"))
    assert other.outcome == elsewhere
    with world.database.write() as session, pytest.raises(BadRequest):
        commits.commit_verified(session, other.id, job, world.now)


def test_a_worker_decides_nothing_about_aliases_and_trust(world: World, tmp_path: Path, base: Path) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    world.push_base(base)
    world.push_base(other)
    job, worker = _job(world), Caller("worker", "worker", "worker", {"queues": ["cpu"]})
    folder = tiny_adapter(tmp_path / "a", base, record_base=True)
    request, contents = adapter_push(folder, other, aliases=["prod"], trust_base=True)
    info = world.open("adapter", "team/bot", request, worker, job=job)
    assert world.one(select(Push).where(Push.id == info.id)).wishes["aliases"] == ["live"]
    world.send(info, contents)
    with pytest.raises(EvidenceContradicts):
        world.commit(info.id, worker)


def test_a_jobs_result_is_not_lost_to_an_alias_that_moved_meanwhile(world: World, tmp_path: Path, base: Path) -> None:
    world.push_base(base)
    job, worker = _job(world), Caller("worker", "worker", "worker", {"queues": ["cpu"]})
    request, contents = adapter_push(tiny_adapter(tmp_path / "a", base), base)
    info = world.open("adapter", "team/bot", request, worker, job=job)
    world.send(info, contents)
    world.commit(info.id, worker)
    world.push_adapter(tiny_adapter(tmp_path / "b", base, seed=1), "team/bot", base, aliases=["live"])
    with world.database.write() as session:
        outcome = commits.commit_verified(session, info.id, job, world.now)
    assert (outcome["ref"], outcome["aliases"]) == ("team/bot@v2", [])
    assert any("moved in between" in warning for warning in outcome["warnings"])


# ── the rest ─────────────────────────────────────────────────────────────────


def test_a_revision_that_another_push_took_is_refused(world: World, tmp_path: Path, base: Path) -> None:
    world.push_base(base, line="demo")
    request, contents = base_push(tiny_base(tmp_path / "other", seed=1), line="demo", revision=1)
    info = world.open("base", None, request)
    world.send(info, contents)
    with pytest.raises(RevisionTaken, match="r2"):
        world.commit(info.id)


def test_the_manifest_is_kept_in_its_canonical_bytes(world: World, base: Path, adapter: Path) -> None:
    world.push_base(base)
    outcome = world.push_adapter(adapter, "team/bot", base)
    kept = world.one(select(StoredManifest).where(StoredManifest.digest == outcome["digest"]))
    assert str(Manifest.parse(kept.body).digest) == outcome["digest"]
    assert Manifest.parse(kept.body).canonical() == kept.body


def test_a_push_carries_no_table_once_it_is_committed(world: World, base: Path) -> None:
    world.push_base(base, line="demo")
    push = world.one(select(Push))
    assert push.facts is None
    assert push.outcome["ref"] == "demo@r1"
    assert world.one(select(Base)).weights == "full"


def test_the_alias_of_another_base_is_another_alias(world: World, tmp_path: Path, base: Path) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    for seed, on in enumerate((base, other)):
        world.push_base(on)
        world.push_adapter(tiny_adapter(tmp_path / f"a{seed}", on), "team/bot", on, aliases=["live"])
    rows = world.all(select(Alias))
    assert [row.generation for row in rows] == [1, 1]
    assert aliases.ANY not in {row.generation for row in rows}
    with world.database.read() as session:
        assert queries.adapter_by_name(session, "team", "bot") is not None


def test_a_commit_that_was_asked_for_in_time_does_not_expire_while_it_waits(world: World) -> None:
    request, contents = files_push("dataset", {"data.jsonl": b'{"prompt": "a", "completion": "b"}\n'})
    info = world.open("dataset", "team/late", request)
    world.send(info, contents)
    world.later(seconds=world.settings.push_ttl_s - 10)
    assert world.ask(info.id).state == "verifying"
    world.later(seconds=20)  # verifiers were busy
    with world.database.write() as session:
        assert pushes.expire(session, world.now) == []
    assert world.verify()
    assert world.ask(info.id).state == "committed"
