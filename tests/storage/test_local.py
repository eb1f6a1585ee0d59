"""What only a folder has to prove: it is whole or absent, whoever dies, fills the disk, or writes at the same time."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from registry.core.digest import Digest
from registry.core.errors import PartBusy, PartsMissing, SignatureRefused, StorageDown, StorageFull, UploadNotFound
from registry.storage.base import Part
from registry.storage.local import Grant, Landing, LocalStore
from tests import servers

DATA = b"0123456789" * 100
SHA256 = Digest.sha256(DATA)
KEY = f"staging/p1/{SHA256.hex}"
SECRET = b"a secret"


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", "http://nowhere", SECRET)


def grant(store: LocalStore, *, upload_id: str = "", part: int = 0, data: bytes = DATA) -> Grant:
    return Grant("PUT", KEY, int(time.time()) + 60, len(data), Digest.sha256(data), upload_id, part)


def land(landing: Landing, *chunks: bytes) -> None:
    with closing(landing):
        landing.write(chunks)
        landing.keep()


def files(store: LocalStore, root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_bytes_have_no_name_until_they_are_whole(folder: LocalStore, tmp_path: Path) -> None:
    with closing(folder.receive(grant(folder))) as landing:
        landing.write([DATA[:500]])
        assert folder.head(KEY) is None
        landing.write([DATA[500:]])
        assert folder.head(KEY) is None
        landing.keep()
        assert folder.head(KEY) is not None
    assert files(folder, tmp_path / "store") == {KEY}


@pytest.mark.parametrize("chunks", [[], [DATA[:-1]], [DATA, b"!"], [DATA[::-1]]])
def test_what_was_not_promised_leaves_nothing(folder: LocalStore, tmp_path: Path, chunks: list[bytes]) -> None:
    with pytest.raises(Exception, match=r"refused|signed URL"):
        land(folder.receive(grant(folder)), *chunks)
    assert files(folder, tmp_path / "store") == set()


def test_more_than_was_signed_is_refused_before_it_is_written(folder: LocalStore, tmp_path: Path) -> None:
    with closing(folder.receive(grant(folder))) as landing:
        with pytest.raises(SignatureRefused, match="more arrived"):
            landing.write([DATA * 2])
        [partial] = (tmp_path / "store" / ".partial").iterdir()
        assert partial.stat().st_size == 0


def test_many_small_chunks_are_one_blob(folder: LocalStore) -> None:
    data = bytes(range(256)) * 20
    land(folder.receive(grant(folder, data=data)), *(data[i : i + 1] for i in range(len(data))))
    with folder.open(KEY) as blob:
        assert blob.read(0, 10_000) == data


def test_a_writer_that_is_killed_leaves_no_blob_and_its_rest_goes_after_a_day(tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from registry.core.digest import Digest
from registry.storage.local import Grant, LocalStore
store = LocalStore(Path({str(tmp_path)!r}), "http://nowhere", b"x")
landing = store.receive(Grant("PUT", {KEY!r}, 0, {len(DATA)}, Digest.parse({str(SHA256)!r})))
landing.write([b"half"])
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    store = LocalStore(tmp_path, "http://nowhere", SECRET)
    assert store.head(KEY) is None
    assert len(list((tmp_path / ".partial").iterdir())) == 1
    LocalStore(tmp_path, "http://nowhere", SECRET, clock=lambda: time.time() + 25 * 3600)
    assert list((tmp_path / ".partial").iterdir()) == []


# ── parts ────────────────────────────────────────────────────────────────────


@pytest.fixture
def upload_id(folder: LocalStore) -> str:
    return folder.start_multipart(KEY, size=2 * len(DATA), part_size=len(DATA))


PARTS = [Part(1, len(DATA), SHA256), Part(2, len(DATA), SHA256)]


def test_a_part_is_written_by_one_request_at_a_time(folder: LocalStore, upload_id: str) -> None:
    with closing(folder.receive(grant(folder, upload_id=upload_id, part=1))):
        with pytest.raises(PartBusy):
            folder.receive(grant(folder, upload_id=upload_id, part=1))
        land(folder.receive(grant(folder, upload_id=upload_id, part=2)), DATA)
    land(folder.receive(grant(folder, upload_id=upload_id, part=1)), DATA)
    assert folder.list_parts(KEY, upload_id) == [Part(n, len(DATA), SHA256, SHA256.hex) for n in (1, 2)]


def test_an_upload_that_somebody_writes_to_is_not_swept(folder: LocalStore, upload_id: str) -> None:
    with closing(folder.receive(grant(folder, upload_id=upload_id, part=1))):
        assert folder.sweep_multiparts("staging/", keep=(), before=time.time() + 60) == 0
    assert folder.sweep_multiparts("staging/", keep=(), before=time.time() + 60) == 1


@pytest.mark.parametrize("left", [(), ("data",), ("data", "about.json"), ("about.json",), ("about.json", "1.lock")])
def test_what_is_left_of_an_upload_is_swept_wherever_it_died(
    folder: LocalStore, upload_id: str, tmp_path: Path, left: tuple[str, ...]
) -> None:
    uploads = tmp_path / "store" / ".uploads"
    for path in (uploads / upload_id).iterdir():
        path.unlink()
    for name in left:
        (uploads / upload_id / name).touch()
    assert folder.sweep_multiparts("staging/", keep=(), before=time.time() + 60) == 1
    assert list(uploads.iterdir()) == []


def test_completing_waits_for_nobody_and_nobody_writes_afterwards(folder: LocalStore, upload_id: str) -> None:
    for number in (1, 2):
        land(folder.receive(grant(folder, upload_id=upload_id, part=number)), DATA)
    slow = folder.receive(grant(folder, upload_id=upload_id, part=2))
    with closing(slow):
        with pytest.raises(PartBusy):
            folder.complete_multipart(KEY, upload_id, PARTS)
        slow.write([DATA])
        slow.keep()
    folder.complete_multipart(KEY, upload_id, PARTS)
    with pytest.raises(UploadNotFound):
        folder.receive(grant(folder, upload_id=upload_id, part=2))
    with folder.open(KEY) as blob:
        assert blob.read(0, 10_000) == DATA * 2


def test_a_part_that_is_sent_again_counts_only_when_it_is_whole_again(folder: LocalStore, upload_id: str) -> None:
    for number in (1, 2):
        land(folder.receive(grant(folder, upload_id=upload_id, part=number)), DATA)
    with pytest.raises(SignatureRefused):
        land(folder.receive(grant(folder, upload_id=upload_id, part=2)), b"half")
    with pytest.raises(PartsMissing) as refused:
        folder.complete_multipart(KEY, upload_id, PARTS)
    assert refused.value.numbers == [2]


@pytest.mark.parametrize(("part", "data"), [(0, DATA), (3, DATA), (-1, DATA), (1, DATA[1:]), (2, DATA + b"!")])
def test_a_part_must_fill_its_place(folder: LocalStore, upload_id: str, part: int, data: bytes) -> None:
    with pytest.raises(SignatureRefused):
        folder.receive(grant(folder, upload_id=upload_id, part=part, data=data))


@pytest.mark.parametrize("upload_id", ["", "..", "../../x", "0" * 31, "0" * 33, "/" * 32, "." * 32])
def test_an_upload_id_cannot_leave_the_store(folder: LocalStore, upload_id: str) -> None:
    with pytest.raises(UploadNotFound):
        folder.list_parts(KEY, upload_id)


def test_a_death_between_naming_and_tidying_is_a_completed_upload(
    folder: LocalStore, upload_id: str, tmp_path: Path
) -> None:
    for number in (1, 2):
        land(folder.receive(grant(folder, upload_id=upload_id, part=number)), DATA)
    (tmp_path / "store" / KEY).parent.mkdir(parents=True)
    (tmp_path / "store" / ".uploads" / upload_id / "data").rename(tmp_path / "store" / KEY)
    folder.complete_multipart(KEY, upload_id, PARTS)
    with pytest.raises(UploadNotFound):
        folder.list_parts(KEY, upload_id)


def test_a_death_while_starting_is_no_upload(folder: LocalStore, upload_id: str, tmp_path: Path) -> None:
    about = tmp_path / "store" / ".uploads" / upload_id / "about.json"
    about.write_text("")
    with pytest.raises(UploadNotFound):
        folder.list_parts(KEY, upload_id)
    about.unlink()
    with pytest.raises(UploadNotFound):
        folder.list_parts(KEY, upload_id)


# ── signatures ───────────────────────────────────────────────────────────────


def test_another_secret_signs_nothing_for_us(folder: LocalStore, tmp_path: Path) -> None:
    stranger = LocalStore(tmp_path / "store", "http://nowhere", b"another secret")
    query = dict(httpx.URL(stranger.presign_get(KEY, expires_s=60).url).params)
    with pytest.raises(SignatureRefused):
        folder.granted("GET", KEY, query)
    assert stranger.granted("GET", KEY, query).key == KEY


@pytest.mark.parametrize("name", ["expires", "size", "sha256", "upload", "part", "signature"])
@pytest.mark.parametrize("change", ["gone", "empty", "longer", "odd"])
def test_every_parameter_is_covered_by_the_signature(folder: LocalStore, name: str, change: str) -> None:
    request = folder.presign_part(KEY, "0" * 32, 1, size=10, sha256=SHA256, expires_s=60)
    query = dict(httpx.URL(request.url).params)
    assert folder.granted("PUT", KEY, query).part == 1
    if change == "gone":
        del query[name]
    else:
        query[name] = {"empty": "", "longer": query[name] + "1", "odd": "ä"}[change]
    with pytest.raises(SignatureRefused):
        folder.granted("PUT", KEY, query)


def test_a_url_ends_when_the_clock_says_so(tmp_path: Path) -> None:
    now = [1000.0]
    store = LocalStore(tmp_path, "http://nowhere", SECRET, clock=lambda: now[0])
    request = store.presign_get(KEY, expires_s=60)
    query = dict(httpx.URL(request.url).params)
    assert request.expires_at == 1060
    now[0] = 1059.9
    assert store.granted("GET", KEY, query).expires_at == 1060
    now[0] = 1060
    with pytest.raises(SignatureRefused, match="expired"):
        store.granted("GET", KEY, query)


# ── disk full, disk gone ─────────────────────────────────────────────────────


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size``: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, http: httpx.Client) -> None:
    data = bytes(8 << 20)
    with servers.local_store(tmp_path) as store:
        request = store.presign_put(KEY, size=len(data), sha256=Digest.sha256(data), expires_s=60)
        with files_at_most(1 << 20):
            answer = http.put(request.url, content=data, headers=request.headers)
            with pytest.raises(StorageFull):
                store.put(KEY, data, Digest.sha256(data))
            with pytest.raises(StorageFull):
                store.start_multipart(KEY, size=len(data), part_size=1 << 20)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage-full")
        assert store.head(KEY) is None
        assert files(store, tmp_path) == set()
        assert http.put(request.url, content=data, headers=request.headers).status_code == 200


def test_a_part_that_finds_the_disk_full_can_be_sent_again(folder: LocalStore) -> None:
    data = bytes(2 << 20)
    upload_id = folder.start_multipart(KEY, size=2 * len(data), part_size=len(data))
    with files_at_most(3 << 20), pytest.raises(StorageFull):
        land(folder.receive(grant(folder, upload_id=upload_id, part=2, data=data)), data)
    assert folder.list_parts(KEY, upload_id) == []
    land(folder.receive(grant(folder, upload_id=upload_id, part=2, data=data)), data)
    assert [part.number for part in folder.list_parts(KEY, upload_id)] == [2]


def test_a_disk_that_is_gone_is_storage_down(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store", "http://nowhere", SECRET)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").write_text("not a folder")
    for call in (lambda: store.head(KEY), lambda: store.open(KEY), lambda: store.put(KEY, DATA, SHA256)):
        with pytest.raises(StorageDown):
            call()
    with pytest.raises(StorageDown):
        LocalStore(tmp_path / "store", "http://nowhere", SECRET)
