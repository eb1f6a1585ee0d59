"""Base models: named by content, registered by table, members of lines, derived from each other."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from sqlalchemy import text as sql
from sqlmodel import select

from registry.core.base_model import BaseModel, Tensor
from registry.core.digest import Digest
from registry.core.errors import (
    BadManifest,
    BadRequest,
    BaseNotFound,
    PathUnusable,
    RevisionTaken,
    ScopeMissing,
    UnlikeLine,
)
from registry.core.fit import FitClass
from registry.db.engine import Database
from registry.db.models import Base, Derivation, Revision, TargetFit
from registry.schemas import BaseRegistration, DerivationRequest, RevisionRequest, Wishes
from registry.services import bases, fits, pushes
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests.factories import base_of, readable_base, tiny_adapter, tiny_base
from tests.world import ADMIN, SETTINGS, World, adapter_push, caller, table_of

AUTHOR = caller("alice", team=["read", "publish"])
READER = caller("reader", team=["read"])


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "two", seed=1)


def test_a_base_is_registered_once_whoever_brings_it(world: World, one: Path) -> None:
    first = world.register(base_of(one), AUTHOR)
    assert world.register(base_of(one), ADMIN, line="demo").id == first.id
    with world.database.read() as session:
        info = bases.show(session, READER, "demo")
    assert (info.digest, info.weights, info.revisions) == (str(base_of(one).digest), "absent", ["demo@r1"])


def test_an_author_needs_no_administrator_but_a_line_speaks_for_everybody(embedded: World, one: Path) -> None:
    embedded.register(base_of(one), AUTHOR)
    for refused in (READER, caller("nobody")):
        with pytest.raises(ScopeMissing):
            embedded.register(base_of(one), refused)
    for wish in ({"line": "demo"}, {"names": ["org/model"]}):
        with pytest.raises(ScopeMissing):
            embedded.register(base_of(one), AUTHOR, **wish)
    with pytest.raises(ScopeMissing):
        embedded.register(base_of(one), AUTHOR, location=f"hf://org/model@{'0' * 40}")
    keeper = caller("keeper", base=["publish"])
    embedded.register(base_of(one), keeper, line="demo", names=["org/model"])


def test_weights_arrive_by_a_push_after_the_table(world: World, one: Path) -> None:
    world.register(base_of(one), AUTHOR)
    outcome = world.push_base(one, line="demo")
    with world.database.read() as session:
        info = bases.show(session, ADMIN, "demo@r1")
    assert (info.weights, info.manifest) == ("full", outcome["digest"])
    assert info.size == sum(path.stat().st_size for path in one.iterdir())


def test_a_line_grows_by_one_and_its_newest_member_is_not_repeated(world: World, one: Path, two: Path) -> None:
    for folder, name in ((one, "r1"), (one, "r1"), (two, "r2"), (one, "r3")):
        assert world.push_base(folder, line="demo")["version"] == name
    with pytest.raises(RevisionTaken):
        world.register(base_of(two), line="demo", revision=3)
    with world.database.read() as session:
        assert bases.find(session, "demo").digest == str(base_of(one).digest)
        assert bases.find(session, "demo@r2").digest == str(base_of(two).digest)
        with pytest.raises(BaseNotFound, match="Did you mean 'demo'"):
            bases.find(session, "dem0")


def test_a_line_goes_back_to_an_earlier_revision_under_a_new_number(world: World, one: Path, two: Path) -> None:
    for folder in (one, two):
        world.push_base(folder, line="demo")

    def go_back(revision: int, who: Caller = ADMIN, line: str = "demo") -> str:
        with world.database.write() as session:
            return bases.repeat(session, who, line, RevisionRequest(revision=revision), world.now).digest

    assert go_back(1) == go_back(1) == str(base_of(one).digest)
    assert go_back(3) == str(base_of(one).digest)  # which it is
    with world.database.read() as session:
        assert bases.find(session, "demo").digest == bases.find(session, "demo@r3").digest == str(base_of(one).digest)
        assert bases.find(session, "demo@r2").digest == str(base_of(two).digest)
    assert len(world.all(select(Revision))) == 3
    with pytest.raises(BaseNotFound):
        go_back(4)
    with pytest.raises(BaseNotFound):
        go_back(1, line="other")
    with pytest.raises(ScopeMissing):
        go_back(1, AUTHOR)


def test_a_line_does_not_go_on_with_another_model_by_mistake(world: World, one: Path) -> None:
    other = BaseModel.of([replace(tensor, name=f"other.{tensor.name}") for tensor in base_of(one).tensors])
    world.push_base(one, line="demo")
    with pytest.raises(UnlikeLine, match="goes on from demo@r1"):
        world.register(other, line="demo")
    assert len(world.all(select(Revision))) == 1
    world.register(other, line="other")
    world.register(other, line="demo", unlike=True)
    assert len(world.all(select(Revision))) == 3


def test_revisions_that_race_get_numbers_of_their_own(world: World, tmp_path: Path) -> None:
    models = [base_of(tiny_base(tmp_path / f"b{seed}", seed=seed)) for seed in range(4)]
    threads = [threading.Thread(target=world.register, args=(model,), kwargs={"line": "demo"}) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.number for row in world.all(select(Revision))) == [1, 2, 3, 4]


def test_a_table_is_what_its_digest_says(embedded: World, one: Path) -> None:
    for text in ("no base64!", "AAAA", table_of(base_of(one))[:-40]):
        with pytest.raises(BadManifest):
            pushes.read_table(text)
    with embedded.database.read() as session, pytest.raises(BaseNotFound):
        bases.table(session, ADMIN, "demo")
    embedded.register(base_of(one), line="demo")
    with embedded.database.read() as session:
        digest, body = bases.table(session, READER, "demo")
    assert (digest, body) == (str(base_of(one).digest), base_of(one).to_compressed())


def test_locations_are_pinned_or_below_an_allowed_root(tmp_path: Path) -> None:
    from dataclasses import replace

    settings = replace(SETTINGS, file_roots=(tmp_path,))
    pinned = f"hf://org/model@{'a' * 40}"
    assert bases.check_location(pinned, settings) == pinned
    assert bases.check_location(f"file://{tmp_path}/x", settings) == f"file://{tmp_path}/x"
    for bad in ("hf://org/model", "hf://org/model@main", "https://example.org/x", "s3://bucket/x"):
        with pytest.raises(BadRequest):
            bases.check_location(bad, settings)
    for outside in ("file:///etc", f"file://{tmp_path}/../x", f"file://host{tmp_path}/x", f"file://{tmp_path}/%2e%2e/x"):
        with pytest.raises(PathUnusable):
            bases.check_location(outside, settings)
    with pytest.raises(BadRequest, match="embedded"):
        bases.check_location(f"file://{tmp_path}/x", replace(settings, mode="fleet"))


def test_a_derivation_is_declared_and_what_is_measured_replaces_it(world: World, one: Path, two: Path) -> None:
    world.push_base(one, line="demo")
    world.push_base(two, line="demo", parent=str(base_of(one).digest), parent_kind="continued")
    assert world.one(select(Derivation)).evidence == "declared"
    world.push_adapter(tiny_adapter(one.parent / "a", one), "team/bot", one)
    drift = dict.fromkeys((tensor.name for tensor in base_of(two).tensors), 0.5)
    with world.database.write() as session:
        old, new = bases.find(session, "demo@r1"), bases.find(session, "demo@r2")
        bases.record_derivation(session, new, old, "continued", "measured", {"drift": drift}, world.now)
        bases.record_derivation(session, new, old, "continued", "declared", {}, world.now)
    assert world.one(select(Derivation)).evidence == "measured"
    [fit] = [row for row in world.all(select(TargetFit)) if row.new_id == new.id]
    assert (fit.fit, fit.drift) == (FitClass.SAME_SHAPE, 0.5)
    with world.database.read() as session:
        found = bases.difference(session, READER, "demo@r1", "demo@r2")
    assert found.drift == 0.5
    assert found.derivation is not None
    assert found.derivation["kind"] == "continued"
    assert found.equal == 0
    assert len(found.changed) == len(base_of(one).tensors)


@pytest.mark.parametrize("drift", ["abc", 7, [1, "a"], {"model.norm.weight": "far"}, {"model.norm.weight": 0.5}])
def test_a_drift_that_was_only_declared_is_none(embedded: World, one: Path, two: Path, drift: Any) -> None:
    embedded.push_base(one, line="demo")
    embedded.push_base(two, line="demo")
    request = DerivationRequest(parent="demo@r1", kind="continued", detail={"drift": drift})
    with embedded.database.write() as session:
        bases.derive(session, ADMIN, "demo@r2", request, embedded.now)
    with embedded.database.read() as session:
        assert bases.difference(session, READER, "demo@r1", "demo@r2").drift is None
    embedded.push_adapter(tiny_adapter(one.parent / "a", one, targets=("q_proj",)), "team/bot", one)
    assert embedded.one(select(TargetFit)).drift is None


def test_a_refusal_looks_at_few_bases_and_no_huge_table(embedded: World, one: Path, tmp_path: Path) -> None:
    huge = tuple(
        Tensor(f"t{n:06}", "F32", (1,), Digest("b3", blake3(str(n).encode()).hexdigest())) for n in range(40_000)
    )
    small = [BaseModel((Tensor("t", "F32", (n,), huge[0].digest),)) for n in range(1, 30)]
    for model in (base_of(one), *small, BaseModel(huge)):
        embedded.register(model)
    with embedded.database.read() as session:
        found = bases.models(session)
    assert len(found) <= 16
    assert {model.digest for model in found.values()} <= {model.digest for model in small}


def test_nothing_is_derived_from_itself(embedded: World, one: Path) -> None:
    embedded.register(base_of(one), line="demo")
    with embedded.database.write() as session, pytest.raises(BadRequest, match="itself"):
        bases.derive(session, ADMIN, "demo", DerivationRequest(parent="demo@r1", kind="cast"), embedded.now)


def test_a_declared_name_stands_for_registered_bases(embedded: World, one: Path, two: Path) -> None:
    embedded.register(base_of(one), line="demo", names=["org/model", "org/model@abc"])
    embedded.register(base_of(two), line="demo", names=["org/model"])

    def meant(name: str | None, revision: str | None = None) -> set[str]:
        with embedded.database.read() as session:
            return {base.digest for base in bases.meant_by(session, name, revision)}

    first, second = str(base_of(one).digest), str(base_of(two).digest)
    assert meant("org/model") == {first, second}
    assert meant("org/model", "abc") == {first}
    assert meant("demo@r2") == {second}
    assert meant("demo") == {first, second}
    assert meant("/home/somebody/model") == meant(None) == meant("demo@rX") == set()


def test_fits_are_complete_whichever_came_first(world: World, tmp_path: Path, one: Path, two: Path) -> None:
    wide = tiny_base(tmp_path / "wide", width=32)
    world.push_base(one)
    world.push_adapter(tiny_adapter(tmp_path / "a", one), "team/a", one)
    world.push_base(two)
    world.push_base(wide)
    world.push_adapter(tiny_adapter(tmp_path / "b", two, targets=("down_proj",)), "team/b", two)
    world.push_adapter(tiny_adapter(tmp_path / "c", two, targets=("down_proj",), seed=1), "team/c", two)
    rows = world.all(select(TargetFit))
    names = {base.id: base.digest for base in world.all(select(Base))}
    short = {str(base_of(one).digest): "one", str(base_of(two).digest): "two", str(base_of(wide).digest): "wide"}
    found = sorted((short[names[row.old_id]], short[names[row.new_id]], row.fit) for row in rows)
    assert found == [
        ("one", "two", "same-shape"),
        ("one", "wide", "incompatible"),
        ("two", "one", "same-shape"),
        ("two", "wide", "incompatible"),
    ]
    with world.database.write() as session:
        for row in session.exec(select(Base)).all():
            assert fits.ensure_fits(session, new=row) == 0


def test_a_base_and_a_version_that_come_at_once_do_not_miss_each_other(
    postgres_database: Database, local_store: LocalStore, tmp_path: Path, one: Path, two: Path
) -> None:
    world = World(postgres_database, local_store)
    world.push_base(one)
    request, contents = adapter_push(tiny_adapter(tmp_path / "a", one), one)
    info = world.open("adapter", "team/a", request)
    world.send(info, contents)
    world.ask(info.id)
    commit = threading.Thread(target=world.verify)
    waiting = sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    with world.database.write() as session:
        bases.ensure(session, base_of(two), "admin", world.now)
        commit.start()
        with world.database.read() as looking:
            while commit.is_alive() and not looking.connection().execute(waiting).scalar_one():
                commit.join(0.02)
        assert commit.is_alive()
    commit.join()
    assert world.one(select(TargetFit)).fit == FitClass.SAME_SHAPE


def test_a_wish_that_is_only_half_made_is_refused(embedded: World, one: Path) -> None:
    request = BaseRegistration(table=table_of(base_of(one)), wishes=Wishes(parent="b3:" + "0" * 64, parent_kind="cast"))
    with embedded.database.write() as session, pytest.raises(BaseNotFound):
        bases.register(session, ADMIN, SETTINGS, base_of(one), request, embedded.now)


def test_names_that_two_give_at_once_both_stay(world: World, one: Path) -> None:
    world.register(base_of(one))
    with world.database.write() as session:
        base = session.exec(select(Base)).one()
        assert base.names == []
        session.connection().execute(sql("UPDATE bases SET names = '[\"org/one\"]'"))  # another, since it was read
        bases.apply_wishes(session, base, Wishes(names=["org/two"]), "ada", world.now)
    assert world.one(select(Base.names)) == ["org/one", "org/two"]


def test_a_tokenizer_that_comes_with_the_weights_changes_what_fits_say(world: World, tmp_path: Path) -> None:
    one, two = readable_base(tmp_path / "one"), readable_base(tmp_path / "two", drift=0.1)
    file = two / "tokenizer.json"
    told = json.loads(file.read_text())
    names = list(vocabulary := told["model"]["vocab"])
    vocabulary[names[10]], vocabulary[names[11]] = vocabulary[names[11]], vocabulary[names[10]]
    file.write_text(json.dumps(told))
    for folder in (one, two):
        model = base_of(folder)
        world.register(replace(model, tokenizer=type(model.tokenizer)()))
    world.push_adapter(tiny_adapter(tmp_path / "adapter", one, record_base=True), "team/bot", base_of(one))
    assert world.all(select(TargetFit.vocabulary_changed)) == [False]
    world.push_base(one)
    world.push_base(two)
    assert world.all(select(TargetFit.vocabulary_changed)) == [True]
