"""``loractl up``: the whole registry on this machine, as child processes of one command, in one folder.

    <dir>/secrets/     admin-token, worker-token, signing-key: made at first start, mode 0600
    <dir>/registry.db  metadata (SQLite)       <dir>/broker.db  wake-ups       <dir>/store/  blobs
    <dir>/cache/       the worker's bases      <dir>/logs/      one file a child
    <dir>/up.json      URL and process ids, while it runs

It starts processes and nothing else: migrations first, then the API (uvicorn), the daemons, and a worker
(celery). Settings reach them by environment; a worker gets a URL, a token and the broker, and neither the
database nor the signing key. A child that dies is started again, after a pause that grows while it keeps
dying. Ctrl-C and SIGTERM go on to the children by their process ids, the worker first.
"""

import ctypes
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import click

from registry.core.errors import BadRequest, ChildFailed, LocalFailure, LoractlError, PathUnusable, ToolMissing

from .config import write_secret
from .output import Output, command

READY_S = 90.0
GRACE_S = 15.0
"""From the word to stop until a child is stopped without asking."""
STEADY_S = 60.0
"""A child that lived this long is started again at once."""
MAX_PAUSE_S = 30.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


@command(
    None,
    "loractl up",
    "loractl up --dir ./registry --port 8080",
    "loractl up --port 0 --json",
)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              default=Path("loractl-data"), show_default=True, help="Where all of its state lies.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--public-url", metavar="URL", help="How others reach it, where that is not http://HOST:PORT.")
@click.option("--jobs", type=click.IntRange(0), default=1, show_default=True, help="Jobs at once; 0: no worker.")
@click.option("--file-root", "roots", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              metavar="DIR", help="A folder that file:// locations of bases may be under.")  # fmt: skip
def up(
    out: Output, folder: Path, host: str, port: int, public_url: str | None, jobs: int, roots: tuple[Path, ...]
) -> None:
    """Run a whole registry here: API, daemons and a worker, with all state in one folder."""
    if missing := [name for name in ("uvicorn", "fastapi", "sqlmodel", "celery") if find_spec(name) is None]:
        raise ToolMissing(what=f"loractl up (it lacks {', '.join(missing)})", extra="server")
    if jobs and find_spec("torch") is None:
        out.say("No torch here, so no worker: jobs will wait. Install one: pip install 'loractl[worker]'")
        jobs = 0
    folder = folder.absolute()
    with _alone(folder):
        port = port or _free_port(host)
        url = (public_url or f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{port}").rstrip("/")  # noqa: S104
        house = House(folder, url, host, port, jobs, roots)
        house.run(out)


@dataclass
class Child:
    """A process that should run: how it is started, and how it fares."""

    name: str
    line: list[str]
    env: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    deaths: int = 0
    again_at: float = 0.0


@dataclass
class House:
    """The children, and the folder they share."""

    folder: Path
    url: str
    host: str
    port: int
    jobs: int
    roots: tuple[Path, ...] = ()
    children: list[Child] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, out: Output) -> None:
        """Start everything, say when it is ready, and look after it until told to stop."""
        server, worker = self._environments()
        before = {number: signal.signal(number, self._stopped) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._take_port()
            self._once("migrate", [sys.executable, "-m", "registry.db.migrate"], server)
            self.children = self._lines(server, worker)
            for child in self.children:
                self._start(child)
            self._wait_until_ready()
            if not self._stop.is_set():
                self._tell(out)
            while not self._stop.wait(0.2):
                self._revive(out)
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        out.say("Stopped.")

    def _stopped(self, number: int, frame: object) -> None:
        _ = number, frame
        self._stop.set()

    # ── what runs ────────────────────────────────────────────────────────────

    def _lines(self, server: Mapping[str, str], worker: Mapping[str, str]) -> list[Child]:
        python = [sys.executable, "-m"]
        api = ["uvicorn", "--factory", "registry.api.app:create_app", "--host", self.host, "--port", str(self.port)]
        # No access log: it would hold the signatures of URLs.
        children = [
            Child("api", [*python, *api, "--no-access-log", "--timeout-graceful-shutdown", "5"], server),
            Child("daemons", [*python, "registry.daemons.run"], server),
        ]
        if self.jobs:
            queues = "cpu,gpu" if Path("/dev/nvidia0").exists() else "cpu"
            celery = ["celery", "-A", "workers.app", "worker", "-Q", queues, "--concurrency", str(self.jobs)]
            children.append(Child("worker", [*python, *celery, "--loglevel", "WARNING"], worker))
        return children

    def _environments(self) -> tuple[dict[str, str], dict[str, str]]:
        """What API and daemons are told, and what the worker is told."""
        kept = self.folder / "secrets"
        kept.mkdir(mode=0o700, exist_ok=True)
        admin = _secret(kept / "admin-token", make_token)
        work = _secret(kept / "worker-token", make_token)
        ours = {"LORACTL_URL", "LORACTL_TOKEN", "LORACTL_SIGNING_KEY", "LORACTL_BOOTSTRAP_TOKEN"}
        common = {key: value for key, value in os.environ.items() if key not in ours}
        common |= {"LORACTL_BROKER_URL": f"sqla+sqlite:///{self.folder / 'broker.db'}", "PYTHONUNBUFFERED": "1"}
        server = {
            "LORACTL_MODE": "embedded",
            "LORACTL_DATABASE_URL": f"sqlite:///{self.folder / 'registry.db'}",
            "LORACTL_DATA": str(self.folder),
            "LORACTL_PUBLIC_URL": self.url,
            "LORACTL_SIGNING_KEY": _secret(kept / "signing-key", lambda: secrets.token_urlsafe(48)),
            "LORACTL_BOOTSTRAP_TOKEN": admin,
            "LORACTL_BOOTSTRAP_WORKER_TOKEN": work,
            "LORACTL_FILE_ROOTS": ":".join(str(root.resolve()) for root in self.roots),
        }
        worker = {
            "LORACTL_URL": self.url,
            "LORACTL_TOKEN": work,
            "LORACTL_CACHE_DIR": str(self.folder / "cache"),
            "LORACTL_GRACE_S": "0",  # who waits for a prompt waits for no job: it goes on from its checkpoint
            "LORACTL_WORKER_NAME": f"{socket.gethostname()}-{os.getpid()}",
        }
        return common | server, common | worker

    # ── their lives ──────────────────────────────────────────────────────────

    def _once(self, name: str, line: list[str], env: Mapping[str, str]) -> None:
        with self._log(name) as log:
            ended = subprocess.run(line, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        if ended.returncode:
            raise self._failed(name, ended.returncode)

    def _start(self, child: Child) -> None:
        with self._log(child.name) as log:
            # A session of its own: the terminal's Ctrl-C reaches us, and we decide who stops when.
            child.process = subprocess.Popen(
                child.line, env=child.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_parent if _LIBC else None,  # noqa: PLW1509  # no threads here
            )  # fmt: skip
        child.started = time.monotonic()
        pids = {found.name: found.process.pid for found in self.children if found.process is not None}
        aside = self.folder / "up.json.new"
        aside.write_text(json.dumps({"url": self.url, "pid": os.getpid(), "pids": pids}, indent=1) + "\n")
        aside.replace(self.folder / "up.json")

    def _take_port(self) -> None:
        """Find out whether the port is free before anything runs: another registry on it would answer in our place."""
        try:
            with socket.create_server((self.host, self.port)):
                pass
        except OSError as error:
            free = "take a free one: loractl up --port N"
            reason = f"{self.host}:{self.port} cannot be listened on ({error.strerror}); {free}"
            raise BadRequest(problems=reason) from error

    def _wait_until_ready(self) -> None:
        import httpx

        deadline = time.monotonic() + READY_S
        address = f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '') else self.host}:{self.port}/health"  # noqa: S104
        while not self._stop.wait(0.1):
            for child in self.children:
                if child.process is not None and (status := child.process.poll()) is not None:
                    raise self._failed(child.name, status)
            with suppress(httpx.TransportError):
                if httpx.get(address, timeout=2).is_success:
                    return
            if time.monotonic() > deadline:
                raise self._failed("api", None)

    def _revive(self, out: Output) -> None:
        """Start what died, after a pause that doubles with each early death."""
        for child in self.children:
            if child.process is not None and (status := child.process.poll()) is not None:
                lived = time.monotonic() - child.started
                child.process = None
                child.deaths = 1 if lived > STEADY_S else child.deaths + 1
                pause = 0.0 if lived > STEADY_S else min(MAX_PAUSE_S, 0.5 * 2**child.deaths)
                child.again_at = time.monotonic() + pause
                out.say(f"{child.name} ended with status {status}; it starts again in {pause:.0f} s. Its log: "
                        f"{self.folder / 'logs' / child.name}.log")  # fmt: skip
            if child.process is None and time.monotonic() >= child.again_at:
                self._start(child)

    def _end(self) -> None:
        """Ask the children to stop, the worker first and the API last; insist after a while."""
        for child in reversed(self.children):
            if child.process is None or child.process.poll() is not None:
                continue
            child.process.send_signal(signal.SIGTERM)
            try:
                child.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                # Its own group too: a worker's job is a process of its own, and goes on from its checkpoint.
                with suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
        (self.folder / "up.json").unlink(missing_ok=True)

    def _log(self, name: str) -> IO[bytes]:
        (self.folder / "logs").mkdir(exist_ok=True)
        return (self.folder / "logs" / f"{name}.log").open("ab")

    def _failed(self, name: str, status: int | None) -> LoractlError:
        log = self.folder / "logs" / f"{name}.log"
        tail = log.read_text(errors="replace").strip().split("\n")[-1][-500:] if log.exists() else ""
        how = f"ended with status {status}" if status is not None else f"did not answer within {READY_S:.0f} s"
        return ChildFailed(name=name, how=how, tail=tail, log=str(log))

    def _tell(self, out: Output) -> None:
        token = self.folder / "secrets" / "admin-token"
        document = {
            "url": self.url,
            "dir": str(self.folder),
            "token_file": str(token),
            "pids": {child.name: child.process.pid for child in self.children if child.process is not None},
        }

        def show() -> None:
            click.echo(f"The registry is ready: {self.url}")
            click.echo("Log in from another terminal:")
            click.echo(f'  loractl login {self.url} --token "$(cat {token})"')
            click.echo(f"State and logs lie in {self.folder}. Ctrl-C stops it.")
            sys.stdout.flush()

        out.emit(document, show)
        sys.stdout.flush()


def server_environment(folder: Path, *, make: bool) -> dict[str, str]:
    """What API and daemons of the registry in ``folder`` are told; with ``make`` the folder may be new."""
    if make:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    elif not (folder / "registry.db").exists():
        raise PathUnusable(path=str(folder), reason="no registry lies there, and LORACTL_DATABASE_URL names none")
    return House(folder, "http://127.0.0.1:8080", "127.0.0.1", 8080, 0)._environments()[0]


def make_token() -> str:
    """A token of the form that the registry takes: ``lora_ID_SECRET``."""
    return f"lora_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"


def _secret(file: Path, make: Callable[[], str]) -> str:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        text = make()
        write_secret(file, text + "\n")
        return text


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, for this process only."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "up.lock").open("w")
    except OSError as error:
        raise LocalFailure.of(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            running = folder / "up.json"
            where = json.loads(running.read_text())["url"] if running.is_file() else "it is just starting"
            raise PathUnusable(path=str(folder), reason=f"another loractl up runs on it ({where})") from error
        yield


def _free_port(host: str) -> int:
    with socket.socket() as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port


def _die_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


COMMANDS: dict[str, click.Command] = {"up": up}
