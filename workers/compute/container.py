"""GGUF as a file (github.com/ggml-org/ggml, docs/gguf.md): typed facts, tensors by name, and a look at all of it again.

A tensor is written block by block in bounded memory, whatever its size. Before the file gets its name it is read back
by another reader than the one who wrote it: every fact, every tensor's type and shape, and rows of every tensor,
computed anew from the source by the inverse of the rule that wrote them.
Legend: n rows of a block, N rows and M columns of a tensor.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from registry.core.errors import BadTensor
from registry.files import atomic_write

from .finetune import Report, silent
from .shards import Stored

ALIGNMENT = 32
"""Every tensor begins at a multiple of so many bytes."""
_OFF = {"F32": (2**-24, 0.0), "F16": (2**-11, 2**-25), "BF16": (2**-8, 2**-134), "Q8_0": (0.5 / 127 + 2**-11, 2**-17)}
"""How far a value may be from the one that was meant: of itself (in Q8_0 of the largest of its row), and in any case.
Half a unit in the last place; in Q8_0 half a step of 1⁄127 of the largest, whose own value is rounded to float16."""

Facts = Mapping[str, Any]
"""The file's metadata: whole numbers, floats, texts, truths, and lists of them."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor of the file: what it is called and stored as there, and which values it takes from where.

    ``heads``: llama.cpp turns neighbours (2j, 2j+1) of a head by one angle, Hugging Face's Llama j and j + d⁄2, so
    row 2j + s of a head of d rows is the source's row j + s·d⁄2. ``turned``: the source is inputs × outputs.
    """

    name: str
    type: str
    source: Stored | Tensor
    heads: int = 0
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs first, as torch and numpy have it; the file itself counts dimensions from the other end."""
        shape = tuple(self.source.shape)
        return shape[::-1] if self.turned else shape

    @property
    def size(self) -> int:
        """Bytes in the file."""
        many, each = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape, dtype=np.int64)) // many * each

    def blocks(self) -> Iterator[Tensor]:
        """Its values in order, some rows at a time; one that is turned comes at once (GPT-2's largest: 41 MB)."""
        rows = self.shape[0]
        head = rows // self.heads if self.heads else 1
        if isinstance(self.source, Tensor):
            parts: Iterator[Tensor] = iter([self.source])
        elif self.turned:
            parts = iter([self.source.read()])
        else:
            parts = (block for _, block in self._stored(head))
        for block in parts:
            if self.turned:
                block = block.T
            if self.heads:
                halves = block.reshape(-1, 2, head // 2, *block.shape[1:])
                block = halves.transpose(1, 2).reshape(block.shape)
            yield block.contiguous()

    def row(self, i: int) -> Tensor:
        """One row of the tensor, straight from the source: what the file must hold there."""
        if self.heads:
            head = self.shape[0] // self.heads
            at = i % head
            i += at % 2 * (head // 2) + at // 2 - at
        if isinstance(self.source, Tensor):
            return (self.source.T if self.turned else self.source)[i]
        if self.turned:
            return torch.cat([block[:, i] for _, block in self._stored()])
        return self.source.rows([i])[0]

    def _stored(self, of: int = 1) -> Iterator[tuple[slice, Tensor]]:
        assert isinstance(self.source, Stored)
        with self.source.path.open("rb") as file:
            yield from self.source.blocks(file.fileno(), of=of)


# ── writing ──────────────────────────────────────────────────────────────────


def write_gguf(path: Path, architecture: str, facts: Facts, tensors: Sequence[Placed], report: Report = silent) -> int:
    """Write the file, and look at it; the number of rows that were compared. Nothing is left behind on failure."""
    total = sum(tensor.size for tensor in tensors)
    done = 0
    with atomic_write(path) as file:
        file.write(_head(architecture, facts, tensors))
        for tensor in tensors:
            for block in tensor.blocks():
                data = _encoded(block, tensor, path)
                file.write(data)
                done += len(data)
                report({"step": done, "steps": total})
            file.write(bytes(-tensor.size % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
        return _read_back(path.with_name(f"{path.name}.partial"), architecture, facts, tensors)


def _head(architecture: str, facts: Facts, tensors: Sequence[Placed]) -> bytes:
    """Everything before the first tensor, made by the library."""
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in facts.items():
        writer.add_key_value(key, value, *_typed(value))
    for tensor in tensors:
        # The library takes shapes of quantised tensors from bytes, unless it is told of floats.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=GGMLQuantizationType[tensor.type]
        )
    caught = BytesIO()
    writer.fout = [caught]  # type: ignore[list-item]  # a file, as far as the library writes to it
    writer.state = gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    head = caught.getvalue()
    return head + bytes(-len(head) % ALIGNMENT)


def _typed(value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    if isinstance(value, list):
        kind = _typed(value[0])[0]
        return GGUFValueType.ARRAY, GGUFValueType.INT32 if kind == GGUFValueType.UINT32 else kind
    kinds: dict[type, GGUFValueType] = {
        bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING
    }  # fmt: skip
    return kinds[type(value)], None


def _encoded(block: Tensor, tensor: Placed, path: Path) -> bytes:
    """The values as the file has them, rounded once."""
    if tensor.type in ("F16", "Q8_0"):
        wide = block.float()
        if not bool(wide.isfinite().all()):
            raise BadTensor(path=path.name, tensor=tensor.name, reason="it holds NaN or Inf")
        if tensor.type == "F16" and float(wide.abs().max()) > torch.finfo(torch.float16).max:
            worst = f"{float(wide.abs().max()):.3g} is more than float16 holds (65504); export with --dtype bf16"
            raise BadTensor(path=path.name, tensor=tensor.name, reason=worst)
        if tensor.type == "Q8_0":
            data: bytes = gguf.quants.quantize(wide.numpy(), GGMLQuantizationType.Q8_0).tobytes()
            return data
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.type]
    return block.to(dtype).reshape(-1).view(torch.uint8).numpy().tobytes()


# ── reading back ─────────────────────────────────────────────────────────────


def _read_back(path: Path, architecture: str, facts: Facts, tensors: Sequence[Placed]) -> int:
    """Compare the file with what was meant; the number of rows looked at."""
    reader = gguf.GGUFReader(path)
    for key, value in ({"general.architecture": architecture} | dict(facts)).items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if found != _single(value):
            raise BadTensor(path=path.name, tensor=key, reason=f"it was read back as {found!r:.60}")
    if [found.name for found in reader.tensors] != [tensor.name for tensor in tensors]:
        raise BadTensor(path=path.name, tensor="", reason="it was read back with other tensors than were written")
    rows = 0
    for found, tensor in zip(reader.tensors, tensors, strict=True):
        if (found.tensor_type.name, tuple(map(int, found.shape))) != (tensor.type, tensor.shape[::-1]):
            raise BadTensor(path=path.name, tensor=tensor.name, reason="it was read back with another type or shape")
        for i in _sampled(tensor):
            wrong = _off(gguf.quants.dequantize(found.data[i : i + 1], found.tensor_type), tensor, i)
            if wrong:
                raise BadTensor(path=path.name, tensor=tensor.name, reason=f"row {i} was read back {wrong}")
            rows += 1
    return rows


def _single(value: Any) -> Any:
    """Floats as the file holds them."""
    if isinstance(value, list):
        return [_single(one) for one in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _sampled(tensor: Placed) -> list[int]:
    """Rows that are looked at: the ends, and one in between that differs from tensor to tensor."""
    last = tensor.shape[0] - 1
    return sorted({0, sum(tensor.name.encode()) % (last + 1), last})


def _off(found: Any, tensor: Placed, i: int) -> str:
    meant = tensor.row(i).double().reshape(-1)
    read = torch.from_numpy(np.array(found, dtype=np.float64)).reshape(-1)
    share, least = _OFF[tensor.type]
    size = meant.abs().amax() if tensor.type == "Q8_0" else meant.abs()
    wrong = ~((read - meant).abs() <= share * size + least)
    return f"off by {float((read - meant).abs().max()):.3g}" if bool((wrong & meant.isfinite()).any()) else ""
