"""Tensors from files to files, changed on the way: what merging is, at the speed of copying.

One thread a core, each with tensors of its own and, while there are enough, a file of its own (a file takes one
writer at a time). A thread reads a block by its position, adds the update in float32 while the block lies in the
core's second-level cache, rounds once, writes and hashes it there: memory is a few blocks a thread, whatever the
size of a tensor. Afterwards a part of a row of every block is read back and compared with its float64 value.
Legend: N rows and M columns as stored, n rows of a block, R rank, O outputs, I inputs; K rows, S columns sampled.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from registry.core.errors import BadTensor, LocalFailure
from registry.files import cores

from .lora import Patch
from .shards import Stored
from .weights import DTYPES

BLOCK_ELEMENTS = 1 << 18
"""A block and its float32 copy take 1.5 MB: a core's second-level cache holds 2 MB on the machines of today."""
PIECE_ELEMENTS = 1 << 25
"""Tensors that nobody hashes are shared out in pieces of this size."""
_SAMPLED = 64
"""Columns of a sampled row that are compared."""

_FLUSHED_S = 0.05
PARTIAL = ".partial"
"""The end of a file's name until it is complete."""


@dataclass(frozen=True, eq=False)
class Change:
    """New values of a tensor: W' = g ⊙ (V + scale·B·A) + s.

    V are its own values or, where there is ``value``, those that replace them; g is DoRA's magnitude ⁄ ‖V + ΔW‖ by
    outputs; s shifts a bias. ``transposed``: the tensor is stored as inputs × outputs, and scale·Aᵀ·Bᵀ is added.
    """

    patch: Patch | None = None
    transposed: bool = False
    value: Tensor | None = None
    shift_N: Tensor | None = None

    @property
    def by_columns(self) -> bool:
        """Whether DoRA's lengths are those of columns, which no single row knows."""
        return self.transposed and self.patch is not None and self.patch.magnitude_O is not None

    @property
    def only_adds(self) -> bool:
        """Whether W' = W + scale·B·A is all."""
        plain = self.value is None and self.shift_N is None
        return plain and self.patch is not None and self.patch.magnitude_O is None

    def factors(self, rows: slice | Tensor, dtype: torch.dtype, at: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Left (n×R) and right (R×M) whose product is the update of these rows, in columns ``at``."""
        assert self.patch is not None
        a_RI, b_OR = self.patch.a_RI, self.patch.b_OR
        left_nR = a_RI.T[rows] if self.transposed else b_OR[rows]
        right_RM = (b_OR.T if self.transposed else a_RI)[:, at]
        return (left_nR.to(dtype) * self.patch.scale).contiguous(), right_RM.to(dtype).contiguous()

    def update(self, rows_K: Tensor, columns_K: Tensor) -> Tensor:
        """Single elements of scale·B·A as stored, in float64."""
        assert self.patch is not None
        a_IR, b_OR = self.patch.a_RI.T, self.patch.b_OR
        left_KR, right_KR = (a_IR[rows_K], b_OR[columns_K]) if self.transposed else (b_OR[rows_K], a_IR[columns_K])
        return (left_KR.double() * right_KR.double()).sum(dim=1) * self.patch.scale

    def exact(self, w_KS: Tensor, rows_K: Tensor, at: slice, lengths_M: Tensor | None) -> Tensor:
        """The new values of columns ``at`` of some rows in float64; DoRA by rows needs all columns."""
        if self.value is not None:
            w_KS = self.value[rows_K].reshape(len(rows_K), -1)[:, at].double()
        if self.patch is not None:
            w_KS = w_KS.addmm(*self.factors(rows_K, torch.float64, at))
            if self.patch.magnitude_O is not None:
                magnitude_O = self.patch.magnitude_O.double()
                if lengths_M is None:
                    w_KS = w_KS * (magnitude_O[rows_K] / w_KS.norm(dim=1))[:, None]
                else:
                    w_KS = w_KS * (magnitude_O / lengths_M)[at]
        return w_KS if self.shift_N is None else w_KS + self.shift_N[rows_K].double()[:, None]


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor to be written: from where, as what, and to where; a change comes with a type of floats."""

    name: str
    source: Stored
    dtype: str
    change: Change | None
    path: Path
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns as stored; a vector is one column."""
        shape = self.source.shape
        return (shape[0], prod(shape[1:])) if shape else (1, 1)

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.source.shape) * DTYPES[self.dtype].itemsize

    @property
    def wide(self) -> torch.dtype:
        """The type that sums are taken in: float32, or float64 for a float64 base."""
        return torch.promote_types(DTYPES[self.source.dtype], torch.float32)

    @property
    def target(self) -> Stored:
        """Where it is written."""
        return Stored(self.path, self.name, self.dtype, self.source.shape, self.start, self.size)

    @cached_property
    def same(self) -> bool:
        """Whether its bytes are copied as they are."""
        return self.change is None and self.dtype == self.source.dtype and self.source.is_plain

    @property
    def same_type(self) -> bool:
        """Whether it is written in the type that it is read in."""
        return self.dtype == self.source.dtype

    @property
    def by_tiles(self) -> bool:
        """Whether nothing is done to it but to add a product to its bfloat16 values, on a processor with tiles."""
        added = self.change is not None and self.change.only_adds
        return added and self.dtype == self.source.dtype == "BF16" and has_tiles()

    @property
    def file_name(self) -> str:
        """The name of its file once it is complete."""
        return self.path.name.removesuffix(PARTIAL)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return max(1, BLOCK_ELEMENTS // max(1, self.shape[1]))

    def pieces(self, whole: bool) -> Iterator["Piece"]:
        """What one thread does of it in one go: all of it where it must be seen ``whole``."""
        rows, columns = self.shape
        if whole or (self.change is not None and self.change.by_columns):
            yield Piece(self, 0, rows)
            return
        many = max(1, PIECE_ELEMENTS // max(1, columns) // self.block_rows) * self.block_rows
        for first in range(0, rows, many):
            yield Piece(self, first, min(first + many, rows))


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a tensor for one thread."""

    made: Made
    first: int
    last: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Its rows by blocks."""
        many = self.made.block_rows
        return ((first, min(first + many, self.last)) for first in range(self.first, self.last, many))


def stream(
    made: Sequence[Made],
    report: Callable[[int], None],
    *,
    digests: bool = True,
    durable: bool = False,
    threads: int | None = None,
) -> dict[str, str]:
    """Write the tensors into their files, which are there and long enough; BLAKE3 by name where asked for.

    ``durable``: what is written goes to the disk meanwhile, so that little is left to wait for at the end.

    ``report`` hears now and then, from the calling thread, how many bytes are written; what it raises ends the work.

    Raises:
        BadHeader: a source file ends early.
        BadTensor: a value that was written is not the sum it should be, or has no place in its type.
        DiskFull, PathUnusable: the file system says no.
    """
    with contextlib.ExitStack() as stack:
        files = {path: _opened(stack, path, os.O_RDONLY) for path in {tensor.source.path for tensor in made}}
        files |= {path: _opened(stack, path, os.O_RDWR) for path in {tensor.path for tensor in made}}
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # a thread's own number is everyone's default
        work = _Work(made, files, digests)
        many = max(1, min(threads or cores(), work.left))
        with ThreadPoolExecutor(many + 1, "merge") as pool:
            running = [pool.submit(work.run) for _ in range(many)]
            flushing = [pool.submit(work.flush)] if durable else []
            try:
                while wait(running, timeout=0.2, return_when=FIRST_EXCEPTION).not_done and not work.stopped:
                    report(work.written)
            finally:
                work.stopped = True
        for thread in running + flushing:
            thread.result()
        report(work.written)
        return work.digests


def _opened(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    try:
        file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise LocalFailure.of(error, path) from error
    stack.callback(os.close, file)
    return file


# ── which products ───────────────────────────────────────────────────────────


def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 in matrix tiles (AMX), many times as fast as float32.

    Without them float32 is the faster one: three products of parts against one, and those without tiles slower each.
    """
    return torch.cpu._is_amx_tile_supported()


def split(left_nR: Tensor, right_RM: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in bfloat16 with a product that is as good: L·R ≈ L₁R₁ + L₁R₂ + L₂R₁.

    L₁ is L rounded to bfloat16 and L₂ what is left of it, rounded as well; L₂R₂, at most 2⁻¹⁶ of L·R, is dropped.
    """
    left_1, right_1 = left_nR.bfloat16(), right_RM.bfloat16()
    left_2, right_2 = (left_nR - left_1.float()).bfloat16(), (right_RM - right_1.float()).bfloat16()
    return torch.cat([left_1, left_1, left_2], dim=1), torch.cat([right_1, right_2, right_1])


# ── the threads ──────────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Work:
    """What is left to be done, shared by the threads."""

    made: Sequence[Made]
    files: dict[Path, int]
    hashed: bool
    digests: dict[str, str] = field(default_factory=dict)
    written: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._queues: dict[Path, list[Piece]] = {}
        self._busy: dict[Path, int] = {}
        for tensor in sorted(self.made, key=lambda tensor: tensor.size):  # the largest is taken first, from the end
            self._queues.setdefault(tensor.path, []).extend(tensor.pieces(whole=self.hashed))
        self._busy = dict.fromkeys(self._queues, 0)
        self.left = sum(map(len, self._queues.values()))

    def run(self) -> None:
        """Do pieces until there are none; one thread's failure ends all."""
        torch.set_num_threads(1)  # of this thread: the others are busy with blocks of their own
        desk = _Desk()
        path: Path | None = None
        try:
            while not self.stopped and (piece := self._next(path)):
                path = piece.made.path
                try:
                    self._do(piece, desk)
                except OSError as error:
                    raise LocalFailure.of(error, path) from error
                finally:
                    with self._lock:
                        self._busy[path] -= 1
        except BaseException:
            self.stopped = True
            raise

    def flush(self) -> None:
        """Send to the disk what is written so far, until all is."""
        while not self.stopped:
            for path in self._busy:
                try:
                    os.fsync(self.files[path])
                except OSError as error:  # said once: who syncs the file later would not hear of it
                    self.stopped = True
                    raise LocalFailure.of(error, path) from error
            time.sleep(_FLUSHED_S)

    def _next(self, path: Path | None) -> Piece | None:
        """A piece of the file that this thread was at, else of the one with the fewest writers."""
        with self._lock:
            waiting = [name for name, queue in self._queues.items() if queue]
            if not waiting:
                return None
            here = path if path in waiting else min(waiting, key=lambda name: self._busy[name])
            self._busy[here] += 1
            return self._queues[here].pop()

    def _do(self, piece: Piece, desk: "_Desk") -> None:
        """Write a piece, and look at what was written."""
        made, digest = piece.made, blake3() if self.hashed else None
        lengths_M = self._lengths(piece, desk) if made.change is not None and made.change.by_columns else None
        blocks = self._copied(piece, desk) if made.same else self._changed(piece, desk, lengths_M)
        for at, data in blocks:
            _write(self.files[made.path], made.start + at, data)
            if digest is not None:
                digest.update(data)
            with self._lock:
                self.written += len(data)
            if self.stopped:
                return
        if digest is not None:
            self.digests[made.name] = digest.hexdigest()
        if made.change is not None:
            self._check(piece, made.change, lengths_M)

    def _copied(self, piece: Piece, desk: "_Desk") -> Iterator[tuple[int, memoryview]]:
        """Bytes as they are, each block with its place in the tensor."""
        source, row = piece.made.source, piece.made.size // max(1, piece.made.shape[0])
        end, size = piece.last * row, BLOCK_ELEMENTS * 2
        for at in range(piece.first * row, end, size):
            data = desk.bytes("raw", min(size, end - at))
            source.read_into(self.files[source.path], at, data)
            yield at, data

    def _changed(self, piece: Piece, desk: "_Desk", lengths_M: Tensor | None) -> Iterator[tuple[int, memoryview]]:
        """Changed values, each block with its place in the tensor: summed in the wide type, rounded once."""
        made, change, (_, columns) = piece.made, piece.made.change, piece.made.shape
        out = DTYPES[made.dtype]
        factors = None
        if change is not None and change.patch is not None:
            factors = change.factors(slice(piece.first, piece.last), made.wide)
        stretch_M = None
        if lengths_M is not None and change is not None and change.patch is not None:
            assert change.patch.magnitude_O is not None
            stretch_M = (change.patch.magnitude_O.double() / lengths_M).to(made.wide)
        unsure = 0.0
        if factors is not None and change is not None and change.only_adds and out.itemsize < made.wide.itemsize:
            unsure = _unsure(*factors, out)
        in_place = factors is not None and made.by_tiles  # the product's own sum is in float32, and rounds once
        if factors is not None and in_place:
            factors = split(*factors)
        for first, last in piece.blocks():
            stored_nM, data = self._rows(made, first, last, desk)
            w_nM = stored_nM
            if not in_place and w_nM.dtype != made.wide:
                w_nM, data = desk.cast("wide", w_nM, made.wide)
            if change is not None:
                here = None if factors is None else (factors[0][first - piece.first : last - piece.first], factors[1])
                _change(w_nM, change, slice(first, last), here, stretch_M)
                if unsure and stored_nM is not w_nM:
                    _mend(w_nM, stored_nM, change, first, unsure)
            if w_nM.dtype != out:
                rounded_nM, data = desk.cast("raw" if made.same_type else "out", w_nM, out)
                if out == torch.float16 and not bool(rounded_nM.isfinite().all()) and bool(w_nM.isfinite().all()):
                    worst = f"{float(w_nM.abs().max()):.3g} is more than float16 holds (65504); merge with --dtype bf16"
                    raise BadTensor(path=made.file_name, tensor=made.name, reason=worst)
            yield first * columns * out.itemsize, data

    def _rows(self, made: Made, first: int, last: int, desk: "_Desk") -> tuple[Tensor, memoryview]:
        """A block of the source: as values, and as their bytes."""
        source = made.source
        data = desk.bytes("raw", (last - first) * made.shape[1] * DTYPES[source.dtype].itemsize)
        return source.read_rows(self.files[source.path], first, last, data), data

    def _lengths(self, piece: Piece, desk: "_Desk") -> Tensor:
        """Lengths of the columns of V + ΔW: for DoRA on inputs × outputs, the tensor is read twice."""
        made, change = piece.made, piece.made.change
        assert change is not None
        left_nR, right_RM = change.factors(slice(0, piece.last), made.wide)
        squares_M = torch.zeros(made.shape[1], dtype=torch.float64)
        for first, last in piece.blocks():
            w_nM = self._rows(made, first, last, desk)[0].to(made.wide, copy=True)
            if change.value is not None:
                w_nM.copy_(change.value[first:last])
            w_nM.addmm_(left_nR[first:last], right_RM)
            squares_M += w_nM.square_().sum(dim=0, dtype=torch.float64)
        return squares_M.sqrt()

    def _check(self, piece: Piece, change: Change, lengths_M: Tensor | None) -> None:
        """A row of every block, or some columns of it, as they lie in the file, against float64.

        Allowed is one unit in the last place, and a sum in float32.
        """
        made, (_, columns) = piece.made, piece.made.shape
        by_rows = change.patch is not None and change.patch.magnitude_O is not None and lengths_M is None
        many = columns if by_rows else min(columns, _SAMPLED)
        start = sum(made.name.encode()) * _SAMPLED % (columns - many + 1)
        at = slice(start, start + many)
        rows = [first + k % (last - first) for k, (first, last) in enumerate(piece.blocks())]
        source = made.source
        w_KS = source.sample(self.files[source.path], rows, at)
        written_KS = made.target.sample(self.files[made.path], rows, at)
        exact_KS = change.exact(w_KS, torch.tensor(rows), at, lengths_M)
        info, error_KS = torch.finfo(DTYPES[made.dtype]), (written_KS - exact_KS).abs()
        largest_K1 = torch.maximum(exact_KS.abs(), w_KS.abs()).amax(dim=1, keepdim=True)
        wrong_KS = ~(error_KS <= info.eps * exact_KS.abs() + 1e-5 * largest_K1 + info.tiny) & w_KS.isfinite()
        if bool(wrong_KS.any()):
            row, column = map(int, wrong_KS.nonzero()[0])
            reason = f"row {rows[row]} is off its float64 value by {float(error_KS[row, column]):.3g}"
            raise BadTensor(path=made.file_name, tensor=made.name, reason=reason)


def _change(
    w_nM: Tensor, change: Change, rows: slice, factors: tuple[Tensor, Tensor] | None, stretch_M: Tensor | None
) -> None:
    """The formula of `Change` on a block that belongs to the caller, in its own type."""
    if change.value is not None:
        w_nM.copy_(change.value[rows].reshape(w_nM.shape))
    if factors is not None:
        w_nM.addmm_(*factors)
    if stretch_M is not None:
        w_nM.mul_(stretch_M)
    elif change.patch is not None and change.patch.magnitude_O is not None:
        w_nM.mul_((change.patch.magnitude_O[rows].to(w_nM.dtype) / w_nM.norm(dim=1))[:, None])
    if change.shift_N is not None:
        w_nM.add_(change.shift_N[rows].to(w_nM.dtype)[:, None])


def _unsure(left_nR: Tensor, right_RM: Tensor, out: torch.dtype) -> float:
    """How small a sum must be for the error of float32 to count once it is rounded to ``out``.

    R products and W, which is as large as they are where the sum is small, are off by (R + 2)·ε·2‖l‖‖r‖ at most.
    """
    largest = float(left_nR.norm(dim=1).amax() * right_RM.norm(dim=0).amax())
    return 2 * (left_nR.shape[1] + 2) * torch.finfo(torch.float32).eps / torch.finfo(out).eps * largest


def _mend(w_nM: Tensor, stored_nM: Tensor, change: Change, first: int, unsure: float) -> None:
    """Take the few sums in which base and update nearly cancel from float64."""
    w = w_nM.numpy()  # which compares in a sixth of the time
    places_K = torch.from_numpy(np.flatnonzero((w < unsure) & (w > -unsure)))
    if len(places_K):
        rows_K, columns_K = places_K // w_nM.shape[1], places_K % w_nM.shape[1]
        exact_K = stored_nM[rows_K, columns_K].double() + change.update(rows_K + first, columns_K)
        w_nM[rows_K, columns_K] = exact_K.to(w_nM.dtype)


class _Desk:
    """One thread's memory for blocks, used again for each."""

    def __init__(self) -> None:
        self._memory: dict[str, mmap.mmap] = {}

    def bytes(self, name: str, size: int) -> memoryview:
        """``size`` bytes from the beginning of a page."""
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = mmap.mmap(-1, max(size, 1))
        return memoryview(self._memory[name])[:size]

    def cast(self, name: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """``values`` in another type, and the bytes they have there."""
        data = self.bytes(name, values.numel() * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).view(values.shape).copy_(values), data


def _write(file: int, at: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)
