"""The scheduler: two at once fire once, and a row that fails holds up nobody else's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session, select

from registry.broker import Broker
from registry.core.errors import DatabaseDown
from registry.daemons import scheduler
from registry.db.engine import Database
from registry.db.models import Campaign, Firing, Job, Schedule
from registry.parts import Parts
from registry.schemas import ScheduleRequest
from registry.services import schedules, tokens
from registry.storage.local import LocalStore
from tests.factories import tiny_base
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
