"""Named questions: keyset pages are complete and without repeats, compatibility joins what is stored."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select as columns
from sqlmodel import Session, col, select

from registry.core.digest import Digest
from registry.db import queries
from registry.db.among import among
from registry.db.engine import Database
from registry.db.models import Adapter, Alias, Base, Line, Revision, TargetFit, TargetSet, Version

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def digest(text: str, kind: str = "b3") -> str:
    return f"{kind}:{Digest.sha256(text.encode()).hex}"


def base(session: Session, name: str) -> Base:
    row = Base(
        digest=digest(name), weights_digest=digest(name), arch_digest=digest(name), arch_kind="none", model_type="",
        parameters=1, weights="full", names=[], created_by="t", created_at=NOW,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def version(session: Session, on: Base, name: str, targets: int | None = None, **more: Any) -> Version:
    namespace, _, series = name.partition("/")
    adapter = queries.adapter_by_name(session, namespace, series)
    if adapter is None:
        adapter = Adapter(namespace=namespace, name=series, task=more.pop("task", None), created_at=NOW)
        session.add(adapter)
        session.flush()
    number = adapter.next_version
    adapter.next_version += 1
    for old in session.exec(select(Version).where(Version.adapter_id == adapter.id, Version.base_id == on.id)):
        old.latest = False
    session.flush()
    given: dict[str, Any] = {"evidence": "recorded", "rank": 8, "engines": 1} | more
    row = Version(
        adapter_id=some(adapter.id), number=number, digest=digest(f"{name}{number}", "sha256"), base_id=some(on.id),
        target_set_id=targets, latest=True, binding={}, peft_type="LORA", runnable=True, spec={}, size=1,
        created_by="t", created_at=NOW, **given,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def some(identity: int | None) -> int:
    """The id of a row that is stored."""
    assert identity is not None
    return identity


def compatible(session: Session, base_id: int, classes: Sequence[str] = (), **more: Any) -> list[str]:
    wanted: dict[str, Any] = {
        "exact": True, "classes": list(classes),
        "alias": None, "max_rank": None, "engine_bit": None, "evidence": None, "namespaces": None, "task": None,
        "after": 0, "limit": 50,
    } | more  # fmt: skip
    rows = queries.compatible_versions(session, base_id=base_id, **wanted)
    return [f"{adapter.namespace}/{adapter.name}@v{row.number}" for row, adapter, _ in rows]


def test_one_statement_asks_for_any_number_of_values(database: Database) -> None:
    numbers = columns(col(Base.id)).where(among(col(Base.id), "ids")).order_by(col(Base.id))
    texts = columns(col(Base.id)).where(among(col(Base.digest), "digests")).order_by(col(Base.id))
    with database.write() as session:
        rows = [base(session, name) for name in ("a", "b", "it's; \"c\"")]
        ids = [some(row.id) for row in rows]
        for which in ([], [0], [2, 0], [0, 1, 2]):
            wanted = [ids[i] for i in sorted(which)]
            digests = {rows[i].digest for i in which} | {"b3:none", '\'") OR 1 = 1'}
            assert list(session.execute(numbers, {"ids": {ids[i] for i in which}}).scalars()) == wanted
            assert list(session.execute(texts, {"digests": digests}).scalars()) == wanted
        long = columns(col(Adapter.id)).where(among(col(Adapter.name), "names"))
        version(session, rows[0], f"team/{'n' * 64}")
        assert session.execute(long, {"names": ["n" * 65]}).all() == []
        assert len(session.execute(long, {"names": ["n" * 64]}).all()) == 1


def test_such_a_statement_is_answered_from_an_index(database: Database) -> None:
    query = columns(col(Version.id)).where(among(col(Version.adapter_id), "series"))
    text = str(query.compile(database.engine, compile_kwargs={"render_postcompile": True}))
    with database.write() as session:
        connection = session.connection()
        if database.dialect == "sqlite":
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", ("[1, 2]",)).all()
            assert any("SEARCH versions USING" in row[-1] for row in plan), plan
        else:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # of an empty table it would read all
            plan = connection.exec_driver_sql(f"EXPLAIN {text}", {"series": [1, 2]}).all()
            assert any("Index Cond" in row[0] and "ANY" in row[0] for row in plan), plan


def test_pages_of_adapters_are_complete_and_without_repeats_under_inserts(database: Database) -> None:
    with database.write() as session:
        on = base(session, "w")
        for number in range(7):
            version(session, on, f"team/a{number}")
    seen: list[str] = []
    after = ("", "")
    while True:
        with database.read() as session:
            page = queries.adapters_page(session, namespaces=None, text=None, task=None, after=after, limit=2)
        if not page:
            break
        seen += [row.name for row in page]
        after = (page[-1].namespace, page[-1].name)
        with database.write() as session:
            version(session, session.exec(select(Base)).one(), f"early/x{len(seen)}")
    assert seen == [f"a{number}" for number in range(7)]


@pytest.mark.parametrize("letters", ["a.b", "a_b", "%"])
def test_a_search_takes_its_letters_as_they_are(database: Database, letters: str) -> None:
    with database.write() as session:
        on = base(session, "w")
        for name in ("a.b", "a_b", "axb"):
            version(session, on, f"team/{name}")
    with database.read() as session:
        page = queries.adapters_page(session, namespaces=["team"], text=letters, task=None, after=("", ""), limit=9)
    assert [row.name for row in page] == ([letters] if letters != "%" else [])


def test_many_aliases_are_looked_up_at_once_each_in_its_place(database: Database) -> None:
    with database.write() as session:
        on = base(session, "w")
        first, second = version(session, on, "team/one"), version(session, on, "team/two")
        for pointed in (first, second):
            at = {"adapter_id": pointed.adapter_id, "base_id": some(on.id), "version_id": some(pointed.id)}
            session.add(Alias(**at, name="prod", generation=1))
        session.flush()
        asked = [
            queries.Pointer("team", "two", "prod", on.digest),
            queries.Pointer("team", "one", "canary", on.digest),
            queries.Pointer("team", "one", "prod", on.digest),
            queries.Pointer("team", "one", "prod", "b3:0"),
            queries.Pointer("team", "two", "prod", on.digest),
        ]
        found = [None if pointed is None else pointed.version_id for pointed in queries.pointed_at(session, asked)]
    assert found == [second.id, None, first.id, None, second.id]


def test_only_the_newest_of_a_series_on_a_base_is_compatible_or_what_an_alias_names(database: Database) -> None:
    with database.write() as session:
        on = base(session, "w")
        first = version(session, on, "team/bot")
        version(session, on, "team/bot")
        session.add(
            Alias(
                adapter_id=first.adapter_id, base_id=some(on.id), name="prod", version_id=some(first.id), generation=1
            )
        )
        session.flush()
        assert compatible(session, some(on.id)) == ["team/bot@v2"]
        assert compatible(session, some(on.id), alias="prod") == ["team/bot@v1"]
        assert compatible(session, some(on.id), alias="canary") == []


def test_compatibility_is_narrowed_by_everything_asked_for(database: Database) -> None:
    with database.write() as session:
        on = base(session, "w")
        version(session, on, "team/small", rank=4, engines=0b01, task="qa")
        version(session, on, "team/large", rank=64, engines=0b10, evidence="declared")
        version(session, on, "other/third", rank=8, engines=0b11, evidence="resolved")
        narrowed: list[tuple[dict[str, Any], list[str]]] = [
            ({"max_rank": 8}, ["team/small@v1", "other/third@v1"]),
            ({"engine_bit": 0b10}, ["team/large@v1", "other/third@v1"]),
            ({"evidence": ["recorded", "resolved"]}, ["team/small@v1", "other/third@v1"]),
            ({"namespaces": ["team"]}, ["team/small@v1", "team/large@v1"]),
            ({"namespaces": []}, []),
            ({"task": "qa"}, ["team/small@v1"]),
            ({"task": "qa", "namespaces": ["other"]}, []),
        ]
        for filters, expected in narrowed:
            assert compatible(session, some(on.id), **filters) == expected, filters


def test_compatibility_goes_over_more_target_sets_than_one_statement_takes(database: Database) -> None:
    with database.write() as session:
        old, new = base(session, "old"), base(session, "new")
        for number in range(queries._RANGES + 5):
            targets = TargetSet(digest=digest(f"t{number}", "sha256"), body=b"[]")
            session.add(targets)
            session.flush()
            version(session, old, f"team/a{number:04}", targets.id)
            session.add(
                TargetFit(
                    old_id=some(old.id), new_id=some(new.id), target_set_id=some(targets.id), fit="same-shape",
                    reasons=[], vocabulary_changed=False,
                )
            )  # fmt: skip
        session.flush()
        seen: list[str] = []
        after = 0
        while page := compatible(session, some(new.id), ["same-shape"], after=after, limit=100):
            seen += page
            name = page[-1].partition("@")[0].partition("/")[2]
            after = session.exec(select(Version.id).join(Adapter).where(Adapter.name == name)).one() or 0
    assert seen == [f"team/a{number:04}@v1" for number in range(queries._RANGES + 5)]


def test_a_bases_line_is_the_one_it_joined_last_and_its_current_base_the_newest(database: Database) -> None:
    with database.write() as session:
        bases = [base(session, name) for name in ("a", "b", "c")]
        lines = [Line(name=name, created_at=NOW) for name in ("one", "two")]
        session.add_all(lines)
        session.flush()
        joins = [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 2, 2)]
        for which, member, number in joins:
            session.add(
                Revision(
                    line_id=some(lines[which].id),
                    number=number,
                    base_id=some(bases[member].id),
                    created_by="t",
                    created_at=NOW,
                )
            )
            session.flush()
        ids = [row.id or 0 for row in bases]
        assert queries.revision_names(session, ids) == {
            ids[0]: ["one@r1", "two@r1"], ids[1]: ["one@r2"], ids[2]: ["two@r2"],
        }  # fmt: skip
        assert queries.current_base_of_line_of(session, ids[0]) == bases[2]
        assert queries.current_base_of_line_of(session, ids[1]) == bases[1]
        assert queries.base_of_revision(session, "one", None) == bases[1]
        assert queries.base_of_revision(session, "one", 1) == bases[0]
        assert session.exec(select(Base).order_by(col(Base.id))).all() == bases
