"""Jobs that are stopped, held back or let go: by a person, a campaign, or the end of a lease."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement
from sqlmodel import Session, col, select

from registry.core.errors import LeaseLost
from registry.core.lifecycle import JOB, JobState
from registry.db.models import Job

from .. import audit
from ..tokens import Caller
from . import access


def cancel(session: Session, caller: Caller, identity: str, now: datetime) -> Job:
    """Cancel at once when queued; ask the worker to stop when running. Cancelling again is fine."""
    return _stopped(session, access.locked(session, caller, identity), caller.name, now, caller.token_id)


def withdraw(session: Session, campaign_id: str, identity: str, now: datetime) -> None:
    """Cancel a job that a campaign asked for, when it needs it no more; whatever became of its creator's rights.

    One that somebody else asked for since goes on.
    """
    job = access.row(session, identity)
    mine = job is not None and job.campaign_id == campaign_id and job.state in access.ACTIVE
    if job is not None and mine and not access.is_shared(session, job):
        _stopped(session, job, f"campaign {campaign_id}", now)


def hold(session: Session, campaign_id: str, now: datetime, *, running: bool) -> None:
    """Keep a campaign's queued jobs from being claimed; with ``running`` also stop those that run, to go on later."""
    states = access.ACTIVE if running else (JobState.QUEUED,)
    for job in _of_campaign(session, campaign_id, col(Job.state).in_(states)):
        job.held_by = campaign_id
        session.add(job)
        access.note(session, job, "held", {"by": f"campaign {campaign_id}"}, now)


def let_go(session: Session, campaign_id: str, now: datetime) -> set[str]:
    """Undo `hold`; queues that have work again."""
    found = _of_campaign(session, campaign_id, col(Job.held_by) == campaign_id)
    for job in found:
        job.held_by = None
        session.add(job)
        access.note(session, job, "let-go", {"by": f"campaign {campaign_id}"}, now)
    return {job.queue for job in found}


def _of_campaign(session: Session, campaign_id: str, which: ColumnElement[bool]) -> Sequence[Job]:
    query = select(Job).where(Job.campaign_id == campaign_id, which).order_by(col(Job.id))
    return session.exec(query.with_for_update().execution_options(populate_existing=True)).all()


def _stopped(session: Session, job: Job, by: str, now: datetime, actor: str = audit.ITSELF) -> Job:
    if job.state == JobState.CANCELLED or (job.state == JobState.RUNNING and job.cancel_requested):
        return job
    if job.state == JobState.RUNNING:
        job.cancel_requested = True
        session.add(job)
        access.note(session, job, "cancelling", {"by": by}, now, actor)
        return job
    job.state = JOB.after("cancel", job.state, job.id)
    job.finished_at = now
    session.add(job)
    access.note(session, job, "cancelled", {"by": by}, now, actor)
    return job


def requeue_expired(session: Session, now: datetime, limit: int = 100) -> list[Job]:
    """Take back leases that ran out; the attempt they belonged to is refused from now on."""
    query = select(Job).where(Job.state == JobState.RUNNING, col(Job.lease_until) < now).limit(limit)
    expired = session.exec(query.with_for_update(skip_locked=True)).all()
    for job in expired:
        lost = LeaseLost(id=job.id, attempt=job.attempt, state="without a sign of life")
        access.ended(session, job, lost.problem(), now, retryable=True, cancelled=job.cancel_requested)
    return list(expired)
