"""The audit in the database: written with the change, chained afterwards, and nobody may change it."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlmodel import col, select

from registry.core.audit import breaks
from registry.core.errors import ScopeMissing
from registry.db.engine import Database
from registry.db.models import AuditHead, AuditRow
from registry.services import audit
from registry.services.tokens import Caller
from tests.factories import tiny_adapter, tiny_base
from tests.world import ADMIN, World, caller


def write(world: World, subject: str, **more: Any) -> None:
    with world.database.write() as session:
        audit.record(session, "test.done", subject, actor="ada", now=world.now, **more)


def chain(world: World, limit: int = audit.BATCH) -> int:
    with world.database.write() as session:
        return audit.chain(session, limit)


def found(world: World) -> list[int]:
    with world.database.read() as session:
        head, _, rows = audit.chained(session, ADMIN, after=0, limit=10_000)
    return [at.seq for at in breaks(rows, head)]


def placed(world: World) -> list[str]:
    return world.all(select(AuditRow.subject).where(col(AuditRow.seq).is_not(None)).order_by(col(AuditRow.seq)))


def test_what_did_not_happen_leaves_no_row(world: World) -> None:
    with suppress(ZeroDivisionError), world.database.write() as session:
        audit.record(session, "test.done", "x", actor="ada", now=world.now)
        session.flush()
        raise ZeroDivisionError
    assert world.all(select(AuditRow)) == []


def test_rows_are_chained_in_batches_and_the_chain_holds(world: World) -> None:
    for number in range(5):
        write(world, f"s{number}", before={"n": number}, after={"n": 0.1, "ü": None}, reason="wörds")
    assert [chain(world, 2) for _ in range(4)] == [2, 2, 1, 0]
    assert placed(world) == ["s0", "s1", "s2", "s3", "s4"]
    assert found(world) == []


def test_a_batch_that_dies_leaves_no_gap(world: World) -> None:
    for number in range(3):
        write(world, f"s{number}")
    with suppress(ZeroDivisionError), world.database.write() as session:
        audit.chain(session, 2)
        session.flush()
        raise ZeroDivisionError
    assert world.one(select(AuditHead)).seq == 0
    assert chain(world) == 3
    assert found(world) == []


def test_sequencers_at_once_give_each_row_one_place(world: World) -> None:
    for number in range(40):
        write(world, f"s{number}")
    crowd = [threading.Thread(target=lambda: [chain(world, 3) for _ in range(10)]) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert sorted(world.all(select(AuditRow.seq))) == list(range(1, 41))
    assert found(world) == []


def test_a_row_whose_transaction_ends_late_gets_the_next_place(postgres_database: Database, s3_store: Any) -> None:
    world = World(postgres_database, s3_store)
    with world.database.write() as slow:
        audit.record(slow, "test.done", "late", actor="ada", now=world.now)
        slow.flush()
        write(world, "quick")  # a greater id, seen first
        assert chain(world) == 1
    write(world, "after")
    assert chain(world) == 2
    assert placed(world) == ["quick", "late", "after"]
    assert found(world) == []


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit SET actor = 'eve'",
        "UPDATE audit SET after = '{}' WHERE seq IS NULL",
        "UPDATE audit SET seq = 9, link = 'x' WHERE seq = 1",
        "UPDATE audit SET seq = NULL, link = NULL WHERE seq = 1",
        "DELETE FROM audit WHERE seq = 1",
        "DELETE FROM audit WHERE seq IS NULL",
    ],
)
def test_the_database_lets_nobody_change_or_remove_a_row(world: World, tampering: str) -> None:
    write(world, "chained")
    chain(world)
    write(world, "waiting")
    with pytest.raises(DBAPIError, match="only ever added"), world.database.engine.begin() as connection:
        connection.execute(text(tampering))
    chain(world)
    assert found(world) == []


def test_postgresql_does_not_let_it_be_emptied(postgres_database: Database) -> None:
    with (
        pytest.raises(DBAPIError, match="only ever added"),
        postgres_database.engine.begin() as connection,
    ):
        connection.execute(text("TRUNCATE audit"))


@pytest.mark.parametrize(
    ("tampering", "at"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE seq = 2", [2]),
        ("DELETE FROM audit WHERE seq = 2", [2]),
        ("DELETE FROM audit WHERE seq = 4", [4]),
    ],
)
def test_who_gets_past_the_triggers_is_found_out(world: World, tampering: str, at: list[int]) -> None:
    for number in range(4):
        write(world, f"s{number}")
    chain(world)
    with world.database.engine.begin() as connection:
        on = " ON audit" if world.database.dialect == "postgresql" else ""
        for name in ("audit_says_on", "audit_keeps"):
            connection.execute(text(f"DROP TRIGGER {name}{on}"))
        connection.execute(text(tampering))
    assert found(world) == at


def test_admins_see_their_namespaces_and_the_chain_is_for_admins_of_all(world: World) -> None:
    for namespace in ("team", "other", None):
        write(world, f"of {namespace}", namespace=namespace)

    def seen(who: Caller, **filters: Any) -> set[str]:
        asked = {"namespace": None, "event": None, "subject": None, "actor": None, **filters}
        with world.database.read() as session:
            return {row.subject for row, _ in audit.page(session, who, before=1 << 60, limit=10, **asked)}

    assert seen(ADMIN) == {"of team", "of other", "of None"}
    assert seen(ADMIN, namespace="team") == {"of team"}
    assert seen(caller("x", team=["admin"], other=["read"])) == {"of team"}
    assert seen(ADMIN, event="test.", subject="of other", actor="ada") == {"of other"}
    assert seen(ADMIN, event="job.") == set()
    with pytest.raises(ScopeMissing):
        seen(caller("x", team=["admin"]), namespace="other")
    with pytest.raises(ScopeMissing):
        seen(caller("x", team=["read", "publish"]))
    with pytest.raises(ScopeMissing), world.database.read() as session:
        audit.chained(session, caller("x", team=["admin"]), after=0, limit=1)


def test_a_push_says_who_made_which_version_and_which_alias_moved(world: World, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    ada = caller("ada", team=["publish", "read"], base=["publish", "read"])
    world.push_base(base, line="demo")
    for seed in (1, 2):
        adapter = tiny_adapter(tmp_path / f"a{seed}", base, seed=seed)
        world.push_adapter(adapter, "team/bot", base, who=ada, aliases=["dev"], message="better")
    rows = world.all(select(AuditRow).where(AuditRow.namespace == "team").order_by(col(AuditRow.id)))
    told = [(row.event, row.subject.partition("p")[0] or "push", row.actor) for row in rows if "push" not in row.event]
    assert told == [
        ("alias.moved", "team/bot:dev", "ada"), ("adapter.version", "team/bot@v1", "ada"),
        ("alias.moved", "team/bot:dev", "ada"), ("adapter.version", "team/bot@v2", "ada"),
    ]  # fmt: skip
    moved = [row for row in rows if row.event == "alias.moved"][-1]
    assert '"version":1' in (moved.before or "") and '"version":2' in (moved.after or "")
    assert moved.reason == "better"
    states = [row.event for row in rows if row.event.startswith("push.")]
    assert states[:4] == ["push.opened", "push.verifying", "push.verified", "push.committed"]
    chain(world)
    assert found(world) == []
