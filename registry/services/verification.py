"""Verification: reading what a push brought, completely and in bounded memory, before anybody can see it.

A verifier claims a push with a lease (compare-and-set), completes its uploads, streams every file once
(SHA-256 of the whole, and what its kind demands on the way), copies staged blobs to their place, and ends
in one transaction: committed, or rejected with findings. Every step may be done again, so a verifier that
dies anywhere is followed by another; two at once waste work and nothing else.

Bases up to `READ_FIRST` bytes are read before their commit. For larger ones the storage's own checksums per
part and the headers are enough to commit (``parts``); they are read afterwards (`read_next_base`), and no
job uses them before that (``full``).
"""

import base64
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice, product
from time import monotonic
from types import TracebackType
from typing import Any, Self

import structlog
from blake3 import blake3
from sqlalchemy import ColumnElement
from sqlmodel import Session, and_, col, or_, select, update

from registry.core.adapter import CONFIG_FILE, AdapterSpec
from registry.core.base_model import TOKENIZER_FILES, BaseModel, Tensor, canonical_tensors, tokenizer_digests
from registry.core.digest import Digest
from registry.core.errors import (
    AdapterDoesNotFit,
    BadConfig,
    BadManifest,
    BlobNotFound,
    BlobsMissing,
    ChecksumRefused,
    DigestMismatch,
    DuplicateTensor,
    GivenUp,
    LfsPointer,
    LoractlError,
    NotABase,
    NotAnAdapter,
    PickleRefused,
    Unavailable,
    UnusableDataset,
    UploadNotFound,
)
from registry.core.fit import Binding, require_fit, target_set
from registry.core.lifecycle import PushState
from registry.core.manifest import FileEntry, Manifest
from registry.core.names import SeriesName
from registry.core.safetensors import MAX_TENSORS, Header, header_bytes
from registry.core.suites import SuiteSpec
from registry.core.tasks import require_files
from registry.db.engine import Database
from registry.db.models import Base, Blob, Push, PushBlob
from registry.files import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, Read, check_adapter_tensors, header_from, parse_json
from registry.schemas import Wishes
from registry.storage.base import BlobReader, BlobStore, Part

from . import audit, bases, blobs, commits, datasets, fits, pushes

Clock = Callable[[], datetime]
LEASE = timedelta(seconds=60)
"""How long a push is a verifier's that is not heard of again, unless the caller says otherwise."""
REST = timedelta(seconds=1), timedelta(seconds=30)
"""The shortest and the longest time that a push rests when the store could not be read for it."""
MOST_LOOKS = 8
"""How often a verification may come to no end before the push is held to be the reason."""
MAX_ADAPTER_HEADERS = 64 << 20
"""Bytes of the headers of all weight files of one adapter."""
READ_FIRST = 8 << 30
"""Bytes of a base that is read completely before its commit."""
_GUESSES = 64
"""How often completing is tried where a store does not say which of several contents arrived."""
log = structlog.get_logger()


class LeaseGone(Exception):  # noqa: N818  # our exceptions say what happened
    """Another verifier owns the push now; this one stops."""


@dataclass
class Claim:
    """A verifier's right to one push, renewed while it reads."""

    database: Database
    push: Push
    until: datetime
    clock: Clock
    lease: timedelta
    renewed: float = field(default_factory=monotonic)

    def tick(self) -> None:
        """Called often; renews the lease now and then. `LeaseGone` when it was lost."""
        if monotonic() - self.renewed < self.lease.total_seconds() / 4:
            return
        later = self.clock() + self.lease
        with self.database.write() as session:
            held = session.exec(
                update(Push)
                .where(col(Push.id) == self.push.id, col(Push.lease_until) == self.until)
                .values(lease_until=later)
            )
            if held.rowcount == 0:
                raise LeaseGone(self.push.id)
        self.until, self.renewed = later, monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease from a thread, through work that cannot call `tick`; `LeaseGone` at its end."""
        done, lost = threading.Event(), list[LeaseGone]()

        def renew() -> None:
            while not done.wait(self.lease.total_seconds() / 8):
                try:
                    self.tick()
                except LeaseGone as gone:
                    lost.append(gone)
                    return
                except Unavailable as error:  # the next try may do; the lease itself says whether it was in time
                    log.warning("lease-not-renewed", push=self.push.id, reason=error.message)

        thread = threading.Thread(target=renew, name="lease")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if lost:
            raise lost[0]


def verify_next(
    database: Database, store: BlobStore, clock: Clock, *, lease: timedelta = LEASE, read_first: int = READ_FIRST
) -> bool:
    """Verify the push that waits longest and commit or reject it; whether there was one."""
    waiting = and_(col(Push.state) == PushState.VERIFYING, col(Push.expires_at) > clock())
    claim = _claim(database, clock, waiting, lease)
    if claim is None:
        return False
    push = claim.push
    if push.looks > MOST_LOOKS:
        _reject(database, store, claim, [GivenUp(id=push.id, count=MOST_LOOKS)])
        return True
    try:
        facts = _read(database, store, claim, read_first)
        _place(database, store, claim, facts)
    except LeaseGone:
        return True
    except Unavailable:
        _release(database, claim)
        raise
    except LoractlError as error:
        _reject(database, store, claim, [error])
        return True
    with database.write() as session:
        row = _mine(session, claim)
        if row is None:
            return True
        _pass(session, row, facts, clock())
        uploads = pushes.uploads_of(session, push.id)
    pushes.clear_staging(store, push.id, uploads)
    log.info("push-verified", push=push.id, job=push.job_id, kind=push.kind, state=str(row.state))
    return True


def _claim(database: Database, clock: Clock, condition: ColumnElement[bool], lease: timedelta) -> Claim | None:
    now = clock()
    free = or_(col(Push.lease_until).is_(None), col(Push.lease_until) <= now)
    with database.write() as session:
        query = select(Push).where(condition, free).order_by(col(Push.changed_at)).limit(1)
        push = session.exec(query.with_for_update(skip_locked=True)).first()
        if push is None:
            return None
        push.lease_until, push.looks = now + lease, push.looks + 1  # until it is released, or comes to an end
        session.add(push)
    return Claim(database, push, now + lease, clock, lease)


def _mine(session: Session, claim: Claim) -> Push | None:
    """The push, locked, while it is still this verifier's."""
    row = pushes.locked(session, claim.push.id)
    return row if row.state == PushState.VERIFYING and row.lease_until == claim.until else None


def _release(database: Database, claim: Claim) -> None:
    """Let another try again after a rest, so that a push that cannot be read holds nobody up.

    The rest is half of the time that the push has waited, within `REST`. When the database itself is down, the
    lease runs out by itself.
    """
    now = claim.clock()
    rest = min(max((now - claim.push.changed_at) / 2, REST[0]), REST[1])
    with database.write() as session:
        session.exec(
            update(Push)
            .where(col(Push.id) == claim.push.id, col(Push.lease_until) == claim.until)
            .values(lease_until=now + rest, looks=col(Push.looks) - 1)
        )


def _pass(session: Session, push: Push, facts: dict[str, Any], now: datetime) -> None:
    """Verified; and committed at once unless a job's end, or a conflict, says otherwise."""
    push.facts, push.lease_until, push.looks = facts, None, 0
    pushes.move(session, push, "pass", now)
    session.add(push)
    session.flush()
    if push.job_id is not None:
        return
    try:
        with session.begin_nested():
            commits.commit(session, push, now)
    except Unavailable:
        raise
    except LoractlError as error:
        session.refresh(push)
        push.findings = [error.problem()]
        session.add(push)


def _reject(database: Database, store: BlobStore, claim: Claim, errors: list[LoractlError]) -> None:
    with database.write() as session:
        row = _mine(session, claim)
        if row is None:
            return
        pushes.move(session, row, "reject", claim.clock(), codes=[error.code for error in errors])
        row.findings = [error.problem() for error in errors]
        row.facts, row.lease_until = None, None
        session.add(row)
        uploads = pushes.uploads_of(session, row.id)
    pushes.clear_staging(store, claim.push.id, uploads)
    codes = [error.code for error in errors]
    log.info("push-rejected", push=claim.push.id, job=claim.push.job_id, kind=claim.push.kind, codes=codes)


# ── reading ──────────────────────────────────────────────────────────────────


@dataclass
class Reading:
    """The files of one push, wherever their bytes lie."""

    store: BlobStore
    manifest: Manifest
    keys: dict[str, str]
    """Digest -> key."""
    tick: Callable[[], None]

    def entry(self, path: str) -> FileEntry | None:
        """The file at ``path``."""
        return next((entry for entry in self.manifest.files if entry.path == path), None)

    def open(self, entry: FileEntry) -> BlobReader:
        """Its bytes; `DigestMismatch` when there are more or fewer than promised."""
        reader = self.store.open(self.keys[entry.digest])
        if reader.size != entry.size:
            reader.close()
            size = reader.size
            raise DigestMismatch(path=entry.path, expected=entry.digest, actual=f"{size} bytes", size=size)
        return reader

    def small(self, path: str, limit: int) -> bytes | None:
        """All bytes of a small file, None when there is none."""
        entry = self.entry(path)
        if entry is None:
            return None
        if entry.size > limit:
            raise BadConfig(path=path, reason=f"it is over {limit} bytes")
        with self.open(entry) as reader:
            return reader.read(0, entry.size)

    def weights(self) -> list[FileEntry]:
        """The safetensors files."""
        return [entry for entry in self.manifest.files if entry.path.endswith(".safetensors")]


class Stream:
    """One pass over a file: every byte enters the SHA-256, and may be read in order on the way."""

    def __init__(self, reader: BlobReader, entry: FileEntry, tick: Callable[[], None]) -> None:
        self._chunks = reader.chunks()
        self._entry = entry
        self._tick = tick
        self._sha256 = hashlib.sha256()
        self._begin = 0
        self._held = b""

    def _next(self) -> bool:
        chunk = next(self._chunks, b"")
        self._tick()
        self._begin += len(self._held)
        self._held = chunk
        self._sha256.update(chunk)
        return bool(chunk)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at ``offset``, which is never before the last one read."""
        while offset >= self._begin + len(self._held):
            if not self._next():
                return b""
        found = [self._held[offset - self._begin : offset - self._begin + length]]
        missing = length - len(found[0])
        while missing and self._next():
            found.append(self._held[:missing])
            missing -= len(found[-1])
        return b"".join(found)

    def chunks(self) -> Iterator[bytes]:
        """All bytes that are left."""
        while self._next():
            yield self._held

    def finish(self) -> None:
        """Read to the end; `DigestMismatch` when the bytes are not what the manifest promised."""
        for _ in self.chunks():
            pass
        actual = Digest("sha256", self._sha256.hexdigest())
        if str(actual) != self._entry.digest:
            size = self._begin
            raise DigestMismatch(path=self._entry.path, expected=self._entry.digest, actual=str(actual), size=size)


class InTurn:
    """Streams over several files of which one is open at a time: each is read to its end before the next begins."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._read: set[str] = set()
        self._now: tuple[str, BlobReader, Stream] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._now is not None:
            self._now[1].close()
            self._now = None

    def reader(self, entry: FileEntry) -> Read:
        """``read(offset, length)`` of one file, as `Stream.read`."""
        return lambda offset, length: self._at(entry).read(offset, length)

    def finish(self, entries: Iterable[FileEntry]) -> None:
        """Read what is left of all ``entries``; `DigestMismatch`."""
        for entry in entries:
            if entry.path not in self._read:
                self._at(entry)
        self._finish()

    def _at(self, entry: FileEntry) -> Stream:
        if self._now is None or self._now[0] != entry.path:
            self._finish()
            reader = self._reading.open(entry)
            self._read.add(entry.path)
            self._now = (entry.path, reader, Stream(reader, entry, self._reading.tick))
        return self._now[2]

    def _finish(self) -> None:
        if self._now is not None:
            _, reader, stream = self._now
            stream.finish()
            reader.close()
            self._now = None


def _read(database: Database, store: BlobStore, claim: Claim, read_first: int) -> dict[str, Any]:
    """Read everything a push brought; what its commit is made of."""
    push = claim.push
    manifest, wishes = Manifest.parse(push.manifest), commits.wishes_of(push)
    with database.read() as session:
        rows = session.exec(select(PushBlob).where(PushBlob.push_id == push.id)).all()
    with claim.kept():
        keys = {row.digest: _whole(store, push.id, row) for row in rows}
    reading = Reading(store, manifest, keys, claim.tick)
    match push.kind:
        case "adapter":
            return _read_adapter(database, reading, SeriesName(push.namespace, push.name), wishes, push)
        case "base":
            table = (push.facts or {})["table"]
            if manifest.size > read_first:
                check_headers(reading, pushes.read_table(table))
                return {"table": table, "verified": "parts"}
            model = read_base(reading, pushes.read_table(table))
            return {"table": base64.b64encode(model.to_compressed()).decode(), "verified": "full"}
        case _:
            return _read_dataset(reading, suite=push.kind == "suite")


def _whole(store: BlobStore, push_id: str, row: PushBlob) -> str:
    """The key where a blob's bytes lie, its upload completed."""
    if row.state == "present":
        return blobs.blob_key(row.digest)
    key = blobs.staged_at(row)
    if row.upload_id is not None:
        try:
            listed = store.list_parts(key, row.upload_id)
            _complete(store, key, row.upload_id, listed, row.parts or {})
        except UploadNotFound:
            if store.head(key) is None:
                raise
    elif store.head(key) is None:
        if row.state != "placed":
            raise BlobsMissing(id=push_id, count=1, digests=row.digest)
        return blobs.blob_key(row.digest)
    return key


def _complete(store: BlobStore, key: str, upload_id: str, listed: Sequence[Part], signed: Mapping[str, str]) -> None:
    """Complete with what arrived; where the store does not list that, with what was signed for, the newest first."""
    contents: list[list[Digest | None]] = [
        [part.sha256] if part.sha256 else [Digest.parse(text) for text in signed.get(str(part.number), "").split()]
        for part in listed
    ]
    guesses = list(islice(product(*(known or [None] for known in contents)), _GUESSES))
    for guess in guesses:
        try:
            parts = [replace(part, sha256=sha256) for part, sha256 in zip(listed, guess, strict=True)]
            store.complete_multipart(key, upload_id, parts)
            return
        except ChecksumRefused:
            if guess is guesses[-1]:
                raise


def _place(database: Database, store: BlobStore, claim: Claim, facts: dict[str, Any]) -> None:
    """Copy what was staged to its final place."""
    with database.read() as session:
        left = (PushBlob.push_id == claim.push.id, col(PushBlob.state).not_in(("present", "placed")))
        rows = session.exec(select(PushBlob).where(*left)).all()
    verified = facts.get("verified", "full")
    with claim.kept():
        for row in rows:
            source = blobs.staged_at(row)
            blobs.place(database, store, source, digest=row.digest, size=row.size, verified=verified, now=claim.clock())
            with database.write() as session:
                mine = (col(PushBlob.push_id) == row.push_id, col(PushBlob.digest) == row.digest)
                session.exec(update(PushBlob).where(*mine).values(state="placed"))


def sniff(start: bytes, entry: FileEntry) -> None:
    """Refuse by their first bytes what has no business beside weights, whatever its name."""
    if start.startswith(b"version https://git-lfs") and entry.size < 1024:
        raise LfsPointer(path=entry.path, size=entry.size)
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if pickled or start.startswith(b"PK\x03\x04"):
        raise PickleRefused(path=entry.path)


def _read_plain(reading: Reading, entry: FileEntry) -> None:
    with reading.open(entry) as reader:
        sniff(reader.read(0, min(64, entry.size)), entry)
        Stream(reader, entry, reading.tick).finish()


# ── adapters ─────────────────────────────────────────────────────────────────


def _read_adapter(
    database: Database, reading: Reading, series: SeriesName, wishes: Wishes, push: Push
) -> dict[str, Any]:
    manifest = reading.manifest
    text = reading.small(CONFIG_FILE, MAX_CONFIG_BYTES)
    if text is None:
        raise NotAnAdapter(path=str(series), reason=f"it has no {CONFIG_FILE}")
    config = parse_json(text, CONFIG_FILE)
    if config != manifest.config:
        raise BadManifest(reason=f"its config is not what {CONFIG_FILE} holds")
    weights = reading.weights()
    if not weights:
        raise NotAnAdapter(path=str(series), reason="it has no adapter_model.safetensors")
    for entry in manifest.files:
        if entry not in weights:
            _read_plain(reading, entry)
    headers = _adapter_headers(reading, weights, series)
    spec = AdapterSpec.parse(config, headers)
    facts = _bind(database, spec, manifest, series, wishes, push)  # before the long read: it refuses most
    with InTurn(reading) as files:
        reads = {entry.path: files.reader(entry) for entry in weights}
        check_adapter_tensors(spec, headers, reads, allow_zero=wishes.allow_zero)
        files.finish(weights)
    return facts


def _adapter_headers(reading: Reading, weights: list[FileEntry], series: SeriesName) -> dict[str, Header]:
    """The headers of all weight files, within `MAX_ADAPTER_HEADERS` bytes together."""
    headers: dict[str, Header] = {}
    total = 0
    for entry in weights:
        with reading.open(entry) as reader:
            total += header_bytes(reader.read(0, min(64, entry.size)), entry.size, entry.path)
            if total > MAX_ADAPTER_HEADERS:
                reason = f"the headers of its files are over {MAX_ADAPTER_HEADERS} bytes together, the most allowed"
                raise NotAnAdapter(path=str(series), reason=reason)
            headers[entry.path] = header_from(reader.read, entry.size, entry.path)
    return headers


def _bind(
    database: Database, spec: AdapterSpec, manifest: Manifest, series: SeriesName, wishes: Wishes, push: Push
) -> dict[str, Any]:
    """Fit and evidence; the refusal names what does not fit, and which registered base would."""
    with database.read() as session:
        base = commits.base_of(session, manifest)
        assert base.id is not None
        model = fits.model_of(session, base.id)
        try:
            require_fit(spec, model, {}, path="DIR", name=str(series))
        except AdapterDoesNotFit:
            require_fit(spec, model, bases.models(session), path="DIR", name=str(series))
        bound: Binding = commits.binding(session, spec, base, series, trust_base=wishes.trust_base)
        actor = str(push.wishes.get("actor", push.created_by))
        return commits.adapter_facts(spec, base, target_set(spec, model), bound, actor)


# ── bases ────────────────────────────────────────────────────────────────────


def read_base(reading: Reading, promised: BaseModel) -> BaseModel:
    """Read all of a base: every file's SHA-256, every tensor's BLAKE3; the model that the files hold.

    `NotABase` when that is not the promised one.
    """
    config = _base_config(reading)
    rows: list[Tensor] = []
    owner: dict[str, str] = {}
    for entry in reading.manifest.files:
        if not entry.path.endswith(".safetensors"):
            _read_plain(reading, entry)
            continue
        with reading.open(entry) as reader:
            header = header_from(reader.read, entry.size, entry.path)
            _own(header, owner)
            stream = Stream(reader, entry, reading.tick)
            for tensor in header:
                hasher = blake3()
                for start in range(tensor.start, tensor.end, 1 << 20):
                    hasher.update(stream.read(start, min(1 << 20, tensor.end - start)))
                rows.append(Tensor(tensor.name, tensor.dtype, tensor.shape, Digest("b3", hasher.hexdigest())))
            stream.finish()
    if not rows:
        raise NotABase(path="the push", reason="there is no .safetensors file in it")
    files = {name: data for name in TOKENIZER_FILES if (data := reading.small(name, MAX_TOKENIZER_BYTES)) is not None}
    found = BaseModel.of(rows, config, tokenizer_digests(files))
    if found.digest != promised.digest:
        reason = f"its files hold base {found.digest}, not the promised {promised.digest}"
        raise NotABase(path="the push", reason=reason)
    return found


def check_headers(reading: Reading, promised: BaseModel) -> None:
    """Whether the files hold tensors of the promised names, dtypes and shapes; `NotABase` names one that differs."""
    config = _base_config(reading)
    unread = Digest("b3", "0" * 64)
    rows: list[Tensor] = []
    owner: dict[str, str] = {}
    for entry in reading.weights():
        with reading.open(entry) as reader:
            header = header_from(reader.read, entry.size, entry.path)
        _own(header, owner)
        rows += [Tensor(t.name, t.dtype, t.shape, unread) for t in header]
    found = {t.name: (t.dtype, t.shape) for t in canonical_tensors(rows, config)}
    table = {t.name: (t.dtype, t.shape) for t in promised.tensors}
    head = {promised.family.head} if promised.family else set()
    for name in sorted((found.keys() | table.keys()) - head):
        if found.get(name) != table.get(name):
            reason = f"tensor '{name}' is {found.get(name)}, the table says {table.get(name)}"
            raise NotABase(path="the push", reason=reason)


def _base_config(reading: Reading) -> dict[str, Any] | None:
    text = reading.small("config.json", MAX_CONFIG_BYTES)
    return parse_json(text, "config.json") if text is not None else None


def _own(header: Header, owner: dict[str, str]) -> None:
    for tensor in header:
        first = owner.setdefault(tensor.name, header.path)
        if first != header.path:
            raise DuplicateTensor(tensor=tensor.name, first=first, second=header.path)
    if len(owner) > MAX_TENSORS:
        raise NotABase(path="the push", reason=f"it has {len(owner)} tensors; at most {MAX_TENSORS} are allowed")


def read_next_base(database: Database, store: BlobStore, clock: Clock, *, lease: timedelta = LEASE) -> bool:
    """Read one base whose weights were only checked by parts; whether there was one.

    What turns out damaged is taken back: the base is without weights again, and the push says why.
    """
    parts = select(Base.manifest).where(Base.weights == "parts")
    waiting = and_(
        col(Push.manifest_digest).in_(parts), col(Push.state) == PushState.COMMITTED, col(Push.kind) == "base",
        col(Push.looks) < MOST_LOOKS,
    )  # fmt: skip
    claim = _claim(database, clock, waiting, lease)
    if claim is None:
        return False
    manifest = Manifest.parse(claim.push.manifest)
    with database.read() as session:
        base = commits.base_of(session, manifest)
        assert base.id is not None
        promised = fits.model_of(session, base.id)
    keys = {entry.digest: blobs.blob_key(entry.digest) for entry in manifest.files}
    error: LoractlError | None = None
    try:
        model = read_base(Reading(store, manifest, keys, claim.tick), promised)
    except LeaseGone:
        return True
    except Unavailable:
        _release(database, claim)
        raise
    except LoractlError as found:
        error = found
    try:
        damaged = _damaged(database, store, manifest, claim) if error else []
    except LeaseGone:
        return True
    except Unavailable:
        _release(database, claim)
        raise
    with database.write() as session:
        query = select(Base).where(Base.id == base.id).with_for_update().execution_options(populate_existing=True)
        row = session.exec(query).one()
        push = pushes.locked(session, claim.push.id)
        if push.lease_until != claim.until:
            return True  # another verifier has it
        push.lease_until = None
        session.add(push)
        if (row.manifest, row.weights) != (push.manifest_digest, "parts"):
            return True  # other files of the same base came meanwhile: what was read says nothing about them
        if error is None:
            bases.keep_full(session, row, model)
            session.exec(update(Blob).where(col(Blob.digest).in_(list(keys))).values(verified="full"))
        else:
            row.weights, row.manifest = "absent", None
            push.findings = [error.problem()]
            session.add(row)
            session.flush()
            for digest in damaged:
                blobs.remove_damaged(session, store, digest)
        audit.record(
            session,
            "base.read" if error is None else "base.damaged",
            base.digest,
            actor=audit.ITSELF,
            namespace=bases.NAMESPACE,
            reason=error.message if error else "",
            now=clock(),
            before={"weights": "parts"},
            after={"weights": row.weights},
        )
    log.info("base-read", base=base.digest, whole=error is None)
    return True


def _damaged(database: Database, store: BlobStore, manifest: Manifest, claim: Claim) -> list[str]:
    """Those of the manifest's blobs that nobody read before, and that are not the bytes of their name."""
    entries = {entry.digest: entry for entry in manifest.files}
    with database.read() as session:
        query = select(Blob.digest).where(col(Blob.digest).in_(list(entries)), Blob.verified == "parts")
        unread = session.exec(query.order_by(col(Blob.digest))).all()
    reading = Reading(store, manifest, {digest: blobs.blob_key(digest) for digest in unread}, claim.tick)
    found = []
    for digest in unread:
        try:
            with reading.open(entries[digest]) as reader:
                Stream(reader, entries[digest], claim.tick).finish()
        except (DigestMismatch, BlobNotFound):
            found.append(digest)
    return found


# ── datasets ─────────────────────────────────────────────────────────────────


def _read_dataset(reading: Reading, *, suite: bool) -> dict[str, Any]:
    rows = gate = calibration = 0
    seen: dict[str, str] = {}
    spec = SuiteSpec.parse(reading.manifest.config) if suite else None
    scored = require_files(spec.tasks if spec else (), (entry.path for entry in reading.manifest.files))
    for entry in reading.manifest.files:
        if not entry.path.endswith(".jsonl"):
            raise UnusableDataset(path=entry.path, reason="a dataset holds .jsonl files only")
        with reading.open(entry) as reader:
            sniff(reader.read(0, min(64, entry.size)), entry)
            stream = Stream(reader, entry, reading.tick)
            more, gated, calibrating = datasets.count_rows(
                stream.chunks(), entry.path, suite=spec, scored=entry.path in scored, seen=seen
            )
            stream.finish()
        rows, gate, calibration = rows + more, gate + gated, calibration + calibrating
    if not rows:
        raise UnusableDataset(path=reading.manifest.files[0].path, reason="there are no rows")
    return {"rows": rows, "gate_rows": gate, "calibration_rows": calibration}
