"""A registry as its own processes, as an operator runs it: uvicorn, daemons, and real servers from wheels behind them.

What a benchmark measures is started here and nowhere else: the programs, the memory that each of them gains, and
work in a process of its own (`apart`), so that a client's memory and interpreter are not the benchmark's.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import httpx

from registry.db.engine import Database
from registry.db.migrate import upgrade
from registry.services.tokens import make_text
from tests import servers

ROOT = Path(__file__).resolve().parent.parent
API = "registry.api.app:create_app"
Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Registry:
    """Where a running registry is, and the processes that it is made of."""

    url: str
    token: str
    api: int
    """The one that was started: of several the one that keeps the others (`family`)."""
    daemons: int | None


@contextmanager
def fleet(
    folder: Path, database: str, storage: servers.S3Server, *, app: str = API, daemons: bool = True, processes: int = 1
) -> Iterator[Registry]:
    """API (so many ``processes`` behind one port) and daemons on PostgreSQL and S3."""
    where = {
        "MODE": "fleet",
        "S3_BUCKET": storage.bucket,
        "S3_ENDPOINT": storage.endpoint,
        "S3_ACCESS_KEY": storage.access_key,
        "S3_SECRET_KEY": storage.secret_key,
        "S3_REGION": storage.region,
    }
    with _registry(folder, database, where, app, daemons, processes) as found:
        yield found


@contextmanager
def embedded(folder: Path) -> Iterator[Registry]:
    """API and daemons on SQLite and a folder, as ``loractl up`` starts them."""
    data = folder / "data"
    data.mkdir(parents=True)
    where = {"MODE": "embedded", "DATA": str(data)}
    with _registry(folder, f"sqlite:///{data / 'registry.db'}", where, API, daemons=True) as found:
        yield found


@contextmanager
def _registry(
    folder: Path, database: str, where: dict[str, str], app: str, daemons: bool, processes: int = 1
) -> Iterator[Registry]:
    made = Database(database)
    upgrade(made)
    made.close()
    [port] = servers.free_ports(1)
    url, token = f"http://127.0.0.1:{port}", make_text()
    settings = where | {
        "DATABASE_URL": database,
        "BROKER_URL": "memory://",
        "PUBLIC_URL": url,
        "SIGNING_KEY": "a key of benchmarks",
        "BOOTSTRAP_TOKEN": token,
        "LOG_LEVEL": "warning",
        "RATE": "0",  # one token asks for all
    }
    python = ["/usr/bin/env", *(f"LORACTL_{name}={value}" for name, value in settings.items())]
    python += [f"PYTHONPATH={ROOT}", sys.executable, "-m"]
    serve = ["uvicorn", "--factory", app, "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    serve += ["--workers", str(processes)]
    with started("api", [*python, *serve], folder) as api:
        api.wait_until(lambda: answers(f"{url}/health"))
        if not daemons:
            yield Registry(url, token, api.process.pid, None)
            return
        with started("daemons", [*python, "registry.daemons.run"], folder) as others:
            yield Registry(url, token, api.process.pid, others.process.pid)


@contextmanager
def started(name: str, command: list[str], folder: Path) -> Iterator[servers.Running]:
    """A program with a folder of its own."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    with servers.running(name, command, folder / name) as found:
        yield found


def answers(url: str) -> bool:
    """Whether a GET of ``url`` succeeds."""
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


START: Literal["spawn", "forkserver"] = "spawn"
"""How `apart` gets its interpreter. Tests, to which no figure matters, take one that has imported already."""


def apart(work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """``work(*args)`` in a fresh interpreter (see `START`)."""
    with ProcessPoolExecutor(1, mp_context=get_context(START)) as pool:
        return pool.submit(work, *args, **kwargs).result()


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process held when it was at rest, to compare its peak with."""

    pid: int
    at_rest: int

    @classmethod
    def of(cls, pid: int) -> "Memory":
        """From now on, the peak is counted anew."""
        (Path("/proc") / str(pid) / "clear_refs").write_text("5")
        return cls(pid, resident(pid))

    def growth(self) -> float:
        """MB that the process held at most since, beyond what it held before."""
        return (peak(self.pid) - self.at_rest) / 1e6


def family(pid: int) -> list[int]:
    """A process and those that it started."""
    tasks = (Path("/proc") / str(pid) / "task").iterdir()
    return [pid, *(int(child) for task in tasks for child in (task / "children").read_text().split())]


def resident(pid: int | None = None) -> int:
    """Bytes that a process (this one by default) holds now."""
    return _status(pid, "VmRSS")


def peak(pid: int | None = None) -> int:
    """Bytes that a process (this one by default) held at most."""
    return _status(pid, "VmHWM")


def _status(pid: int | None, field: str) -> int:
    lines = (Path("/proc") / str(pid or os.getpid()) / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
