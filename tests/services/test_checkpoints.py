"""Laws of checkpoints in storage: what is recorded is there, the newest one only, and from nobody without the lease."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlmodel import select

from registry.core.digest import Digest
from registry.core.errors import (
    BadPath,
    BadRequest,
    CheckpointIncomplete,
    FileTooLarge,
    LeaseLost,
    NotYourJob,
    StorageDown,
)
from registry.core.lifecycle import JobState
from registry.core.manifest import FileEntry
from registry.db.models import Checkpoint, Job
from registry.schemas import (
    CheckpointInfo,
    CheckpointRequest,
    CheckpointsRequest,
    CheckpointUploads,
    ClaimRequest,
    FinishRequest,
    SignedRequest,
)
from registry.services import checkpoints, jobs
from registry.services.tokens import Caller
from registry.transfer import silent
from tests.factories import base_of, tiny_base
from tests.world import ADMIN, World, put
from workers import checkpoints as sending
from workers.checkpoints import Kept
from workers.compute.snapshot import every, names_of, write_index

Files = dict[str, bytes]
ANN, BEN = (Caller(name, name, "worker", {"queues": ["cpu"]}) for name in ("ann", "ben"))
LEASE_S = 60
FIRST: Files = {"checkpoint.json": b'{"a": "a-1"}', "a-1.safetensors": b"one"}
SECOND: Files = {"checkpoint.json": b'{"a": "a-2"}', "a-2.safetensors": b"two"}


def asked(files: Files, step: int = 1, attempt: int = 1) -> CheckpointRequest:
    entries = [FileEntry(path=path, size=len(data), digest=str(Digest.sha256(data))) for path, data in files.items()]
    return CheckpointRequest(attempt=attempt, step=step, files=entries)


@dataclass
class Vault:
    """A registry, and a worker's verbs on the checkpoint of a job."""

    world: World

    def job(self, identity: str) -> str:
        """A job that compares a base with itself: what it does matters to nobody here."""
        recipe = {"kind": "compare", "old": "b3:" + "0" * 64, "base": "b3:" + "0" * 64}
        row = Job(
            id=identity, kind="compare", queue="cpu", state=JobState.QUEUED, namespace="team", recipe=recipe,
            recipe_digest="sha256:" + "0" * 64, key=identity, output={}, base=recipe["base"], created_by="t",
            created_at=self.world.now,
        )  # fmt: skip
        with self.world.database.write() as session:
            session.add(row)
        return identity

    def claim(self, who: Caller = ANN) -> Job:
        with self.world.database.write() as session:
            job = jobs.claim(session, who, ClaimRequest(queue="cpu", worker="w"), LEASE_S, self.world.now)
        assert job is not None
        return job

    def lose(self) -> None:
        """Let the lease run out."""
        self.world.later(seconds=LEASE_S + 1)
        with self.world.database.write() as session:
            assert jobs.requeue_expired(session, self.world.now)

    def cancel(self, job: str, attempt: int) -> None:
        """Somebody asks for its end, and its worker hears of it."""
        said: dict[str, Any] = {"problem": {}, "retryable": False, "cancelled": True, "now": self.world.now}
        with self.world.database.write() as session:
            jobs.cancel(session, ADMIN, job, self.world.now)
            jobs.fail(session, ANN, job, attempt=attempt, **said)

    def open(self, job: str, request: CheckpointRequest, who: Caller = ANN) -> dict[str, SignedRequest]:
        with self.world.database.read() as session:
            return checkpoints.uploads(session, self.world.store, self.world.settings, who, job, request)

    def send(self, job: str, files: Files, request: CheckpointRequest, who: Caller = ANN) -> int:
        contents = {str(Digest.sha256(data)): data for data in files.values()}
        signed = self.open(job, request, who)
        for digest, one in signed.items():
            put(one, contents[digest]).raise_for_status()
        return len(signed)

    def record(self, sent: dict[str, CheckpointRequest], who: Caller = ANN) -> None:
        checkpoints.record(self.world.database, self.world.store, who, sent, self.world.now)

    def leave(self, job: str, files: Files, step: int = 1, attempt: int = 1, who: Caller = ANN) -> None:
        """The whole way."""
        request = asked(files, step, attempt)
        self.send(job, files, request, who)
        self.record({job: request}, who)

    def newest(self, job: str, attempt: int, who: Caller = ANN) -> CheckpointInfo:
        with self.world.database.read() as session:
            return checkpoints.newest(session, self.world.store, self.world.settings, who, job, attempt)

    def read(self, job: str, attempt: int = 1, who: Caller = ANN) -> Files:
        found = self.newest(job, attempt, who)
        return {file.path: httpx.get(file.get.url).raise_for_status().content for file in found.files}

    def objects(self, job: str) -> set[bytes]:
        found = set()
        for stat in self.world.store.walk(f"checkpoints/{job}/"):
            with self.world.store.open(stat.key) as blob:
                found.add(blob.read(0, stat.size))
        return found

    def sweep(self, job: str) -> int:
        """How many objects of the job went: the store is older than this registry, and holds what others left."""
        before = len(self.objects(job))
        checkpoints.sweep(self.world.database, self.world.store, self.world.now)
        return before - len(self.objects(job))


@pytest.fixture
def vault(world: World, push: str) -> Vault:
    made = Vault(world)
    made.job(f"j{push}")  # the store outlives the test
    return made


@pytest.fixture
def job(vault: Vault) -> str:
    return vault.claim().id


def test_what_one_attempt_left_the_next_one_finds(vault: Vault, job: str) -> None:
    assert vault.newest(job, 1).files == []
    vault.leave(job, FIRST, step=5)
    vault.lose()
    assert vault.claim(BEN).attempt == 2
    assert vault.read(job, 2, BEN) == FIRST
    assert (vault.newest(job, 2, BEN).attempt, vault.newest(job, 2, BEN).step) == (1, 5)
    vault.leave(job, SECOND, step=7, attempt=2, who=BEN)
    assert vault.read(job, 2, BEN) == SECOND


@dataclass
class Client:
    """What a worker says of checkpoints, to the registry in this process."""

    vault: Vault

    def send_checkpoint(self, job: str, request: CheckpointRequest) -> CheckpointUploads:
        return CheckpointUploads(put=self.vault.open(job, request))

    def record_checkpoints(self, request: CheckpointsRequest) -> None:
        self.vault.record(dict(request.checkpoints))

    def checkpoint(self, job: str, attempt: int) -> CheckpointInfo:
        return self.vault.newest(job, attempt)


def test_a_file_that_is_too_large_for_one_object_goes_in_pieces_and_comes_back_whole(
    vault: Vault, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_FILE", 64)
    monkeypatch.setattr(sending, "PIECE", 64)
    client: Any = Client(vault)
    here, there = tmp_path / "here", tmp_path / "there"
    kept = Kept(job, 1, every, print)
    keeper = sending.Keeper(client, here, [kept], every=60.0)

    def leave(step: int, data: bytes) -> Files:
        """A run of one large file, and a note of its phase."""
        (here / "phase").mkdir(parents=True, exist_ok=True)
        (here / "phase" / "scored.json").write_bytes(b"[1]")
        [name] = names_of("a", step, 1)
        (here / name).write_bytes(data)
        write_index(here, {"a": [name]})
        assert keeper.look()
        return {path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()}

    first = leave(1, bytes(range(200)))
    assert {path for path in vault.read(job) if path.startswith("a-1")} == {
        f"a-1.safetensors.piece-0000{number}" for number in range(4)
    }
    assert max(map(len, vault.objects(job))) == 64
    before = vault.objects(job)
    (here / "a-1.safetensors").unlink()
    second = leave(2, bytes(range(199)) + b"!")
    assert len(vault.objects(job) - before) == 2  # the last piece, and the index
    vault.lose()
    assert vault.claim().attempt == 2
    assert sending.restore(client, replace(kept, attempt=2), there, 1, silent) == 2
    arrived = {path.relative_to(there).as_posix(): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert arrived == second != first


def test_a_newer_one_replaces_the_older_and_what_both_hold_is_not_sent_again(vault: Vault, job: str) -> None:
    vault.leave(job, FIRST | {"scored.json": b"[]"})
    again = SECOND | {"scored.json": b"[]"}
    assert vault.send(job, again, asked(again, 2)) == 2
    vault.record({job: asked(again, 2)})
    assert vault.read(job) == again
    assert vault.objects(job) == set(again.values())


def test_recording_twice_or_late_changes_nothing(vault: Vault, job: str) -> None:
    vault.leave(job, FIRST, step=1)
    request = asked(SECOND, 2)
    vault.send(job, SECOND, request)
    vault.record({job: request})
    vault.record({job: request})
    vault.send(job, FIRST, asked(FIRST, 1))
    vault.record({job: asked(FIRST, 1)})  # was overtaken
    assert vault.read(job) == SECOND
    assert vault.sweep(job) == 0  # its objects may still be somebody's: the attempt goes on
    with vault.world.database.write() as session:
        jobs.fail(
            session, ANN, job, attempt=1, problem={}, retryable=True, cancelled=False, now=vault.world.now
        )
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set(SECOND.values())


def test_what_did_not_arrive_is_not_recorded(vault: Vault, job: str) -> None:
    vault.leave(job, FIRST)
    request = asked(SECOND, 2)
    signed = vault.open(job, request)
    put(signed[str(Digest.sha256(b"two"))], b"two").raise_for_status()
    with pytest.raises(CheckpointIncomplete, match="of 2 files storage lacks sha256:"):
        vault.record({job: request})
    assert vault.read(job) == FIRST


def test_other_bytes_than_were_promised_do_not_arrive(vault: Vault, job: str) -> None:
    request = asked(FIRST)
    for signed in vault.open(job, request).values():
        assert put(signed, b"!" * int(signed.headers["content-length"])).is_error
    with pytest.raises(CheckpointIncomplete):
        vault.record({job: request})


def test_an_attempt_that_is_over_records_nothing(vault: Vault, job: str) -> None:
    late = asked(FIRST, 9)
    signed = vault.open(job, late)
    vault.lose()
    with pytest.raises(LeaseLost):
        vault.record({job: late})
    vault.claim(BEN)
    vault.leave(job, SECOND, step=2, attempt=2, who=BEN)
    for digest, data in ((str(Digest.sha256(data)), data) for data in FIRST.values()):
        put(signed[digest], data).raise_for_status()  # the URL is good for an hour
    with pytest.raises(NotYourJob):
        vault.record({job: late}, ANN)
    with pytest.raises(NotYourJob):
        vault.open(job, late, ANN)
    with pytest.raises(LeaseLost):
        vault.record({job: late}, BEN)
    assert vault.read(job, 2, BEN) == SECOND
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set(SECOND.values())


def test_of_several_jobs_all_are_recorded_or_none(vault: Vault, job: str) -> None:
    other = vault.job(f"{job}x")
    assert vault.claim().id == other
    for one in (job, other):
        vault.leave(one, FIRST)
        vault.send(one, SECOND, asked(SECOND, 2))
    with pytest.raises(LeaseLost):
        vault.record({job: asked(SECOND, 2), other: asked(SECOND, 2, attempt=2)})
    assert [vault.read(one) for one in (job, other)] == [FIRST, FIRST]
    vault.record({one: asked(SECOND, 2) for one in (job, other)})
    assert [vault.read(one) for one in (job, other)] == [SECOND, SECOND]


def test_bytes_that_were_sent_and_never_recorded_are_swept_once_the_attempt_is_over(vault: Vault, job: str) -> None:
    vault.send(job, FIRST, asked(FIRST))
    assert vault.sweep(job) == 0
    assert vault.objects(job) == set(FIRST.values())
    vault.lose()
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set()


def test_what_a_running_attempt_does_not_record_within_a_day_is_swept(vault: Vault, job: str) -> None:
    vault.send(job, FIRST, asked(FIRST))
    vault.world.later(days=2)
    assert vault.sweep(job) == 2


def test_a_job_that_succeeded_leaves_nothing(vault: Vault, job: str, tmp_path: Path) -> None:
    vault.leave(job, FIRST)
    old, new = (vault.world.register(base_of(tiny_base(tmp_path / str(seed), seed))).digest for seed in (1, 2))
    with vault.world.database.write() as session:
        row = session.get_one(Job, job)
        row.recipe = row.recipe | {"old": old, "base": new}
    with vault.world.database.write() as session:
        jobs.finish(session, vault.world.store, ANN, job, FinishRequest(attempt=1, result={}), vault.world.now)
    assert vault.world.all(select(Checkpoint).where(Checkpoint.job_id == job)) == []
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set()


def test_a_cancelled_job_keeps_its_checkpoint_for_a_retry_and_not_for_ever(vault: Vault, job: str) -> None:
    vault.leave(job, FIRST)
    vault.cancel(job, attempt=1)
    vault.world.later(days=6)
    assert vault.sweep(job) == 0
    with vault.world.database.write() as session:
        jobs.retry(session, ADMIN, job, vault.world.now)
    assert vault.claim().attempt == 2
    assert vault.read(job, 2) == FIRST
    vault.cancel(job, attempt=2)
    vault.world.later(days=8)
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set()


def test_too_large_a_checkpoint_is_refused_before_a_byte_is_sent(vault: Vault, job: str) -> None:
    small = Vault(vault.world.with_settings(max_checkpoint_bytes=10))
    with pytest.raises(FileTooLarge, match="at most 10 are allowed"):
        small.open(job, asked(FIRST))
    one = FileEntry(path="a", size=6_000_000_000, digest="sha256:" + "0" * 64)
    with pytest.raises(FileTooLarge, match="'a' is 6000000000 bytes"):
        vault.open(job, CheckpointRequest(attempt=1, step=1, files=[one]))


def test_paths_that_lead_elsewhere_or_twice_to_one_place_are_refused(vault: Vault, job: str) -> None:
    with pytest.raises(BadPath):
        vault.open(job, asked({"../x": b"1"}))
    request = asked({"a": b"1"})
    with pytest.raises(BadRequest, match="listed twice"):
        vault.open(job, request.model_copy(update={"files": request.files * 2}))


def test_a_store_that_fails_to_remove_does_not_undo_what_was_recorded(
    vault: Vault, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.leave(job, FIRST)

    def down(key: str) -> None:
        raise StorageDown(reason=key)

    with monkeypatch.context() as patched:
        patched.setattr(vault.world.store, "delete", down)
        vault.leave(job, SECOND, step=2)
    assert vault.read(job) == SECOND
    vault.lose()
    assert vault.sweep(job) == 2
    assert vault.objects(job) == set(SECOND.values())
