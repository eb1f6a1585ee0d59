"""Tiny base models and adapters, made from a seed.

`tiny_base` and `tiny_adapter` write plain numbers and import no torch: for rooms that only move and judge files.
`tiny_llama` is a real transformers model with a real tokenizer, far below a million parameters.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from registry.core.adapter import RECORDED_BASE, WRAPPER
from registry.core.base_model import BaseModel
from registry.core.manifest import canonical_json
from registry.files import digest_base, read_header, read_json

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> Path:
    """``tensors`` as one safetensors file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=metadata)
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True))
    return path


def llama_tensors(seed: int = 0, *, width: int = 16, layers: int = 2, vocabulary: int = 64) -> dict[str, NDArray[Any]]:
    """The tensors of a Llama-shaped checkpoint with a tied head."""
    random = np.random.default_rng(seed)
    shapes = {"embed_tokens": (vocabulary, width), "norm": (width,)}
    for layer in range(layers):
        place = f"layers.{layer}."
        shapes |= {place + f"self_attn.{part}_proj": (width, width) for part in "qo"}
        shapes |= {place + f"self_attn.{part}_proj": (width // 2, width) for part in "kv"}
        shapes |= {place + f"mlp.{part}_proj": (2 * width, width) for part in ("gate", "up")}
        shapes |= {place + "mlp.down_proj": (width, 2 * width)}
        shapes |= {place + norm: (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return {
        f"model.{name}.weight": (random.standard_normal(shape) / np.sqrt(width)).astype(np.float32)
        for name, shape in shapes.items()
    }


def llama_config(*, width: int = 16, layers: int = 2, vocabulary: int = 64, **changes: Any) -> dict[str, Any]:
    """The config.json beside `llama_tensors`, as transformers 5 writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "dtype": "float32",
        "transformers_version": "5.23.0",
    } | changes


def tiny_base(
    folder: Path, seed: int = 0, *, width: int = 16, layers: int = 2, vocabulary: int = 64, shards: int = 1
) -> Path:
    """A base model folder of a few kilobytes, in ``shards`` files, without a tokenizer."""
    tensors = llama_tensors(seed, width=width, layers=layers, vocabulary=vocabulary)
    write_json(folder / "config.json", llama_config(width=width, layers=layers, vocabulary=vocabulary))
    write_shards(folder, tensors, shards)
    return folder


def readable_base(folder: Path, *, width: int = 16, drift: float = 0.0, seed: int = 1) -> Path:
    """A tiny Llama with a byte-level tokenizer, without torch; ``drift`` moves its matrices by that share of noise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    chance = np.random.default_rng(seed)
    tensors = llama_tensors(width=width, vocabulary=len(alphabet))
    for name, weights in tensors.items():
        noise = chance.standard_normal(weights.shape).astype(np.float32) * np.float32(drift * weights.std())
        tensors[name] = np.ones_like(weights) if "norm" in name else weights + noise
    write_json(folder / "config.json", llama_config(width=width, vocabulary=len(alphabet)))
    write_shards(folder, tensors, 1)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return folder


def letters(folder: Path) -> None:
    """Which half of six letters: ``data.jsonl`` to learn it from, and ``suite.jsonl`` of other rows."""
    chance = random.Random(1)
    drawn = enumerate(chance.choices("abcdef", k=400))
    rows = [(f"{number} {letter}", "-+"[letter in "def"]) for number, letter in drawn]
    suite = [{"prompt": prompt, "choices": ["-", "+"], "answer": "-+".index(sign)} for prompt, sign in rows[:200]]
    data = [{"prompt": prompt, "completion": sign} for prompt, sign in rows[200:]]
    for name, lines in (("suite", suite), ("data", data)):
        (folder / f"{name}.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))


def write_shards(folder: Path, tensors: Mapping[str, NDArray[Any]], shards: int) -> None:
    """``tensors`` as model.safetensors, or over ``shards`` files with an index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    names = list(tensors)
    where: dict[str, str] = {}
    for index in range(shards):
        part = names[index::shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def tiny_adapter(
    folder: Path,
    base: Path,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    *,
    record_base: bool = False,
    zero: bool = False,
    size: float = 0.05,
    **config: Any,
) -> Path:
    """A PEFT adapter folder for the base in ``base``; with ``record_base`` as our training would write it."""
    random = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    for shard in sorted(base.glob("*.safetensors")):
        for tensor in read_header(shard):
            module = tensor.name.removesuffix(".weight")
            if module.rpartition(".")[2] not in targets:
                continue
            out, into = tensor.shape
            place = f"{WRAPPER}{module}"
            tensors[f"{place}.lora_A.weight"] = (random.standard_normal((rank, into)) * size).astype(np.float32)
            b = np.zeros((out, rank)) if zero else random.standard_normal((out, rank)) * size
            tensors[f"{place}.lora_B.weight"] = b.astype(np.float32)
    metadata = {"format": "pt"} | ({RECORDED_BASE: str(digest_base(base).digest)} if record_base else {})
    write_safetensors(folder / "adapter_model.safetensors", tensors, metadata)
    write_json(folder / "adapter_config.json", adapter_config(base, rank, targets, **config))
    return folder


def adapter_config(base: Path | str, rank: int = 4, targets: Sequence[str] = ("q_proj", "v_proj"), **changes: Any) -> (
    dict[str, Any]
):  # fmt: skip
    """An adapter_config.json as PEFT writes it."""
    return {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | changes


def tiny_llama(
    folder: Path, seed: int = 0, *, width: int = 32, layers: int = 2, heads: int = 4, tied: bool = True
) -> Path:
    """A transformers Llama of some tens of thousands of parameters and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers types it not
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(alphabet), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=256,
            tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base_of(folder: Path) -> BaseModel:
    """The base model in ``folder`` as a value."""
    return digest_base(folder, threads=1)


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json in ``folder``."""
    return read_json(folder / "config.json")
