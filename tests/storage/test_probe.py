"""The probe tells a store that keeps the contract from one that only seems to."""

import time
from dataclasses import fields, replace
from pathlib import Path

import httpx
import pytest

from registry.core.digest import Digest
from registry.core.errors import StorageDown
from registry.storage.base import BlobStore
from registry.storage.local import Grant, Landing, LocalStore
from registry.storage.probe import Capabilities, probe
from tests import servers

WELL = Capabilities(
    signed_urls=True,
    put_checksums=True,
    part_checksums=True,
    signed_headers=True,
    conditional_writes=True,
    ranges=True,
    multipart=True,
    clock_skew_s=0,
)


def test_both_stores_keep_the_contract_and_nothing_of_the_probe(store: BlobStore, http: httpx.Client) -> None:
    found = probe(store, http)
    assert replace(found, clock_skew_s=0) == WELL
    assert found.findings() == []
    assert [stat.key for stat in store.walk("staging/") if "probe" in stat.key] == []


def test_a_clock_that_is_off_is_found(local_store: LocalStore, http: httpx.Client) -> None:
    found = probe(local_store, http, clock=lambda: time.time() - 3600)
    assert found.clock_skew_s == pytest.approx(3600, abs=5)
    [said] = found.findings()
    assert "clock" in said


class Unseeing:
    """A hash that has not looked, and says what is hoped for."""

    def __init__(self, hoped_for: Digest) -> None:
        self.hoped_for = hoped_for

    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> str:
        return self.hoped_for.hex


class Gullible(LocalStore):
    """A store that takes any bytes of the right length, as one does that ignores checksums."""

    def receive(self, grant: Grant) -> Landing:
        landing = super().receive(grant)
        assert grant.sha256 is not None
        landing._hash = Unseeing(grant.sha256)  # type: ignore[assignment]
        return landing


def test_a_store_that_ignores_checksums_is_found_out(tmp_path: Path, http: httpx.Client) -> None:
    with servers.local_store(tmp_path, Gullible) as store:
        found = probe(store, http)
    assert found == replace(WELL, put_checksums=False, part_checksums=False, clock_skew_s=found.clock_skew_s)
    assert len(found.findings()) == 2


def test_urls_that_nobody_serves_are_storage_down(tmp_path: Path, http: httpx.Client) -> None:
    [port] = servers.free_ports(1)
    with pytest.raises(StorageDown):
        probe(LocalStore(tmp_path, f"http://127.0.0.1:{port}", b"x"), http)


def test_urls_that_the_server_refuses_are_found(tmp_path: Path, http: httpx.Client) -> None:
    with servers.local_store(tmp_path) as store:
        stranger = LocalStore(tmp_path, store.url, b"another secret")
        found = probe(stranger, http)
    assert not found.signed_urls
    assert not found.multipart
    assert found.findings()


@pytest.mark.parametrize("name", [field.name for field in fields(Capabilities) if field.name != "clock_skew_s"])
def test_everything_that_is_missing_has_its_sentence(name: str) -> None:
    assert len(replace(WELL, **{name: False}).findings()) == 1
