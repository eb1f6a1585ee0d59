"""Bring a database to the newest schema: ``python -m registry.db.migrate``.

The migrations are shipped in the wheel (`migrations/`), so an installed server can run them. Two that
start at once queue: PostgreSQL by an advisory lock, SQLite by its write lock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

import migrations
from registry.settings import Settings

from .engine import Database

if TYPE_CHECKING:  # half a second of every start that has nothing to migrate
    from alembic.config import Config

_LOCK = 0x6C6F7261  # "lora"


def config() -> "Config":
    """Alembic's configuration without an ini file."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return made


@contextmanager
def _alone(database: Database) -> Iterator[Connection]:
    with database.engine.begin() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SET LOCAL lock_timeout = 0"))  # another's migrations take as long as they take
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield connection


def upgrade(database: Database) -> None:
    """Apply every migration that is missing, in one transaction."""
    from alembic import command

    made = config()
    with _alone(database) as connection:
        made.attributes["connection"] = connection
        command.upgrade(made, "head")


def revisions() -> list[str]:
    """All revisions, oldest first: each follows the one before, and its file begins with its number."""
    return sorted(path.name[:4] for path in (Path(migrations.__file__).parent / "versions").glob("[0-9]*_*.py"))


def missing(database: Database) -> list[str]:
    """Revisions that the database lacks, oldest first; none when it is up to date, or a newer release's."""
    with database.read() as session:
        connection = session.connection()
        there = inspect(connection).has_table("alembic_version")
        have = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() if there else []
    ours = revisions()
    return [revision for revision in ours if revision > max(have, default="")] if set(have) <= set(ours) else []


def main() -> None:
    """Upgrade the database that the environment names."""
    database = Database(Settings.from_environment(os.environ).database_url)
    upgrade(database)


if __name__ == "__main__":
    main()
