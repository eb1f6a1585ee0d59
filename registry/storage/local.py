"""A folder as a blob store: signed URLs, served by registry/api/store.py, that verify bytes as they arrive.

    <root>/blobs/ab/abcdef…            a blob (staging/{push}/… and other keys likewise, not fanned out)
    <root>/.partial/<random>           one that is still arriving; renamed to its key when whole and on disk
    <root>/.uploads/<id>/about.json    an open multipart upload: key, size, part size
                         data          one sparse file; part n is written at (n − 1) · part size
                         <n>-<sha256>  part n is whole and on disk
                         <n>.lock      held while part n is written

Parts land where they will stay, so completing is one rename and no copy, whatever the size. On disk a blob is
whole or absent: a name appears by rename, link or marker only after fsync. A part holds the shared lock of its
upload (`about.json`) while it is written, completing takes the exclusive one, so nothing writes into a blob.
"""

import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

from registry.core.digest import Digest
from registry.core.errors import (
    BadDigest,
    BadKey,
    BlobNotFound,
    ChecksumRefused,
    PartBusy,
    PartsMissing,
    SignatureRefused,
    StorageDown,
    StorageFull,
    UploadNotFound,
)

from .base import CHECKSUM_HEADER, Part, SignedRequest, Stat, check_key, is_key, part_sizes

Naming = Callable[[Path, Path], object]
"""How a finished partial file gets its name: by rename (replacing), or by link (refusing what is there)."""

STALE_S = 24 * 3600.0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_VECTOR = min(os.sysconf("SC_IOV_MAX"), 1024)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a signed URL allows, all of it covered by the signature."""

    method: str
    key: str
    expires_at: int
    size: int | None = None
    sha256: Digest | None = None
    upload_id: str = ""
    part: int = 0
    filename: str = ""

    def query(self) -> dict[str, str]:
        """The grant as query parameters; method and key stand in the request itself."""
        parameters = {"expires": str(self.expires_at)}
        if self.sha256 is not None:
            parameters |= {"size": str(self.size), "sha256": self.sha256.hex}
        if self.upload_id:
            parameters |= {"upload": self.upload_id, "part": str(self.part)}
        if self.filename:
            parameters["filename"] = self.filename
        return parameters


class LocalStore:
    """A `BlobStore` in the folder ``root``; ``url`` is where `registry.api.store` serves it."""

    def __init__(self, root: Path, url: str, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self.root = root.absolute()
        self.url = url.rstrip("/")
        self._secret = secret
        self._clock = clock
        self._partial = self.root / ".partial"
        self._uploads = self.root / ".uploads"
        with refusals(0):
            for folder in (self._partial, self._uploads):
                folder.mkdir(parents=True, exist_ok=True)
            for left_over in self._partial.iterdir():
                with suppress(FileNotFoundError):  # another process tidies too
                    if clock() - left_over.stat().st_mtime > STALE_S:
                        left_over.unlink()

    # ── signing ──────────────────────────────────────────────────────────────

    def presign_put(self, key: str, *, size: int, sha256: Digest, expires_s: int) -> SignedRequest:
        """A PUT of exactly these bytes."""
        return self._sign(Grant("PUT", check_key(key), self._until(expires_s), size, sha256))

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size: int, sha256: Digest, expires_s: int
    ) -> SignedRequest:
        """A PUT of one part."""
        return self._sign(Grant("PUT", check_key(key), self._until(expires_s), size, sha256, upload_id, number))

    def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> SignedRequest:
        """A GET, with or without ranges."""
        return self._sign(Grant("GET", check_key(key), self._until(expires_s), filename=filename or ""))

    def granted(self, method: str, key: str, query: Mapping[str, str]) -> Grant:
        """The grant that ``query`` carries for this request; `SignatureRefused` unless it is ours and still holds."""
        try:
            grant = Grant(
                method,
                check_key(key),
                int(query["expires"]),
                int(query["size"]) if "size" in query else None,
                Digest.parse(f"sha256:{query['sha256']}") if "sha256" in query else None,
                query.get("upload", ""),
                int(query.get("part", "0")),
                query.get("filename", ""),
            )
        except (BadKey, BadDigest, KeyError, ValueError) as error:
            raise SignatureRefused(reason="the request is not one that was signed") from error
        if not hmac.compare_digest(self._signature(grant), query.get("signature", "").encode()):
            raise SignatureRefused(reason="the signature does not match the request")
        if self._clock() >= grant.expires_at:
            raise SignatureRefused(reason=f"it expired {self._clock() - grant.expires_at:.0f} s ago")
        return grant

    def _until(self, expires_s: int) -> int:
        return int(self._clock()) + expires_s

    def _sign(self, grant: Grant) -> SignedRequest:
        query = grant.query() | {"signature": self._signature(grant).decode()}
        headers = {}
        if grant.sha256 is not None:
            headers = {CHECKSUM_HEADER: grant.sha256.base64, "content-length": str(grant.size)}
        url = f"{self.url}/store/{quote(grant.key)}?{urlencode(query)}"
        return SignedRequest(grant.method, url, grant.expires_at, headers)

    def _signature(self, grant: Grant) -> bytes:
        signed = json.dumps(["loractl/1 store", grant.method, grant.key, grant.query()], sort_keys=True).encode()
        return hmac.new(self._secret, signed, hashlib.sha256).hexdigest().encode()

    # ── bytes on their way in ────────────────────────────────────────────────

    def receive(self, grant: Grant) -> "Landing":
        """Where the bytes of a granted PUT go."""
        if grant.size is None or grant.sha256 is None:
            raise SignatureRefused(reason="it allows no bytes")
        if grant.upload_id:
            return self._land_part(grant.key, grant.upload_id, grant.part, grant.size, grant.sha256)
        return self._land(grant.key, grant.size, grant.sha256, Path.replace)

    def _land(self, key: str, size: int, sha256: Digest, name: Naming) -> "Landing":
        partial = self._partial / secrets.token_hex(16)
        with refusals(size):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        return Landing(
            key,
            descriptor,
            offset=0,
            size=size,
            sha256=sha256,
            keep=lambda: self._name(partial, key, name),
            discard=lambda: partial.unlink(missing_ok=True),
        )

    def _land_part(self, key: str, upload_id: str, number: int, size: int, sha256: Digest) -> "Landing":
        with ExitStack() as held:
            held.enter_context(refusals(size))
            folder, about = held.enter_context(self._upload(key, upload_id, fcntl.LOCK_SH))
            sizes = part_sizes(about["size"], about["part_size"])
            if not 1 <= number <= len(sizes) or size != sizes[number - 1]:
                raise SignatureRefused(reason=f"the upload has no part {number} of {size} bytes")
            held.enter_context(_locked(folder / f"{number}.lock", fcntl.LOCK_EX, key, f"part {number}"))
            for marker in folder.glob(f"{number}-*"):
                marker.unlink()
                _sync_folder(folder)
            descriptor = os.open(folder / "data", os.O_WRONLY)
            locks = held.pop_all()
        return Landing(
            key,
            descriptor,
            offset=(number - 1) * about["part_size"],
            size=size,
            sha256=sha256,
            keep=lambda: _touch(folder / f"{number}-{sha256.hex}"),
            discard=lambda: None,
            release=locks.close,
        )

    def _name(self, partial: Path, key: str, name: Naming) -> None:
        target = self._path(key)
        for last in (False, True):
            _make_folder(target.parent)
            try:
                name(partial, target)
                break
            except FileNotFoundError:  # a delete took the empty folder away in between
                if last:
                    raise
        _sync_folder(target.parent)

    # ── multipart uploads ────────────────────────────────────────────────────

    def start_multipart(self, key: str, *, size: int, part_size: int) -> str:
        """Open an upload; its id."""
        check_key(key)
        upload_id = secrets.token_hex(16)
        folder = self._uploads / upload_id
        with refusals(size):
            try:
                folder.mkdir()
                with (folder / "data").open("wb") as data:
                    data.truncate(size)
                with (folder / "about.json").open("w") as about:
                    json.dump({"key": key, "size": size, "part_size": part_size}, about)
                    about.flush()
                    os.fsync(about.fileno())
                _sync_folder(folder)
                _sync_folder(self._uploads)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return upload_id

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """The parts that arrived whole, by number."""
        with refusals(0), self._upload(key, upload_id, fcntl.LOCK_SH) as (folder, about):
            return _parts(folder, about)

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        """Make the blob of all ``parts``."""
        size = sum(part.size for part in parts)
        try:
            with refusals(size), self._upload(key, upload_id, fcntl.LOCK_EX) as (folder, about):
                arrived = {part.number: part for part in _parts(folder, about)}
                promised = {part.number: part for part in parts}
                wanted = range(1, len(part_sizes(about["size"], about["part_size"])) + 1)
                missing = [number for number in wanted if number not in arrived or number not in promised]
                if missing or size != about["size"]:
                    raise PartsMissing(key=key, numbers=missing or sorted(promised))
                for number in wanted:
                    expected, actual = promised[number].sha256, arrived[number].sha256
                    if expected not in (None, actual):
                        raise ChecksumRefused(key=f"{key}, part {number}", actual=str(actual), expected=str(expected))
                self._name(folder / "data", key, Path.replace)
                shutil.rmtree(folder)
        except UploadNotFound:
            found = self.head(key)
            if found is None or found.size != size:
                raise

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts."""
        with suppress(UploadNotFound), refusals(0), self._upload(key, upload_id, fcntl.LOCK_EX) as (folder, _):
            shutil.rmtree(folder)

    def sweep_multiparts(self, prefix: str, *, keep: Collection[str], before: float) -> int:
        """Forget old uploads, finished by nobody; old is one that no part came to since."""
        gone = 0
        for folder in self._uploads.iterdir():
            with suppress(FileNotFoundError, PartBusy), refusals(0):  # somebody else tidies, or writes
                if folder.name not in keep and folder.stat().st_mtime <= before:
                    gone += self._forget(folder, prefix)
        return gone

    def _forget(self, folder: Path, prefix: str) -> bool:
        about = folder / "about.json"
        if not about.exists():  # died while starting, or while tidying
            shutil.rmtree(folder)
            return True
        with _locked(about, fcntl.LOCK_EX, folder.name, "its parts"):
            key = json.loads(about.read_text() or "{}").get("key", prefix)
            if not key.startswith(prefix):
                return False
            shutil.rmtree(folder)
            return True

    @contextmanager
    def _upload(self, key: str, upload_id: str, lock: int) -> Iterator[tuple[Path, dict[str, int]]]:
        folder = self._uploads / upload_id
        if len(upload_id) != 32 or not upload_id.isalnum():
            raise UploadNotFound(upload_id=upload_id[:64], key=key)
        try:
            with _locked(folder / "about.json", lock, key, "its parts"):
                about = json.loads((folder / "about.json").read_text() or '{"key": ""}')  # empty: died while starting
                if about["key"] != key or not (folder / "data").exists():  # no data: completed, and died before tidying
                    raise UploadNotFound(upload_id=upload_id, key=key)
                yield folder, about
        except FileNotFoundError as error:
            raise UploadNotFound(upload_id=upload_id, key=key) from error

    # ── blobs ────────────────────────────────────────────────────────────────

    def head(self, key: str) -> Stat | None:
        """What is known of the blob; its SHA-256 is not kept."""
        try:
            with refusals(0):
                return _stat(key, self._path(key))
        except FileNotFoundError:
            return None

    def path(self, key: str) -> Path:
        """The file of a blob that is there, to be read and not changed; `BlobNotFound`."""
        if self.head(key) is None:
            raise BlobNotFound(digest=key)
        return self._path(key)

    def open(self, key: str) -> "LocalReader":
        """The blob for reading."""
        return LocalCopy(self.root).open(key)

    def put(self, key: str, data: bytes, sha256: Digest) -> None:
        """Write a small blob."""
        self._put(key, data, sha256, Path.replace)

    def put_stream(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: Digest) -> None:
        """Write a blob of any size as it comes."""
        with closing(self._land(check_key(key), size, sha256, Path.replace)) as landing:
            try:
                for piece in pieces:
                    landing.write([piece])
                landing.keep()
            except SignatureRefused as error:
                actual, expected = "another number of bytes", f"{sha256} of {size} bytes"
                raise ChecksumRefused(key=key, actual=actual, expected=expected) from error

    def put_if_absent(self, key: str, data: bytes, sha256: Digest) -> bool:
        """`put`, unless the key is taken; whether it was written."""
        try:
            self._put(key, data, sha256, os.link)
        except FileExistsError:
            return False
        return True

    def _put(self, key: str, data: bytes, sha256: Digest, name: Naming) -> None:
        with closing(self._land(check_key(key), len(data), sha256, name)) as landing:
            landing.write([data])
            landing.keep()

    def copy(self, source: str, target: str) -> None:
        """A hard link: blobs never change, so two names may share the bytes."""
        partial = self._partial / secrets.token_hex(16)
        try:
            with refusals(0):
                try:
                    os.link(self._path(source), partial)
                    self._name(partial, check_key(target), Path.replace)
                finally:
                    partial.unlink(missing_ok=True)  # renaming over a link of the same file leaves both
        except FileNotFoundError as error:
            raise BlobNotFound(digest=source) from error

    def delete(self, key: str) -> None:
        """Remove the blob, and its folders when nothing else is in them."""
        path = self._path(key)
        with refusals(0):
            path.unlink(missing_ok=True)
            if not key.startswith("blobs/"):
                with suppress(OSError):  # not empty, or gone
                    for folder in path.parents[: key.count("/") - 1]:
                        folder.rmdir()

    def walk(self, prefix: str) -> Iterator[Stat]:
        """All blobs under ``prefix``."""
        for folder, _, names in os.walk(self.root / check_key(prefix.rstrip("/"))):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if is_key(key := self._key(path)):
                        yield _stat(key, path)

    def _path(self, key: str) -> Path:
        return _place(self.root, key)

    def _key(self, path: Path) -> str:
        parts = path.relative_to(self.root).parts
        return f"blobs/{'/'.join(parts[2:])}" if parts[0] == "blobs" else "/".join(parts)


@contextmanager
def refusals(size: int) -> Iterator[None]:
    """Disk errors in the words of the store; FileNotFoundError and FileExistsError stay, they mean something here."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(size=size, reason=os.strerror(error.errno)) from error
        raise StorageDown(reason=error.strerror or type(error).__name__) from error


class Landing:
    """Bytes on their way in: hashed while they are written, then kept whole, or gone.

    Each call may come from another thread. Closing without `keep` discards.
    """

    def __init__(
        self,
        key: str,
        descriptor: int,
        *,
        offset: int,
        size: int,
        sha256: Digest,
        keep: Callable[[], None],
        discard: Callable[[], object],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._key = key
        self._descriptor = descriptor
        self._offset = offset
        self._size = size
        self._sha256 = sha256
        self._keep = keep
        self._discard = discard
        self._release = release
        self._hash = hashlib.sha256()
        self._arrived = 0
        self._busy = threading.Lock()
        self._closed = False

    def write(self, chunks: Sequence[bytes]) -> None:
        """Hash and write; `SignatureRefused` as soon as more arrives than was signed."""
        with self._busy:
            if self._closed:
                return  # the request was cancelled
            self._arrived += sum(map(len, chunks))
            if self._arrived > self._size:
                raise SignatureRefused(reason=f"it allows {self._size} bytes and more arrived")
            for chunk in chunks:
                self._hash.update(chunk)
            with refusals(self._size):
                for start in range(0, len(chunks), _VECTOR):
                    self._offset = _write_all(self._descriptor, chunks[start : start + _VECTOR], self._offset)

    def keep(self) -> None:
        """Give the bytes their name, on disk for good; `ChecksumRefused` or `SignatureRefused` when they are others."""
        with self._busy:
            if self._closed:
                return
            if self._arrived != self._size:
                raise SignatureRefused(reason=f"it is for {self._size} bytes and {self._arrived} arrived")
            actual = Digest("sha256", self._hash.hexdigest())
            if actual != self._sha256:
                raise ChecksumRefused(key=self._key, actual=str(actual), expected=str(self._sha256))
            with refusals(self._size):
                os.fsync(self._descriptor)
                self._keep()

    def close(self) -> None:
        """Discard what was not kept, and let go; a write that is under way in another thread ends first."""
        with self._busy:
            self._closed = True
            os.close(self._descriptor)
            self._discard()  # what has its name by now stays
            self._release()


class LocalCopy:
    """Blobs in a folder laid out as a `LocalStore` or a backup lays them, for reading and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, key: str) -> "LocalReader":
        """The blob for reading."""
        try:
            with refusals(0):
                return LocalReader(os.open(_place(self.root, key), os.O_RDONLY))
        except FileNotFoundError as error:
            if not self.root.is_dir():
                raise StorageDown(reason=f"there is no folder {self.root}") from error
            raise BlobNotFound(digest=key) from error


def _place(root: Path, key: str) -> Path:
    first, _, rest = check_key(key).partition("/")
    return root / first / rest[:2] / rest if first == "blobs" and rest else root / key


class LocalReader:
    """A `BlobReader` on an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``."""
        with refusals(0):
            pieces = []
            while length > 0 and (piece := os.pread(self._descriptor, length, offset)):
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """All bytes in order."""
        for offset in range(0, self.size, size):
            yield self.read(offset, size)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_all(descriptor: int, chunks: Sequence[bytes], offset: int) -> int:
    """Write ``chunks`` at ``offset`` without joining them; the offset behind them."""
    end = offset + sum(map(len, chunks))
    offset += os.pwritev(descriptor, chunks, offset)
    if offset < end:  # a short write: rare, so the rest may be joined
        rest = memoryview(b"".join(chunks))[offset - end :]
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            offset, rest = offset + written, rest[written:]
    return offset


def _parts(folder: Path, about: Mapping[str, int]) -> list[Part]:
    sizes = part_sizes(about["size"], about["part_size"])
    found = []
    for marker in folder.glob("*-*"):
        number, _, hexadecimal = marker.name.partition("-")
        found.append(Part(int(number), sizes[int(number) - 1], Digest("sha256", hexadecimal), hexadecimal))
    return sorted(found, key=lambda part: part.number)


@contextmanager
def _locked(path: Path, lock: int, key: str, what: str) -> Iterator[None]:
    flags = os.O_RDWR if path.name == "about.json" else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PartBusy(key=key, what=what) from error
    finally:
        os.close(descriptor)


def _stat(key: str, path: Path) -> Stat:
    found = path.stat()
    return Stat(key, found.st_size, found.st_mtime)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _touch(path: Path) -> None:
    path.touch()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
