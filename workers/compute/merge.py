"""Merge: W + scale·B·A as a new base folder, streamed block by block; nothing is written in place.

The update is added in float32 and rounded once to the base's own type. Memory is a few blocks, whatever the
size of a tensor. A row of every block is read back and compared with the same sum in float64. An output head
tied to the embedding is stored apart, and untied in the config, when the adapter changes one of the two.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from registry.core.errors import BadTensor, NotRunnable, PathUnusable
from registry.files import atomic_write, base_shards

from .finetune import Report, silent
from .lora import Adapter, Patch, fitted, is_transposed
from .model import Model, skeleton
from .shards import Stored, stored_in, stored_name, stored_tensors
from .weights import framed, write_file

Change = Callable[[Tensor, slice], Tensor]
"""New values for a block of rows, computed in the block's own type."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: BLAKE3 per tensor, which tensors changed, and whether the head had to be untied."""

    tensors: dict[str, str]
    changed: tuple[str, ...]
    untied: bool


def merge(base: Path, adapter: Adapter, out: Path, report: Report = silent) -> Merged:
    """Write base ⊕ adapter to the new or empty folder ``out``, in the base's shards, names and types."""
    if out.exists() and any(out.iterdir()):
        raise PathUnusable(path=str(out), reason="a merge goes to a new or empty folder, never over another model")
    model = skeleton(base)
    if getattr(model.config, "quantization_config", None):
        raise NotRunnable(what="Merging", reason="the base is quantised; merge into its unquantised weights")
    stored = stored_tensors(base)
    changes, extra, untied = _plan(model, adapter, stored)
    for name in changes:
        tensor = stored[extra.get(name, name)]
        if tensor.dtype not in _FLOATS:
            raise NotRunnable(
                what="Merging", reason=f"tensor '{name}' is stored as {tensor.dtype}; dequantise the base"
            )
    out.mkdir(parents=True, exist_ok=True)
    _copy_other_files(base, out, untied)
    total = sum(tensor.size for tensor in stored.values()) + sum(stored[name].size for name in extra.values())
    digests: dict[str, str] = {}
    places: dict[str, str] = {}
    for path in base_shards(base):
        tensors, metadata = stored_in(path)
        written = {name: tensors[name] for name in tensors}
        written |= {name: stored[source] for name, source in extra.items() if source in tensors}
        digests |= _write_shard(
            out / path.name, path, written, metadata, changes, lambda done: report({"step": done, "steps": total}),
            before=sum(stored[name].size for name in places if name in stored),
        )  # fmt: skip
        places |= dict.fromkeys(written, path.name)
    if (base / "model.safetensors.index.json").is_file():
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(out / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
    return Merged(digests, tuple(sorted(changes)), untied)


# ── which tensors change, and how ────────────────────────────────────────────


def _plan(model: Model, adapter: Adapter, stored: dict[str, Stored]) -> tuple[dict[str, Change], dict[str, str], bool]:
    """Changes by the name they are written under, tensors to be added (name to source), and whether to untie."""
    wanted: dict[str, Change] = {}
    patched, replaced = fitted(model, adapter)
    for name, _, parameters in replaced:
        wanted |= {f"{name}.{key}": _replaced(value) for key, value in parameters.items()}
    for name, module, patch in patched:
        transposed = is_transposed(module)
        if patch.magnitude_O is not None and transposed:
            raise NotRunnable(what="Merging", reason=f"'{name}' has DoRA on a weight stored as inputs × outputs")
        wanted[f"{name}.weight"] = _added(wanted.get(f"{name}.weight"), patch, transposed)
        if patch.bias_O is not None:
            wanted[f"{name}.bias"] = _shifted(wanted.get(f"{name}.bias"), patch.bias_O.float() * patch.scale)

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    pair = [f"{name}.weight" for name, module in model.named_modules() if module is head or module is embedding]
    untied = head is not None and head.weight is embedding.weight and any(name in wanted for name in pair)
    extra: dict[str, str] = {}
    if untied:
        here = {name: stored_name(model, name, stored) for name in pair}
        source = next((found for found in here.values() if found), None)
        extra = {name: source for name, found in here.items() if not found and source}
    changes = {}
    for name, change in wanted.items():
        found = name if name in extra else stored_name(model, name, stored)
        if found is None:
            raise NotRunnable(what="Merging", reason=f"the base stores no tensor '{name}'")
        changes[found] = change
    return changes, extra, untied


def _added(before: Change | None, patch: Patch, transposed: bool) -> Change:
    """W + scale·B·A; with DoRA its rows brought to the recorded lengths."""

    def change(w_rows: Tensor, rows: slice) -> Tensor:
        w_rows = before(w_rows, rows) if before else w_rows
        a, b = patch.a_RI.to(w_rows.dtype), patch.b_OR.to(w_rows.dtype)
        w_rows = w_rows + patch.scale * (a[:, rows].T @ b.T if transposed else b[rows] @ a)
        if patch.magnitude_O is not None:
            w_rows = w_rows * (patch.magnitude_O[rows].to(w_rows.dtype) / w_rows.norm(dim=1))[:, None]
        return w_rows

    return change


def _replaced(value: Tensor) -> Change:
    return lambda w_rows, rows: value[rows].to(w_rows.dtype)


def _shifted(before: Change | None, shift_O: Tensor) -> Change:
    return lambda w_rows, rows: (before(w_rows, rows) if before else w_rows) + shift_O[rows].to(w_rows.dtype)


# ── writing ──────────────────────────────────────────────────────────────────


def _copy_other_files(base: Path, out: Path, untied: bool) -> None:
    for path in sorted(base.iterdir()):
        if not path.is_file() or path.name.endswith(_WEIGHTS):
            continue
        if path.name == "config.json" and untied:
            config = json.loads(path.read_bytes())
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
            write_file(out / path.name, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        else:
            shutil.copyfile(path, out / path.name)


def _write_shard(
    target: Path,
    source: Path,
    tensors: dict[str, Stored],
    metadata: dict[str, str],
    changes: dict[str, Change],
    progress: Callable[[int], None],
    before: int,
) -> dict[str, str]:
    """One shard with its changes; BLAKE3 of every tensor in it."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.size]
        }  # fmt: skip
        end += tensor.size
    digests = {}
    with source.open("rb") as reads, atomic_write(target) as writes, Path(writes.name).open("rb") as back:
        at = writes.write(framed(header))
        for name, tensor in tensors.items():
            digest, change = blake3(), changes.get(name)
            for rows, block in tensor.blocks(reads.fileno()):
                made = block if change is None else _apply(change, block, rows)
                data = made.contiguous().reshape(-1).view(torch.uint8).numpy().data
                at += writes.write(data)
                digest.update(data)
                if change is not None:
                    writes.flush()
                    _check(back.fileno(), at - len(data), name, target.name, change, block, rows)
                progress(before := before + len(data))
            digests[name] = digest.hexdigest()
    return digests


def _apply(change: Change, block: Tensor, rows: slice) -> Tensor:
    """The changed block: summed in float32 (float64 for a float64 base), rounded once."""
    wide = torch.promote_types(block.dtype, torch.float32)
    return change(block.to(wide), rows).to(block.dtype)


def _check(file: int, at: int, name: str, path: str, change: Change, block: Tensor, rows: slice) -> None:
    """The block's first row as it lies in the file, against float64: at most a rounding and a float32 sum apart."""
    size = block[0].numel() * block.element_size()
    row = torch.frombuffer(bytearray(os.pread(file, size, at)), dtype=block.dtype).double()
    exact = change(block[:1].double(), slice(rows.start, rows.start + 1)).reshape(-1)
    info = torch.finfo(block.dtype)
    bound = info.eps * exact.abs() + 1e-5 * (exact.abs().max() + block[0].double().abs().max()) + info.tiny
    if bool(((row - exact).abs() > bound).any()):
        worst = float((row - exact).abs().max())
        raise BadTensor(path=path, tensor=name, reason=f"row {rows.start} is off its float64 value by {worst:.3g}")
