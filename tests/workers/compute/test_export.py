"""GGUF files: what is written is read back by others (gguf's reader, transformers) and gives the same answers."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from registry.core.errors import BadTensor, DiskFull, ForeignTokenizer, NotExportable, NotRunnable, PathUnusable
from tests.workers import factories
from workers import export as program
from workers.compute import container, shards
from workers.compute.export import FAMILIES, export_adapter, export_model
from workers.compute.lora import Adapter, Patch
from workers.compute.merge import merge
from workers.compute.model import Model
from workers.compute.vocabulary import vocabulary
from workers.compute.weights import read_adapter, write_adapter

SIZES: Mapping[str, Any] = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied-with-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt2": ("gpt2", {}),
}


def made(case: str = "llama", **changes: Any) -> Model:
    kind, own = CASES[case]
    sizes = dict(SIZES)
    if kind == "gpt2":
        sizes = {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "bos_token_id": 1,
                 "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(sizes | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms of one and biases of zero would hide what is left out
            parameter.copy_(torch.rand(parameter.shape) + (0.5 if "norm" in name or "ln_" in name else -0.5))
    return model


def saved(model: Model, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    factories.merging_tokenizer().save_pretrained(folder)
    return folder


# ── an independent reader: names by hand, rows by index ──────────────────────

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip


def original_name(config: Any, name: str) -> str:
    table, layers = (GPT2_NAMES, "transformer.h") if config.model_type == "gpt2" else (NAMES, "model.layers")
    if config.model_type == "phi3":
        table = table | {"ffn_up": "mlp.gate_up_proj"}
    parts = name.split(".")
    if parts[0] == "blk":
        return f"{layers}.{parts[1]}.{table[parts[2]]}.{'.'.join(parts[3:])}"
    return f"{table[parts[0]]}.{'.'.join(parts[1:])}"


def halves(config: Any, name: str, value: Tensor) -> Tensor:
    """Rows of q and k from llama.cpp's neighbours back to Llama's halves."""
    part = name.split(".")[2] if name.startswith("blk") else ""
    if config.model_type not in ("llama", "mistral", "smollm3") or part not in ("attn_q", "attn_k"):
        return value
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    size = len(value) // heads
    rows = [head * size + 2 * (i % (size // 2)) + i // (size // 2) for head in range(heads) for i in range(size)]
    return value[rows]


def values(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def fact(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def read_model(path: Path, config: Any) -> Model:
    """The model in a file, by its own tensors and the configuration that it was written from."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    found = {}
    for name, value in values(path).items():
        if name == "rope_freqs.weight":
            continue
        value = halves(config, name, value)
        matrix = config.model_type == "gpt2" and name.startswith("blk") and value.ndim == 2
        found[original_name(config, name)] = value.T if matrix else value
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found[original_name(config, "token_embd.weight")]
    model.load_state_dict(found)
    return model


# ── models ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", CASES)
def test_exported_is_the_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1 << 10)  # many blocks a tensor
    model = made(case)
    exported = export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf")
    found = read_model(tmp_path / "model.gguf", model.config)
    assert torch.equal(factories.logits(found), factories.logits(model))
    assert exported.size == (tmp_path / "model.gguf").stat().st_size
    assert exported.types == {"F32": exported.tensors}


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "gpt2"])
def test_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    model = made(case)
    export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    torch.testing.assert_close(factories.logits(found), factories.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2**-7), ("fp16", 2**-10), ("q8_0", 2**-6)])
def test_a_type_rounds_matrices_once_and_leaves_vectors(dtype: str, bound: float, tmp_path: Path) -> None:
    model = made()
    export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf", dtype)
    found = read_model(tmp_path / "model.gguf", model.config)
    for name, parameter in model.named_parameters():
        error = (found.get_parameter(name) - parameter).abs().max()
        if parameter.ndim == 1:
            assert error == 0
        else:
            assert 0 < error <= bound * parameter.abs().max()


def test_weights_keep_the_type_that_they_are_stored_in(tmp_path: Path) -> None:
    model = made().to(torch.bfloat16)
    exported = export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf")
    assert exported.types == {"BF16": 4 * 7 + 1, "F32": 4 * 2 + 1}
    found = read_model(tmp_path / "model.gguf", model.config)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter.float())


def test_rows_that_q8_0_cannot_cut_are_float16(tmp_path: Path) -> None:
    model = made("llama", hidden_size=48, head_dim=8)
    exported = export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf", "q8_0")
    assert exported.types == {"F16": 4 * 5 + 1, "Q8_0": 4 * 2, "F32": 4 * 2 + 1}


def test_shards_become_one_file(tmp_path: Path) -> None:
    model = made()
    base = saved(model, tmp_path / "base", max_shard_size="20kB")
    assert len(list(base.glob("*.safetensors"))) > 2
    export_model(base, tmp_path / "model.gguf")
    assert torch.equal(factories.logits(read_model(tmp_path / "model.gguf", model.config)), factories.logits(model))


def test_names_without_the_prefix_and_old_buffers_are_understood(tmp_path: Path) -> None:
    """As GPT-2's own checkpoints are."""
    model = made("gpt2")
    base = saved(model, tmp_path / "base")
    file = base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(4, 4).tril()}, file, {"format": "pt"})
    export_model(base, tmp_path / "model.gguf")
    assert torch.equal(factories.logits(read_model(tmp_path / "model.gguf", model.config)), factories.logits(model))


def test_a_head_that_is_stored_twice_is_written_once(tmp_path: Path) -> None:
    base = saved(made(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    export_model(base, tmp_path / "model.gguf")
    assert "output.weight" not in values(tmp_path / "model.gguf")


def test_llama_3_1_divides_its_frequencies(tmp_path: Path) -> None:
    """By what transformers divides them by."""
    model = made(rope_parameters=LLAMA3_ROPE)
    export_model(saved(model, tmp_path / "base"), tmp_path / "model.gguf")
    plain_F = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    expected_F = plain_F / model.model.rotary_emb.inv_freq
    assert len(expected_F.unique()) > 1
    torch.testing.assert_close(values(tmp_path / "model.gguf")["rope_freqs.weight"], expected_F)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_of_rotary_embeddings_is_a_fact(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
    export_model(saved(made(rope_parameters=rope), tmp_path / "base"), tmp_path / "model.gguf")
    names = ["freq_base", "scaling.type", "scaling.factor", "scaling.original_context_length"]
    found = [fact(tmp_path / "model.gguf", f"llama.rope.{name}") for name in names]
    assert found == [5000.0, kind, 4.0, 64 if kind == "yarn" else None]


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    export_model(saved(made("mistral", sliding_window=96), tmp_path / "base"), tmp_path / "model.gguf")
    assert fact(tmp_path / "model.gguf", "llama.context_length") == 96


def test_origin_goes_into_the_file(tmp_path: Path) -> None:
    export_model(saved(made(), tmp_path / "base"), tmp_path / "m.gguf", origin={"loractl.base": factories.BASE})
    assert fact(tmp_path / "m.gguf", "loractl.base") == factories.BASE


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled in a way"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "scaled in a way"),
        ("qwen3", {"attention_bias": True}, "its attention_bias is True"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    case: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = saved(made(case, **changes), tmp_path / "base")
    with pytest.raises(NotExportable, match=reason):
        export_model(base, tmp_path / "model.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


def test_another_family_is_refused_with_those_that_work(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(vocab_size=272, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    base = saved(transformers.GPTNeoXForCausalLM(config), tmp_path / "base")
    with pytest.raises(NotExportable, match=r"'gpt_neox'; these are written: gpt2, llama, .*smollm3"):
        export_model(base, tmp_path / "model.gguf")
    assert set(FAMILIES) == {kind for kind, _ in CASES.values()}


def test_a_tensor_that_the_configuration_lacks_is_refused(tmp_path: Path) -> None:
    base = saved(made(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"model.layers.0.self_attn.extra.weight": torch.ones(2)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotExportable, match=r"self_attn\.extra\.weight"):
        export_model(base, tmp_path / "model.gguf")


def test_what_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = made()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    base = saved(model, tmp_path / "base")
    with pytest.raises(BadTensor, match=r"1e\+06 is more than float16 holds"):
        export_model(base, tmp_path / "model.gguf", "fp16")
    assert list(tmp_path.glob("*.gguf*")) == []


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "no space left")

    base = saved(made(), tmp_path / "base")
    monkeypatch.setattr(container, "_encoded", full)
    with pytest.raises(DiskFull):
        export_model(base, tmp_path / "model.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


@pytest.mark.parametrize("wrong", ["rows", "facts"])
def test_a_file_that_is_not_what_was_meant_gets_no_name(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, head = container._encoded, container._head
    if wrong == "rows":
        monkeypatch.setattr(container, "_encoded", lambda block, *rest: encoded(block.flip(0), *rest))
    else:
        monkeypatch.setattr(
            container, "_head", lambda of, facts, tensors: head(of, facts | {"llama.block_count": 3}, tensors)
        )
    base = saved(made(), tmp_path / "base")
    with pytest.raises(BadTensor, match="was read back"):
        export_model(base, tmp_path / "model.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


# ── tokenizers ───────────────────────────────────────────────────────────────

TEXTS = ["Hello, world! 123 it's", "  once upon a time\n\nthere was 1 égal 日本", "a<|im_end|>b", "</s>"]


@pytest.mark.parametrize(
    ("words", "name"), [("gpt2", "gpt-2"), ("digits", "smollm"), ("qwen2", "qwen2"), ("llama3", "smaug-bpe")]
)
def test_byte_level_merges_are_read_back(words: str, name: str, tmp_path: Path) -> None:
    tokenizer = factories.merging_tokenizer(words)
    made().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export_model(tmp_path / "base", tmp_path / "model.gguf")
    assert fact(tmp_path / "model.gguf", "tokenizer.ggml.pre") == name
    tokens = fact(tmp_path / "model.gguf", "tokenizer.ggml.tokens")
    assert tokens[:4] == ["<pad>", "<s>", "</s>", "<|im_end|>"]
    assert tokens[-1] == "[PAD271]"
    kinds = fact(tmp_path / "model.gguf", "tokenizer.ggml.token_type")
    assert (kinds[0], kinds[3], kinds[4], kinds[-1]) == (3, 4, 1, 5)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fact(tmp_path / "model.gguf", "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    ends = ["bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token"]
    assert [fact(tmp_path / "model.gguf", f"tokenizer.ggml.{end}") for end in ends] == [1, 2, 0, True, False]
    assert fact(tmp_path / "model.gguf", "tokenizer.chat_template") == factories.CHAT


def test_words_that_are_tokens_need_another_name() -> None:
    facts = vocabulary(factories.merging_tokenizer("llama3", ignore_merges=True), 272, "m")
    assert facts["tokenizer.ggml.pre"] == "llama-bpe"


def test_transformers_reads_the_same_tokenizer(tmp_path: Path) -> None:
    export_model(saved(made("llama"), tmp_path / "base"), tmp_path / "model.gguf")
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS[:2]:
        assert after(text, add_special_tokens=False)["input_ids"] == before(text, add_special_tokens=False)["input_ids"]


def best_first(scores: Mapping[str, float], text: str) -> list[str]:
    """SentencePiece's BPE as its paper has it: join the neighbours that make the token of the highest score."""
    parts = list(text)
    while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in scores]:
        best = max(pairs, key=lambda i: (scores[parts[i] + parts[i + 1]], -i))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def test_scores_join_what_merges_join() -> None:
    tokenizer = factories.piece_tokenizer()
    facts = vocabulary(tokenizer, 400, "m")
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("<unk>")] == 2
    assert kinds[tokens.index("<0x0A>")] == 6
    scores = {
        token: score
        for token, kind, score in zip(tokens, kinds, facts["tokenizer.ggml.scores"], strict=True)
        if kind == 1
    }
    for text in ["once upon a time there was", "time once", "aaaa there", "upontimeonce was"]:
        assert best_first(scores, "▁" + text.replace(" ", "▁")) == tokenizer.tokenize(text)


def test_merges_that_no_scores_say_are_refused() -> None:
    tokenizer = factories.piece_tokenizer(left_out=1)
    with pytest.raises(NotExportable, match="by scores there would be"):
        vocabulary(tokenizer, 400, "m")


def test_an_unknown_way_to_cut_words_is_refused() -> None:
    with pytest.raises(NotExportable, match="how it cuts text is not known here"):
        vocabulary(factories.merging_tokenizer("whitespace"), 272, "m")


def test_a_tokenizer_of_another_base_is_refused() -> None:
    with pytest.raises(ForeignTokenizer, match="has 100 rows"):
        vocabulary(factories.merging_tokenizer(), 100, "m")


def test_a_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "base")
    with pytest.raises(NotExportable, match="tokenizer"):
        export_model(tmp_path / "base", tmp_path / "model.gguf")


def test_a_name_does_not_change_how_text_is_cut() -> None:
    """llama.cpp lets special tokens swallow spaces in models with phi-3 in their names."""
    tokenizer = factories.merging_tokenizer()
    assert vocabulary(tokenizer, 272, "my-Phi-3-bot")["general.name"] == "my-Phi 3-bot"
    tokenizer.add_special_tokens({"additional_special_tokens": [transformers.AddedToken("<|user|>", rstrip=True)]})
    with pytest.raises(NotExportable, match="take spaces or words from around them"):
        vocabulary(tokenizer, 272, "my-phi-3-bot")


# ── adapters ─────────────────────────────────────────────────────────────────


def read_adapter_on(path: Path, model: Model) -> None:
    """Add what an adapter's file says to the weights of ``model``: alpha ⁄ rank · B·A by llama.cpp's names."""
    found, alpha = values(path), fact(path, "adapter.lora.alpha")
    for name in [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        embedding = name == "token_embd.weight"
        update = halves(model.config, name, (a @ b.T if embedding else b @ a) * (alpha / b.shape[1]))
        weight = model.get_parameter(original_name(model.config, name))
        weight += update.T if model.config.model_type == "gpt2" else update


OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@OF_PEFT
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scales", ["one", "many", "rank-stabilised"])
def test_an_exported_adapter_is_the_adapter(case: str, scales: str, tmp_path: Path) -> None:
    model = made(case)
    base = saved(model, tmp_path / "base")
    first = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(case, "q_proj")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_rslora": scales == "rank-stabilised"}
    if scales == "many":
        settings |= {"rank_pattern": {first: 2}, "alpha_pattern": {first: 3}}
    targets = "all-linear" if model.config.tie_word_embeddings else [first, "embed_tokens", "lm_head"]
    wanted = LoraConfig(**settings, target_modules=targets, fan_in_fan_out=case == "gpt2")
    adapted = get_peft_model(model, wanted).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    expected = factories.logits(adapted)
    exported = export_adapter(base, read_adapter(tmp_path / "adapter"), tmp_path / "adapter.gguf")
    assert exported.architecture == FAMILIES[CASES[case][0]].architecture
    assert [fact(tmp_path / "adapter.gguf", f"{key}.type") for key in ("general", "adapter")] == ["adapter", "lora"]
    export_model(base, tmp_path / "model.gguf")
    found = read_model(tmp_path / "model.gguf", transformers.AutoConfig.from_pretrained(base))
    assert (factories.logits(found) - expected).abs().max() > 0.1
    read_adapter_on(tmp_path / "adapter.gguf", found)
    torch.testing.assert_close(factories.logits(found), expected, atol=1e-4, rtol=1e-4)


def test_factors_of_one_scale_are_written_as_they_are(tmp_path: Path) -> None:
    model = made("qwen2")
    adapter = factories.random_adapter(model, targets=("v_proj",), rank=4, alpha=10.0)
    export_adapter(saved(model, tmp_path / "base"), adapter, tmp_path / "a.gguf")
    found = values(tmp_path / "a.gguf")
    assert fact(tmp_path / "a.gguf", "adapter.lora.alpha") == 10.0
    for name, patch in adapter.patches.items():
        layer = name.split(".")[2]
        assert torch.equal(found[f"blk.{layer}.attn_v.weight.lora_a"], patch.a_RI)
        assert torch.equal(found[f"blk.{layer}.attn_v.weight.lora_b"], patch.b_OR)


def test_a_scale_of_zero_stays_zero(tmp_path: Path) -> None:
    """llama.cpp takes an alpha of zero for one that is not given."""
    model = made("qwen2")
    adapter = factories.random_adapter(model, targets=("v_proj",))
    off = Adapter({name: Patch(p.a_RI, p.b_OR, 0.0) for name, p in adapter.patches.items()}, adapter.config)
    export_adapter(saved(model, tmp_path / "base"), off, tmp_path / "a.gguf")
    assert fact(tmp_path / "a.gguf", "adapter.lora.alpha") == 1.0
    assert all(not value.any() for name, value in values(tmp_path / "a.gguf").items() if name.endswith("lora_b"))


@OF_PEFT
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA magnitudes"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "a bias of B"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "it replaces 'model.layers.0.self_attn.q_proj.bias'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, "it replaces .*up_proj.weight"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = made("llama-untied-with-biases")
    base = saved(model, tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, **settings)).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(NotExportable, match=reason):
        export_adapter(base, read_adapter(tmp_path / "adapter"), tmp_path / "adapter.gguf")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_half_of_a_tied_pair_is_refused(module: str, tmp_path: Path) -> None:
    name, embedding = ("model.embed_tokens", True) if module == "embed_tokens" else ("lm_head", False)
    outputs, inputs = (32, 272) if embedding else (272, 32)
    patch = Patch(torch.ones(2, inputs), torch.ones(outputs, 2), 1.0, embedding=embedding)
    with pytest.raises(NotExportable, match="embedding and output head in one"):
        export_adapter(saved(made(), tmp_path / "base"), Adapter({name: patch}, {}), tmp_path / "adapter.gguf")


def test_an_adapter_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    adapter = factories.random_adapter(made(hidden_size=64))
    with pytest.raises(NotRunnable, match="its weight"):
        export_adapter(saved(made(), tmp_path / "base"), adapter, tmp_path / "adapter.gguf")


# ── the program ──────────────────────────────────────────────────────────────


def run(tmp_path: Path, *more: object) -> int:
    (tmp_path / "work").mkdir(exist_ok=True)
    where = ["--base", tmp_path / "base", "--out", tmp_path / "x.gguf", "--work", tmp_path / "work"]
    return program.main([str(word) for word in [*where, *more]])


def test_merged_and_exported_is_merged(tmp_path: Path) -> None:
    model = made()
    base = saved(model, tmp_path / "base")
    adapter = factories.random_adapter(model, targets=("all-linear",))
    write_adapter(adapter, tmp_path / "adapter", base=factories.BASE, recipe="sha256:" + "0" * 64)
    assert run(tmp_path, "--adapter", tmp_path / "adapter", "--merge", "--origin=loractl.base=b3:1") == 0
    merge(base, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    found = read_model(tmp_path / "x.gguf", model.config)
    assert torch.equal(factories.logits(found), factories.logits(merged))
    assert fact(tmp_path / "x.gguf", "loractl.base") == "b3:1"
    result = json.loads((tmp_path / "work" / "result.json").read_text())
    assert (result["architecture"], result["types"]) == ("llama", {"F32": result["tensors"]})


def test_a_refusal_is_left_beside(tmp_path: Path) -> None:
    saved(made(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert run(tmp_path) == 1
    assert json.loads((tmp_path / "work" / "error.json").read_text())["code"] == "not-exportable"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    base = saved(made(), tmp_path / "base")
    with pytest.raises(PathUnusable):
        export_model(base, tmp_path / "nowhere" / "model.gguf")
