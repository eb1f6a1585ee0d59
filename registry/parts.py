"""What a process of the registry is made of: database, store and broker, built once from its settings.

The API and the daemons are two edges over the same parts; this is the one place that chooses between
SQLite and PostgreSQL, a folder and S3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import httpx

from .broker import Broker
from .db.engine import Database
from .settings import BadSetting, S3Settings, Settings
from .storage.base import BlobSource, BlobStore
from .storage.local import LocalCopy, LocalStore


@dataclass
class Parts:
    """Settings, database, store, broker and clock of one process."""

    settings: Settings
    database: Database
    store: BlobStore
    broker: Broker
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    replica: BlobSource | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The parts that ``settings`` name."""
        database, broker = Database(settings.database_url), Broker(settings.broker_url)
        return cls(settings, database, open_store(settings), broker, replica=open_replica(settings))

    def http(self) -> httpx.Client:
        """A client for the store's signed URLs, as people outside use them; the caller closes it."""
        return httpx.Client(timeout=10)

    def close(self) -> None:
        """Give connections back."""
        self.database.close()


def open_store(settings: Settings) -> BlobStore:
    """The blob store that ``settings`` name: S3 where a bucket is set, else the embedded folder."""
    if settings.s3 is not None:
        from .storage.s3 import S3Store

        return S3Store(settings.s3)
    if settings.data is None:
        raise BadSetting(name="LORACTL_S3_BUCKET", reason="is missing: only embedded mode keeps blobs in a folder")
    return LocalStore(settings.data / "store", settings.public_url, settings.signing_key)


def open_replica(settings: Settings) -> BlobSource | None:
    """The copy of the store that ``settings`` name, if any."""
    if isinstance(settings.replica, S3Settings):
        from .storage.s3 import S3Store

        return S3Store(settings.replica)
    return None if settings.replica is None else LocalCopy(settings.replica)
