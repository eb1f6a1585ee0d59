"""Checkpoints in storage: where another worker goes on when the disk of a dead one is gone (docs/adr/0014).

    signed PUTs → checkpoints/{job}/{attempt}/{sha256} → recorded → signed GETs, until the job succeeded

A checkpoint is the files of a folder. Bytes go straight to the store, by URLs that cover key, length and SHA-256;
what arrived counts when it is recorded, in a transaction that checks the lease, so an attempt that is over records
nothing. A job has one row, its newest checkpoint, and every object that no row names is rubbish sooner or later:
`sweep` removes it, whoever died before.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta

from sqlmodel import Session, col, delete, select

from registry.core.digest import Digest
from registry.core.errors import BadRequest, CheckpointIncomplete, FileTooLarge, Unavailable
from registry.core.lifecycle import JobState
from registry.core.manifest import FileEntry, canonical_json, check_path
from registry.db.engine import Database
from registry.db.models import Checkpoint, Job
from registry.schemas import CheckpointInfo, CheckpointRequest, Download, SignedRequest
from registry.settings import Settings
from registry.storage.base import BlobStore, Stat

from . import jobs, pushes
from .tokens import Caller

MAX_FILE = 5_000_000_000
"""S3 takes at most 5 GB in one PUT."""
KEPT = timedelta(days=7)
"""How long the checkpoint of a job that failed or was cancelled waits for a retry."""
UPLOADING = timedelta(days=1)
"""How long an object of a running attempt may wait to be recorded."""


def uploads(
    session: Session,
    store: BlobStore,
    settings: Settings,
    caller: Caller,
    identity: str,
    asked: CheckpointRequest,
) -> dict[str, SignedRequest]:
    """Digest -> a signed PUT, for what the attempt's recorded checkpoint does not hold already."""
    job = jobs.held(session, caller, identity, asked.attempt)
    if len({check_path(entry.path) for entry in asked.files}) != len(asked.files):
        raise BadRequest(problems="files: a path is listed twice")
    size, largest = sum(entry.size for entry in asked.files), max(asked.files, key=lambda entry: entry.size)
    if size > settings.max_checkpoint_bytes:
        raise FileTooLarge(path=f"checkpoint of job {job.id}", size=size, limit=settings.max_checkpoint_bytes)
    if largest.size > MAX_FILE:
        raise FileTooLarge(path=largest.path, size=largest.size, limit=MAX_FILE)
    here = _keys(session.get(Checkpoint, job.id))
    signed = {}
    for entry in asked.files:
        if (key := _key(job.id, job.attempt, entry)) not in here:
            sha256, expires_s = Digest.parse(entry.digest), int(settings.url_ttl_s)
            signed[entry.digest] = pushes.signed(
                store.presign_put(key, size=entry.size, sha256=sha256, expires_s=expires_s)
            )
    return signed


def record(
    database: Database, store: BlobStore, caller: Caller, sent: Mapping[str, CheckpointRequest], now: datetime
) -> None:
    """Make each of ``sent`` the newest checkpoint of its job, all of them or none; what they replace is removed.

    Jobs that are trained together record one moment, so that all of them go on from it. Recording again, or late,
    changes nothing.

    Raises:
        CheckpointIncomplete: storage does not hold the promised bytes.
        LeaseLost: another attempt owns one of the jobs by now, or it is over.
    """
    for identity, asked in sent.items():
        with database.read() as session:
            jobs.held(session, caller, identity, asked.attempt)
            here = _keys(session.get(Checkpoint, identity))
        lacking = [
            entry.digest for entry in asked.files
            if (key := _key(identity, asked.attempt, entry)) not in here and not _holds(store.head(key), entry)
        ]  # fmt: skip
        if lacking:
            named = ", ".join(lacking[:5]) + (" …" if len(lacking) > 5 else "")
            raise CheckpointIncomplete(id=identity, step=asked.step, count=len(asked.files), digests=named)
    replaced: set[str] = set()
    with database.write() as session:
        for identity in sorted(sent):
            job = jobs.held(session, caller, identity, sent[identity].attempt)
            replaced |= _keep(session, job, sent[identity], now)
    with suppress(Unavailable):  # `sweep` removes what is left
        for key in replaced:
            store.delete(key)


def _keep(session: Session, job: Job, asked: CheckpointRequest, now: datetime) -> set[str]:
    """Write the job's row; the keys of what it named before and does not name any more."""
    row = session.get(Checkpoint, job.id)
    before = _keys(row)
    if row is not None and row.attempt == asked.attempt and (row.step, len(row.files)) > (asked.step, len(asked.files)):
        return set()  # a request that was overtaken
    files = [entry.model_dump(mode="json") for entry in sorted(asked.files, key=lambda entry: entry.path)]
    row = Checkpoint(
        job_id=job.id,
        attempt=asked.attempt,
        step=asked.step,
        digest=str(Digest.sha256(canonical_json(files))),
        size=sum(entry.size for entry in asked.files),
        files=files,
        created_at=now,
    )
    session.merge(row)
    return before - _keys(row)


def newest(
    session: Session, store: BlobStore, settings: Settings, caller: Caller, identity: str, attempt: int
) -> CheckpointInfo:
    """The recorded checkpoint with signed GETs, whichever attempt sent it."""
    job = jobs.held(session, caller, identity, attempt)
    row = session.get(Checkpoint, job.id)
    if row is None:
        return CheckpointInfo()
    found = []
    for entry in _files(row):
        get = store.presign_get(_key(job.id, row.attempt, entry), expires_s=int(settings.url_ttl_s))
        found.append(Download(path=entry.path, size=entry.size, digest=entry.digest, get=pushes.signed(get)))
    return CheckpointInfo(attempt=row.attempt, step=row.step, files=found)


def sweep(database: Database, store: BlobStore, now: datetime) -> int:
    """Forget checkpoints of jobs that ended long ago, and remove every object that no row names; how many went.

    Objects are listed before rows are read: once an attempt is over, nothing that it sent gets a row any more.
    """
    ended = (JobState.FAILED, JobState.CANCELLED)
    with database.write() as session:
        old = select(Job.id).where(col(Job.state).in_(ended), col(Job.finished_at) < now - KEPT)
        session.exec(delete(Checkpoint).where(col(Checkpoint.job_id).in_(old)))
    stored: dict[str, list[Stat]] = {}
    for stat in store.walk("checkpoints/"):
        stored.setdefault(stat.key.split("/")[1], []).append(stat)
    with database.read() as session:
        query = select(Job.id, Job.attempt).where(col(Job.id).in_(stored), Job.state == JobState.RUNNING)
        running = dict(session.exec(query).all())
        rows = session.exec(select(Checkpoint).where(col(Checkpoint.job_id).in_(stored))).all()
    named = {key for row in rows for key in _keys(row)}
    gone = 0
    for job_id, stats in stored.items():
        uploading = f"checkpoints/{job_id}/{running.get(job_id)}/"
        for stat in stats:
            may_come = stat.key.startswith(uploading) and stat.modified_at > (now - UPLOADING).timestamp()
            if stat.key not in named and not may_come:
                store.delete(stat.key)
                gone += 1
    return gone


def _holds(stat: Stat | None, entry: FileEntry) -> bool:
    """Whether these are the bytes; a store that keeps no digest compared it when they arrived."""
    return stat is not None and stat.size == entry.size and stat.sha256 in (None, Digest.parse(entry.digest))


def _files(row: Checkpoint | None) -> Iterable[FileEntry]:
    return [FileEntry.model_validate(entry) for entry in row.files] if row is not None else []


def _key(job_id: str, attempt: int, entry: FileEntry) -> str:
    return f"checkpoints/{job_id}/{attempt}/{Digest.parse(entry.digest).hex}"


def _keys(row: Checkpoint | None) -> set[str]:
    return {_key(row.job_id, row.attempt, entry) for entry in _files(row)} if row is not None else set()
