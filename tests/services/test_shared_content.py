"""Equal content in two namespaces is one to the store, and two to people: neither hears of the other's."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from registry.core.errors import BadRequest, VersionQuarantined
from registry.core.names import SeriesName
from registry.db import queries
from registry.db.models import Adapter, Job, Version
from registry.schemas import EvaluationInfo, JobRequest
from registry.services import evaluations, jobs, withdrawals
from registry.services.references import find_adapter
from registry.services.tokens import Caller
from tests.factories import tiny_adapter
from tests.upgrade import ROWS, Upgrade, lines
from tests.world import ADMIN, World, caller


class Twins:
    """One adapter and one suite, each as ``alpha``'s and as ``beta``'s, and a person of beta."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.upgrade = world, Upgrade(world, folder / "bases", {"serving": 0.9})
        adapter = tiny_adapter(folder / "adapter", self.upgrade.v1, seed=5, record_base=True)
        told = [world.push_adapter(adapter, name, self.upgrade.v1) for name in ("alpha/secret", "beta/mine")]
        for name in ("alpha/plan", "beta/eval"):
            world.push_rows("suite", name, lines(ROWS[:60]))
        [self.digest] = {one["digest"] for one in told}
        self.upgrade.rows, self.upgrade.tiers[self.digest] = ROWS[:60], "serving"
        self.ben = world.grant(caller("ben", beta=["read", "publish", "run"]))

    def asks(self, who: Caller, recipe: dict[str, object], **more: object) -> Job:
        with self.world.database.write() as session:
            return jobs.submit(session, who, JobRequest(recipe=recipe, **more), self.world.now)[0]

    def of(self, name: str) -> tuple[Adapter, Version]:
        with self.world.database.read() as session:
            adapter = find_adapter(session, ADMIN, SeriesName.parse(name))
            assert adapter.id is not None
            version = queries.version_by_number(session, adapter.id, 1)
            assert version is not None
            return adapter, version

    def scores(self, name: str) -> Sequence[EvaluationInfo]:
        adapter, _ = self.of(name)
        assert adapter.id is not None
        with self.world.database.read() as session:
            return evaluations.described(queries.evaluations_of(session, adapter.id, after=0, limit=9))

    def quarantine(self, name: str) -> None:
        adapter, version = self.of(name)
        with self.world.database.write() as session:
            withdrawals.move(
                session, ADMIN, adapter, version, "quarantine", reason="malware", force=False, now=self.world.now
            )


@pytest.fixture
def twins(world: World, tmp_path: Path) -> Twins:
    return Twins(world, tmp_path)


EVALUATE = {"kind": "evaluate", "suite": "beta/eval", "adapters": ["beta/mine@v1"], "bare": False}


def test_a_score_is_told_where_it_was_asked_for_and_names_the_suite_that_is_known_there(twins: Twins) -> None:
    assert twins.asks(twins.ben, EVALUATE).namespace == "beta"  # not alpha's, whose content came first
    twins.upgrade.work()
    [score] = twins.scores("beta/mine")
    assert (score.suite, score.version) == ("beta/eval@v1", "beta/mine@v1")
    assert twins.scores("alpha/secret") == []


def test_what_a_job_is_about_has_the_names_that_one_may_read(twins: Twins) -> None:
    job = twins.asks(twins.ben, EVALUATE)
    told = [job.recipe["suite"], *job.recipe["adapters"], job.recipe["base"]]
    with twins.world.database.read() as session:
        for who in (twins.ben, ADMIN):  # an admin reads alpha's too, whose content came first
            names = jobs.names(session, who, job)
            assert [names[digest] for digest in told] == ["beta/eval@v1", "beta/mine@v1", "demo@r1"]
        assert jobs.names(session, caller("other", gamma=["read"]), job) == {job.recipe["base"]: "demo@r1"}


def test_of_namespaces_in_which_one_may_run_the_one_that_was_named_has_the_work(twins: Twins) -> None:
    both = twins.world.grant(caller("both", alpha=["read", "run"], beta=["read", "run"]))
    assert twins.asks(both, EVALUATE).namespace == "beta"
    alpha = EVALUATE | {"suite": "alpha/plan", "adapters": ["alpha/secret@v1"]}
    assert twins.asks(both, alpha).namespace == "alpha"


def test_who_may_read_alone_has_the_score_told_of_what_was_scored(twins: Twins) -> None:
    guest = twins.world.grant(caller("guest", alpha=["read"], gamma=["read", "run"]))
    alpha = EVALUATE | {"suite": "alpha/plan", "adapters": ["alpha/secret@v1"]}
    assert twins.asks(guest, alpha, namespace="gamma").namespace == "gamma"
    twins.upgrade.work()
    assert [score.suite for score in twins.scores("alpha/secret")] == ["alpha/plan@v1"]
    assert twins.scores("beta/mine") == []


def test_no_work_is_done_on_what_is_quarantined_however_it_is_named(twins: Twins) -> None:
    twins.quarantine("beta/mine")
    for name in ("beta/mine@v1", twins.digest):
        compress = {"kind": "compress", "adapter": name, "rank": 1}
        with pytest.raises(VersionQuarantined):
            twins.asks(twins.ben, compress, output={"adapter": "beta/copy"}, namespace="beta")
    with pytest.raises(BadRequest):  # alpha's is not ben's
        twins.asks(caller("carl", gamma=["read", "run"]), {"kind": "evaluate", "suite": "beta/eval",
                   "adapters": [twins.digest], "base": str(twins.upgrade.old)}, namespace="gamma")  # fmt: skip


def test_content_that_is_at_hand_in_another_readable_place_may_be_worked_on(twins: Twins) -> None:
    twins.quarantine("alpha/secret")
    both = twins.world.grant(caller("both", alpha=["read"], beta=["read", "publish", "run"]))
    compress = {"kind": "compress", "adapter": twins.digest, "rank": 1}
    assert twins.asks(both, compress, output={"adapter": "beta/copy"}).namespace == "beta"
