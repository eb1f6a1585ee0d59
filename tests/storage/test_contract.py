"""What every blob store keeps: one suite over the local folder and a real S3 server."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from registry.core.digest import Digest
from registry.core.errors import BadKey, BlobNotFound, ChecksumRefused, PartsMissing, UploadNotFound
from registry.storage.base import BlobStore, Part, SignedRequest, part_sizes
from registry.storage.local import LocalStore
from registry.storage.s3 import S3Store

PART = 5 << 20  # the least that S3 takes for a part that is not the last
DATA = b"what was promised"
SHA256 = Digest.sha256(DATA)
REFUSED = {400, 403, 404, 405, 422}


def send(http: httpx.Client, request: SignedRequest, content: bytes | None = None, **more: str) -> httpx.Response:
    return http.request(request.method, request.url, headers=request.headers | more, content=content)


def key_of(push: str, data: bytes = DATA) -> str:
    return f"staging/{push}/{Digest.sha256(data).hex}"


def signed_put(store: BlobStore, key: str, data: bytes = DATA, expires_s: int = 60) -> SignedRequest:
    return store.presign_put(key, size=len(data), sha256=Digest.sha256(data), expires_s=expires_s)


def content(store: BlobStore, key: str) -> bytes:
    with store.open(key) as blob:
        return b"".join(blob.chunks(1000))


# ── one PUT ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [DATA, b"", bytes(range(256)) * 20_000], ids=["small", "empty", "5 MB"])
def test_put_then_get_is_the_identity(store: BlobStore, http: httpx.Client, push: str, data: bytes) -> None:
    key = key_of(push, data)
    assert send(http, signed_put(store, key, data), data).status_code == 200
    found = store.head(key)
    assert found is not None
    assert (found.key, found.size) == (key, len(data))
    assert found.sha256 in (None, Digest.sha256(data))
    assert abs(found.modified_at - time.time()) < 60
    assert content(store, key) == data
    assert send(http, store.presign_get(key, expires_s=60)).content == data


@pytest.mark.parametrize("wrong", [b"what was promisee", b"\0" * len(DATA)])
def test_wrong_bytes_are_refused_and_nothing_is_stored(
    store: BlobStore, http: httpx.Client, push: str, wrong: bytes
) -> None:
    key = key_of(push)
    assert send(http, signed_put(store, key), wrong).status_code in REFUSED
    assert store.head(key) is None


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA + b"!", b"", DATA * 100_000])
def test_a_wrong_length_is_refused_and_nothing_is_stored(
    store: BlobStore, http: httpx.Client, push: str, wrong: bytes
) -> None:
    request, key = signed_put(store, key_of(push)), key_of(push)
    answer = send(http, request, wrong, **{"content-length": str(len(wrong))})
    assert answer.status_code in REFUSED
    assert store.head(key) is None


def test_a_wrong_body_does_not_disturb_the_blob_that_is_there(store: BlobStore, http: httpx.Client, push: str) -> None:
    key = key_of(push)
    request = signed_put(store, key)
    assert send(http, request, DATA).is_success
    assert send(http, request, DATA[::-1]).status_code in REFUSED
    assert content(store, key) == DATA


def test_a_signed_header_that_is_left_out_or_changed_is_refused(
    store: BlobStore, http: httpx.Client, push: str
) -> None:
    key = key_of(push)
    request, other = signed_put(store, key), b"something else   "
    assert send(http, replace(request, headers={}), DATA).status_code in REFUSED
    headers = request.headers | {"x-amz-checksum-sha256": Digest.sha256(other).base64}
    assert send(http, replace(request, headers=headers), other).status_code in REFUSED
    assert store.head(key) is None


def test_an_expired_url_is_refused(store: BlobStore, http: httpx.Client, push: str) -> None:
    key = key_of(push)
    put = signed_put(store, key, expires_s=1)
    get = store.presign_get(key, expires_s=1)
    store.put(key, DATA, SHA256)
    time.sleep(2.1)
    assert put.expires_at < time.time()
    assert send(http, put, DATA).status_code == 403
    assert send(http, get).status_code == 403


TAMPERINGS: dict[str, Callable[[str], str]] = {
    "another key": lambda url: url.replace("staging/", "blobs/", 1),
    "a longer life": lambda url: url.replace("Expires=60", "Expires=61").replace("expires=1", "expires=2"),
    "another signature": lambda url: url[:-1] + ("0" if url[-1] != "0" else "1"),
    "no signature": lambda url: url.partition("?")[0],
    "a part number": lambda url: url + "&partNumber=1&part=1&upload=0&uploadId=0",
    "a traversal": lambda url: url.replace("staging/", "staging/..%2F..%2F"),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_tampered_url_is_refused(store: BlobStore, http: httpx.Client, push: str, tampering: str) -> None:
    key = key_of(push)
    request = signed_put(store, key)
    url = TAMPERINGS[tampering](request.url)
    assert url != request.url
    assert send(http, replace(request, url=url), DATA).status_code in REFUSED
    assert store.head(key) is None


def test_a_url_is_good_for_its_own_method_only(store: BlobStore, http: httpx.Client, push: str) -> None:
    key = key_of(push)
    put, get = signed_put(store, key), store.presign_get(key, expires_s=60)
    assert http.put(get.url, content=DATA).status_code in REFUSED
    assert store.head(key) is None
    store.put(key, DATA, SHA256)
    assert http.get(put.url).status_code in REFUSED
    for url in (put.url, get.url):
        assert http.delete(url).status_code in REFUSED
    assert content(store, key) == DATA


BAD_KEYS = ["", "/", "../x", "staging/../x", "/etc/passwd", "staging//x", "staging/.hidden", "a/./b", "blobs/x/"]
BAD_KEYS += ["a\0b", "a b", "ä", "a\n", "x" * 129, "a/b/c/d/e/f/g", ".partial/x", "..", "a\\..\\b"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_could_leave_the_store_is_refused_everywhere(store: BlobStore, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: signed_put(store, key),
        lambda: store.presign_get(key, expires_s=60),
        lambda: store.presign_part(key, "0" * 32, 1, size=1, sha256=SHA256, expires_s=60),
        lambda: store.start_multipart(key, size=1, part_size=1),
        lambda: store.head(key),
        lambda: store.open(key),
        lambda: store.put(key, DATA, SHA256),
        lambda: store.put_if_absent(key, DATA, SHA256),
        lambda: store.copy(key, "blobs/x"),
        lambda: store.copy("blobs/x", key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(BadKey if call is not calls[-2] else (BadKey, BlobNotFound)):
            call()


def test_many_threads_may_share_a_store(store: BlobStore, http: httpx.Client, push: str) -> None:
    def roundtrip(number: int) -> bool:
        data = f"blob {number}".encode() * 1000
        key = key_of(push, data)
        send(http, signed_put(store, key, data), data).raise_for_status()
        store.copy(key, f"blobs/{Digest.sha256(data).hex}")
        store.delete(key)
        return content(store, f"blobs/{Digest.sha256(data).hex}") == data

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(roundtrip, range(32)))
    assert list(store.walk(f"staging/{push}/")) == []


# ── reading ──────────────────────────────────────────────────────────────────


RANGES = [(0, 4), (3, 5), (0, 10_000), (len(DATA) - 1, 10), (len(DATA), 1), (99, 9)]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_range_is_a_slice(store: BlobStore, http: httpx.Client, push: str, offset: int, length: int) -> None:
    key = key_of(push)
    store.put(key, DATA, SHA256)
    with store.open(key) as blob:
        assert blob.size == len(DATA)
        assert blob.read(offset, length) == DATA[offset : offset + length]
    answer = send(http, store.presign_get(key, expires_s=60), range=f"bytes={offset}-{offset + length - 1}")
    if offset < len(DATA):
        assert (answer.status_code, answer.content) == (206, DATA[offset : offset + length])
    else:
        assert answer.status_code == 416


def test_a_filename_is_what_a_browser_saves(store: BlobStore, http: httpx.Client, push: str) -> None:
    key, name = key_of(push), 'adapter "ä" model.safetensors'
    store.put(key, DATA, SHA256)
    answer = send(http, store.presign_get(key, expires_s=60, filename=name))
    assert answer.content == DATA
    assert "attachment" in answer.headers["content-disposition"]
    assert "adapter%20%22%C3%A4%22%20model.safetensors" in answer.headers["content-disposition"]


def test_what_is_not_there_is_not_found(store: BlobStore, http: httpx.Client, push: str) -> None:
    key = key_of(push)
    assert store.head(key) is None
    with pytest.raises(BlobNotFound):
        store.open(key)
    with pytest.raises(BlobNotFound):
        store.copy(key, "blobs/x")
    assert send(http, store.presign_get(key, expires_s=60)).status_code == 404
    store.delete(key)


# ── the registry's own writes ────────────────────────────────────────────────


def test_put_refuses_bytes_that_are_not_the_promised_ones(store: BlobStore, push: str) -> None:
    with pytest.raises(ChecksumRefused):
        store.put(key_of(push), DATA, Digest.sha256(b"others"))
    assert store.head(key_of(push)) is None


@pytest.mark.parametrize("size", [0, 1000, PART, 2 * PART + 1], ids=["empty", "small", "one part", "three parts"])
def test_a_stream_is_stored_as_it_came(
    store: BlobStore, push: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "stream_part_size", PART)
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    pieces = (data[start : start + 700_001] for start in range(0, size, 700_001))
    store.put_stream(key := key_of(push, data), pieces, size=size, sha256=Digest.sha256(data))
    assert content(store, key) == data


@pytest.mark.parametrize("data", [DATA, bytes(2 * PART)], ids=["small", "in parts"])
def test_a_stream_of_other_bytes_is_refused_and_what_was_there_stays(
    store: BlobStore, push: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "stream_part_size", PART)
    key, sha256 = key_of(push, data), Digest.sha256(data)
    store.put(key, b"before", Digest.sha256(b"before"))
    store.sweep_multiparts("staging/", keep=(), before=time.time() + 60)  # what others left
    for wrong in (data[:-1] + b"!", data[:-1], data + b"!"):
        with pytest.raises(ChecksumRefused):
            store.put_stream(key, iter([wrong]), size=len(data), sha256=sha256)
    assert content(store, key) == b"before"
    assert store.sweep_multiparts("staging/", keep=(), before=time.time() + 60) == 0


def test_put_if_absent_never_replaces(store: BlobStore, push: str) -> None:
    key, other = key_of(push), b"later"
    assert store.put_if_absent(key, DATA, SHA256)
    assert not store.put_if_absent(key, other, Digest.sha256(other))
    assert content(store, key) == DATA


def test_delete_is_idempotent_and_a_put_after_it_works(store: BlobStore, push: str) -> None:
    for _ in range(2):
        store.put(key_of(push), DATA, SHA256)
        store.delete(key_of(push))
        store.delete(key_of(push))
        assert store.head(key_of(push)) is None


def test_walk_lists_what_is_under_a_prefix_and_nothing_beside_it(store: BlobStore, push: str) -> None:
    keys = {f"staging/{push}/{name}" for name in ("a", "b", "c")}
    for key in keys | {f"staging/{push}0/d"}:
        store.put(key, DATA, SHA256)
    for prefix in (f"staging/{push}/", f"staging/{push}"):
        assert {stat.key for stat in store.walk(prefix)} == keys
    assert {stat.size for stat in store.walk(f"staging/{push}/")} == {len(DATA)}
    assert keys <= {stat.key for stat in store.walk("staging/")}
    name = f"blobs/{Digest.sha256(push.encode()).hex}"
    store.put(name, DATA, SHA256)
    assert name in {stat.key for stat in store.walk("blobs/")}


def test_walk_passes_over_what_can_be_no_key_of_ours(store: BlobStore, push: str) -> None:
    key = f"staging/{push}/a"
    store.put(key, DATA, SHA256)
    for name in (".DS_Store", ".nfs0000", "a b"):  # of a mount, a console, a person
        if isinstance(store, S3Store):
            store._calls.put_object(Bucket=store._bucket, Key=f"staging/{push}/{name}", Body=b"")
        elif isinstance(store, LocalStore):
            (store.root / "staging" / push / name).write_bytes(b"")
    assert [stat.key for stat in store.walk(f"staging/{push}/")] == [key]


@pytest.mark.parametrize("by_parts", [False, True])
def test_a_copy_has_the_same_bytes_and_outlives_its_source(
    store: BlobStore, push: str, by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_parts and isinstance(store, S3Store):
        monkeypatch.setattr(store, "copy_by_parts_above", PART)
        monkeypatch.setattr(store, "copy_part_size", PART)
    data = bytes(range(251)) * 24_000
    assert len(data) > PART
    source, target = key_of(push, data), f"blobs/{Digest.sha256(push.encode()).hex}"
    store.put(source, data, Digest.sha256(data))
    for _ in range(2):
        store.copy(source, target)
    store.put(source, DATA, SHA256)
    assert content(store, source) == DATA
    store.delete(source)
    assert content(store, target) == data


# ── multipart ────────────────────────────────────────────────────────────────


class Upload:
    """A multipart upload of three parts, and what a client does with it."""

    def __init__(self, store: BlobStore, http: httpx.Client, push: str) -> None:
        self.store, self.http = store, http
        self.data = b"".join(bytes([number]) * PART for number in (1, 2)) + b"the rest"
        sizes = part_sizes(len(self.data), PART)
        self.pieces = [self.data[number * PART : number * PART + size] for number, size in enumerate(sizes)]
        self.key = key_of(push, self.data)
        self.id = store.start_multipart(self.key, size=len(self.data), part_size=PART)
        self.parts = [Part(n, len(piece), Digest.sha256(piece)) for n, piece in enumerate(self.pieces, 1)]

    def signed(self, number: int) -> SignedRequest:
        part = self.parts[number - 1]
        assert part.sha256 is not None
        return self.store.presign_part(
            self.key, self.id, number, size=part.size, sha256=part.sha256, expires_s=60
        )

    def send(self, number: int, content: bytes | None = None) -> httpx.Response:
        return send(self.http, self.signed(number), self.pieces[number - 1] if content is None else content)

    def arrived(self) -> list[int]:
        return [part.number for part in self.store.list_parts(self.key, self.id)]

    def complete(self) -> None:
        self.store.complete_multipart(self.key, self.id, self.parts)


@pytest.fixture
def upload(store: BlobStore, http: httpx.Client, push: str) -> Upload:
    return Upload(store, http, push)


def test_parts_in_any_order_make_the_blob(upload: Upload) -> None:
    for number in (3, 1, 2):
        assert upload.send(number).status_code == 200
    upload.complete()
    assert content(upload.store, upload.key) == upload.data
    found = upload.store.head(upload.key)
    assert found is not None
    assert (found.size, found.sha256) == (len(upload.data), None)  # a checksum of checksums is not one of the bytes


def test_an_interrupted_upload_says_what_arrived_and_goes_on(upload: Upload) -> None:
    assert upload.arrived() == []
    upload.send(2)
    [part] = upload.store.list_parts(upload.key, upload.id)
    assert (part.number, part.size) == (2, PART)
    assert part.sha256 in (None, upload.parts[1].sha256)
    assert upload.store.head(upload.key) is None
    with pytest.raises(PartsMissing) as refused:
        upload.complete()
    assert refused.value.numbers == [1, 3]
    upload.send(1)
    upload.send(3)
    upload.complete()
    assert content(upload.store, upload.key) == upload.data


def test_a_part_that_came_twice_is_one_part(upload: Upload) -> None:
    for number in (1, 2, 3, 1):
        assert upload.send(number).status_code == 200
    assert upload.arrived() == [1, 2, 3]
    upload.complete()
    assert content(upload.store, upload.key) == upload.data


def test_a_part_with_wrong_bytes_does_not_arrive(upload: Upload) -> None:
    assert upload.send(1, content=bytes(PART)).status_code in REFUSED
    assert upload.send(3, content=b"the rEst").status_code in REFUSED
    assert upload.arrived() == []


def test_a_part_url_is_good_for_its_own_part_only(upload: Upload) -> None:
    request = upload.signed(3)
    url = request.url.replace("partNumber=3", "partNumber=1").replace("part=3", "part=1")
    assert url != request.url
    assert send(upload.http, replace(request, url=url), upload.pieces[2]).status_code in REFUSED
    assert upload.arrived() == []


def test_completing_needs_the_promised_content(upload: Upload) -> None:
    for number in (1, 2, 3):
        upload.send(number)
    promised = [*upload.parts[:2], replace(upload.parts[2], sha256=Digest.sha256(b"another"))]
    with pytest.raises(ChecksumRefused):
        upload.store.complete_multipart(upload.key, upload.id, promised)
    with pytest.raises(PartsMissing):
        upload.store.complete_multipart(upload.key, upload.id, [replace(upload.parts[0], size=7), *upload.parts[1:]])
    assert upload.store.head(upload.key) is None
    upload.complete()


def test_completing_twice_is_completing_once(upload: Upload) -> None:
    for number in (1, 2, 3):
        upload.send(number)
    upload.complete()
    upload.complete()
    assert content(upload.store, upload.key) == upload.data
    with pytest.raises(UploadNotFound):
        upload.store.list_parts(upload.key, upload.id)


def test_a_late_part_does_not_change_the_completed_blob(upload: Upload) -> None:
    for number in (1, 2, 3):
        upload.send(number)
    upload.complete()
    assert upload.send(3).status_code in REFUSED
    assert content(upload.store, upload.key) == upload.data


def test_an_aborted_upload_is_over(upload: Upload) -> None:
    upload.send(3)
    upload.store.abort_multipart(upload.key, upload.id)
    upload.store.abort_multipart(upload.key, upload.id)
    with pytest.raises(UploadNotFound):
        upload.complete()
    with pytest.raises(UploadNotFound):
        upload.store.list_parts(upload.key, upload.id)
    assert upload.send(1).status_code in REFUSED
    assert upload.store.head(upload.key) is None


def test_uploads_that_nobody_finished_are_swept_but_young_kept_and_other_ones(upload: Upload, push: str) -> None:
    upload.send(1)
    own, now = f"staging/{push}/", time.time()
    assert upload.store.sweep_multiparts(own, keep=(), before=now - 3600) == 0
    assert upload.store.sweep_multiparts(own, keep=(upload.id,), before=now + 60) == 0
    assert upload.store.sweep_multiparts(f"staging/{push[:-1]}/", keep=(), before=now + 60) == 0
    assert upload.arrived() == [1]
    assert upload.store.sweep_multiparts(own, keep=(), before=now + 60) == 1
    with pytest.raises(UploadNotFound):
        upload.arrived()
    assert upload.store.sweep_multiparts(own, keep=(), before=now + 60) == 0


def test_an_upload_belongs_to_its_key(upload: Upload) -> None:
    with pytest.raises(UploadNotFound):
        upload.store.list_parts(key_of("another"), upload.id)
    with pytest.raises(UploadNotFound):
        upload.store.list_parts(upload.key, "f" * 32)


@pytest.mark.parametrize(("size", "sizes"), [(0, [0]), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_part_sizes_add_up(size: int, sizes: list[int]) -> None:
    assert part_sizes(size, 4) == sizes
