"""Base folders as raw tensors: where each one lies, and reading it by position in bounded memory."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
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

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are its values."""
        return True

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

    def read_into(self, file: int, at: int, data: memoryview) -> None:
        """Its bytes from ``at`` on, as many as ``data`` takes; `BadHeader` when the file ends before them."""
        done = 0
        while done < len(data):
            count = os.preadv(file, [data[done:]], self.start + at + done)
            if not count:
                raise BadHeader(path=self.path.name, reason=f"tensor '{self.name}' ends after the end of the file")
            done += count

    def read_rows(self, file: int, first: int, last: int, data: memoryview) -> Tensor:
        """Rows (dimension 0) from ``first`` to before ``last`` as a matrix, in memory that is ``data``."""
        rows = self.shape[0] if self.shape else 1
        self.read_into(file, self.size // rows * first, data)
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).view(last - first, -1)

    def sample(self, file: int, rows: Sequence[int], at: slice) -> Tensor:
        """Columns ``at`` of some rows of the matrix, in float64."""
        dtype, many = DTYPES[self.dtype], at.stop - at.start
        columns = prod(self.shape[1:])
        data = bytearray(len(rows) * many * dtype.itemsize)
        for k, row in enumerate(rows):
            place = memoryview(data)[k * many * dtype.itemsize : (k + 1) * many * dtype.itemsize]
            self.read_into(file, (row * columns + at.start) * dtype.itemsize, place)
        return torch.frombuffer(data, dtype=dtype).view(len(rows), many).double()

    def elements(self, first: int, last: int) -> Tensor:
        """Elements from ``first`` to before ``last``, in the order in which they are stored."""
        dtype = DTYPES[self.dtype]
        data = bytearray((last - first) * dtype.itemsize)
        with self.path.open("rb") as file:
            self.read_into(file.fileno(), first * dtype.itemsize, memoryview(data))
        return torch.frombuffer(data, dtype=dtype)

    def read(self) -> Tensor:
        """All of it."""
        with self.path.open("rb") as file:
            blocks = [block for _, block in self.blocks(file.fileno())]
        return torch.cat(blocks).reshape(self.shape) if blocks else torch.empty(self.shape, dtype=DTYPES[self.dtype])

    def touch(self, data: memoryview) -> Iterator[None]:
        """Have its bytes read into the system's memory, by way of ``data``, as many at a time."""
        with self.path.open("rb") as file:
            for at in range(0, self.size, len(data)):
                self.read_into(file.fileno(), at, data[: self.size - at])
                yield

    def columns(self, places: Tensor) -> Tensor:
        """Some columns of a matrix, of which a block is in memory at a time."""
        with self.path.open("rb") as file:
            return torch.cat([block[:, places] for _, block in self.blocks(file.fileno())])

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


@contextmanager
def read_ahead(steps: Iterable[Sequence[Stored]], many: int) -> Iterator[Callable[[], None]]:
    """Let the disk be at work while the tensors of a step are computed with: those of the next ``many`` steps are read.

    Who has done a step calls what is given. Nothing is kept here but in the system's memory, as long as it likes.
    """
    places, over, done = threading.Semaphore(many), threading.Event(), 0

    def read() -> None:
        data = memoryview(bytearray(BLOCK_BYTES))
        for number, tensors in enumerate(steps):
            places.acquire()
            for tensor in tensors:
                with suppress(OSError, BadHeader):  # told by who needs it
                    for _ in tensor.touch(data):
                        if done > number:
                            break  # too late
                        if over.is_set():
                            return
            if over.is_set():
                return

    def finish() -> None:
        nonlocal done
        done += 1
        places.release()

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield finish
    finally:
        over.set()
        places.release()
        thread.join()
