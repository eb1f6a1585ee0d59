"""Base folders as raw tensors: where each one lies, and reading it by position in bounded memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from registry.core.errors import BadHeader, NotRunnable
from registry.files import base_shards, read_header

from .model import Model
from .weights import DTYPES

BLOCK_BYTES = 8 << 20
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that an update can be added to."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its bytes are ``size`` bytes from ``start``."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def blocks(self, file: int, some: slice | None = None, of: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """The tensor, or some of its rows (dimension 0), by blocks of rows of at most `BLOCK_BYTES` each, or of ``of``.

        All but the last have a multiple of ``of`` rows.
        """
        if not self.size:
            return
        rows = self.shape[0] if self.shape else 1
        row = self.size // rows
        many = max(1, BLOCK_BYTES // row // of) * of
        start, stop, _ = (some or slice(None)).indices(rows)
        for first in range(start, stop, many):
            last = min(first + many, stop)
            data = bytearray(os.pread(file, (last - first) * row, self.start + first * row))
            if len(data) != (last - first) * row:
                raise BadHeader(path=self.path.name, reason=f"tensor '{self.name}' ends after the end of the file")
            yield slice(first, last), torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(-1, *self.shape[1:])

    def read(self) -> Tensor:
        """All of it."""
        with self.path.open("rb") as file:
            blocks = [block for _, block in self.blocks(file.fileno())]
        return torch.cat(blocks).reshape(self.shape) if blocks else torch.empty(self.shape, dtype=DTYPES[self.dtype])

    def rows(self, places: Sequence[int]) -> Tensor:
        """Some rows (dimension 0), in the order asked for."""
        row = self.size // self.shape[0]
        with self.path.open("rb") as file:
            data = bytearray().join(os.pread(file.fileno(), row, self.start + row * place) for place in places)
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(-1, *self.shape[1:])


def stored_in(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one file, in the order of their bytes, and its metadata."""
    header = read_header(path)
    for tensor in header:
        if tensor.dtype not in DTYPES:
            raise NotRunnable(what="The base", reason=f"tensor '{tensor.name}' is stored as {tensor.dtype}")
    found = {t.name: Stored(path, t.name, t.dtype, t.shape, t.start, t.size) for t in header}
    return found, dict(header.metadata)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a base folder by name."""
    return {name: tensor for path in base_shards(folder) for name, tensor in stored_in(path)[0].items()}


def stored_name(model: Model, name: str, stored: Mapping[str, Stored]) -> str | None:
    """A parameter's name in the files, which may lack the base prefix or have one more."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, name.removeprefix(prefix), f"{prefix}{name}") if n in stored), None)


def stored_names(model: Model, name: str, stored: Mapping[str, Stored]) -> list[str]:
    """Every name under which the files keep a parameter: a tied one may have two, or only that of the other module."""
    parameter = model.get_parameter(name)
    names = [other for other, value in model.named_parameters(remove_duplicate=False) if value is parameter]
    return [found for other in names if (found := stored_name(model, other, stored))]
