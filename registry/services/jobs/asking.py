"""Asking for work: equal work is one job, and what cannot be done is refused before anybody waits for it."""

import secrets
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from registry.core.base_model import BaseModel
from registry.core.digest import Digest
from registry.core.errors import BadRequest, MoveNotAllowed, NotRunnable, OtherBase, SuiteTooSmall, WeightsAbsent
from registry.core.lifecycle import JOB, JobState
from registry.core.manifest import canonical_json
from registry.core.names import SeriesName, check_name
from registry.core.recipes import (
    BASE_ROLES,
    LEAST_ITEMS,
    AnyRecipe,
    Combine,
    FineTune,
    FullFineTune,
    MakesAdapter,
    MakesBase,
    Rebase,
    Search,
    inputs_of,
    recipe_digest,
)
from registry.core.recipes import Compare as CompareRecipe
from registry.core.targets import ALL_LINEAR, check_parameters, check_rank, check_targets, modules_of, names_of
from registry.db import queries
from registry.db.models import Base, BaseTable, Dataset, DatasetVersion, Job, Version
from registry.schemas import JobRequest, Wishes

from .. import bases, fits
from ..pushes import BASES
from ..tokens import Caller
from . import access, planning

_FIRST_ATTEMPTS = 3


def submit(
    session: Session,
    caller: Caller,
    request: JobRequest,
    now: datetime,
    *,
    campaign_id: str | None = None,
    salt: str = "",
    suites: Collection[str] = (),
    origin: access.Origin = access.UNKNOWN,
) -> tuple[Job, bool]:
    """The job that does what ``request`` asks, and whether it was there before.

    Equal work (recipe, output, namespace) is one job while it is queued or running; a succeeded one is reused
    unless ``fresh``, or unless ``salt`` (a schedule's firing) makes it another. Whatever would make the result
    unwelcome is refused here, before hours are spent on it. ``suites``: digests of those that a policy names,
    whose author could read them.
    """
    if (told := request.model_dump(mode="json")) != access.plain(told):
        raise BadRequest(problems="text with NUL or half a surrogate pair, or a number that is not finite")
    recipe = planning.planned(session, caller, request.recipe, suites)
    namespace = request.namespace or _namespace(session, caller, request, recipe)
    check_name(namespace, "namespace")
    caller.require("run", namespace)
    _check_output(session, caller, request, recipe)
    _check_runnable(session, recipe)
    _check_sensible(session, recipe)
    output = request.output.model_dump(mode="json")
    where = {"adapter": output["adapter"], "line": output["line"], "aliases": sorted(set(output["aliases"]))}
    digest = recipe_digest(recipe)
    key = str(Digest.sha256(canonical_json([str(digest), where, namespace, salt])))
    while True:
        states = access.ACTIVE if request.fresh else (*access.ACTIVE, JobState.SUCCEEDED)
        found = _equal(session, key, states)
        if found is not None and _goes_on(session, found, caller, campaign_id, now) in states:
            return found, True
        if found is not None:  # it ended otherwise since it was found
            continue
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
        access.note(session, job, "queued", {"by": caller.name}, now, caller.token_id)
        return job, False


def _goes_on(session: Session, found: Job, caller: Caller, campaign_id: str | None, now: datetime) -> str:
    """Let equal work go on, whoever asked for it first and wants it no more, or holds it; its state by now."""
    if found.state not in access.ACTIVE or (job := access.row(session, found.id)) is None:
        return found.state
    if job.state not in access.ACTIVE:
        return job.state
    if campaign_id is None or job.campaign_id != campaign_id:
        access.join(session, job, campaign_id or caller.token_id, now)
        job.held_by = None  # who pauses a campaign keeps nobody else waiting
    if job.cancel_requested and job.state == JobState.RUNNING:
        job.cancel_requested = False  # a worker that heard of it already hands its attempt back
        access.note(session, job, "wanted-again", {"by": caller.name}, now, caller.token_id)
    session.add(job)
    return job.state


def _equal(session: Session, key: str, states: Sequence[str]) -> Job | None:
    query = select(Job).where(Job.key == key, col(Job.state).in_(states)).order_by(col(Job.created_at).desc())
    return session.exec(query).first()


def _namespace(session: Session, caller: Caller, request: JobRequest, recipe: AnyRecipe) -> str:
    """Where the work is filed: at its output, else at an input, in a namespace that the caller may read.

    Equal content may lie in many: those in which the caller may run go first, of these the ones that were named.
    """
    if request.output.adapter:
        return SeriesName.parse(request.output.adapter).namespace
    named = {text.partition("/")[0] for text in _texts(request.recipe)}
    for digest in inputs_of(recipe).values():
        data = select(Dataset.namespace).join(DatasetVersion).where(DatasetVersion.digest == digest)
        owners = queries.namespaces_of_version(session, digest) or session.exec(data.distinct()).all()
        mine = [owner for owner in owners if caller.can("read", owner)]
        if mine:
            return min(mine, key=lambda owner: (not caller.can("run", owner), owner not in named, owner))
    return BASES


def _texts(value: object) -> Iterator[str]:
    """Every text in what a request says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _check_output(session: Session, caller: Caller, request: JobRequest, recipe: AnyRecipe) -> None:
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
        base = queries.base_by_digest(session, recipe.base)
        if base is not None and base.id is not None:  # of another kind it would be refused after the work was done
            bases.require_like(session, output.line, fits.model_of(session, base.id))
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
        elif role.startswith(("adapter", "start", "made.")):
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


def retry(
    session: Session, caller: Caller, identity: str, now: datetime, *, origin: access.Origin = access.UNKNOWN
) -> Job:
    """Queue a failed or cancelled job again, with fresh attempts."""
    job = access.locked(session, caller, identity)
    if job.state == JobState.QUEUED:
        return job
    active = session.exec(
        select(Job).where(Job.key == job.key, col(Job.state).in_(access.ACTIVE), Job.id != job.id)
    ).first()
    if active is not None:  # two at once: the unique index refuses the second
        raise MoveNotAllowed(
            noun="job", id=identity, state=f"replaced by {active.id}", move="retry", allowed="failed, cancelled"
        )
    job.state = JOB.after("retry", job.state, identity)
    job.max_attempts = job.attempt + _FIRST_ATTEMPTS
    job.cancel_requested, job.finished_at, job.held_by = False, None, None
    job.origin, job.traceparent = origin.id, origin.traceparent
    session.add(job)
    access.note(session, job, "queued", {"by": caller.name}, now, caller.token_id)
    session.flush()
    return job
