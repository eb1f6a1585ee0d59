"""Weights that a checkpoint stores in 8 or 4 bits, read as the numbers they stand for, some rows at a time.

    int8        Ŵ = s_o·q ⁄ 127 by row                       (Dettmers et al. 2022, arXiv:2208.07339)
    nf4, fp4    Ŵ = s_k·c[q] by blocks of (mostly) 64        (Dettmers et al. 2023, arXiv:2305.14314)
                s_k = t_j·d[p_k] + m by blocks of 256, where the scales are quantised as well

The form is bitsandbytes': beside ``x.weight`` lie its scales and codes under names that begin with it. No library is
needed to read it; tests compare with the library's own numbers. Legend: O outputs, I inputs, n rows of a block.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import NotRunnable

from .shards import Stored

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Packed(Stored):
    """Seen as a float32 tensor of shape O×I; ``parts`` are what is stored of it, by the ends of their names."""

    parts: Mapping[str, Stored]
    state: Mapping[str, Any] | None
    """Of 4 bits: sizes of blocks, and the mean of scales. None: 8 bits."""

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are its values."""
        return False

    def sample(self, file: int, rows: Sequence[int], at: slice) -> Tensor:
        """Columns ``at`` of some rows, in float64."""
        data = bytearray(4 * self.shape[1])
        found = [self.read_rows(file, row, row + 1, memoryview(data))[0, at].double() for row in rows]
        return torch.stack(found)

    def read_rows(self, file: int, first: int, last: int, data: memoryview) -> Tensor:  # noqa: ARG002
        """Rows from ``first`` to before ``last`` as numbers, into ``data``; of files, each part opens its own."""
        w_nI = torch.frombuffer(data, dtype=torch.float32).view(last - first, self.shape[1])
        return w_nI.copy_(self._by_rows(first, last) if self.state is None else self._by_blocks(first, last))

    def _by_rows(self, first: int, last: int) -> Tensor:
        scales_n = self.parts["SCB"].elements(first, last).float() / 127
        q_nI = self.parts["weight"].elements(first * self.shape[1], last * self.shape[1]).view(last - first, -1)
        return q_nI.float() * scales_n[:, None]

    def _by_blocks(self, first: int, last: int) -> Tensor:
        assert self.state is not None
        size, (start, stop) = self.state["blocksize"], (first * self.shape[1], last * self.shape[1])
        begin, blocks = start // size * size, -(-stop // size)
        packed = self.parts["weight"]
        q = packed.elements(begin // 2, min(blocks * size // 2, packed.size))
        values = self._pairs.index_select(0, q.int()).view(-1)
        if short := -len(values) % size:
            values = torch.cat([values, values.new_zeros(short)])
        scaled = values.view(-1, size) * self._scales(begin // size, blocks)[:, None]
        return scaled.view(-1)[start - begin : stop - begin].view(last - first, -1)

    @cached_property
    def _pairs(self) -> Tensor:
        """The two numbers of each byte: the first is its high half."""
        code = self.parts["weight.quant_map"].read().float()
        return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)

    def _scales(self, first: int, last: int) -> Tensor:
        assert self.state is not None
        scales = self.parts["weight.absmax"].elements(first, last)
        if "weight.nested_absmax" not in self.parts:
            return scales.float()
        size, code = self.state["nested_blocksize"], self.parts["weight.nested_quant_map"].read().float()
        begin = first // size
        nested = self.parts["weight.nested_absmax"].elements(begin, -(-last // size)).float().repeat_interleave(size)
        here = nested[first - begin * size : last - begin * size]
        offset: float = self.state["nested_offset"]
        return code.index_select(0, scales.int()) * here + offset


def unpacked(stored: Mapping[str, Stored]) -> tuple[dict[str, Packed], set[str]]:
    """The weights of a checkpoint that are in 8 or 4 bits, and the names of what is stored for their sake alone."""
    found: dict[str, Packed] = {}
    beside: set[str] = set()
    for name, key in stored.items():
        module, _, _ = name.partition(f"weight{_STATE}")
        if name.endswith(".SCB"):
            module = name.removesuffix("SCB")
        elif module == name:
            continue
        starts = (f"{module}weight", f"{module}SCB")
        parts = {other.removeprefix(module): part for other, part in stored.items() if other.startswith(starts)}
        found[f"{module}weight"] = _packed(parts["weight"], parts, key)
        beside |= {f"{module}{end}" for end in parts.keys() - {"weight"}}
    return found, beside


def _packed(weight: Stored, parts: Mapping[str, Stored], key: Stored) -> Packed:
    state, shape = None, weight.shape
    if not key.name.endswith(".SCB"):
        state = json.loads(bytes(key.read().tolist()))
        shape = tuple(state["shape"])
        if state["quant_type"] not in ("nf4", "fp4"):
            raise NotRunnable(what="Dequantising", reason=f"'{weight.name}' is stored as {state['quant_type']}")
    return Packed(weight.path, weight.name, "F32", shape, 0, 4 * prod(shape), parts, state)
