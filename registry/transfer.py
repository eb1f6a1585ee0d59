"""Bytes between folders and the blob store: parallel, resumable, verified, in bounded memory.

    push   hash → open (want/have) → send only what is needed → commit, and wait while it is verified
           of a base: open a draft → hash what is new while it is sent → seal → what is still needed → commit
    pull   signed GETs → ranges into <out>/.partial/<digest>… → verify → fsync → rename

A push that was killed goes on where it stopped: the same folder gives the same manifest, the registry
gives back the caller's open push of it, and parts that arrived are not sent again. A pull that was killed
goes on from the ranges that its journal lists. A file has its final name only after its SHA-256 was seen
to be right. Signed URLs that are refused are asked for once more; the token never travels with them.
"""

import base64
import errno
import fcntl
import hashlib
import json
import math
import os
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import urllib3

from . import files
from .client import PAUSE_S, TRIES, RegistryClient, user_agent
from .core.base_model import BaseModel
from .core.digest import Digest
from .core.errors import (
    BadManifest,
    BadPath,
    BlobNotFound,
    ChecksumRefused,
    DigestMismatch,
    DraftTaken,
    LocalFailure,
    LoractlError,
    PathUnusable,
    PushExpired,
    PushRejected,
    RouteNotFound,
    SignatureRefused,
    StorageDown,
)
from .core.manifest import FileEntry, Kind, Lineage, Listing, Manifest, check_path
from .core.signatures import Bundle
from .core.suites import SuiteSpec
from .files import HashCache, Scan, Sketch
from .schemas import (
    BlobState,
    Download,
    PartsRequest,
    PartWanted,
    PushInfo,
    PushRequest,
    SealRequest,
    SignatureRequest,
    SignedRequest,
    Wishes,
)

Progress = Callable[[str, int, int], None]
"""(what is going on, bytes done, bytes in all); called from many threads, one at a time."""
Refresh = Callable[[], Sequence[Download]]
Sign = Callable[[Manifest], dict[str, Any]]
"""From a manifest to a bundle that signs it (`registry.core.signatures`)."""
Opening = Callable[[PushRequest], PushInfo]
"""How a push is opened: by a person, or for a job."""

THREADS = 8
CHUNK = 1 << 18
"""Read at once: larger pieces are given back to the system and faulted in anew, which costs more than the bytes."""
RANGE = 16 << 20
"""A pull's unit: what is fetched by one request, and lost at most per thread when the pull is killed."""
PARTIAL = ".partial"
_PASSING = {408, 429, 500, 502, 503, 504}
Result = TypeVar("Result")


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


# ── push ─────────────────────────────────────────────────────────────────────


def push_adapter(
    client: RegistryClient,
    folder: Path,
    name: str,
    base: str,
    wishes: Wishes | None = None,
    *,
    lineage: Lineage | None = None,
    sign: Sign | None = None,
    progress: Progress = silent,
    cache: HashCache | None = None,
    threads: int = THREADS,
) -> PushInfo:
    """Push the adapter in ``folder`` as the next version of ``name``, bound to the base digest ``base``.

    An unchanged adapter is one request and no bytes. ``sign`` makes the bundle that signs its manifest; where it came
    too late for a push that was just being verified, it is added afterwards.
    """
    scan = scanned("adapter", folder, base=Digest.parse(base), lineage=lineage, progress=progress, cache=cache)
    bundle = sign(scan.manifest) if sign is not None else None
    info = push(
        client, "adapter", name, scan, wishes, signatures=[bundle] if bundle else [], progress=progress, threads=threads
    )
    if bundle and Bundle.parse(bundle, name).key not in (info.outcome or {}).get("signed", []):
        client.sign(name, str(scan.manifest.digest), SignatureRequest(bundle=bundle))
    return info


def push_base(
    client: RegistryClient,
    folder: Path,
    wishes: Wishes | None = None,
    *,
    base: BaseModel | None = None,
    progress: Progress = silent,
    cache: HashCache | None = None,
    threads: int = THREADS,
) -> PushInfo:
    """Push the base model in ``folder`` with its weights; ``base`` is its table when it is known already."""
    base = base or digested(folder, progress=progress, cache=cache)

    def opening(request: PushRequest) -> PushInfo:
        return client.open_push("base", None, request)

    return send_base(client, opening, folder, base, wishes, progress=progress, cache=cache, threads=threads)


def send_base(
    client: RegistryClient,
    opening: Opening,
    folder: Path,
    base: BaseModel,
    wishes: Wishes | None = None,
    *,
    lineage: Lineage | None = None,
    progress: Progress = silent,
    cache: HashCache | None = None,
    threads: int = THREADS,
) -> PushInfo:
    """Push the base model in ``folder`` by ``opening``; large files that are new to the registry are hashed while sent.

    A base that is there already is one request, and no file of it is read. A registry that does not know drafts is
    told all digests at once, and so is one where other files go by the same draft.
    """
    scan, table = None, table_of(base)
    if sketch := files.sketch_base(folder, base.digest, lineage=lineage, cache=cache):
        with suppress(BadManifest, DraftTaken, RouteNotFound):
            info = opening(_request(sketch.draft, wishes, table))
            if info.state == "committed":
                return info
            if not info.sealed:
                digests = _hash_and_send(client, info, sketch, progress, cache, threads)
                scan = Scan(sketch.draft.sealed(digests), sketch.files)
                info = client.seal(info.id, SealRequest(digests=digests))
                return finish_push(client, info, scan, progress=progress, threads=threads)
    if scan is None:
        scan = scanned("base", folder, base=base.digest, lineage=lineage, progress=progress, cache=cache)
    info = opening(request_of(scan, wishes, table))
    return finish_push(client, info, scan, progress=progress, threads=threads)


def push_dataset(
    client: RegistryClient,
    kind: Literal["dataset", "suite"],
    file: Path,
    name: str,
    *,
    spec: dict[str, Any] | None = None,
    message: str = "",
    progress: Progress = silent,
    cache: HashCache | None = None,
) -> PushInfo:
    """Push a JSONL file as the next version of a dataset or suite; ``spec`` is what belongs to its identity.

    A suite may be a folder of such files. Its spec is checked before anything is sent.
    """
    if kind == "suite":
        SuiteSpec.parse(spec or {})
    scan = scanned(kind, file, config=spec, progress=progress, cache=cache)
    try:
        return push(client, kind, name, scan, Wishes(message=message), progress=progress)
    except LoractlError as error:
        if file.is_dir() or error.facts.get("path") != files.DATA_FILE:
            raise
        reason = str(error.facts.get("reason", "")).replace(files.DATA_FILE, file.name)
        raise type(error)(**error.facts | {"path": file.name, "reason": reason}) from error


def push(
    client: RegistryClient,
    kind: Kind,
    name: str | None,
    scan: Scan,
    wishes: Wishes | None = None,
    *,
    table: str | None = None,
    signatures: Sequence[dict[str, Any]] = (),
    progress: Progress = silent,
    threads: int = THREADS,
) -> PushInfo:
    """Open a push of what was scanned, send what is needed, and commit."""
    request = request_of(scan, wishes, table).model_copy(update={"signatures": list(signatures)})
    info = client.open_push(kind, name, request)
    return finish_push(client, info, scan, progress=progress, threads=threads)


def finish_push(
    client: RegistryClient,
    info: PushInfo,
    scan: Scan,
    *,
    progress: Progress = silent,
    threads: int = THREADS,
) -> PushInfo:
    """Send what the opened push ``info`` needs and see it verified; a job's push is committed with the job."""
    if info.state == "committed":
        return info
    paths = {entry.digest: scan.files[entry.path] for entry in scan.manifest.files}
    upload(client, info, paths, progress=progress, threads=threads)
    return settle(client, info.id, progress=progress)


def request_of(scan: Scan, wishes: Wishes | None = None, table: str | None = None) -> PushRequest:
    """The body that opens a push of what was scanned."""
    return _request(scan.manifest, wishes, table)


def _request(listing: Listing, wishes: Wishes | None, table: str | None) -> PushRequest:
    manifest = listing.model_dump(mode="json", by_alias=True)
    return PushRequest(manifest=manifest, wishes=wishes or Wishes(), table=table)


def table_of(base: BaseModel) -> str:
    """The tensor table as it travels: base64 of its compressed form."""
    return base64.b64encode(base.to_compressed()).decode("ascii")


def digested(
    folder: Path,
    *,
    progress: Progress = silent,
    cache: HashCache | None = None,
    taken: Mapping[str, str] | None = None,
) -> BaseModel:
    """`files.digest_base`, telling how much of how much is hashed."""
    total = sum(path.stat().st_size for path in files.base_shards(folder))
    meter = _Meter(progress, "hashing base", total)
    return files.digest_base(folder, progress=meter.add, cache=cache, taken=taken)


def scanned(
    kind: Kind,
    folder: Path,
    *,
    base: Digest | None = None,
    config: dict[str, Any] | None = None,
    lineage: Lineage | None = None,
    progress: Progress = silent,
    cache: HashCache | None = None,
) -> Scan:
    """`files.scan_folder`, telling how much of how much is hashed."""
    there = [folder] if folder.is_file() else [path for path in folder.glob("*") if path.is_file()]
    meter = _Meter(progress, f"hashing {kind} files", sum(path.stat().st_size for path in there))
    return files.scan_folder(
        kind, folder, base=base, config=config, lineage=lineage, progress=meter.add, cache=cache
    )


def upload(
    client: RegistryClient,
    info: PushInfo,
    paths: Mapping[str, Path],
    *,
    progress: Progress = silent,
    threads: int = THREADS,
) -> None:
    """Send every blob of ``info`` that is still needed, single ones whole and large ones in parts.

    Parts are hashed before they are sent (the URL is signed for their SHA-256) and read again while they
    are sent, from the page cache, so that memory does not grow with the size of parts.
    """
    needed = [blob for blob in info.blobs if blob.state == "needed"]
    if not needed:
        return
    meter = _Meter(progress, "sending", sum(blob.size for blob in needed))
    with _Store(threads) as store, _Crew(threads) as crew:
        sender = _Sender(client, info.id, store, crew, meter)
        for blob in needed:
            sender.send(blob, paths[blob.digest], threads)


def _hash_and_send(
    client: RegistryClient,
    info: PushInfo,
    sketch: Sketch,
    progress: Progress,
    cache: HashCache | None,
    threads: int,
) -> dict[str, str]:
    """The digests of all late files, path -> digest; everything that the registry asked for is in the store by then."""
    new = {blob.path: blob for blob in info.blobs if blob.path is not None}
    known = {entry.digest: sketch.files[entry.path] for entry in sketch.draft.files if isinstance(entry, FileEntry)}
    needed = [blob for blob in info.blobs if blob.state == "needed"]
    meter = _Meter(progress, "sending", sum(blob.size for blob in needed))
    digests: dict[str, Digest] = {}
    with _Store(threads) as store, _Crew(threads) as crew:
        sender = _Sender(client, info.id, store, crew, meter)
        for path, blob in new.items():
            digests[path] = sender.late(blob, sketch.files[path], threads)
        for blob in needed:
            if blob.path is None:
                sender.send(blob, known[blob.digest], threads)
        rest = {entry.path: sketch.files[entry.path] for entry in sketch.draft.late if entry.path not in new}
        hashing = {path: crew.do(files.sha256_file, file, None, cache) for path, file in rest.items()}
    if cache:
        for path, digest in digests.items():
            cache.put(sketch.files[path], "sha256", str(digest))
    found = digests | {path: future.result() for path, future in hashing.items()}
    return {path: str(digest) for path, digest in found.items()}


class Stretch(NamedTuple):
    """Bytes of a file that are sent as one object."""

    path: Path
    offset: int
    length: int


def send(wanted: Iterable[tuple[Stretch, SignedRequest]], check: Callable[[], None] = lambda: None) -> None:
    """Make the signed PUT of each stretch, one after another; ``check`` is called between chunks and may end it."""

    def chunks(one: Stretch) -> Iterator[bytes]:
        left = one.length
        with one.path.open("rb", buffering=0) as file:
            file.seek(one.offset)
            while chunk := file.read(min(CHUNK, left)):
                check()
                yield chunk
                left -= len(chunk)

    with _Store(1) as store:
        for one, signed in wanted:
            store.put(signed, partial(chunks, one), str(one.path))


def settle(
    client: RegistryClient,
    push_id: str,
    *,
    progress: Progress = silent,
    sleep: Callable[[float], None] = time.sleep,
) -> PushInfo:
    """Ask for the commit until the push is committed (a job's: verified); raises what it was rejected for."""
    pause, waited = 0.05, 0
    while True:
        info = client.commit(push_id)
        if info.state in ("committed", "verified"):
            return info
        if info.state == "rejected":
            raise rejection(info)
        if info.state in ("expired", "aborted"):
            raise PushExpired(id=info.id, state=info.state, since=info.expires_at.isoformat())
        waited += 1
        progress("verifying", waited, 0)
        sleep(pause)
        pause = min(2.0, pause * 1.5)


def rejection(info: PushInfo) -> LoractlError:
    """The one finding as itself; several as one refusal that lists them."""
    if len(info.findings) == 1:
        return LoractlError.from_problem(info.findings[0])
    details = "; ".join(str(finding.get("detail", finding)) for finding in info.findings)
    return PushRejected(id=info.id, findings=details or "no reason was given")


class _Sender:
    """The work of one push, as functions for a crew."""

    def __init__(
        self, client: RegistryClient, push_id: str, store: "_Store", crew: "_Crew", meter: "_Meter"
    ) -> None:
        self.client, self.push_id, self.store, self.crew, self.meter = client, push_id, store, crew, meter

    def send(self, blob: BlobState, path: Path, threads: int) -> None:
        """Hand a blob to the crew, whole or in parts."""
        if blob.part_size is None:
            self.crew.do(self.whole, blob, path)
        else:
            self.parts(blob, blob.part_size, path, threads)

    def whole(self, blob: BlobState, path: Path) -> None:
        """Send a blob in one request."""
        self._put(path, 0, blob.size, lambda: self._whole_url(blob), blob.put)

    def parts(self, blob: BlobState, part_size: int, path: Path, threads: int) -> None:
        """Hand the parts that have not arrived to the crew, a few at a time so that requests are few."""
        arrived = self.client.parts(self.push_id, PartsRequest(digest=blob.digest)).arrived
        self.meter.add(sum(_length(blob.size, part_size, number) for number in arrived))
        missing = [number for number in range(1, _count(blob, part_size) + 1) if number not in arrived]
        for numbers in _some(missing, threads):
            self.crew.do(self._some_parts, blob, part_size, path, numbers)

    def late(self, blob: BlobState, path: Path, threads: int) -> Digest:
        """The digest of a file, read in order; each part is handed to the crew behind the reader, so that it is sent
        from the page cache.

        All parts are offered, those that arrived too: their checksums tell whether another file goes by the same name.
        """
        part_size = blob.part_size or blob.size
        hashed, offset = hashlib.sha256(), 0
        for numbers in _some(range(1, _count(blob, part_size) + 1), threads):
            length = sum(_length(blob.size, part_size, number) for number in numbers)
            for chunk in self._chunks(path, offset, length):
                hashed.update(chunk)
            offset += length
            self.crew.do(self._some_parts, blob, part_size, path, numbers)
        return Digest("sha256", hashed.hexdigest())

    def _some_parts(self, blob: BlobState, part_size: int, path: Path, numbers: Sequence[int]) -> None:
        wanted = []
        for number in numbers:
            chunks = self._chunks(path, (number - 1) * part_size, _length(blob.size, part_size, number))
            hashed = hashlib.sha256()
            for chunk in chunks:
                hashed.update(chunk)
            wanted.append(PartWanted(number=number, sha256=f"sha256:{hashed.hexdigest()}"))
        signed = self._part_urls(blob, wanted)
        for part in wanted:
            length = _length(blob.size, part_size, part.number)
            if part.number in signed:
                offset = (part.number - 1) * part_size
                fresh = partial(self._part_url, blob, part)
                self._put(path, offset, length, fresh, signed[part.number])
            else:
                self.meter.add(length)

    def _part_urls(self, blob: BlobState, wanted: list[PartWanted]) -> dict[int, SignedRequest]:
        return self.client.parts(self.push_id, PartsRequest(digest=blob.digest, parts=wanted)).put

    def _part_url(self, blob: BlobState, part: PartWanted) -> SignedRequest | None:
        return self._part_urls(blob, [part]).get(part.number)

    def _whole_url(self, blob: BlobState) -> SignedRequest | None:
        fresh = {found.digest: found for found in self.client.push(self.push_id).blobs}
        return fresh[blob.digest].put if blob.digest in fresh else None

    def _put(
        self,
        path: Path,
        offset: int,
        length: int,
        fresh: Callable[[], SignedRequest | None],
        signed: SignedRequest | None,
    ) -> None:
        """Send one range of a file; a refused URL is asked for once more (None: it has arrived meanwhile)."""
        signed = signed or fresh()
        for attempt in (1, 2):
            if signed is None:
                break
            try:
                self.store.put(signed, lambda: self._chunks(path, offset, length), str(path))
                break
            except SignatureRefused:
                if attempt == 2:
                    raise
                signed = fresh()
        self.meter.add(length)

    def _chunks(self, path: Path, offset: int, length: int) -> Iterator[bytes]:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while length:
                self.crew.check()
                chunk = file.read(min(CHUNK, length))
                if not chunk:
                    raise PathUnusable(path=str(path), reason="it became shorter while it was read")
                length -= len(chunk)
                yield chunk


def _count(blob: BlobState, part_size: int) -> int:
    return math.ceil(blob.size / part_size)


def _some(numbers: Sequence[int], threads: int) -> Iterator[Sequence[int]]:
    """A few parts at a time, so that requests are few and every thread has work."""
    step = max(1, min(8, len(numbers) // (2 * threads)))
    return (numbers[start : start + step] for start in range(0, len(numbers), step))


def _length(size: int, part_size: int, number: int) -> int:
    return min(part_size, size - (number - 1) * part_size)


# ── pull ─────────────────────────────────────────────────────────────────────


def pull(
    client: RegistryClient,
    manifest: str,
    out: Path,
    *,
    progress: Progress = silent,
    threads: int = THREADS,
) -> list[Path]:
    """All files of the version with digest ``manifest`` into the folder ``out``, verified; what was written."""

    def downloads() -> Sequence[Download]:
        return client.downloads([manifest]).files[manifest]

    return fetch(downloads(), out, refresh=downloads, progress=progress, threads=threads)


def fetch(
    wanted: Sequence[Download],
    out: Path,
    *,
    refresh: Refresh,
    progress: Progress = silent,
    threads: int = THREADS,
) -> list[Path]:
    """Every file of ``wanted`` under ``out``; identical files stay, others are replaced once all are verified.

    ``refresh`` gives the same files with fresh URLs. Ranges arrive in parallel while they are hashed in
    order behind them.
    """
    urls = _Urls(wanted, refresh)
    with _local_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        targets = {file.path: _inside(out, file.path) for file in wanted}
        lacking = [file for file in wanted if not _holds(targets[file.path], file)]
        if len(lacking) > 1:  # a configuration that stays would load half of them: it goes, and comes, with the others
            lacking += [file for file in wanted if file.path.endswith("config.json") and file not in lacking]
    meter = _Meter(progress, "receiving", sum(file.size for file in lacking))
    partials: list[_Partial] = []
    window: deque[tuple[_Partial, int, Future[None] | None]] = deque()

    def retire() -> None:
        arriving, number, task = window.popleft()
        if task is not None:
            task.result()
        arriving.take(number)

    with _Store(threads) as store, _Crew(threads) as crew:
        try:
            for file in lacking:
                arriving = _Partial(out, targets[file.path], file)
                partials.append(arriving)
                for number in range(arriving.count):
                    present = number in arriving.arrived
                    if present:
                        meter.add(arriving.length(number))
                    task = None if present else crew.do(_receive, store, urls, arriving, number, crew, meter)
                    window.append((arriving, number, task))
                    while len(window) > 4 * threads:
                        retire()
            while window:
                retire()
            _place(partials)
        except BaseException:
            crew.stop()
            raise
        finally:
            crew.drain()
            for arriving in partials:
                arriving.close()
    with suppress(OSError):  # not empty: another pull's
        (out / PARTIAL).rmdir()
    return [targets[file.path] for file in lacking]


def _place(arrived: Sequence["_Partial"]) -> None:
    """Give all files their names at once: of two versions no folder is a mixture that loads, whoever dies in between.

    So a configuration goes before anything comes, and comes after all else.
    """
    ordered = sorted(arrived, key=lambda one: one.target.name.endswith("config.json"))
    if len(ordered) > 1:
        for one in ordered:
            if one.target.name.endswith("config.json"):
                with _local_disk(one.target):
                    one.target.unlink(missing_ok=True)
    for one in ordered:
        with _local_disk(one.target):
            one.place()


def _receive(store: "_Store", urls: "_Urls", file: "_Partial", number: int, crew: "_Crew", meter: "_Meter") -> None:
    """One range into its place; taken up again where a connection broke."""
    start, length = number * RANGE, file.length(number)
    done, refreshed = 0, False
    for attempt in range(TRIES):
        signed = urls.of(file.file.path)
        try:
            with _local_disk(file.path):
                for chunk in store.get(signed, start + done, length - done, whole=file.count == 1 and not done):
                    crew.check()
                    file.write(chunk, start + done)
                    done += len(chunk)
                    meter.add(len(chunk))
            if done == length:
                with _local_disk(file.path):
                    file.mark(number)
                return
        except SignatureRefused:
            if refreshed:
                raise
            refreshed = True
            urls.renew(signed)
        except StorageDown:
            if attempt == TRIES - 1:
                raise
        crew.sleep(PAUSE_S * 2**attempt)
    raise StorageDown(reason=f"'{file.file.path}' ended after {done} of {length} bytes, {TRIES} times")


class _Partial:
    """A file on its way: ``<out>/.partial/<name>`` and, beside it, the journal of the ranges that are whole."""

    def __init__(self, out: Path, target: Path, file: Download) -> None:
        self.file, self.target = file, target
        self.count = max(1, math.ceil(file.size / RANGE))
        self.arrived: set[int] = set()
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        name = f"{Digest.parse(file.digest).hex}-{hashlib.sha256(file.path.encode()).hexdigest()[:8]}"
        self.path = out / PARTIAL / name
        self._journal = out / PARTIAL / f"{name}.done"
        with _local_disk(target):
            self.path.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._reserve()
            except BaseException:
                os.close(self._descriptor)
                raise
            self._marks = self._journal.open("a")

    def _reserve(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PathUnusable(path=str(self.target), reason="another pull is writing it") from error
        with suppress(FileNotFoundError):
            marks = self._journal.read_text().split("\n")[:-1]  # behind the last newline: a mark that was cut off
            self.arrived = {int(mark) for mark in marks if mark.isdigit()}
        if os.fstat(self._descriptor).st_size != self.file.size:
            self.arrived = set()
            self._journal.unlink(missing_ok=True)
            os.ftruncate(self._descriptor, 0)
            if self.file.size:
                _allocate(self._descriptor, self.file.size)

    def length(self, number: int) -> int:
        """Bytes of range ``number``."""
        return min(RANGE, self.file.size - number * RANGE)

    def write(self, data: bytes, offset: int) -> None:
        """Put bytes in their place."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def mark(self, number: int) -> None:
        """Note that a range is whole."""
        with self._lock:
            self._marks.write(f"{number}\n")
            self._marks.flush()

    def take(self, number: int) -> None:
        """Hash the next range; behind the last one verify and sync."""
        offset, end = number * RANGE, number * RANGE + self.length(number)
        while offset < end:
            chunk = os.pread(self._descriptor, min(CHUNK, end - offset), offset)
            self._hash.update(chunk)
            offset += len(chunk)
        if number == self.count - 1:
            with _local_disk(self.target):
                self._finish()

    def _finish(self) -> None:
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != self.file.digest:
            self.close()
            self.path.unlink()
            self._journal.unlink()
            raise DigestMismatch(
                path=self.file.path, actual=actual, expected=self.file.digest, size=self.file.size
            )
        os.fsync(self._descriptor)
        self._marks.close()

    def place(self) -> None:
        """Give the file, which was verified, its name."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.replace(self.target)
        self._journal.unlink()
        self.close()
        files.sync_folder(self.target.parent)

    def close(self) -> None:
        """Let go of the files; closing again is fine."""
        self._marks.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Urls:
    """The signed GET of each path; renewed together when one is refused."""

    def __init__(self, wanted: Sequence[Download], refresh: Refresh) -> None:
        self._refresh = refresh
        self._lock = threading.Lock()
        self._signed = {file.path: file.get for file in wanted}

    def of(self, path: str) -> SignedRequest:
        with self._lock:
            return self._signed[path]

    def renew(self, refused: SignedRequest) -> None:
        """Ask for fresh URLs, unless somebody did since ``refused`` was given out."""
        with self._lock:
            if any(signed is refused for signed in self._signed.values()):
                self._signed = {file.path: file.get for file in self._refresh()}


def _allocate(descriptor: int, size: int) -> None:
    """Take all of the room at once, so that a full disk is found first; where that cannot be, only the size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # macOS has none, some file systems neither
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _inside(out: Path, path: str) -> Path:
    """Where ``path`` lies under ``out``; `BadPath` when that would be elsewhere, through links too."""
    target = out / check_path(path)
    if path.split("/", maxsplit=1)[0] == PARTIAL:
        raise BadPath(path=path, rule=f"'{PARTIAL}' is where files lie while they arrive")
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise BadPath(path=path, rule=f"it would lie outside of {out}")
    if target.is_dir():
        raise PathUnusable(path=str(target), reason="a folder is in the way")
    return target


def _holds(target: Path, file: Download) -> bool:
    return target.is_file() and target.stat().st_size == file.size and str(files.sha256_file(target)) == file.digest


# ── the store, threads, the disk ─────────────────────────────────────────────


class _Store:
    """Signed requests to the blob store, without our token; tried again while that may help.

    By urllib3, which takes a third of the processor time that httpx takes to receive bytes. Proxies and
    certificates are those that httpx would use, so that store and registry are reached the same way.
    """

    def __init__(self, threads: int) -> None:
        self._proxies = urllib.request.getproxies()
        self._options: dict[str, Any] = {
            "headers": {"user-agent": user_agent(), "accept-encoding": "identity"},
            "maxsize": threads + 1,
            "retries": False,
            "ssl_context": httpx.create_ssl_context(),
            "timeout": urllib3.Timeout(connect=10, read=60),
        }
        self._straight = urllib3.PoolManager(**self._options)
        self._around: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pools in (self._straight, *self._around.values()):
            pools.clear()

    def put(self, signed: SignedRequest, body: Callable[[], Iterator[bytes]], what: str) -> None:
        """Make the signed PUT with a fresh ``body`` each time."""
        for attempt in range(TRIES):
            try:
                with closing(self._send(signed, {}, body())) as reply:
                    if reply.status < 300:
                        reply.drain_conn()
                        return
                    refusal, passing = _store_refusal(reply, what), reply.status in _PASSING
            except urllib3.exceptions.HTTPError as error:
                refusal, passing = StorageDown(reason=str(error) or type(error).__name__), True
            if not passing or attempt == TRIES - 1:
                raise refusal
            time.sleep(PAUSE_S * 2**attempt)

    def get(self, signed: SignedRequest, offset: int, length: int, *, whole: bool) -> Iterator[bytes]:
        """Bytes of a range; `StorageDown` when the connection breaks."""
        if not length:
            return
        ranged = {} if whole else {"range": f"bytes={offset}-{offset + length - 1}"}
        try:
            with closing(self._send(signed, ranged, None)) as reply:
                if reply.status != (200 if whole else 206):
                    raise _store_refusal(reply, signed.url.partition("?")[0])
                while length and (chunk := reply.read(min(CHUNK, length))):
                    yield chunk
                    length -= len(chunk)
        except urllib3.exceptions.HTTPError as error:
            raise StorageDown(reason=str(error) or type(error).__name__) from error

    def _send(
        self, signed: SignedRequest, more: dict[str, str], body: Iterator[bytes] | None
    ) -> urllib3.BaseHTTPResponse:
        headers = self._options["headers"] | signed.headers | more
        return self._pools(signed.url).request(
            signed.method, signed.url, headers=headers, body=body, redirect=False, preload_content=False,
            decode_content=False,
        )  # fmt: skip

    def _pools(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        if proxy is None or urllib.request.proxy_bypass(parts.netloc):
            return self._straight
        with self._lock:
            if proxy not in self._around:
                self._around[proxy] = urllib3.ProxyManager(proxy, **self._options)
            return self._around[proxy]


def _store_refusal(reply: urllib3.BaseHTTPResponse, what: str) -> LoractlError:
    """What the local store (problem+json) or S3 (XML with a code) means."""
    if reply.status < 400:
        return StorageDown(reason=f"HTTP {reply.status}: it does not serve ranges, or sends elsewhere")
    text = reply.read(CHUNK).decode("utf-8", "replace")
    if "problem+json" in reply.headers.get("content-type", ""):
        return LoractlError.from_problem(json.loads(text))
    code = text.partition("<Code>")[2].partition("</Code>")[0] or reply.reason or ""
    if reply.status in (401, 403):
        return SignatureRefused(reason=f"the store answered {code}")
    if reply.status == 400 and ("Digest" in code or "Checksum" in code or "SHA256" in code):
        return ChecksumRefused(key=what, actual="another one", expected="the signed one")
    if reply.status == 404:
        return BlobNotFound(digest=what)
    return StorageDown(reason=f"HTTP {reply.status} {code}")


class _Stopped(Exception):  # noqa: N818  # says what happened
    """The crew was stopped between two chunks; never leaves this module."""


class _Crew:
    """Threads with a short queue. The first failure, or Ctrl-C, stops them all between two chunks."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
        self._room = 2 * threads
        self._pending: set[Future[Any]] = set()
        self._stopped = threading.Event()

    def do(self, work: Callable[..., Result], *args: Any) -> "Future[Result]":
        """Queue work, waiting while the queue is full; raises what earlier work raised."""
        while len(self._pending) >= self._room:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        future = self._pool.submit(work, *args)
        self._pending.add(future)
        return future

    def check(self) -> None:
        """Called by the threads between two chunks."""
        if self._stopped.is_set():
            raise _Stopped

    def sleep(self, seconds: float) -> None:
        """Wait, but not after the crew was stopped."""
        if self._stopped.wait(seconds):
            raise _Stopped

    def stop(self) -> None:
        """Let every thread end soon."""
        self._stopped.set()

    def drain(self) -> None:
        """Wait until no thread works any more."""
        self._pool.shutdown(wait=True, cancel_futures=self._stopped.is_set())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for future in self._pending:
                    future.result()
        except BaseException:
            self.stop()
            raise
        finally:
            if error is not None:
                self.stop()
            self.drain()


class _Meter:
    """Bytes so far, told one at a time from many threads."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._progress(self._what, self._done, self._total)


class _local_disk:  # noqa: N801  # a context manager that reads like a word
    """Errors of this machine's disk as refusals."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise LocalFailure.of(error, self._path) from error
