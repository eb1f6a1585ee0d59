"""What a running store keeps of the contract, found out by trying: at start-up, and by ``loractl doctor``.

A store that says nothing about checksums may still ignore them, so the probe sends wrong bytes through a signed
URL and looks whether they are there afterwards. What a store does not enforce the verifier reads itself.
"""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

from registry.core.digest import Digest
from registry.core.errors import LoractlError, StorageDown, Unavailable

from .base import BlobStore, Part, SignedRequest

Answer = TypeVar("Answer")

TOLERATED_SKEW_S = 60.0
_LIFE_S = 300


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the store was seen to do; ``clock_skew_s`` is its clock minus ours, to the second, None when unknown."""

    signed_urls: bool
    put_checksums: bool
    part_checksums: bool
    signed_headers: bool
    conditional_writes: bool
    ranges: bool
    multipart: bool
    clock_skew_s: float | None

    def findings(self) -> list[str]:
        """What an operator should know, a sentence each; nothing when all is well."""
        said = [_MEANS[field.name] for field in fields(self) if getattr(self, field.name) is False]
        if self.clock_skew_s is not None and abs(self.clock_skew_s) > TOLERATED_SKEW_S:
            said.append(f"The store's clock is {self.clock_skew_s:+.0f} s from ours; signed URLs expire by its clock.")
        return said


_MEANS = {
    "signed_urls": "The store refuses our signed URLs, so nobody can push or pull: check endpoint, keys and clock.",
    "put_checksums": "The store takes bytes that differ from a signed checksum; the verifier reads every blob.",
    "part_checksums": "The store takes parts that differ from their checksums; the verifier reads every large blob.",
    "signed_headers": "The store takes requests without their signed headers; sizes and checksums can be evaded.",
    "conditional_writes": "The store ignores If-None-Match; two writers of one key overwrite each other.",
    "ranges": "The store ignores ranges; interrupted downloads start over.",
    "multipart": "The store has no working multipart uploads; large files cannot be pushed.",
}


def probe(store: BlobStore, http: httpx.Client, clock: Callable[[], float] = time.time) -> Capabilities:
    """Try ``store`` through ``http`` under ``staging/probe-…``, and leave nothing there; `StorageDown`."""
    place = f"staging/probe-{secrets.token_hex(8)}"
    right, wrong = secrets.token_bytes(1000), secrets.token_bytes(1000)
    sha256 = Digest.sha256(right)

    def send(request: SignedRequest, content: bytes | None = None, **more: str) -> httpx.Response:
        try:
            return http.request(request.method, request.url, headers=request.headers | more, content=content)
        except httpx.TransportError as error:
            host = httpx.URL(request.url).netloc.decode()
            raise StorageDown(reason=f"{type(error).__name__} at {host}, for which URLs are signed") from error

    def signed_put(name: str) -> SignedRequest:
        return store.presign_put(f"{place}/{name}", size=len(right), sha256=sha256, expires_s=_LIFE_S)

    def refuses(request: SignedRequest, content: bytes, name: str) -> bool:
        return send(request, content).is_error and store.head(f"{place}/{name}") is None

    def part_checksums() -> tuple[bool, bool]:
        key = f"{place}/parts"
        upload_id = store.start_multipart(key, size=len(right), part_size=len(right))
        request = store.presign_part(key, upload_id, 1, size=len(right), sha256=sha256, expires_s=_LIFE_S)
        refused = send(request, wrong).is_error and not store.list_parts(key, upload_id)
        try:
            works = send(request, right).is_success
            store.complete_multipart(key, upload_id, [Part(1, len(right), sha256)])
            with store.open(key) as blob:
                return refused, works and blob.read(0, len(right)) == right
        finally:
            store.abort_multipart(key, upload_id)

    def conditional_writes() -> bool:
        key = f"{place}/once"
        return store.put_if_absent(key, right, sha256) and not store.put_if_absent(key, right, sha256)

    try:
        answer = send(signed_put("right"), right)
        signed_urls = answer.is_success and store.head(f"{place}/right") is not None
        store.put(f"{place}/read", right, sha256)
        part = send(store.presign_get(f"{place}/read", expires_s=_LIFE_S), range="bytes=10-19")
        bare = SignedRequest("PUT", signed_put("bare").url, clock() + _LIFE_S)
        checked, multipart = _tried(part_checksums, (False, False))
        return Capabilities(
            signed_urls=signed_urls,
            put_checksums=refuses(signed_put("wrong"), wrong, "wrong"),
            part_checksums=checked,
            signed_headers=refuses(bare, wrong, "bare"),
            conditional_writes=_tried(conditional_writes, False),
            ranges=part.status_code == httpx.codes.PARTIAL_CONTENT and part.content == right[10:20],
            multipart=multipart,
            clock_skew_s=_skew(answer, clock()),
        )
    finally:
        with suppress(Unavailable):  # it went down in between, and that is being told already
            for left in list(store.walk(place)):
                store.delete(left.key)


def _tried(attempt: Callable[[], Answer], otherwise: Answer) -> Answer:
    """What ``attempt`` says, or ``otherwise`` when the store refuses it; an unreachable store stays an error."""
    try:
        return attempt()
    except StorageDown as error:
        if isinstance(error.__cause__, httpx.TransportError):
            raise
        return otherwise
    except LoractlError:
        return otherwise


def _skew(answer: httpx.Response, now: float) -> float | None:
    try:
        seconds = parsedate_to_datetime(answer.headers["date"]).timestamp() - now
    except (KeyError, ValueError):
        return None
    return float(round(seconds))
