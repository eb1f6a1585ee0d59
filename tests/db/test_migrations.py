"""The schema that migrations build is the one that the models describe, on both databases."""

import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command
from sqlalchemy import inspect, make_url

from registry.db import migrate
from registry.db.engine import Database


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database that no migration has seen."""
    if request.param == "sqlite":
        made = Database(f"sqlite:///{tmp_path / 'empty.db'}")
        yield made
        made.close()
        return
    url = make_url(request.getfixturevalue("postgres_url"))
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS empty_loractl")
        connection.execute("CREATE DATABASE empty_loractl")
        made = Database(url.set(database="empty_loractl").render_as_string(hide_password=False))
        yield made
        made.close()
        connection.execute("DROP DATABASE empty_loractl WITH (FORCE)")


def test_models_and_migrations_do_not_drift(database: Database) -> None:
    made = migrate.config()
    with database.engine.begin() as connection:
        made.attributes["connection"] = connection
        command.check(made)


def test_what_is_missing_is_named_until_it_is_there(empty: Database) -> None:
    assert migrate.missing(empty)
    migrate.upgrade(empty)
    assert migrate.missing(empty) == []


def test_upgrading_twice_changes_nothing(empty: Database) -> None:
    migrate.upgrade(empty)
    before = sorted(inspect(empty.engine).get_table_names())
    migrate.upgrade(empty)
    assert sorted(inspect(empty.engine).get_table_names()) == before


def test_two_that_upgrade_at_once_queue(empty: Database) -> None:
    failed: list[BaseException] = []

    def upgrade() -> None:
        try:
            migrate.upgrade(empty)
        except BaseException as error:  # noqa: BLE001  # told below
            failed.append(error)

    crowd = [threading.Thread(target=upgrade) for _ in range(2)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert failed == []
    assert migrate.missing(empty) == []


def test_downgrading_to_the_base_leaves_nothing(empty: Database) -> None:
    migrate.upgrade(empty)
    made = migrate.config()
    with empty.engine.begin() as connection:
        made.attributes["connection"] = connection
        command.downgrade(made, "base")
    assert inspect(empty.engine).get_table_names() == ["alembic_version"]
