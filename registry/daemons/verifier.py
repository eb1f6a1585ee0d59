"""The verifier: reads what was pushed and commits or rejects it; then bases that were committed by parts."""

from registry.parts import Parts
from registry.services import verification


def step(parts: Parts) -> bool:
    """One push, or one base; whether there was any."""
    if verification.verify_next(parts.database, parts.store, parts.clock):
        return True
    return verification.read_next_base(parts.database, parts.store, parts.clock)
