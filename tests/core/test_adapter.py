import math
from collections.abc import Mapping
from typing import Any

import pytest

from registry.core.adapter import RECORDED_BASE, WRAPPER, AdapterSpec
from registry.core.errors import BadConfig, BadDigest, BadTensor, DuplicateTensor, LeftOverTensors
from registry.core.safetensors import Header, TensorInfo
from tests.factories import adapter_config

Q = "model.layers.0.self_attn.q_proj"
Shapes = Mapping[str, tuple[int, ...]]
PLAIN: dict[str, tuple[int, ...]] = {f"{Q}.lora_A.weight": (4, 16), f"{Q}.lora_B.weight": (8, 4)}
BASE = "b3:" + "1" * 64


def header(
    shapes: Shapes, dtype: str = "F32", metadata: dict[str, str] | None = None, path: str = "a"
) -> Header:
    tensors, at = [], 100
    for name, shape in shapes.items():
        end = at + math.prod(shape) * 4
        tensors.append(TensorInfo(WRAPPER + name, dtype, shape, at, end))
        at = end
    return Header(path, tuple(tensors), metadata or {})


def spec(shapes: Shapes = PLAIN, metadata: dict[str, str] | None = None, **config: Any) -> AdapterSpec:
    found = header(shapes, metadata=metadata)
    return AdapterSpec.parse(adapter_config("llama", 4, ["q_proj"]) | config, {"adapter_model.safetensors": found})


def test_a_plain_adapter_is_its_modules() -> None:
    found = spec()
    (module,) = found.modules
    assert (module.name, module.kind, module.rank, module.scale, module.shape) == (Q, "linear", 4, 2.0, (8, 16))
    assert (found.runnable, found.features, found.targets, found.max_rank) == (True, (), ("q_proj",), 4)
    assert (found.declared_base, found.recorded_base) == ("llama", None)


def test_the_order_of_files_and_tensors_does_not_matter() -> None:
    items = list(PLAIN.items())
    config = adapter_config("llama", 4)
    one = AdapterSpec.parse(config, {"x": header(dict(items[:1])), "y": header(dict(items[1:]))})
    two = AdapterSpec.parse(config, {"y": header(dict(items[1:])), "x": header(dict(items[:1]))})
    assert one == two


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"(q_proj|k_proj)": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 2}}, 2.0),
        ({"lora_alpha": 8, "r": 9, "rank_pattern": {Q: 4}}, 2.0),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(config: dict[str, Any], scale: float) -> None:
    assert spec(**config).modules[0].scale == scale


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+", "(a|b)*", ".*.*.*", "a**", "(?=x)", "x" * 300, "a{2,}"])
def test_a_pattern_that_could_run_for_ever_is_refused(key: str, pattern: str) -> None:
    with pytest.raises(BadConfig, match="too complex"):
        spec(PLAIN, None, **{key: {pattern: 4}})


def test_the_patterns_mean_what_peft_means_by_them() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"q_proj": 1, r"layers\.\d+\.mlp\.up_proj": 2, "model.layers.1.mlp.down_proj": 3, "(k_proj|v_proj)": 5}
    for layer in range(3):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}"
            shapes = {f"{name}.lora_A.weight": (4, 8), f"{name}.lora_B.weight": (8, 4)}
            theirs = patterns.get(get_pattern_key(list(patterns), name), 8)
            assert spec(shapes, lora_alpha=8, alpha_pattern=patterns).modules[0].scale == theirs / 4


def test_rank_mismatch_between_a_and_b_is_refused_by_name() -> None:
    with pytest.raises(BadTensor, match="A has rank 4, but B of the same module has rank 3") as refusal:
        spec(PLAIN | {f"{Q}.lora_B.weight": (8, 3)})
    assert Q in refusal.value.tensor


def test_a_rank_that_is_not_the_configs_is_refused() -> None:
    with pytest.raises(BadTensor, match=r"rank 4, but .* gives this module rank 8"):
        spec(r=8)


def test_a_factor_without_its_partner_is_refused() -> None:
    with pytest.raises(BadTensor, match="has no lora_B beside it"):
        spec({f"{Q}.lora_A.weight": (4, 16)})


def test_tensors_that_belong_to_nothing_are_named() -> None:
    with pytest.raises(LeftOverTensors, match=r"1 tensors belong to nothing .*: base_model.model.extra.weight"):
        spec(PLAIN | {"extra.weight": (1,)})


def test_a_tensor_in_two_files_is_refused() -> None:
    with pytest.raises(DuplicateTensor):
        AdapterSpec.parse(adapter_config("llama"), {"x": header(PLAIN), "y": header(PLAIN)})


def test_integers_cannot_be_factors() -> None:
    with pytest.raises(BadTensor, match="I8; factors are"):
        AdapterSpec.parse(adapter_config("llama"), {"x": header(PLAIN, dtype="I8")})


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": None},
        {"peft_type": "a\nb"},
        {"r": 0},
        {"r": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "8"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": []},
        {"rank_pattern": 5},
        {"base_model_name_or_path": 3},
    ],
)
def test_a_config_that_cannot_be_is_refused(config: dict[str, Any]) -> None:
    if config == {"rank_pattern": []}:
        assert spec(**config).runnable  # an empty list is no pattern
        return
    with pytest.raises(BadConfig):
        spec(**config)


def test_an_unknown_type_is_stored_and_not_run() -> None:
    found = spec({"anything.prompt": (3, 4)}, peft_type="PREFIX_TUNING")
    assert (found.runnable, found.opaque, found.modules) == (False, True, ())
    assert "PREFIX_TUNING" in str(found.why_not_runnable)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
        ({"init_lora_weights": "lora_ga"}, "changed the base weights"),
        ({"layer_replication": [[0, 1]]}, "replicates layers"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "bare parameters"),
        ({"a_switch_of_tomorrow": True}, "a_switch_of_tomorrow"),
    ],
)
def test_what_changes_the_computation_is_not_run(config: dict[str, Any], word: str) -> None:
    assert word in str(spec(**config).why_not_runnable)


@pytest.mark.parametrize(
    "config", [{"init_lora_weights": "gaussian"}, {"a_switch_of_tomorrow": None}, {"eva_config": {}}]
)
def test_what_does_not_change_it_is_run(config: dict[str, Any]) -> None:
    assert spec(**config).runnable


def test_everything_beyond_a_plain_adapter_is_recognised() -> None:
    shapes = {
        **PLAIN,
        f"{Q}.lora_magnitude_vector": (8,),
        f"{Q}.lora_B.bias": (8,),
        "model.embed_tokens.lora_embedding_A": (4, 64),
        "model.embed_tokens.lora_embedding_B": (16, 4),
        "model.embed_tokens.lora_magnitude_vector.weight": (16,),
        "lm_head.weight": (64, 16),
        "score.weight": (2, 16),
        "model.layers.0.self_attn.k_proj.base_layer.bias": (8,),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 16),
    }
    found = spec(shapes, use_dora=True, bias="all", modules_to_save=["score"])
    assert found.features == ("bias", "dora", "embedding", "lora-bias", "modules-to-save", "token-rows")
    assert [module.shape for module in found.modules] == [(64, 16), (8, 16)]
    assert {tensor.name for tensor in found.saved} == {"lm_head.weight", "score.weight"}
    assert found.biases[0].name == "model.layers.0.self_attn.k_proj.bias"
    assert found.token_rows[0].name == "model.embed_tokens"


@pytest.mark.parametrize(
    ("shapes", "config", "word"),
    [
        ({f"{Q}.lora_magnitude_vector": (8,)}, {}, "without 'use_dora'"),
        ({}, {"use_dora": True}, "is missing"),
        ({f"{Q}.lora_magnitude_vector": (9,)}, {"use_dora": True}, "8 outputs"),
        ({f"{Q}.lora_B.bias": (9,)}, {}, "8 outputs"),
        ({f"{Q}.lora_A.weight": (4,)}, {}, "a factor is a matrix"),
    ],
)
def test_vectors_must_match_their_module(shapes: dict[str, Any], config: dict[str, Any], word: str) -> None:
    with pytest.raises(BadTensor, match=word):
        spec(PLAIN | shapes, **config)


def test_the_recorded_base_is_read_from_the_file() -> None:
    found = spec(metadata={RECORDED_BASE: BASE, "loractl.recipe": "r", "format": "pt"})
    assert (str(found.recorded_base), found.recorded) == (BASE, (("loractl.recipe", "r"),))


@pytest.mark.parametrize("value", ["llama", "sha256:" + "1" * 64])
def test_a_recorded_base_that_is_no_base_digest_is_refused(value: str) -> None:
    with pytest.raises((BadDigest, BadConfig)):
        spec(metadata={RECORDED_BASE: value})


def test_files_that_record_different_bases_are_refused() -> None:
    items = list(PLAIN.items())
    one = header(dict(items[:1]), metadata={RECORDED_BASE: BASE})
    two = header(dict(items[1:]), metadata={RECORDED_BASE: BASE.replace("1", "2")})
    with pytest.raises(BadConfig, match="different bases"):
        AdapterSpec.parse(adapter_config("llama"), {"x": one, "y": two})
