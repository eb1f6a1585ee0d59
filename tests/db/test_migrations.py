"""The schema that migrations build is the one that the models describe, on both databases."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, inspect, make_url, text

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


def test_the_revisions_are_one_line_in_the_order_of_their_numbers() -> None:
    ours = [revision.revision for revision in ScriptDirectory.from_config(migrate.config()).walk_revisions()]
    assert migrate.revisions() == ours[::-1]


def test_a_database_of_another_release_lacks_what_came_since_or_nothing(empty: Database) -> None:
    migrate.upgrade(empty)

    def at(revision: str) -> None:
        with empty.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})

    at(migrate.revisions()[-3])
    assert migrate.missing(empty) == migrate.revisions()[-2:]
    at("9999")  # what a newer release added hurts no older one
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


AT = datetime(2026, 1, 1, tzinfo=UTC)
AN_ALIAS: dict[str, dict[str, Any]] = {
    "bases": {
        "id": 1, "digest": "b3:1", "weights_digest": "b3:2", "arch_digest": "b3:3", "arch_kind": "raw",
        "model_type": "llama", "parameters": 1, "weights": "full", "names": [], "created_by": "test", "created_at": AT,
    },
    "target_sets": {"id": 7, "digest": "sha256:1", "body": b"[]"},
    "adapters": {"id": 1, "namespace": "team", "name": "bot", "next_version": 2, "created_at": AT},
    "versions": {
        "id": 1, "adapter_id": 1, "number": 1, "digest": "sha256:2", "base_id": 1, "target_set_id": 7, "latest": True,
        "evidence": "declared", "binding": {}, "peft_type": "LORA", "runnable": True, "rank": 4, "engines": 0,
        "spec": {}, "size": 1, "message": "", "created_by": "test", "created_at": AT,
    },
    "aliases": {"id": 1, "adapter_id": 1, "base_id": 1, "name": "prod", "version_id": 1, "generation": 1},
}  # fmt: skip


def test_an_alias_learns_the_target_set_of_its_version(empty: Database) -> None:
    made = migrate.config()
    with empty.engine.begin() as connection:
        made.attributes["connection"] = connection
        command.upgrade(made, "0002")
    with empty.engine.begin() as connection:
        tables = MetaData()
        tables.reflect(connection)
        for table, row in AN_ALIAS.items():
            connection.execute(tables.tables[table].insert().values(row))
    migrate.upgrade(empty)
    with empty.read() as session:
        assert session.connection().exec_driver_sql("SELECT name, target_set_id FROM aliases").all() == [("prod", 7)]
