"""The verifier: small bases are read before their commit, large ones after it, and nothing damaged stays."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sqlmodel import select, update

from registry.broker import Broker
from registry.core.digest import Digest
from registry.core.errors import DuplicateTensor, NotABase
from registry.core.manifest import FileEntry
from registry.daemons import verifier
from registry.db.models import Base, Blob, Push
from registry.parts import Parts
from registry.schemas import PushRequest
from registry.services import blobs, verification
from tests.factories import base_of, tiny_adapter, tiny_base, write_json, write_safetensors
from tests.world import ADMIN, World, adapter_push, base_push


def parts_of(world: World) -> Parts:
    return Parts(world.settings, world.database, world.store, Broker("memory://"), world.clock)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base", shards=2)


def _committed_by_parts(world: World, base: Path) -> str:
    request, contents = base_push(base, line="demo")
    info = world.open("base", None, request)
    world.send(info, contents)
    world.ask(info.id)
    assert world.verify(read_first=0)
    assert world.ask(info.id).state == "committed"
    return info.id


def test_a_large_base_is_committed_by_parts_and_read_afterwards(world: World, base: Path) -> None:
    _committed_by_parts(world, base)
    assert world.one(select(Base)).weights == "parts"
    assert {blob.verified for blob in world.all(select(Blob))} == {"parts"}
    assert verifier.step(parts_of(world))
    assert world.one(select(Base)).weights == "full"
    assert {blob.verified for blob in world.all(select(Blob))} == {"full"}
    assert not verifier.step(parts_of(world))


def test_a_base_that_turns_out_damaged_is_taken_back(world: World, base: Path) -> None:
    push_id = _committed_by_parts(world, base)
    shard = next(blob for blob in world.all(select(Blob)) if blob.size > 4000)
    _flip(world, shard.digest)
    assert verifier.step(parts_of(world))
    row = world.one(select(Base))
    assert (row.weights, row.manifest) == ("absent", None)
    assert world.describe(push_id).findings[0]["code"] == "digest-mismatch"
    assert world.store.head(blobs.blob_key(shard.digest)) is None
    assert len(list(base.iterdir())) - len(world.all(select(Blob))) == 1  # the others are what they were
    assert world.push_base(base, line="demo")["ref"] == "demo@r1"  # the same bytes may be pushed again
    assert world.one(select(Base)).weights == "full"


def _flip(world: World, digest: str) -> None:
    """Damage a blob in the store."""
    with world.store.open(blobs.blob_key(digest)) as reader:
        data = bytearray(b"".join(reader.chunks()))
    data[-1] ^= 1
    world.store.put(blobs.blob_key(digest), bytes(data), Digest.sha256(bytes(data)))


def test_damaged_bytes_stay_while_another_base_rests_on_them(embedded: World, base: Path) -> None:
    _committed_by_parts(embedded, base)
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | {"rms_norm_eps": 1e-5})  # another base in the same weights
    _committed_by_parts(embedded, base)
    shard = next(blob for blob in embedded.all(select(Blob)) if blob.size > 4000)
    _flip(embedded, shard.digest)
    there = []
    for _ in range(2):
        assert verifier.step(parts_of(embedded))
        there.append(embedded.store.head(blobs.blob_key(shard.digest)) is not None)
    assert there == [True, False]
    assert {row.weights for row in embedded.all(select(Base))} == {"absent"}


@pytest.mark.parametrize("damaged", [False, True])
def test_files_that_came_while_others_were_read_are_not_judged_by_them(
    world: World, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The second push promises the same base: what was read of the first says nothing about it."""
    _committed_by_parts(world, base)
    request, contents = base_push(tiny_base(tmp_path / "other", seed=1))
    promised = base_push(base)[0]
    late = PushRequest(manifest=request.manifest | {"base": promised.manifest["base"]}, table=promised.table)
    read = verification.read_base

    def overtaken(*args: Any) -> Any:
        info = world.open("base", None, late)
        world.send(info, contents)
        world.ask(info.id)
        assert world.verify(read_first=0)
        assert world.describe(info.id).state == "committed"
        if damaged:
            raise NotABase(path="the push", reason="it holds something else")
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "read_base", overtaken)
        assert verifier.step(parts_of(world))
    row = world.one(select(Base))
    assert (row.weights, row.manifest is None) == ("parts", False)
    assert verifier.step(parts_of(world))  # now the late one is read, and is not what it promised
    assert world.one(select(Base)).weights == "absent"


def test_a_verifier_that_lost_its_lease_decides_nothing(
    embedded: World, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_id = _committed_by_parts(embedded, base)

    def too_late(*_: Any) -> Any:
        embedded.later(minutes=2)
        with embedded.database.write() as session:
            session.exec(update(Push).values(lease_until=embedded.now + verification.LEASE))
        raise NotABase(path="the push", reason="it holds something else")

    monkeypatch.setattr(verification, "read_base", too_late)
    assert verifier.step(parts_of(embedded))
    assert embedded.one(select(Base)).weights == "parts"
    assert embedded.one(select(Push).where(Push.id == push_id)).lease_until == embedded.now + verification.LEASE


def test_only_one_verifier_reads_a_base(world: World, base: Path) -> None:
    push_id = _committed_by_parts(world, base)
    with world.database.write() as session:
        session.exec(update(Push).values(lease_until=world.now + verification.LEASE))
    assert not verifier.step(parts_of(world))
    world.later(minutes=2)
    assert verifier.step(parts_of(world))
    assert world.describe(push_id).state == "committed"


@pytest.mark.parametrize("read_first", [0, 1 << 30])
def test_files_that_hold_another_base_than_promised_are_refused(
    embedded: World, tmp_path: Path, base: Path, read_first: int
) -> None:
    wrong = tiny_base(tmp_path / "wrong", width=32)
    request, contents = base_push(wrong)
    promised = base_push(base)[0]
    manifest = request.manifest | {"base": promised.manifest["base"]}
    info = embedded.open("base", None, PushRequest(manifest=manifest, table=promised.table))
    embedded.send(info, contents)
    embedded.ask(info.id)
    embedded.verify(read_first=read_first)
    with pytest.raises(NotABase):
        embedded.ask(info.id)
    assert embedded.all(select(Base)) == []


def test_the_same_shapes_with_other_values_are_found_by_reading(embedded: World, tmp_path: Path, base: Path) -> None:
    request, contents = base_push(tiny_base(tmp_path / "twin", seed=1, shards=2))
    promised = base_push(base)[0]
    manifest = request.manifest | {"base": promised.manifest["base"]}
    info = embedded.open("base", None, PushRequest(manifest=manifest, table=promised.table))
    embedded.send(info, contents)
    with pytest.raises(NotABase, match="not the promised"):
        embedded.commit(info.id)


def test_a_tensor_in_two_files_of_a_base_is_refused(embedded: World, base: Path) -> None:
    request, _ = base_push(base)
    first, second = sorted(base.glob("*.safetensors"))
    twice = load_file(second) | dict([next(iter(load_file(first).items()))])
    write_safetensors(second, twice)
    entries = [
        entry if entry["path"] != second.name else {
            "path": second.name,
            "size": second.stat().st_size,
            "digest": str(Digest.sha256(second.read_bytes())),
        }
        for entry in request.manifest["files"]
    ]  # fmt: skip
    contents = {str(Digest.sha256(path.read_bytes())): path.read_bytes() for path in base.iterdir()}
    info = embedded.open("base", None, PushRequest(manifest=request.manifest | {"files": entries}, table=request.table))
    embedded.send(info, contents)
    with pytest.raises(DuplicateTensor):
        embedded.commit(info.id)


def test_a_lease_is_renewed_while_it_is_needed_and_lost_to_whoever_took_it(embedded: World, base: Path) -> None:
    embedded.push_base(base)
    request, contents = adapter_push(tiny_adapter(base.parent / "a", base), base)
    info = embedded.open("adapter", "team/bot", request)
    embedded.send(info, contents)
    embedded.ask(info.id)
    until = embedded.now + verification.LEASE
    with embedded.database.write() as session:
        session.exec(update(Push).where(Push.id == info.id).values(lease_until=until))  # type: ignore[arg-type]
    push = embedded.one(select(Push).where(Push.id == info.id))
    claim = verification.Claim(
        embedded.database, push, until, embedded.clock, verification.LEASE, renewed=float("-inf")
    )
    embedded.later(seconds=10)
    claim.tick()
    assert claim.until == embedded.now + verification.LEASE
    with embedded.database.write() as session:
        session.exec(update(Push).where(Push.id == info.id).values(lease_until=None))  # type: ignore[arg-type]
    claim.renewed = float("-inf")
    embedded.later(seconds=10)
    with pytest.raises(verification.LeaseGone):
        claim.tick()


def test_reading_a_file_once_gives_the_same_bytes_as_reading_it_in_pieces(embedded: World) -> None:
    data = np.random.default_rng(0).bytes((3 << 20) + 17)
    digest = Digest.sha256(data)
    embedded.store.put(blobs.blob_key(str(digest)), data, digest)
    entry = FileEntry(path="x", size=len(data), digest=str(digest))
    with embedded.store.open(blobs.blob_key(str(digest))) as reader:
        stream = verification.Stream(reader, entry, lambda: None)
        cuts = [8, 100, 1 << 20, (2 << 20) + 5, len(data)]
        pieces = [stream.read(start, end - start) for start, end in pairwise(cuts)]
        assert b"".join(pieces) == data[8:]
        stream.finish()


def test_whoever_asks_sees_the_end(world: World, base: Path) -> None:
    request, contents = base_push(base, line="demo")
    info = world.open("base", None, request)
    world.send(info, contents)
    assert world.ask(info.id, ADMIN).state == "verifying"
    assert verifier.step(parts_of(world))
    assert world.ask(info.id, ADMIN).state == "committed"
    assert str(base_of(base).digest) == world.one(select(Base)).digest
