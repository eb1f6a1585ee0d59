"""The verifier: reads what was pushed and commits or rejects it; then bases that were committed by parts."""

from datetime import timedelta

from registry.parts import Parts
from registry.services import verification


def step(parts: Parts) -> bool:
    """One push, or one base; whether there was any."""
    lease = timedelta(seconds=parts.settings.lease_s)
    if verification.verify_next(parts.database, parts.store, parts.clock, lease=lease):
        return True
    return verification.read_next_base(parts.database, parts.store, parts.clock, lease=lease)
