"""The scheduler: fires what is due, and brings running campaigns further; each piece in a transaction of its own.

A piece that fails is left for the next look and holds up nobody else's. An item that keeps failing on what
nobody foresaw is given up with the reason; what is down is waited for.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlmodel import Session
from structlog.contextvars import bound_contextvars

from registry.core.errors import Unavailable
from registry.db.models import Job
from registry.parts import Parts
from registry.services import campaigns, schedules

log = structlog.get_logger()


def step(parts: Parts) -> bool:
    """Look once at every schedule and every unfinished campaign; False: there is always time for a pause.

    `Unavailable` when something was, after all others had their turn: they may need less.
    """
    wake: set[str] = set()
    down: list[Unavailable] = []
    with parts.database.read() as session:
        due, unfinished = schedules.living(session), campaigns.unfinished(session)
    for identity in due:
        fired: set[str] = set()
        with bound_contextvars(schedule=identity):
            with _piece(parts, down) as session:
                fired = schedules.fire(session, identity, parts.clock())
            if fired:
                log.info("schedule-fired")
        wake |= fired
    for campaign, item in unfinished:
        asked: list[Job] = []
        with bound_contextvars(campaign=campaign):
            with _piece(parts, down, item) as session:
                if item:
                    asked = campaigns.step(session, parts.store, item, parts.clock())
                else:
                    campaigns.finish(session, campaign, parts.clock())
            for job in asked:
                log.info("job-queued", job=job.id, kind=job.kind, queue=job.queue, origin=job.origin)
        wake |= {job.queue for job in asked}
    for queue in wake:
        parts.broker.wake(queue)
    if down:
        raise down[0]
    return False


@contextmanager
def _piece(parts: Parts, down: list[Unavailable], item: int = 0) -> Iterator[Session]:
    try:
        with parts.database.write() as session:
            yield session
    except Unavailable as error:
        down.append(error)
    except Exception as error:  # one bad row must not stand in the way of the others; it is in the log
        log.exception("piece-failed", item=item)
        if item:
            with _piece(parts, down) as session:
                campaigns.stumble(session, item, error, parts.clock())
