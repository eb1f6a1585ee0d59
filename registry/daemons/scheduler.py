"""The scheduler: fires what is due, and brings running campaigns further; each piece in a transaction of its own."""

from registry.parts import Parts
from registry.services import campaigns, schedules


def step(parts: Parts) -> bool:
    """Look once at every schedule and every unfinished campaign; False: there is always time for a pause."""
    wake: set[str] = set()
    with parts.database.read() as session:
        due, unfinished = schedules.living(session), campaigns.unfinished(session)
    for identity in due:
        with parts.database.write() as session:
            wake |= schedules.fire(session, identity, parts.clock())
    for campaign, item in unfinished:
        with parts.database.write() as session:
            if item:
                wake |= campaigns.step(session, parts.store, item, parts.clock())
            else:
                campaigns.finish(session, campaign, parts.clock())
    for queue in wake:
        parts.broker.wake(queue)
    return False
