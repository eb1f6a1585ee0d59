"""Safetensors headers, read by ourselves with hard bounds.

A file is ``n`` (8 bytes, little endian), ``n`` bytes of JSON, then the tensors' bytes. The safetensors
library takes odd names (``../../x``), empty tensors and duplicate keys; what goes into a registry that
thousands of servers pull from must be stricter, and must be readable without loading anything.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadHeader, BadTensor, LfsPointer, PickleRefused
from .manifest import check_json, check_values

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 250_000
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 46
PREFIX_BYTES = 8

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by the dtype's name in the file."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: where its bytes lie in the file (absolute, end exclusive), and how to read them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself; tensors in the order of their bytes."""

    path: str
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors)


def header_bytes(start: bytes, file_size: int, path: str) -> int:
    """How many bytes from the start of the file `parse_header` needs, from its first 9 (or more) bytes.

    Recognises what commonly poses as safetensors: Git-LFS pointers, pickles, zip archives, GGUF.
    """
    if start.startswith(b"version https://git-lfs"[: max(9, len(start))]) and file_size < 1024:
        raise LfsPointer(path=path, size=file_size)
    if file_size < PREFIX_BYTES + 2:
        raise BadHeader(path=path, reason=f"{file_size} bytes cannot hold a header")
    length = int.from_bytes(start[:PREFIX_BYTES], "little")
    looks_right = start[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{"
    if not looks_right and (start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1] in range(2, 6))):
        raise PickleRefused(path=path)
    if not looks_right and start.startswith(b"GGUF"):
        raise BadHeader(path=path, reason="it is a GGUF file")
    if length > MAX_HEADER_BYTES:
        raise BadHeader(path=path, reason=f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length > file_size - PREFIX_BYTES:
        raise BadHeader(path=path, reason=f"truncated: a header of {length} bytes in a file of {file_size}")
    if not looks_right:
        raise BadHeader(path=path, reason="the header does not start with '{'")
    return PREFIX_BYTES + length


def parse_header(data: bytes, file_size: int, path: str) -> Header:
    """The header in ``data`` (the start of the file, at least all of its header) of a file of ``file_size`` bytes.

    Raises:
        BadHeader: not the format, over a bound, duplicate keys, holes, overlaps, bytes past the end.
        BadTensor: a name, dtype, shape or range that is not acceptable.
        LfsPointer, PickleRefused: what it is instead.
    """
    end = header_bytes(data[: PREFIX_BYTES + 16], file_size, path)
    if len(data) < end:
        raise BadHeader(path=path, reason=f"truncated: {len(data)} of {end} header bytes")
    table = _table(data[PREFIX_BYTES:end], path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader(path=path, reason="__metadata__ must map strings to strings")
    try:
        check_json(metadata)
    except ValueError as error:
        raise BadHeader(path=path, reason=f"__metadata__: {error}") from error
    if not table:
        raise BadHeader(path=path, reason="it holds no tensors")
    if len(table) > MAX_TENSORS:
        raise BadHeader(path=path, reason=f"{len(table)} tensors; at most {MAX_TENSORS} are allowed")
    tensors = sorted((_tensor(name, entry, end, path) for name, entry in table.items()), key=lambda t: (t.start, t.end))
    reached = end
    for tensor in tensors:
        if tensor.start != reached:
            word = "overlaps the one before it" if tensor.start < reached else "leaves a hole before it"
            raise BadTensor(tensor=tensor.name, path=path, reason=f"{word} (byte {tensor.start}, expected {reached})")
        reached = tensor.end
    if reached != file_size:
        word = "truncated" if reached > file_size else "bytes after the last tensor"
        raise BadHeader(path=path, reason=f"{word}: tensors end at byte {reached}, the file at {file_size}")
    return Header(path, tuple(tensors), metadata)


def check_tensor_name(name: str, path: str) -> str:
    """``name`` itself when it can name a tensor here; `BadTensor` with the rule when not."""
    rule = None
    if not name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        rule = f"names have 1 to {MAX_NAME_BYTES} bytes"
    elif _CONTROL.search(name):
        rule = "names hold no control characters and no lone surrogates"
    elif ".." in name.replace("\\", "/").split("/") or name.startswith(("/", "\\")):
        rule = "names hold no '..' path part and do not start with a slash"
    if rule:
        raise BadTensor(tensor=ascii(name[:100])[1:-1], path=path, reason=rule)
    return name


def _table(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BadHeader(path=path, reason=f"the key {name[:100]!a} occurs twice")
            found[name] = value
        return found

    try:
        check_values(text)
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadHeader(path=path, reason=f"the header is not JSON: {str(error)[:200]}") from error
    if not isinstance(table, dict):
        raise BadHeader(path=path, reason="the header is not a JSON object")
    return table


def _tensor(name: str, entry: Any, data_start: int, path: str) -> TensorInfo:
    check_tensor_name(name, path)

    def bad(reason: str) -> BadTensor:
        return BadTensor(tensor=name, path=path, reason=reason)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"unknown dtype {ascii(dtype)[:40]}; known are {', '.join(DTYPE_BITS)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"a shape is at most {MAX_DIMENSIONS} whole numbers, none negative")
    elements = math.prod(shape)
    if elements == 0:
        raise bad("it is empty")
    if elements > MAX_ELEMENTS:
        raise bad(f"{elements} elements; at most {MAX_ELEMENTS} are allowed")
    if not _counts(offsets) or len(offsets) != 2:
        raise bad("data_offsets are two whole numbers, none negative")
    size, left = divmod(elements * DTYPE_BITS[dtype], 8)
    if left:
        raise bad(f"{elements} elements of {dtype} do not end at a byte")
    if offsets[1] - offsets[0] != size:
        raise bad(f"{dtype}{list(shape)} is {size} bytes, but its offsets hold {offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
