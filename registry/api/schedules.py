"""Routes of schedules: add, list, remove."""

from fastapi import APIRouter

from registry.schemas import Page, ScheduleInfo, ScheduleRequest
from registry.services import schedules

from .deps import Parts, User

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])


@router.post("", status_code=201)
def add_schedule(request: ScheduleRequest, parts: Parts, caller: User) -> ScheduleInfo:
    """Add a schedule: cron, base-upgrade or new-data."""
    with parts.database.write() as session:
        return schedules.info(session, schedules.add(session, caller, request, parts.clock()))


@router.get("")
def list_schedules(parts: Parts, caller: User) -> Page[ScheduleInfo]:
    """Living schedules with their last firing."""
    with parts.database.read() as session:
        return Page(items=schedules.listed(session, caller))


@router.delete("/{identity}", status_code=204)
def remove_schedule(identity: str, parts: Parts, caller: User) -> None:
    """End a schedule."""
    with parts.database.write() as session:
        schedules.remove(session, caller, identity, parts.clock())
