"""What an operator watches, read from the database when it is asked for: queues, leases, verdicts of gates.

Any number of API processes tell the same numbers, because none of them counts: the rows are the truth.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from sqlmodel import Session, col, func, select

from registry.core.lifecycle import JobState, PushState
from registry.db.models import AuditRow, Decision, Job, Push, Webhook

MOST_QUEUES = 50
"""Queues that are told apart; people name them, so the others are counted together."""
OTHERS = "(others)"


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue with work: how many jobs wait and run there, and in seconds how long the oldest has waited."""

    name: str
    waiting: int = 0
    running: int = 0
    oldest_s: float = 0.0
    overdue_s: float = 0.0
    """How long ago the lease ran out that did so first; the reconciler takes leases back every few seconds."""


def queues(session: Session, now: datetime) -> list[Queue]:
    """Every queue with unfinished jobs, the busiest first; those beyond `MOST_QUEUES` together."""
    waiting = select(Job.queue, func.count(), func.min(Job.created_at)).where(Job.state == JobState.QUEUED)
    running = select(Job.queue, func.count(), func.min(Job.lease_until)).where(Job.state == JobState.RUNNING)
    found: dict[str, Queue] = {}
    for name, count, created in session.exec(waiting.group_by(Job.queue)):
        found[name] = Queue(name, waiting=count, oldest_s=(now - created).total_seconds())
    for name, count, lease in session.exec(running.group_by(Job.queue)):
        assert lease is not None, "a running job has a lease: the schema says so"
        overdue_s = max(0.0, (now - lease).total_seconds())
        found[name] = replace(found.get(name, Queue(name)), running=count, overdue_s=overdue_s)
    ordered = sorted(found.values(), key=lambda queue: (-queue.waiting - queue.running, queue.name))
    rest = ordered[MOST_QUEUES:]
    return ordered[:MOST_QUEUES] + ([_together(rest)] if rest else [])


def _together(queues: Iterable[Queue]) -> Queue:
    rest = list(queues)
    return Queue(
        OTHERS,
        sum(queue.waiting for queue in rest),
        sum(queue.running for queue in rest),
        max(queue.oldest_s for queue in rest),
        max(queue.overdue_s for queue in rest),
    )


def verdicts(session: Session) -> dict[tuple[str, str], int]:
    """(tier, zone) -> how many verdicts of gates are in the ledger."""
    zone = col(Decision.data)["verdict"]["zone"].as_string()
    query = select(Decision.tier, zone, func.count()).where(Decision.kind == "verdict").group_by(Decision.tier, zone)
    return {(str(tier), str(said)): count for tier, said, count in session.exec(query)}


def unchained_s(session: Session, now: datetime) -> float:
    """Age of the oldest row of the audit without a place in the chain; a sequencer gives places within seconds."""
    waiting = select(AuditRow.at).where(col(AuditRow.seq).is_(None)).order_by(col(AuditRow.id)).limit(1)
    oldest = session.exec(waiting).first()
    return max(0.0, (now - oldest).total_seconds()) if oldest is not None else 0.0


def deaf(session: Session) -> int:
    """Webhooks whose receiver did not take what it was told last."""
    failing = (col(Webhook.removed_at).is_(None), col(Webhook.attempts) > 0)
    return session.exec(select(func.count()).select_from(Webhook).where(*failing)).one()


def unverified(session: Session) -> int:
    """Pushes whose author waits for a verifier."""
    return session.exec(select(func.count()).where(Push.state == PushState.VERIFYING)).one()
