"""Sessions: one transaction a write block, readers that wait for nobody, and refusals for what the database says."""

import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import select

from registry.core.errors import BadRequest, DatabaseDown, WriteConflict
from registry.db.engine import Database
from registry.db.models import Line

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def line(name: str) -> Line:
    return Line(name=name, created_at=NOW)


def names(database: Database) -> list[str]:
    with database.read() as session:
        return sorted(session.exec(select(Line.name)))


def test_a_write_block_is_all_or_nothing(database: Database) -> None:
    with suppress(ZeroDivisionError), database.write() as session:
        session.add(line("a"))
        session.flush()
        raise ZeroDivisionError
    with database.write() as session:
        session.add(line("b"))
    assert names(database) == ["b"]


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as session:
        session.add(line("a"))
        session.flush()
        assert names(database) == []
    assert names(database) == ["a"]


def test_a_connection_that_read_may_write_next(database: Database) -> None:
    for name in ("a", "b", "c"):
        names(database)
        with database.write() as session:
            session.add(line(name))
    assert names(database) == ["a", "b", "c"]


def test_writers_queue_and_none_is_lost(database: Database) -> None:
    def count() -> None:
        for _ in range(10):
            with database.write() as session:
                row = session.exec(select(Line).where(Line.name == "n").with_for_update()).one()
                row.next_revision += 1
                session.add(row)

    with database.write() as session:
        session.add(line("n"))
    crowd = [threading.Thread(target=count) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    with database.read() as session:
        assert session.exec(select(Line.next_revision)).one() == 41


def test_a_unique_key_that_somebody_took_is_a_conflict_to_try_again(database: Database) -> None:
    with database.write() as session:
        session.add(line("a"))
    with pytest.raises(WriteConflict), database.write() as session:
        session.add(line("a"))
    assert names(database) == ["a"]


def test_a_broken_rule_of_ours_is_no_refusal(database: Database) -> None:
    with pytest.raises(Exception, match=r"(?i)null") as caught, database.write() as session:
        session.connection().execute(text("INSERT INTO lines (name, next_revision) VALUES (NULL, 1)"))
    assert not isinstance(caught.value, WriteConflict)


def test_text_that_the_database_cannot_hold_is_a_bad_request(postgres_database: Database) -> None:
    with pytest.raises(BadRequest, match="NUL"), postgres_database.write() as session:
        session.add(line("a\0b"))
    with pytest.raises(BadRequest), postgres_database.write() as session:
        session.add(line("x" * 100))


def test_a_deadlock_is_told_as_a_database_that_is_down_and_changes_nothing(postgres_database: Database) -> None:
    with postgres_database.write() as session:
        session.add_all([line("a"), line("b")])
    both = threading.Barrier(2)
    told: list[str] = []

    def lock(first: str, second: str) -> None:
        try:
            with postgres_database.write() as session:
                session.exec(select(Line).where(Line.name == first).with_for_update()).one()
                both.wait()
                session.exec(select(Line).where(Line.name == second).with_for_update()).one()
        except DatabaseDown as error:
            told.append(error.reason)

    crowd = [threading.Thread(target=lock, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert told == ["deadlock detected"]


def test_who_stands_still_in_a_transaction_holds_nobody_up_for_ever(postgres_database: Database) -> None:
    with postgres_database.write() as session:
        session.add(line("n"))
    url = postgres_database.engine.url.update_query_dict(
        {"options": "-c lock_timeout=50ms -c idle_in_transaction_session_timeout=400ms"}
    )
    hasty = Database(url.render_as_string(hide_password=False))
    mine = select(Line).where(Line.name == "n").with_for_update()

    def stand_still() -> None:
        with hasty.write() as session:
            session.exec(mine).one().next_revision = 1
            with pytest.raises(DatabaseDown, match="lock timeout"):
                lock()
            for _ in range(100):  # until the transaction is taken away
                with suppress(DatabaseDown):
                    lock()
                    return

    def lock() -> None:
        with hasty.write() as session:
            session.exec(mine).one().next_revision = 7

    with pytest.raises(DatabaseDown):
        stand_still()
    with hasty.read() as session:
        assert session.exec(select(Line.next_revision).where(Line.name == "n")).one() == 7
    hasty.close()
    with postgres_database.read() as session:
        told = [session.connection().execute(text(f"SHOW {name}")).scalar() for name in
                ("lock_timeout", "idle_in_transaction_session_timeout")]  # fmt: skip
    assert told == ["30s", "15min"]


def test_a_database_that_is_not_there_is_down_and_its_password_is_not_told() -> None:
    nowhere = Database("postgresql+psycopg://nobody:secret@127.0.0.1:9/none")
    with pytest.raises(DatabaseDown) as caught:
        nowhere.ping()
    assert "secret" not in caught.value.message
    nowhere.close()


def test_a_file_that_is_no_database_is_down(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(DatabaseDown):
        Database(f"sqlite:///{tmp_path / 'x.db'}").ping()


def test_sqlite_keeps_what_it_promised(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        connection = session.connection()
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar_one() == 1
