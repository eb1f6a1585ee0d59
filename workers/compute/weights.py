"""Adapters as files: PEFT's format in and out, its names at this edge only.

Read: rank and alpha patterns, rank-stabilised scale, DoRA magnitudes, embeddings, biases and
``modules_to_save``; AdaLoRA as the plain adapter that it is, B·(diag(E)·A) (Zhang et al. 2023, arXiv:2303.10512).
Refused by name: other kinds, and variants that need more than its factors; what changed its base is read together with
it (`rebase.normalise`). Written: the same bytes for the same adapter by the same code, with the digests of base and
recipe and the code's release in the safetensors metadata (``loractl.base``, ``loractl.recipe``, ``loractl.code``, for
three factors ``loractl.variant``), where PEFT does not look.
"""

import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from registry.core.errors import BadConfig, BadHeader, BadTensor, NotAnAdapter, NotRunnable
from registry.core.manifest import canonical_json
from registry.files import atomic_write

from .lora import Adapter, Patch
from .plain import plain, targets_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight)?"
)
_TRIPLET = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ABE])")
_ELSEWHERE = {
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is for Megatron's parallel layers",
    "trainable_token_indices": "it trains single tokens",
    "alora_invocation_tokens": "it switches itself on at invocation tokens",
    "use_qalora": "QALoRA pools its input",
    "target_parameters": "it targets bare parameters",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes among other adapters",
    "kasa_config": "KaSA changes the base it is trained on",
    "velora_config": "VeLoRA projects its activations",
    "monteclora_config": "its factors are random variables",
}
_ADALORA = {
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
_CHANGED_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a PEFT folder; `NotRunnable` says what of it has no meaning here, or none without its base."""
    adapter = read_unconverted(folder)
    if start := changed_base(adapter.config):
        reason = f"its initialisation '{start}' changed the base it was trained on; a rebase to that makes it plain"
        raise NotRunnable(what="The adapter", reason=reason)
    return adapter


def changed_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that took a part out of the base for the factors to train on; None where none did."""
    start = str(config.get("init_lora_weights", True)).lower()
    return start if start.startswith(_CHANGED_THE_BASE) else None


def read_unconverted(folder: Path) -> Adapter:
    """The same, without asking whether its factors are an update of the base or of what was left of it."""
    config = _read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise BadTensor(path=WEIGHTS, tensor=key, reason=f"its name does not start with '{_PREFIX}'")
        if match := (_TRIPLET if config["peft_type"] == "ADALORA" else _FACTOR).fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = value
        else:
            replaced[name.replace(".base_layer.", ".")] = value
    if config["peft_type"] == "ADALORA":
        return _adalora(parts, config, replaced)
    patches = {module: _patch(module, found, config) for module, found in sorted(parts.items())}
    if not patches and not replaced:
        raise NotAnAdapter(path=str(folder), reason=f"{WEIGHTS} holds no factors")
    return Adapter(patches, config, replaced)


def write_adapter(adapter: Adapter, folder: Path, *, base: str, recipe: str) -> None:
    """The adapter as a PEFT folder, bound to base digest ``base``, made by the recipe of digest ``recipe``.

    The name of a base in its configuration is dropped: it stood for the weights that the adapter came from.
    """
    tensors = {}
    for name, value in adapter.replaced.items():
        owner, _, parameter = name.rpartition(".")
        tensors[f"{_PREFIX}{owner}.{'base_layer.' if owner in adapter.patches else ''}{parameter}"] = value
    for module, patch in adapter.patches.items():
        name = f"{_PREFIX}{module}"
        tensors[f"{name}.lora_embedding_A" if patch.embedding else f"{name}.lora_A.weight"] = patch.a_RI
        tensors[f"{name}.lora_embedding_B" if patch.embedding else f"{name}.lora_B.weight"] = patch.b_OR
        if patch.magnitude_O is not None:
            tensors[f"{name}.lora_magnitude_vector"] = patch.magnitude_O
        if patch.bias_O is not None:
            tensors[f"{name}.lora_B.bias"] = patch.bias_O
    folder.mkdir(parents=True, exist_ok=True)
    marks = {"format": "pt", "loractl.base": base, "loractl.recipe": recipe, "loractl.code": code()}
    if any(patch.basis_OR is not None for patch in adapter.patches.values()):
        marks["loractl.variant"] = "three-factor"  # stored as B·A like any other
    write_tensors(folder / WEIGHTS, tensors, marks)
    config = adapter.config | {"base_model_name_or_path": None, "revision": None}
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def code() -> str:
    """Which code computes here, as files record it: the releases, and not for which device they were built."""
    return f"loractl {version('loractl')}, torch {torch.__version__.partition('+')[0]}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    if not path.is_file():
        raise NotAnAdapter(path=str(path.parent), reason=f"there is no {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise BadHeader(path=str(path), reason=str(error)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically; equal tensors and metadata give equal bytes (the library's order varies)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, value in sorted(tensors.items()):
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _SPELLED[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    with atomic_write(path) as file:
        file.write(framed(header))
        for _, value in sorted(tensors.items()):  # one copy of one tensor at a time
            file.write(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def framed(header: Mapping[str, Any]) -> bytes:
    """A safetensors header: its length in eight bytes, then JSON padded with spaces to a multiple of eight."""
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, data: bytes) -> None:
    """A whole file at once, atomically."""
    with atomic_write(path) as file:
        file.write(data)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise NotAnAdapter(path=str(folder), reason=f"there is no {CONFIG}")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadConfig(path=CONFIG, reason=f"not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadConfig(path=CONFIG, reason="not a JSON object")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise NotRunnable(what=f"An adapter of type {kind}", reason="only LoRA and AdaLoRA are computed here")
    for key, reason in _ELSEWHERE.items():
        if config.get(key):
            raise NotRunnable(what="The adapter", reason=f"{reason} ({key})")
    return config


def _patch(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    embedding = "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for mine, other in (names, reversed(names)):
        if mine not in parts:
            raise BadTensor(path=WEIGHTS, tensor=f"{_PREFIX}{module}.{mine}", reason=f"missing beside its {other}")
    a_RI, b_OR = (parts[name] for name in names)
    if a_RI.ndim != 2 or b_OR.ndim != 2:
        raise NotRunnable(what="The adapter", reason=f"'{module}' is a convolution")
    if a_RI.shape[0] != b_OR.shape[1]:
        raise BadTensor(
            path=WEIGHTS, tensor=f"{_PREFIX}{module}.{names[1]}",
            reason=f"rank {b_OR.shape[1]}, but A of the same module has rank {a_RI.shape[0]}",
        )  # fmt: skip
    rank = a_RI.shape[0]
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return Patch(
        a_RI,
        b_OR,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        magnitude_O=parts.get("lora_magnitude_vector"),
        bias_O=parts.get("lora_B.bias"),
        embedding=embedding,
    )


def _adalora(
    parts: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], replaced: Mapping[str, Tensor]
) -> Adapter:
    """ΔW = α ⁄ (r₀ + 10⁻⁵)·B·diag(E)·A with the initial rank r₀; modules that were left no rank are not in it."""
    rank = int(config.get("init_r", 12))
    alpha = float(config.get("lora_alpha", 8))
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    patches = {}
    for module, found in sorted(parts.items()):
        if missing := sorted({"lora_A", "lora_B", "lora_E"} - found.keys()):
            raise BadTensor(path=WEIGHTS, tensor=f"{_PREFIX}{module}.{missing[0]}", reason="missing beside the others")
        a_RI, b_OR, e_R1 = found["lora_A"], found["lora_B"], found["lora_E"].reshape(-1, 1)
        if not len(a_RI) == len(e_R1) == b_OR.shape[-1]:
            raise BadTensor(
                path=WEIGHTS, tensor=f"{_PREFIX}{module}.lora_E",
                reason=f"{len(e_R1)} values for A of rank {len(a_RI)} and B of rank {b_OR.shape[-1]}",
            )  # fmt: skip
        if len(a_RI):
            patches[module] = Patch(a_RI.float() * e_R1.float(), b_OR.float() * scale, 1.0)
    if not patches and not replaced:
        raise NotAnAdapter(path=WEIGHTS, reason="no module of it was left a rank")
    like_lora = {key: value for key, value in config.items() if key not in _ADALORA} | {"peft_type": "LORA"}
    unpruned = Adapter(patches, like_lora)
    targets = targets_of([unpruned], list(patches)) if len(patches) == len(parts) else sorted(patches)
    return plain(patches, like_lora, targets, replaced)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or its end: a regular expression, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
