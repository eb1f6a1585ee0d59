"""The usual misconfigurations of a registry, looked for by trying: ``loractl doctor``, and at the start of daemons."""

import importlib.metadata
from datetime import datetime, timedelta

import httpx
from sqlmodel import col, func, select

from registry.broker import Broker
from registry.core.errors import LoractlError
from registry.db import migrate
from registry.db.engine import Database
from registry.db.models import JobEvent
from registry.schemas import Finding
from registry.storage.base import BlobStore
from registry.storage.probe import probe

from . import gauges, webhooks
from .seals import Seals

MAX_SKEW_S = 5.0
NOBODY_S = 60.0
"""For how long a job may wait in a queue where none runs: the reconciler wakes workers every few seconds."""
LATELY = timedelta(days=1)


def findings(
    database: Database,
    store: BlobStore,
    broker: Broker,
    http: httpx.Client,
    now: datetime,
    seals: Seals = webhooks.NONE,
) -> list[Finding]:
    """A line per part: database, migrations, clock, store, broker, workers, daemons; what is wrong with what helps."""
    of_database = _database(database)
    ready = all(finding.ok for finding in of_database)
    looks = (_clock, _queues, _versions, _daemons) if ready else ()
    work = [finding for look in looks for finding in look(database, now)]
    kept = [_secrets(database, seals)] if ready else []
    return [*of_database, *_store(store, http), _broker(broker), *work, *kept]


def _secrets(database: Database, seals: Seals) -> Finding:
    """How the secrets of webhooks are kept, and whether they can be used."""
    with database.read() as session:
        plain, sealed, closed = webhooks.secrets_kept(session, seals)
    said = f"{sealed} sealed"
    if plain:
        said += f", {plain} kept as they are: {'soon sealed' if seals else 'LORACTL_SEAL_KEYS is not set'}"
    if closed:
        said = f"sealed by a key that LORACTL_SEAL_KEYS lacks: {', '.join(closed[:10])}"
    again = "Give that key, too, behind the newer ones; where it is lost, add these webhooks anew."
    return Finding(check="webhook secrets", ok=not closed, detail=said, help=again)


def _clock(database: Database, now: datetime) -> list[Finding]:
    """How far our clock is from the database server's; SQLite has ours."""
    if database.dialect == "sqlite":
        return []
    with database.read() as session:
        skew = (now - session.exec(select(func.now())).one()).total_seconds()
    return [
        Finding(
            check="clock",
            ok=abs(skew) < MAX_SKEW_S,
            detail=f"{skew:+.1f} s from the database's",
            help="Set the clocks (NTP): leases, signed URLs and expiries go by them.",
        )
    ]


def _queues(database: Database, now: datetime) -> list[Finding]:
    """Queues where jobs wait and nobody is at work."""
    with database.read() as session:
        busy = gauges.queues(session, now)
    idle = [queue for queue in busy if queue.waiting and not queue.running and queue.oldest_s > NOBODY_S]
    if not idle:
        return [Finding(check="workers", ok=True, detail="every queue with work has a worker, or is young")]
    return [
        Finding(
            check="workers",
            ok=False,
            detail=f"{queue.waiting} jobs wait in '{queue.name}' since {queue.oldest_s:.0f} s, and none runs there",
            help=f"Start one: celery -A workers.app worker -Q {queue.name}; or move on: loractl jobs list",
        )
        for queue in idle
    ]


def _daemons(database: Database, now: datetime) -> list[Finding]:
    """What only daemons do, and do within seconds: whether it is left undone."""
    with database.read() as session:
        late = max((queue.overdue_s for queue in gauges.queues(session, now)), default=0.0)
        unchained_s = gauges.unchained_s(session, now)
    waits = {"leases that ran out are not taken back": late, "the audit is not chained": unchained_s}
    undone = [f"{what} since {seconds:.0f} s" for what, seconds in waits.items() if seconds > NOBODY_S]
    return [
        Finding(
            check="daemons",
            ok=not undone,
            detail="; ".join(undone) or "nothing is left undone",
            help="Start them: python -m registry.daemons.run; where they run, their log says what fails.",
        )
    ]


def _versions(database: Database, now: datetime) -> list[Finding]:
    """Workers that claimed lately by another version of the program than ours."""
    ours = f"loractl/{importlib.metadata.version('loractl')}"
    newest = select(func.max(JobEvent.id)).where(JobEvent.kind == "claimed", col(JobEvent.at) > now - LATELY)
    worker = col(JobEvent.data)["worker"].as_string()
    with database.read() as session:
        rows = session.exec(select(JobEvent.data).where(col(JobEvent.id).in_(newest.group_by(worker)))).all()
    other = sorted({f"{row['worker']} ({row['agent']})" for row in rows if row.get("agent", ours) != ours})
    return [
        Finding(
            check="worker versions",
            ok=not other,
            detail=f"not {ours}: {', '.join(other[:10])}" if other else f"{len(rows)} at work lately, all {ours}",
            help="Replace them by this release; old ones work on meanwhile, with what they know.",
        )
    ]


def _database(database: Database) -> list[Finding]:
    try:
        lacking = migrate.missing(database)
    except LoractlError as error:
        return [Finding(check="database", ok=False, detail=error.message, help="Is it running? LORACTL_DATABASE_URL")]
    return [
        Finding(check="database", ok=True, detail=database.dialect),
        Finding(
            check="migrations",
            ok=not lacking,
            detail=f"missing: {', '.join(lacking)}" if lacking else "up to date",
            help="Run: python -m registry.db.migrate" if lacking else "",
        ),
    ]


def _store(store: BlobStore, http: httpx.Client) -> list[Finding]:
    try:
        found = probe(store, http).findings()
    except LoractlError as error:
        return [Finding(check="store", ok=False, detail=error.message, help="See docs/deploy.md")]
    if not found:
        return [Finding(check="store", ok=True, detail="keeps the whole contract")]
    return [Finding(check="store", ok=False, detail=said, help="See docs/deploy.md") for said in found]


def _broker(broker: Broker) -> Finding:
    reached = broker.ping()
    if reached is None:
        return Finding(check="broker", ok=True, detail="answers")
    return Finding(
        check="broker", ok=False, detail=reached, help="Jobs wait until the broker is back; nothing is lost."
    )
