"""The garbage collector: ends pushes whose time is over, empties what nobody will commit, and checkpoints likewise.

Blobs in their final place are never touched here.
"""

from datetime import timedelta

from registry.parts import Parts
from registry.services import checkpoints, pushes

GRACE = timedelta(hours=1)
"""How long staged bytes outlive the end of their push: URLs may still be good, uploads still run."""


def step(parts: Parts) -> bool:
    """Expire pushes and clear one round of staging; whether anything was done."""
    now = parts.clock()
    with parts.database.write() as session:
        expired = pushes.expire(session, now)
    cleared = pushes.sweep(parts.database, parts.store, now, GRACE)
    cleared += checkpoints.sweep(parts.database, parts.store, now)
    return bool(expired or cleared)
