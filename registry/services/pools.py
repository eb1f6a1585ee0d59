"""Pools: what versions answered to unlabelled inputs, on what they differ, and what people say of that.

Answers come in only through the end of a job, as records do (`registry.services.evaluations`). Who may promote may
label, and is on record; what is decided is the matter of `registry.core.pool`.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlmodel import Session, col, select

from registry.core import pool as core
from registry.core.campaign import PoolFacts
from registry.core.digest import Digest
from registry.core.errors import BadRequest, LoractlError, PoolUnusable
from registry.core.gate import Verdict
from registry.core.lifecycle import JobState
from registry.core.policy import Policy
from registry.core.pool import Answered
from registry.core.recipes import Answers
from registry.db.models import Base, DatasetVersion, Job, PoolAnswers, PoolPaper
from registry.schemas import AnsweredInfo
from registry.storage.base import BlobStore

from . import blobs
from .references import find_data, find_dataset
from .tokens import Caller


def require_usable(session: Session, caller: Caller, policy: Policy, name: str) -> str | None:
    """What is good to know of the pool that a policy of ``name`` asks for; None without one.

    `PoolUnusable` with the reason where it can decide nothing, `DatasetNotFound` where it is not there.
    """
    if policy.pool is None:
        return None
    if (reason := core.problem(policy)) is None:
        data = find_dataset(session, caller, "dataset", policy.pool)
        needed = core.smallest_pool(policy)
        if reason := _size_problem(data) or _count_problem(data, needed):
            pass
        else:
            return f"{policy.pool}: {data.rows} rows; without a flip, at least {needed} inputs are needed"
    raise PoolUnusable(pool=policy.pool, name=name, reason=reason)


def _size_problem(data: DatasetVersion) -> str | None:
    if data.rows > core.MOST_INPUTS or data.size > core.MOST_BYTES:
        most = f"{core.MOST_INPUTS} rows and {core.MOST_BYTES >> 20} MiB are the most"
        return f"it has {data.rows} rows and {data.size >> 20} MiB; {most}"
    return None


def _count_problem(data: DatasetVersion, needed: int | None) -> str | None:
    if needed is None or data.rows < needed:
        return f"it has {data.rows} rows; with the gate's margin nothing can pass below {needed or 'any number'}"
    return None


def facts_of(
    session: Session, actor: Caller, policy: Policy, old: Base, known: PoolFacts | None
) -> PoolFacts | None:
    """The policy's pool as a campaign finds it; what was asked of it is kept while it is the one that was asked."""
    if policy.pool is None:
        return None
    if known is not None and known.name == policy.pool and known.tier is not None:
        return known.model_copy(update=_progressed(session, known))
    data, missing = None, core.problem(policy)
    try:
        data = find_data(session, actor, "dataset", policy.pool)
        missing = missing or _size_problem(data) or _count_problem(data, core.smallest_pool(policy))
        if old.weights != "full":
            missing = missing or f"what serves answers on base {old.digest[:15]}, whose weights are not here"
    except LoractlError as error:
        missing = missing or f"{error.message} Push it: loractl dataset push FILE {policy.pool}"
    return PoolFacts(name=policy.pool, data=data.digest if data else None, missing=missing or "")


def _progressed(session: Session, known: PoolFacts) -> dict[str, object]:
    found: dict[str, object] = {}
    seconds = 0.0
    for side in ("serving", "candidate"):
        progress = getattr(known, side)
        job = session.get(Job, progress.id) if progress.id else None
        if job is not None:
            error = str((job.error or {}).get("detail", ""))
            found[side] = progress.model_copy(update={"job": JobState(job.state), "error": error})
            told = (job.result or {}).get("seconds")
            seconds += float(told) if isinstance(told, int | float) and told > 0 else 0.0
    return found | {"seconds": seconds}


# ── answers ──────────────────────────────────────────────────────────────────


def keep(
    session: Session, store: BlobStore, job: Job, recipe: Answers, found: Iterable[AnsweredInfo], now: datetime
) -> None:
    """Store what a job brings: an answer of everybody who was asked, all to the same inputs; else `BadRequest`."""
    asked: set[str | None] = {*recipe.adapters, *((None,) if recipe.bare else ())}
    told: dict[str | None, list[str]] = {}
    for one in found:
        if one.adapter not in asked or one.adapter in told:
            raise BadRequest(problems=f"answers of {one.adapter or 'the base'}, who was not asked")
        body = one.answers.encode()
        told[one.adapter] = list(core.parse_answers(body))
        digest = Digest.sha256(body)
        blobs.put(session, store, digest, body, now)
        session.add(
            PoolAnswers(
                job_id=job.id, version=one.adapter, harness=one.harness, answers=str(digest), created_at=now
            )
        )
    if told.keys() != asked:
        raise BadRequest(problems=f"{len(asked)} were asked, and {len(told)} answered")
    if len({tuple(items) for items in told.values()}) != 1:
        raise BadRequest(problems="not all answered the same inputs")


class _Sides:
    """What the three answered: the serving version, the candidate, and the bare base where it was asked."""

    def __init__(self, session: Session, store: BlobStore, pool: PoolFacts, serving: str) -> None:
        old, new = (_rows(session, side.id) for side in (pool.serving, pool.candidate))
        rows = [_row(old, serving), _row(new, pool.version), *[row for row in new if row.version is None]]
        self.harnesses = {row.harness for row in rows}
        self.serving, self.candidate, *bare = (_read(store, row.answers) for row in rows)
        self.bare = bare[0] if bare else None

    def problem(self) -> str | None:
        """Why they cannot be compared."""
        if len(self.harnesses) > 1:
            return "the answers are of two harnesses: let workers of one kind answer, in one precision"
        if self.serving.keys() != self.candidate.keys():
            return "both bases did not answer the same inputs"
        return None


def _rows(session: Session, job: str | None) -> Sequence[PoolAnswers]:
    return session.exec(select(PoolAnswers).where(PoolAnswers.job_id == job).order_by(col(PoolAnswers.id))).all()


def _row(rows: Sequence[PoolAnswers], version: str | None) -> PoolAnswers:
    return next(row for row in rows if row.version == version)


def _read(store: BlobStore, digest: str) -> dict[str, Answered]:
    return core.parse_answers(read_blob(store, digest))


def read_blob(store: BlobStore, digest: str) -> bytes:
    """All bytes of a small blob of the registry's own."""
    with store.open(blobs.blob_key(digest)) as reader:
        return reader.read(0, reader.size)


# ── the file, the labels, the verdict ────────────────────────────────────────


def compare(
    session: Session,
    store: BlobStore,
    *,
    item_id: int,
    pool: PoolFacts,
    serving: str,
    suite: Verdict,
    policy: Policy,
    alpha: float,
    now: datetime,
) -> tuple[PoolFacts, str | None]:
    """The pool with its differences counted: with a file to be labelled, or a verdict that no label changes.

    Beside it, why there can be neither.
    """
    sides = _Sides(session, store, pool, serving)
    if problem := sides.problem():
        return pool, problem
    answers = (sides.serving, sides.candidate, sides.bare)
    asked = core.questions(*answers)
    counted = pool.model_copy(update={"n": len(sides.candidate), "differ": len(asked)})
    settled = core.without_labels(*answers, suite=suite, policy=policy, alpha=alpha)
    if settled is not None:
        return counted.model_copy(update={"verdict": settled}), None
    body = core.to_paper(asked)
    digest = Digest.sha256(body)
    blobs.put(session, store, digest, body, now)
    paper = {"item_id": item_id, "version": str(pool.version), "paper": str(digest), "created_at": now}
    blobs.add_once(session, PoolPaper, paper)
    row = _paper(session, item_id, str(digest))
    return counted.model_copy(update={"paper": str(digest), "labels": row.labels}), None


def label(
    session: Session,
    store: BlobStore,
    caller: Caller,
    *,
    item_id: int,
    pool: PoolFacts,
    lines: str,
    names: tuple[str, str],
    now: datetime,
) -> PoolFacts:
    """The pool with its labels, kept as a blob and on its row; ``names`` are the campaign's and the adapter's."""
    assert pool.paper is not None
    campaign, adapter = names
    paper = core.parse_paper(read_blob(store, pool.paper))
    labels = core.parse_labels(lines.encode(), paper, campaign=campaign, adapter=adapter)
    body = core.to_labels(labels)
    digest = Digest.sha256(body)
    row = _paper(session, item_id, pool.paper)
    if row.labels not in (None, str(digest)):
        before = core.stored_labels(read_blob(store, str(row.labels)))
        core.require_equal(before, labels)
    blobs.put(session, store, digest, body, now)
    if row.labels is None:
        row.labels, row.actor, row.labelled_at = str(digest), caller.token_id, now
        session.add(row)
    return pool.model_copy(update={"labels": str(digest), "labelled_by": pool.labelled_by or caller.name})


def _paper(session: Session, item_id: int, paper: str) -> PoolPaper:
    query = select(PoolPaper).where(PoolPaper.item_id == item_id, PoolPaper.paper == paper)
    return session.exec(query.with_for_update().execution_options(populate_existing=True)).one()


def judge(
    session: Session,
    store: BlobStore,
    *,
    pool: PoolFacts,
    serving: str,
    suite: Verdict,
    policy: Policy,
    alpha: float,
) -> Verdict:
    """The verdict on the labelled pool."""
    sides = _Sides(session, store, pool, serving)
    labels = core.stored_labels(read_blob(store, str(pool.labels)))
    answers = (sides.serving, sides.candidate, sides.bare)
    return core.verdict(*answers, labels, suite=suite, policy=policy, alpha=alpha)
