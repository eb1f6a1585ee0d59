"""Fsck finds what bucket and rows do not agree on; a repair removes rubbish and lets a push heal the rest."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete
from sqlmodel import col, select

from registry.core.digest import Digest
from registry.core.manifest import Manifest
from registry.db.models import AuditRow, Blob, Signature, Version
from registry.keys import PrivateKey
from registry.schemas import KeyRequest
from registry.services import blobs, fsck, signatures
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, adapter_push

ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'
DIGEST = str(Digest.sha256(ROWS))
OTHER = b'{"prompt": "1+1=", "completion": " 9"}\n'


def found(world: World, **how: bool) -> list[tuple[str, bool]]:
    asked: dict[str, Any] = {"deep": False, "repair": False, **how}
    lines = fsck.check(world.database, world.store, actor="ada", now=world.now, **asked)
    mine = set(world.all(select(Blob.digest))) | {DIGEST, str(Digest.sha256(OTHER))}
    return [(str(line.problem), line.repaired) for line in lines if line.kind == "finding" and line.blob in mine]


@pytest.fixture
def rows(world: World) -> World:
    for key in (blobs.blob_key(DIGEST), blobs.blob_key(str(Digest.sha256(OTHER)))):
        world.store.delete(key)  # the store is shared between tests
    world.push_rows("dataset", "team/rows", ROWS)
    return world


def replace(world: World, data: bytes) -> None:
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
    replace(rows, data)
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
