"""Fsck finds what bucket and rows do not agree on; a repair removes rubbish and lets a push heal the rest."""

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest
from sqlalchemy import delete
from sqlmodel import col, select

from registry.core.digest import Digest
from registry.core.manifest import Manifest
from registry.db.models import AuditRow, Blob, Signature, Version
from registry.keys import PrivateKey
from registry.schemas import FsckLine, KeyRequest
from registry.services import backup, blobs, fsck, signatures
from registry.settings import S3Settings
from registry.storage.base import BlobSource
from registry.storage.local import LocalCopy
from registry.storage.s3 import S3Store
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, adapter_push

ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'
DIGEST = str(Digest.sha256(ROWS))
OTHER = b'{"prompt": "1+1=", "completion": " 9"}\n'


def findings(
    world: World, replica: BlobSource | None = None, *, deep: bool = False, repair: bool = False
) -> list[FsckLine]:
    lines = fsck.check(
        world.database, world.store, replica, deep=deep, repair=repair, actor="ada", now=world.now
    )  # fmt: skip
    mine = set(world.all(select(Blob.digest))) | {DIGEST, str(Digest.sha256(OTHER))}
    return [line for line in lines if line.kind == "finding" and line.blob in mine]


def found(world: World, *, deep: bool = False, repair: bool = False) -> list[tuple[str, bool]]:
    return [(str(line.problem), line.repaired) for line in findings(world, deep=deep, repair=repair)]


@pytest.fixture
def rows(world: World) -> World:
    for key in (blobs.blob_key(DIGEST), blobs.blob_key(str(Digest.sha256(OTHER)))):
        world.store.delete(key)  # the store is shared between tests
    world.push_rows("dataset", "team/rows", ROWS)
    return world


def swap(world: World, data: bytes) -> None:
    """Other bytes under the blob's name, as a store that lost its mind would have them."""
    world.store.put(key := "staging/test/odd", data, Digest.sha256(data))
    world.store.copy(key, blobs.blob_key(DIGEST))


def test_a_sound_registry_has_no_findings(rows: World, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    rows.push_base(base, line="demo")
    rows.push_adapter(tiny_adapter(tmp_path / "a", base), "team/bot", base)
    assert found(rows, deep=True) == []


def test_a_signature_that_does_not_hold_any_more_is_found(rows: World, tmp_path: Path) -> None:
    base, key = tiny_base(tmp_path / "base"), PrivateKey.generate()
    rows.push_base(base, line="demo")
    with rows.database.write() as session:
        signatures.add_key(session, ADMIN, "team", KeyRequest(public=key.public.pem, name="k"), rows.now)
    for seed in (1, 2):
        request, contents = adapter_push(tiny_adapter(tmp_path / f"a{seed}", base, seed=seed), base)
        bundle = key.sign("team/bot", Manifest.parse(request.manifest)).document()
        rows.push("adapter", "team/bot", request.model_copy(update={"signatures": [bundle]}), contents)
    with rows.database.write() as session:
        first, second = session.exec(select(Signature).order_by(col(Signature.id))).all()
        first.bundle = second.bundle
        session.add(first)
    digest = rows.one(select(Version.digest).where(Version.number == 1))
    lines = fsck.check(rows.database, rows.store, deep=True, repair=True, actor="ada", now=rows.now)
    [line] = [line for line in lines if line.problem == "bad-signature"]
    assert (line.blob, line.named_by, line.repaired) == (digest, ["team/bot@v1"], False)
    assert "it is of sha256:" in line.detail


def test_lost_bytes_are_named_with_what_needs_them_and_a_push_of_them_heals(rows: World) -> None:
    rows.store.delete(blobs.blob_key(DIGEST))
    [line] = [
        line for line in fsck.check(rows.database, rows.store, deep=False, repair=False, actor="a", now=rows.now)
        if line.kind == "finding" and line.blob == DIGEST
    ]  # fmt: skip
    assert (line.problem, line.named_by) == ("missing", ["team/rows@v1"])
    assert found(rows, repair=True) == [("missing", True)]
    assert [row.reason for row in rows.all(select(AuditRow).where(AuditRow.event == "blob.lost"))] == ["missing"]
    assert found(rows) == [("missing", False)]
    assert rows.push_rows("dataset", "team/rows", ROWS)["version"] == "v1"
    assert found(rows, deep=True) == []
    with rows.store.open(blobs.blob_key(DIGEST)) as reader:
        assert b"".join(reader.chunks()) == ROWS


@pytest.mark.parametrize(("data", "problem"), [(OTHER, "corrupt"), (ROWS[:-3], "wrong-size")])
def test_other_bytes_under_a_blobs_name_are_found_taken_away_and_healed(
    rows: World, data: bytes, problem: str
) -> None:
    swap(rows, data)
    assert found(rows, deep=True) == [(problem, False)]
    assert found(rows, deep=True, repair=True) == [(problem, True)]
    assert rows.store.head(blobs.blob_key(DIGEST)) is None
    rows.push_rows("dataset", "team/rows", ROWS)
    assert found(rows, deep=True) == []


def test_lost_bytes_are_not_offered_as_present(rows: World) -> None:
    rows.store.delete(blobs.blob_key(DIGEST))
    found(rows, repair=True)
    with rows.database.write() as session:
        assert blobs.held(session, ADMIN, [DIGEST]) == set()
    assert rows.push_rows("suite", "team/suite", ROWS)["version"] == "v1"
    assert found(rows, deep=True) == []


def test_bytes_that_no_row_knows_go_when_they_are_old(rows: World) -> None:
    rows.store.put(key := blobs.blob_key(str(Digest.sha256(OTHER))), OTHER, Digest.sha256(OTHER))
    assert found(rows, repair=True) == []
    rows.later(hours=2)
    assert found(rows) == [("orphan", False)]
    assert found(rows, repair=True) == [("orphan", True)]
    assert rows.store.head(key) is None
    assert rows.all(select(Blob.digest)) == [DIGEST]


def test_a_named_blob_without_a_row_gets_one_and_a_push_heals_it(rows: World) -> None:
    with rows.database.write() as session:
        session.execute(delete(Blob).where(col(Blob.digest) == DIGEST))
    assert found(rows) == [("unknown", False)]
    assert found(rows, repair=True) == [("unknown", True)]
    rows.push_rows("dataset", "team/rows", ROWS)
    assert found(rows, deep=True) == []
    assert rows.one(select(Blob)).size == len(ROWS)


def test_progress_is_told_page_by_page(rows: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "_PAGE", 1)
    rows.push_rows("dataset", "team/more", OTHER)
    lines = list(fsck.check(rows.database, rows.store, deep=True, repair=False, actor="a", now=rows.now))
    of_rows = [(line.done, line.total) for line in lines if line.what == "rows" and not line.bytes]
    assert of_rows == [(1, 2), (2, 2)]


# ── a replica ────────────────────────────────────────────────────────────────


@dataclass
class Replica:
    """A copy of the store, and a way to put other bytes, or none, under the name of the blob there."""

    source: BlobSource
    hurt: Callable[[bytes | None], object]


@pytest.fixture(scope="module")
def bucket(s3_settings: S3Settings) -> S3Store:
    """Another bucket of the same server, for all tests here: each takes volumes there."""
    settings = replace(s3_settings, bucket=f"replica-{secrets.token_hex(4)}")
    boto3.client(
        "s3", endpoint_url=settings.endpoint, region_name=settings.region,
        aws_access_key_id=settings.access_key, aws_secret_access_key=settings.secret_key,
    ).create_bucket(Bucket=settings.bucket)  # fmt: skip
    return S3Store(settings)


@pytest.fixture(params=["backup", "bucket"])
def replica(request: pytest.FixtureRequest, rows: World, tmp_path: Path) -> Replica:
    if request.param == "backup":
        backup.back_up(rows.database, rows.store, tmp_path / "backup", lambda: rows.now)
        [file] = (tmp_path / "backup" / "blobs").glob("*/*")
        return Replica(LocalCopy(tmp_path / "backup"), lambda data: file.write_bytes(data) if data else file.unlink())
    store: S3Store = request.getfixturevalue("bucket")
    key = blobs.blob_key(DIGEST)
    store.put(key, ROWS, Digest.sha256(ROWS))
    return Replica(
        store, lambda data: store.put(key, data, Digest.sha256(data)) if data is not None else store.delete(key)
    )


DAMAGES: dict[str, Callable[[World], None]] = {
    "missing": lambda world: world.store.delete(blobs.blob_key(DIGEST)),
    "wrong-size": lambda world: swap(world, ROWS[:-3]),
    "corrupt": lambda world: swap(world, OTHER),
}


def content(world: World) -> bytes:
    with world.store.open(blobs.blob_key(DIGEST)) as reader:
        return b"".join(reader.chunks())


def said(world: World) -> list[tuple[str, str | None]]:
    about = world.all(select(AuditRow).where(AuditRow.subject == DIGEST))
    return [(row.event, row.reason) for row in sorted(about, key=lambda row: row.id)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_repair_brings_lost_bytes_from_the_replica(rows: World, replica: Replica, damage: str) -> None:
    DAMAGES[damage](rows)
    [line] = findings(rows, replica.source, deep=True)
    assert (line.problem, line.repaired, line.replica) == (damage, False, None)
    [line] = findings(rows, replica.source, deep=True, repair=True)
    assert (line.problem, line.repaired, line.replica) == (damage, True, "healed")
    assert content(rows) == ROWS
    assert said(rows) == [("blob.lost", damage), ("blob.healed", "from the replica")]
    assert findings(rows, replica.source, deep=True) == []
    assert [stat.key for stat in rows.store.walk("staging/") if "fsck" in stat.key] == []
    with rows.database.write() as session:
        assert blobs.held(session, ADMIN, [DIGEST]) == {DIGEST}


@pytest.mark.parametrize(("data", "had"), [(OTHER, "damaged"), (ROWS[:-3], "damaged"), (None, "missing")])
@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_what_the_replica_has_is_verified_and_without_it_a_push_heals(
    rows: World, replica: Replica, damage: str, data: bytes | None, had: str
) -> None:
    DAMAGES[damage](rows)
    replica.hurt(data)
    [line] = findings(rows, replica.source, deep=True, repair=True)
    assert (line.problem, line.repaired, line.replica) == (damage, True, had)
    assert rows.store.head(blobs.blob_key(DIGEST)) is None
    assert said(rows) == [("blob.lost", damage)]
    rows.push_rows("dataset", "team/rows", ROWS)
    assert findings(rows, replica.source, deep=True) == []


def test_a_replica_that_is_down_changes_nothing_but_time(rows: World, s3_settings: S3Settings, tmp_path: Path) -> None:
    rows.store.delete(blobs.blob_key(DIGEST))
    for away in (LocalCopy(tmp_path / "unmounted"), S3Store(replace(s3_settings, endpoint="http://127.0.0.1:9"))):
        [line] = findings(rows, away, repair=True)
        assert (line.repaired, line.replica) == (True, "down")
    copy = tmp_path / blobs.blob_key(DIGEST).replace("/", f"/{DIGEST[7:9]}/")
    copy.parent.mkdir(parents=True)
    copy.write_bytes(ROWS)
    [line] = findings(rows, LocalCopy(tmp_path), repair=True)
    assert line.replica == "healed"
    assert content(rows) == ROWS


def test_a_repair_that_died_before_the_last_step_is_finished_by_the_next(
    rows: World, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    DAMAGES["corrupt"](rows)
    with monkeypatch.context() as patched:
        patched.setattr(fsck, "_bring", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            findings(rows, replica.source, deep=True, repair=True)
    assert [line.problem for line in findings(rows)] == ["missing"]
    assert [line.replica for line in findings(rows, replica.source, repair=True)] == ["healed"]
    assert content(rows) == ROWS


def test_two_repairs_at_once_heal_once(rows: World, replica: Replica) -> None:
    DAMAGES["corrupt"](rows)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: findings(rows, replica.source, deep=True, repair=True), range(2)))
    assert content(rows) == ROWS
    assert said(rows) == [("blob.lost", "corrupt"), ("blob.healed", "from the replica")]
    assert findings(rows, deep=True) == []


def test_a_named_blob_without_a_row_comes_from_the_replica(rows: World, replica: Replica) -> None:
    with rows.database.write() as session:
        session.execute(delete(Blob).where(col(Blob.digest) == DIGEST))
    rows.store.delete(blobs.blob_key(DIGEST))
    [line] = findings(rows, replica.source, repair=True)
    assert (line.problem, line.replica) == ("unknown", "healed")
    assert (rows.one(select(Blob)).size, rows.one(select(Blob)).verified) == (len(ROWS), "full")
    assert findings(rows, deep=True) == []
