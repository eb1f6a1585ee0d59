"""Servers and stores for every room: started when a test first asks, once a process (so once an xdist worker)."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from registry.db.engine import Database
from registry.db.migrate import upgrade
from registry.settings import S3Settings
from registry.storage.base import BlobStore
from registry.storage.local import LocalStore
from registry.storage.s3 import S3Store
from tests import servers
from tests.world import World


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session")
def seaweed() -> Iterator[servers.S3Server]:
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def s3_settings(seaweed: servers.S3Server) -> S3Settings:
    return S3Settings(
        bucket=seaweed.bucket,
        endpoint=seaweed.endpoint,
        public_endpoint=seaweed.endpoint,
        region=seaweed.region,
        access_key=seaweed.access_key,
        secret_key=seaweed.secret_key,
    )


@pytest.fixture(scope="session")
def s3_store(s3_settings: S3Settings) -> S3Store:
    return S3Store(s3_settings)


@pytest.fixture(scope="session")
def local_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    with servers.local_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> BlobStore:
    """Every store, each with a real server behind it."""
    found: BlobStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file that the migrations built, to be copied."""
    path = tmp_path_factory.mktemp("database") / "template.db"
    migrated(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """The URL of a database that the migrations built, to be copied."""
    url = make_url(postgres_url).set(database="template_loractl")
    with psycopg.connect(_plain(postgres_url), autocommit=True) as connection:
        connection.execute("CREATE DATABASE template_loractl")
    migrated(url.render_as_string(hide_password=False))
    return postgres_url


def migrated(url: str) -> None:
    made = Database(url)
    upgrade(made)
    made.close()


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    path = tmp_path / "registry.db"
    shutil.copyfile(sqlite_template, path)
    made = Database(f"sqlite:///{path}")
    yield made
    made.close()


@pytest.fixture
def postgres_database(postgres_template: str) -> Iterator[Database]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(_plain(postgres_template), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template_loractl".encode())
        made = Database(make_url(postgres_template).set(database=name).render_as_string(hide_password=False))
        yield made
        made.close()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """Every database, empty, its schema built by the migrations."""
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found


@pytest.fixture
def embedded(sqlite_database: Database, local_store: LocalStore) -> World:
    """A registry on SQLite and a folder, for what does not depend on either."""
    return World(sqlite_database, local_store)


@pytest.fixture(params=["embedded", "fleet"])
def world(request: pytest.FixtureRequest) -> World:
    """A registry in this process: SQLite and a folder, or PostgreSQL and S3."""
    database, store = {"embedded": ("sqlite", "local"), "fleet": ("postgres", "s3")}[request.param]
    return World(request.getfixturevalue(f"{database}_database"), request.getfixturevalue(f"{store}_store"))


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


@pytest.fixture
def push() -> str:
    """The id of a push that nobody else has, for keys of a test's own."""
    return secrets.token_hex(8)
