"""A base model as a value: its tensor table, architecture, tokenizer, and the digest of it all.

    tensor  = blake3(raw little-endian row-major bytes)
    leaf    = blake3("loractl/1 leaf" 00 name 00 dtype 00 "d0,d1,…" 00 tensor)
    weights = blake3("loractl/1 weights" 00 count 00 leaf leaf …)          leaves in byte order of name
    arch    = blake3("loractl/1 arch" 00 canonical JSON)
    base    = blake3("loractl/1 base" 00 weights arch)                     printed b3:<hex>

00 is the byte zero, digests enter as 32 raw bytes, counts as ASCII decimals, names as UTF-8. The digest
does not depend on sharding, file order or metadata. The format is permanent: tests/golden pins it.

Writers spell one model differently: with or without a base prefix, with a tied head stored or not, with
buffers that are no parameters, with transformers 4's ``rope_theta`` or 5's ``rope_parameters``. `FAMILIES`
says per model type how they become one spelling; for an unknown model type everything stays as stored.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from blake3 import blake3

from .digest import Digest
from .errors import BadConfig, BadDigest, BadManifest, DuplicateTensor
from .manifest import canonical_json, check_json, check_values
from .safetensors import DTYPE_BITS, MAX_DIMENSIONS, MAX_ELEMENTS, MAX_TENSORS, check_tensor_name

ArchKind = Literal["canonical", "raw", "none"]
Config = Mapping[str, Any]
MAX_TABLE_BYTES = 256 << 20
MAX_LAYERS = 100_000
MAX_PARAMETERS = 1 << 50
"""Numbers that all tensors of a base hold together."""


def _b3(*parts: bytes) -> Digest:
    return Digest("b3", blake3(b"".join(parts)).hexdigest())


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the table: a tensor's canonical name, its dtype as in safetensors, shape, and digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: Digest

    @property
    def leaf(self) -> bytes:
        """The 32 bytes that enter the weights digest."""
        shape = ",".join(map(str, self.shape))
        return _b3(f"loractl/1 leaf\0{self.name}\0{self.dtype}\0{shape}\0".encode(), self.digest.raw).raw

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Digests of a tokenizer: compared and reported, never a part of the base digest."""

    vocabulary: Digest | None = None
    """Tokens, merges, normalisation and special tokens."""
    chat_template: Digest | None = None


@dataclass(frozen=True, slots=True)
class BaseDiff:
    """How one base model differs from another, by set operations on their tables."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    """Same shape and dtype, other bytes."""
    reshaped: tuple[str, ...]
    """Another shape or dtype."""
    same: int
    arch: Mapping[str, tuple[Any, Any]]
    """Field -> (here, there) where the architectures differ; absent is None."""
    vocabulary_changed: bool
    chat_template_changed: bool

    @property
    def empty(self) -> bool:
        """Whether weights and architecture are the same."""
        return not (self.added or self.removed or self.changed or self.reshaped or self.arch)


@dataclass(frozen=True)
class BaseModel:
    """Frozen weights, identified by content. Rows are in byte order of their canonical names."""

    tensors: tuple[Tensor, ...]
    arch_kind: ArchKind = "none"
    arch_fields: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer = Tokenizer()

    @classmethod
    def of(cls, stored: Iterable[Tensor], config: Config | None = None, tokenizer: Tokenizer = Tokenizer()) -> Self:
        """The model whose checkpoint stores the rows ``stored`` (any order) beside ``config`` (config.json)."""
        kind, fields = canonical_arch(config)
        return cls(canonical_tensors(stored, config), kind, fields, tokenizer)

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """Canonical name -> row."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def weights(self) -> Digest:
        """Digest of the tensor table alone."""
        count = str(len(self.tensors)).encode()
        return _b3(b"loractl/1 weights\0", count, b"\0", *(tensor.leaf for tensor in self.tensors))

    @cached_property
    def arch(self) -> Digest:
        """Digest of the architecture alone."""
        return _b3(b"loractl/1 arch\0", canonical_json({"kind": self.arch_kind, "fields": self.arch_fields}))

    @cached_property
    def digest(self) -> Digest:
        """The base digest."""
        return _b3(b"loractl/1 base\0", self.weights.raw, self.arch.raw)

    @property
    def model_type(self) -> str:
        """As transformers names it; empty without a config."""
        return str(self.arch_fields.get("model_type", ""))

    @property
    def family(self) -> "Family | None":
        """The spelling rules of this model type, if we know it."""
        return FAMILIES.get(self.model_type) if self.arch_kind == "canonical" else None

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def to_json(self) -> bytes:
        """The table as canonical JSON: equal models give equal bytes."""
        tokenizer = self.tokenizer
        return canonical_json(
            {
                "schema": "loractl/1 base",
                "arch": {"kind": self.arch_kind, "fields": self.arch_fields},
                "tokenizer": {
                    "vocabulary": tokenizer.vocabulary and str(tokenizer.vocabulary),
                    "chat_template": tokenizer.chat_template and str(tokenizer.chat_template),
                },
                "tensors": [[t.name, t.dtype, list(t.shape), t.digest.hex] for t in self.tensors],
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The inverse of `to_json`, checked; `BadManifest` says what is wrong."""
        try:
            check_values(data)
            table = json.loads(data)
            if table["schema"] != "loractl/1 base":
                raise BadManifest(reason="it is not a base table of schema 'loractl/1 base'")
            tensors = tuple(_row(*row) for row in table["tensors"])
            tokens = {key: Digest.parse(value) for key, value in table["tokenizer"].items() if value is not None}
            kind, fields = table["arch"]["kind"], table["arch"]["fields"]
            tokenizer = Tokenizer(**tokens)
            check_json(fields)
            canonical_json(fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, BadDigest) as error:
            raise BadManifest(reason=f"the base table cannot be read: {error}") from error
        names = [tensor.name.encode() for tensor in tensors]
        if not tensors or len(tensors) > MAX_TENSORS or names != sorted(set(names)):
            raise BadManifest(reason=f"a base table has 1 to {MAX_TENSORS} tensors, in byte order of name, each once")
        if kind not in ("canonical", "raw", "none") or not isinstance(fields, dict):
            raise BadManifest(reason="the architecture of a base table is 'canonical', 'raw' or 'none', with fields")
        model = cls(tensors, kind, fields, tokenizer)
        if model.parameters > MAX_PARAMETERS:
            reason = f"a base table of {model.parameters} numbers; at most {MAX_PARAMETERS} are allowed"
            raise BadManifest(reason=reason)
        return model

    def to_compressed(self) -> bytes:
        """`to_json`, compressed: what the registry stores."""
        return zlib.compress(self.to_json(), 6)

    @classmethod
    def from_compressed(cls, data: bytes) -> Self:
        """The inverse of `to_compressed`, bounded."""
        unpacker = zlib.decompressobj()
        try:
            table = unpacker.decompress(data, MAX_TABLE_BYTES)
        except zlib.error as error:
            raise BadManifest(reason=f"the base table cannot be unpacked: {error}") from error
        if not unpacker.eof:
            raise BadManifest(reason=f"the base table is truncated, or over {MAX_TABLE_BYTES} bytes")
        return cls.from_json(table)


def _row(name: str, dtype: str, shape: list[int], digest: str) -> Tensor:
    if dtype not in DTYPE_BITS or len(shape) > MAX_DIMENSIONS or not all(type(d) is int and d > 0 for d in shape):
        raise ValueError(f"tensor {ascii(name)[:80]} has dtype {ascii(dtype)[:20]} and shape {ascii(shape)[:60]}")
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"tensor {ascii(name)[:80]} has over {MAX_ELEMENTS} elements: shape {ascii(shape)[:60]}")
    return Tensor(check_tensor_name(name, "base table"), dtype, tuple(shape), Digest.parse(f"b3:{digest}"))


def diff(a: BaseModel, b: BaseModel) -> BaseDiff:
    """What changes from ``a`` to ``b``."""
    both = [name for name in a.by_name if name in b.by_name]
    pairs = {name: (a.by_name[name], b.by_name[name]) for name in both}
    reshaped = {name for name, (x, y) in pairs.items() if (x.shape, x.dtype) != (y.shape, y.dtype)}
    changed = {name for name, (x, y) in pairs.items() if x.digest != y.digest} - reshaped
    fields = sorted(a.arch_fields.keys() | b.arch_fields.keys())
    return BaseDiff(
        added=tuple(name for name in b.by_name if name not in a.by_name),
        removed=tuple(name for name in a.by_name if name not in b.by_name),
        changed=tuple(name for name in both if name in changed),
        reshaped=tuple(name for name in both if name in reshaped),
        same=len(both) - len(changed) - len(reshaped),
        arch={
            name: (a.arch_fields.get(name), b.arch_fields.get(name))
            for name in fields
            if a.arch_fields.get(name) != b.arch_fields.get(name)
        },
        vocabulary_changed=a.tokenizer.vocabulary != b.tokenizer.vocabulary,
        chat_template_changed=a.tokenizer.chat_template != b.tokenizer.chat_template,
    )


# ── canonical names ──────────────────────────────────────────────────────────


def canonical_name(stored: str, config: Config | None) -> str | None:
    """The canonical name of a tensor that a checkpoint stores as ``stored``; None for a buffer that is dropped.

    A tied head keeps its own name here; whether it is the embedding again is known only beside it
    (`canonical_tensors`).
    """
    family = _family(config)
    if family is None:
        return stored
    if family.buffers.search(stored):
        return None
    return family.prefix + stored if stored.partition(".")[0] in family.children else stored


def canonical_tensors(stored: Iterable[Tensor], config: Config | None) -> tuple[Tensor, ...]:
    """The rows under their canonical names, in byte order of name, without buffers and tied copies."""
    found: dict[str, Tensor] = {}
    for tensor in stored:
        name = canonical_name(tensor.name, config)
        if name is None:
            continue
        if name in found:
            raise DuplicateTensor(tensor=name, first=found[name].name, second=tensor.name)
        found[name] = tensor
    family = _family(config)
    if family and config is not None and canonical_arch(config)[1].get("tie_word_embeddings") and family.head in found:
        head, embedding = found[family.head], found.get(family.embedding)
        if embedding is None or (head.digest, head.shape, head.dtype) == (
            embedding.digest, embedding.shape, embedding.dtype
        ):  # fmt: skip
            found[family.embedding] = head
            del found[family.head]
    rows = (Tensor(name, t.dtype, t.shape, t.digest) for name, t in found.items())
    return tuple(sorted(rows, key=lambda tensor: tensor.name.encode()))


# ── canonical architecture ───────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Family:
    """How writers spell one model type, and what an absent field of its config means."""

    prefix: str
    children: frozenset[str]
    """First parts of names below the prefix."""
    embedding: str
    fields: Mapping[str, Any]
    """Every field that decides what the model computes, with its default."""
    settle: Callable[[dict[str, Any]], None]
    """Brings what is left of old spellings into the canonical form, in place."""
    buffers: re.Pattern[str] = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
    """Stored tensors that are no parameters."""
    in_by_out: re.Pattern[str] = re.compile(r"(?!)")
    """Modules whose weight is in × out (transformers' Conv1D)."""
    head: str = "lm_head.weight"
    rope: Mapping[str, Any] | None = field(default_factory=lambda: {"rope_theta": 10000})
    """Defaults of the rotary embedding; None without one."""


_IGNORED = {  # fields that do not change what inference computes, or only name things
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "use_cache", "model_type",
    "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "pruned_heads",
    "gradient_checkpointing",
}  # fmt: skip
_IGNORED_WHEN_KNOWN = re.compile(
    r"architectures|auto_map|(\w+_)?initializer_range|init_std|(\w+_)?(dropout|pdrop)|pretraining_tp|id2label|label2id|"
    r"num_labels|problem_type|task_specific_params|finetuning_task|tokenizer_class|prefix|summary_\w+|\w+_token_id|"
    r"chunk_size_feed_forward|is_encoder_decoder|is_decoder|cross_attention_hidden_size|add_cross_attention|"
    r"tie_encoder_decoder|keys_to_ignore_at_inference|reorder_and_upcast_attn|n_ctx|unsloth_\w+|"
    r"do_sample|max_length|min_length|max_new_tokens|num_beams|num_beam_groups|temperature|top_[kp]|typical_p|"
    r"(repetition|length|diversity)_penalty|early_stopping|no_repeat_ngram_size|encoder_no_repeat_ngram_size|"
    r"bad_words_ids|num_return_sequences|output_scores|return_dict_in_generate|forced_\w+|remove_invalid_values|"
    r"exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|tf_legacy_loss"
)


def _family(config: Config | None) -> Family | None:
    return FAMILIES.get(str(config.get("model_type"))) if config is not None else None


def canonical_arch(config: Config | None) -> tuple[ArchKind, dict[str, Any]]:
    """The kind of description and its fields, equal for equal architectures of a known model type."""
    if config is None:
        return "none", {}
    given = {key: _plain(value) for key, value in config.items() if key not in _IGNORED}
    model_type = {"model_type": str(config.get("model_type", ""))}
    family = _family(config)
    if family is None:
        return "raw", model_type | given
    left = {key: value for key, value in given.items() if not _IGNORED_WHEN_KNOWN.fullmatch(key)}
    try:
        rope = _rope(left, family)
        extra = {key: value for key, value in left.items() if key not in family.fields and not _absent(value)}
        fields = {key: left.get(key, default) for key, default in family.fields.items()} | extra
        family.settle(fields)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise BadConfig(path="config.json", reason=f"a field has a value of the wrong kind: {error}") from error
    fields = {key: value for key, value in fields.items() if value is not None}
    return "canonical", model_type | fields | ({"rope_parameters": rope} if rope else {})


def _absent(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _plain(value: Any) -> Any:
    """JSON values with one spelling per number: 10000.0 is 10000, and what JSON cannot say is a word."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _rope(fields: dict[str, Any], family: Family) -> dict[str, Any] | None:
    """The rotary embedding as transformers 5 writes it, taken out of ``fields`` in either spelling."""
    scaling, parameters = fields.pop("rope_scaling", None), fields.pop("rope_parameters", None)
    theta = [fields.pop(key, None) for key in ("rope_theta", "rotary_emb_base")]
    partial = [fields.pop(key, None) for key in ("partial_rotary_factor", "rotary_pct")]
    if family.rope is None:
        return None
    rope = dict(scaling or parameters or {})
    older = {"rope_theta": theta, "partial_rotary_factor": partial}
    for key, values in older.items():
        rope[key] = next((v for v in (rope.get(key), *values, family.rope.get(key)) if v is not None), None)
    if rope["partial_rotary_factor"] in (None, 1):
        del rope["partial_rotary_factor"]
    kind = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or kind or "default"
    if "original_max_position_embeddings" in family.fields:  # phi3: its field wins, and its types have old names
        rope["rope_type"] = {"su": "longrope", "yarn": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        outer = fields.get("original_max_position_embeddings", family.fields.get("original_max_position_embeddings"))
        inner = rope.get("original_max_position_embeddings")
        positions = fields.get("max_position_embeddings", family.fields.get("max_position_embeddings"))
        rope["original_max_position_embeddings"] = outer or inner or positions
    return {key: value for key, value in rope.items() if value is not None}


def _heads(fields: dict[str, Any]) -> None:
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "head_dim" in fields and fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]


def _windows(fields: dict[str, Any]) -> None:
    """Qwen: which layers slide follows from three fields; the list of layer types says it once."""
    _heads(fields)
    first, window = fields.pop("max_window_layers"), fields["sliding_window"]
    if not fields.pop("use_sliding_window"):
        window = fields["sliding_window"] = None
    fields["layer_types"] = fields["layer_types"] or [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in _layers(fields)
    ]


def _layers(fields: dict[str, Any]) -> range:
    count = fields["num_hidden_layers"]
    if not 0 <= count <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {count}; at most {MAX_LAYERS} are allowed")
    return range(count)


def _alternating(fields: dict[str, Any]) -> None:
    _heads(fields)
    fields["layer_types"] = fields["layer_types"] or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in _layers(fields)
    ]
    fields.pop("hidden_act", None)  # written by transformers 4, read by nothing


def _gpt2(fields: dict[str, Any]) -> None:
    for general, own in (("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"),
                         ("num_attention_heads", "n_head"), ("max_position_embeddings", "n_positions")):  # fmt: skip
        fields[own] = fields.pop(general, fields[own])
    fields["n_inner"] = fields["n_inner"] or 4 * fields["n_embd"]


def _decoder(settle: Callable[[dict[str, Any]], None] = _heads, **fields: Any) -> Family:
    """A Llama-shaped family: what differs from Llama's own config is given."""
    llama = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    return Family(
        prefix="model.",
        children=frozenset({"layers", "embed_tokens", "norm"}),
        embedding="model.embed_tokens.weight",
        fields=llama | fields,
        settle=settle,
    )


_QWEN: dict[str, Any] = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
FAMILIES: Mapping[str, Family] = {
    "llama": _decoder(attention_bias=False, mlp_bias=False, head_dim=None),
    "mistral": _decoder(
        intermediate_size=14336, num_key_value_heads=8, head_dim=None, max_position_embeddings=131072,
        sliding_window=4096,
    ),
    "qwen2": _decoder(_windows, **_QWEN),
    "qwen3": _decoder(_windows, head_dim=128, attention_bias=False, **_QWEN),
    "phi3": _decoder(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5,
        original_max_position_embeddings=4096, sliding_window=None,
    ),
    "gemma": _decoder(
        hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, hidden_act="gelu_pytorch_tanh", **_GEMMA
    ),
    "gemma2": _decoder(
        _alternating, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, hidden_act=None,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
        final_logit_softcapping=30, attn_logit_softcapping=50,
        **_GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "gpt2": Family(
        prefix="transformer.",
        children=frozenset({"h", "wte", "wpe", "ln_f"}),
        embedding="transformer.wte.weight",
        fields={
            "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
        },
        settle=_gpt2,
        buffers=re.compile(r"\.attn\.(masked_)?bias$"),
        in_by_out=re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)$"),
        rope=None,
    ),
    "gpt_neox": Family(
        prefix="gpt_neox.",
        children=frozenset({"layers", "embed_in", "final_layer_norm"}),
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        fields={
            "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
            "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
        },
        settle=_heads,
        buffers=re.compile(r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"),
        rope={"rope_theta": 10000, "partial_rotary_factor": 0.25},
    ),
}  # fmt: skip


# ── tokenizer ────────────────────────────────────────────────────────────────

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "spiece.model",
    "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def tokenizer_digests(files: Mapping[str, bytes]) -> Tokenizer:
    """Digests of the tokenizer in ``files`` (name -> bytes); the same after a re-save by another version.

    ``tokenizer.json`` is read for what it means (without padding, truncation and its version; merges as pairs);
    a tokenizer without one is its vocabulary files as they are. `BadConfig` for files that are of another form.
    """
    try:
        return _tokenizer(files)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadConfig(path="tokenizer.json", reason=f"the tokenizer's files cannot be read: {error}") from error


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    config = _json(files, "tokenizer_config.json")
    special = {key: _content(value) for key in _SPECIAL if (value := config.get(key)) is not None}
    fast = _json(files, "tokenizer.json")
    if fast:
        model = dict(fast.get("model") or {})
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        kept = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
        vocabulary = {"model": _plain(model), **{key: _plain(fast.get(key)) for key in kept}}
    else:
        raw = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
        vocabulary = {name: str(_b3(files[name])) for name in raw if name in files}
    template = files.get("chat_template.jinja")
    if template is None:
        found = config.get("chat_template") or _json(files, "chat_template.json").get("chat_template")
        template = canonical_json(found) if isinstance(found, list) else found.encode() if found else None
    return Tokenizer(
        vocabulary=_b3(b"loractl/1 vocabulary\0", canonical_json([vocabulary, special])) if vocabulary else None,
        chat_template=_b3(b"loractl/1 chat template\0", template) if template is not None else None,
    )


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        check_values(files.get(name, b""))
        found = json.loads(files[name]) if name in files else {}
    except (ValueError, RecursionError) as error:
        raise BadConfig(path=name, reason=f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadConfig(path=name, reason="it is not a JSON object")
    return found
