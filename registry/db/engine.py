"""Database: sessions for reading and for writing, on SQLite (WAL) and PostgreSQL.

A write block is one transaction: it commits at its end and rolls back on any exception. SQLite writers
begin immediate, so that two of them queue instead of failing late. Read blocks run in autocommit: each
statement sees a consistent state, no reader waits for a writer, and no round trip is spent on BEGIN and
ROLLBACK.

What the database says goes out as a refusal: not there, locked or deadlocked is `DatabaseDown`; a unique key
that another transaction took in between is `WriteConflict` (both 503: nothing was changed, try again); a
value it cannot hold, such as NUL in text, is `BadRequest`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from sqlite3 import Connection as SqliteConnection
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session

from registry.core.errors import BadRequest, DatabaseDown, WriteConflict

REST_S = 1.0
"""A pooled connection that was not used for longer is asked whether it is alive."""
PATIENCE = "-c lock_timeout=30s -c idle_in_transaction_session_timeout=900s"
"""To PostgreSQL: whoever stands still in the middle of a transaction loses it, with all that waits for them, but not
before a copy in the store has ended that it may rest on; and who waits for one is refused before that. What the URL's
own ``options`` say goes before it."""
KEPT_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""Seconds: a machine that went away without a word is noticed within a minute."""


class Database:
    """An engine and the two kinds of session on it."""

    def __init__(self, url: str) -> None:
        """``url`` as SQLAlchemy spells it: ``sqlite:///path`` or ``postgresql+psycopg://…``."""
        self.engine = make_engine(url)
        self._readers = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.engine.dialect.name

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, committed at the end of the block; `DatabaseDown` when the database is not there."""
        with _reachable(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for queries; nothing may be written in it."""
        with _reachable(), Session(self._readers, expire_on_commit=False, autoflush=False) as session:
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection that sees one state of everything, whatever is written meanwhile; it holds up no writer."""
        lite = self.dialect == "sqlite"
        level = "AUTOCOMMIT" if lite else "REPEATABLE READ"
        with _reachable(), self.engine.connect().execution_options(isolation_level=level) as connection:
            if lite:
                connection.exec_driver_sql("BEGIN")  # deferred: its first read fixes what it sees
            try:
                yield connection
            finally:
                if lite:
                    connection.exec_driver_sql("ROLLBACK")

    def ping(self) -> None:
        """`DatabaseDown` when the database does not answer."""
        with self.read() as session:
            session.connection().execute(text("SELECT 1"))

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def make_engine(url: str) -> Engine:
    """An engine for ``url``; SQLite gets WAL, foreign keys and explicit BEGIN."""
    if not url.startswith("sqlite"):
        said = make_url(url).query.get("options", "")
        patient = {"options": f"{PATIENCE} {said if isinstance(said, str) else ' '.join(said)}", **KEPT_ALIVE}
        engine = create_engine(url, connect_args=patient, pool_size=20, max_overflow=20, pool_timeout=10)
        _ping_the_rested(engine)
        return engine
    engine = create_engine(url, connect_args={"timeout": 30}, pool_size=20, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: SqliteConnection, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        connection.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON; PRAGMA busy_timeout=30000;"
        )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _ping_the_rested(engine: Engine) -> None:
    """Look whether a pooled connection is alive, but only after a rest: a busy one would spend a round trip on it."""

    @event.listens_for(engine, "checkin")
    def _rest(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = monotonic()

    @event.listens_for(engine, "checkout")
    def _wake(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if monotonic() - record.info.get("rests_since", monotonic()) < REST_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError(f"a connection that rested is gone: {error}") from error


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise DatabaseDown(reason=_reason(error)) from error
    except DataError as error:
        raise BadRequest(problems=f"the database cannot hold a value: {_reason(error)}") from error
    except IntegrityError as error:
        if not _unique(error):
            raise
        raise WriteConflict(reason=_reason(error)) from error
    except DBAPIError as error:
        if error.connection_invalidated or type(error) is DatabaseError:  # such as a file that is damaged
            raise DatabaseDown(reason=_reason(error)) from error
        raise


def _unique(error: IntegrityError) -> bool:
    """Whether a unique key was taken: by somebody else, in between."""
    cause = error.orig
    return getattr(cause, "sqlstate", None) == "23505" or getattr(cause, "sqlite_errorname", "") in (
        "SQLITE_CONSTRAINT_UNIQUE",
        "SQLITE_CONSTRAINT_PRIMARYKEY",
    )


def _reason(error: SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
