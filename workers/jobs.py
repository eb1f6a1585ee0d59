"""One job from claim to finish: fetch inputs, run in a child process, push outputs, end it.

The child is ``python -m workers.run``: progress comes over a pipe, cancellation goes by signal, and running
out of memory ends the child and not the worker. A thread keeps the lease; when the registry says that it
is lost, the work is stopped and nothing is reported, because another attempt owns the job by now. While the
registry does not answer at all, the work goes on: nobody can have taken it. A worker that is told to stop lets
its job end within a grace; else the job leaves a checkpoint, is handed back, and has used up no attempt.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import structlog
from structlog.contextvars import bind_contextvars, bound_contextvars

from registry import traces
from registry.client import RegistryClient
from registry.core.digest import Digest
from registry.core.errors import (
    Forbidden,
    JobNotFound,
    LeaseLost,
    LocalFailure,
    LoractlError,
    NotYourJob,
    StorageFull,
    Unauthenticated,
    Unavailable,
    WorkFailed,
)
from registry.core.manifest import Lineage, canonical_json
from registry.core.recipes import (
    DATA_ROLES,
    Answers,
    Combine,
    Compress,
    Distil,
    Evaluate,
    Extract,
    FineTune,
    FullFineTune,
    MakesAdapter,
    MakesBase,
    Merge,
    Rebase,
    Recipe,
    Search,
    parse_recipe,
    recipe_digest,
)
from registry.files import digest_base, scan_folder
from registry.schemas import (
    AnsweredInfo,
    ClaimInfo,
    ClaimRequest,
    Download,
    FailRequest,
    FinishRequest,
    HeartbeatRequest,
    JobPushRequest,
    PushInfo,
    PushRequest,
    ScoredInfo,
    Wishes,
)
from registry.settings import WorkerSettings
from registry.transfer import finish_push, request_of, send_base

from .cache import Cache
from .checkpoints import Keeper, Kept, restore
from .compute.snapshot import every, steps
from .metrics import Meters
from .processes import die_with

_BEAT_S = 5.0
"""The longest time between two words with the registry: so soon is a cancellation heard."""
_STOP_GRACE_S = 20.0
_COMPANY = "company"
"""The file in a job's folder that names the folder of checkpoints which it shared with others."""
_PAUSE_S = 0.5
"""The shortest pause before finished work is reported again to a registry that did not answer."""
_EVENT_EVERY_S = 1.0
_MAX_LOG_LINES = 400
_MAX_LINE = 1 << 16
_CHECKPOINT_EVERY = 50
_KEPT_S = 7 * 24 * 3600
"""How long the checkpoints of a job that did not succeed are kept for a retry."""
log = structlog.get_logger()


class Worker:
    """A worker's right to claim (a token), its cache, and the folder it works in."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: RegistryClient | None = None,
        stopping: Callable[[], bool] = lambda: False,
        meters: Meters | None = None,
    ) -> None:
        """``client``: another way to the registry, for tests. ``stopping``: whether this worker is to end."""
        self.meters = meters or Meters()
        self.settings = settings
        self.client = client or RegistryClient(settings.url, settings.token)
        self.cache = Cache(settings.cache / "inputs", settings.cache_bytes)
        self.jobs = settings.cache / "jobs"
        self._stopping = stopping
        self._grace_until: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def work(self, queue: str) -> int:
        """Claim and run jobs of ``queue`` until there are none, or one failed here; how many ran.

        After a failure that may be this machine's (a full disk, a killed child) the next wake-up is waited for,
        so that the attempts of a job are not used up in a moment, and another worker may have it.
        """
        ran = 0
        while not self._stopping():
            wanted = ClaimRequest(
                queue=queue, worker=self.settings.name, cached=self.cache.holds(), group=self.settings.together
            )
            try:
                claimed = self.client.claim(wanted)
            except (Unavailable, Unauthenticated, Forbidden) as error:
                self.meters.claims.labels(error.code).inc()
                log.warning("claim-failed", queue=queue, code=error.code, reason=error.message)
                return ran
            if claimed.job is None:
                return ran
            ran += 1 + len(claimed.others)
            if not self.run(claimed):
                return ran
        return ran

    def _is_over(self) -> bool:
        """Whether this worker is to end, and the grace of what it is at is over."""
        if not self._stopping():
            return False
        if self._grace_until is None:
            self._grace_until = time.monotonic() + self.settings.grace_s
            log.info("worker-stops", grace_s=self.settings.grace_s)
        return time.monotonic() >= self._grace_until

    def run(self, claimed: ClaimInfo) -> bool:
        """Run claimed work to its end, whatever that is; whether this machine can take the next at once."""
        if claimed.others:
            return self._run_together([claimed, *claimed.others])
        with _Lease(self.client, claimed, self.meters) as lease:
            return self._guarded(lease, lambda: self._attempt(claimed, lease))

    def _guarded(self, lease: "_Lease", work: Callable[[], None]) -> bool:
        """Do ``work`` for a job and report how it failed if it did; whether this machine can take the next at once."""
        with bound_contextvars(**lease.about), traces.within(lease.span):
            try:
                work()
            except (LeaseLost, NotYourJob, JobNotFound):
                lease.over("lost")
                return True
            except _HandedBack:
                stopped = WorkFailed(id=lease.id, reason="its worker stopped")
                self._fail(lease, stopped, "handed-back", retryable=True, cancelled=True)
                return True
            except _Cancelled:
                cancelled = WorkFailed(id=lease.id, reason="cancelled")
                self._fail(lease, cancelled, "cancelled", retryable=False, cancelled=True)
                return True
            except LoractlError as error:
                passing = isinstance(error, Unavailable | LocalFailure)
                self._fail(lease, error, "failed", retryable=passing)
                return not passing
            except Exception as error:  # whatever it was, the registry must hear of it
                log.error("attempt-failed", exc_info=error)
                reason = f"{type(error).__name__}: {error}"
                self._fail(lease, WorkFailed(id=lease.id, reason=reason), "failed", retryable=True)
                return False
            return True

    def _run_together(self, claims: Sequence[ClaimInfo]) -> bool:
        """Train the adapters of several jobs in one child; each is pushed and reported by itself, as it ends."""
        with ExitStack() as stack:
            leases = [stack.enter_context(_Lease(self.client, claimed, self.meters)) for claimed in claims]
            seats: list[_Seat] = []
            sound = True
            for claimed, lease in zip(claims, leases, strict=True):
                sound &= self._guarded(
                    lease, lambda claimed=claimed, lease=lease: seats.append(self._seat(claimed, lease, stack))  # type: ignore[misc]
                )
            if seats:
                sound &= self._train(seats)
        return sound

    def _seat(self, claimed: ClaimInfo, lease: "_Lease", stack: ExitStack) -> "_Seat":
        """A job with its inputs fetched and its recipe written, ready for a child."""
        assert claimed.job is not None
        recipe = parse_recipe(claimed.job.recipe)
        home = self._home(claimed.job.id)
        out = home / f"attempt-{lease.attempt}"
        out.mkdir()
        stack.callback(shutil.rmtree, out, ignore_errors=True)

        def fetched(what: str, done: int, total: int) -> None:
            if self._is_over():
                raise _HandedBack
            lease.transfer(what, done, total)

        folders = {
            role: stack.enter_context(
                self.cache.use(manifest, lambda manifest=manifest: self._downloads(lease, manifest), fetched)  # type: ignore[misc]
            )
            for role, manifest in claimed.inputs.items()
        }
        for role, spec in claimed.specs.items():
            folders[role] = _with_spec(folders[role], spec, out / role)
        told = _with_checkpoints(recipe)
        (out / "recipe.json").write_bytes(canonical_json(told.model_dump(mode="json")))
        run = str(recipe_digest(told))
        mine = (lambda identity: identity.startswith(run)) if isinstance(told, FineTune | Rebase) else every
        called = {role: claimed.called.get(role, f"the {role}") for role in folders if role.startswith(DATA_ROLES)}
        seat = _Seat(recipe, home, out, folders, called, lease, Kept(lease.id, lease.attempt, mine, lease.said))
        if lease.attempt == 1:
            return seat
        here = max(steps(folder, mine) for folder in seat.earlier())
        stored = restore(lease.client, seat.kept, home / "checkpoint", here, lease.transfer)
        return replace(seat, kept=replace(seat.kept, stored=stored))

    def _train(self, seats: Sequence["_Seat"]) -> bool:
        """One child for all ``seats``; whether none of them failed by what may be this machine's."""
        ids = " ".join(sorted(seat.lease.id for seat in seats))
        company = self.jobs / f"together-{Digest.sha256(ids.encode()).hex[:16]}"
        company.mkdir(exist_ok=True)
        os.utime(company)
        earlier = [folder for seat in seats for folder in seat.earlier()]
        for seat in seats:
            (seat.home / _COMPANY).write_text(company.name)
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        going = set(range(len(seats)))
        sound: list[bool] = []

        def told(line: str) -> None:
            with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
                now = json.loads(line)
                place = now.pop("task")
                if now.get("ended"):
                    ended.put(place)
                else:
                    seats[place].lease.progressed(json.dumps(now))

        def said(line: str) -> None:
            for seat in seats:
                seat.lease.said(line)

        def conclude(place: int, status: int) -> None:
            if place in going:
                going.remove(place)
                seat = seats[place]
                keeper.leave(seat.lease.id)
                sound.append(self._guarded(seat.lease, lambda: self._conclude(seat, status)))

        def is_over() -> bool:
            """Push what has ended, take out who is to stop; whether the child is to end."""
            with contextlib.suppress(queue.Empty):
                while True:
                    conclude(ended.get_nowait(), 0)
            for place in sorted(going):
                if seats[place].lease.cancelled or seats[place].lease.lost:
                    (seats[place].out / "unwanted").touch()
                    conclude(place, 0)
            return not going or self._is_over()

        line = [str(seat.out / "recipe.json") for seat in seats]
        line += [part for seat in seats for part in ("--out", str(seat.out))]
        line += [
            part for place, seat in enumerate(seats) for role, folder in seat.folders.items()
            for part in ("--in", f"{place}:{role}={folder}")
        ]  # fmt: skip
        line += [
            part for place, seat in enumerate(seats) for role, words in seat.called.items()
            for part in ("--called", f"{place}:{role}={words}")
        ]  # fmt: skip
        line += [part for folder in earlier for part in ("--from", str(folder))]
        with Keeper(self.client, company, [seat.kept for seat in seats], self.settings.checkpoint_s) as keeper:
            status = _followed([*line, "--checkpoint", str(company)], told, said, is_over)
            if any(not (seats[place].has_ended or seats[place].lease.lost) for place in going):
                keeper.last_word()
        for place in sorted(going):
            conclude(place, status)
        if not any(seat.home.exists() for seat in seats):
            shutil.rmtree(company, ignore_errors=True)
        return all(sound)

    def _conclude(self, seat: "_Seat", status: int) -> None:
        """What a child left for one job becomes its end."""
        lease, out = seat.lease, seat.out
        lease.check()
        if (out / "error.json").exists():
            raise LoractlError.from_problem(json.loads((out / "error.json").read_text()))
        if not (out / "result.json").exists():
            if self._is_over():
                raise _HandedBack
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            reason = f"the process {how}: {' | '.join(lease.tail()) or 'it said nothing'}"
            raise WorkFailed(id=lease.id, reason=reason)
        self._finish(seat.recipe, out, lease)
        shutil.rmtree(seat.home, ignore_errors=True)

    def _home(self, job: str) -> Path:
        """The job's folder: its checkpoints, and nothing of earlier attempts; what lies here for long goes."""
        self.jobs.mkdir(parents=True, exist_ok=True)
        for old in self.jobs.iterdir():
            if old.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(old, ignore_errors=True)
        home = self.jobs / job
        for left in home.glob("attempt-*"):
            shutil.rmtree(left, ignore_errors=True)
        home.mkdir(exist_ok=True)
        os.utime(home)
        return home

    def _attempt(self, claimed: ClaimInfo, lease: "_Lease") -> None:
        with ExitStack() as stack:
            seat = self._seat(claimed, lease, stack)
            line = [str(seat.out / "recipe.json"), "--out", str(seat.out)]
            line += [part for role, folder in seat.folders.items() for part in ("--in", f"{role}={folder}")]
            line += [part for role, words in seat.called.items() for part in ("--called", f"{role}={words}")]
            line += [part for folder in seat.earlier()[1:] for part in ("--from", str(folder))]
            checkpoint = seat.home / "checkpoint"
            line += ["--checkpoint", str(checkpoint)]
            with Keeper(lease.client, checkpoint, [seat.kept], self.settings.checkpoint_s) as keeper:
                def is_over() -> bool:
                    return lease.cancelled or lease.lost or self._is_over()

                status = _followed(line, lease.progressed, lease.said, is_over)
                if not (seat.has_ended or lease.lost):
                    keeper.last_word()
            self._conclude(seat, status)

    def _downloads(self, lease: "_Lease", manifest: str) -> list[Download]:
        return lease.client.job_inputs(lease.id, lease.attempt).files[manifest]

    def _finish(self, recipe: Recipe, out: Path, lease: "_Lease") -> None:
        result = json.loads((out / "result.json").read_text())
        pushes: list[str] = []
        evaluations: list[ScoredInfo] = []
        answers: list[AnsweredInfo] = []
        match recipe:
            case Search():
                found = recipe.model_copy(update={"found": FineTune.model_validate(result["found"], strict=False)})
                pushes.append(self._push_adapter(found, out / "adapter", lease))
            case FineTune() | Rebase() | Combine() | Compress() | Extract():
                pushes.append(self._push_adapter(recipe, out / "adapter", lease))
            case Merge() | FullFineTune():
                pushes.append(self._push_base(recipe, out / "base", result["tensors"], lease))
            case Evaluate():
                evaluations = [
                    ScoredInfo(
                        adapter=recipe.adapters[int(name)] if name != "bare" else None,
                        records=(out / f"records-{name}.jsonl").read_text(),
                        harness=result["harness"],
                        seconds=result["seconds"] / max(1, len(result["metrics"])),
                    )
                    for name in result["metrics"]
                ]
            case Answers():
                answers = [
                    AnsweredInfo(
                        adapter=recipe.adapters[int(name)] if name != "bare" else None,
                        answers=(out / f"answers-{name}.jsonl").read_text(),
                        harness=result["harness"],
                    )
                    for name in result["answered"]
                ]
        lease.check()
        lease.tell()
        request = FinishRequest(
            attempt=lease.attempt, result=result, pushes=pushes, evaluations=evaluations, answers=answers
        )
        self._report(request, lease)

    def _report(self, request: FinishRequest, lease: "_Lease") -> None:
        """Finish the job as often as it takes until the registry accepts or refuses it: hours of work are at stake.

        Finishing again changes nothing, and the answer to it says when the lease is lost; a heartbeat's does not,
        because it is refused as well when the work was taken and only the answer got lost.
        """
        pause = _PAUSE_S
        while True:
            try:
                lease.client.finish(lease.id, request)
                lease.over("succeeded")
                return
            except StorageFull:
                raise
            except Unavailable as error:
                log.warning("report-waits", code=error.code, reason=error.message)
            time.sleep(pause)
            pause = min(_BEAT_S, 2 * pause)

    def _push_adapter(self, recipe: MakesAdapter, folder: Path, lease: "_Lease") -> str:
        parents, training = _origins(recipe, lease)
        lineage = Lineage(
            parents=parents,
            datasets=training.datasets if training else (),
            recipe=recipe.model_dump(mode="json"),
        )
        scan = scan_folder("adapter", folder, base=Digest.parse(recipe.base), lineage=lineage)
        opened = self._open(lease, request_of(scan, Wishes(**_wishes(lease))))
        return finish_push(lease.client, opened, scan, progress=lease.transfer).id

    def _push_base(self, recipe: MakesBase, folder: Path, taken: Mapping[str, str], lease: "_Lease") -> str:
        base = digest_base(folder, taken=taken)
        match recipe:
            case Merge():
                lineage = Lineage(parents=(recipe.adapter,), recipe=recipe.model_dump(mode="json"))
            case FullFineTune():
                lineage = Lineage(datasets=recipe.datasets, recipe=recipe.model_dump(mode="json"))
        wishes = Wishes(line=lease.output.get("line"))
        return send_base(
            lease.client, partial(self._open, lease), folder, base, wishes, lineage=lineage, progress=lease.transfer
        ).id

    def _open(self, lease: "_Lease", push: PushRequest) -> PushInfo:
        return lease.client.job_push(lease.id, JobPushRequest(attempt=lease.attempt, push=push))

    def _fail(
        self, lease: "_Lease", problem: LoractlError, outcome: str, *, retryable: bool, cancelled: bool = False
    ) -> None:
        request = FailRequest(
            attempt=lease.attempt, problem=problem.problem(), retryable=retryable, cancelled=cancelled
        )
        lease.over(outcome, code=problem.code, reason=problem.message)
        lease.tell()
        try:
            lease.client.fail(lease.id, request)
        except (LeaseLost, NotYourJob, JobNotFound, Unavailable) as error:
            log.warning("failure-not-reported", code=error.code)


@dataclass(frozen=True)
class _Seat:
    """A job in a child: what it is to do, from which folders, and where its result goes."""

    recipe: Recipe
    home: Path
    out: Path
    folders: dict[str, Path]
    called: dict[str, str]
    lease: "_Lease"
    kept: Kept

    @property
    def has_ended(self) -> bool:
        """Whether the child left an outcome."""
        return (self.out / "result.json").exists() or (self.out / "error.json").exists()

    def earlier(self) -> list[Path]:
        """Where earlier attempts left checkpoints: alone, and in the company of others."""
        noted = self.home / _COMPANY
        return [self.home / "checkpoint", *([self.home.parent / noted.read_text()] if noted.is_file() else [])]


class _HandedBack(Exception):  # noqa: N818  # a word, not a failure
    """The worker is to end before its job did."""


class _Cancelled(Exception):  # noqa: N818  # a word, not a failure
    """Somebody asked for the job to end."""


class _Lease:
    """Keeps a job's lease alive from a thread, and carries progress there and cancellation back."""

    def __init__(self, client: RegistryClient, claimed: ClaimInfo, meters: Meters) -> None:
        job = claimed.job
        assert job is not None
        self.id, self.kind, self.attempt, self.output = job.id, job.kind, job.attempt, job.output
        self.about = {"job": job.id, "attempt": job.attempt, "campaign": job.campaign, "origin": job.origin}
        """What is in every line of our log, and what our requests tell the registry's."""
        self.client = client.on_behalf(self.about)
        self.inputs = claimed.inputs
        self._meters, self._began, self._over = meters, time.monotonic(), False
        self.span = traces.begin(f"job {job.kind}", claimed.traceparent, self.about)
        """Of the attempt, in the trace of the request that asked for the job."""
        self.cancelled = self.lost = False
        self._every = min(_BEAT_S, claimed.lease_s / 4)
        self._progress: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []
        self._lines = 0
        self._tail: deque[str] = deque(maxlen=3)
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._noted = 0.0
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Lease":
        log.info("attempt-begins", **self.about, kind=self.kind)
        self._meters.jobs.labels(self.kind).inc()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=30)

    def over(self, outcome: str, **why: str) -> None:
        """Log and measure the end of the attempt; what is said of it after that is no news."""
        if self._over:
            return
        self._over = True
        log.info("attempt-ended", outcome=outcome, **why)
        self._meters.jobs.labels(self.kind).dec()
        self._meters.attempts.labels(self.kind, outcome).observe(time.monotonic() - self._began)
        traces.end(self.span, outcome)

    def check(self) -> None:
        """`LeaseLost` when it is; `_Cancelled` when somebody asked for the end."""
        if self.lost:
            raise LeaseLost(id=self.id, attempt=self.attempt, state="another attempt's")
        if self.cancelled:
            raise _Cancelled

    def progressed(self, line: str) -> None:
        """A line of progress from the child: the newest one travels with every beat, some as events."""
        with contextlib.suppress(ValueError):
            progress = json.loads(line)
            with self._lock:
                self._progress = progress
                now = time.monotonic()
                final = progress.get("step") is not None and progress.get("step") == progress.get("steps")
                if now - self._noted >= _EVENT_EVERY_S or final:
                    self._noted = now
                    self._events.append({"kind": "progress", **progress})
                    self._wake.set()

    def said(self, line: str) -> None:
        """A line of the child's output, for ``loractl jobs logs``."""
        with self._lock:
            if self._lines < _MAX_LOG_LINES:
                self._events.append({"kind": "log", "line": line.rstrip()[:2000]})
            self._lines += 1
            self._tail.append(line.rstrip()[:500])

    def tail(self) -> list[str]:
        """The last lines that the child said."""
        with self._lock:
            return list(self._tail)

    def transfer(self, what: str, done: int, total: int) -> None:
        """Progress of a download or an upload; ends it as `check` does."""
        self.check()
        with self._lock:
            self._progress = {"doing": what, "done": done, "total": total}

    def _beat(self) -> None:
        bind_contextvars(**self.about)
        while not self._ended:
            self._wake.wait(self._every)
            if self._wake.is_set() and not self._ended:
                time.sleep(0.1)  # several lines in one beat
            self._wake.clear()
            if not self._ended:
                self.tell()

    def tell(self) -> None:
        """One beat: say what there is to say, and hear whether to stop."""
        with self._telling:
            with self._lock:
                progress, events = self._progress, self._events[:1000]
            try:
                answer = self.client.heartbeat(
                    self.id, HeartbeatRequest(attempt=self.attempt, progress=progress, events=events)
                )
            except (Forbidden, JobNotFound, LeaseLost, Unauthenticated) as error:
                log.warning("heartbeat-refused", code=error.code)
                self.lost = True
            except Exception as error:  # noqa: BLE001  # the next beat may do better; the lease says how long
                log.warning("heartbeat-failed", reason=f"{type(error).__name__}: {error}"[:500])
            else:
                with self._lock:
                    del self._events[: len(events)]
                self.cancelled = self.cancelled or answer.cancel


def _with_checkpoints(recipe: Recipe) -> Recipe:
    """The recipe with checkpoints, where its author asked for none: they change time and nothing else."""
    match recipe:
        case FineTune(checkpoint_every=0) | FullFineTune(checkpoint_every=0):
            return recipe.model_copy(update={"checkpoint_every": _CHECKPOINT_EVERY})
        case Rebase(distil=Distil(checkpoint_every=0) as asked):
            often = asked.model_copy(update={"checkpoint_every": _CHECKPOINT_EVERY})
            return recipe.model_copy(update={"distil": often})
        case Rebase(training=FineTune() as training) | Search(training=training):
            return recipe.model_copy(update={"training": _with_checkpoints(training)})
    return recipe


def _origins(recipe: MakesAdapter, lease: _Lease) -> tuple[tuple[str, ...], FineTune | None]:
    """The versions that an adapter was made from, each once, and the training that made it, if one did."""
    match recipe:
        case FineTune():
            return ((recipe.start,) if recipe.start else ()), recipe
        case Rebase():
            return tuple(dict.fromkeys((recipe.adapter, *recipe.made.values()))), recipe.training
        case Search():
            return (), recipe.found
        case Compress():
            return (recipe.adapter,), None
        case Combine():
            return tuple(dict.fromkeys(recipe.adapters)), None
        case Extract():
            return (lease.inputs["tuned"],), None


def _wishes(lease: _Lease) -> dict[str, Any]:
    output = lease.output
    return {
        "aliases": output.get("aliases", []),
        "message": output.get("message", ""),
        "task": output.get("task"),
    }


def _with_spec(folder: Path, spec: dict[str, Any], out: Path) -> Path:
    """The rows of ``folder`` and the suite's spec beside them, in ``out``."""
    out.mkdir()
    for path in folder.glob("*.jsonl"):
        (out / path.name).symlink_to(path.resolve())
    (out / "suite.json").write_bytes(canonical_json(spec))
    return out


def _followed(
    line: Sequence[str], told: Callable[[str], None], said: Callable[[str], None], is_over: Callable[[], bool]
) -> int:
    """Run ``python -m workers.run`` and follow it until it ends or ``is_over``; its status, negative for a signal."""
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "workers.run", *line, "--progress-fd", str(writing)],
        pass_fds=(writing,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_without_secrets(os.environ),
        preexec_fn=die_with(os.getpid()),  # noqa: PLW1509  # two system calls, no locks are taken
    )
    os.close(writing)
    assert child.stdout is not None
    readers = [
        threading.Thread(target=_follow, args=(os.fdopen(reading), told), daemon=True),
        threading.Thread(target=_follow, args=(child.stdout, said), daemon=True),
    ]
    for reader in readers:
        reader.start()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.2)
            break
        if is_over():
            _stop(child)
            break
    for reader in readers:
        reader.join(timeout=5)
    return child.returncode


def _follow(stream: IO[str], tell: Callable[[str], None]) -> None:
    with stream:
        while line := stream.readline(_MAX_LINE):
            tell(line)


def _stop(child: "subprocess.Popen[str]") -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(timeout=_STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """What a child is told: neither our token nor the broker; that there is no network for it, and nobody for bars."""
    kept = {key: value for key, value in env.items() if not key.startswith(("LORACTL_", "CELERY_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
