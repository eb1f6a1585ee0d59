"""How soon work goes on: read from what the registry wrote down about its jobs. Measured, not judged."""

from itertools import pairwise

from sqlmodel import Session, col, select

from registry.db.models import JobEvent
from registry.parts import Parts
from tests.faults.town import WORKERS, Town

WORKS = "a worker that was started claims a job that waits"
TAKEN = "a dead worker's job is claimed anew, leases of {lease} s"
_MOVES = ("queued", "requeued", "claimed", "succeeded", "failed", "cancelled")


def look(town: Town) -> dict[str, list[float]]:
    """Since the last look: seconds until started workers worked, and until the jobs of dead ones were taken over."""
    parts = Parts.of(town.settings)
    try:
        with parts.database.read() as session:
            return _of_workers(town, session)
    finally:
        parts.close()


def _of_workers(town: Town, session: Session) -> dict[str, list[float]]:
    moves = session.exec(select(JobEvent).where(col(JobEvent.kind).in_(_MOVES)).order_by(col(JobEvent.id))).all()
    steps = [pair for job in {m.job_id: None for m in moves} for pair in pairwise(m for m in moves if m.job_id == job)]
    works, taken = [], []
    for name, at in town.births:
        claims = [
            (after.at.timestamp(), before.at.timestamp()) for before, after in steps
            if after.kind == "claimed" and after.data.get("worker") == name and after.at.timestamp() > at
        ]  # fmt: skip
        if claims and min(claims)[1] < at:  # the first that it claimed was there before it
            works.append(min(claims)[0] - at)
    for name, at in town.deaths:
        if name in WORKERS:
            taken += [
                _claimed_after(session, after) - at for before, after in steps
                if before.kind == "claimed" and before.data.get("worker") == name
                and before.at.timestamp() < at < after.at.timestamp()
            ]  # fmt: skip
    town.births.clear()
    town.deaths.clear()
    found = {WORKS: works, TAKEN.format(lease=town.settings.lease_s): taken}
    return {what: [round(s, 1) for s in took] for what, took in found.items()}


def _claimed_after(session: Session, lost: JobEvent) -> float:
    """When the job was claimed again, once its lease had been taken back."""
    query = select(JobEvent).where(JobEvent.job_id == lost.job_id, JobEvent.kind == "claimed")
    found = session.exec(query.where(col(JobEvent.id) > lost.id).order_by(col(JobEvent.id))).first()
    return (found or lost).at.timestamp()
