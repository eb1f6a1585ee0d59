"""The local store's routes, over real sockets: what a client can do wrong between the first byte and the last."""

import socket
import time

import httpx
import pytest

from registry.core.digest import Digest
from registry.storage.base import SignedRequest
from registry.storage.local import LocalStore

DATA = bytes(range(256)) * 20_000
SHA256 = Digest.sha256(DATA)


@pytest.fixture
def key(push: str) -> str:
    return f"staging/{push}/{SHA256.hex}"


@pytest.fixture
def request_of(local_store: LocalStore, key: str) -> SignedRequest:
    return local_store.presign_put(key, size=len(DATA), sha256=SHA256, expires_s=60)


def test_refusals_are_problems_with_their_code(
    local_store: LocalStore, http: httpx.Client, key: str, request_of: SignedRequest
) -> None:
    wrong = http.put(request_of.url, content=DATA[::-1], headers=request_of.headers)
    assert (wrong.status_code, wrong.json()["code"]) == (422, "checksum-refused")
    assert wrong.json()["facts"] == {
        "key": key,
        "actual": str(Digest.sha256(DATA[::-1])),
        "expected": str(SHA256),
    }
    unsigned = http.put(request_of.url.partition("?")[0], content=DATA)
    assert (unsigned.status_code, unsigned.json()["code"]) == (403, "signature-refused")
    absent = http.get(local_store.presign_get(key, expires_s=60).url)
    assert (absent.status_code, absent.json()["code"]) == (404, "blob-not-found")


def test_a_body_without_a_length_is_refused(http: httpx.Client, request_of: SignedRequest) -> None:
    headers = {name: value for name, value in request_of.headers.items() if name != "content-length"}
    answer = http.put(request_of.url, content=iter([DATA]), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "signature-refused")


def test_a_client_that_goes_away_leaves_nothing(
    local_store: LocalStore, http: httpx.Client, key: str, request_of: SignedRequest
) -> None:
    url = httpx.URL(request_of.url)
    partial = local_store.root / ".partial"
    with socket.create_connection((url.host, url.port or 80)) as connection:
        head = [f"PUT {url.raw_path.decode()} HTTP/1.1", f"host: {url.host}"]
        head += [f"{name}: {value}" for name, value in request_of.headers.items()]
        connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode() + DATA[: len(DATA) // 2])
        deadline = time.monotonic() + 20
        while not list(partial.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(partial.iterdir())
    while list(partial.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(partial.iterdir())
    assert local_store.head(key) is None
    assert http.put(request_of.url, content=DATA, headers=request_of.headers).status_code == 200


@pytest.mark.parametrize(
    ("range_", "expected"),
    [
        ("bytes=0-0", DATA[:1]),
        ("bytes=100-", DATA[100:]),
        ("bytes=-5", DATA[-5:]),
        (f"bytes={1 << 20}-{(1 << 20) + 9}", DATA[1 << 20 : (1 << 20) + 10]),
    ],
)
def test_ranges_as_http_spells_them(
    local_store: LocalStore, http: httpx.Client, key: str, range_: str, expected: bytes
) -> None:
    local_store.put(key, DATA, SHA256)
    answer = http.get(local_store.presign_get(key, expires_s=60).url, headers={"range": range_})
    assert answer.status_code == 206
    assert answer.content == expected
    assert answer.headers["content-range"].endswith(f"/{len(DATA)}")


def test_a_blob_travels_as_bytes_that_no_browser_runs(local_store: LocalStore, http: httpx.Client, key: str) -> None:
    local_store.put(key, b"<script>", Digest.sha256(b"<script>"))
    answer = http.get(local_store.presign_get(key, expires_s=60).url)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


PATHS = ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", ".partial/x", ""]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leaves_the_store(local_store: LocalStore, http: httpx.Client, path: str) -> None:
    for method in ("GET", "PUT"):
        answer = http.request(method, f"{local_store.url}/store/{path}?expires=99999999999&signature=x")
        assert answer.status_code in (403, 404)
