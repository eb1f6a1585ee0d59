"""The scheduler: fires what is due, and brings running campaigns further; each piece in a transaction of its own.

A piece that fails is left for the next look and holds up nobody else's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlmodel import Session

from registry.core.errors import Unavailable
from registry.parts import Parts
from registry.services import campaigns, schedules

log = structlog.get_logger()


def step(parts: Parts) -> bool:
    """Look once at every schedule and every unfinished campaign; False: there is always time for a pause."""
    wake: set[str] = set()
    with parts.database.read() as session:
        due, unfinished = schedules.living(session), campaigns.unfinished(session)
    for identity in due:
        with _piece(parts, schedule=identity) as session:
            wake |= schedules.fire(session, identity, parts.clock())
    for campaign, item in unfinished:
        with _piece(parts, campaign=campaign, item=item) as session:
            if item:
                wake |= campaigns.step(session, parts.store, item, parts.clock())
            else:
                campaigns.finish(session, campaign, parts.clock())
    for queue in wake:
        parts.broker.wake(queue)
    return False


@contextmanager
def _piece(parts: Parts, **what: object) -> Iterator[Session]:
    try:
        with parts.database.write() as session:
            yield session
    except Unavailable:
        raise
    except Exception:  # one bad row must not stand in the way of the others; it is in the log
        log.exception("piece-failed", **what)
