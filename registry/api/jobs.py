"""Routes of jobs: asked for by people, claimed and finished by workers, watched by anybody who may read."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from registry.core.errors import LoractlError
from registry.core.lifecycle import JobState
from registry.db.models import Job
from registry.schemas import (
    CheckpointInfo,
    CheckpointRequest,
    CheckpointsRequest,
    CheckpointUploads,
    ClaimInfo,
    ClaimRequest,
    DownloadInfo,
    FailRequest,
    FinishRequest,
    HeartbeatInfo,
    HeartbeatRequest,
    JobInfo,
    JobPushRequest,
    JobRequest,
    Page,
    PushInfo,
)
from registry.services import checkpoints, downloads, jobs, pushes

from .deps import AppParts, Asked, InTurn, Parts, User, Worker, anyone, user
from .pages import Limit, behind, cursor

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
_POLL_S = 0.5
log = structlog.get_logger()
_FINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@router.post("", status_code=201, responses={200: {"model": JobInfo, "description": "It was there already"}})
def submit_job(request: JobRequest, parts: Parts, caller: User, asked: Asked, response: Response) -> JobInfo:
    """Ask for work; 200 and the job that is there already when it is equal."""
    with parts.database.write() as session:
        job, reused = jobs.submit(session, caller, request, parts.clock(), origin=asked)
        info = jobs.info(job, reused=reused)
    if reused:
        response.status_code = 200
        log.info("job-reused", job=info.id, origin=info.origin)
    else:
        log.info("job-queued", job=info.id, kind=info.kind, queue=info.queue, namespace=info.namespace)
        parts.broker.wake(info.queue)
    return info


@router.get("")
def list_jobs(
    parts: Parts,
    caller: User,
    state: JobState | None = None,
    campaign: str | None = None,
    limit: Limit = 50,
    after: Annotated[str | None, Query(alias="cursor")] = None,
) -> Page[JobInfo]:
    """Jobs, newest first."""
    key = behind(after, ("", "")) if after else None
    with parts.database.read() as session:
        rows = jobs.page(session, caller, state=state, campaign=campaign, after=key, limit=limit)
        more = cursor(rows[-1].created_at.isoformat(), rows[-1].id) if len(rows) == limit else None
        return Page(items=[jobs.info(row) for row in rows], cursor=more)


@router.post("/claim")
def claim_job(
    request: ClaimRequest, parts: InTurn, caller: Worker, user_agent: Annotated[str, Header()] = ""
) -> ClaimInfo:
    """The next job of a queue, leased to this worker, and with ``group`` others that share its base; or none."""
    with parts.database.write() as session:
        job = jobs.claim(session, caller, request, parts.settings.lease_s, parts.clock(), user_agent)
        if job is None:
            return ClaimInfo(job=None)
        beside = jobs.claim_beside(session, caller, request, job, parts.settings.lease_s, parts.clock())
        first, *others = [
            ClaimInfo(
                job=jobs.info(one),
                traceparent=one.traceparent,
                lease_s=parts.settings.lease_s,
                inputs=jobs.inputs(session, one),
                specs=jobs.specs(session, one),
                called=jobs.called(session, one, parts.clock()),
            )
            for one in (job, *beside)
        ]
    for one in (first, *others):
        assert one.job is not None
        job_ = one.job
        log.info(
            "job-claimed", job=job_.id, attempt=job_.attempt, campaign=job_.campaign, origin=job_.origin,
            worker=request.worker,
        )  # fmt: skip
    return first.model_copy(update={"others": others})


@router.get("/{identity}")
def show_job(identity: str, parts: Parts, caller: User) -> JobInfo:
    """One job."""
    with parts.database.read() as session:
        job = jobs.get(session, caller, identity)
        return jobs.info(job, names=jobs.names(session, caller, job))


@router.get("/{identity}/events")
async def watch_job(
    identity: str,
    request: Request,
    parts: Parts,
    _: User,
    last_event_id: Annotated[str | None, Header()] = None,
    follow: bool = True,
) -> Response:
    """Events of a job as they come (server-sent events), from behind ``Last-Event-ID``; ends with the job."""
    start = int(last_event_id) if last_event_id and re.fullmatch(r"\d{1,18}", last_event_id, re.ASCII) else 0

    def look(after: int) -> tuple[list[tuple[int, str]], bool]:
        caller = user(anyone(request))  # a token that was revoked meanwhile sees no more
        with parts.database.read() as session:
            ended = jobs.get(session, caller, identity).state in _FINAL
            found = jobs.events(session, identity, after=after)
            lines = [
                (
                    row.id or 0,
                    json.dumps({"attempt": row.attempt, "kind": row.kind, "data": row.data, "at": row.at.isoformat()}),
                )
                for row in found
            ]
            return lines, ended and not lines

    await asyncio.to_thread(look, start)  # refuse before the stream begins

    async def stream() -> AsyncIterator[str]:
        seen = start
        while not await request.is_disconnected():
            try:
                lines, ended = await asyncio.to_thread(look, seen)
            except LoractlError:
                return  # the client comes back behind its last event, and is told then
            for seen, line in lines:
                yield f"id: {seen}\nevent: job\ndata: {line}\n\n"
            if ended or not (follow or lines):
                yield "event: end\ndata: {}\n\n"
                return
            if not lines:
                yield ": waiting\n\n"
                await asyncio.sleep(_POLL_S)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.post("/{identity}/cancel")
def cancel_job(identity: str, parts: InTurn, caller: User) -> JobInfo:
    """Cancel: at once when queued, by a word to its worker when running."""
    with parts.database.write() as session:
        return jobs.info(jobs.cancel(session, caller, identity, parts.clock()))


@router.post("/{identity}/retry")
def retry_job(identity: str, parts: Parts, caller: User, asked: Asked) -> JobInfo:
    """Queue a failed or cancelled job again."""
    with parts.database.write() as session:
        info = jobs.info(jobs.retry(session, caller, identity, parts.clock(), origin=asked))
    log.info("job-queued", job=info.id, kind=info.kind, queue=info.queue, namespace=info.namespace)
    parts.broker.wake(info.queue)
    return info


@router.post("/{identity}/heartbeat")
def heartbeat(identity: str, request: HeartbeatRequest, parts: InTurn, caller: Worker) -> HeartbeatInfo:
    """A sign of life with progress; tells whether to stop."""
    with parts.database.write() as session:
        job = jobs.heartbeat(
            session,
            caller,
            identity,
            attempt=request.attempt,
            progress=request.progress,
            reported=request.events,
            lease_s=parts.settings.lease_s,
            now=parts.clock(),
        )
        assert job.lease_until is not None
        return HeartbeatInfo(cancel=job.cancel_requested or job.held_by is not None, lease_until=job.lease_until)


@router.get("/{identity}/inputs")
def download_inputs(identity: str, attempt: int, parts: Parts, caller: Worker) -> DownloadInfo:
    """Signed URLs of the job's inputs, for the worker that holds it."""
    with parts.database.read() as session:
        manifests = set(jobs.inputs(session, jobs.held(session, caller, identity, attempt)).values())
        return DownloadInfo(files=downloads.files(session, parts.store, parts.settings, manifests))


@router.post("/{identity}/pushes")
def push_output(identity: str, request: JobPushRequest, parts: Parts, caller: Worker) -> PushInfo:
    """Open a push of the job's output; it is committed by the job's end."""
    with parts.database.write() as session:
        job = jobs.held(session, caller, identity, request.attempt)
        manifest_kind = request.push.manifest.get("kind")
        series = jobs.output_series(job, str(manifest_kind))
        push = pushes.open_push(
            session,
            caller,
            parts.settings,
            kind="base" if manifest_kind == "base" else "adapter",
            series=series,
            request=request.push,
            now=parts.clock(),
            job=job,
        )
    with parts.database.read() as session:
        return pushes.describe(session, parts.store, parts.settings, push, parts.clock())


@router.post("/{identity}/checkpoint")
def send_checkpoint(identity: str, request: CheckpointRequest, parts: Parts, caller: Worker) -> CheckpointUploads:
    """Signed PUTs for the files of a checkpoint, for the worker that holds the job."""
    with parts.database.read() as session:
        return CheckpointUploads(
            put=checkpoints.uploads(session, parts.store, parts.settings, caller, identity, request)
        )


@router.post("/checkpoints", status_code=204)
def record_checkpoints(request: CheckpointsRequest, parts: Parts, caller: Worker) -> None:
    """Record checkpoints that were sent, those of all named jobs or none."""
    checkpoints.record(parts.database, parts.store, caller, request.checkpoints, parts.clock())


@router.get("/{identity}/checkpoint")
def show_checkpoint(identity: str, attempt: int, parts: Parts, caller: Worker) -> CheckpointInfo:
    """The newest recorded checkpoint with signed GETs, for the worker that holds the job."""
    with parts.database.read() as session:
        return checkpoints.newest(session, parts.store, parts.settings, caller, identity, attempt)


@router.post("/{identity}/finish")
def finish_job(identity: str, request: FinishRequest, parts: Parts, caller: Worker) -> JobInfo:
    """End the job with what it made, in one transaction."""
    now = parts.clock()
    with parts.database.write() as session:
        job = jobs.finish(session, parts.store, caller, identity, request, now)
        info = jobs.info(job)
    _ended(parts, job, now)
    return info


@router.post("/{identity}/fail")
def fail_job(identity: str, request: FailRequest, parts: Parts, caller: Worker) -> JobInfo:
    """The attempt ended without a result; the reconciler wakes for the next one, after a breath."""
    now = parts.clock()
    with parts.database.write() as session:
        job = jobs.fail(session, caller, identity, **request.model_dump(), now=now)
        info = jobs.info(job)
    _ended(parts, job, now)
    return info


def _ended(parts: AppParts, job: Job, now: datetime) -> None:
    """Log and measure what ended just now, not what is said to have ended once more."""
    if job.finished_at == now and job.started_at is not None:
        about = {"job": job.id, "attempt": job.attempt, "campaign": job.campaign_id, "origin": job.origin}
        log.info("job-ended", **about, state=job.state)
        parts.meters.jobs.labels(job.kind, job.state).observe((now - job.started_at).total_seconds())
