"""Jobs and their events, looked at."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from sqlalchemy import func
from sqlmodel import Session, col, select

from registry.core.errors import BadRequest
from registry.db.models import Adapter, Base, Dataset, DatasetVersion, Job, JobEvent, Version
from registry.schemas import JobInfo

from .. import bases
from ..tokens import Caller
from . import access

_DIGEST = re.compile(r"(?:sha256|b3):[0-9a-f]{64}")


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


def info(job: Job, *, reused: bool = False, names: Mapping[str, str] | None = None) -> JobInfo:
    """A job in the words of the wire."""
    told = {**job.model_dump(), "campaign": job.campaign_id, "reused": reused, "names": names or {}}
    return JobInfo.model_validate(told, strict=False)


def names(session: Session, caller: Caller, job: Job) -> dict[str, str]:
    """Digest in the job's recipe -> what people call it, where the caller may read it; its own namespace goes first."""
    digests = set(_DIGEST.findall(json.dumps(job.recipe)))  # of any release's recipe
    versions = select(Version.digest, Adapter.namespace, Adapter.name, Version.number).join(Adapter)
    data = select(DatasetVersion.digest, Dataset.namespace, Dataset.name, DatasetVersion.number).join(Dataset)
    found = [
        *session.exec(versions.where(col(Version.digest).in_(digests))),
        *session.exec(data.where(col(DatasetVersion.digest).in_(digests))),
    ]
    mine = sorted((row for row in found if caller.can("read", row[1])), key=lambda row: row[1] == job.namespace)
    called = {digest: f"{namespace}/{name}@v{number}" for digest, namespace, name, number in mine}
    of = session.exec(select(Base).where(col(Base.digest).in_(digests))).all()
    labels = bases.labels(session, of)
    return called | {base.digest: labels[base.id] for base in of if base.id is not None}


def waiting(session: Session) -> dict[str, int]:
    """Queues that have work, and how many jobs wait there."""
    query = select(Job.queue, func.count()).where(*access.CLAIMABLE).group_by(Job.queue)
    return dict(session.exec(query).all())
