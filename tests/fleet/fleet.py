"""A fleet on loopback: the commands and the environment of docker-compose.yml, as processes, on real servers.

Only what a network of containers would resolve is put in: hosts, ports and the folder of a cache. A `Link` stands
where an operator's load balancer would, before all API processes, and counts what passes.
"""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg

from registry.services.tokens import make_text
from tests import servers
from tests.fleet.compose import BIN, REQUIRED, composed, redis_server
from tests.link import Link

PATIENCE_S = 90.0


@dataclass
class Fleet:
    """What runs, and the verbs of the story."""

    folder: Path
    values: dict[str, str]
    postgres: servers.Cluster
    front: Link
    ports: Mapping[str, int]
    places: Mapping[str, str]
    """What the file names -> where it is."""
    lives: dict[str, tuple[servers.Running, ExitStack]] = field(default_factory=dict)

    @property
    def file(self) -> dict[str, Any]:
        """docker-compose.yml with this fleet's values."""
        return composed(self.values)

    @property
    def url(self) -> str:
        """Where people and workers reach the API."""
        return self.values["LORACTL_PUBLIC_URL"]

    # ── processes ────────────────────────────────────────────────────────────

    def start(self, service: str, name: str, port: int | None = None) -> servers.Running:
        """The command of a service with its environment, as the process ``name``."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        found = self.file["services"][service]
        command = list(found["command"])
        for option, value in (("--host", "127.0.0.1"), ("--port", str(port))):
            if option in command:
                command[command.index(option) + 1] = value
        environment = {key: self._placed(str(value), home) for key, value in found["environment"].items()}
        path = f"{BIN}:{os.environ['PATH']}"  # docker gives a container its name as HOSTNAME
        env = {"PATH": path, "HOME": str(home), "HOSTNAME": name, "LANG": "C.UTF-8", **environment}
        stack = ExitStack()
        process = stack.enter_context(servers.running(name, [str(BIN / command[0]), *command[1:]], home, env=env))
        self.lives[name] = process, stack
        return process

    def _placed(self, text: str, home: Path) -> str:
        for written, real in self.places.items():
            text = text.replace(written, real)
        return text.replace("/var/cache/loractl", str(home / "cache"))

    def stop(self, name: str) -> None:
        """End a process as docker does: SIGTERM, and SIGKILL after a while."""
        self.lives.pop(name)[1].close()

    def start_postgres(self) -> None:
        stack = ExitStack()
        self.lives["postgres"] = stack.enter_context(self.postgres.running()), stack

    def start_redis(self) -> None:
        """An empty one: it keeps nothing."""
        folder = self.folder / "redis"
        folder.mkdir(exist_ok=True)
        stack = ExitStack()
        self.lives["redis"] = stack.enter_context(redis_server(self.file, self.ports["redis"], folder)), stack

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text(errors="replace")

    # ── what people and programs do ──────────────────────────────────────────

    def loractl(self, *words: object, code: int = 0) -> Any:
        """A command line with ``--json``; its document."""
        home = self.folder / "person"
        env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")}
        line = [str(BIN / "loractl"), *map(str, words), "--json"]
        ended = subprocess.run(line, env=env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == code, f"{words} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
        return json.loads(ended.stdout)

    def healths(self) -> list[int]:
        """What each API process answers to its health check."""
        return [
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code
            for name, port in self.ports.items()
            if name.startswith("api")
        ]

    def until(self, done: Callable[[], Any], what: str) -> Any:
        """What ``done()`` gives once that is something."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := done()):
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
            time.sleep(0.25)
        return found

    def get(self, path: str) -> dict[str, Any]:
        """What the API answers the administrator."""
        token = self.values["LORACTL_BOOTSTRAP_TOKEN"]
        answer = httpx.get(self.url + path, headers={"authorization": f"Bearer {token}"}, timeout=30)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found


@contextmanager
def fleet(folder: Path, store: servers.S3Server, **more: str) -> Iterator[Fleet]:
    """PostgreSQL, Redis and the store with a bucket of its own; no process of ours yet. ``more``: lines of .env."""
    with ExitStack() as stack:
        names = ["front", "redis", "api-1", "api-2"]
        ports = dict(zip(names, servers.free_ports(len(names)), strict=True))
        cluster = stack.enter_context(servers.postgres_cluster())
        user, _, address = cluster.host.partition("@")
        values = {name: secrets.token_hex(24) for name in REQUIRED} | {
            "LORACTL_PUBLIC_URL": f"http://127.0.0.1:{ports['front']}",
            # One server by two names: what is signed must bear the public one.
            "LORACTL_S3_ENDPOINT": store.endpoint.replace("127.0.0.1", "localhost"),
            "LORACTL_S3_PUBLIC_ENDPOINT": store.endpoint,
            "LORACTL_S3_ACCESS_KEY": store.access_key,
            "LORACTL_S3_SECRET_KEY": store.secret_key,
            "LORACTL_S3_BUCKET": f"fleet-{secrets.token_hex(4)}",
            "LORACTL_BOOTSTRAP_TOKEN": make_text(),
            "LORACTL_BOOTSTRAP_WORKER_TOKEN": make_text(),
            "POSTGRES_PASSWORD": user.partition(":")[2],
        }
        places = {"@postgres:5432": f"@{address}", "@redis:6379": f"@127.0.0.1:{ports['redis']}"}
        front = stack.enter_context(Link(ports["front"], [ports["api-1"], ports["api-2"]]))
        found = Fleet(folder, values | more, cluster, front, ports, places)
        found.start_redis()
        found.start_postgres()
        try:
            with psycopg.connect(f"postgresql://{cluster.host}/postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE loractl")
            client = boto3.client(
                "s3",
                endpoint_url=store.endpoint,
                aws_access_key_id=store.access_key,
                aws_secret_access_key=store.secret_key,
                region_name=store.region,
            )
            client.create_bucket(Bucket=found.values["LORACTL_S3_BUCKET"])
            yield found
        finally:
            for name in [*found.lives][::-1]:
                found.stop(name)
