"""The reconciler takes back what nobody holds any more, and says of waiting work until somebody hears it."""

from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from sqlmodel import select

from registry.broker import Broker
from registry.daemons import reconciler
from registry.db.engine import Database
from registry.db.models import Job
from registry.parts import Parts
from registry.storage.local import LocalStore
from tests.world import World


@pytest.fixture
def world(database: Database, local_store: LocalStore) -> World:
    return World(database, local_store)


@pytest.fixture(params=["sqlite", "valkey"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqla+sqlite:///{tmp_path / 'broker.db'}"
    url: str = request.getfixturevalue("valkey_url")
    lose_everything(url)
    return url


def parts_of(world: World, broker_url: str) -> Parts:
    return Parts(world.settings, world.database, world.store, Broker(broker_url), world.clock)


def job(world: World, number: int, state: str = "queued", **more: Any) -> Job:
    row = Job(
        id=f"j{number}", kind="finetune", queue="cpu", state=state, namespace="team", recipe={},
        recipe_digest="sha256:" + "0" * 64, key=str(number), output={}, base="b3:" + "0" * 64, created_by="a",
        created_at=world.now, **more,
    )  # fmt: skip
    with world.database.write() as session:
        session.add(row)
    return row


def unheard(url: str) -> int:
    with Connection(url) as connection:
        declared: Any = Queue("cpu", channel=connection.channel()).queue_declare()
        return int(declared.message_count)


def lose_everything(url: str) -> None:
    with Connection(url) as connection:
        Queue("cpu", channel=connection.channel()).purge()


def test_a_lease_that_ran_out_is_taken_back_and_its_job_is_waited_for_again(world: World) -> None:
    parts = parts_of(world, "memory://")
    job(world, 1, "running", attempt=1, token_id="w", lease_until=world.now)
    reconciler.step(parts)
    assert world.one(select(Job)).state == "running"
    world.later(seconds=1)
    reconciler.step(parts)
    assert world.one(select(Job)).state == "queued"


def test_waiting_jobs_are_said_once_each_as_long_as_nobody_hears(embedded: World, broker_url: str) -> None:
    parts = parts_of(embedded, broker_url)
    reconciler.step(parts)
    assert unheard(broker_url) == 0
    for number in range(3):
        job(embedded, number)
    for _ in range(2):
        reconciler.step(parts)
        assert unheard(broker_url) == 3
    lose_everything(broker_url)
    reconciler.step(parts)
    assert unheard(broker_url) == 3


def test_a_long_queue_is_said_in_portions(embedded: World, tmp_path: Path) -> None:
    url = f"sqla+sqlite:///{tmp_path / 'broker.db'}"
    for number in range(50):
        job(embedded, number)
    reconciler.step(parts_of(embedded, url))
    assert unheard(url) == 32


def test_without_a_broker_leases_are_taken_back_all_the_same(embedded: World) -> None:
    job(embedded, 1, "running", attempt=1, token_id="w", lease_until=embedded.now)
    embedded.later(seconds=1)
    reconciler.step(parts_of(embedded, "redis://127.0.0.1:9/0"))
    assert embedded.one(select(Job)).state == "queued"
