"""The usual misconfigurations of a registry, looked for by trying: ``loractl doctor``, and at the start of daemons."""

import httpx

from registry.broker import Broker
from registry.core.errors import LoractlError
from registry.db import migrate
from registry.db.engine import Database
from registry.schemas import Finding
from registry.storage.base import BlobStore
from registry.storage.probe import probe


def findings(database: Database, store: BlobStore, broker: Broker, http: httpx.Client) -> list[Finding]:
    """A line per part: database, migrations, store, broker; what is wrong comes with what helps."""
    return [*_database(database), *_store(store, http), _broker(broker)]


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
