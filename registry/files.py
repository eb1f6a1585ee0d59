"""Local folders: what is in them, hashed with all cores, checked, and written so that nobody sees a half file.

Used by the client, the workers and the verifier. Reading maps files into memory a few megabytes at a time
and gives the pages back, so that a base of any size is hashed in bounded memory; copying through a buffer
instead costs a third of the speed (benchmarks/digest.py).
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import IO, Any

from blake3 import blake3

from registry.core.adapter import CONFIG_FILE, AdapterSpec
from registry.core.base_model import (
    TOKENIZER_FILES,
    BaseModel,
    Tensor,
    Tokenizer,
    canonical_arch,
    canonical_name,
    tokenizer_digests,
)
from registry.core.digest import Digest
from registry.core.errors import (
    BadConfig,
    BadHeader,
    BadPath,
    DiskFull,
    DuplicateTensor,
    LocalFailure,
    NonFinite,
    NotABase,
    NotAnAdapter,
    PathUnusable,
    PickleRefused,
    ZeroUpdate,
)
from registry.core.manifest import (
    Draft,
    FileEntry,
    Kind,
    LateFile,
    Lineage,
    Manifest,
    check_json,
    check_path,
    check_values,
)
from registry.core.safetensors import PREFIX_BYTES, Header, TensorInfo, header_bytes, parse_header
from registry.core.suites import SUITE_FILE

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call, never from two threads at once."""
Read = Callable[[int, int], bytes]
"""``read(offset, length)``: those bytes of one file, wherever it is."""

CHUNK = 4 << 20
MAX_CONFIG_BYTES = 32 << 20
MAX_TOKENIZER_BYTES = 256 << 20
INDEX_FILE = "model.safetensors.index.json"
DATA_FILE = "data.jsonl"
"""What the one file of a dataset or suite is called in its manifest, whatever it is called here."""


# ── headers and configs ──────────────────────────────────────────────────────


def read_header(path: Path) -> Header:
    """The header of the safetensors file at ``path``; its tensors are not read."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        needed = header_bytes(start, size, path.name)
        return parse_header(start + file.read(max(0, needed - len(start))), size, path.name)


def header_from(read: Read, size: int, path: str) -> Header:
    """As `read_header`, of a file of ``size`` bytes that is read through ``read`` (an object in a store)."""
    start = read(0, min(size, 64))
    needed = header_bytes(start, size, path)
    rest = read(PREFIX_BYTES, needed - PREFIX_BYTES) if needed > len(start) else start[PREFIX_BYTES:]
    return parse_header(start[:PREFIX_BYTES] + rest, size, path)


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``; `BadConfig` when it is none, or over ``limit`` bytes."""
    with _opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadConfig(path=path.name, reason=f"it is over {limit} bytes")
    return parse_json(data, path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``data``; `BadConfig` when it is none."""
    try:
        check_values(data)
        found = json.loads(data)
        check_json(found)
    except (ValueError, RecursionError) as error:
        raise BadConfig(path=name, reason=f"it is not JSON that can be kept: {error}") from error
    if not isinstance(found, dict):
        raise BadConfig(path=name, reason="it is not a JSON object")
    return found


def read_adapter(folder: Path) -> AdapterSpec:
    """The adapter in ``folder``, from its config and headers alone."""
    files = _adapter_files(folder)
    return AdapterSpec.parse(
        read_json(files[CONFIG_FILE]),
        {name: read_header(path) for name, path in files.items() if name.endswith(".safetensors")},
    )


# ── hashing ──────────────────────────────────────────────────────────────────


class HashCache:
    """Digests of local files, kept in a folder; an entry holds while path, size, mtime and inode are the same.

    A file younger than two seconds is not remembered: it could change again within one tick of its clock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, path: Path, what: str) -> Any:
        """What was remembered of ``path`` under ``what``, or None."""
        try:
            entry = json.loads(self._place(path).read_bytes())
            return entry["values"].get(what) if entry["key"] == self.key(path) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, path: Path, what: str, value: Any, since: list[int] | None = None) -> None:
        """Remember ``value`` (JSON) of ``path``; a cache that cannot be written is no error.

        ``since``: `key` of the file before it was read. Where that changed, nobody knows which bytes were.
        """
        with contextlib.suppress(OSError, DiskFull, PathUnusable):
            key = self.key(path)
            if time.time_ns() - key[1] < 2_000_000_000 or since not in (None, key):
                return
            place = self._place(path)
            try:
                entry = json.loads(place.read_bytes())
                values = entry["values"] if entry["key"] == key else {}
            except (OSError, ValueError, KeyError, TypeError):
                values = {}
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(place) as file:
                file.write(json.dumps({"key": key, "values": {**values, what: value}}).encode())

    def _place(self, path: Path) -> Path:
        return self.folder / f"{blake3(os.fsencode(path.resolve())).hexdigest()[:32]}.json"

    @staticmethod
    def key(path: Path) -> list[int]:
        """What changes when the file does."""
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]


def digest_base(
    folder: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    cache: HashCache | None = None,
    taken: Mapping[str, str] | None = None,
) -> BaseModel:
    """The base model in ``folder``, its tensors hashed with ``threads`` threads (default: every core we may use).

    ``taken``: BLAKE3 by tensor, as hex, that whoever wrote the files took on the way; those are not read again.

    Raises:
        NotABase: no safetensors there, or the index and the files disagree.
        DuplicateTensor: a tensor in two files.
        BadHeader, BadTensor, LfsPointer, PickleRefused, PathUnusable: a file that is not acceptable.
    """
    shards = base_shards(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    canonical_arch(config)  # refuse a config that cannot be before hashing for minutes
    headers = {path: read_header(path) for path in shards}
    _check_shards(folder, headers)
    rows: list[Tensor] = []
    report = _in_turn(progress)
    left: list[Path] = []
    for path, header in headers.items():
        known = taken if taken is not None else cache.get(path, "tensors") if cache else None
        if isinstance(known, Mapping) and known.keys() >= {tensor.name for tensor in header}:
            rows += [Tensor(t.name, t.dtype, t.shape, Digest("b3", known[t.name])) for t in header]
            report(sum(tensor.size for tensor in header))
        else:
            left.append(path)
    rows += _hash_tensors({path: headers[path] for path in left}, threads, report, cache)
    return BaseModel.of(rows, config, read_tokenizer(folder))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Digests of the tokenizer in ``folder``; empty where there is none."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if any(path.stat().st_size > MAX_TOKENIZER_BYTES for path in files.values()):
        raise NotABase(path=str(folder), reason=f"a tokenizer file is over {MAX_TOKENIZER_BYTES} bytes")
    return tokenizer_digests({name: path.read_bytes() for name, path in files.items()})


def sha256_file(path: Path, progress: Progress | None = None, cache: HashCache | None = None) -> Digest:
    """The SHA-256 of a file, as blobs are named."""
    report = progress or _silent
    known = cache.get(path, "sha256") if cache else None
    if isinstance(known, str):
        report(path.stat().st_size)
        return Digest.parse(known)
    hasher = hashlib.sha256()
    buffer = bytearray(CHUNK)
    with _opened(path) as file, memoryview(buffer) as view:
        before = HashCache.key(path) if cache else None
        while count := file.readinto(view):
            hasher.update(view[:count])
            report(count)
    digest = Digest("sha256", hasher.hexdigest())
    if cache:
        cache.put(path, "sha256", str(digest), before)
    return digest


def sha256_range(path: Path, offset: int, length: int, progress: Progress | None = None) -> Digest:
    """The SHA-256 of ``length`` bytes of a file from ``offset`` on, or of what there is of them."""
    hasher, left = hashlib.sha256(), length
    with _opened(path) as file:
        file.seek(offset)
        while chunk := file.read(min(CHUNK, left)):
            hasher.update(chunk)
            left -= len(chunk)
            (progress or _silent)(len(chunk))
    return Digest("sha256", hasher.hexdigest())


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hash_tensors(
    headers: Mapping[Path, Header], threads: int | None, report: Progress, cache: HashCache | None
) -> list[Tensor]:
    with contextlib.ExitStack() as stack:
        maps = {path: stack.enter_context(_mapped(path, header)) for path, header in headers.items()}
        work = [(path, tensor) for path, header in headers.items() for tensor in header]
        work.sort(key=lambda item: item[1].size, reverse=True)  # the longest first, so that no core ends up waiting
        pool = stack.enter_context(ThreadPoolExecutor(threads or cores(), "hash"))
        try:
            digests = list(pool.map(lambda item: _tensor_digest(maps[item[0]], item[1], report), work))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found: dict[Path, dict[str, str]] = {path: {} for path in headers}
    rows = []
    for (path, tensor), digest in zip(work, digests, strict=True):
        found[path][tensor.name] = digest.hex
        rows.append(Tensor(tensor.name, tensor.dtype, tensor.shape, digest))
    if cache:
        for path, known in found.items():
            cache.put(path, "tensors", known)
    return rows


def _tensor_digest(mapped: mmap.mmap, tensor: TensorInfo, report: Progress) -> Digest:
    hasher = blake3()
    with memoryview(mapped) as view:
        for start in range(tensor.start, tensor.end, CHUNK):
            end = min(start + CHUNK, tensor.end)
            page = start - start % mmap.PAGESIZE
            with view[start:end] as part:
                hasher.update(part)
            mapped.madvise(mmap.MADV_DONTNEED, page, end - page)  # out of our memory; the page cache keeps it
            report(end - start)
    return Digest("b3", hasher.hexdigest())


@contextlib.contextmanager
def _mapped(path: Path, header: Header) -> Iterator[mmap.mmap]:
    """The file of ``header`` as memory; `PathUnusable` when it changed under our eyes."""
    with _opened(path) as file:
        before = os.fstat(file.fileno())
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as mapped:
            mapped.madvise(mmap.MADV_SEQUENTIAL)  # asking ahead chunk by chunk costs a tenth where nothing is cold
            changed = len(mapped) != header.tensors[-1].end
            if not changed:
                yield mapped
        after = os.fstat(file.fileno())
    if changed or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise PathUnusable(path=str(path), reason="it changed while it was read")


def _silent(_: int) -> None: ...


def _in_turn(progress: Progress | None) -> Progress:
    if progress is None:
        return _silent
    lock = Lock()

    def report(count: int) -> None:
        with lock:
            progress(count)

    return report


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)  # no buffer: whoever reads brings its own
    except OSError as error:
        raise LocalFailure.of(error, path) from error
    with file:
        yield file


# ── folders ──────────────────────────────────────────────────────────────────

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_TRAINER = re.compile(
    r"(optimizer|scheduler|scaler|rng_state\w*|training_args|random_states\w*)\.(bin|pt|pth|pkl)|trainer_state\.json|"
    r"zero_to_fp32\.py|latest|all_results\.json|(train|eval)_results\.json"
)
_BESIDE = re.compile(r"(README|LICENSE|NOTICE|USE_POLICY)(\.\w+)?|.*\.jinja", re.IGNORECASE)
_ADAPTER_WEIGHTS = re.compile(r"adapter_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_LATE_FROM = 1 << 20
"""Smaller files are hashed sooner than asked about."""
_BASE_EXTRAS = ("config.json", "generation_config.json", "preprocessor_config.json", INDEX_FILE)


def read_spec(folder: Path) -> dict[str, Any]:
    """What the suite.json of a folder asks for, empty without one; `BadConfig` for what is no JSON object.

    A task of lm-eval may be there as the name of a YAML file beside it, as lm-eval itself has it; its words take the
    place of the name. Words only: YAML that names code is refused.
    """
    path = folder / SUITE_FILE
    if not path.is_file():
        return {}
    spec = read_json(path)
    match spec.get("lm_eval"):
        case {"tasks": list(tasks), **rest}:
            return spec | {"lm_eval": {**rest, "tasks": [_task(folder, named) for named in tasks]}}
    return spec


def _task(folder: Path, named: Any) -> Any:
    if not isinstance(named, str):
        return named
    import yaml

    there = _top(folder)
    if named not in there or not named.endswith((".yaml", ".yml")):
        beside = ", ".join(name for name in there if name.endswith((".yaml", ".yml"))) or "none"
        raise BadConfig(path=SUITE_FILE, reason=f"'{named[:100]}' is no YAML file beside it; there are: {beside}")
    try:
        with there[named].open("rb") as file:
            found = yaml.safe_load(file.read(MAX_CONFIG_BYTES))
        check_json(found)  # its aliases may stand for billions of values
        return found
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        # `!!int ""`, `!!bool x` and `!!timestamp x` leave PyYAML as errors of its own code
        reason = " ".join(str(error).split())
        if "!function" in reason:
            reason = "!function names code, and a suite is data"
        raise BadConfig(path=named, reason=reason) from error


@dataclass(frozen=True, slots=True)
class Scan:
    """A manifest, and where on this machine each of its files lies."""

    manifest: Manifest
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A draft, and where on this machine each of its files lies."""

    draft: Draft
    files: Mapping[str, Path]


def scan_folder(
    kind: Kind,
    folder: Path,
    *,
    base: Digest | None = None,
    config: Mapping[str, Any] | None = None,
    lineage: Lineage | None = None,
    progress: Progress | None = None,
    cache: HashCache | None = None,
) -> Scan:
    """The manifest of what is in ``folder`` (for a dataset or suite: or of that one JSONL file), and its files.

    What belongs to a version is stated, not guessed. An adapter: its config, its safetensors, the tokenizer's files,
    README, LICENSE and templates at the top of the folder. A base: its configs, the safetensors that
    `base_shards` names, and the same beside them. A suite: the JSONL at the top of the folder. Everything else stays
    behind: checkpoints and other subfolders, hidden files, what a trainer leaves (optimizer, scheduler, random states,
    logs). Pickled weights are refused.

    ``base`` is the base an adapter is bound to, or a base's own digest. ``config`` is a dataset's or suite's spec; an
    adapter's is its adapter_config.json.
    """
    if kind in ("dataset", "suite"):
        files = _data_files(kind, folder)
    else:
        files = _adapter_files(folder) if kind == "adapter" else _base_files(folder)
    if kind == "adapter":
        config = read_json(files[CONFIG_FILE])
    entries = _hashed(files, _in_turn(progress), cache)
    return Scan(Manifest.parse(_listing(kind, entries, base, config, lineage)), files)


def sketch_base(
    folder: Path, base: Digest, *, lineage: Lineage | None = None, cache: HashCache | None = None
) -> Sketch | None:
    """As `scan_folder` of a base, but large files that the cache does not know are not read: their digests come later.

    None when there is no such file.
    """
    files = _base_files(folder)
    late = {
        name: path
        for name, path in files.items()
        if name.endswith(".safetensors")
        and path.stat().st_size >= _LATE_FROM
        and not (cache and isinstance(cache.get(path, "sha256"), str))
    }
    if not late:
        return None
    config = read_json(files["config.json"]) if "config.json" in files else None
    entries: list[FileEntry | LateFile] = [*_hashed({n: p for n, p in files.items() if n not in late}, _silent, cache)]
    for name, path in late.items():
        tensors = (canonical_name(tensor.name, config) for tensor in read_header(path))
        known = tuple(tensor for tensor in tensors if tensor is not None)
        entries.append(LateFile(path=name, size=path.stat().st_size, tensors=known))
    return Sketch(Draft.parse(_listing("base", entries, base, None, lineage)), files)


def _hashed(files: Mapping[str, Path], report: Progress, cache: HashCache | None) -> list[FileEntry]:
    with ThreadPoolExecutor(cores(), "sha256") as pool:
        digests = list(pool.map(lambda path: sha256_file(path, report, cache), files.values()))
    return [
        FileEntry(path=name, size=path.stat().st_size, digest=str(digest))
        for (name, path), digest in zip(files.items(), digests, strict=True)
    ]


def _listing(
    kind: Kind,
    entries: Iterable[FileEntry | LateFile],
    base: Digest | None,
    config: Mapping[str, Any] | None,
    lineage: Lineage | None,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "files": sorted(entries, key=lambda entry: entry.path),
        "base": str(base) if base else None,
        "config": _finite(dict(config or {})),
        "lineage": lineage or Lineage(),
    }


def base_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the base in ``folder``.

    Those that ``model.safetensors.index.json`` lists; without one ``model.safetensors``; else every .safetensors file.
    """
    present = _top(folder)
    found = {name: path for name, path in present.items() if name.endswith(".safetensors")}
    if CONFIG_FILE in present and "config.json" not in present:
        raise NotABase(path=str(folder), reason=f"it holds an adapter: there is {CONFIG_FILE}, and no config.json")
    if not found:
        for name in present:
            if name.endswith(_PICKLES) and not _TRAINER.fullmatch(name):
                raise PickleRefused(path=name)
        raise NotABase(path=str(folder), reason="there is no .safetensors file in it")
    if INDEX_FILE in present:
        listed = read_json(present[INDEX_FILE]).get("weight_map")
        names = sorted(set(listed.values())) if isinstance(listed, dict) and _all_text(listed.values()) else []
        if not names:
            raise BadConfig(path=INDEX_FILE, reason="its weight_map does not map tensors to files")
        for name in names:
            if name not in found:
                raise NotABase(path=str(folder), reason=f"{INDEX_FILE} lists '{name[:100]}', which is not there")
        return [found[name] for name in names]
    if "model.safetensors" in found:
        return [found["model.safetensors"]]
    return [found[name] for name in sorted(found)]


def _check_shards(folder: Path, headers: Mapping[Path, Header]) -> None:
    seen: dict[str, str] = {}
    for path, header in headers.items():
        for tensor in header:
            if tensor.name in seen:
                raise DuplicateTensor(tensor=tensor.name, first=seen[tensor.name], second=path.name)
            seen[tensor.name] = path.name
    index = folder / INDEX_FILE
    if index.is_file():
        listed: dict[str, str] = read_json(index)["weight_map"]
        if wrong := sorted(name for name, file in listed.items() if seen.get(name) != file):
            raise NotABase(path=str(folder), reason=f"'{wrong[0][:100]}' is not in the file that {INDEX_FILE} says")


def _data_files(kind: Kind, folder: Path) -> dict[str, Path]:
    if folder.is_file():
        return {DATA_FILE: folder}
    if kind == "dataset" or not folder.is_dir():
        raise PathUnusable(path=str(folder), reason=f"a {kind} is one JSONL file" + " or a folder" * (kind == "suite"))
    found = {name: path for name, path in _top(folder).items() if name.endswith(".jsonl")}
    if not found:
        raise PathUnusable(path=str(folder), reason="there is no .jsonl file in it")
    return found


def _adapter_files(folder: Path) -> dict[str, Path]:
    present = _top(folder)
    for name in present:
        if name.endswith(_PICKLES) and not _TRAINER.fullmatch(name):
            raise PickleRefused(path=name)
    kept = {
        name: path
        for name, path in present.items()
        if name == CONFIG_FILE or _ADAPTER_WEIGHTS.fullmatch(name) or name in TOKENIZER_FILES or _BESIDE.fullmatch(name)
    }
    if CONFIG_FILE not in kept:
        raise NotAnAdapter(path=str(folder), reason=f"it has no {CONFIG_FILE}")
    if not any(name.endswith(".safetensors") for name in kept):
        raise NotAnAdapter(path=str(folder), reason="it has no adapter_model.safetensors")
    return kept


def _base_files(folder: Path) -> dict[str, Path]:
    shards = {path.name for path in base_shards(folder)}
    wanted = {*shards, *_BASE_EXTRAS, *TOKENIZER_FILES}
    return {name: path for name, path in _top(folder).items() if name in wanted or _BESIDE.fullmatch(name)}


def _top(folder: Path) -> dict[str, Path]:
    """The files at the top of ``folder`` by name, sorted; links may not lead out of it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise LocalFailure.of(error, folder) from error
    found = {path.name: path for path in entries if not path.name.startswith(".") and path.is_file()}
    for name, path in found.items():
        check_path(name)
        if path.is_symlink() and not _inside(path.resolve(), folder.resolve()):
            raise BadPath(path=name, rule=f"a link may not lead out of its folder (it leads to {path.resolve()})")
    return found


def _inside(target: Path, folder: Path) -> bool:
    """In the folder itself, or in the blobs of the Hugging Face cache whose snapshot the folder is."""
    if target.is_relative_to(folder):
        return True
    return folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _finite(config: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(config, allow_nan=False)
    except ValueError as error:
        raise BadConfig(path=CONFIG_FILE, reason="it holds NaN or Infinity, which are not JSON") from error
    return config


# ── values ───────────────────────────────────────────────────────────────────

_LAYOUTS = {  # bits of an element, of its exponent, of its mantissa (IEEE 754 and bfloat16)
    "F16": (16, 0x7C00, 0x03FF),
    "BF16": (16, 0x7F80, 0x007F),
    "F32": (32, 0x7F80_0000, 0x007F_FFFF),
    "F64": (64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
}
SCAN_BYTES = 1 << 20


def check_adapter_tensors(
    spec: AdapterSpec, headers: Mapping[str, Header], readers: Mapping[str, Read], *, allow_zero: bool = False
) -> None:
    """Read every value of an adapter in bounded memory; ``readers`` read the files of ``headers``.

    Raises:
        NonFinite: a tensor holds NaN or Inf.
        ZeroUpdate: A, B or AdaLoRA's E is zero in every module, and nothing else is trained (unless ``allow_zero``).
    """
    zero = {
        tensor.name
        for path, header in headers.items()
        for tensor in header
        if tensor.dtype in _LAYOUTS and _is_zero(tensor, path, readers[path])
    }
    if allow_zero or not spec.modules or spec.saved or spec.biases or spec.token_rows:
        return
    factors = [{part.name for part in (module.a, module.b, module.values) if part} for module in spec.modules]
    if all(names & zero for names in factors):
        raise ZeroUpdate(modules=len(spec.modules))


def file_reader(path: Path) -> Read:
    """``read(offset, length)`` of a local file."""

    def read(offset: int, length: int) -> bytes:
        with _opened(path) as file:
            return os.pread(file.fileno(), length, offset)

    return read


def _is_zero(tensor: TensorInfo, path: str, read: Read) -> bool:
    """Whether every value is zero; `NonFinite` when one is no number.

    A chunk is one whole number, its elements are lanes of it. Exponent + its lowest bit carries into the sign's place
    only where the exponent is all ones (NaN or Inf); mantissa + all ones carries out only where it is not zero (NaN).
    """
    bits, exponent, mantissa = _LAYOUTS[tensor.dtype]
    zero, nans, infs, first = True, 0, 0, -1
    for start in range(tensor.start, tensor.end, SCAN_BYTES):
        length = min(SCAN_BYTES, tensor.end - start)
        data = read(start, length)
        if len(data) != length:
            raise BadHeader(path=path, reason=f"truncated: {len(data)} of {length} bytes at {start}")
        lanes = length * 8 // bits
        value = int.from_bytes(data, "little")
        exponents, mantissas, lowest, signs = _masks(bits, exponent, mantissa, lanes)
        special = ((value & exponents) + lowest) & signs
        zero = zero and not value & (exponents | mantissas)
        if special:
            full = ((value & mantissas) + mantissas) & lowest
            nan = (full << (bits - (mantissa + 1).bit_length())) & special
            nans += nan.bit_count()
            infs += special.bit_count() - nan.bit_count()
            if first < 0:
                first = (start - tensor.start) * 8 // bits + ((special & -special).bit_length() - 1) // bits
    if first >= 0:
        raise NonFinite(tensor=tensor.name, path=path, nans=nans, infs=infs, index=first)
    return zero


@lru_cache(maxsize=16)
def _masks(bits: int, exponent: int, mantissa: int, lanes: int) -> tuple[int, int, int, int]:
    """In each of ``lanes`` lanes: the exponent, the mantissa, the exponent's lowest bit, the sign."""
    one = int.from_bytes((1).to_bytes(bits // 8, "little") * lanes, "little")
    return one * exponent, one * mantissa, one * (mantissa + 1), one << (bits - 1)


# ── writing ──────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name only when it is complete and on the disk; nothing is left behind when it fails.

    Raises:
        DiskFull: no room.
        PathUnusable: any other failure of the file system.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LocalFailure.of(error, path) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
