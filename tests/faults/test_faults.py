"""A few minutes' worth of misfortune: every kind of it once, in the smallest town and in the largest.

The long run is `python -m tests.faults.run` (`make soak`).
"""

import random
from pathlib import Path

import pytest
from sqlmodel import col, select, update

from registry.core.digest import Digest
from registry.core.lifecycle import JobState
from registry.db.models import Alias, Job, Version
from registry.parts import Parts
from registry.services.blobs import blob_key
from registry.transfer import push_adapter
from tests.factories import tiny_adapter
from tests.faults import laws, people, run
from tests.faults.faults import faults_of, nothing
from tests.faults.town import Town, town


@pytest.mark.parametrize("setup", ["sqlite+folder", "postgres+s3"])
def test_no_law_is_broken_whatever_goes_wrong(setup: str, tmp_path: Path) -> None:
    seed, seen = random.SystemRandom().randrange(1 << 30), set[str]()
    with town(setup, tmp_path / "town") as here:
        some = random.Random(seed).sample(faults_of(here), 5)
        told = [run.episode(here, fault, seed + number, seen) for number, fault in enumerate(some)]
    print("\n".join(map(run.line, told)))
    assert not [run.line(one) for one in told if one.breaches]
    assert sum(one.did["pushed"] for one in told) > 0
    assert sum(one.did["finished"] for one in told) > 0


def test_the_laws_see_what_is_broken(tmp_path: Path) -> None:
    with town("sqlite+folder", tmp_path / "town") as here:
        told = run.episode(here, nothing, 1, set())
        assert not told.breaches
        break_and_look(here, tmp_path)


def break_and_look(here: Town, tmp_path: Path) -> None:
    """Bytes, numbers, moves and jobs that are not what they were, one after the other."""
    person = people.Person(here.place, "kim", 1)
    made = push_adapter(person.client, tiny_adapter(tmp_path / "a", here.place.base, seed=99), "town/kim", person.base)
    person.note("pushed", kind="adapter", name="town/kim", digest=made.version_digest, outcome=made.outcome)
    person.client.close()
    assert laws.breaches(here, set()) == []
    parts = Parts.of(here.settings)
    kept = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    weights = str(Digest.sha256(kept))
    parts.store.put(blob_key(weights), kept[:-1], Digest.sha256(kept[:-1]))
    broken = "\n".join(laws.breaches(here, set()))
    assert f"blob {weights}" in broken
    assert f"{made.version_digest} cannot be pulled" in broken
    parts.store.put(blob_key(weights), kept, Digest.sha256(kept))

    with parts.database.write() as session:
        version = session.exec(select(Version).where(Version.digest == made.version_digest)).one()
        session.exec(update(Version).where(col(Version.id) == version.id).values(number=7, latest=False))
        alias = session.exec(select(Alias).limit(1)).one()
        alias.generation += 1
        session.add(alias)
        job = session.exec(select(Job).where(Job.state == JobState.SUCCEEDED).limit(1)).one()
        session.exec(update(Version).where(col(Version.job_id) == job.id).values(job_id=None))
    person.note("asked", job="j-lost")
    broken = "\n".join(laws.breaches(here, set()))
    parts.close()
    assert "was v1, and is v7" in broken
    assert "marked as such" in broken
    assert "its moves" in broken
    assert f"job {job.id} succeeded and made 0 versions" in broken
    assert "job j-lost was lost" in broken
