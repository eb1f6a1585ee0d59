"""The garbage collector: ends pushes whose time is over, empties staging and old checkpoints, retires, collects.

And seals what is sealed by an older key.

What it removes of the blobs in their final place, and how, is in `registry.services.collection`.
"""

from datetime import timedelta

from registry.parts import Parts
from registry.services import checkpoints, collection, pushes, retention, webhooks
from registry.services.seals import Seals

GRACE = timedelta(hours=1)
"""How long staged bytes outlive the end of their push: URLs may still be good, uploads still run."""


def step(parts: Parts) -> bool:
    """Expire pushes, clear one round of staging, and collect some blobs; whether anything was done."""
    now = parts.clock()
    with parts.database.write() as session:
        expired = pushes.expire(session, now)
    cleared = pushes.sweep(parts.database, parts.store, now, GRACE)
    cleared += checkpoints.sweep(parts.database, parts.store, now)
    retired = retention.retire(parts.database, now)
    marked = collection.mark(parts.database, now)
    lasting = GRACE + timedelta(seconds=parts.settings.url_ttl_s)  # a signed URL may be in somebody's hands
    collected = collection.collect(parts.database, parts.store, now, lasting)
    with parts.database.write() as session:
        webhooks.reseal(session, Seals(parts.settings.seal_keys))
    return bool(expired or cleared or retired or marked or collected)
