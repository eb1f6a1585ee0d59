"""Merge: W + scale·B·A as a new base folder; nothing is written in place.

What changes, and how, is decided here; `stream` does it, block by block in bounded memory. The update is added in
float32 and rounded once. A folder that is not finished has no config.json, and no shard under its own name. An
output head tied to the embedding is stored apart, and untied in the config, when the adapter changes one of the two.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from registry.core.errors import LocalFailure, NotRunnable, PathUnusable, StoredInBits
from registry.files import base_shards, sync_folder

from .finetune import Report, silent
from .lora import Adapter, fitted, is_transposed
from .model import Model, config_of, module_name
from .packed import Packed, unpacked
from .quantised import FORMS, form_of
from .shards import FLOATS, Stored, stored_in, stored_name, stored_tensors
from .stream import PARTIAL, Change, Made, stream
from .table import model_for
from .weights import DTYPES, framed, write_file

INDEX = "model.safetensors.index.json"
OUT_TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_CONFIG_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: BLAKE3 per tensor (if asked for), which tensors changed, and whether the head was untied."""

    tensors: dict[str, str]
    changed: tuple[str, ...]
    untied: bool


@dataclass(frozen=True)
class Form:
    """How a model is written: by default in the base's types and files, hashed, and on the disk when it is done."""

    dtype: str | None = None
    """A key of `OUT_TYPES`."""
    max_shard_bytes: int | None = None
    """Size of a file, a larger tensor aside."""
    dequantise: bool = False
    """Weights that are stored in 8 or 4 bits are written as numbers."""
    digests: bool = True
    durable: bool = True
    threads: int | None = None
    """One a core by default."""


AS_IT_IS = Form()


def merge(base: Path, adapter: Adapter, out: Path, report: Report = silent, form: Form = AS_IT_IS) -> Merged:
    """Write base ⊕ adapter to the new or empty folder ``out``, in the base's names; its model type need not be known.

    A base stored in 8 or 4 bits is refused unless ``form`` says that it is dequantised: the update is added to the
    numbers that its bits stand for, in float32, and the sum is rounded once. A base that is not is merged as always.
    """
    _refuse_full(out)
    model = model_for(base, adapter)
    stored, packed, beside = stored_tensors(base), dict[str, Packed](), set[str]()
    if (bits := form_of(config_of(base))) is not None:
        if bits not in FORMS:
            raise NotRunnable(what="Merging", reason=f"the base is stored in {bits}; merge into its full weights")
        if not form.dequantise:
            raise StoredInBits(bits=bits)
        packed, beside = unpacked(stored)
        form = replace(form, dtype=form.dtype or _full_type(base))
    changes, extra, untied = _plan(model, adapter, stored)
    for name in packed:
        module = module_name(model, name.removesuffix(".weight"))
        if module is not None and is_transposed(model.get_submodule(module)):
            reason = f"'{name}' is stored in {bits} as outputs × inputs, and belongs into a model as inputs × outputs"
            raise NotRunnable(what="Dequantising", reason=reason)
    for name in changes:
        tensor = packed.get(name) or stored[extra.get(name, name)]
        if tensor.dtype not in FLOATS:
            raise NotRunnable(what="Merging", reason=f"tensor '{name}' is stored as {tensor.dtype}")
    seen = {name: packed.get(name, tensor) for name, tensor in stored.items() if name not in beside}
    return rewrite(base, changes, out, report, form, extra=extra, untied=untied, seen=seen)


def _full_type(base: Path) -> str:
    """The type that a base in 8 or 4 bits computes in, by its config.json."""
    config = config_of(base)
    bits = config["quantization_config"]
    said = config.get("dtype") or config.get("torch_dtype") or bits.get("bnb_4bit_compute_dtype")
    return next((short for short, name in _CONFIG_TYPES.items() if name == said), "bf16")


def rewrite(
    base: Path,
    changes: dict[str, Change],
    out: Path,
    report: Report = silent,
    form: Form = AS_IT_IS,
    *,
    extra: Mapping[str, str] | None = None,
    untied: bool = False,
    seen: Mapping[str, Stored] | None = None,
) -> Merged:
    """Write the base with these changes, by stored names, to the new or empty folder ``out``.

    ``extra``: tensors to be added, name to the one each starts from; ``untied``: the config says that the head is;
    ``seen``: the tensors that are written, where they are not those that the base stores.
    """
    _refuse_full(out)
    shards = _shards(base, out, changes, extra or {}, seen, form)
    total = sum(shard.size for shard in shards)
    out.mkdir(parents=True, exist_ok=True)
    try:
        for shard in shards:
            shard.begin()
        made = [tensor for shard in shards for tensor in shard.tensors]
        taken = stream(
            made, lambda done: report({"step": done, "steps": total}),
            digests=form.digests, durable=form.durable, threads=form.threads,
        )  # fmt: skip
        for shard in shards:
            shard.finish(form.durable)
    except BaseException:
        for shard in shards:
            shard.partial.unlink(missing_ok=True)
            shard.path.unlink(missing_ok=True)
        raise
    if form.durable:
        sync_folder(out)
    if len(shards) > 1 or (form.max_shard_bytes is None and (base / INDEX).is_file()):
        places = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(out / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    _copy_other_files(base, out)
    _write_config(base, out, untied, form)
    return Merged(taken, tuple(sorted(changes)), untied)


def _refuse_full(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise PathUnusable(path=str(out), reason="a model goes to a new or empty folder, never over another one")


# ── which tensors change, and how ────────────────────────────────────────────


def _plan(model: Model, adapter: Adapter, stored: dict[str, Stored]) -> tuple[dict[str, Change], dict[str, str], bool]:
    """Changes by the name they are written under, tensors to be added (name to source), and whether to untie."""
    wanted: dict[str, Change] = {}
    patched, replaced = fitted(model, adapter)
    for name, _, parameters in replaced:
        wanted |= {f"{name}.{key}": Change(value=value) for key, value in parameters.items()}
    for name, module, patch in patched:
        transposed = is_transposed(module)
        weight, bias = (wanted.get(f"{name}.{part}", Change()) for part in ("weight", "bias"))
        wanted[f"{name}.weight"] = replace(weight, patch=patch, transposed=transposed)
        if patch.bias_O is not None:
            wanted[f"{name}.bias"] = replace(bias, shift_N=patch.bias_O.float() * patch.scale)

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


# ── where to ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Shard:
    """A file to be written."""

    path: Path
    header: bytes
    tensors: tuple[Made, ...]

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}{PARTIAL}")

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def begin(self) -> None:
        """The header, and room for the tensors."""
        try:
            with self.partial.open("wb") as file:
                file.write(self.header)
                file.truncate(len(self.header) + self.size)
        except OSError as error:
            raise LocalFailure.of(error, self.path) from error

    def finish(self, durable: bool) -> None:
        """Give the complete file its name."""
        try:
            if durable:
                with self.partial.open("rb") as file:
                    os.fsync(file.fileno())
            self.partial.replace(self.path)
        except OSError as error:
            raise LocalFailure.of(error, self.path) from error


Written = tuple[str, Stored, str]
"""A tensor's name, where it comes from, and its type."""


def _shards(
    base: Path, out: Path, changes: dict[str, Change], extra: Mapping[str, str], seen: Mapping[str, Stored] | None,
    form: Form,
) -> list[_Shard]:  # fmt: skip
    """The base's own shards, or as large ones as ``form`` allows."""
    dtype, limit = OUT_TYPES[form.dtype] if form.dtype else None, form.max_shard_bytes
    files: list[tuple[str, list[Written]]] = []
    metadata: dict[str, str] = {}
    for path in base_shards(base):
        tensors, found = stored_in(path)
        metadata |= found
        if seen is not None:
            tensors = {name: seen[name] for name in tensors if name in seen}
        sources = tensors | {name: tensors[source] for name, source in extra.items() if source in tensors}
        written = [(name, s, dtype if dtype and s.dtype in FLOATS else s.dtype) for name, s in sources.items()]
        files.append((path.name, written))
    if limit is not None:
        groups = list(_filled([tensor for _, written in files for tensor in written], limit))
        files = [(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, start=1)]
        if len(files) == 1:
            files = [("model.safetensors", groups[0])]
    return [_shard(out / name, written, changes, metadata) for name, written in files]


def _bytes(source: Stored, dtype: str) -> int:
    return source.size // DTYPES[source.dtype].itemsize * DTYPES[dtype].itemsize


def _filled(tensors: Sequence[Written], limit: int) -> Iterator[list[Written]]:
    """The tensors in their order, a new group before the one that a group has no more room for."""
    group: list[Written] = []
    room = limit
    for name, source, dtype in tensors:
        size = _bytes(source, dtype)
        if group and size > room:
            yield group
            group, room = [], limit
        group.append((name, source, dtype))
        room -= size
    yield group


def _shard(path: Path, written: list[Written], changes: dict[str, Change], metadata: dict[str, str]) -> _Shard:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    starts = []
    for name, source, dtype in written:
        starts.append(end)
        end += _bytes(source, dtype)
        header[name] = {"dtype": dtype, "shape": list(source.shape), "data_offsets": [starts[-1], end]}
    data = framed(header)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    tensors = tuple(
        Made(name, source, dtype, changes.get(name), partial, len(data) + start)
        for (name, source, dtype), start in zip(written, starts, strict=True)
    )
    return _Shard(path, data, tensors)


# ── everything but the weights ───────────────────────────────────────────────


def _copy_other_files(base: Path, out: Path) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, out / path.name)


def _write_config(base: Path, out: Path, untied: bool, form: Form) -> None:
    """Last of all: with config.json the folder is a model."""
    data, dtype = (base / "config.json").read_bytes(), form.dtype
    if untied or dtype:
        config = json.loads(data)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                if untied:
                    part["tie_word_embeddings"] = False
                if form.dequantise:
                    part.pop("quantization_config", None)
                if dtype:
                    part |= {key: _CONFIG_TYPES[dtype] for key in ("dtype", "torch_dtype") if key in part}
        if dtype and not config.keys() & {"dtype", "torch_dtype"}:
            config["dtype"] = _CONFIG_TYPES[dtype]
        data = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    write_file(out / "config.json", data)
