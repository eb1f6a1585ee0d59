"""Laws of schedules: what is due fires once, however many look; and with its author's rights."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import col, select

from registry.core.errors import BadRequest, BaseNotFound, DatasetNotFound, LoractlError, ScheduleNotFound, ScopeMissing
from registry.db.engine import Database
from registry.db.models import Campaign, Firing, Job, Schedule
from registry.schemas import ScheduleRequest
from registry.services import schedules, tokens
from registry.services.tokens import Caller
from registry.storage.local import LocalStore
from tests.factories import tiny_base
from tests.world import ADMIN, World

ROWS = b'{"prompt": "2+2=", "completion": " 4"}\n'
RECIPE = {"kind": "finetune", "base": "demo", "datasets": ["team/rows"], "steps": 2}
TRAIN = {"job": {"recipe": RECIPE, "output": {"adapter": "team/bot"}}}


@dataclass
class Clockwork:
    """A registry with a base and a dataset, and tokens that are stored."""

    world: World
    author: Caller

    def token(self, name: str, **scopes: Any) -> Caller:
        text = tokens.make_text()
        with self.world.database.write() as session:
            tokens.ensure(session, text, name=name, kind="user", scopes=scopes, now=self.world.now)
            return tokens.authenticate(session, text, self.world.now)

    def add(
        self, trigger: str, subject: str, action: dict[str, Any] = TRAIN, who: Caller | None = None, **more: Any
    ) -> Schedule:
        words = {"namespace": "team", "trigger": trigger, "subject": subject, "action": action} | more
        with self.world.database.write() as session:
            request = ScheduleRequest.model_validate(words)
            return schedules.add(session, who or self.author, request, self.world.now)

    def fire(self, schedule: Schedule) -> set[str]:
        with self.world.database.write() as session:
            return schedules.fire(session, schedule.id, self.world.now)

    def fire_by_many(self, schedule: Schedule) -> list[set[str]]:
        ready = threading.Barrier(4)

        def look(_: int) -> set[str]:
            ready.wait()
            return self.fire(schedule)

        with ThreadPoolExecutor(4) as crew:
            return list(crew.map(look, range(4)))

    def firings(self) -> list[Firing]:
        """All but what stands for the time before the schedule."""
        return [row for row in self.world.all(select(Firing).order_by(col(Firing.id))) if "before" not in row.outcome]

    def jobs(self) -> list[Job]:
        return self.world.all(select(Job))


def _clockwork(world: World, folder: Path) -> Clockwork:
    world.push_base(tiny_base(folder / "base"), line="demo")
    world.push_rows("dataset", "team/rows", ROWS)
    made = Clockwork(world, ADMIN)
    made.author = made.token("author", team=["read", "publish", "promote", "run"])
    return made


@pytest.fixture
def clockwork(database: Database, local_store: LocalStore, tmp_path: Path) -> Clockwork:
    return _clockwork(World(database, local_store), tmp_path)


@pytest.fixture
def small(embedded: World, tmp_path: Path) -> Clockwork:
    return _clockwork(embedded, tmp_path)


# ── cron ─────────────────────────────────────────────────────────────────────


def test_a_cron_schedule_fires_once_when_it_is_due_and_again_the_next_time(clockwork: Clockwork) -> None:
    schedule = clockwork.add("cron", "0 3 * * *")
    assert clockwork.fire(schedule) == set()
    for day in (1, 2):
        clockwork.world.later(days=1)
        assert sorted(map(len, clockwork.fire_by_many(schedule))) == [0, 0, 0, 1]
        assert len(clockwork.firings()) == day
    first, second = clockwork.jobs()
    assert first.key != second.key  # the same work, asked for anew
    assert {first.recipe_digest} == {second.recipe_digest}
    assert {job.created_by for job in (first, second)} == {clockwork.author.token_id}


def test_what_was_missed_while_nobody_looked_fires_once(small: Clockwork) -> None:
    schedule = small.add("cron", "0 * * * *")
    small.world.later(days=3)
    assert small.fire(schedule) == {"cpu"}
    assert small.fire(schedule) == set()
    with small.world.database.read() as session:
        [told] = schedules.listed(session, small.author)
    assert told.next_at is not None
    assert told.next_at > small.world.now
    assert told.last is not None
    assert datetime.fromisoformat(told.last["key"]) < small.world.now


def test_a_suite_of_the_same_name_is_no_news_of_the_data(small: Clockwork) -> None:
    row = b'{"prompt": "%d+1=", "choices": [" 1", " 2"], "answer": 1}\n'
    for n in range(3):
        small.world.push_rows("suite", "team/rows", b"".join(row % i for i in range(n + 1)))
    schedule = small.add("new-data", "team/rows")
    assert small.fire(schedule) == set()
    small.world.push_rows("dataset", "team/rows", ROWS * 2)
    assert small.fire(schedule) == {"cpu"}
    assert [row.key for row in small.firings()] == ["v2"]


# ── a base upgrade ───────────────────────────────────────────────────────────


def test_a_new_revision_starts_one_campaign(clockwork: Clockwork, tmp_path: Path) -> None:
    schedule = clockwork.add("base-upgrade", "demo", {"upgrade": {}})
    assert clockwork.fire(schedule) == set()  # the revision that is there is older than the schedule
    clockwork.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    clockwork.fire_by_many(schedule)
    [campaign] = clockwork.world.all(select(Campaign))
    assert (campaign.state, campaign.origin) == ("running", schedule.id)
    assert {job.origin for job in clockwork.jobs()} <= {schedule.id}
    [firing] = clockwork.firings()
    assert (firing.key, firing.outcome) == ("r2", {"campaign": campaign.id})


def test_a_new_revision_may_start_a_job_on_it(small: Clockwork, tmp_path: Path) -> None:
    schedule = small.add("base-upgrade", "demo")
    outcome = small.world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    assert small.fire(schedule) == {"cpu"}
    [job] = small.jobs()
    assert (job.base, job.origin) == (outcome["base"], schedule.id)


def test_while_the_campaign_before_is_not_over_the_next_one_waits(small: Clockwork, tmp_path: Path) -> None:
    schedule = small.add("base-upgrade", "demo", {"upgrade": {}})
    for seed in (2, 3):
        small.world.push_base(tiny_base(tmp_path / str(seed), seed=seed), line="demo")
        small.fire(schedule)
    assert [firing.key for firing in small.firings()] == ["r2"]
    with small.world.database.write() as session:
        campaign = session.exec(select(Campaign)).one()
        campaign.state, campaign.finished_at = "finished", small.world.now
        session.add(campaign)
    small.fire(schedule)
    assert [firing.key for firing in small.firings()] == ["r2", "r3"]


# ── new data ─────────────────────────────────────────────────────────────────


def test_a_new_version_of_a_dataset_trains_on_it_once(clockwork: Clockwork) -> None:
    schedule = clockwork.add("new-data", "team/rows")
    assert clockwork.fire(schedule) == set()
    outcome = clockwork.world.push_rows("dataset", "team/rows", ROWS * 2)
    assert sorted(map(len, clockwork.fire_by_many(schedule))) == [0, 0, 0, 1]
    [job] = clockwork.jobs()
    assert job.recipe["datasets"] == [outcome["digest"]]
    assert clockwork.firings()[0].key == "v2"


# ── rights and refusals ──────────────────────────────────────────────────────


def test_a_schedule_can_do_no_more_than_its_author(small: Clockwork) -> None:
    small.world.push_rows("dataset", "secret/rows", ROWS)
    action = {"job": {"recipe": RECIPE | {"datasets": ["secret/rows"]}, "output": {"adapter": "secret/bot"}}}
    with pytest.raises(DatasetNotFound):  # said when it is made, not when nobody looks
        small.add("cron", "* * * * *", action)
    schedule = small.add("cron", "* * * * *", action, who=ADMIN)
    assert small.jobs() == []  # it was only tried
    with small.world.database.write() as session:
        session.get_one(Schedule, schedule.id).created_by = small.author.token_id
    small.world.later(minutes=1)
    assert small.fire(schedule) == set()
    assert small.jobs() == []
    assert small.firings()[0].outcome["refused"]["code"] == "dataset-not-found"


def test_a_schedule_of_a_revoked_token_starts_nothing_and_says_so(small: Clockwork) -> None:
    schedule = small.add("cron", "* * * * *")
    with small.world.database.write() as session:
        tokens.revoke(session, ADMIN, small.author.token_id, small.world.now)
    small.world.later(minutes=1)
    assert small.fire(schedule) == set()
    assert small.jobs() == []
    assert small.firings()[0].outcome["refused"]["code"] == "token-refused"


def test_a_removed_schedule_fires_no_more_and_its_firings_stay(small: Clockwork) -> None:
    schedule = small.add("cron", "* * * * *")
    small.world.later(minutes=1)
    small.fire(schedule)
    stranger, reader = small.token("stranger", other=["admin"]), small.token("reader", team=["read"])

    def remove(who: Caller) -> None:
        with small.world.database.write() as session:
            schedules.remove(session, who, schedule.id, small.world.now)

    with pytest.raises(ScheduleNotFound):
        remove(stranger)
    with pytest.raises(ScopeMissing):
        remove(reader)
    remove(small.author)
    small.world.later(minutes=1)
    assert small.fire(schedule) == set()
    assert len(small.firings()) == 1
    with small.world.database.read() as session:
        assert schedules.living(session) == []
        assert schedules.listed(session, small.author) == []


@pytest.mark.parametrize(
    ("trigger", "subject", "action", "problem"),
    [
        ("cron", "every day", TRAIN, BadRequest),
        ("cron", "0 0 30 2 *", TRAIN, BadRequest),
        ("cron", "0 3 * * *", {"upgrade": {}}, BadRequest),
        ("cron", "0 3 * * *", {}, BadRequest),
        ("cron", "0 3 * * *", {"job": {"recipe": "x"}}, BadRequest),
        ("cron", "0 3 * * *", {"job": {"recipe": {}}, "upgrade": {}}, BadRequest),
        ("base-upgrade", "no line!", TRAIN, LoractlError),
        ("new-data", "rows", TRAIN, LoractlError),
        ("base-upgrade", "demmo", TRAIN, BaseNotFound),
        ("new-data", "team/raws", TRAIN, DatasetNotFound),
        ("new-data", "secret/rows", TRAIN, ScopeMissing),
        ("cron", "0 3 * * *", {"job": {"recipe": RECIPE | {"datasets": ["team/raws"]}}}, LoractlError),
        ("cron", "0 3 * * *", {"job": TRAIN["job"] | {"recipe": RECIPE | {"stepz": 3}}}, BadRequest),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(
    small: Clockwork, trigger: str, subject: str, action: dict[str, Any], problem: type[LoractlError]
) -> None:
    with pytest.raises(problem):
        small.add(trigger, subject, action)
    assert small.world.all(select(Schedule)) == []


def test_a_schedule_needs_run_and_an_upgrade_promote_too(small: Clockwork) -> None:
    runner = small.token("runner", team=["read", "run", "publish"])
    with pytest.raises(ScopeMissing, match="'run' on 'team'"):
        small.add("cron", "0 3 * * *", who=small.token("reader", team=["read"]))
    with pytest.raises(ScopeMissing, match="'promote' on 'team'"):
        small.add("base-upgrade", "demo", {"upgrade": {}}, who=runner)
    assert small.add("cron", "0 3 * * *", who=runner).enabled
