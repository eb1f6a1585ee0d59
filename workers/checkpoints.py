"""The checkpoints of jobs on their way: from a child's folder to storage, and from there to the next attempt's folder.

While a child trains, a thread of its parent looks whether it left a newer checkpoint, links it aside (the child writes
on), and sends it: the newest one, one at a time, resting as long as sending took. Training never waits for it. Jobs
that are trained together are recorded together, so that all of them go on from one moment.

A store takes 5 GB at once: a larger file is listed, sent and fetched as pieces, ``<name>.piece-00000`` and so on, and
is put together before anybody looks for it.
"""

import contextvars
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from registry.client import RegistryClient
from registry.core.errors import (
    BlobNotFound,
    DigestMismatch,
    FileTooLarge,
    JobNotFound,
    LeaseLost,
    LocalFailure,
    NotYourJob,
    RouteNotFound,
)
from registry.core.manifest import FileEntry
from registry.files import CHUNK, sha256_range
from registry.schemas import CheckpointRequest, CheckpointsRequest, Download
from registry.transfer import Progress, Stretch, fetch, send

from .compute.snapshot import Mine, steps, take

PIECE = 4 << 30
"""Bytes of a file that are sent as one object."""
LAST_WORD_S = 20.0
"""How long the end of an attempt waits for its last checkpoint to be sent."""
_LOOK_S = 1.0
_IS_PIECE = re.compile(r"(?P<whole>.+)\.piece-(?P<number>\d{5})")
_OVER = (LeaseLost, NotYourJob, JobNotFound)
log = structlog.get_logger()


@dataclass(frozen=True)
class Kept:
    """A job whose checkpoints are kept: whose runs they are, and where to say what people should know."""

    id: str
    attempt: int
    mine: Mine
    said: Callable[[str], None]
    stored: int = 0
    """Steps that storage has already."""


def restore(client: RegistryClient, job: Kept, folder: Path, here: int, progress: Progress) -> int:
    """Put the recorded checkpoint into ``folder`` where it is further than the ``here`` steps on this disk; its step.

    A damaged one is not used: the job goes on from what is here, or begins again, and says so.
    """
    try:
        found = client.checkpoint(job.id, job.attempt)
    except RouteNotFound:  # a registry of the release before
        return 0
    if found.step <= here:
        return found.step
    arriving = folder.with_name(f"{folder.name}-arriving")
    shutil.rmtree(arriving, ignore_errors=True)

    def again() -> Sequence[Download]:
        return client.checkpoint(job.id, job.attempt).files

    try:
        fetch(found.files, arriving, refresh=again, progress=progress)
        _put_together(arriving)
    except (BlobNotFound, DigestMismatch) as error:
        shutil.rmtree(arriving, ignore_errors=True)
        onward = f"goes on from step {here}" if here else "begins again"
        job.said(f"The checkpoint at step {found.step} in storage is damaged; the job {onward}: {error.message}")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)
    job.said(f"Goes on from step {found.step}, the checkpoint of attempt {found.attempt} in storage.")
    return found.step


def _put_together(folder: Path) -> None:
    """Make the files that came in pieces whole."""
    for piece in sorted(path for path in folder.rglob("*.piece-*") if path.is_file()):
        if match := _IS_PIECE.fullmatch(piece.name):
            whole = piece.with_name(match["whole"])
            try:
                if match["number"] == "00000":
                    piece.replace(whole)
                    continue
                with piece.open("rb") as source, whole.open("ab") as target:
                    shutil.copyfileobj(source, target, CHUNK)
                piece.unlink()
            except OSError as error:
                raise LocalFailure.of(error, whole) from error


class Keeper:
    """Sends what is left in ``folder`` while the block runs, for ``jobs``; ``every``: seconds between two at least."""

    def __init__(self, client: RegistryClient, folder: Path, jobs: Sequence[Kept], every: float) -> None:
        self._client, self._folder, self._every = client, folder, every
        self._jobs = {job.id: job for job in jobs}
        self._aside = folder.with_name(f"{folder.name}-sending")
        self._seen: list[tuple[str, int, int]] = []
        self._sent: dict[str, CheckpointRequest] = {}
        self._digests: dict[tuple[int, int, int], list[str]] = {}
        """Of the files of the last checkpoint: those that stay as they are are links to the same inode in the next."""
        self._ended = threading.Event()
        self._deadline = float("inf")
        context = contextvars.copy_context()  # its lines in the log name the job, as ours do
        self._thread = threading.Thread(target=context.run, args=(self._keep,), name="checkpoints", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline = min(self._deadline, time.monotonic())
        self._ended.set()
        self._thread.join(timeout=5)  # it looks at the deadline between two chunks; one that hangs is left behind
        shutil.rmtree(self._aside, ignore_errors=True)

    def leave(self, job_id: str) -> None:
        """A job has its outcome: nothing of it is sent any more."""
        self._jobs.pop(job_id, None)

    def last_word(self) -> None:
        """The child is gone without an outcome: send what it left, within `LAST_WORD_S`."""
        self._deadline = time.monotonic() + LAST_WORD_S
        self._ended.set()
        self._thread.join(timeout=LAST_WORD_S)

    def _keep(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            took = time.monotonic() - began if self.look() else 0.0
            self._ended.wait(max(self._every - took, took) if took else min(_LOOK_S, self._every))
        if time.monotonic() < self._deadline:
            self.look()

    def look(self) -> bool:
        """Send what is there if it is news; whether anything was tried. Whatever fails is tried again with the next."""
        try:
            found = [(str(path), path.stat()) for path in sorted(self._folder.rglob("*.json"))]
            seen = [(path, about.st_ino, about.st_mtime_ns) for path, about in found]
            if seen == self._seen or not self._jobs:
                return False
            self._send()
            self._seen = seen
        except Exception as error:  # noqa: BLE001  # training goes on, whatever becomes of a checkpoint
            reason = f"{type(error).__name__}: {error}"[:500]
            log.warning("checkpoint-not-sent", jobs=sorted(self._jobs), reason=reason)
        return True

    def _send(self) -> None:
        jobs = dict(self._jobs)
        take(self._folder, {self._aside / job.id: job.mine for job in jobs.values()})
        news: dict[str, CheckpointRequest] = {}
        known, self._digests = self._digests, {}
        for job in jobs.values():
            folder = self._aside / job.id
            if (step := steps(folder)) > job.stored:
                listed = self._entries(folder, known)
                request = CheckpointRequest(attempt=job.attempt, step=step, files=[entry for entry, _ in listed])
                places = {entry.digest: where for entry, where in listed}
                if request != self._sent.get(job.id) and self._put(job, request, places):
                    news[job.id] = request
        self._record(news)
        self._sent |= news
        shutil.rmtree(self._aside)  # what was replaced meanwhile takes no room on the disk any more

    def _put(self, job: Kept, request: CheckpointRequest, places: Mapping[str, Stretch]) -> bool:
        """Send what storage lacks from its place; False for a job that is not ours any more, or too large."""
        try:
            signed = self._client.send_checkpoint(job.id, request).put
        except FileTooLarge as error:
            job.said(f"Checkpoints stay on the disk of this worker: {error.message}")
        except _OVER:
            pass
        else:
            send([(places[digest], one) for digest, one in signed.items()], self._check)
            return True
        self.leave(job.id)
        return False

    def _record(self, news: Mapping[str, CheckpointRequest]) -> None:
        """All at once; without those that are over meanwhile."""
        left = {job_id: request for job_id, request in news.items() if job_id in self._jobs}
        while left:
            try:
                self._client.record_checkpoints(CheckpointsRequest(checkpoints=left))
            except _OVER as error:
                self.leave(error.id)
                if left.pop(error.id, None) is None:
                    raise
            else:
                return

    def _entries(
        self, folder: Path, known: Mapping[tuple[int, int, int], list[str]]
    ) -> list[tuple[FileEntry, Stretch]]:
        """What there is to send: files, and pieces of those that are too large to be sent at once."""
        found = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            about = path.stat()
            size = about.st_size
            places = [Stretch(path, at, min(PIECE, size - at)) for at in range(0, max(1, size), PIECE)]
            key = (about.st_ino, about.st_mtime_ns, size)
            digests = known.get(key) or [str(sha256_range(*place, lambda _: self._check())) for place in places]
            self._digests[key] = digests
            name = path.relative_to(folder).as_posix()
            for number, (place, digest) in enumerate(zip(places, digests, strict=True)):
                called = name if len(places) == 1 else f"{name}.piece-{number:05}"
                found.append((FileEntry(path=called, size=place.length, digest=digest), place))
        return found

    def _check(self) -> None:
        if time.monotonic() > self._deadline:
            raise _TooLate


class _TooLate(Exception):  # noqa: N818  # says what happened
    """The attempt ended, and did not wait any longer."""
