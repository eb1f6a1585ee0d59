"""Backup and restore of database and bucket, to one consistent point, beside the live registry.

    hold the collector → one snapshot of all tables → every blob that it names → backup.json, last

Blobs never change under their name, so a bucket that is newer than the snapshot holds all that the snapshot names, as
long as nothing is collected meanwhile (`registry.services.collection.hold`). A folder keeps any number of snapshots
and each blob once:

    blobs/ab/<sha256 hex>                    a name is given after the digest was verified and the bytes are on disk
    snapshots/<time>/tables/<table>.ndjson   a row a line
    snapshots/<time>/backup.json             written last: a snapshot without it is none

A restore goes into an empty installation: blobs first, each verified, then all rows in one transaction. What was on
its way (open pushes, checkpoints in storage) is not in a backup: such pushes are expired, running jobs lose their lease
and begin again.
"""

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from sqlalchemy import LargeBinary, Table, func, select, text, update
from sqlmodel import Session, SQLModel

from registry.core.digest import Digest
from registry.core.errors import BackupUnusable, BlobNotFound, ChecksumRefused, NotEmpty
from registry.core.lifecycle import UNFINISHED, PushState
from registry.db.engine import Database
from registry.db.models import AuditHead, UtcDateTime
from registry.storage.base import BlobStore

from . import audit, collection
from .blobs import blob_key

Progress = Callable[[str, int, int], None]
"""What, done, total."""
FORMAT = "loractl/1 backup"
HOLD = timedelta(minutes=10)
_NOT_KEPT = ("holds", "checkpoints")
"""Tables of what is on its way."""
_ROWS = 500


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


# ── backup ───────────────────────────────────────────────────────────────────


def back_up(
    database: Database,
    store: BlobStore,
    folder: Path,
    clock: Callable[[], datetime],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Add a snapshot to ``folder``, and the blobs that it lacks; what ``backup.json`` says of it.

    ``lost``: blobs that the database names and the store does not have, or has other bytes of.
    """
    now, identity = clock(), f"backup-{secrets.token_hex(6)}"
    name = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    snapshot = folder / "snapshots" / name
    (snapshot / "tables").mkdir(parents=True)
    held = _Hold(database, identity, clock)
    try:
        held.prolong()
        rows = _write_tables(database, snapshot / "tables")
        wanted = [row for row in _read(snapshot, "blobs") if row["missing_since"] is None]
        total, done, copied, lost = sum(row["size"] for row in wanted), 0, 0, list[str]()
        for row in wanted:
            held.tick()
            target = _place(folder, row["digest"])
            if not (target.exists() and target.stat().st_size == row["size"]):
                if _copy(store, row["digest"], target, held.tick):
                    copied += row["size"]
                else:
                    lost.append(row["digest"])
            done += row["size"]
            progress("blobs", done, total)
    finally:
        collection.let_go(database, identity)
    about = {
        "format": FORMAT,
        "name": name,
        "made_at": now.isoformat(),
        "schema": _revision(database),
        "rows": rows,
        "blobs": len(wanted),
        "bytes": total,
        "copied": copied,
        "lost": lost,
    }
    _write(snapshot / "backup.json", [json.dumps(about, indent=1).encode()])
    return about


class _Hold:
    """Keeps the collector off for as long as it is prolonged."""

    def __init__(self, database: Database, identity: str, clock: Callable[[], datetime]) -> None:
        self._database, self._identity, self._clock = database, identity, clock
        self._prolonged = 0.0

    def prolong(self) -> None:
        collection.hold(self._database, self._identity, "a backup copies", self._clock() + HOLD)
        self._prolonged = monotonic()

    def tick(self) -> None:
        """Called often."""
        if monotonic() - self._prolonged > HOLD.total_seconds() / 5:
            self.prolong()


def _write_tables(database: Database, folder: Path) -> dict[str, int]:
    counts = {}
    with database.snapshot() as connection:
        for table in SQLModel.metadata.sorted_tables:
            if table.name in _NOT_KEPT:
                continue
            result = connection.execution_options(yield_per=_ROWS).execute(select(table).order_by(*table.primary_key))
            counts[table.name] = _write(folder / f"{table.name}.ndjson", _lines(table, result.mappings()))
    return counts


def _lines(table: Table, rows: Iterable[Any]) -> Iterator[bytes]:
    for row in rows:
        told = {column.name: _told(row[column]) for column in table.columns}
        yield json.dumps(told, ensure_ascii=False).encode() + b"\n"


def _told(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _write(path: Path, pieces: Iterable[bytes]) -> int:
    """Write a file that has its name when it is whole and on disk; how many pieces."""
    partial, count = path.with_name(path.name + ".partial"), 0
    with partial.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            count += 1
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return count


def _copy(store: BlobStore, digest: str, target: Path, tick: Callable[[], None]) -> bool:
    """Copy and verify one blob; False when its bytes are not there, or are not its own."""
    sha256 = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        with store.open(blob_key(digest)) as reader:
            for piece in reader.chunks():
                tick()
                sha256.update(piece)
                yield piece
        if f"sha256:{sha256.hexdigest()}" != digest:
            raise BlobNotFound(digest=digest)

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(target, pieces())
    except BlobNotFound:
        target.with_name(target.name + ".partial").unlink(missing_ok=True)
        return False
    return True


def _place(folder: Path, digest: str) -> Path:
    found = Digest.parse(digest).hex
    return folder / "blobs" / found[:2] / found


def _revision(database: Database) -> str:
    with database.read() as session:
        return str(session.connection().execute(text("SELECT version_num FROM alembic_version")).scalar_one())


# ── restore ──────────────────────────────────────────────────────────────────


def restore(
    database: Database,
    store: BlobStore,
    folder: Path,
    clock: Callable[[], datetime],
    *,
    name: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Bring a snapshot (the newest one) into an empty installation; what ``backup.json`` says of it.

    Again after a crash is fine: blobs are verified and put where they lie already, and rows come all at once.

    Raises:
        NotEmpty: there are rows.
        BackupUnusable: no whole snapshot, one of another schema, or a blob that is missing or damaged.
    """
    about, snapshot = _find(folder, name)
    if about["schema"] != (ours := _revision(database)):
        reason = f"it was made with schema {about['schema']}, this one has {ours}: restore with that release"
        raise BackupUnusable(path=str(snapshot), reason=reason)
    with database.read() as session:
        _require_empty(session)
    lost, done = set(about["lost"]), 0
    for row in _read(snapshot, "blobs"):
        if row["missing_since"] is None and row["digest"] not in lost:
            _put(store, _place(folder, row["digest"]), row["digest"])
            done += row["size"]
            progress("blobs", done, about["bytes"])
    now = clock()
    with database.write() as session:
        _require_empty(session)
        for table in SQLModel.metadata.sorted_tables:
            if table.name not in _NOT_KEPT:
                _insert(session, table, _read(snapshot, table.name), lost, now)
        told = {"snapshot": about["name"], "made_at": about["made_at"]}
        audit.record(session, "registry.restored", about["name"], actor=audit.ITSELF, now=now, after=told)
    return about


def _find(folder: Path, name: str | None) -> tuple[dict[str, Any], Path]:
    whole = sorted(path.parent for path in (folder / "snapshots").glob(f"{name or '*'}/backup.json"))
    if not whole:
        raise BackupUnusable(path=str(folder), reason=f"it holds no whole snapshot{f' {name}' if name else ''}")
    about: dict[str, Any] = json.loads((whole[-1] / "backup.json").read_text())
    if about.get("format") != FORMAT:
        raise BackupUnusable(path=str(whole[-1]), reason=f"its format is {about.get('format')}, not {FORMAT}")
    return about, whole[-1]


def _read(snapshot: Path, table: str) -> Iterator[dict[str, Any]]:
    path = snapshot / "tables" / f"{table}.ndjson"
    if not path.exists():
        raise BackupUnusable(path=str(path), reason="it is missing")
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _require_empty(session: Session) -> None:
    for table in SQLModel.metadata.sorted_tables:
        if table.name != AuditHead.__tablename__:
            count = session.execute(select(func.count()).select_from(table)).scalar_one()
            if count:
                raise NotEmpty(table=table.name, count=count)


def _put(store: BlobStore, path: Path, digest: str) -> None:
    try:
        with path.open("rb") as file:
            size, pieces = os.fstat(file.fileno()).st_size, iter(lambda: file.read(1 << 20), b"")
            store.put_stream(blob_key(digest), pieces, size=size, sha256=Digest.parse(digest))
    except FileNotFoundError as error:
        raise BackupUnusable(path=str(path), reason="a blob of the snapshot is missing") from error
    except ChecksumRefused as error:
        raise BackupUnusable(path=str(path), reason="it is damaged: its bytes are not those of its name") from error


def _insert(session: Session, table: Table, rows: Iterator[dict[str, Any]], lost: set[str], now: datetime) -> None:
    if table.name == AuditHead.__tablename__:
        for row in rows:
            session.execute(update(table).values(seq=row["seq"], link=row["link"]))
        return
    while some := [_parsed(table, row, lost, now) for row in islice(rows, _ROWS)]:
        session.execute(table.insert(), some)
    key = list(table.primary_key)
    if session.get_bind().dialect.name == "postgresql" and len(key) == 1 and key[0].autoincrement is not False:
        _count_on(session, table.name, key[0].name)


def _parsed(table: Table, row: dict[str, Any], lost: set[str], now: datetime) -> dict[str, Any]:
    found = {column.name: _value(column.type, row[column.name]) for column in table.columns if column.name in row}
    if table.name == "pushes" and found["state"] in UNFINISHED:
        found |= {"state": PushState.EXPIRED, "changed_at": now, "lease_until": None, "facts": None}
    if table.name == "blobs" and found["digest"] in lost:
        found["missing_since"] = now
    return found


def _value(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(kind, UtcDateTime):
        return datetime.fromisoformat(value)
    return base64.b64decode(value) if isinstance(kind, LargeBinary) else value


def _count_on(session: Session, table: str, column: str) -> None:
    """Let the sequence of a key go on behind what was inserted."""
    sequence = session.execute(
        text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": table, "column": column}
    ).scalar()
    if sequence:
        last = f'SELECT setval(:sequence, (SELECT coalesce(max("{column}"), 0) FROM "{table}") + 1, false)'  # noqa: S608
        session.execute(text(last), {"sequence": sequence})
