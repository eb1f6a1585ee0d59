"""The reconciler: takes back leases that ran out and wakes workers again, so that a lost message costs only time."""

from registry.parts import Parts
from registry.services import jobs


def step(parts: Parts) -> bool:
    """Look once; False: there is always time for a pause."""
    with parts.database.write() as session:
        jobs.requeue_expired(session, parts.clock())
    with parts.database.read() as session:
        waiting = jobs.waiting(session)
    for queue, count in waiting.items():
        parts.broker.wake_for(queue, count)
    return False
