"""Servers and stores for every room: started when a test first asks, once a process (so once an xdist worker)."""

import secrets
from collections.abc import Iterator

import httpx
import pytest

from registry.settings import S3Settings
from registry.storage.base import BlobStore
from registry.storage.local import LocalStore
from registry.storage.s3 import S3Store
from tests import servers


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
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


@pytest.fixture
def push() -> str:
    """The id of a push that nobody else has, for keys of a test's own."""
    return secrets.token_hex(8)
