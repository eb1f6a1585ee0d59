"""GGUF out of base folders and adapters, for llama.cpp and what is built on it.

A file is read by code that knows one architecture by its name, so a family is written only where both sides compute
the same, and settings that llama.cpp does not know are refused: it would load them and answer otherwise.
Facts about names, layouts and defaults are llama.cpp's own (its converters and `src/models`); see docs/adr/0013.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from registry.core.errors import NotExportable
from registry.files import read_json

from .container import Placed, write_gguf
from .finetune import Report, silent
from .lora import Adapter, Patch, fitted, is_transposed
from .model import Model, skeleton
from .shards import FLOATS, Stored, stored_name, stored_tensors
from .vocabulary import vocabulary

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of what most tensors of a file are stored as (`LLAMA_FTYPE`)."""
_QUANTS = 2
"""Version of the layout of quantised blocks."""
_NO_PLACE = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Buffers that older checkpoints store and that follow from the configuration."""


@dataclass(frozen=True)
class Family:
    """A model type of transformers and the architecture of llama.cpp that computes the same."""

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that must have these values, since llama.cpp has them built in."""
    pairs: bool = False
    """Whether its rotary embedding turns neighbours: rows of q and k are put in that order."""


_SILU: Mapping[str, Any] = {"hidden_act": "silu"}
_PLAIN: Mapping[str, Any] = {**_SILU, "attention_bias": False}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _SILU, pairs=True),
    "mistral": Family("llama", _SILU, pairs=True),
    "smollm3": Family("smollm3", {**_PLAIN, "mlp_bias": False}, pairs=True),
    "qwen2": Family("qwen2", _SILU),
    "qwen3": Family("qwen3", _PLAIN),
    "phi3": Family("phi3", _PLAIN),
    "gpt2": Family("gpt2", {
        "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written."""

    architecture: str
    tensors: int
    types: dict[str, int]
    """How many tensors are stored as what."""
    size: int
    checked: int
    """Rows that were read back and compared."""


def export_model(
    folder: Path, out: Path, dtype: str | None = None, report: Report = silent, origin: Mapping[str, str] | None = None
) -> Exported:
    """Write a base folder as one GGUF file with its tokenizer.

    ``dtype`` is a key of `TYPES`, by default what most weights of the folder are stored as. Vectors, norms and learned
    positions are float32, as llama.cpp wants them. ``origin`` goes into the file as it is.
    """
    model = skeleton(folder)
    family = family_of(model.config)
    stored = stored_tensors(folder)
    type_ = TYPES[dtype] if dtype else _own_type(stored)
    tensors = list(_placed(model, family, stored, type_))
    facts = {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[type_],
        "general.quantization_version": _QUANTS,
        **_shape_facts(model, family),
        **vocabulary(_tokenizer(folder), model.get_input_embeddings().weight.shape[0], out.stem),
        **(origin or {}),
    }
    return _written(out, family, facts, tensors, report)


def export_adapter(
    base: Path, adapter: Adapter, out: Path, dtype: str | None = None, report: Report = silent,
    origin: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    """Write an adapter of ``base`` (its configuration is enough) as llama.cpp's LoRA file, in float32 by default.

    llama.cpp adds alpha ⁄ rank · B·A with one alpha for all modules. Where scale · rank differs between modules, alpha
    is the most frequent one, and B of the others is multiplied by scale · rank ⁄ alpha.
    """
    model = skeleton(base)
    family = family_of(model.config)
    patched, replaced = fitted(model, adapter)
    if replaced:
        names = ", ".join(f"'{name}.{key}'" for name, _, parameters in replaced for key in parameters)
        raise _not(f"it replaces {names}, and llama.cpp adds low-rank updates only", what="The adapter")
    if dtype == "q8_0":
        raise _not("llama.cpp reads factors in fp32, bf16 or fp16; q8_0 is for models", what="The adapter")
    for name, module, patch in patched:
        _check_patch(model, name, module, patch)
    alphas = Counter(alpha for _, _, patch in patched if (alpha := patch.scale * patch.a_RI.shape[0]))
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    to = _names(family, model)
    tensors = []
    for name, module, patch in patched:
        target = to(f"{name}.weight")
        b_OR, own = patch.b_OR, patch.scale * patch.a_RI.shape[0]
        if own != alpha:
            b_OR = b_OR.float() * (own / alpha)
        heads = _heads(model.config, family, f"{name}.weight")
        type_ = TYPES[dtype or "fp32"]
        a = patch.a_RI.T if isinstance(module, torch.nn.Embedding) else patch.a_RI
        tensors += [Placed(f"{target}.lora_a", type_, a.contiguous()), Placed(f"{target}.lora_b", type_, b_OR, heads)]
    facts = {
        "general.type": "adapter",
        "general.name": out.stem,
        "general.file_type": _FILE_TYPES[TYPES[dtype or "fp32"]],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        **(origin or {}),
    }
    return _written(out, family, facts, tensors, report)


def _written(
    out: Path, family: Family, facts: Mapping[str, Any], tensors: Sequence[Placed], report: Report
) -> Exported:
    checked = write_gguf(out, family.architecture, facts, tensors, report)
    types = dict(Counter(tensor.type for tensor in tensors))
    return Exported(family.architecture, len(tensors), types, out.stat().st_size, checked)


def _not(reason: str, what: str = "The base") -> NotExportable:
    return NotExportable(what=what, reason=reason)


# ── which families, and what of their settings ───────────────────────────────


def family_of(config: Any) -> Family:
    """The family of a model's configuration; `NotExportable` where llama.cpp would compute something else."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise _not(f"its type is '{config.model_type}'; these are written: {', '.join(sorted(FAMILIES))}")
    if getattr(config, "quantization_config", None):
        raise _not("it is quantised; export its unquantised weights, with --dtype q8_0 where they shall be small")
    for key, value in family.fixed.items():
        if getattr(config, key, value) != value:
            raise _not(f"its {key} is {getattr(config, key)!r}, and llama.cpp's {family.architecture} has {value!r}")
    if config.model_type == "smollm3":
        expected = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            raise _not("its layers without rotary embedding are not every fourth one, as llama.cpp has them")
    return family


def _shape_facts(model: Model, family: Family) -> dict[str, Any]:
    """Everything about the architecture that is not in the tensors' shapes."""
    config, of = model.config, family.architecture
    if config.model_type == "gpt2":
        return {
            f"{of}.context_length": config.n_positions,
            f"{of}.embedding_length": config.n_embd,
            f"{of}.block_count": config.n_layer,
            f"{of}.feed_forward_length": config.n_inner or 4 * config.n_embd,
            f"{of}.attention.head_count": config.n_head,
            f"{of}.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    size = _head_size(config)
    rope = dict(config.rope_parameters)
    share = float(rope.get("partial_rotary_factor") or 1.0)
    if share != 1 and of != "phi3":
        raise _not(f"its rotary embedding turns {share:.0%} of a head, and llama.cpp's {of} turns all")
    return {
        f"{of}.context_length": _context(config),
        f"{of}.embedding_length": config.hidden_size,
        f"{of}.block_count": config.num_hidden_layers,
        f"{of}.feed_forward_length": config.intermediate_size,
        f"{of}.attention.head_count": config.num_attention_heads,
        f"{of}.attention.head_count_kv": config.num_key_value_heads,
        f"{of}.attention.key_length": size,
        f"{of}.attention.value_length": size,
        f"{of}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{of}.rope.dimension_count": int(size * share),
        f"{of}.vocab_size": model.get_input_embeddings().weight.shape[0],
        **_rope_facts(of, rope),
    }


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: Any) -> int:
    """How long a row may be. llama.cpp has no sliding window for these families: inside of one, nothing differs."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    slides = window is not None and (layers is None or "sliding_attention" in layers)
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def _rope_facts(of: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {f"{of}.rope.freq_base": float(rope["rope_theta"])}
    known = {
        "default": set[str](),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    }
    kind = rope.get("rope_type", "default")
    more = {key for key, value in rope.items() if value is not None}
    more -= {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | known.get(kind, set())
    built_in = (rope.get("beta_fast") or 32) == 32 and (rope.get("beta_slow") or 1) == 1
    if kind not in known or more or not built_in or (kind == "llama3" and of != "llama"):
        raise _not(f"its rotary embedding is scaled in a way that is not written: {dict(rope)}")
    if kind in ("linear", "yarn"):
        facts |= {f"{of}.rope.scaling.type": kind, f"{of}.rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        facts[f"{of}.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return facts


def _llama3_divisors(config: Any) -> Tensor | None:
    """What Llama 3.1 divides each frequency by: 1 for short waves, the factor for those longer than the old context."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    size, factor, old = _head_size(config), rope["factor"], rope["original_max_position_embeddings"]
    waves_F = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share_F = ((old / waves_F - low) / (high - low)).clamp(0, 1)
    divisors_F: Tensor = 1 / ((1 - share_F) / factor + share_F)
    return divisors_F.float()


# ── which tensor becomes which ───────────────────────────────────────────────


def _own_type(stored: Mapping[str, Stored]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.size
    most = sizes.most_common(1)[0][0]
    return most if most in _FILE_TYPES else "F32"


def _names(family: Family, model: Model) -> Any:
    """From a parameter's name to llama.cpp's name."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)

    def to(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _not(f"llama.cpp's {family.architecture} has no place for '{name}'")
        return str(found)

    return to


def _heads(config: Any, family: Family, name: str) -> int:
    """Among how many heads the rows of a tensor are put in pairs; 0 for none."""
    if not family.pairs:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(heads.get(name.split(".")[-2], 0))


def _placed(model: Model, family: Family, stored: Mapping[str, Stored], type_: str) -> Iterator[Placed]:
    to = _names(family, model)
    left = {name for name in stored if not name.endswith(_NO_PLACE)}
    if (divisors_F := _llama3_divisors(model.config)) is not None:
        yield Placed("rope_freqs.weight", "F32", divisors_F)
    for name, value in model.named_parameters():
        found = stored_name(model, name, stored)
        if found is None:
            raise _not(f"it stores no tensor '{name}'")
        source = stored[found]
        left.discard(found)
        if source.dtype not in FLOATS or source.shape != tuple(value.shape):
            raise _not(f"tensor '{found}' is {source.dtype} {list(source.shape)}, and {list(value.shape)} is expected")
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = value.ndim == 2 and is_transposed(owner) and not isinstance(owner, torch.nn.Embedding)
        target = to(name)
        own = "F32" if value.ndim == 1 or target.startswith("position_embd") else type_
        yield _fitting(Placed(target, own, source, _heads(model.config, family, name), turned))
    head = model.get_output_embeddings()
    tied = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is head}
    if head.weight is model.get_input_embeddings().weight:
        left -= tied  # stored twice, computed with once
    if left:
        raise _not(f"it stores tensors that its configuration does not: {', '.join(sorted(left)[:5])}")


def _fitting(tensor: Placed) -> Placed:
    """The tensor itself, or in float16 where its rows are no multiple of Q8_0's blocks: what llama.cpp does."""
    if tensor.type == "Q8_0" and tensor.shape[-1] % 32:
        return Placed(tensor.name, "F16", tensor.source, tensor.heads, tensor.turned)
    return tensor


def _check_patch(model: Model, name: str, module: Any, patch: Patch) -> None:
    what = "The adapter"
    if patch.magnitude_O is not None:
        raise _not(f"'{name}' has DoRA magnitudes, and llama.cpp knows none; merge it: --merge", what)
    if patch.bias_O is not None:
        raise _not(f"'{name}' has a bias of B, and llama.cpp knows none; merge it: --merge", what)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight and (module is head or module is embedding):
        raise _not(f"'{name}' is embedding and output head in one, and llama.cpp would change both; merge it: --merge",
                   what)  # fmt: skip


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    read_json(folder / "config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise _not(f"its tokenizer does not load, and GGUF holds it: {str(error).splitlines()[0]}") from error
