"""Jobs and their events, looked at."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import func
from sqlmodel import Session, col, select

from registry.core.errors import BadRequest
from registry.db.models import Job, JobEvent
from registry.schemas import JobInfo

from ..tokens import Caller
from . import access


def page(
    session: Session,
    caller: Caller,
    *,
    state: str | None,
    campaign: str | None,
    after: tuple[str, str] | None,
    limit: int,
) -> Sequence[Job]:
    """Jobs that the caller may see, newest first, behind (time, id)."""
    query = select(Job)
    namespaces = caller.readable()
    if namespaces is not None:
        query = query.where(col(Job.namespace).in_(namespaces))
    if state is not None:
        query = query.where(Job.state == state)
    if campaign is not None:
        query = query.where(Job.campaign_id == campaign)
    if after is not None:
        try:
            when = datetime.fromisoformat(after[0]).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise BadRequest(problems="the cursor is not one of this list") from error
        query = query.where((col(Job.created_at) < when) | ((col(Job.created_at) == when) & (col(Job.id) < after[1])))
    return session.exec(query.order_by(col(Job.created_at).desc(), col(Job.id).desc()).limit(limit)).all()


def events(session: Session, job_id: str, *, after: int, limit: int = 500) -> Sequence[JobEvent]:
    """Events of a job behind an id, in order."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, col(JobEvent.id) > after)
    return session.exec(query.order_by(col(JobEvent.id)).limit(limit)).all()


def info(job: Job, *, reused: bool = False) -> JobInfo:
    """A job in the words of the wire."""
    return JobInfo.model_validate({**job.model_dump(), "campaign": job.campaign_id, "reused": reused}, strict=False)


def waiting(session: Session) -> dict[str, int]:
    """Queues that have work, and how many jobs wait there."""
    query = select(Job.queue, func.count()).where(*access.CLAIMABLE).group_by(Job.queue)
    return dict(session.exec(query).all())
