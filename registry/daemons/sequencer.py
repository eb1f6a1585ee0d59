"""The sequencer: gives every row of the audit its place in the chain, in batches."""

from registry.parts import Parts
from registry.services import audit


def step(parts: Parts) -> bool:
    """One batch; whether it was a full one, so that more may wait."""
    with parts.database.write() as session:
        return audit.chain(session) == audit.BATCH
