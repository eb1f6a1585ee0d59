"""Evaluations: a summary in a row, records in a blob, and what a measured gain says of a declared binding."""

from pathlib import Path

import pytest
from sqlmodel import col, select

from registry.core.records import parse_records
from registry.db import queries
from registry.db.models import Evaluation, Version
from registry.schemas import JobRequest
from registry.services import evaluations, jobs
from registry.services.blobs import blob_key
from tests.upgrade import HARNESS, POLICY, Upgrade
from tests.world import ADMIN, World


@pytest.fixture
def here(world: World, tmp_path: Path) -> Upgrade:
    """Two versions of an adapter, each bound by its author's word only."""
    made = Upgrade(world, tmp_path, {"serving": 1.0})
    made.push(seed=1)
    made.push(seed=2)
    with world.database.write() as session:
        for version in session.exec(select(Version)):
            version.evidence = "declared"
            session.add(version)
    return made


def evaluate(here: Upgrade, *versions: str, bare: bool) -> None:
    adapters = [f"team/bot@{version}" for version in versions]
    recipe = {"kind": "evaluate", "suite": "team/suite", "adapters": adapters, "bare": bare}
    if not adapters:
        recipe["base"] = here.old
    with here.world.database.write() as session:
        jobs.submit(session, ADMIN, JobRequest(recipe=recipe), here.world.now)
    here.work()


def evidence(here: Upgrade) -> list[str]:
    return [version.evidence for version in here.world.all(select(Version).order_by(col(Version.number)))]


def test_the_row_sums_up_what_the_blob_tells_item_by_item(here: Upgrade) -> None:
    evaluate(here, "v1", bare=True)
    rows: list[Evaluation] = here.world.all(select(Evaluation).order_by(col(Evaluation.version_id)))
    assert {row.version_id is None for row in rows} == {True, False}
    for row in rows:
        assert row.harness == HARNESS
        assert set(row.summary) == {"accuracy"}
        with here.world.store.open(blob_key(row.records)) as blob:
            told = parse_records(blob.read(0, blob.size))
        for split, told_of in row.summary["accuracy"].items():
            scores = [record.metrics["accuracy"] for record in told if record.split == split]
            assert told_of == {"n": len(scores), "mean": pytest.approx(sum(scores) / len(scores))}
            assert told_of["mean"] == (1.0 if row.version_id else 0.0)


@pytest.mark.parametrize("bare_first", [True, False])
def test_value_over_the_bare_base_is_behavioural_evidence_in_whichever_order_it_is_measured(
    here: Upgrade, *, bare_first: bool
) -> None:
    here.policy(POLICY)
    if bare_first:
        evaluate(here, bare=True)
        assert evidence(here) == ["declared", "declared"]
        evaluate(here, "v1", bare=False)
    else:
        evaluate(here, "v1", bare=False)
        assert evidence(here) == ["declared", "declared"]
        evaluate(here, bare=True)
    assert evidence(here) == ["behavioural", "declared"]


def test_what_adds_no_value_or_is_judged_by_no_gate_stays_declared(here: Upgrade) -> None:
    evaluate(here, "v1", bare=True)
    assert evidence(here) == ["declared", "declared"]  # no policy, no gate
    here.policy(POLICY)
    here.skills = {"serving": 0.0}
    evaluate(here, "v2", bare=False)
    assert evidence(here) == ["declared", "declared"]


def test_stronger_evidence_is_not_replaced(here: Upgrade) -> None:
    here.policy(POLICY)
    with here.world.database.write() as session:
        version = session.exec(select(Version).where(Version.number == 1)).one()
        version.evidence, version.binding = "recorded", {"recorded": "x"}
        session.add(version)
    evaluate(here, "v1", bare=True)
    assert evidence(here)[0] == "recorded"
    assert here.world.one(select(Version).where(Version.number == 1)).binding == {"recorded": "x"}


def test_an_evaluation_names_its_base_version_and_suite(here: Upgrade) -> None:
    evaluate(here, "v1", "v2", bare=True)
    with here.world.database.read() as session:
        adapter = session.exec(select(Version.adapter_id)).first()
        found = evaluations.described(queries.evaluations_of(session, adapter or 0, after=0, limit=9))
    assert sorted(str(info.version) for info in found) == ["team/bot@v1", "team/bot@v2"]
    assert {info.base for info in found} == {here.old}
    assert {info.suite for info in found} == {"team/suite@v1"}
