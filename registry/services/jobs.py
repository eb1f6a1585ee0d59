"""Jobs: units of work whose row is the truth.

    queued → running → succeeded | failed | cancelled; back to queued on a lost lease

A job is planned in people's words and stored in digests. A worker claims it by compare-and-set with a
lease, numbered by attempt; every later word of that worker names the attempt, and one that lost its lease
is refused. What a job made is committed in the transaction that ends it, so nothing is made twice.
"""

import json
import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, case, func
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, delete, select

from registry.core.base_model import BaseModel
from registry.core.digest import Digest
from registry.core.errors import (
    BadRequest,
    JobNotFound,
    LeaseLost,
    MoveNotAllowed,
    NotRunnable,
    NotYourJob,
    OtherBase,
    SuiteTooSmall,
    TokenRefused,
    WeightsAbsent,
    WorkFailed,
)
from registry.core.lifecycle import JOB, JobState
from registry.core.manifest import canonical_json
from registry.core.metrics import is_binary
from registry.core.names import Reference, SeriesName, check_name
from registry.core.recipes import (
    BASE_ROLES,
    DATA_ROLES,
    LEAST_ITEMS,
    TRAINED,
    UNLABELLED,
    Answers,
    AnyRecipe,
    Combine,
    Evaluate,
    FineTune,
    FullFineTune,
    MakesAdapter,
    MakesBase,
    Rebase,
    Search,
    inputs_of,
    parse_recipe,
    recipe_digest,
)
from registry.core.recipes import Compare as CompareRecipe
from registry.core.records import parse_records
from registry.core.targets import ALL_LINEAR, check_parameters, check_rank, check_targets, modules_of, names_of
from registry.db import queries
from registry.db.models import (
    Adapter,
    Base,
    BaseTable,
    Checkpoint,
    Dataset,
    DatasetVersion,
    Job,
    JobEvent,
    StoredManifest,
    Version,
)
from registry.schemas import ClaimRequest, FinishRequest, JobInfo, JobRequest, ScoredInfo, Wishes
from registry.storage.base import BlobStore

from . import audit, bases, blobs, commits, evaluations, fits, pools, standing
from .adapters import resolve
from .policies import effective
from .pushes import BASES
from .references import find_adapter, find_data, find_version
from .tokens import Caller, acting

MAX_EVENTS = 10_000
"""Events kept of one job's attempts together; what a worker reports beyond is dropped."""
MAX_EVENT_BYTES = 4096
PATIENCE = timedelta(hours=1)
"""How long a job may be overtaken by others whose base is cached."""
_FIRST_ATTEMPTS = 3
_TAUGHT_AS_TRAINED = {"learning_rate", "batch_tokens", "max_length", "precision", "quantised", "seed"}
"""What a distillation takes over from the recorded recipe."""
_LOOKED_AT = 256
"""How many of a queue's jobs on one base are looked at for those that can be trained together."""
_ACTIVE = (JobState.QUEUED, JobState.RUNNING)
_CLAIMABLE = (col(Job.state) == JobState.QUEUED, col(Job.held_by).is_(None))


@dataclass(frozen=True, slots=True)
class Origin:
    """What asked for work, for logs and traces: the id of a request or of a schedule, and its place in a trace."""

    id: str | None = None
    traceparent: str | None = None


UNKNOWN = Origin()


# ── asking for work ──────────────────────────────────────────────────────────


def submit(
    session: Session,
    caller: Caller,
    request: JobRequest,
    now: datetime,
    *,
    campaign_id: str | None = None,
    salt: str = "",
    suites: Collection[str] = (),
    origin: Origin = UNKNOWN,
) -> tuple[Job, bool]:
    """The job that does what ``request`` asks, and whether it was there before.

    Equal work (recipe, output, namespace) is one job while it is queued or running; a succeeded one is reused
    unless ``fresh``, or unless ``salt`` (a schedule's firing) makes it another. Whatever would make the result
    unwelcome is refused here, before hours are spent on it. ``suites``: digests of those that a policy names,
    whose author could read them.
    """
    if (told := request.model_dump(mode="json")) != plain(told):
        raise BadRequest(problems="text with NUL or half a surrogate pair, or a number that is not finite")
    recipe = _planned(session, caller, request.recipe, suites)
    namespace = request.namespace or _namespace(session, request, recipe)
    check_name(namespace, "namespace")
    caller.require("run", namespace)
    _check_output(caller, request, recipe)
    _check_runnable(session, recipe)
    _check_sensible(session, recipe)
    output = request.output.model_dump(mode="json")
    where = {"adapter": output["adapter"], "line": output["line"], "aliases": sorted(set(output["aliases"]))}
    digest = recipe_digest(recipe)
    key = str(Digest.sha256(canonical_json([str(digest), where, namespace, salt])))
    while (found := _equal(session, key, fresh=request.fresh)) is None:
        job = Job(
            id=f"j{secrets.token_hex(8)}",
            kind=recipe.kind,
            queue=check_name(request.queue, "queue"),
            state=JobState.QUEUED,
            namespace=namespace,
            recipe=recipe.model_dump(mode="json"),
            recipe_digest=str(digest),
            key=key,
            output=output,
            base=recipe.base,
            max_attempts=_FIRST_ATTEMPTS,
            campaign_id=campaign_id,
            origin=origin.id,
            traceparent=origin.traceparent,
            created_by=caller.token_id,
            created_at=now,
        )
        try:
            with session.begin_nested():
                session.add(job)
        except IntegrityError:  # two asked at once: the other's row is there now
            continue
        _note(session, job, "queued", {"by": caller.name}, now, caller.token_id)
        return job, False
    if found.held_by not in (None, campaign_id):  # who pauses a campaign keeps nobody else waiting
        found.held_by = None
        session.add(found)
    return found, True


def _equal(session: Session, key: str, *, fresh: bool) -> Job | None:
    states = _ACTIVE if fresh else (*_ACTIVE, JobState.SUCCEEDED)
    query = select(Job).where(Job.key == key, col(Job.state).in_(states)).order_by(col(Job.created_at).desc())
    return session.exec(query).first()


def _planned(
    session: Session, caller: Caller, words: dict[str, Any], suites: Collection[str] = ()
) -> AnyRecipe:
    """A recipe in which every reference has become a digest, and what can be derived is filled in."""
    plan = dict(words)
    kind = plan.get("kind")
    adapter = plan.get("adapter")
    own = "old" if kind in ("rebase", "compare") else "base"
    if kind in ("merge", "rebase", "compress") and isinstance(adapter, str) and not plan.get(own):
        version = _meant(session, caller, adapter, None)
        plan["adapter"] = version.digest
        plan[own] = session.get_one(Base, version.base_id).digest
    listed = plan.get("adapters")
    if kind in ("evaluate", "combine") and not plan.get("base") and isinstance(listed, list) and listed:
        plan["base"] = session.get_one(Base, _meant(session, caller, str(listed[0]), None).base_id).digest
    for field in BASE_ROLES:
        if isinstance(plan.get(field), str):
            plan[field] = bases.find(session, plan[field]).digest
    on = queries.base_by_digest(session, str(plan.get(own)))
    for field in ("adapter", "start"):
        if isinstance(plan.get(field), str):
            plan[field] = _meant(session, caller, plan[field], on).digest
    if isinstance(listed, list):
        plan["adapters"] = [_meant(session, caller, str(text), on).digest for text in listed]
    for field in ("datasets", "apart"):
        if isinstance(plan.get(field), list):
            plan[field] = [find_data(session, caller, "dataset", str(text)).digest for text in plan[field]]
    if kind == "rebase" and plan.get("tier") in UNLABELLED and not plan.get("inputs"):
        plan["inputs"] = _unlabelled(session, caller, plan)
    if isinstance(plan.get("inputs"), str):
        plan["inputs"] = find_data(session, caller, "dataset", plan["inputs"]).digest
    if isinstance(plan.get("suite"), str) and plan["suite"] not in suites:
        plan["suite"] = find_data(session, caller, "suite", plan["suite"]).digest
    if kind == "rebase" and plan.get("tier") in TRAINED:
        plan["training"] = _training(session, caller, plan)
    if kind == "rebase" and plan.get("tier") == "distil":
        plan["distil"] = _distillation(session, caller, plan)
    if kind == "search" and isinstance(plan.get("training"), dict):
        plan["training"] = _written(session, caller, plan, plan["training"])
    return parse_recipe(plan)


def _meant(session: Session, caller: Caller, text: str, base: Base | None) -> Version:
    if text.startswith("sha256:"):
        found = session.exec(select(Version, Adapter).join(Adapter).where(Version.digest == text)).all()
        for version, adapter in found:
            if caller.can("read", adapter.namespace):
                return version
        raise BadRequest(problems=f"no adapter version {text[:80]}")
    reference = Reference.parse(text)
    if reference.alias is not None:
        return resolve(session, caller, reference, base).version
    adapter = find_adapter(session, caller, reference.series)
    version = find_version(session, adapter, reference)
    standing.require_bytes(version, standing.ref(adapter, version))
    return version


def training_of(session: Session, version: Version, base: str) -> FineTune | None:
    """The recipe that ``version`` was trained by, else its policy's, for another base; None where there is none."""
    recipe = recorded_recipe(session, version)
    if recipe.get("kind") in ("rebase", "search"):
        recipe = _words(recipe.get("found") or recipe.get("training"))
    if recipe.get("kind") != "finetune":
        adapter = session.get_one(Adapter, version.adapter_id)
        written = effective(session, adapter.namespace, adapter.name).recipe
        if written is None:
            return None
        recipe = TypeAdapter(dict[str, Any]).validate_json(written)
    try:
        return FineTune.model_validate({**recipe, "base": base, "start": None, "pull": 0.0})
    except ValidationError:  # an author's own words, or those of a newer registry
        return None


def recorded_recipe(session: Session, version: Version) -> dict[str, Any]:
    """What a version's manifest says it was made by: its author's words, to be parsed; empty where there are none."""
    body = session.get_one(StoredManifest, version.digest).body
    lineage = _words(TypeAdapter(dict[str, Any]).validate_json(body).get("lineage"))
    return _words(lineage.get("recipe"))


def _words(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _training(session: Session, caller: Caller, plan: dict[str, Any]) -> dict[str, Any]:
    given = plan.get("training")
    if isinstance(given, dict):
        return _written(session, caller, plan, given)
    version = _meant(session, caller, str(plan["adapter"]), None)
    recorded = training_of(session, version, str(plan.get("base")))
    if recorded is None:
        raise NotRunnable(what=f"tier '{plan['tier']}'", reason="neither the version nor its policy has a recipe")
    for digest in recorded.datasets:
        find_data(session, caller, "dataset", digest)
    if plan["tier"] == "warm-start":
        adapter = session.get_one(Adapter, version.adapter_id)
        steps, candidates = effective(session, adapter.namespace, adapter.name).warm_start(recorded.steps)
        plan.setdefault("candidates", candidates)
        recorded = recorded.model_copy(update={"steps": steps, "warmup_steps": min(recorded.warmup_steps, steps)})
    return recorded.model_dump(mode="json")


def _unlabelled(session: Session, caller: Caller, plan: dict[str, Any]) -> str | None:
    """Text of what the adapter is for: its policy's retained inputs, else what it was trained on, if the caller may."""
    version = _meant(session, caller, str(plan["adapter"]), None)
    adapter = session.get_one(Adapter, version.adapter_id)
    if retained := effective(session, adapter.namespace, adapter.name).retained:
        return retained
    training = training_of(session, version, str(plan.get("base")))
    with suppress(BadRequest):
        return find_data(session, caller, "dataset", training.datasets[0]).digest if training else None
    return None


def _distillation(session: Session, caller: Caller, plan: dict[str, Any]) -> dict[str, Any]:
    """How to distil: as asked, else as the adapter was trained.

    Where what counts is right or wrong, the teacher answers with what it finds likeliest: that is what is asked of it.
    """
    version = _meant(session, caller, str(plan["adapter"]), None)
    recorded = training_of(session, version, str(plan.get("base")))
    found = recorded.model_dump(mode="json", include=_TAUGHT_AS_TRAINED) if recorded else {}
    adapter = session.get_one(Adapter, version.adapter_id)
    gates = effective(session, adapter.namespace, adapter.name).gates
    if plan.get("inputs") and gates and is_binary(gates[0].metric):
        found["temperature"] = 0.0
    return found | _words(plan.get("distil"))


def _written(session: Session, caller: Caller, plan: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The training recipe that stands in another one."""
    words = {"kind": "finetune", "base": plan.get("base"), **given}
    return _planned(session, caller, words).model_dump(mode="json")


def _namespace(session: Session, request: JobRequest, recipe: AnyRecipe) -> str:
    if request.output.adapter:
        return SeriesName.parse(request.output.adapter).namespace
    for digest in inputs_of(recipe).values():
        owners = queries.namespaces_of_version(session, digest)
        if owners:
            return owners[0]
        data = session.exec(select(Dataset.namespace).join(DatasetVersion).where(DatasetVersion.digest == digest))
        if owner := data.first():
            return owner
    return BASES


def _check_output(caller: Caller, request: JobRequest, recipe: AnyRecipe) -> None:
    output = request.output
    if isinstance(recipe, MakesAdapter):
        if output.adapter is None:
            raise BadRequest(problems="output.adapter: name the adapter that the result becomes a version of")
        caller.require("publish", SeriesName.parse(output.adapter).namespace)
    elif output.adapter is not None:
        raise BadRequest(problems=f"output.adapter: a job of kind '{recipe.kind}' makes no adapter")
    if isinstance(recipe, MakesBase):
        if output.line is None:
            raise BadRequest(problems="output.line: name the line that the result becomes a revision of")
        check_name(output.line, "line")
        caller.require("publish", BASES)
    for alias in output.aliases:
        check_name(alias, "alias")
    try:
        Wishes(aliases=output.aliases, message=output.message, task=output.task)
    except ValidationError as error:
        problem = error.errors()[0]
        raise BadRequest(problems=f"output.{problem['loc'][0]}: {problem['msg']}") from error


def _check_runnable(session: Session, recipe: AnyRecipe) -> None:
    for role, digest in inputs_of(recipe).items():
        if role in BASE_ROLES:
            base = queries.base_by_digest(session, digest)
            if base is None or base.weights != "full":
                raise WeightsAbsent(base=digest[:15], work=f"a job of kind '{recipe.kind}'")
        elif role.startswith(("adapter", "start")):
            version = session.exec(select(Version).where(Version.digest == digest)).first()
            if version is not None and not version.runnable:
                raise NotRunnable(what=f"An adapter of type {version.peft_type}", reason="only LoRA is computed here")
            if version is not None and (role == "adapter" or isinstance(recipe, Combine | CompareRecipe)):
                _check_bound(session, recipe, version)


def _check_sensible(session: Session, recipe: AnyRecipe) -> None:
    """Refuse what a base's tensor table and a suite's counts show to be wrong: a worker would find it after an hour."""
    match recipe:
        case FineTune(start=None):
            _check_targets(session, recipe, recipe.rank)
        case Search(training=training):
            suite = session.exec(select(DatasetVersion).where(DatasetVersion.digest == recipe.suite)).first()
            if suite is not None:
                n = suite.rows - suite.gate_rows if suite.calibration_rows is None else suite.calibration_rows
                if n < LEAST_ITEMS:
                    metric = (suite.spec.get("metrics") or ["its metric"])[0]
                    raise SuiteTooSmall(n=n, metric=metric, needed=LEAST_ITEMS)
            if recipe.over != "targets":  # which tries groups of its own
                _check_targets(session, training, training.rank if recipe.over == "scale" else recipe.full_rank)
        case FullFineTune(parameters=parameters) if parameters and (names := names_of(_table(session, recipe.base))):
            check_parameters(parameters, names)


def _check_targets(session: Session, recipe: FineTune, rank: int | None) -> None:
    """``rank``: of the factors, None where the job chooses it."""
    named = (*(() if recipe.targets == ALL_LINEAR else recipe.targets), *recipe.whole)
    base = _table(session, recipe.base)
    if modules := modules_of(base):
        check_targets(named, modules)
    if rank is not None:
        check_rank(rank, recipe.targets, base, recipe.whole)


def _table(session: Session, digest: str) -> BaseModel:
    query = select(BaseTable.body).join(Base).where(Base.digest == digest)
    return BaseModel.from_compressed(session.exec(query).one())


def _check_bound(session: Session, recipe: AnyRecipe, version: Version) -> None:
    """Factors are read on the base that the adapter belongs to, of two the old one; elsewhere they mean nothing."""
    asked = recipe.old if isinstance(recipe, Rebase | CompareRecipe) else recipe.base
    actual = session.get_one(Base, version.base_id)
    if actual.digest != asked:
        assert actual.id is not None
        called = bases.labels(session, [actual])[actual.id]
        raise OtherBase(adapter=version.digest[:19], actual=called, kind=recipe.kind, asked=asked[:15])


# ── looking ──────────────────────────────────────────────────────────────────


def get(session: Session, caller: Caller, identity: str) -> Job:
    """A job that the caller may see; `JobNotFound`."""
    job = session.get(Job, identity)
    if job is None or not (caller.can("read", job.namespace) or job.token_id == caller.token_id):
        raise JobNotFound(id=identity)
    return job


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


# ── a worker's side ──────────────────────────────────────────────────────────


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
    query = select(Job).where(Job.queue == request.queue, *_CLAIMABLE)
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
    job.started_at, job.progress, job.error = now, None, None
    session.add(job)
    who = {"worker": request.worker} | ({"agent": agent[:100]} if agent else {})
    _note(session, job, "claimed", who, now, caller.token_id)


def claim_beside(
    session: Session, caller: Caller, request: ClaimRequest, first: Job, lease_s: float, now: datetime
) -> list[Job]:
    """Those that are trained together with ``first`` on one loaded base, in the order of the queue, each leased.

    A last attempt is made alone: what ends a whole process cannot use up the attempts of others as well.
    """
    if request.group == 1 or _shares(first) is None or first.attempt >= first.max_attempts:
        return []
    query = select(Job).where(Job.queue == first.queue, *_CLAIMABLE)
    query = query.where(Job.kind == first.kind, Job.base == first.base)
    query = query.order_by(col(Job.priority).desc(), col(Job.created_at), col(Job.id)).limit(_LOOKED_AT)
    found = session.exec(query.with_for_update(skip_locked=True)).all()
    fitting = [job for job in found if _shares(job) == _shares(first) and job.attempt + 1 < job.max_attempts]
    beside = fitting[: request.group - 1]
    for job in beside:
        _lease(session, caller, request, job, lease_s, now)
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


def held(session: Session, caller: Caller, identity: str, attempt: int) -> Job:
    """The caller's running job, locked; `NotYourJob` for somebody else's, `LeaseLost` for an attempt that is over."""
    job = _row(session, identity)
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
        job.progress = plain(progress)
    if reported:
        known = session.exec(select(func.count()).where(JobEvent.job_id == job.id)).one()
        for event in reported[: max(0, MAX_EVENTS - known)]:
            if len(json.dumps(event)) <= MAX_EVENT_BYTES:
                _note(session, job, "log" if event.get("kind") == "log" else "progress", event, now)
    session.add(job)
    return job


def finish(
    session: Session, store: BlobStore, caller: Caller, identity: str, request: FinishRequest, now: datetime
) -> Job:
    """End the job with what it made, in this one transaction; the same words again change nothing.

    A job whose cancellation was asked for ends cancelled, and nothing of it is kept.
    """
    job = _row(session, identity)
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
        _ended(session, job, stopped.problem(), now, retryable=False, cancelled=True)
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
    job.result = plain({**request.result, "made": made})
    session.add(job)
    _note(session, job, "succeeded", {"made": made}, now, caller.token_id)
    return job


def _made(
    session: Session, job: Job, recipe: AnyRecipe, pushed: Sequence[str], now: datetime
) -> list[dict[str, Any]]:
    """Commit the one push of a job that makes something; the outcome of each."""
    wanted = "adapter" if isinstance(recipe, MakesAdapter) else "base" if isinstance(recipe, MakesBase) else None
    if len(pushed) != (wanted is not None):
        raise BadRequest(problems=f"pushes: a job of kind '{job.kind}' makes {f'one {wanted}' if wanted else 'none'}")
    return [commits.commit_verified(session, identity, job, now) for identity in pushed]


def _keep_evaluations(
    session: Session, store: BlobStore, job: Job, recipe: Evaluate, found: Iterable[ScoredInfo], now: datetime
) -> None:
    base = queries.base_by_digest(session, recipe.base)
    suite = session.exec(select(DatasetVersion).where(DatasetVersion.digest == recipe.suite)).first()
    assert base is not None and suite is not None
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
        versions = session.exec(select(Version).where(Version.digest == adapter)).all() if adapter else [None]
        for version in versions:
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
    _ended(session, job, problem, now, retryable=retryable, cancelled=job.cancel_requested)
    return job


def _ended(
    session: Session, job: Job, problem: dict[str, Any], now: datetime, *, retryable: bool, cancelled: bool = False
) -> None:
    again = retryable and job.attempt < job.max_attempts
    move = "cancel" if cancelled else "requeue" if again else "fail"
    job.state = JOB.after(move, job.state, job.id)
    job.lease_until, job.error = None, plain(problem)
    job.finished_at = None if move == "requeue" else now
    session.add(job)
    _note(session, job, {"requeue": "requeued", "cancel": "cancelled", "fail": "failed"}[move], job.error, now)


# ── a person's side ──────────────────────────────────────────────────────────


def cancel(session: Session, caller: Caller, identity: str, now: datetime) -> Job:
    """Cancel at once when queued; ask the worker to stop when running. Cancelling again is fine."""
    return _stopped(session, _locked(session, caller, identity), caller.name, now, caller.token_id)


def withdraw(session: Session, campaign_id: str, identity: str, now: datetime) -> None:
    """Cancel a job that a campaign asked for, when it needs it no more; whatever became of its creator's rights."""
    job = _row(session, identity)
    if job is not None and job.campaign_id == campaign_id and job.state in _ACTIVE:
        _stopped(session, job, f"campaign {campaign_id}", now)


def hold(session: Session, campaign_id: str, now: datetime, *, running: bool) -> None:
    """Keep a campaign's queued jobs from being claimed; with ``running`` also stop those that run, to go on later."""
    states = _ACTIVE if running else (JobState.QUEUED,)
    for job in _of_campaign(session, campaign_id, col(Job.state).in_(states)):
        job.held_by = campaign_id
        session.add(job)
        _note(session, job, "held", {"by": f"campaign {campaign_id}"}, now)


def let_go(session: Session, campaign_id: str, now: datetime) -> set[str]:
    """Undo `hold`; queues that have work again."""
    found = _of_campaign(session, campaign_id, col(Job.held_by) == campaign_id)
    for job in found:
        job.held_by = None
        session.add(job)
        _note(session, job, "let-go", {"by": f"campaign {campaign_id}"}, now)
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
        _note(session, job, "cancelling", {"by": by}, now, actor)
        return job
    job.state = JOB.after("cancel", job.state, job.id)
    job.finished_at = now
    session.add(job)
    _note(session, job, "cancelled", {"by": by}, now, actor)
    return job


def retry(session: Session, caller: Caller, identity: str, now: datetime, *, origin: Origin = UNKNOWN) -> Job:
    """Queue a failed or cancelled job again, with fresh attempts."""
    job = _locked(session, caller, identity)
    if job.state == JobState.QUEUED:
        return job
    active = session.exec(select(Job).where(Job.key == job.key, col(Job.state).in_(_ACTIVE), Job.id != job.id)).first()
    if active is not None:  # two at once: the unique index refuses the second
        raise MoveNotAllowed(
            noun="job", id=identity, state=f"replaced by {active.id}", move="retry", allowed="failed, cancelled"
        )
    job.state = JOB.after("retry", job.state, identity)
    job.max_attempts = job.attempt + _FIRST_ATTEMPTS
    job.cancel_requested, job.finished_at, job.held_by = False, None, None
    job.origin, job.traceparent = origin.id, origin.traceparent
    session.add(job)
    _note(session, job, "queued", {"by": caller.name}, now, caller.token_id)
    session.flush()
    return job


def _locked(session: Session, caller: Caller, identity: str) -> Job:
    get(session, caller, identity)
    job = _row(session, identity)
    assert job is not None
    caller.require("run", job.namespace)
    return job


def _row(session: Session, identity: str) -> Job | None:
    """The job as it is now, held until the end of the transaction, whatever the session saw of it before."""
    query = select(Job).where(Job.id == identity).with_for_update().execution_options(populate_existing=True)
    return session.exec(query).first()


# ── the reconciler's side ────────────────────────────────────────────────────


def requeue_expired(session: Session, now: datetime, limit: int = 100) -> list[Job]:
    """Take back leases that ran out; the attempt they belonged to is refused from now on."""
    query = select(Job).where(Job.state == JobState.RUNNING, col(Job.lease_until) < now).limit(limit)
    expired = session.exec(query.with_for_update(skip_locked=True)).all()
    for job in expired:
        lost = LeaseLost(id=job.id, attempt=job.attempt, state="without a sign of life")
        _ended(session, job, lost.problem(), now, retryable=True, cancelled=job.cancel_requested)
    return list(expired)


def waiting(session: Session) -> dict[str, int]:
    """Queues that have work, and how many jobs wait there."""
    query = select(Job.queue, func.count()).where(*_CLAIMABLE).group_by(Job.queue)
    return dict(session.exec(query).all())


def _note(
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
