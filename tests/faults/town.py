"""A whole registry of real processes that can be hurt: two APIs, two sets of daemons, a database, a store, a broker.

Four towns: SQLite or PostgreSQL, a folder or an S3 server. People reach the API, and the store where it is S3, over a
`Link`. Whatever was killed is started anew by `heal`, on the same ports and the same data.
"""

import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx

from registry.client import RegistryClient
from registry.daemons import gc
from registry.parts import Parts
from registry.services.tokens import make_text
from registry.settings import Settings
from registry.transfer import push_base
from tests import servers
from tests.factories import tiny_base
from tests.faults import people
from tests.faults.people import Place
from tests.link import Link

LEASE_S = 3
PUSH_TTL_S = 20
PART = 5 << 20
"""The smallest that S3 takes."""
SETUPS = ("sqlite+folder", "sqlite+s3", "postgres+folder", "postgres+s3")
Life = tuple[servers.Running, ExitStack]


def collect(place: Place, settings: Settings) -> None:
    """Garbage collection without a pause."""
    parts = Parts.of(settings)
    while not place.closed.exists():
        with suppress(Exception):  # what is down is healed, or told by the daemons
            gc.step(parts)
        time.sleep(0.2)


@dataclass
class Town:
    """What runs in it, and how to hurt and to heal it."""

    setup: str
    settings: Settings
    place: Place
    link: Link
    store_link: Link | None
    environment: dict[str, str]
    ports: dict[str, int]
    starters: dict[str, Callable[[], Life]] = field(default_factory=dict)
    lives: dict[str, Life] = field(default_factory=dict)
    crowd: list[ForkServerProcess] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)

    @property
    def own(self) -> list[str]:
        """Our own processes."""
        return [name for name in self.starters if name.startswith(("api", "daemons"))]

    # ── hurting ──────────────────────────────────────────────────────────────

    def kill(self, name: str) -> None:
        """SIGKILL to a process and all of its group."""
        process = self.lives[name][0].process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.lives.pop(name)[1].close()

    def freeze(self, pid: int) -> None:
        """Let a process stand still, as a machine without time does."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self.frozen.append(pid)

    # ── healing ──────────────────────────────────────────────────────────────

    def heal(self) -> None:
        """Everything runs, and every wire is straight."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        for link in (self.link, self.store_link):
            if link is not None and link.mode != "straight":
                link.become("straight")
        for name, start in self.starters.items():
            if name not in self.lives:
                self.lives[name] = start()
        self.is_served()

    def is_served(self) -> float:
        """Seconds until every API process answers that it is well."""
        began = time.monotonic()
        for name in self.own:
            if name.startswith("api"):
                process = self.lives[name][0]
                process.wait_until(lambda port=self.ports[name]: _is_well(port))  # type: ignore[misc]
        return time.monotonic() - began

    def program(self, name: str, *command: str) -> Life:
        """A process of ours, in a folder of its own."""
        home = self.place.folder / "processes" / name
        home.mkdir(parents=True, exist_ok=True)
        stack = ExitStack()
        line = [sys.executable, "-m", *command]
        return stack.enter_context(servers.running(name, line, home, env=self.environment)), stack

    # ── people ───────────────────────────────────────────────────────────────

    def comes(self, who: Callable[..., None], *arguments: object) -> None:
        """Somebody begins to use the registry, and goes on until `leave`."""
        self.place.closed.unlink(missing_ok=True)
        name = f"{who.__name__} {arguments[0]}"
        person = FORKS.Process(target=who, args=(self.place, *arguments), name=name, daemon=True)
        person.start()
        self.crowd.append(person)

    def gather(self, seed: int) -> None:
        """Everybody does."""
        for who, name in (
            (people.author, "anna"), (people.author, "ben"), (people.reader, "cleo"), (people.mover, "dan"),
            (people.mover, "eva"), (people.planner, "finn"), (people.worker, "gus"), (people.worker, "hana"),
        ):  # fmt: skip
            self.comes(who, name, seed)
        self.comes(collect, self.settings)
        self.comes(collect, self.settings)

    def leave(self) -> None:
        """Everybody goes home."""
        self.place.closed.touch()
        for person in self.crowd:
            person.join(90)
            if person.is_alive():
                raise servers.ServerDown(f"{person.name} did not come to an end")
        self.crowd.clear()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.town"])


def _is_well(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def town(setup: str, folder: Path) -> Iterator[Town]:
    """A town with a base model in it, and nobody yet."""
    database, _, store = setup.partition("+")
    with ExitStack() as stack:
        for name in ("journals", "homes", "data"):
            (folder / name).mkdir(parents=True)
        ports = dict(zip(("link", "store-link", "api-1", "api-2", "valkey"), servers.free_ports(5), strict=True))
        starters: dict[str, Callable[[], Life]] = {}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORACTL_")},
            "LORACTL_MODE": "embedded",
            "LORACTL_DATABASE_URL": f"sqlite:///{folder / 'data' / 'registry.db'}",
            "LORACTL_BROKER_URL": f"sqla+sqlite:///{folder / 'data' / 'broker.db'}",
            "LORACTL_DATA": str(folder / "data"),
            "LORACTL_PUBLIC_URL": f"http://127.0.0.1:{ports['link']}",
            "LORACTL_SIGNING_KEY": secrets.token_urlsafe(48),
            "LORACTL_BOOTSTRAP_TOKEN": make_text(),
            "LORACTL_BOOTSTRAP_WORKER_TOKEN": make_text(),
            "LORACTL_LEASE_S": str(LEASE_S),
            "LORACTL_PUSH_TTL_S": str(PUSH_TTL_S),
            "LORACTL_PART_SIZE": str(PART),
            "LORACTL_MULTIPART_FROM": str(PART + 1),
        }
        if database == "postgres":
            cluster = stack.enter_context(servers.postgres_cluster())
            environment["LORACTL_DATABASE_URL"] = cluster.url
            environment["LORACTL_BROKER_URL"] = f"redis://127.0.0.1:{ports['valkey']}/0"
            starters |= {"database": lambda: _entered(cluster.running()), "broker": lambda: _valkey(folder, ports)}
        store_link = None
        if store == "s3":
            weed = stack.enter_context(servers.weed())
            server = weed.server
            port = int(server.endpoint.rpartition(":")[2])
            store_link = stack.enter_context(Link(ports["store-link"], [port]))
            environment |= {
                "LORACTL_S3_BUCKET": server.bucket,
                "LORACTL_S3_ENDPOINT": server.endpoint,
                "LORACTL_S3_PUBLIC_ENDPOINT": f"http://127.0.0.1:{ports['store-link']}",
                "LORACTL_S3_ACCESS_KEY": server.access_key,
                "LORACTL_S3_SECRET_KEY": server.secret_key,
                "LORACTL_S3_REGION": server.region,
            }
            starters["store"] = lambda: _entered(weed.running())
        settings = Settings.from_environment(environment)
        link = stack.enter_context(Link(ports["link"], [ports["api-1"], ports["api-2"]]))
        base = tiny_base(folder / "base", 1)
        place = Place(
            environment["LORACTL_PUBLIC_URL"], environment["LORACTL_BOOTSTRAP_TOKEN"],
            environment["LORACTL_BOOTSTRAP_WORKER_TOKEN"], folder, base,
        )  # fmt: skip
        found = Town(setup, settings, place, link, store_link, environment, ports, starters)
        try:
            for name, start in starters.items():
                found.lives[name] = start()
            found.comes(people.reader, "zoe", 0)
            found.leave()  # the first one of all loads what all need
            migrate, ended = found.program("migrate", "registry.db.migrate")
            if migrate.process.wait(60):
                raise servers.ServerDown(migrate.log_tail())
            ended.close()
            for number in (1, 2):
                api = ("uvicorn", "--factory", "registry.api.app:create_app", "--host", "127.0.0.1", "--no-access-log")
                at = ("--port", str(ports[f"api-{number}"]))
                starters[f"api-{number}"] = _started(found, f"api-{number}", *api, *at)
                starters[f"daemons-{number}"] = _started(found, f"daemons-{number}", "registry.daemons.run")
            found.heal()
            with RegistryClient(place.url, place.token) as client:
                push_base(client, base)
            yield found
        finally:
            for person in found.crowd:
                person.kill()
            for name in [*found.lives][::-1]:
                found.lives.pop(name)[1].close()


def _started(found: Town, name: str, *command: str) -> Callable[[], Life]:
    return lambda: found.program(name, *command)


def _entered(context: "contextmanager[servers.Running]") -> Life:  # type: ignore[valid-type]
    stack = ExitStack()
    return stack.enter_context(context), stack


def _valkey(folder: Path, ports: dict[str, int]) -> Life:
    """One that keeps nothing."""
    home = folder / "valkey"
    home.mkdir(exist_ok=True)
    stack = ExitStack()
    command = [str(servers.valkey_program()), "--bind", "127.0.0.1", "--port", str(ports["valkey"]), "--save", ""]
    return stack.enter_context(servers.running("Valkey", command, home)), stack
