"""What an adapter is: for each module its factors, rank and scale, read from the config and the headers.

    ΔW = scale · B·A        A: rank × in, B: out × rank; scale = α/r, or α/√r when rank-stabilised

(Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.) The format is PEFT's
``adapter_config.json`` and ``adapter_model.safetensors``. Nothing is executed and no tensor is loaded:
the shapes in the headers say what is there, and what belongs to nothing is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .digest import Digest
from .errors import BadConfig, BadTensor, DuplicateTensor, LeftOverTensors
from .safetensors import Header, TensorInfo

CONFIG_FILE = "adapter_config.json"
WRAPPER = "base_model.model."
"""What PEFT puts before the names of the model it wraps."""
RECORDED_BASE = "loractl.base"
"""The key of the safetensors metadata under which our training records the base digest."""
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_PATTERNS = 4096

Kind = Literal["linear", "embedding"]
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector|lora_magnitude_vector\.weight)"
)
_TRIPLET = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ABE])")
"""AdaLoRA's three factors."""
_ROWS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FOLLOWS_FROM_BASE = ("pissa", "olora")
"""Initialisations whose factors can be told from the base, so that the update is B·A less their product."""
_NOT_RUNNABLE = {  # keys of adapter_config.json that, when set, change what is computed in ways we do not do
    "layer_replication": "it replicates layers",
    "target_parameters": "it adapts bare parameters (mixture-of-experts weights)",
    "alora_invocation_tokens": "it is an activated LoRA",
    "arrow_config": "it routes between adapters (Arrow)",
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "it is a block-diagonal LoRA",
    "monteclora_config": "it is a MonteCLoRA adapter",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
    "megatron_config": "it is for Megatron's parallel layers",
}
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip

_ADALORA = {
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Module:
    """The low-rank update of one module of the base."""

    name: str
    """Path in the model that PEFT wrapped, such as ``model.layers.0.self_attn.q_proj``."""
    kind: Kind
    rank: int
    scale: float
    a: TensorInfo
    """rank × in; for an embedding rank × vocabulary."""
    b: TensorInfo
    """out × rank; for an embedding width × rank."""
    magnitude: TensorInfo | None = None
    """DoRA's magnitude vector (Liu et al. 2024, arXiv:2402.09353)."""
    bias: TensorInfo | None = None
    """The bias of lora_B."""
    values: TensorInfo | None = None
    """AdaLoRA's E: the update is scale · B·diag(E)·A (Zhang et al. 2023, arXiv:2303.10512)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ΔW as (out, in); for an embedding (vocabulary, width), as its weight is stored."""
        if self.kind == "embedding":
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], self.a.shape[1]

    @property
    def dora(self) -> bool:
        """Whether the weight is decomposed into magnitude and direction."""
        return self.magnitude is not None


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Everything the registry needs to know of an adapter without loading it."""

    peft_type: str
    modules: tuple[Module, ...] = ()
    saved: tuple[TensorInfo, ...] = ()
    """Whole tensors that replace the base's (modules_to_save, resized embeddings), under the base's own names."""
    biases: tuple[TensorInfo, ...] = ()
    """Biases that replace the base's (``bias: all | lora_only``)."""
    token_rows: tuple[TensorInfo, ...] = ()
    """Trained rows of embeddings, named by the embedding's module."""
    why_not_runnable: str | None = None
    """Why training, evaluation and merging here cannot use it; it is stored and versioned all the same."""
    transposed: bool = False
    """``fan_in_fan_out``: the author says that the base stores its weights as in × out."""
    declared_base: str | None = None
    declared_revision: str | None = None
    recorded_base: Digest | None = None
    """The base digest that our training wrote into the file."""
    recorded: tuple[tuple[str, str], ...] = ()
    """The other ``loractl.*`` entries of the files' metadata, sorted."""
    changed_base: bool = False
    """Its factors were trained on what they had left of the base: they are an update only together with it."""
    opaque: bool = False
    """Its tensors are of a kind whose place in the base we cannot tell."""

    @property
    def runnable(self) -> bool:
        """Whether our compute may be asked to run it."""
        return self.why_not_runnable is None

    @property
    def max_rank(self) -> int:
        """The largest rank of a module; 0 without modules."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the adapted modules' names, sorted, each once."""
        return tuple(sorted({module.name.rpartition(".")[2] for module in self.modules}))

    @property
    def features(self) -> tuple[str, ...]:
        """What goes beyond a plain LoRA on linear layers, sorted: for engines and for our own compute."""
        present = {
            "dora": any(module.dora for module in self.modules),
            "embedding": any(module.kind == "embedding" for module in self.modules),
            "lora-bias": any(module.bias for module in self.modules),
            "bias": bool(self.biases),
            "modules-to-save": bool(self.saved),
            "token-rows": bool(self.token_rows),
            "changed-base": self.changed_base,
            "adalora": any(module.values for module in self.modules),
        }
        return tuple(sorted(name for name, there in present.items() if there))

    @classmethod
    def parse(cls, config: Mapping[str, Any], headers: Mapping[str, Header]) -> "AdapterSpec":
        """The adapter that ``config`` (adapter_config.json) and ``headers`` (file -> header) describe.

        Raises:
            BadConfig: a field of the config has a value that cannot be.
            BadTensor: a factor without its partner, ranks that differ, shapes or dtypes that cannot be.
            DuplicateTensor, LeftOverTensors: a name twice; tensors that belong to nothing.
        """
        tensors = _tensors(headers)
        peft_type = config.get("peft_type")
        if not isinstance(peft_type, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", peft_type):
            raise BadConfig(path=CONFIG_FILE, reason="'peft_type' must name the kind of adapter, such as LORA")
        recorded_base, recorded = _recorded(headers)
        spec = cls(
            peft_type=peft_type.upper(),
            declared_base=_text(config, "base_model_name_or_path"),
            declared_revision=_text(config, "revision"),
            recorded_base=recorded_base,
            recorded=recorded,
        )
        if spec.peft_type not in ("LORA", "ADALORA"):
            reason = f"adapters of type {spec.peft_type} are stored, but only LORA and ADALORA are computed with"
            return replace(spec, why_not_runnable=reason, opaque=True)
        if config.get("target_parameters"):
            return replace(spec, why_not_runnable=_NOT_RUNNABLE["target_parameters"], opaque=True)
        return _Reading(config, tensors).into(spec)


def _tensors(headers: Mapping[str, Header]) -> dict[str, tuple[str, TensorInfo]]:
    found: dict[str, tuple[str, TensorInfo]] = {}
    for path, header in sorted(headers.items()):
        for tensor in header:
            if tensor.name in found:
                raise DuplicateTensor(tensor=tensor.name, first=found[tensor.name][0], second=path)
            found[tensor.name] = (path, tensor)
    return found


def _recorded(headers: Mapping[str, Header]) -> tuple[Digest | None, tuple[tuple[str, str], ...]]:
    ours = {(k, v) for header in headers.values() for k, v in header.metadata.items() if k.startswith("loractl.")}
    bases = {value for key, value in ours if key == RECORDED_BASE}
    if len(bases) > 1:
        raise BadConfig(path=min(headers), reason=f"its files record different bases: {', '.join(sorted(bases))}")
    base = Digest.parse(bases.pop()) if bases else None
    if base is not None and base.algorithm != "b3":
        raise BadConfig(path=min(headers), reason=f"it records the base {base}; base digests start with b3:")
    return base, tuple(sorted((key, value) for key, value in ours if key != RECORDED_BASE))


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise BadConfig(path=CONFIG_FILE, reason=f"'{key}' must be a text")
    return value or None


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadConfig(path=CONFIG_FILE, reason=f"'{key}' must be a finite number, not {ascii(value)[:40]}")
    return float(value)


class _Reading:
    """One pass over the tensors of a LoRA adapter, each put where it belongs."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, TensorInfo]]) -> None:
        self.config = config
        self.tensors = tensors
        self.adalora = str(config["peft_type"]).upper() == "ADALORA"
        self.rank = self._positive("init_r", 12) if self.adalora else self._positive("r", 8)
        self.alpha = _number(config.get("lora_alpha", 8), "lora_alpha")
        self.ranks = {} if self.adalora else _patterns(config, "rank_pattern")
        self.alphas = _patterns(config, "alpha_pattern")
        to_save = config.get("modules_to_save") or []
        self.to_save = (to_save,) if isinstance(to_save, str) else tuple(map(str, to_save))
        self.bias = config.get("bias", "none")

    def into(self, spec: AdapterSpec) -> AdapterSpec:
        """``spec`` with everything that the tensors say."""
        parts: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
        saved, biases, rows, left = [], [], [], []
        for name, (path, tensor) in self.tensors.items():
            if tensor.dtype not in FLOATS:
                raise BadTensor(tensor=name, path=path, reason=f"{tensor.dtype}; factors are {', '.join(FLOATS)}")
            bare = name.removeprefix(WRAPPER)
            if match := (_TRIPLET if self.adalora else _FACTOR).fullmatch(bare):
                parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = (path, tensor)
            elif match := _ROWS.fullmatch(bare):
                rows.append(_named(tensor, match["module"]))
            elif self._is_saved(bare):
                saved.append(_named(tensor, bare.replace(".base_layer.", ".")))
            elif bare.endswith(".bias") and self.bias in ("all", "lora_only"):
                biases.append(_named(tensor, bare.replace(".base_layer.", ".")))
            else:
                left.append(name)
        if left:
            shown = ", ".join(sorted(left)[:8]) + (", …" if len(left) > 8 else "")
            raise LeftOverTensors(count=len(left), tensors=shown)
        modules = tuple(self._module(name, parts[name]) for name in sorted(parts))
        if not (modules or saved or rows or biases):
            raise BadConfig(path=CONFIG_FILE, reason="the adapter has no tensors")
        return replace(
            spec,
            modules=modules,
            saved=tuple(saved),
            biases=tuple(biases),
            token_rows=tuple(rows),
            why_not_runnable=self._why_not(),
            changed_base=self._start() is not None,
            transposed=bool(self.config.get("fan_in_fan_out")),
        )

    def _module(self, name: str, parts: Mapping[str, tuple[str, TensorInfo]]) -> Module:
        kind: Kind = "embedding" if "lora_embedding_A" in parts or "lora_embedding_B" in parts else "linear"
        key_a, key_b = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
        for key in (key_a, key_b, *(["lora_E"] if self.adalora else [])):
            if key not in parts:
                path, present = next(iter(parts.values()))
                raise BadTensor(tensor=present.name, path=path, reason=f"module '{name}' has no {key} beside it")
        path, a = parts[key_a]
        _, b = parts[key_b]
        for factor in (a, b):
            if len(factor.shape) not in ((2,) if kind == "embedding" else (2, 3, 4, 5)):
                reason = f"shape {list(factor.shape)}; a factor is a matrix"
                raise BadTensor(tensor=factor.name, path=path, reason=reason)
        rank = a.shape[0] if self.adalora else _pattern(self.ranks, name, self.rank)
        if a.shape[0] != b.shape[1]:
            reason = f"A has rank {a.shape[0]}, but B of the same module has rank {b.shape[1]}"
            raise BadTensor(tensor=a.name, path=path, reason=reason)
        if a.shape[0] != rank:
            reason = f"it has rank {a.shape[0]}, but {CONFIG_FILE} gives this module rank {rank:g}"
            raise BadTensor(tensor=a.name, path=path, reason=reason)
        alpha = _pattern(self.alphas, name, self.alpha)
        if self.adalora:  # by the rank that it began with, as PEFT has it
            scale = (alpha if alpha > 0 else self.rank) / (self.rank + 1e-5)
        else:
            scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        _, values = parts.get("lora_E", (path, None))
        if values is not None and math.prod(values.shape) != rank:
            reason = f"shape {list(values.shape)}, but A of the same module has rank {rank:g}"
            raise BadTensor(tensor=values.name, path=path, reason=reason)
        _, magnitude = parts.get("lora_magnitude_vector", (path, None))
        _, bias = parts.get("lora_B.bias", (path, None))
        if (magnitude is not None) != bool(self.config.get("use_dora")):
            word = "is there without 'use_dora'" if magnitude else "is missing, though 'use_dora' is set"
            raise BadTensor(tensor=(magnitude or a).name, path=path, reason=f"the magnitude of '{name}' {word}")
        out = b.shape[0]
        for vector in (magnitude, bias):
            if vector is not None and math.prod(vector.shape) != out:
                reason = f"shape {list(vector.shape)}; '{name}' has {out} outputs"
                raise BadTensor(tensor=vector.name, path=path, reason=reason)
        return Module(name, kind, a.shape[0], scale, a, b, magnitude, bias, values)

    def _is_saved(self, bare: str) -> bool:
        module = bare.rpartition(".")[0].removesuffix(".base_layer")
        if module.rpartition(".")[2] in _EMBEDDINGS and bare.endswith(".weight"):
            return True  # PEFT saves resized or targeted embeddings whole
        dotted = f".{module}."
        return any(f".{entry}." in dotted for entry in self.to_save if entry)

    def _why_not(self) -> str | None:
        for key, reason in _NOT_RUNNABLE.items():
            if self.config.get(key):
                return reason
        start = self._start()
        if start is not None and start not in _FOLLOWS_FROM_BASE:
            return (
                f"its initialisation '{start}' changed the base weights by more than they tell; save it again with "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )
        known = _KNOWN | _ADALORA if self.adalora else _KNOWN
        unknown = sorted(k for k, v in self.config.items() if k not in known and k not in _NOT_RUNNABLE and v)
        return f"{CONFIG_FILE} sets {', '.join(unknown)[:200]}, which is not known here" if unknown else None

    def _start(self) -> str | None:
        """The initialisation that took a part out of the base; None where none did."""
        start = str(self.config.get("init_lora_weights", True)).lower()
        return start if start.startswith(_CHANGES_BASE) else None

    def _positive(self, key: str, default: int) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise BadConfig(path=CONFIG_FILE, reason=f"'{key}' must be a whole number from 1 to 65536")
        return value


def _named(tensor: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, tensor.dtype, tensor.shape, tensor.start, tensor.end)


# ── PEFT's patterns: {regular expression of a module's tail: value} ──────────

_PATTERN = re.compile(r"\^?(?:[\w.-]|\\[.d]|\[0-9\]|\([\w.|-]+\)|[*+?](?![*+?]))+\$?")
_QUANTIFIER = re.compile(r"[*+?]")


def _patterns(config: Mapping[str, Any], key: str) -> dict[str, float]:
    given = config.get(key) or {}
    if not isinstance(given, Mapping) or len(given) > MAX_PATTERNS:
        raise BadConfig(path=CONFIG_FILE, reason=f"'{key}' must map at most {MAX_PATTERNS} module patterns to numbers")
    for pattern in given:
        # The expressions come from strangers and run on a server: only plain ones, which cannot backtrack for long.
        plain = _PATTERN.fullmatch(str(pattern)) and ")*" not in pattern and ")+" not in pattern
        if not plain or len(pattern) > 256 or len(_QUANTIFIER.findall(pattern)) > 2:
            reason = f"the pattern {ascii(pattern)[:80]} in '{key}' is too complex: use module names"
            raise BadConfig(path=CONFIG_FILE, reason=reason)
        if key == "rank_pattern" and (type(given[pattern]) is not int or given[pattern] < 1):
            raise BadConfig(path=CONFIG_FILE, reason=f"'{key}' gives {ascii(pattern)[:80]} no whole rank from 1")
    return {str(pattern): _number(value, key) for pattern, value in given.items()}


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the tail of ``module``, as PEFT's get_pattern_key reads them."""
    for pattern, value in patterns.items():
        if module == pattern or module.endswith(f".{pattern}") or re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
