from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from registry.core.base_model import BaseModel, Tensor, Tokenizer
from registry.core.digest import Digest
from registry.core.errors import AdapterDoesNotFit, AmbiguousModule, EvidenceContradicts
from registry.core.fit import (
    BY_DEFAULT,
    Derivation,
    FitClass,
    TargetSet,
    binding_evidence,
    classify,
    fit,
    mismatches,
    require_fit,
    target_set,
    tensor_of,
)
from registry.core.policy import Evidence
from tests.core.test_adapter import PLAIN, Q, Shapes, spec

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 16),
    f"{Q}.weight": (8, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.norm.weight": (16,),
}


def base(
    values: str = "", shapes: Shapes = SHAPES, config: Mapping[str, Any] | None = LLAMA, **changed: str
) -> BaseModel:
    def row(name: str, shape: tuple[int, ...]) -> Tensor:
        content = changed.get(name.split(".")[-2], values) + name
        return Tensor(name, "F32", shape, Digest("b3", blake3(content.encode()).hexdigest()))

    rows = [row(name, shape) for name, shape in shapes.items()]
    return BaseModel.of(rows, config)


TARGETS = target_set(spec(), base())


# ── classes ──────────────────────────────────────────────────────────────────


def test_classes_are_ordered_and_unknown_is_never_compatible() -> None:
    assert list(FitClass) == sorted(FitClass, key=lambda c: c.order)
    assert FitClass.EXACT.at_least(FitClass.SAME_SHAPE)
    assert not FitClass.SAME_SHAPE.at_least(FitClass.TARGETS_EQUAL)
    assert not any(FitClass.UNKNOWN.at_least(other) for other in FitClass if other is not FitClass.UNKNOWN)
    assert BY_DEFAULT == (FitClass.EXACT, FitClass.DERIVED)


def test_a_base_stands_exactly_to_itself() -> None:
    assert classify(TARGETS, base(), base()).class_ is FitClass.EXACT
    assert classify(None, base(), base()).class_ is FitClass.EXACT


def test_other_tensors_may_differ_when_the_patched_ones_are_equal() -> None:
    found = classify(TARGETS, base(), base(up_proj="other"))
    assert (found.class_, found.drift) == (FitClass.TARGETS_EQUAL, 0.0)
    assert "all 1 patched tensors are identical; 1 others differ" in str(found.reasons[0])


def test_equal_weights_in_another_architecture_are_targets_equal_and_say_so() -> None:
    found = classify(TARGETS, base(), base(config=LLAMA | {"rope_theta": 5e5}))
    assert found.class_ is FitClass.TARGETS_EQUAL
    assert any(reason.subject == "config rope_parameters" for reason in found.reasons)


def test_other_values_are_the_same_shape_with_drift_or_not_measured() -> None:
    unmeasured = classify(TARGETS, base(), base("other"))
    assert (unmeasured.class_, unmeasured.drift) == (FitClass.SAME_SHAPE, None)
    assert "not measured" in str(unmeasured.reasons[0])
    measured = classify(TARGETS, base(), base("other"), drift=dict.fromkeys(TARGETS.tensors, 0.02))
    assert (measured.class_, measured.drift) == (FitClass.SAME_SHAPE, 0.02)


def test_drift_of_some_tensors_only_is_not_measured() -> None:
    both = TargetSet((f"{Q}.weight", "model.norm.weight"))
    assert classify(both, base(), base("other"), drift={"model.norm.weight": 0.1}).drift is None


@pytest.mark.parametrize(
    ("shapes", "word"),
    [(SHAPES | {f"{Q}.weight": (8, 32)}, "8 × 16 became 8 × 32"), ({"model.norm.weight": (16,)}, "no such tensor")],
)
def test_other_shapes_are_incompatible_tensor_by_tensor(shapes: dict[str, tuple[int, ...]], word: str) -> None:
    found = classify(TARGETS, base(), base(shapes=shapes))
    assert found.class_ is FitClass.INCOMPATIBLE
    assert found.reasons[0].subject == f"{Q}.weight"
    assert word in found.reasons[0].text


def test_only_a_measured_derivation_counts() -> None:
    new = base("other")
    assert classify(TARGETS, base(), new, Derivation("cast")).class_ is FitClass.SAME_SHAPE
    assert classify(TARGETS, base(), new, Derivation("continued", measured=True)).class_ is FitClass.SAME_SHAPE
    found = classify(TARGETS, base(), new, Derivation("quantised", measured=True, error=0.01))
    assert (found.class_, found.drift) == (FitClass.DERIVED, 0.01)


def test_what_cannot_be_placed_is_unknown() -> None:
    assert classify(None, base(), base("other")).class_ is FitClass.UNKNOWN
    assert classify(TargetSet(()), base(), base("other")).class_ is FitClass.UNKNOWN


@given(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.sets(st.sampled_from(["q_proj", "up_proj", "norm"])))
def test_a_larger_target_set_never_fits_better(names: set[str], changed: set[str]) -> None:
    new = base("", SHAPES, LLAMA, **dict.fromkeys(changed, "other"))
    whole = classify(TargetSet(tuple(sorted(SHAPES))), base(), new)
    part = classify(TargetSet(tuple(sorted(names))), base(), new)
    assert part.class_.order <= whole.class_.order


def test_a_vocabulary_change_is_a_flag_of_its_own() -> None:
    a, b = (replace(base(), tokenizer=Tokenizer(Digest("b3", d * 64))) for d in "12")
    assert classify(TARGETS, a, replace(b, tensors=base(up_proj="x").tensors)).vocabulary_changed
    longer = base(shapes=SHAPES | {"model.embed_tokens.weight": (65, 16)})
    found = classify(TARGETS, base(), longer)
    assert (found.class_, found.vocabulary_changed) == (FitClass.TARGETS_EQUAL, True)
    assert not classify(TARGETS, base(), base("other")).vocabulary_changed


# ── an adapter and a base ────────────────────────────────────────────────────


def test_every_tensor_in_its_place_is_the_same_shape_until_more_is_known() -> None:
    assert mismatches(spec(), base()) == []
    assert fit(spec(), base()).class_ is FitClass.SAME_SHAPE


def test_a_recorded_base_is_exact() -> None:
    assert fit(replace(spec(), recorded_base=base().digest), base()).class_ is FitClass.EXACT


def test_a_recorded_base_of_other_shapes_is_no_excuse() -> None:
    other = base(shapes=SHAPES | {f"{Q}.weight": (9, 16)})
    assert fit(replace(spec(), recorded_base=other.digest), other).class_ is FitClass.INCOMPATIBLE


def test_an_adapter_that_cannot_be_placed_is_unknown() -> None:
    assert fit(spec(peft_type="IA3"), base()).class_ is FitClass.UNKNOWN


def test_wrong_shapes_and_missing_modules_are_named() -> None:
    shapes = {
        **PLAIN, "model.layers.9.x_proj.lora_A.weight": (4, 16), "model.layers.9.x_proj.lora_B.weight": (8, 4),
        "model.layers.0.mlp.up_proj.lora_A.weight": (4, 17), "model.layers.0.mlp.up_proj.lora_B.weight": (32, 4),
    }  # fmt: skip
    found = {item.module: (item.why, item.text) for item in mismatches(spec(shapes), base())}
    assert found["model.layers.9.x_proj"] == ("missing", "the base has no tensor 'model.layers.9.x_proj.weight'")
    assert found["model.layers.0.mlp.up_proj"][1].startswith("the update is 32 × 17, the base tensor")
    assert fit(spec(shapes), base()).class_ is FitClass.INCOMPATIBLE


def test_a_quantised_base_is_unknown_not_incompatible() -> None:
    packed = base(shapes={name: s for name, s in SHAPES.items() if "q_proj" not in name} | {f"{Q}.qweight": (2, 8)})
    assert fit(spec(), packed).class_ is FitClass.UNKNOWN


def test_between_bases_a_quantised_one_is_unknown_too_unless_something_else_does_not_fit() -> None:
    targets = TargetSet((f"{Q}.weight",))
    apart = {name: shape for name, shape in SHAPES.items() if name != f"{Q}.weight"}
    packed = base(shapes=apart | {f"{Q}.qweight": (2, 8)})
    found = classify(targets, base(), packed)
    assert found.class_ is FitClass.UNKNOWN
    assert "stores it quantised" in found.reasons[0].text
    assert classify(targets, packed, base()).class_ is FitClass.UNKNOWN
    assert classify(targets, base(), base(shapes=apart)).class_ is FitClass.INCOMPATIBLE


def test_conv1d_is_in_by_out() -> None:
    attn = "transformer.h.0.attn.c_attn"
    shapes = {f"{attn}.lora_A.weight": (4, 16), f"{attn}.lora_B.weight": (48, 4)}
    gpt2 = base(shapes={f"{attn}.weight": (16, 48)}, config={"model_type": "gpt2"})
    assert mismatches(spec(shapes), gpt2) == []
    own = base(shapes={f"{attn}.weight": (16, 48)}, config={"model_type": "mine"})
    assert mismatches(spec(shapes), own)[0].why == "shape"
    assert mismatches(spec(shapes, fan_in_fan_out=True), own) == []


def test_embeddings_saved_modules_biases_and_rows_have_their_places() -> None:
    shapes = {
        "model.embed_tokens.lora_embedding_A": (4, 64), "model.embed_tokens.lora_embedding_B": (16, 4),
        "lm_head.weight": (64, 16), "score.weight": (2, 16), "model.norm.weight": (16,),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 16),
    }  # fmt: skip
    adapter = spec(shapes, modules_to_save=["score", "norm"])
    tied = base(config=LLAMA | {"tie_word_embeddings": True})
    assert mismatches(adapter, tied) == []
    assert target_set(adapter, tied).tensors == ("model.embed_tokens.weight", "model.norm.weight")
    wrong = spec(shapes | {"model.norm.weight": (17,)}, modules_to_save=["score", "norm"])
    assert [item.module for item in mismatches(wrong, tied)] == ["model.norm.weight"]


def test_a_longer_vocabulary_of_the_adapter_is_its_own() -> None:
    assert mismatches(spec(PLAIN | {"model.embed_tokens.weight": (70, 16)}), base()) == []
    assert mismatches(spec(PLAIN | {"model.embed_tokens.weight": (60, 16)}), base())[0].why == "shape"


# ── names ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "stored", "model_type"),
    [
        ("layers.0.x.weight", "model.layers.0.x.weight", "llama"),
        ("model.layers.0.x.weight", "model.layers.0.x.weight", "llama"),
        ("h.0.x.weight", "transformer.h.0.x.weight", "gpt2"),
        ("model.layers.0.x.weight", "layers.0.x.weight", "mine"),
        ("transformer.h.0.x.weight", "h.0.x.weight", "mine"),
        ("language_model.model.layers.0.x.weight", "model.language_model.layers.0.x.weight", "mine"),
    ],
)
def test_a_prefix_more_or_less_is_the_same_tensor(name: str, stored: str, model_type: str) -> None:
    found = tensor_of(name, base(shapes={stored: (2,)}, config={"model_type": model_type}))
    assert found is not None
    assert found.name == stored


def test_an_ambiguous_module_is_refused() -> None:
    towers = base(shapes={"model.layers.0.x.weight": (2,), "transformer.layers.0.x.weight": (2,)}, config=None)
    with pytest.raises(AmbiguousModule, match=r"model\.layers\.0\.x\.weight or transformer"):
        tensor_of("layers.0.x.weight", towers)
    shapes = {"layers.0.x.lora_A.weight": (4, 2), "layers.0.x.lora_B.weight": (2, 4)}
    assert mismatches(spec(shapes), towers)[0].why == "ambiguous"


def test_target_sets_are_shared_by_adapters_of_other_ranks() -> None:
    wide = {f"{Q}.lora_A.weight": (8, 16), f"{Q}.lora_B.weight": (8, 8)}
    assert target_set(spec(wide, r=8), base()).digest == TARGETS.digest


# ── at push ──────────────────────────────────────────────────────────────────


def test_the_refusal_names_what_does_not_fit_and_what_would() -> None:
    narrow = base(shapes=SHAPES | {f"{Q}.weight": (8, 8)})
    with pytest.raises(AdapterDoesNotFit, match=r"q_proj: the update is 8 × 16.* It fits demo@r1\.") as refusal:
        require_fit(spec(), narrow, {"demo@r1": base(), "other@r1": narrow}, path="./out", name="team/bot")
    assert "loractl push ./out team/bot --base BASE" in refusal.value.hint


def test_what_fits_passes() -> None:
    assert require_fit(spec(), base(), {}, path="p", name="n").class_ is FitClass.SAME_SHAPE


B1, B2, B3 = (Digest("b3", d * 64) for d in "123")


def test_evidence_is_the_strongest_there_is() -> None:
    recorded = replace(spec(), recorded_base=B1)
    assert binding_evidence(recorded, B1, declared=[B2]).evidence is Evidence.RECORDED
    assert binding_evidence(spec(), B1, declared=[B1]).evidence is Evidence.RESOLVED
    assert binding_evidence(spec(), B1, declared=[B1, B2]).evidence is Evidence.DECLARED
    assert binding_evidence(spec(), B1).evidence is Evidence.DECLARED


@pytest.mark.parametrize(
    ("recorded", "declared", "word"),
    [(B2, [], "recorded"), (B2, [B1], "recorded"), (None, [B2], "declared as 'llama'"), (None, [B2, B3], " or ")],
)
def test_contradicting_evidence_is_refused_unless_trusted(
    recorded: Digest | None, declared: list[Digest], word: str
) -> None:
    adapter = replace(spec(), recorded_base=recorded)
    with pytest.raises(EvidenceContradicts, match=word) as refusal:
        binding_evidence(adapter, B1, declared=declared, labels={B2: "demo@r2"}, path="./out", name="team/bot")
    assert "It fits demo@r2." in refusal.value.message
    assert "--trust-base" in refusal.value.hint
    found = binding_evidence(adapter, B1, declared=declared, trust_base=True)
    assert found.evidence is Evidence.DECLARED
    assert word in str(found.overridden)
