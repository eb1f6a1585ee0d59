"""The scheduler: two at once fire once, and a row that fails holds up nobody else's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from registry.broker import Broker
from registry.core.errors import DatabaseDown
from registry.daemons import scheduler
from registry.db.engine import Database
from registry.db.models import Campaign, Firing, Job, Schedule
from registry.parts import Parts
from registry.schemas import ScheduleRequest
from registry.services import campaigns, schedules, tokens
from registry.storage.base import BlobStore
from registry.storage.local import LocalStore
from tests.factories import tiny_base
from tests.upgrade import POLICY, Upgrade
from tests.world import World

ROWS = b'{"prompt": "2+2=", "completion": " 4"}\n'
RECIPE = {"kind": "finetune", "base": "demo", "datasets": ["team/rows"], "steps": 2}
TRAIN: dict[str, Any] = {"job": {"recipe": RECIPE, "output": {"adapter": "team/bot"}}}


@pytest.fixture
def world(database: Database, local_store: LocalStore, tmp_path: Path) -> World:
    made = World(database, local_store)
    made.push_base(tiny_base(tmp_path / "base"), line="demo")
    made.push_rows("dataset", "team/rows", ROWS)
    return made


def parts_of(world: World) -> Parts:
    return Parts(world.settings, world.database, world.store, Broker("memory://"), world.clock)


def add(world: World, trigger: str, subject: str, action: dict[str, Any]) -> Schedule:
    with world.database.write() as session:
        text = tokens.make_text()
        tokens.ensure(session, text, name="author", kind="user", scopes={"team": ["admin"]}, now=world.now)
        who = tokens.authenticate(session, text, world.now)
        request = ScheduleRequest.model_validate(
            {"namespace": "team", "trigger": trigger, "subject": subject, "action": action}
        )
        return schedules.add(session, who, request, world.now)


def look_by_many(world: World) -> None:
    ready = threading.Barrier(3)

    def look(_: int) -> None:
        parts = parts_of(world)
        ready.wait()
        scheduler.step(parts)

    with ThreadPoolExecutor(3) as crew:
        list(crew.map(look, range(3)))


def test_schedulers_at_once_fire_each_schedule_once(world: World, tmp_path: Path) -> None:
    add(world, "cron", "* * * * *", TRAIN)
    add(world, "new-data", "team/rows", TRAIN)
    add(world, "base-upgrade", "demo", {"upgrade": {}})
    world.later(minutes=1)
    world.push_rows("dataset", "team/rows", ROWS * 2)
    world.push_base(tiny_base(tmp_path / "next", seed=2), line="demo")
    look_by_many(world)
    look_by_many(world)
    fired = [row for row in world.all(select(Firing)) if "before" not in row.outcome]
    assert len(fired) == 3
    assert [row.outcome for row in fired if "refused" in row.outcome] == []
    assert len(world.all(select(Job).where(Job.kind == "finetune"))) == 2
    [campaign] = world.all(select(Campaign))
    assert campaign.state == "finished"  # no adapter is served there


def test_a_row_that_fails_holds_up_nobody_elses(world: World) -> None:
    first, second = add(world, "cron", "* * * * *", TRAIN), add(world, "cron", "* * * * *", TRAIN)
    with world.database.write() as session:
        row = session.get_one(Schedule, first.id)
        row.action = {"job": {"no": "request"}}
        session.add(row)
    world.later(minutes=1)
    scheduler.step(parts_of(world))
    assert [row.schedule_id for row in world.all(select(Firing))] == [second.id]


def test_a_database_that_is_down_is_told_to_the_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    add(world, "cron", "* * * * *", TRAIN)

    def down(session: Session, identity: str, now: object) -> set[str]:
        raise DatabaseDown(reason="gone")

    monkeypatch.setattr(schedules, "fire", down)
    with pytest.raises(DatabaseDown):
        scheduler.step(parts_of(world))


@pytest.fixture
def upgrading(embedded: World, tmp_path: Path) -> Upgrade:
    """Two adapters in a campaign that runs."""
    made = Upgrade(embedded, tmp_path, {"serving": 1.0, "carry": 1.0})
    made.policy(POLICY)
    made.serve()
    made.serve("team/other", seed=1)
    made.begin()
    return made


def test_what_a_campaign_does_is_logged_with_its_id_and_with_what_started_it(upgrading: Upgrade) -> None:
    with upgrading.world.database.write() as session:
        campaign = session.exec(select(Campaign)).one()
        campaign.origin = "asked"
        session.add(campaign)
    upgrading.world.later(seconds=1)
    with capture_logs(processors=[merge_contextvars]) as lines:
        scheduler.step(parts_of(upgrading.world))
    queued = [line for line in lines if line["event"] == "job-queued"]
    with upgrading.world.database.read() as session:
        jobs = session.exec(select(Job.id).where(Job.origin == "asked")).all()
    assert jobs
    assert sorted(line["job"] for line in queued) == sorted(jobs)
    assert {(line["campaign"], line["origin"]) for line in queued} == {(campaign.id, "asked")}


@pytest.mark.parametrize("error", [ValueError("what nobody foresaw"), DatabaseDown(reason="gone")])
def test_an_item_whose_steps_break_is_given_up_and_others_go_on(
    upgrading: Upgrade, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    odd, step = upgrading.items()[0].id, campaigns.step
    calls = 0

    def breaks(session: Session, store: BlobStore, item: int, now: datetime) -> list[Job]:
        nonlocal calls
        calls += item == odd
        if item == odd and calls != 5:  # one that goes well in between is a new beginning
            raise error
        return step(session, store, item, now)

    monkeypatch.setattr(campaigns, "step", breaks)
    for _ in range(14):
        upgrading.world.later(seconds=1)
        with suppress(DatabaseDown):
            scheduler.step(parts_of(upgrading.world))
        upgrading.work()
    assert upgrading.state("team/other") == "promoted"
    assert upgrading.state() == "running"
    for _ in range(2):
        with suppress(DatabaseDown):
            scheduler.step(parts_of(upgrading.world))
    if isinstance(error, DatabaseDown):
        assert upgrading.state() == "running"  # what is down is waited for
    else:
        item = upgrading.item()
        assert (item.state, "10 times in a row: ValueError: what nobody foresaw" in item.reason) == ("failed", True)
        [campaign] = upgrading.world.all(select(Campaign))
        assert campaign.state == "finished"
