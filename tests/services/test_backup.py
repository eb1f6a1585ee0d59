"""A backup beside the live registry, restored into an empty one: every row, every blob, every digest."""

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy import select as columns
from sqlmodel import SQLModel, select

from registry.core.audit import breaks
from registry.core.digest import Digest
from registry.core.errors import BackupUnusable, NotEmpty
from registry.core.names import Reference, SeriesName
from registry.db.engine import Database
from registry.db.models import AuditRow, Blob, Push
from registry.keys import PrivateKey
from registry.schemas import KeyRequest
from registry.services import audit, backup, blobs, collection, fsck, signatures
from registry.services.references import find_adapter, find_version
from registry.storage.base import BlobStore
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, files_push

ROWS = b'{"prompt": "1+1=", "completion": " 2"}\n'


@pytest.fixture
def filled(world: World, tmp_path: Path) -> World:
    _empty(world.store)
    base = tiny_base(tmp_path / "base")
    world.push_base(base, line="demo")
    for seed in (1, 2):
        folder = tiny_adapter(tmp_path / f"a{seed}", base, seed=seed)
        world.push_adapter(folder, "team/bot", base, aliases=["dev"], message="ü")
    world.push_rows("dataset", "team/rows", ROWS)
    key = PrivateKey.generate()
    with world.database.write() as session:
        signatures.add_key(session, ADMIN, "team", KeyRequest(public=key.public.pem, name="k"), world.now)
        signatures.set_required(session, ADMIN, "team", required=False, now=world.now)
        adapter = find_adapter(session, ADMIN, SeriesName("team", "bot"))
        version = find_version(session, adapter, Reference.parse("team/bot@v1"))
        document = key.sign("team/bot", signatures.manifest_of(session, version)).document()
        signatures.sign(session, ADMIN, adapter, version, document, world.now)
        audit.chain(session)
    return world


def _empty(store: BlobStore) -> None:
    for stat in list(store.walk("blobs/")):
        store.delete(stat.key)


@contextmanager
def empty_database(
    world: World, request: pytest.FixtureRequest, tmp_path: Path, *, same_kind: bool = True
) -> Iterator[Database]:
    """Another database, of the same kind or of the other, as the migrations make it."""
    if (world.database.dialect == "sqlite") == same_kind:
        path = tmp_path / f"{secrets.token_hex(4)}.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        made = Database(f"sqlite:///{path}")
        yield made
        made.close()
        return
    url, name = make_url(request.getfixturevalue("postgres_template")), f"restored_{secrets.token_hex(4)}"
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template_loractl".encode())
        made = Database(url.set(database=name).render_as_string(hide_password=False))
        yield made
        made.close()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def rows(database: Database, *without: str) -> dict[str, list[Any]]:
    with database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(columns(table).order_by(*table.primary_key))]
            for table in SQLModel.metadata.sorted_tables
            if table.name not in without
        }


def back_up(world: World, folder: Path) -> dict[str, Any]:
    return backup.back_up(world.database, world.store, folder, world.clock)


@pytest.mark.parametrize("same_kind", [True, False])
def test_what_is_restored_is_what_was_backed_up_to_the_last_digest(
    filled: World, request: pytest.FixtureRequest, tmp_path: Path, *, same_kind: bool
) -> None:
    made = back_up(filled, tmp_path / "kept")
    assert made["lost"] == [] and made["copied"] == made["bytes"] > 0
    before = rows(filled.database, "holds", "audit")
    digests = filled.all(select(Blob.digest))
    _empty(filled.store)
    with empty_database(filled, request, tmp_path, same_kind=same_kind) as database:
        backup.restore(database, filled.store, tmp_path / "kept", filled.clock)
        assert rows(database, "holds", "audit") == before
        for digest in digests:
            with filled.store.open(blobs.blob_key(digest)) as reader:
                assert f"sha256:{hashlib.sha256(b''.join(reader.chunks())).hexdigest()}" == digest
        checked = fsck.check(database, filled.store, deep=True, repair=False, actor="a", now=filled.now)
        assert [line for line in checked if line.kind == "finding"] == []
        restored = World(database, filled.store, filled.settings, filled.now)
        assert [row.event for row in restored.all(select(AuditRow))][-1] == "registry.restored"
        with database.write() as session:
            audit.chain(session)
        with database.read() as session:
            head, _, chained = audit.chained(session, ADMIN, after=0, limit=9999)
        assert list(breaks(chained, head)) == []
        base = tiny_base(tmp_path / "base")
        pushed = restored.push_adapter(tiny_adapter(tmp_path / "a3", base, seed=3), "team/bot", base)
        assert pushed["version"] == "v3"  # numbers and keys go on
        assert restored.push_rows("dataset", "team/rows", ROWS + ROWS.replace(b"1+1", b"2+2"))["version"] == "v2"


def test_the_second_backup_copies_only_what_is_new(filled: World, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "kept")
    more = ROWS.replace(b"2", b"3")
    filled.push_rows("dataset", "team/more", more)
    filled.later(seconds=5)
    assert back_up(filled, tmp_path / "kept")["copied"] == len(more)


def test_a_restore_goes_into_an_empty_installation_only(
    filled: World, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    back_up(filled, tmp_path / "kept")
    with pytest.raises(NotEmpty):
        backup.restore(filled.database, filled.store, tmp_path / "kept", filled.clock)
    with empty_database(filled, request, tmp_path) as database:
        backup.restore(database, filled.store, tmp_path / "kept", filled.clock)
        with pytest.raises(NotEmpty):
            backup.restore(database, filled.store, tmp_path / "kept", filled.clock)


def test_what_is_pushed_and_deleted_while_it_copies_changes_nothing_of_it(
    filled: World, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    before = rows(filled.database, "holds", "audit")
    stirred = threading.Event()

    def stir(what: str, done: int, total: int) -> None:
        if not stirred.is_set():
            stirred.set()
            filled.push_rows("dataset", "team/late", ROWS.replace(b"2", b"4"))
            with filled.database.write() as session:
                session.execute(text("DELETE FROM dataset_versions WHERE number = 1"))
            collection.mark(filled.database, filled.now)
            gone = collection.collect(filled.database, filled.store, filled.now, timedelta(0))
            assert gone == 0  # it is held off

    backup.back_up(filled.database, filled.store, tmp_path / "kept", filled.clock, stir)
    assert collection.collect(filled.database, filled.store, filled.now, timedelta(0)) > 0
    _empty(filled.store)
    with empty_database(filled, request, tmp_path) as database:
        backup.restore(database, filled.store, tmp_path / "kept", filled.clock)
        assert rows(database, "holds", "audit") == before


def test_a_blob_that_the_store_lost_is_named_and_comes_back_as_lost(
    filled: World, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    digest = str(Digest.sha256(ROWS))
    filled.store.delete(blobs.blob_key(digest))
    assert back_up(filled, tmp_path / "kept")["lost"] == [digest]
    with empty_database(filled, request, tmp_path) as database:
        backup.restore(database, filled.store, tmp_path / "kept", filled.clock)
        restored = World(database, filled.store, filled.settings, filled.now)
        restored.push_rows("dataset", "team/rows", ROWS)
        assert restored.store.head(blobs.blob_key(digest)) is not None


def test_what_was_on_its_way_is_over(filled: World, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    asked, _ = files_push("dataset", {"data.jsonl": ROWS * 2})
    info = filled.open("dataset", "team/open", asked)
    back_up(filled, tmp_path / "kept")
    with empty_database(filled, request, tmp_path) as database:
        backup.restore(database, filled.store, tmp_path / "kept", filled.clock)
        with database.read() as session:
            assert session.get_one(Push, info.id).state == "expired"


def test_damage_and_half_a_backup_are_refused_before_a_row_is_written(
    filled: World, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    made = back_up(filled, kept)
    about = kept / "snapshots" / made["name"] / "backup.json"
    damaged = next(path for path in (kept / "blobs").rglob("*") if path.is_file())
    whole = damaged.read_bytes()
    with empty_database(filled, request, tmp_path) as database:
        damaged.write_bytes(whole[:-1] + b"?")
        with pytest.raises(BackupUnusable, match="damaged"):
            backup.restore(database, filled.store, kept, filled.clock)
        damaged.unlink()
        with pytest.raises(BackupUnusable, match="missing"):
            backup.restore(database, filled.store, kept, filled.clock)
        damaged.write_bytes(whole)
        told = json.loads(about.read_text())
        about.write_text(json.dumps(told | {"schema": "0001"}))
        with pytest.raises(BackupUnusable, match="schema 0001"):
            backup.restore(database, filled.store, kept, filled.clock)
        about.unlink()
        with pytest.raises(BackupUnusable, match="no whole snapshot"):
            backup.restore(database, filled.store, kept, filled.clock)
        assert not any(rows(database, "audit_head").values())
        about.write_text(json.dumps(told))
        backup.restore(database, filled.store, kept, filled.clock, name=made["name"])
