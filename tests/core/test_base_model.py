import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import CONFIG_MAPPING

from registry.core.base_model import (
    FAMILIES,
    BaseModel,
    Tensor,
    Tokenizer,
    canonical_arch,
    canonical_name,
    diff,
    tokenizer_digests,
)
from registry.core.digest import Digest
from registry.core.errors import BadConfig, BadManifest, DuplicateTensor
from registry.core.manifest import MAX_VALUES, canonical_json
from registry.files import digest_base

GOLDEN = Path(__file__).parent.parent / "golden"
SAME = ["one-file", "shuffled-shards", "resaved-by-5", "tied-head-stored", "tied-head-only", "with-buffers"]


def b3(data: bytes) -> Digest:
    return Digest("b3", blake3(data).hexdigest())


def tensor(name: str, value: str = "x", shape: tuple[int, ...] = (2,), dtype: str = "F32") -> Tensor:
    return Tensor(name, dtype, shape, b3(value.encode()))


# ── golden vectors ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", sorted(path.name for path in (GOLDEN / "base").iterdir()))
def test_golden_digests_never_change(case: str) -> None:
    pinned = json.loads((GOLDEN / "base.json").read_text())[case]
    base = digest_base(GOLDEN / "base" / case, threads=1)
    assert {"weights": str(base.weights), "arch": str(base.arch), "base": str(base.digest)} == pinned


def test_golden_digests_are_pinned_here_too() -> None:
    pinned = {case: entry["base"] for case, entry in json.loads((GOLDEN / "base.json").read_text()).items()}
    assert pinned["llama-one-file"] == LLAMA
    assert pinned["gpt2-with-prefix"] == GPT2


@pytest.mark.parametrize("case", SAME)
def test_every_spelling_of_one_model_has_one_digest(case: str) -> None:
    assert str(digest_base(GOLDEN / "base" / f"llama-{case}").digest) == LLAMA


def test_gpt2_with_and_without_its_prefix_is_one_model() -> None:
    for case in ("gpt2-with-prefix", "gpt2-without-prefix"):
        assert str(digest_base(GOLDEN / "base" / case).digest) == GPT2


def test_other_models_have_other_digests() -> None:
    pinned = json.loads((GOLDEN / "base.json").read_text())
    different = [entry["base"] for case, entry in pinned.items() if case.removeprefix("llama-") not in SAME]
    assert len({*different, LLAMA}) == len(different)  # GPT-2 is there twice


def test_the_formula_written_out_gives_the_same_digest() -> None:
    folder = GOLDEN / "base" / "llama-one-file"
    leaves = []
    with safe_open(folder / "model.safetensors", "numpy") as file:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            dtype = {"float32": "F32", "float16": "F16", "float64": "F64"}[str(array.dtype)]
            shape = ",".join(map(str, array.shape))
            parts = [b"loractl/1 leaf", name.encode(), dtype.encode(), shape.encode(), blake3(array.tobytes()).digest()]
            leaves.append(blake3(b"\0".join(parts)).digest())
    weights = blake3(b"\0".join([b"loractl/1 weights", str(len(leaves)).encode(), b"".join(leaves)])).digest()
    arch = canonical_json({"kind": "canonical", "fields": ARCH})
    whole = blake3(b"loractl/1 base\0" + weights + blake3(b"loractl/1 arch\0" + arch).digest())
    assert f"b3:{whole.hexdigest()}" == LLAMA


LLAMA = "b3:5daed828390c0ffdf25dd4b04841f1f41b9da8120b0805bfee7e648f2255604f"
GPT2 = "b3:3d7ba69ec358184c107114dbacd8a1476cba1bcc984657587c7692707e6a8057"
ARCH = {
    "model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "head_dim": 2,
    "rope_parameters": {"rope_theta": 500000, "rope_type": "default"},
}  # fmt: skip


# ── the digest ───────────────────────────────────────────────────────────────

NAME = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/\\.")
ROWS = st.lists(
    st.builds(
        tensor,
        st.text(NAME, min_size=1, max_size=8),
        st.text(max_size=3),
        st.lists(st.integers(1, 9), max_size=3).map(tuple),
        st.sampled_from(["F32", "BF16", "U8"]),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row.name,
)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_tensors_does_not_matter(rows: list[Tensor], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert BaseModel.of(shuffled) == BaseModel.of(rows)
    assert BaseModel.of(shuffled).digest == BaseModel.of(rows).digest


@given(ROWS, ROWS)
def test_different_tables_have_different_digests(a: list[Tensor], b: list[Tensor]) -> None:
    assert (BaseModel.of(a).digest == BaseModel.of(b).digest) == (BaseModel.of(a) == BaseModel.of(b))


@pytest.mark.parametrize(
    "other",
    [
        tensor("a.weight", "y"),
        tensor("b.weight"),
        tensor("a.weight", shape=(1, 2)),
        tensor("a.weight", dtype="I32"),
    ],
)
def test_bytes_name_shape_and_dtype_all_count(other: Tensor) -> None:
    assert BaseModel.of([other]).digest != BaseModel.of([tensor("a.weight")]).digest


@given(ROWS)
def test_a_table_written_and_read_is_itself(rows: list[Tensor]) -> None:
    base = BaseModel.of(rows, {"model_type": "mine", "width": 3.5}, Tokenizer(b3(b"v"), None))
    assert BaseModel.from_json(base.to_json()) == base
    assert BaseModel.from_compressed(base.to_compressed()).digest == base.digest


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_a_refusal(data: bytes) -> None:
    for read in (BaseModel.from_json, BaseModel.from_compressed):
        with pytest.raises(BadManifest):
            read(data)


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": []},
        {"tensors": [["b", "F32", [1], "0" * 64], ["a", "F32", [1], "0" * 64]]},
        {"tensors": [["a", "F32", [1], "0" * 64]] * 2},
        {"tensors": [["a", "F33", [1], "0" * 64]]},
        {"tensors": [["a", "F32", [-1], "0" * 64]]},
        {"tensors": [["a", "F32", [1 << 40, 1 << 40], "0" * 64]]},
        {"tensors": [[f"{n:02}", "F32", [1 << 46], "0" * 64] for n in range(17)]},
        {"tensors": [["a", "F32", [1], "0" * 63]]},
        {"tensors": [[1, 2]]},
        {"arch": {"kind": "made-up", "fields": {}}},
        {"arch": None},
        {"schema": "loractl/2 base"},
        {"tokenizer": {"other": "b3:" + "0" * 64}},
    ],
)
def test_a_table_that_was_tampered_with_is_refused(change: dict[str, Any]) -> None:
    table = json.loads(BaseModel.of([tensor("a")]).to_json())
    with pytest.raises(BadManifest):
        BaseModel.from_json(json.dumps(table | change).encode())


@pytest.mark.parametrize("value", [float("nan"), "\ud800", "\0"])
def test_a_table_whose_architecture_has_no_canonical_form_is_refused(value: Any) -> None:
    table = json.loads(BaseModel((tensor("a"),)).to_json())
    table["arch"]["fields"]["x"] = [value]
    with pytest.raises(BadManifest, match="cannot be read"):
        BaseModel.from_json(json.dumps(table).encode())


def test_a_table_of_very_many_values_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadManifest, match="values"):
        BaseModel.from_json(b"[" + b"[]," * (MAX_VALUES // 2 + 1) + b"[]]")


def test_a_truncated_compressed_table_is_refused() -> None:
    with pytest.raises(BadManifest, match="truncated"):
        BaseModel.from_compressed(BaseModel.of([tensor("a")]).to_compressed()[:-3])


# ── names ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model_type", "stored", "canonical"),
    [
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("gpt2", "h.0.attn.bias", None),
        ("gpt2", "transformer.h.0.attn.masked_bias", None),
        ("gpt2", "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        ("gpt_neox", "layers.0.attention.bias", None),
        ("gpt_neox", "layers.0.attention.dense.bias", "gpt_neox.layers.0.attention.dense.bias"),
        ("somebodys-own", "h.0.attn.bias", "h.0.attn.bias"),
    ],
)
def test_names_have_one_spelling_per_family(model_type: str, stored: str, canonical: str | None) -> None:
    assert canonical_name(stored, {"model_type": model_type}) == canonical


def test_a_tied_config_with_another_head_keeps_both() -> None:
    rows = [tensor("model.embed_tokens.weight", "a"), tensor("lm_head.weight", "b")]
    assert len(BaseModel.of(rows, {"model_type": "gemma"}).tensors) == 2


def test_one_name_in_two_spellings_is_refused() -> None:
    with pytest.raises(DuplicateTensor):
        BaseModel.of([tensor("h.0.ln_1.bias"), tensor("transformer.h.0.ln_1.bias")], {"model_type": "gpt2"})


# ── architecture ─────────────────────────────────────────────────────────────

OLDER: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "mistral": {"sliding_window": None, "rope_theta": 1000000.0},
    "qwen2": {"max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False, "rope_theta": 1000000.0},
    "qwen3": {"max_window_layers": 1, "sliding_window": 128, "use_sliding_window": True, "rope_theta": 1000000},
    "phi3": {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "auto_map": {"AutoConfig": "x.Y"}},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "rope_scaling": None},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0, "cache_implementation": None},
    "gpt2": {"n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2, "task_specific_params": {"a": {}}},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_of_transformers_4_means_what_transformers_5_makes_of_it(model_type: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    older: dict[str, Any] = {"model_type": model_type, "transformers_version": "4.44.0"}
    older |= OLDER[model_type] if model_type == "gpt2" else sizes | OLDER[model_type]
    newer = json.loads(CONFIG_MAPPING[model_type].from_dict(dict(older)).to_json_string())
    assert canonical_arch(older) == canonical_arch(newer)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_field_is_the_default_of_transformers(model_type: str) -> None:
    written = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    assert canonical_arch({"model_type": model_type}) == canonical_arch(written)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 20000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-5},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"a_field_of_tomorrow": 7},
        {"quantization_config": {"quant_method": "awq"}},
    ],
)
def test_what_changes_the_function_changes_the_architecture(change: dict[str, Any]) -> None:
    plain = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    assert canonical_arch(plain) != canonical_arch(plain | change)


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "/home/me"},
        {"torch_dtype": "float16"},
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"rope_theta": 10000},
        {"a_field_of_tomorrow": None},
        {"eos_token_id": [1, 2]},
    ],
)
def test_what_does_not_change_the_function_does_not(change: dict[str, Any]) -> None:
    plain = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    assert canonical_arch(plain) == canonical_arch(plain | change)


def test_an_unknown_type_is_kept_as_it_is() -> None:
    config = {"model_type": "mine", "a": None, "b": 1.0, "_name_or_path": "x", "limit": float("inf")}
    assert canonical_arch(config) == ("raw", {"model_type": "mine", "a": None, "b": 1, "limit": "inf"})


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"rope_scaling": "x"}, {"hidden_size": "x"}])
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        canonical_arch({"model_type": "llama"} | change)


# ── differences ──────────────────────────────────────────────────────────────


@given(ROWS, ROWS)
def test_a_difference_is_a_set_operation(a: list[Tensor], b: list[Tensor]) -> None:
    found = diff(BaseModel.of(a), BaseModel.of(b))
    back = diff(BaseModel.of(b), BaseModel.of(a))
    assert (found.added, found.removed) == (back.removed, back.added)
    assert (found.changed, found.reshaped, found.same) == (back.changed, back.reshaped, back.same)
    assert found.same + len(found.changed) + len(found.reshaped) + len(found.removed) == len(a)
    assert found.empty == (BaseModel.of(a).digest == BaseModel.of(b).digest)


def test_a_difference_of_architecture_names_its_field() -> None:
    rows = [tensor("model.norm.weight")]
    a = BaseModel.of(rows, {"model_type": "llama", "rope_theta": 1e4})
    b = BaseModel.of(rows, {"model_type": "llama", "rope_theta": 5e5, "vocab_size": 7})
    found = diff(a, b)
    assert not found.changed
    assert found.arch["vocab_size"] == (32000, 7)
    assert found.arch["rope_parameters"][1]["rope_theta"] == 500000


# ── tokenizer ────────────────────────────────────────────────────────────────

FAST = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 0, "content": "<s>"}],
    "model": {"type": "BPE", "vocab": {"a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
}  # fmt: skip


def tokenizer(fast: Any = FAST, **config: Any) -> Tokenizer:
    return tokenizer_digests(
        {"tokenizer.json": json.dumps(fast).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )


def test_a_tokenizer_saved_again_is_the_same() -> None:
    again = FAST | {"padding": {"length": 8}, "model": FAST["model"] | {"merges": [["a", "b"]]}}  # type: ignore[operator]
    assert tokenizer(again, bos_token={"content": "<s>"}, x=1) == tokenizer(bos_token="<s>")


def test_vocabulary_special_tokens_and_template_are_told_apart() -> None:
    plain = tokenizer(bos_token="<s>", chat_template="a")
    assert tokenizer(bos_token="</s>", chat_template="a").vocabulary != plain.vocabulary
    assert tokenizer(FAST | {"added_tokens": []}, bos_token="<s>").vocabulary != plain.vocabulary
    other = tokenizer(bos_token="<s>", chat_template="b")
    assert (other.vocabulary, other.chat_template != plain.chat_template) == (plain.vocabulary, True)


def test_a_template_is_the_same_in_its_own_file() -> None:
    own = tokenizer_digests({"chat_template.jinja": b"a"})
    assert own.chat_template == tokenizer(chat_template="a").chat_template


def test_a_tokenizer_without_a_fast_one_is_its_files() -> None:
    one, two = tokenizer_digests({"tokenizer.model": b"a"}), tokenizer_digests({"tokenizer.model": b"b"})
    assert one.vocabulary not in (None, two.vocabulary)
    assert tokenizer_digests({}) == Tokenizer()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer.json", {"model": [1]}),
        ("tokenizer.json", {"model": {"merges": 3}}),
        ("tokenizer.json", {"model": {"vocab": {"\ud800": 1}}}),
        ("tokenizer_config.json", {"chat_template": 3}),
    ],
)
def test_a_tokenizer_file_of_another_form_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadConfig, match="tokenizer"):
        tokenizer_digests({"vocab.txt": b"a", name: json.dumps(value).encode()})


@pytest.mark.parametrize("layers", [10**9, 10**400, -1, float("inf"), "x"])
def test_layers_are_counted_before_they_are_listed(layers: Any) -> None:
    with pytest.raises(BadConfig, match="wrong kind"):
        canonical_arch({"model_type": "qwen2", "num_hidden_layers": layers})


def test_a_head_may_say_null_where_others_say_nothing() -> None:
    config = {"model_type": "llama", "tie_word_embeddings": None}
    assert [t.name for t in BaseModel.of([tensor("lm_head.weight")], config).tensors] == ["lm_head.weight"]


def test_a_broken_tokenizer_file_is_refused() -> None:
    with pytest.raises(BadConfig):
        tokenizer_digests({"tokenizer.json": b"["})
