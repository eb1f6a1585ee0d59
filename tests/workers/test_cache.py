"""The worker's cache: filled once, kept while used, and within its quota."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry.core.digest import Digest
from registry.core.errors import DigestMismatch
from registry.schemas import Download, SignedRequest
from registry.storage.local import LocalStore
from tests import servers
from workers.cache import Cache

SIZE = 1000


class Shelf:
    """Entries of one file each, behind real signed URLs; counts how often they were asked for."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.asked = store, 0

    def entry(self, number: int, *, wrong: bool = False) -> tuple[str, list[Download]]:
        data = bytes([number]) * SIZE
        digest = Digest.sha256(data)
        key, body = f"blobs/{digest.hex}", b"x" * SIZE if wrong else data
        self.store.put(key, body, Digest.sha256(body))
        get = self.store.presign_get(key, expires_s=60)
        signed = SignedRequest(
            method=get.method, url=get.url, headers=dict(get.headers), expires_at=datetime.now(UTC) + timedelta(hours=1)
        )
        return str(Digest.sha256(b"manifest" + data)), [
            Download(path="data.bin", size=SIZE, digest=str(digest), get=signed)
        ]

    def fill(self, cache: Cache, number: int) -> str:
        manifest, downloads = self.entry(number)
        with cache.use(manifest, lambda: self.counted(downloads)) as folder:
            assert (folder / "data.bin").read_bytes() == bytes([number]) * SIZE
        return manifest

    def counted(self, downloads: list[Download]) -> list[Download]:
        self.asked += 1
        return downloads


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with servers.local_store(tmp_path / "store") as store:
        yield Shelf(store)


def test_an_entry_is_fetched_once_and_known_from_then_on(shelf: Shelf, tmp_path: Path) -> None:
    manifest = shelf.fill(Cache(tmp_path / "cache", 10 * SIZE), 1)
    other = Cache(tmp_path / "cache", 10 * SIZE)
    shelf.fill(other, 1)
    assert shelf.asked == 1
    assert other.holds() == [manifest]


def test_several_that_need_it_at_once_fetch_it_once(shelf: Shelf, tmp_path: Path) -> None:
    ready = threading.Barrier(4)

    def need(_: int) -> str:
        ready.wait()
        return shelf.fill(Cache(tmp_path / "cache", 10 * SIZE), 1)

    with ThreadPoolExecutor(4) as crew:
        assert len(set(crew.map(need, range(4)))) == 1
    assert shelf.asked == 1


def test_what_was_used_longest_ago_makes_room_unless_it_is_in_use(shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE + 100)
    first, second = shelf.fill(cache, 1), shelf.fill(cache, 2)
    shelf.fill(cache, 1)
    third = shelf.fill(cache, 3)
    assert cache.holds() == [third, first]
    with cache.use(first, list):
        fourth = shelf.fill(cache, 4)
        assert sorted(cache.holds()) == sorted([first, fourth])
    assert second not in cache.holds()
    assert cache.holds(limit=1) == [fourth]


def test_damaged_bytes_are_refused_and_fetched_anew_the_next_time(shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    manifest, downloads = shelf.entry(7, wrong=True)
    with pytest.raises(DigestMismatch), cache.use(manifest, lambda: downloads):
        raise AssertionError("nobody sees damaged bytes")
    assert cache.holds() == []
    assert shelf.fill(cache, 7) == manifest


def test_the_half_of_a_broken_download_makes_room_too(shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    half = tmp_path / "cache" / ("0" * 64)
    half.mkdir()
    (half / "data.bin.partial").write_bytes(b"x" * 2 * SIZE)
    kept = shelf.fill(cache, 1)
    assert cache.holds() == [kept]
    assert not half.exists()


def test_no_name_in_a_version_is_the_mark_of_an_entry(shelf: Shelf, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    manifest, [file] = shelf.entry(1)
    odd = [file.model_copy(update={"path": path}) for path in (".complete/x", "data.bin")]
    with cache.use(manifest, lambda: odd) as folder:
        assert (folder / ".complete" / "x").is_file()
    for number in (2, 3, 4):  # which has to make room
        shelf.fill(cache, number)
    assert manifest not in cache.holds()
    assert len(cache.holds()) == 2


def test_two_workers_may_make_room_at_once(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    for number in (1, 2):
        shelf.fill(cache, number)
    listed = Path.rglob

    def gone_meanwhile(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(listed(folder, pattern))
        shutil.rmtree(folder)  # by the other one
        return iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", gone_meanwhile)
        shelf.fill(cache, 3)
    assert (tmp_path / "cache" / Digest.parse(shelf.entry(3)[0]).hex / "data.bin").is_file()
