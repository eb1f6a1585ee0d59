"""What a worker gets: the next job of its queue, those that go with it, and what they need."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case
from sqlmodel import Session, col, select

from registry.core.errors import BadRequest, NotYourJob, TokenRefused
from registry.core.lifecycle import JOB
from registry.core.names import SeriesName
from registry.core.recipes import BASE_ROLES, DATA_ROLES, inputs_of, parse_recipe
from registry.db import queries
from registry.db.models import Base, Dataset, DatasetVersion, Job
from registry.schemas import ClaimRequest

from ..pushes import BASES
from ..tokens import Caller, acting
from . import access

PATIENCE = timedelta(hours=1)
"""How long a job may be overtaken by others whose base is cached."""
_LOOKED_AT = 256
"""How many of a queue's jobs on one base are looked at for those that can be trained together."""


def claim(
    session: Session, caller: Caller, request: ClaimRequest, lease_s: float, now: datetime, agent: str = ""
) -> Job | None:
    """The next job of a queue for this worker, leased; None when there is none. ``agent``: the worker's program.

    Jobs on bases that the worker has cached come first within a priority, unless others have waited for long.
    Two that claim at once get two jobs.
    """
    if request.queue not in caller.queues():
        raise NotYourJob(id=f"queue {request.queue[:64]}")
    here = select(Base.digest).where(col(Base.manifest).in_(request.cached))
    turn = case((col(Job.created_at) < now - PATIENCE, 0), (col(Job.base).in_(here), 1), else_=2)
    query = select(Job).where(Job.queue == request.queue, *access.CLAIMABLE)
    query = query.order_by(col(Job.priority).desc(), turn, col(Job.created_at), col(Job.id)).limit(1)
    job = session.exec(query.with_for_update(skip_locked=True)).first()
    if job is not None:
        _lease(session, caller, request, job, lease_s, now, agent)
    return job


def _lease(
    session: Session,
    caller: Caller,
    request: ClaimRequest,
    job: Job,
    lease_s: float,
    now: datetime,
    agent: str = "",
) -> None:
    job.state = JOB.after("claim", job.state, job.id)
    job.attempt += 1
    job.lease_until = now + timedelta(seconds=lease_s)
    job.token_id, job.worker = caller.token_id, request.worker
    job.started_at, job.progress, job.error, job.company = now, None, None, 1
    session.add(job)
    who = {"worker": request.worker} | ({"agent": agent[:100]} if agent else {})
    access.note(session, job, "claimed", who, now, caller.token_id)


def claim_beside(
    session: Session, caller: Caller, request: ClaimRequest, first: Job, lease_s: float, now: datetime
) -> list[Job]:
    """Those that are trained together with ``first`` on one loaded base, in the order of the queue, each leased.

    A last attempt is made alone: what ends a whole process cannot use up the attempts of others as well.
    """
    if request.group == 1 or _shares(first) is None or first.attempt >= first.max_attempts:
        return []
    query = select(Job).where(Job.queue == first.queue, *access.CLAIMABLE)
    query = query.where(Job.kind == first.kind, Job.base == first.base)
    query = query.order_by(col(Job.priority).desc(), col(Job.created_at), col(Job.id)).limit(_LOOKED_AT)
    found = session.exec(query.with_for_update(skip_locked=True)).all()
    fitting = [job for job in found if _shares(job) == _shares(first) and job.attempt + 1 < job.max_attempts]
    beside = fitting[: request.group - 1]
    for job in beside:
        _lease(session, caller, request, job, lease_s, now)
    for job in (first, *beside):
        job.company = 1 + len(beside)
    return beside


def _shares(job: Job) -> tuple[str, str, str] | None:
    """What two jobs of a kind must have alike to be trained on one loaded base; None for work that is done alone."""
    own = job.recipe if job.kind == "finetune" else None
    training = job.recipe.get("training") or job.recipe.get("distil") if job.kind == "rebase" else own
    if training is None or job.recipe.get("sharded"):
        return None
    return job.base, str(training.get("precision")), str(training.get("quantised"))


def inputs(session: Session, job: Job) -> dict[str, str]:
    """role -> manifest digest of what the job's worker must fetch."""
    found = {}
    for role, digest in inputs_of(parse_recipe(job.recipe)).items():
        if role in BASE_ROLES:
            base = queries.base_by_digest(session, digest)
            if base is not None and base.manifest is not None:
                found[role] = base.manifest
        else:
            found[role] = digest
    return found


def specs(session: Session, job: Job) -> dict[str, dict[str, Any]]:
    """role -> spec of the suites among the job's inputs."""
    wanted = {digest: role for role, digest in inputs(session, job).items() if role == "suite"}
    rows = session.exec(select(DatasetVersion).where(col(DatasetVersion.digest).in_(wanted)))
    return {wanted[row.digest]: row.spec for row in rows}


def called(session: Session, job: Job, now: datetime) -> dict[str, str]:
    """role -> what people call the datasets and suites among the job's inputs, for its refusals.

    Equal content may lie under many names: the job's own namespace goes first. Who asked for the job hears of no name
    that they may not read.
    """
    try:
        asker = acting(session, job.created_by, now)
    except TokenRefused:
        return {}
    wanted = {role: digest for role, digest in inputs(session, job).items() if role.startswith(DATA_ROLES)}
    query = select(DatasetVersion.digest, DatasetVersion.number, Dataset).join(Dataset)
    query = query.where(col(DatasetVersion.digest).in_(wanted.values())).order_by(col(Dataset.id))
    found: dict[tuple[str, str], tuple[bool, str]] = {}
    for digest, number, data in session.exec(query):
        name = (data.namespace != job.namespace, f"{data.namespace}/{data.name}@v{number}")
        if asker.can("read", data.namespace):
            found[data.kind, digest] = min(name, found.get((data.kind, digest), name))
    kinds = {role: "suite" if role == "suite" else "dataset" for role in wanted}
    return {role: found[kinds[role], digest][1] for role, digest in wanted.items() if (kinds[role], digest) in found}


def output_series(job: Job, kind: str) -> SeriesName:
    """The series that a job's push goes to: the adapter or the line that was asked for; `BadRequest` for others."""
    if kind == "adapter" and job.output.get("adapter"):
        return SeriesName.parse(job.output["adapter"])
    if kind == "base" and job.output.get("line"):
        return SeriesName(BASES, job.output["line"])
    raise BadRequest(problems=f"job {job.id} has no output of kind '{kind[:20]}'")
