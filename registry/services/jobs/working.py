"""What a worker says of an attempt that it holds: alive, done with what it made, or given up."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func
from sqlmodel import Session, col, delete, select

from registry.core.digest import Digest
from registry.core.errors import BadRequest, LeaseLost, NotYourJob, TokenRefused, WorkFailed
from registry.core.lifecycle import JOB, JobState
from registry.core.recipes import Answers, AnyRecipe, Evaluate, MakesAdapter, MakesBase, parse_recipe
from registry.core.recipes import Compare as CompareRecipe
from registry.core.records import parse_records
from registry.db import queries
from registry.db.models import Adapter, Checkpoint, Dataset, DatasetVersion, Job, JobEvent, Version
from registry.schemas import FinishRequest, ScoredInfo
from registry.storage.base import BlobStore

from .. import bases, blobs, commits, evaluations, fits, pools
from ..tokens import Caller, acting
from . import access


def held(session: Session, caller: Caller, identity: str, attempt: int) -> Job:
    """The caller's running job, locked; `NotYourJob` for somebody else's, `LeaseLost` for an attempt that is over."""
    job = access.row(session, identity)
    if job is None or job.token_id != caller.token_id:
        raise NotYourJob(id=identity[:64])
    if job.state != JobState.RUNNING or job.attempt != attempt:
        raise LeaseLost(id=identity, attempt=attempt, state=job.state)
    return job


def heartbeat(
    session: Session,
    caller: Caller,
    identity: str,
    *,
    attempt: int,
    progress: dict[str, Any] | None,
    reported: Sequence[dict[str, Any]],
    lease_s: float,
    now: datetime,
) -> Job:
    """Extend the lease and keep what the attempt reports."""
    job = held(session, caller, identity, attempt)
    job.lease_until = now + timedelta(seconds=lease_s)
    if progress is not None:
        job.progress = access.plain(progress)
    if reported:
        known = session.exec(select(func.count()).where(JobEvent.job_id == job.id)).one()
        for event in reported[: max(0, access.MAX_EVENTS - known)]:
            if len(json.dumps(event)) <= access.MAX_EVENT_BYTES:
                access.note(session, job, "log" if event.get("kind") == "log" else "progress", event, now)
    session.add(job)
    return job


def finish(
    session: Session, store: BlobStore, caller: Caller, identity: str, request: FinishRequest, now: datetime
) -> Job:
    """End the job with what it made, in this one transaction; the same words again change nothing.

    A job whose cancellation was asked for ends cancelled, and nothing of it is kept.
    """
    job = access.row(session, identity)
    if (
        job is not None
        and job.token_id == caller.token_id
        and job.state == JobState.SUCCEEDED
        and job.attempt == request.attempt
    ):
        return job
    job = held(session, caller, identity, request.attempt)
    if job.cancel_requested:
        stopped = WorkFailed(id=identity, reason="cancelled")
        access.ended(session, job, stopped.problem(), now, retryable=False, cancelled=True)
        return job
    recipe = parse_recipe(job.recipe)
    made = _made(session, job, recipe, request.pushes, now)
    if isinstance(recipe, Evaluate):
        _keep_evaluations(session, store, job, recipe, request.evaluations, now)
    if isinstance(recipe, Answers):
        pools.keep(session, store, job, recipe, request.answers, now)
    if isinstance(recipe, CompareRecipe):
        _keep_comparison(session, job, recipe, request.result, now)
    session.exec(delete(Checkpoint).where(col(Checkpoint.job_id) == job.id))
    job.state = JOB.after("succeed", job.state, identity)
    job.lease_until, job.finished_at = None, now
    job.result = access.plain({**request.result, "made": made})
    session.add(job)
    access.note(session, job, "succeeded", {"made": made}, now, caller.token_id)
    return job


def _made(session: Session, job: Job, recipe: AnyRecipe, pushed: Sequence[str], now: datetime) -> list[dict[str, Any]]:
    """Commit the one push of a job that makes something; the outcome of each."""
    wanted = "adapter" if isinstance(recipe, MakesAdapter) else "base" if isinstance(recipe, MakesBase) else None
    if len(pushed) != (wanted is not None):
        raise BadRequest(problems=f"pushes: a job of kind '{job.kind}' makes {f'one {wanted}' if wanted else 'none'}")
    return [commits.commit_verified(session, identity, job, now) for identity in pushed]


def _suite_of(session: Session, job: Job, recipe: Evaluate, now: datetime) -> DatasetVersion:
    """The suite as the job knows it: equal content may lie elsewhere too, under a name that its people may not read."""
    query = select(DatasetVersion, Dataset).join(Dataset).where(DatasetVersion.digest == recipe.suite)
    rows = session.exec(query.order_by(col(DatasetVersion.id))).all()
    ranks = _rank(session, job, [data.namespace for _, data in rows], now)
    return min(zip(ranks, rows, strict=True), key=lambda ranked: ranked[0])[1][0]


def _scored(session: Session, job: Job, digest: str, now: datetime) -> list[Version]:
    """The versions with this content that the score is told of: the job's own, else others that its asker may run."""
    query = select(Version, Adapter).join(Adapter).where(Version.digest == digest).order_by(col(Version.id))
    rows = session.exec(query).all()
    ranks = _rank(session, job, [adapter.namespace for _, adapter in rows], now)
    return [version for rank, (version, _) in zip(ranks, rows, strict=True) if rank == min(ranks)]


def _rank(session: Session, job: Job, namespaces: Sequence[str], now: datetime) -> list[int]:
    """Of each: 0 the job's own, 1 where its asker may run, 2 read, 3 neither."""
    asker = None
    with suppress(TokenRefused):
        asker = acting(session, job.created_by, now)

    def rank(namespace: str) -> int:
        if namespace == job.namespace:
            return 0
        may = [asker is not None and asker.can(scope, namespace) for scope in ("run", "read")]
        return may.index(True) + 1 if any(may) else 3

    return [rank(namespace) for namespace in namespaces]


def _keep_evaluations(
    session: Session, store: BlobStore, job: Job, recipe: Evaluate, found: Iterable[ScoredInfo], now: datetime
) -> None:
    base, suite = queries.base_by_digest(session, recipe.base), _suite_of(session, job, recipe, now)
    assert base is not None
    scored: set[str | None] = set()
    for item in found:
        adapter = item.adapter
        if (adapter not in recipe.adapters if adapter else not recipe.bare) or adapter in scored:
            raise BadRequest(problems=f"evaluation of {adapter or 'the base'}, which the job was not asked to score")
        scored.add(adapter)
        body = item.records.encode()
        records = parse_records(body)
        digest = Digest.sha256(body)
        blobs.put(session, store, digest, body, now)
        for version in _scored(session, job, adapter, now) if adapter else (None,):
            evaluations.record(
                session,
                store,
                base=base,
                version=version,
                suite=suite,
                harness=item.harness,
                records=records,
                blob=digest,
                job_id=job.id,
                seconds=item.seconds,
                now=now,
            )
    wanted = {*recipe.adapters, *((None,) if recipe.bare else ())}
    if scored != wanted:
        raise BadRequest(problems=f"the job has to score {len(wanted)} things and reports {len(scored)}")


def _keep_comparison(session: Session, job: Job, recipe: CompareRecipe, result: dict[str, Any], now: datetime) -> None:
    old, new = queries.base_by_digest(session, recipe.old), queries.base_by_digest(session, recipe.base)
    assert old is not None and new is not None
    cast = result.get("cast")
    bases.record_derivation(
        session,
        child=new,
        parent=old,
        kind="cast" if cast else "continued",
        evidence="measured",
        detail={"dtype": cast, "drift": result.get("drift"), "median": result.get("median"), "job": job.id},
        now=now,
    )
    fits.recompute(session, old=old, new=new)


def fail(
    session: Session,
    caller: Caller,
    identity: str,
    *,
    attempt: int,
    problem: dict[str, Any],
    retryable: bool,
    cancelled: bool,
    now: datetime,
) -> Job:
    """The attempt ended without a result: queued again while attempts are left, else failed; or cancelled.

    A worker that stopped because a paused campaign held its job has used up no attempt: the job goes on later,
    from its checkpoint.
    """
    job = held(session, caller, identity, attempt)
    if cancelled and not job.cancel_requested:
        job.max_attempts += 1
        retryable = True
    access.ended(session, job, problem, now, retryable=retryable, cancelled=job.cancel_requested)
    return job
