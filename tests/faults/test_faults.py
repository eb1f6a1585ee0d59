"""A minute or two of misfortune: a few kinds of it, in the smallest town, in the largest, and in one with a workshop.

Here they are the same each time, as far as processes can be held to a seed, so that a change is tried by what the one
before it was tried by. The long run, with every kind in every town and seeds that nobody chose, is
`python -m tests.faults.run` (`make soak`).
"""

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlmodel import col, select, update

from registry.core.digest import Digest
from registry.core.lifecycle import JobState
from registry.db.models import Alias, Job, Version
from registry.parts import Parts
from registry.schemas import ClaimRequest, JobRequest, Output, Wishes
from registry.services.blobs import blob_key
from registry.transfer import push_adapter
from tests.factories import tiny_adapter
from tests.faults import laws, machines, people, record, run, soak
from tests.faults.faults import (
    Fault,
    api_dies,
    broker_forgets,
    child_dies,
    client_dies,
    connections_break,
    daemons_die,
    database_dies,
    store_dies,
    wire_is_cut,
)
from tests.faults.town import Town, town

SEED = 20_261_127
SHORT: dict[str, list[Fault]] = {
    "sqlite+folder": [client_dies, daemons_die, api_dies, wire_is_cut],
    "postgres+s3": [database_dies, store_dies, broker_forgets, connections_break],
}


@pytest.mark.parametrize("setup", SHORT)
def test_no_law_is_broken_whatever_goes_wrong(setup: str, tmp_path: Path) -> None:
    seen = set[str]()
    with town(setup, tmp_path / "town") as here:
        told = [run.episode(here, fault, SEED + number, seen) for number, fault in enumerate(SHORT[setup])]
    print("\n".join(map(run.line, told)))
    assert not [run.line(one) for one in told if one.breaches]
    assert sum(one.did["pushed"] for one in told) > 0
    assert sum(one.did["finished"] for one in told) > 0


def test_no_work_is_lost_or_done_twice_whatever_happens_to_workers(tmp_path: Path) -> None:
    with town("sqlite+folder+work", tmp_path / "town") as here:
        told = run.episode(here, child_dies, SEED, set())
    print(run.line(told))
    assert not told.breaches, run.line(told)
    assert told.did["upgrades"] > 0


def test_a_soak_ends_when_enough_was_done_and_says_how_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "LOOK_S", 0.5)
    with town("sqlite+folder", tmp_path / "town", disks_end=False) as here:
        told = soak.soak(here, 20, SEED)
    assert told["operations"] >= 20
    assert told["operations"] == sum(told["did"].get(one, 0) for one in soak.OPERATIONS)
    assert told["broken"] == []
    assert all(early > 20 and late > 20 for early, late in told["memory"].values())
    row = record.soaks([told])[-1]
    assert f"| {told['operations']:,} |" in row
    assert "| 0 | api-1 " in row


def test_the_laws_see_what_is_broken(tmp_path: Path) -> None:
    with town("sqlite+folder", tmp_path / "town") as here:
        break_and_look(here, tmp_path)


def break_and_look(here: Town, tmp_path: Path) -> None:
    """Bytes, numbers, moves and jobs that are not what they were, one after the other."""
    person, hand = people.Person(here.place, "kim", 1), people.Person(here.place, "lee", 1, works=True)
    adapter = tiny_adapter(tmp_path / "a", here.place.base, seed=99)
    made = push_adapter(person.client, adapter, "town/kim", person.base, Wishes(aliases=["prod"]))
    person.note("pushed", kind="adapter", name="town/kim", digest=made.version_digest, outcome=made.outcome)
    recipe = {"kind": "compress", "base": person.base, "adapter": made.version_digest}
    request = JobRequest(recipe=recipe, output=Output(adapter="town/small"), queue="cpu")
    person.client.submit(request)
    people.work_on(hand, hand.client.claim(ClaimRequest(queue="cpu", worker="lee")))
    hand.client.close()
    assert laws.breaches(here, set()) == []
    parts = Parts.of(here.settings)
    kept = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    weights = str(Digest.sha256(kept))
    parts.store.put(blob_key(weights), kept[:-1], Digest.sha256(kept[:-1]))
    broken = "\n".join(laws.breaches(here, set()))
    assert f"blob {weights}" in broken
    assert f"{made.version_digest} cannot be pulled" in broken
    parts.store.put(blob_key(weights), kept, Digest.sha256(kept))

    other = person.client.submit(request.model_copy(update={"fresh": True}))
    with parts.database.write() as session:
        version = session.exec(select(Version).where(Version.digest == made.version_digest)).one()
        session.exec(update(Version).where(col(Version.id) == version.id).values(number=7, latest=False))
        alias = session.exec(select(Alias).limit(1)).one()
        alias.generation += 1
        session.add(alias)
        job = session.exec(select(Job).where(Job.state == JobState.SUCCEEDED).limit(1)).one()
        session.exec(update(Version).values(job_id=other.id))
        session.exec(update(Job).where(col(Job.id) == other.id).values(kind="finetune"))
    person.client.close()
    person.note("upgrades", campaign="c-lost")
    person.note("asked", job="j-lost")
    person.note("deleted", name="town/kim", digest=made.version_digest, outcome={"version": "v7"})
    broken = "\n".join(laws.breaches(here, set()))
    parts.close()
    assert "was v1, and is v7" in broken
    assert "marked as such" in broken
    assert "its moves" in broken
    assert f"job {job.id} succeeded and made 0 versions" in broken
    assert f"job {other.id} is queued" in broken
    assert "the training sha256:" in broken
    assert "upgrade c-lost was started, and is lost" in broken
    assert "job j-lost was lost" in broken
    assert "town/kim@v7 was deleted, and is" in broken


# ── what machines lack ───────────────────────────────────────────────────────


def had(means: Callable[[], object]) -> None:
    """Go on where a machine has the means; else say which it lacks."""
    try:
        means()
    except machines.NotHere as reason:
        pytest.skip(str(reason))


def test_a_full_disk_has_no_room_and_afterwards_holds_what_it_held(tmp_path: Path) -> None:
    had(machines.can_mount)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "before").write_text("before")
    with machines.disk(tmp_path / "disk") as disk:
        disk.fill(left=1 << 16)
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "large").write_bytes(bytes(1 << 18))
        disk.empty()
        (disk.path / "large").write_bytes(bytes(1 << 18))
    assert (tmp_path / "disk" / "before").read_text() == "before"
    assert (tmp_path / "disk" / "large").stat().st_size == 1 << 18


def test_another_time_is_other_by_so_much_and_passes_as_fast() -> None:
    had(machines.can_shift_time)
    line = "import time; a = time.monotonic(); time.sleep(0.2); print(time.time(), time.monotonic() - a)"
    environment = machines.another_time(-50)
    told = subprocess.run([sys.executable, "-c", line], env=environment, check=True, capture_output=True, text=True)
    at, slept = map(float, told.stdout.split())
    assert -60 < at - time.time() <= -50 + 1
    assert slept >= 0.2


def test_an_older_release_knows_fewer_migrations() -> None:
    had(machines.older_release)
    here, there = (
        {path.name for path in (house / "migrations" / "versions").glob("0*.py")}
        for house in (machines.HOUSE, machines.older_release())
    )
    assert there < here
    assert len(here - there) >= machines.MIGRATIONS_BACK


def test_what_is_on_record_adds_up(tmp_path: Path) -> None:
    file, today = tmp_path / "record.jsonl", f"{datetime.now(UTC):%Y-%m-%d}"
    quick = {"did": {"pushed": 2}, "recovered": {"it serves": [1.0, 3.0]}, "broken": []}
    record.append(file, {"setup": "a", "fault": "api_dies", "seed": 1, **quick})
    record.append(file, {"setup": "a", "fault": "api_dies", "seed": 2, **quick, "broken": ["x|y"], "alone": True})
    record.append(file, {"setup": "b", "fault": "nothing", "seed": 3, **quick})
    page = record.page(record.lines(file))
    assert "| api dies | 2, 1 broken |  |" in page
    assert "| together | 2 | 1 |" in page
    assert f"3 episodes, 1 with a law broken; {today} to {today}." in page
    assert "6 pushed" in page
    assert f"| {today} | a | api dies | 2 | x/y | not known yet |" in page
    assert "| it serves | nothing | 2 | 2.0 | 3.0 | 3.0 |" in page
    assert "| it serves | other work | 4 | 2.0 | 3.0 | 3.0 |" in page
