"""One job from claim to finish: fetch inputs, run in a child process, push outputs, end it.

The child is ``python -m workers.run``: progress comes over a pipe, cancellation goes by signal, and running
out of memory ends the child and not the worker. A thread keeps the lease; when the registry says that it
is lost, the child is stopped and nothing is reported, because another attempt owns the job by now.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import structlog

from registry.client import RegistryClient
from registry.core.digest import Digest
from registry.core.errors import JobNotFound, LeaseLost, LoractlError, NotYourJob, Unavailable, WorkFailed
from registry.core.manifest import Lineage, canonical_json
from registry.core.recipes import Evaluate, FineTune, Merge, Rebase, parse_recipe
from registry.files import digest_base, scan_folder
from registry.schemas import (
    ClaimInfo,
    ClaimRequest,
    Download,
    FailRequest,
    FinishRequest,
    HeartbeatRequest,
    JobPushRequest,
    Wishes,
)
from registry.settings import WorkerSettings
from registry.transfer import finish_push, request_of, table_of

from .cache import Cache

_STOP_GRACE_S = 20.0
_EVENT_EVERY_S = 1.0
_MAX_LOG_LINES = 400
_PR_SET_PDEATHSIG = 1
log = structlog.get_logger()


class Worker:
    """A worker's right to claim (a token), its cache, and the folder it works in."""

    def __init__(self, settings: WorkerSettings, client: RegistryClient | None = None) -> None:
        """``client``: another way to the registry, for tests."""
        self.settings = settings
        self.client = client or RegistryClient(settings.url, settings.token)
        self.cache = Cache(settings.cache / "inputs", settings.cache_bytes)
        self.jobs = settings.cache / "jobs"

    def work(self, queue: str) -> int:
        """Claim and run jobs of ``queue`` until there are none; how many ran."""
        ran = 0
        while True:
            claimed = self.client.claim(ClaimRequest(queue=queue, worker=self.settings.name, bases=self._bases()))
            if claimed.job is None:
                return ran
            self.run(claimed)
            ran += 1

    def run(self, claimed: ClaimInfo) -> None:
        """Run one claimed job to its end, whatever that is."""
        assert claimed.job is not None
        with _Lease(self.client, claimed) as lease:
            try:
                self._attempt(claimed, lease)
            except (LeaseLost, NotYourJob, JobNotFound):
                log.warning("lease-lost", job=lease.id, attempt=lease.attempt)
            except LoractlError as error:
                self._fail(lease, error, retryable=isinstance(error, Unavailable))
            except Exception as error:  # whatever it was, the registry must hear of it
                log.error("attempt-failed", job=lease.id, exc_info=error)
                reason = f"{type(error).__name__}: {error}"
                self._fail(lease, WorkFailed(id=lease.id, reason=reason), retryable=True)

    def _bases(self) -> list[str]:
        remembered = self.jobs / "bases.json"
        known: dict[str, str] = json.loads(remembered.read_text()) if remembered.exists() else {}
        held = set(self.cache.holds())
        return [base for base, manifest in known.items() if manifest in held][:100]

    def _remember(self, base: str, manifest: str) -> None:
        remembered = self.jobs / "bases.json"
        known = json.loads(remembered.read_text()) if remembered.exists() else {}
        partial = remembered.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**known, base: manifest}))
        partial.replace(remembered)

    def _attempt(self, claimed: ClaimInfo, lease: "_Lease") -> None:
        assert claimed.job is not None
        recipe = parse_recipe(claimed.job.recipe)
        home = self.jobs / claimed.job.id
        out = home / f"attempt-{lease.attempt}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with ExitStack() as stack:
            folders = {
                role: stack.enter_context(
                    self.cache.use(manifest, lambda manifest=manifest: self._downloads(lease, manifest), lease.transfer)  # type: ignore[misc]
                )
                for role, manifest in claimed.inputs.items()
            }
            for role, spec in claimed.specs.items():
                folders[role] = _with_spec(folders[role], spec, out / role)
            if "base" in claimed.inputs:
                self._remember(recipe.base, claimed.inputs["base"])
            (out / "recipe.json").write_bytes(canonical_json(recipe.model_dump(mode="json")))
            status = self._child(out, folders, home / "checkpoint", lease)
        if lease.lost:
            raise LeaseLost(id=lease.id, attempt=lease.attempt, state="another attempt's")
        if lease.cancelled:
            self._fail(lease, WorkFailed(id=lease.id, reason="cancelled"), retryable=False, cancelled=True)
        elif status == 0:
            self._finish(recipe, out, lease)
            shutil.rmtree(home, ignore_errors=True)
            return
        elif (out / "error.json").exists():
            problem = LoractlError.from_problem(json.loads((out / "error.json").read_text()))
            self._fail(lease, problem, retryable=False)
        else:
            killed = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            reason = f"the process {killed}: {' | '.join(lease.tail()) or 'it said nothing'}"
            self._fail(lease, WorkFailed(id=lease.id, reason=reason), retryable=True)
        shutil.rmtree(out, ignore_errors=True)

    def _downloads(self, lease: "_Lease", manifest: str) -> list[Download]:
        return self.client.job_inputs(lease.id, lease.attempt).files[manifest]

    def _child(self, out: Path, folders: dict[str, Path], checkpoint: Path, lease: "_Lease") -> int:
        """Run ``python -m workers.run`` and follow it; its exit status, negative for a signal."""
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "workers.run", str(out / "recipe.json"), "--out", str(out)]
        command += [part for role, folder in folders.items() for part in ("--in", f"{role}={folder}")]
        command += ["--checkpoint", str(checkpoint), "--progress-fd", str(writing)]
        child = subprocess.Popen(
            command,
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={key: value for key, value in os.environ.items() if not key.startswith("LORACTL_")},
            preexec_fn=_die_with_parent,  # noqa: PLW1509  # one prctl call, no locks are taken
        )
        os.close(writing)
        assert child.stdout is not None
        readers = [
            threading.Thread(target=_follow, args=(os.fdopen(reading), lease.progressed), daemon=True),
            threading.Thread(target=_follow, args=(child.stdout, lease.said), daemon=True),
        ]
        for reader in readers:
            reader.start()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.2)
                break
            if lease.cancelled or lease.lost:
                _stop(child)
                break
        for reader in readers:
            reader.join(timeout=5)
        return child.returncode

    def _finish(self, recipe: Any, out: Path, lease: "_Lease") -> None:
        result = json.loads((out / "result.json").read_text())
        pushes: list[str] = []
        evaluations: list[dict[str, Any]] = []
        match recipe:
            case FineTune() | Rebase():
                pushes.append(self._push_adapter(recipe, out / "adapter", lease))
            case Merge():
                pushes.append(self._push_base(recipe, out / "base", lease))
            case Evaluate():
                evaluations = [
                    {
                        "adapter": recipe.adapters[int(name)] if name != "bare" else None,
                        "records": (out / f"records-{name}.jsonl").read_text(),
                        "harness": result["harness"],
                        "seconds": result["seconds"] / max(1, len(result["metrics"])),
                    }
                    for name in result["metrics"]
                ]
        lease.check()
        request = FinishRequest(attempt=lease.attempt, result=result, pushes=pushes, evaluations=evaluations)
        self.client.finish(lease.id, request)

    def _push_adapter(self, recipe: FineTune | Rebase, folder: Path, lease: "_Lease") -> str:
        training = recipe.training if isinstance(recipe, Rebase) else recipe
        parents = [recipe.adapter] if isinstance(recipe, Rebase) else [recipe.start] if recipe.start else []
        lineage = Lineage(
            parents=tuple(parents),
            datasets=training.datasets if training else (),
            recipe=recipe.model_dump(mode="json"),
        )
        scan = scan_folder("adapter", folder, base=Digest.parse(recipe.base), lineage=lineage)
        return self._push(scan, Wishes(**_wishes(lease)), None, lease)

    def _push_base(self, recipe: Merge, folder: Path, lease: "_Lease") -> str:
        base = digest_base(folder)
        lineage = Lineage(parents=(recipe.adapter,), recipe=recipe.model_dump(mode="json"))
        scan = scan_folder("base", folder, base=base.digest, lineage=lineage)
        wishes = Wishes(line=lease.output.get("line"), parent=recipe.base, parent_kind="merged")
        return self._push(scan, wishes, table_of(base), lease)

    def _push(self, scan: Any, wishes: Wishes, table: str | None, lease: "_Lease") -> str:
        request = JobPushRequest(attempt=lease.attempt, push=request_of(scan, wishes, table))
        opened = self.client.job_push(lease.id, request)
        return finish_push(self.client, opened, scan, progress=lease.transfer).id

    def _fail(self, lease: "_Lease", problem: LoractlError, *, retryable: bool, cancelled: bool = False) -> None:
        request = FailRequest(
            attempt=lease.attempt, problem=problem.problem(), retryable=retryable, cancelled=cancelled
        )
        try:
            self.client.fail(lease.id, request)
        except (LeaseLost, NotYourJob, JobNotFound, Unavailable) as error:
            log.warning("failure-not-reported", job=lease.id, code=error.code)


class _Lease:
    """Keeps a job's lease alive from a thread, and carries progress there and cancellation back."""

    def __init__(self, client: RegistryClient, claimed: ClaimInfo) -> None:
        assert claimed.job is not None
        self.client = client
        self.id, self.attempt, self.output = claimed.job.id, claimed.job.attempt, claimed.job.output
        self.cancelled = self.lost = False
        self._every = min(10.0, claimed.lease_s / 4)
        self._until = time.monotonic() + claimed.lease_s
        self._life = claimed.lease_s
        self._progress: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._noted = 0.0
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=30)

    def check(self) -> None:
        """`LeaseLost` when it is."""
        if self.lost:
            raise LeaseLost(id=self.id, attempt=self.attempt, state="another attempt's")

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
            if len(self._lines) < _MAX_LOG_LINES:
                self._events.append({"kind": "log", "line": line.rstrip()[:2000]})
            self._lines.append(line.rstrip()[:500])

    def tail(self) -> list[str]:
        """The last lines that the child said."""
        with self._lock:
            return self._lines[-3:]

    def transfer(self, what: str, done: int, total: int) -> None:
        """Progress of a download or an upload."""
        with self._lock:
            self._progress = {"doing": what, "done": done, "total": total}

    def _beat(self) -> None:
        while not self._ended:
            self._wake.wait(self._every)
            if self._wake.is_set() and not self._ended:
                time.sleep(0.1)  # several lines in one beat
            self._wake.clear()
            self._send()

    def _send(self) -> None:
        with self._lock:
            progress, events = self._progress, self._events[:1000]
        try:
            answer = self.client.heartbeat(
                self.id, HeartbeatRequest(attempt=self.attempt, progress=progress, events=events)
            )
        except (LeaseLost, NotYourJob, JobNotFound):
            self.lost = not self._ended
            return
        except LoractlError as error:
            log.warning("heartbeat-failed", job=self.id, code=error.code)
            self.lost = self.lost or time.monotonic() > self._until
            return
        self._until = time.monotonic() + self._life
        with self._lock:
            del self._events[: len(events)]
        self.cancelled = self.cancelled or answer.cancel


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


def _follow(stream: Any, tell: Any) -> None:
    with stream:
        for line in _lines(stream):
            tell(line)


def _lines(stream: Any) -> Iterator[str]:
    while line := stream.readline():
        yield line


def _stop(child: "subprocess.Popen[str]") -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(timeout=_STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
