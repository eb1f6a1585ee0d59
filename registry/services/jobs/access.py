"""Jobs as rows: who may see them, how they are held while something changes, and what is written down of it."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session, col, select

from registry.core.errors import JobNotFound
from registry.core.lifecycle import JOB, JobState
from registry.db.models import Campaign, Job, JobEvent

from .. import audit
from ..tokens import Caller

_JOINED = "joined"
MAX_EVENTS = 10_000
"""Events kept of one job's attempts together; what a worker reports beyond is dropped."""
MAX_EVENT_BYTES = 4096
ACTIVE = (JobState.QUEUED, JobState.RUNNING)
CLAIMABLE = (col(Job.state) == JobState.QUEUED, col(Job.held_by).is_(None))


@dataclass(frozen=True, slots=True)
class Origin:
    """What asked for work, for logs and traces: the id of a request or of a schedule, and its place in a trace."""

    id: str | None = None
    traceparent: str | None = None


UNKNOWN = Origin()


def get(session: Session, caller: Caller, identity: str) -> Job:
    """A job that the caller may see; `JobNotFound`."""
    job = session.get(Job, identity)
    if job is None or not (caller.can("read", job.namespace) or job.token_id == caller.token_id):
        raise JobNotFound(id=identity)
    return job


def ended(
    session: Session, job: Job, problem: dict[str, Any], now: datetime, *, retryable: bool, cancelled: bool = False
) -> None:
    """An attempt is over without a result: the job waits again while attempts are left, else it has failed.

    What it took is kept, as a share of what those took that it was made with.
    """
    if job.started_at is not None:
        job.lost_seconds += max(0.0, (now - job.started_at).total_seconds()) / job.company
    again = retryable and job.attempt < job.max_attempts
    move = "cancel" if cancelled else "requeue" if again else "fail"
    job.state = JOB.after(move, job.state, job.id)
    job.lease_until, job.error = None, plain(problem)
    if move == "requeue" and _is_paused(session, job):
        job.held_by = job.campaign_id
    job.finished_at = None if move == "requeue" else now
    session.add(job)
    note(session, job, {"requeue": "requeued", "cancel": "cancelled", "fail": "failed"}[move], job.error, now)


def _is_paused(session: Session, job: Job) -> bool:
    """Whether only a campaign that begins nothing now wants the job."""
    campaign = session.get(Campaign, job.campaign_id) if job.campaign_id else None
    return campaign is not None and campaign.paused_at is not None and not is_shared(session, job)


def locked(session: Session, caller: Caller, identity: str) -> Job:
    """The job, held, for who may run work in its namespace; `JobNotFound`, `ScopeMissing`."""
    get(session, caller, identity)
    job = row(session, identity)
    assert job is not None
    caller.require("run", job.namespace)
    return job


def row(session: Session, identity: str) -> Job | None:
    """The job as it is now, held until the end of the transaction, whatever the session saw of it before."""
    query = select(Job).where(Job.id == identity).with_for_update().execution_options(populate_existing=True)
    return session.exec(query).first()


def join(session: Session, job: Job, asker: str, now: datetime) -> None:
    """Somebody else, a token or a campaign, asked for the same work."""
    if asker not in (job.campaign_id or job.created_by, *_joined(session, job)):
        session.add(JobEvent(job_id=job.id, attempt=job.attempt, kind=_JOINED, data={"asker": asker}, at=now))
        session.flush()


def is_shared(session: Session, job: Job) -> bool:
    """Whether others than who asked first count on the job."""
    return bool(_joined(session, job))


def _joined(session: Session, job: Job) -> list[str]:
    events = session.exec(select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.kind == _JOINED))
    return [str(data.get("asker")) for data in events]


def note(
    session: Session, job: Job, kind: str, data: dict[str, Any] | None, now: datetime, actor: str = audit.ITSELF
) -> None:
    """Write down what happened to the job; unless it is only progress, for the audit too."""
    session.add(JobEvent(job_id=job.id, attempt=job.attempt, kind=kind, data=plain(data or {}), at=now))
    if kind in ("log", "progress"):
        return
    before, after = audit.changed(job, "state", "attempt", "worker", "cancel_requested", "held_by", "max_attempts")
    said = (after or {}) | ({"kind": job.kind, "output": job.output} if before is None else {})
    audit.record(
        session,
        f"job.{kind}",
        job.id,
        actor=actor,
        namespace=job.namespace,
        reason=str((data or {}).get("detail", "")),
        now=now,
        before=before,
        after=said,
    )


def plain(value: Any) -> Any:
    """``value`` as any database keeps it: no NUL, no lone surrogate, no number that is not finite (None)."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {plain(str(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value
