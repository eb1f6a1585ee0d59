"""A whole registry of real processes that can be hurt: two APIs, two sets of daemons, a database, a store, a broker.

Four towns: SQLite or PostgreSQL, a folder or an S3 server; each also with a workshop (``+work``): real Celery workers
that train, evaluate and upgrade what is tiny; the largest also with each API, the store and each worker on a host of
its own (``+hosts``). People and workers reach the API, and the store where it is S3, over a
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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
import psutil

from registry.client import RegistryClient
from registry.core.policy import Gate, Margin, Policy
from registry.daemons import gc
from registry.parts import Parts
from registry.schemas import JobRequest, Output, Wishes
from registry.services import collection
from registry.services.tokens import make_text
from registry.settings import Settings
from registry.transfer import push_base, push_dataset
from tests import servers
from tests.factories import letters, readable_base, tiny_base
from tests.faults import machines, people
from tests.faults.people import Place
from tests.link import Link

LEASE_S, WORKSHOP_LEASE_S = 3, 8
"""A worker on a machine that has much to do must be able to keep its lease."""
PUSH_TTL_S = 20
UNNAMED = timedelta(seconds=1)
PART = 5 << 20
"""The smallest that S3 takes."""
PLAIN = ("sqlite+folder", "sqlite+s3", "postgres+folder", "postgres+s3")
SETUPS = (*PLAIN, *(f"{setup}+work" for setup in PLAIN), "postgres+s3+hosts", "postgres+s3+work+hosts")
PATIENCE_S = 180.0
"""How long a town may take to be well again, on a machine that has much else to do."""
WORKERS = ("worker-1", "worker-2")
Life = tuple[servers.Running, ExitStack]
Moment = tuple[str, float]


def collect(place: Place, settings: Settings) -> None:
    """Garbage collection without a pause, and of what nothing has named for a moment."""
    parts = Parts.of(settings)
    while not place.closed.exists():
        with suppress(Exception):  # what is down is healed, or told by the daemons
            gc.step(parts)
            collection.collect(parts.database, parts.store, parts.clock(), UNNAMED)
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
    hosts: dict[str, machines.Host]
    """Of their own, by the name of who is there; nothing where all share one machine."""
    starters: dict[str, Callable[[], Life]]
    otherwise: dict[str, dict[str, str]]
    """Processes that run in another environment until all is healed, and what is other in it."""
    lives: dict[str, Life] = field(default_factory=dict)
    crowd: list[ForkServerProcess] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    disks: dict[str, machines.Disk] = field(default_factory=dict)
    """Of clients, store and database, where they can be had."""
    deaths: list[Moment] = field(default_factory=list)
    births: list[Moment] = field(default_factory=list)
    """When processes of ours were killed and started, by name and Unix time, since `recovery` looked last."""
    fallen: list[str] = field(default_factory=list)
    """What was seen of our own processes that ended by themselves."""

    @property
    def own(self) -> list[str]:
        """Our own processes."""
        return [name for name in self.starters if name.startswith(("api", "daemons", "worker"))]

    @property
    def works(self) -> bool:
        """Whether there is a workshop."""
        return "work" in self.setup.split("+")

    def at(self, name: str) -> str:
        """The address of where a process is."""
        return self.hosts[name].address if name in self.hosts else "127.0.0.1"

    # ── hurting ──────────────────────────────────────────────────────────────

    def kill(self, name: str) -> None:
        """SIGKILL to a process and all of its group."""
        process = self.lives[name][0].process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.deaths.append((name, time.time()))
        self.lives.pop(name)[1].close()

    def stop(self, name: str) -> None:
        """SIGTERM, and SIGKILL after ten seconds."""
        self.deaths.append((name, time.time()))
        self.lives.pop(name)[1].close()

    def children(self) -> list[psutil.Process]:
        """Processes in which workers compute."""
        found = []
        for name in WORKERS:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(self.lives[name][0].process.pid).children(recursive=True)
                found += [child for child in family if "workers.run" in child.cmdline()]
        return found

    def freeze(self, pid: int) -> None:
        """Let a process stand still, as a machine without time does."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self.frozen.append(pid)

    def replace(self, name: str, changes: dict[str, str]) -> None:
        """Kill a process; the one in its place lives in a changed environment until all is healed."""
        self.kill(name)
        self.otherwise[name] = changes

    # ── healing ──────────────────────────────────────────────────────────────

    def heal(self) -> list[float]:
        """Everything runs, and every wire is straight; the seconds after which each new API process served."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen.clear()
        for link in (self.link, self.store_link):
            if link is not None and link.mode != "straight":
                link.become("straight")
        for host in self.hosts.values():
            host.heal()
        for disk in self.disks.values():
            disk.empty()
        for name in [*self.otherwise]:
            del self.otherwise[name]
            if name in self.lives:
                self.kill(name)
        for name, (life, _) in [*self.lives.items()]:
            if life.process.poll() is not None:  # servers may end where a disk is full, ours may not
                if name in self.own:
                    self.fallen.append(f"{name} ended with {life.process.returncode}: {life.log_tail(1000)}")
                self.kill(name)
        return self.serve()

    def serve(self) -> list[float]:
        """Everything runs; the seconds after which each API process that had to be started served."""
        born = self.start()
        return [s for name in self.own if name.startswith("api") for s in self._served(name, born.get(name))]

    def start(self) -> dict[str, float]:
        """Start what does not live, without waiting for what is ours; when each began."""
        born = {}
        for name, start in self.starters.items():
            if name not in self.lives:
                born[name] = time.monotonic()
                self.births.append((name, time.time()))
                self.lives[name] = start()
        return born

    def _served(self, api: str, born: float | None) -> Iterator[float]:
        self.lives[api][0].wait_until(lambda: _is_well(self.at(api), self.ports[api]), PATIENCE_S)
        if born is not None:
            yield time.monotonic() - born

    def program(self, name: str, *command: str) -> Life:
        """A process of ours, in a folder of its own."""
        home = self.place.folder / "processes" / name
        home.mkdir(parents=True, exist_ok=True)
        stack = ExitStack()
        env = self._of_worker(name) if name in WORKERS else self.environment
        place = self.hosts.get(name.replace("daemons", "api"))
        line = [*(place.through if place else ()), sys.executable, "-m", *command]
        env = env | self.otherwise.get(name, {})
        return stack.enter_context(servers.running(name, line, home, env=env)), stack

    def _of_worker(self, name: str) -> dict[str, str]:
        kept = {key: value for key, value in self.environment.items() if not key.startswith("LORACTL_")}
        return kept | {
            "LORACTL_URL": self.place.url, "LORACTL_TOKEN": self.place.worker_token, "LORACTL_WORKER_NAME": name,
            "LORACTL_BROKER_URL": self.settings.broker_url, "LORACTL_CHECKPOINT_S": "1", "LORACTL_GRACE_S": "1",
            "LORACTL_CACHE_DIR": str(self.place.folder / "workshop" / name),
        }  # fmt: skip

    # ── people ───────────────────────────────────────────────────────────────

    def comes(self, who: Callable[..., None], *arguments: object) -> None:
        """Somebody begins to use the registry, and goes on until `leave`."""
        self.place.closed.unlink(missing_ok=True)
        name = f"{who.__name__} {arguments[0]}"
        person = FORKS.Process(target=who, args=(self.place, *arguments), name=name, daemon=True)
        person.start()
        self.crowd.append(person)

    def gather(self, seed: int, data: float = 0.25) -> None:
        """Everybody does; a share of what authors push is ``data``."""
        for name in ("anna", "ben"):
            self.comes(people.author, name, seed, data)
        for who, name in (
            (people.reader, "cleo"), (people.mover, "dan"), (people.mover, "eva"), (people.planner, "finn"),
            (people.worker, "gus"), (people.worker, "hana"), (people.remover, "lou"), (people.remover, "mia"),
        ):  # fmt: skip
            self.comes(who, name, seed)
        self.comes(collect, self.settings)
        self.comes(collect, self.settings)
        if self.works:
            self.comes(people.trainer, "jo", seed)
            self.comes(people.upgrader, "kay", seed)

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


def _is_well(host: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{host}:{port}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def town(setup: str, folder: Path, *, disks_end: bool = True) -> Iterator[Town]:
    """A town with a base model in it, and nobody yet; ``disks_end``: with small disks of its own, which can be full."""
    database, store, *more = setup.split("+")
    with ExitStack() as stack:
        for name in ("journals", "homes", "data"):
            (folder / name).mkdir(parents=True)
        names = ("link", "store-link", "database-link", "broker-link", "api-1", "api-2", "valkey")
        ports = dict(zip(names, servers.free_ports(len(names)), strict=True))
        who = ("api-1", "api-2", "store", *(WORKERS if "work" in more else ()))
        hosts = stack.enter_context(machines.hosts(who)) if "hosts" in more else {}
        hub = machines.HUB if hosts else "127.0.0.1"
        starters: dict[str, Callable[[], Life]] = {}
        otherwise: dict[str, dict[str, str]] = {}
        disks = {"clients": folder / "homes", "database": folder / "data", "store": folder / "data" / "store"}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORACTL_")},
            "LORACTL_MODE": "embedded",
            "LORACTL_DATABASE_URL": f"sqlite:///{folder / 'data' / 'registry.db'}",
            "LORACTL_BROKER_URL": f"sqla+sqlite:///{folder / 'data' / 'broker.db'}",
            "LORACTL_DATA": str(folder / "data"),
            "LORACTL_PUBLIC_URL": f"http://{hub}:{ports['link']}",
            "LORACTL_SIGNING_KEY": secrets.token_urlsafe(48),
            "LORACTL_BOOTSTRAP_TOKEN": make_text(),
            "LORACTL_BOOTSTRAP_WORKER_TOKEN": make_text(),
            "LORACTL_LEASE_S": str(WORKSHOP_LEASE_S if "work" in more else LEASE_S),
            "LORACTL_PUSH_TTL_S": str(PUSH_TTL_S),
            "LORACTL_PART_SIZE": str(PART),
            "LORACTL_MULTIPART_FROM": str(PART + 1),
        }
        if database == "postgres":
            cluster = stack.enter_context(servers.postgres_cluster())
            reached = {"database": cluster.host, "broker": f"127.0.0.1:{ports['valkey']}"}
            if hosts:  # whose loopback interface is another
                for name, address in [*reached.items()]:
                    before, _, port = address.rpartition(":")
                    stack.enter_context(Link(ports[f"{name}-link"], [int(port)], hub))
                    reached[name] = f"{before.replace('127.0.0.1', hub)}:{ports[f'{name}-link']}"
            environment["LORACTL_DATABASE_URL"] = replace(cluster, host=reached["database"]).url
            environment["LORACTL_BROKER_URL"] = f"redis://{reached['broker']}/0"
            disks["database"] = cluster.folder / "data"
            starters |= {
                "database": lambda: _entered(cluster.running(otherwise.get("database"))),
                "broker": lambda: _valkey(folder, ports),
            }
        store_link = None
        if store == "s3":
            host = hosts.get("store")
            weed = stack.enter_context(servers.weed(host.address, host.through) if host else servers.weed())
            server = weed.server
            disks["store"] = weed.folder / "data"
            at = httpx.URL(server.endpoint)
            store_link = stack.enter_context(Link(ports["store-link"], [(at.host, at.port or 80)], hub))
            environment |= {
                "LORACTL_S3_BUCKET": server.bucket,
                "LORACTL_S3_ENDPOINT": server.endpoint,
                "LORACTL_S3_PUBLIC_ENDPOINT": f"http://{hub}:{ports['store-link']}",
                "LORACTL_S3_ACCESS_KEY": server.access_key,
                "LORACTL_S3_SECRET_KEY": server.secret_key,
                "LORACTL_S3_REGION": server.region,
            }
            starters["store"] = lambda: _entered(weed.running())
        settings = Settings.from_environment(environment)
        apis = [(hosts[name].address if hosts else hub, ports[name]) for name in ("api-1", "api-2")]
        link = stack.enter_context(Link(ports["link"], apis, hub))
        base = tiny_base(folder / "base", 1)
        place = Place(
            environment["LORACTL_PUBLIC_URL"], environment["LORACTL_BOOTSTRAP_TOKEN"],
            environment["LORACTL_BOOTSTRAP_WORKER_TOKEN"], folder, base,
        )  # fmt: skip
        found = Town(setup, settings, place, link, store_link, environment, ports, hosts, starters, otherwise)
        with suppress(machines.NotHere):
            machines.can_mount()
            found.disks |= {name: stack.enter_context(machines.disk(disks[name])) for name in disks if disks_end}
        try:
            for name, start in starters.items():
                found.lives[name] = start()
            found.comes(people.reader, "zoe", 0)
            found.leave()  # the first one of all loads what all need
            migrate, ended = found.program("migrate", "registry.db.migrate")
            if migrate.process.wait(PATIENCE_S):
                raise servers.ServerDown(migrate.log_tail())
            ended.close()
            for number in (1, 2):
                name = f"api-{number}"
                api = ("uvicorn", "--factory", "registry.api.app:create_app", "--no-access-log")
                starters[name] = _started(found, name, *api, "--host", found.at(name), "--port", str(ports[name]))
                starters[f"daemons-{number}"] = _started(found, f"daemons-{number}", "registry.daemons.run")
            found.heal()
            with RegistryClient(place.url, place.token) as client:
                push_base(client, base)
                if found.works:
                    _open_workshop(found, client)
            yield found
        finally:
            for person in found.crowd:
                person.kill()
            for name in [*found.lives][::-1]:
                found.lives.pop(name)[1].close()


def _open_workshop(found: Town, client: RegistryClient) -> None:
    """A line with a model, data and a suite; two workers; one adapter that serves, trained where nothing goes wrong."""
    folder = found.place.folder / "workshop"
    push_base(client, readable_base(folder / "model"), Wishes(line=people.LINE))
    letters(folder)
    push_dataset(client, "dataset", folder / "data.jsonl", "town/letters")
    push_dataset(client, "suite", folder / "suite.jsonl", "town/letters-test", spec={"metrics": ["accuracy"]})
    for name in WORKERS:
        (folder / name).mkdir()
        found.starters[name] = _started(found, name, "celery", "-A", "workers.app", "worker", "-Q", people.WORKSHOP)
    found.serve()
    output = Output(adapter="town/served", aliases=["prod"])
    job = client.submit(JobRequest(recipe=people.training(0), output=output, queue=people.WORKSHOP))
    for event in client.events(job.id):
        if event.kind == "failed":
            raise servers.ServerDown(f"the first training failed: {event.data}")
    gate = Gate(suite="town/letters-test", metric="accuracy", margin=Margin(value=0.1))
    client.set_policy("town/served", Policy(gates=(gate,), max_negative_flips=0.3, tiers=("carry",)))


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
