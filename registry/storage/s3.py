"""Any S3-compatible store, through boto3: calls go to the internal endpoint, signatures are for the public one.

A signature covers the host, so whoever signs must know the name that clients will use. Signed PUTs cover
content-length and x-amz-checksum-sha256; multipart uploads carry a SHA-256 per part (checksum type COMPOSITE).
Stores other than AWS need ``when_required``: newer botocore otherwise adds a CRC trailer that they refuse.
SeaweedFS 4.48 checks every one of these, also at completion, but lists parts without their checksums.
"""

import base64
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import boto3
from boto3.exceptions import Boto3Error
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from registry.core.digest import Digest
from registry.core.errors import (
    BlobNotFound,
    ChecksumRefused,
    PartsMissing,
    StorageDown,
    StorageFull,
    UploadNotFound,
)
from registry.settings import S3Settings

from .base import CHECKSUM_HEADER, Part, SignedRequest, Stat, check_key, is_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

REUSED_SIGNATURES = 10_000
MOST_PARTS = 10_000
"""Of an upload, by S3."""


class S3Store:
    """A `BlobStore` in one bucket."""

    copy_by_parts_above = 5_000_000_000
    """S3 copies at most 5 GB in one call."""
    copy_part_size = 1 << 30
    stream_part_size = 64 << 20

    def __init__(self, place: S3Settings, clock: Callable[[], float] = time.time) -> None:
        self._place = place
        self._bucket = place.bucket
        self._clock = clock
        self._calls = _client(place, place.endpoint)
        self._signer = _client(place, place.public_endpoint) if place.public_endpoint else self._calls
        self._signed: OrderedDict[tuple[str, int, str | None], tuple[float, SignedRequest]] = OrderedDict()
        self._signing = threading.Lock()

    def inside(self) -> "S3Store":
        """The same store, signing for the internal endpoint: for our own requests, such as the probe's."""
        return S3Store(replace(self._place, public_endpoint=None), self._clock)

    # ── signing ──────────────────────────────────────────────────────────────

    def presign_put(self, key: str, *, size: int, sha256: Digest, expires_s: int) -> SignedRequest:
        """A PUT of exactly these bytes."""
        return self._sign_put("put_object", key, size, sha256, expires_s, {})

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size: int, sha256: Digest, expires_s: int
    ) -> SignedRequest:
        """A PUT of one part."""
        which = {"UploadId": upload_id, "PartNumber": number}
        return self._sign_put("upload_part", key, size, sha256, expires_s, which)

    def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> SignedRequest:
        """A GET; signed once for several callers, so that it holds between three quarters and all of ``expires_s``."""
        wanted, now = (check_key(key), expires_s, filename), self._clock()
        with self._signing:
            signed_at, request = self._signed.get(wanted, (0.0, None))
            if request is not None and now - signed_at < expires_s / 4:
                self._signed.move_to_end(wanted)
                return request
        parameters = {}
        if filename:
            parameters["ResponseContentDisposition"] = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        request = SignedRequest("GET", self._url("get_object", key, expires_s, parameters), now + expires_s)
        with self._signing:
            self._signed[wanted] = (now, request)
            while len(self._signed) > REUSED_SIGNATURES:
                self._signed.popitem(last=False)
        return request

    def _sign_put(
        self, call: str, key: str, size: int, sha256: Digest, expires_s: int, more: Mapping[str, Any]
    ) -> SignedRequest:
        parameters = {"ContentLength": size, "ChecksumSHA256": sha256.base64, **more}
        url = self._url(call, key, expires_s, parameters)
        headers = {CHECKSUM_HEADER: sha256.base64, "content-length": str(size)}
        return SignedRequest("PUT", url, self._clock() + expires_s, headers)

    def _url(self, call: str, key: str, expires_s: int, parameters: Mapping[str, Any]) -> str:
        where = {"Bucket": self._bucket, "Key": check_key(key), **parameters}
        return self._signer.generate_presigned_url(call, Params=where, ExpiresIn=expires_s)

    # ── multipart uploads ────────────────────────────────────────────────────

    def start_multipart(self, key: str, *, size: int, part_size: int) -> str:  # noqa: ARG002  # S3 need not know sizes
        """Open an upload; its id."""
        with _refusals(key):
            answer = self._calls.create_multipart_upload(
                Bucket=self._bucket, Key=check_key(key), ChecksumAlgorithm="SHA256", ChecksumType="COMPOSITE"
            )
            return answer["UploadId"]

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """The parts that arrived whole, by number."""
        with _refusals(key, upload_id):
            pages = self._calls.get_paginator("list_parts").paginate(
                Bucket=self._bucket, Key=check_key(key), UploadId=upload_id
            )
            found = [part for page in pages for part in page.get("Parts", [])]
        found.sort(key=lambda part: part["LastModified"])  # SeaweedFS lists what came twice twice: the later counts
        parts = {part["PartNumber"]: part for part in found}
        return [Part(number, part["Size"], _digest(part), part["ETag"]) for number, part in sorted(parts.items())]

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        """Make the blob of all ``parts``."""
        try:
            arrived = {part.number: part for part in self.list_parts(key, upload_id)}
            numbers = sorted(part.number for part in parts)
            sizes = {part.number: part.size for part in parts}
            missing = [n for n in numbers if n not in arrived or arrived[n].size != sizes[n]]
            if missing or numbers != list(range(1, len(numbers) + 1)):
                raise PartsMissing(key=key, numbers=missing or sorted(set(range(1, max(numbers) + 1)) - set(numbers)))
            with _refusals(key, upload_id):
                self._calls.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=key,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": [_promise(part, arrived[part.number]) for part in _by_number(parts)]},
                )
        except UploadNotFound:
            found = self.head(key)
            if found is None or found.size != sum(part.size for part in parts):
                raise

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts."""
        with suppress(UploadNotFound), _refusals(key, upload_id):
            self._calls.abort_multipart_upload(Bucket=self._bucket, Key=check_key(key), UploadId=upload_id)

    def sweep_multiparts(self, prefix: str, *, keep: Collection[str], before: float) -> int:
        """Forget old uploads; the store itself forgets those that it does not list."""
        with _refusals(prefix):
            pages = self._calls.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=f"{check_key(prefix.rstrip('/'))}/"
            )
            old = [
                (upload["Key"], upload["UploadId"])
                for page in pages
                for upload in page.get("Uploads", [])
                if upload["UploadId"] not in keep and upload["Initiated"].timestamp() <= before
            ]
        for key, upload_id in old:
            self.abort_multipart(key, upload_id)
        return len(old)

    # ── blobs ────────────────────────────────────────────────────────────────

    def head(self, key: str) -> Stat | None:
        """What is known of the blob; its SHA-256 when it was put in one piece."""
        try:
            with _refusals(key):
                found = self._calls.head_object(Bucket=self._bucket, Key=check_key(key), ChecksumMode="ENABLED")
        except BlobNotFound:
            return None
        return Stat(key, found["ContentLength"], found["LastModified"].timestamp(), _digest(found))

    def open(self, key: str) -> "S3Reader":
        """The blob for reading."""
        found = self.head(key)
        if found is None:
            raise BlobNotFound(digest=key)
        return S3Reader(self._calls, self._bucket, key, found.size)

    def put(self, key: str, data: bytes, sha256: Digest) -> None:
        """Write a small blob."""
        self._put(key, data, sha256, {})

    def put_stream(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: Digest) -> None:
        """Write a blob of any size as it comes: in one call, or in parts, of which one is in memory at a time."""
        length = max(self.stream_part_size, -(-size // MOST_PARTS))
        parts = _regrouped(pieces, length)
        first = next(parts, b"")
        if len(first) < length and size < length:
            self._put(key, first, sha256, {})
        else:
            self._put_parts(check_key(key), chain([first], parts), sha256)

    def _put_parts(self, key: str, pieces: Iterable[bytes], sha256: Digest) -> None:
        whole, parts = hashlib.sha256(), list["CompletedPartTypeDef"]()
        upload_id = self.start_multipart(key, size=0, part_size=0)
        try:
            for number, piece in enumerate(pieces, 1):
                whole.update(piece)
                checksum = Digest.sha256(piece).base64
                with _refusals(key, size=len(piece)):
                    sent = self._calls.upload_part(
                        Bucket=self._bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=piece,
                        ChecksumSHA256=checksum,
                    )  # fmt: skip
                parts.append({"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum})
            if (actual := Digest("sha256", whole.hexdigest())) != sha256:
                raise ChecksumRefused(key=key, actual=str(actual), expected=str(sha256))
            with _refusals(key, upload_id):
                self._calls.complete_multipart_upload(
                    Bucket=self._bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
                )
        except BaseException:
            with suppress(StorageDown):
                self.abort_multipart(key, upload_id)
            raise

    def put_if_absent(self, key: str, data: bytes, sha256: Digest) -> bool:
        """`put`, unless the key is taken; whether it was written."""
        try:
            self._put(key, data, sha256, {"IfNoneMatch": "*"})
        except _Taken:
            return False
        return True

    def _put(self, key: str, data: bytes, sha256: Digest, condition: Mapping[str, Any]) -> None:
        actual = Digest.sha256(data)  # also for a store that checks nothing
        if actual != sha256:
            raise ChecksumRefused(key=key, actual=str(actual), expected=str(sha256))
        with _refusals(key, size=len(data)):
            self._calls.put_object(
                Bucket=self._bucket, Key=check_key(key), Body=data, ChecksumSHA256=sha256.base64, **condition
            )

    def copy(self, source: str, target: str) -> None:
        """Copy inside the store; by parts above what one call may copy."""
        found = self.head(source)
        if found is None:
            raise BlobNotFound(digest=source)
        with _refusals(source, size=found.size):
            if found.size > self.copy_by_parts_above:
                self._copy_by_parts(source, check_key(target), found.size)
            else:
                self._calls.copy_object(
                    Bucket=self._bucket, Key=check_key(target), CopySource={"Bucket": self._bucket, "Key": source}
                )

    def _copy_by_parts(self, source: str, target: str, size: int) -> None:
        upload_id = self._calls.create_multipart_upload(Bucket=self._bucket, Key=target)["UploadId"]
        try:
            parts: list[CompletedPartTypeDef] = []
            for number, start in enumerate(range(0, size, self.copy_part_size), 1):
                copied = self._calls.upload_part_copy(
                    Bucket=self._bucket,
                    Key=target,
                    UploadId=upload_id,
                    PartNumber=number,
                    CopySource={"Bucket": self._bucket, "Key": source},
                    CopySourceRange=f"bytes={start}-{min(start + self.copy_part_size, size) - 1}",
                )
                parts.append({"PartNumber": number, "ETag": copied["CopyPartResult"]["ETag"]})
            self._calls.complete_multipart_upload(
                Bucket=self._bucket, Key=target, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            with suppress(ClientError, BotoCoreError):
                self._calls.abort_multipart_upload(Bucket=self._bucket, Key=target, UploadId=upload_id)
            raise

    def delete(self, key: str) -> None:
        """Remove the blob."""
        with suppress(BlobNotFound), _refusals(key):
            self._calls.delete_object(Bucket=self._bucket, Key=check_key(key))

    def walk(self, prefix: str) -> Iterator[Stat]:
        """All blobs under ``prefix``."""
        with _refusals(prefix):
            pages = self._calls.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{check_key(prefix.rstrip('/'))}/"
            )
            for page in pages:
                for found in page.get("Contents", []):
                    if is_key(found["Key"]):
                        yield Stat(found["Key"], found["Size"], found["LastModified"].timestamp())


class S3Reader:
    """A `BlobReader` that asks for ranges, or streams one answer."""

    def __init__(self, client: "S3Client", bucket: str, key: str, size: int) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        with _refusals(self._key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=f"bytes={offset}-{end - 1}")
            with answer["Body"] as body:
                return body.read()

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """All bytes in order."""
        with _refusals(self._key), self._client.get_object(Bucket=self._bucket, Key=self._key)["Body"] as body:
            while piece := body.read(size):
                yield piece

    def close(self) -> None:
        """Nothing is held between reads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ── botocore in our words ────────────────────────────────────────────────────


class _Taken(Exception):  # noqa: N818  # an answer, not an error
    """If-None-Match: there is something under the key."""


_making = threading.Lock()  # a client may be shared between threads, a session may not
_NOT_THERE = {"404", "NoSuchKey", "NotFound"}
_OTHER_BYTES = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_NO_ROOM = {"507", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "QuotaExceeded"}
_TAKEN = {"412", "PreconditionFailed", "ConditionalRequestConflict"}


@contextmanager
def _refusals(key: str, upload_id: str = "", size: int = 0) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchUpload":
            raise UploadNotFound(upload_id=upload_id, key=key) from error
        if code in _NOT_THERE:
            raise BlobNotFound(digest=key) from error
        if code in _OTHER_BYTES:
            raise ChecksumRefused(key=key, actual="another value", expected="what was promised") from error
        if code in _NO_ROOM or status == 507:
            raise StorageFull(size=size, reason=code) from error
        if code in _TAKEN:
            raise _Taken from error
        raise StorageDown(reason=f"{code} (status {status})") from error
    except (Boto3Error, BotoCoreError, HTTPError) as error:
        raise StorageDown(reason=type(error).__name__) from error


def _client(place: S3Settings, endpoint: str | None) -> "S3Client":
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if place.path_style else "virtual"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=32,
    )
    with _making:
        return _session().client(
            "s3",
            endpoint_url=endpoint,
            region_name=place.region,
            aws_access_key_id=place.access_key,
            aws_secret_access_key=place.secret_key,
            config=config,
        )


@cache
def _session() -> boto3.session.Session:
    """One for all stores: it keeps the description of S3, which takes half a second to read."""
    return boto3.session.Session()


def _digest(answer: Mapping[str, Any]) -> Digest | None:
    """The SHA-256 of all bytes; a checksum of checksums (``…-2``) is none."""
    checksum = str(answer.get("ChecksumSHA256", ""))
    if not checksum or "-" in checksum:
        return None
    return Digest.of_raw("sha256", base64.b64decode(checksum))


def _regrouped(pieces: Iterable[bytes], length: int) -> Iterator[bytes]:
    """The same bytes, ``length`` at a time; only the last may be shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= length:
            yield bytes(held[:length])
            del held[:length]
    if held:
        yield bytes(held)


def _by_number(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.number)


def _promise(promised: Part, arrived: Part) -> "CompletedPartTypeDef":
    sha256 = promised.sha256 or arrived.sha256
    promise: CompletedPartTypeDef = {"PartNumber": promised.number, "ETag": arrived.etag}
    return promise if sha256 is None else {**promise, "ChecksumSHA256": sha256.base64}
