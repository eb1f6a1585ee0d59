"""Which serving engines can load an adapter, and why not.

From the engines' own documentation and loaders, by the names given in `SOURCES`; limits move with their
releases, so each rule says which engine's it is and nothing else depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .adapter import AdapterSpec

SOURCES: Mapping[str, str] = {
    "vllm": "vLLM: docs 'LoRA Adapters', vllm/lora/peft_helper.py, LoRAConfig.max_lora_rank",
    "sglang": "SGLang: docs 'LoRA Serving', python/sglang/srt/lora/lora_config.py",
    "lorax": "LoRAX: docs 'Adapters', server/lorax_server/adapters/lora.py",
    "peft": "PEFT: docs 'LoRA', PeftModel.from_pretrained",
    "llama.cpp": "llama.cpp: convert_lora_to_gguf.py, tools/server README '--lora'",
}
_ATTENTION_AND_MLP = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine takes."""

    max_rank: int | None
    features: frozenset[str]
    """Of `AdapterSpec.features`, those it can load."""
    targets: frozenset[str] | None = None
    """The last parts of the module names that it adapts; None for any linear layer."""


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(512, frozenset({"embedding"})),
    "sglang": Engine(None, frozenset({"embedding"}), frozenset(_ATTENTION_AND_MLP | {"embed_tokens", "lm_head"})),
    "lorax": Engine(128, frozenset()),
    "peft": Engine(None, frozenset({
        "adalora", "bias", "changed-base", "dora", "embedding", "lora-bias", "modules-to-save", "token-rows",
    })),
    "llama.cpp": Engine(None, frozenset({"embedding"})),
}  # fmt: skip
_WORDS = {
    "bias": "trained biases",
    "dora": "DoRA magnitudes",
    "embedding": "low-rank updates of embeddings",
    "lora-bias": "biases of lora_B",
    "modules-to-save": "whole trained modules (modules_to_save)",
    "token-rows": "trained token rows",
    "changed-base": "factors trained on a changed base (a rebase to its own base makes it plain)",
    "adalora": "AdaLoRA's three factors (a rebase to its own base makes it plain)",
}


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """Whether an engine can load an adapter; without, why not."""

    loads: bool
    reasons: tuple[str, ...] = ()


def profiles(adapter: AdapterSpec) -> dict[str, EngineVerdict]:
    """The verdict of every engine we know."""
    return {name: _verdict(name, engine, adapter) for name, engine in ENGINES.items()}


def _verdict(name: str, engine: Engine, adapter: AdapterSpec) -> EngineVerdict:
    reasons = []
    if adapter.opaque and name != "peft":
        reasons.append(f"adapters of type {adapter.peft_type} with such tensors are not loaded")
    elif adapter.why_not_runnable and name != "peft":
        reasons.append(adapter.why_not_runnable)
    if engine.max_rank is not None and adapter.max_rank > engine.max_rank:
        reasons.append(f"rank {adapter.max_rank} is over its maximum of {engine.max_rank}")
    reasons += [f"it does not take {_WORDS[feature]}" for feature in adapter.features if feature not in engine.features]
    if engine.targets is not None and (others := sorted(set(adapter.targets) - engine.targets)):
        reasons.append(f"it does not adapt {', '.join(others)}")
    return EngineVerdict(not reasons, tuple(reasons))


def bit(engine: str) -> int:
    """The bit of ``engine`` in a version's set of engines; the order of `ENGINES` is for good."""
    return 1 << list(ENGINES).index(engine)


def bits(verdicts: Mapping[str, EngineVerdict]) -> int:
    """The engines that can load it, as a set of bits."""
    return sum(bit(engine) for engine, verdict in verdicts.items() if verdict.loads)
