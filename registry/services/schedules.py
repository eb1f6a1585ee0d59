"""Schedules: rows that start work by themselves; fired once, however many schedulers look.

A firing is a row with a unique key (the due time, the revision, the dataset version), written in the
transaction that starts the work, so two schedulers cannot both start it and a crash starts it not half.
What fires may do what the token that made the schedule may do by then, and no more.
"""

import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from croniter import croniter
from pydantic import ValidationError
from sqlmodel import Session, col, select

from registry.core.errors import (
    BadRequest,
    BaseNotFound,
    CampaignExists,
    LoractlError,
    ScheduleNotFound,
    Unavailable,
    WeightsAbsent,
)
from registry.core.names import Reference, SeriesName, check_name
from registry.db import queries
from registry.db.models import Base, Dataset, DatasetVersion, Firing, Job, Line, Revision, Schedule
from registry.schemas import JobRequest, ScheduleInfo, ScheduleRequest, UpgradeRequest

from . import audit, campaigns, jobs
from .references import find_dataset, nearest
from .tokens import Caller, acting

Due = tuple[str, dict[str, Any]]
"""The key of a firing, and the facts that its action needs."""
_BEFORE = "before"
"""In the outcome of the one firing that stands for what was there when the schedule was made."""


def add(session: Session, caller: Caller, request: ScheduleRequest, now: datetime) -> Schedule:
    """A new schedule; `BadRequest` names what is wrong with its subject or action."""
    check_name(request.namespace, "namespace")
    caller.require("run", request.namespace)
    kind = _action_kind(request)
    if kind == "upgrade":
        caller.require("promote", request.namespace)
    next_at = None
    if request.trigger == "cron":
        try:
            next_at = _next(request.subject, now)
        except ValueError as error:
            reason = f"'{request.subject}' is not a cron expression with a next time, such as '0 3 * * 1'"
            raise BadRequest(problems=reason) from error
    elif request.trigger == "base-upgrade":
        known = queries.line_names(session)
        if check_name(request.subject, "line") not in known:
            raise BaseNotFound(ref=request.subject, nearest=nearest(request.subject, known))
    else:
        series = SeriesName.parse(request.subject, "dataset")
        caller.require("read", series.namespace)
        find_dataset(session, caller, "dataset", str(series))
    schedule = Schedule(
        id=f"s{secrets.token_hex(6)}",
        namespace=request.namespace,
        trigger=request.trigger,
        subject=request.subject,
        action=request.action,
        next_at=next_at,
        created_by=caller.token_id,
        created_at=now,
    )
    session.add(schedule)
    session.flush()
    found = _NEWEST[request.trigger](session, schedule)
    if kind == "job":
        _try(session, caller, schedule, found[1] if found else {}, now)
    if found:
        # What was there before is no news, whatever the clocks of those who made it say.
        session.add(Firing(schedule_id=schedule.id, key=found[0], outcome={_BEFORE: True}, at=now))
    audit.record(
        session,
        "schedule.added",
        schedule.id,
        actor=caller.token_id,
        namespace=schedule.namespace,
        now=now,
        after={"trigger": schedule.trigger, "subject": schedule.subject, "action": schedule.action},
    )
    return schedule


def _try(session: Session, caller: Caller, schedule: Schedule, facts: dict[str, Any], now: datetime) -> None:
    """Ask for the job as a firing will, and forget it: what is refused then is refused now, while somebody looks.

    Weights may still arrive.
    """
    attempt = session.begin_nested()
    try:
        _submit(session, caller, schedule, facts, "trial", now)
    except WeightsAbsent:
        pass
    finally:
        attempt.rollback()


def _action_kind(request: ScheduleRequest) -> str:
    if set(request.action) == {"upgrade"} and request.trigger == "base-upgrade":
        asked = request.action["upgrade"] or {}
        try:
            UpgradeRequest.model_validate({"line": request.subject, "to": request.subject} | asked)
        except (ValidationError, TypeError) as error:
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not an object"
            raise BadRequest(problems=f"action.upgrade: {told}") from error
        return "upgrade"
    if set(request.action) == {"job"}:
        try:
            JobRequest.model_validate(request.action["job"])
        except ValidationError as error:
            raise BadRequest(problems=f"action.job: {error.errors()[0]['msg']}") from error
        return "job"
    allowed = '{"job": {…}}' + (' or {"upgrade": {}}' if request.trigger == "base-upgrade" else "")
    raise BadRequest(problems=f"action of a {request.trigger} schedule: expected {allowed}")


def remove(session: Session, caller: Caller, identity: str, now: datetime) -> None:
    """End a schedule; its firings stay on record."""
    schedule = session.get(Schedule, identity)
    if schedule is None or not caller.can("read", schedule.namespace):
        raise ScheduleNotFound(id=identity)
    caller.require("run", schedule.namespace)
    schedule.enabled = False
    session.add(schedule)
    audit.record(
        session,
        "schedule.removed",
        identity,
        actor=caller.token_id,
        namespace=schedule.namespace,
        now=now,
        before={"trigger": schedule.trigger, "subject": schedule.subject, "action": schedule.action},
    )


def listed(session: Session, caller: Caller) -> list[ScheduleInfo]:
    """Living schedules that the caller may see, with their last firing."""
    query = select(Schedule).where(col(Schedule.enabled)).order_by(col(Schedule.created_at))
    return [info(session, row) for row in session.exec(query) if caller.can("read", row.namespace)]


def info(session: Session, schedule: Schedule) -> ScheduleInfo:
    """A schedule in the words of the wire."""
    query = select(Firing).where(Firing.schedule_id == schedule.id).order_by(col(Firing.id).desc()).limit(1)
    last = session.exec(query).first()
    fired = last is not None and _BEFORE not in last.outcome
    told = {"key": last.key, "at": last.at.isoformat(), **last.outcome} if last and fired else None
    return ScheduleInfo.model_validate({**schedule.model_dump(), "last": told})


# ── firing ───────────────────────────────────────────────────────────────────


def living(session: Session) -> Sequence[str]:
    """Ids of schedules to look at."""
    return session.exec(select(Schedule.id).where(col(Schedule.enabled)).order_by(col(Schedule.created_at))).all()


def fire(session: Session, identity: str, now: datetime) -> set[str]:
    """Fire a schedule if it is due, in the caller's transaction; queues that got work."""
    schedule = session.exec(select(Schedule).where(Schedule.id == identity).with_for_update()).first()
    if schedule is None or not schedule.enabled:
        return set()
    due = _cron(session, schedule, now) if schedule.trigger == "cron" else _NEWEST[schedule.trigger](session, schedule)
    if due is None:
        return set()
    key, facts = due
    done = session.exec(select(Firing.id).where(Firing.schedule_id == identity, Firing.key == key)).first()
    if done is not None:
        return set()
    try:
        with session.begin_nested():
            outcome, queues = _act(session, schedule, facts, key, now)
    except CampaignExists as error:
        if error.facts.get("id") is not None and schedule.trigger == "base-upgrade":
            return set()  # the older campaign is superseded and ends by itself; look again then
        raise
    except Unavailable:
        raise
    except LoractlError as error:
        outcome, queues = {"refused": error.problem()}, set()
    session.add(Firing(schedule_id=identity, key=key, outcome=outcome, at=now))
    session.flush()
    audit.record(
        session,
        "schedule.fired",
        identity,
        actor=audit.ITSELF,
        namespace=schedule.namespace,
        now=now,
        after={"key": key, "outcome": outcome},
    )
    return queues


def _cron(session: Session, schedule: Schedule, now: datetime) -> Due | None:
    if schedule.next_at is None or schedule.next_at > now:
        return None
    key = schedule.next_at.isoformat()
    schedule.next_at = _next(schedule.subject, now)  # what was missed while nobody looked is fired once
    session.add(schedule)
    return key, {}


def _next(expression: str, now: datetime) -> datetime:
    found: datetime = croniter(expression, now).get_next(datetime)
    return found


def _upgraded(session: Session, schedule: Schedule) -> Due | None:
    """The newest revision of the line, if it has one before it, and its weights are here and verified."""
    query = (
        select(Revision, Base)
        .join(Line, col(Line.id) == Revision.line_id)
        .join(Base, col(Base.id) == Revision.base_id)
        .where(Line.name == schedule.subject)
        .order_by(col(Revision.number).desc())
        .limit(1)
    )
    row = session.exec(query).first()
    if row is None:
        return None
    revision, base = row
    if revision.number < 2 or base.weights != "full":
        return None
    return f"r{revision.number}", {"base": base.digest}


def _fed(session: Session, schedule: Schedule) -> Due | None:
    """The newest version of the dataset."""
    series = SeriesName.parse(schedule.subject, "dataset")
    query = (
        select(DatasetVersion)
        .join(Dataset)
        .where(Dataset.kind == "dataset", Dataset.namespace == series.namespace, Dataset.name == series.name)
        .order_by(col(DatasetVersion.number).desc())
        .limit(1)
    )
    row = session.exec(query).first()
    return (f"v{row.number}", {"dataset": row.digest}) if row else None


_NEWEST: dict[str, Callable[[Session, Schedule], Due | None]] = {
    "cron": lambda _session, _schedule: None, "base-upgrade": _upgraded, "new-data": _fed,
}  # fmt: skip


def _act(
    session: Session, schedule: Schedule, facts: dict[str, Any], key: str, now: datetime
) -> tuple[dict[str, Any], set[str]]:
    caller = acting(session, schedule.created_by, now)
    if "upgrade" in schedule.action:
        asked = schedule.action["upgrade"] or {}
        request = UpgradeRequest(
            line=schedule.subject,
            to=facts["base"],
            namespaces=[schedule.namespace],
            **{key: asked[key] for key in ("queue", "parallel", "budget_seconds") if key in asked},
        )
        campaign = campaigns.create(session, caller, request, now)
        campaigns.start(session, caller, campaign.id, now, origin=jobs.Origin(schedule.id))
        return {"campaign": campaign.id}, {campaign.queue}
    job = _submit(session, caller, schedule, facts, key, now)
    return {"job": job.id}, {job.queue}


def _submit(
    session: Session, caller: Caller, schedule: Schedule, facts: dict[str, Any], key: str, now: datetime
) -> Job:
    words = JobRequest.model_validate(schedule.action["job"])
    recipe = _of_now(words.recipe, facts, schedule.subject)
    if isinstance(training := recipe.get("training"), dict):
        recipe["training"] = _of_now(training, facts, schedule.subject)
    request_ = words.model_copy(update={"recipe": recipe, "namespace": schedule.namespace})
    job, _ = jobs.submit(
        session, caller, request_, now, salt=f"{schedule.id} {key}", origin=jobs.Origin(schedule.id)
    )
    return job


def _of_now(recipe: dict[str, Any], facts: dict[str, Any], subject: str) -> dict[str, Any]:
    """The recipe with the base, or the version of the dataset, that the firing is about."""
    found = dict(recipe)
    if "base" in facts:
        found["base"] = facts["base"]
    if "dataset" in facts and isinstance(recipe.get("datasets"), list):
        found["datasets"] = [facts["dataset"] if _same_series(text, subject) else text for text in recipe["datasets"]]
    return found


def _same_series(text: object, series: str) -> bool:
    try:
        return str(Reference.parse(str(text), "dataset").series) == series
    except LoractlError:
        return False
