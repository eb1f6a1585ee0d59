"""One contract for every blob store: a folder on this machine, or anything that speaks S3.

Bytes travel between client and store by signed requests; the registry signs, looks and copies, and never
carries them. A signed PUT covers method, key, size and SHA-256 of the bytes, so a store that checks what was
signed accepts the promised bytes or nothing. tests/storage/test_contract.py is the contract, run over every
store; registry/storage/probe.py asks a running store what it keeps of it.

Keys are ``staging/{push}/{sha256 hex}`` while a push is open, ``blobs/{sha256 hex}`` for good, and
``checkpoints/{job}/{attempt}/{sha256 hex}`` while a job is not over. Every method
raises `StorageDown` when the store does not answer and `BadKey` for what cannot be a key.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from registry.core.digest import Digest
from registry.core.errors import BadKey

CHECKSUM_HEADER = "x-amz-checksum-sha256"
KEY_RULE = "1 to 6 segments of 1 to 128 characters from a-z, A-Z, 0-9, '-', '_' and '.', none starting with '.'"
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}){0,5}")


def is_key(key: str) -> bool:
    """Whether it can be the key of a blob: what else lies in a bucket (folder markers, a mount's files) is not ours."""
    return _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """``key`` itself when it can name a blob; `BadKey` with the rule when not."""
    if not _KEY.fullmatch(key):
        raise BadKey(key=key[:200], rule=KEY_RULE)
    return key


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that whoever holds it may make once or often, exactly so, until ``expires_at`` (Unix seconds)."""

    method: str
    url: str
    expires_at: float
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a multipart upload; ``sha256`` is None where a store does not say what it checked."""

    number: int
    size: int
    sha256: Digest | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store knows of a blob without reading it; ``sha256`` of all its bytes where the store keeps that."""

    key: str
    size: int
    modified_at: float
    sha256: Digest | None = None


class BlobReader(Protocol):
    """An open blob; memory stays bounded by what is asked for at once."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer only at the end."""

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """All bytes in order, ``size`` at a time."""

    def close(self) -> None:
        """Let go of what the reader holds."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BlobSource(Protocol):
    """Where blobs can be read: a store, or a copy of one."""

    def open(self, key: str) -> BlobReader:
        """The blob for reading; `BlobNotFound`."""


class BlobStore(BlobSource, Protocol):
    """Where blobs live; safe to share between threads."""

    def presign_put(self, key: str, *, size: int, sha256: Digest, expires_s: int) -> SignedRequest:
        """A PUT of exactly these bytes; the client must send its ``headers``."""

    def start_multipart(self, key: str, *, size: int, part_size: int) -> str:
        """Open an upload of ``size`` bytes in parts of ``part_size`` (the last may be shorter); its id."""

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size: int, sha256: Digest, expires_s: int
    ) -> SignedRequest:
        """A PUT of part ``number`` (from 1), with the size and SHA-256 of that part."""

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """The parts that arrived whole, by number; `UploadNotFound` when the upload is over."""

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        """Make the blob of all ``parts`` (number, size, promised SHA-256).

        Completing again is fine. `PartsMissing` names what did not arrive; `ChecksumRefused` when another
        content arrived than ``parts`` promise.
        """

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts; one that is over already is fine."""

    def sweep_multiparts(self, prefix: str, *, keep: Collection[str], before: float) -> int:
        """Forget uploads to keys under ``prefix`` that are as old as ``before`` (Unix seconds), but those in ``keep``.

        How many went. Also goes what is left of an upload whose process died while it began or ended.
        """

    def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> SignedRequest:
        """A GET, with or without ranges; ``filename`` is what a browser saves it as."""

    def head(self, key: str) -> Stat | None:
        """What is known of the blob, or None when it is not there."""

    def put(self, key: str, data: bytes, sha256: Digest) -> None:
        """Write a small blob of the registry's own (records, manifests, tables); `ChecksumRefused` when they differ."""

    def put_stream(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: Digest) -> None:
        """Write a blob of any size as it comes, in bounded memory.

        `ChecksumRefused` when other bytes than promised came: then what was under the key is there as before.
        """

    def put_if_absent(self, key: str, data: bytes, sha256: Digest) -> bool:
        """`put`, unless the key is taken; whether it was written."""

    def copy(self, source: str, target: str) -> None:
        """Copy inside the store, whatever the size; `BlobNotFound`."""

    def delete(self, key: str) -> None:
        """Remove the blob; one that is not there is fine."""

    def walk(self, prefix: str) -> Iterator[Stat]:
        """All blobs under ``prefix`` (whole segments, such as ``staging/p1/``), in no particular order."""


def part_sizes(size: int, part_size: int) -> Sequence[int]:
    """The sizes of all parts of ``size`` bytes: full ones, and what is left."""
    full, rest = divmod(size, part_size)
    return [part_size] * full + ([rest] if rest or not full else [])
