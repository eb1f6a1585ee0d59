"""Bring a database to the newest schema: ``python -m registry.db.migrate``.

The migrations are shipped in the wheel (`migrations/`), so an installed server can run them. Two that
start at once queue: PostgreSQL by an advisory lock, SQLite by its write lock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

import migrations
from registry.settings import Settings

from .engine import Database

_LOCK = 0x6C6F7261  # "lora"


def config() -> Config:
    """Alembic's configuration without an ini file."""
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
    made = config()
    with _alone(database) as connection:
        made.attributes["connection"] = connection
        command.upgrade(made, "head")


def missing(database: Database) -> list[str]:
    """Revisions that the database lacks, oldest first; none when it is up to date, or a newer release's."""
    script = ScriptDirectory.from_config(config())
    with database.read() as session:
        have = MigrationContext.configure(session.connection()).get_current_heads()
    ours = [revision.revision for revision in reversed(list(script.walk_revisions()))]
    if not set(have) <= set(ours):
        return []
    there = {revision for head in have for revision in _ancestry(script, head)}
    return [revision for revision in ours if revision not in there]


def _ancestry(script: ScriptDirectory, head: str) -> list[str]:
    return [revision.revision for revision in script.iterate_revisions(head, "base")]


def main() -> None:
    """Upgrade the database that the environment names."""
    database = Database(Settings.from_environment(os.environ).database_url)
    upgrade(database)


if __name__ == "__main__":
    main()
