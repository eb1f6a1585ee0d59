"""What an operator watches is what the rows say, on both databases."""

from datetime import timedelta
from pathlib import Path

from sqlmodel import select

from registry.db.models import Job
from registry.services import gauges
from tests.upgrade import POLICY, Upgrade
from tests.world import World


def test_verdicts_of_gates_are_counted_by_tier_and_zone(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path, {"serving": 1.0, "carry": 0.5, "warm-start": 1.0})
    upgrade.policy(POLICY)
    upgrade.serve()
    upgrade.begin()
    upgrade.run()
    with world.database.read() as session:
        assert gauges.verdicts(session) == {("carry", "fail"): 1, ("warm-start", "pass"): 1}
        assert gauges.unverified(session) == 0


def test_a_queue_tells_what_waits_what_runs_and_how_late_a_lease_is(world: World, tmp_path: Path) -> None:
    upgrade = Upgrade(world, tmp_path)
    upgrade.policy(POLICY)
    upgrade.serve()
    upgrade.begin()
    upgrade.tick()
    with world.database.read() as session:
        [queue] = gauges.queues(session, world.now + timedelta(seconds=90))
    assert (queue.name, queue.waiting, queue.running, queue.overdue_s) == ("cpu", 2, 0, 0.0)
    assert queue.oldest_s >= 90
    with world.database.write() as session:
        job = session.exec(select(Job).where(Job.state == "queued")).all()[0]
        job.state, job.lease_until = "running", world.now + timedelta(seconds=60)
    with world.database.read() as session:
        [queue] = gauges.queues(session, world.now + timedelta(seconds=90))
    assert (queue.waiting, queue.running, queue.overdue_s) == (1, 1, 30.0)
