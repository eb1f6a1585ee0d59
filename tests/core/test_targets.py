"""Words of a recipe and the names of a base: what means what, and what may have been meant."""

import pytest

from registry.core.base_model import BaseModel, Tensor
from registry.core.digest import Digest
from registry.core.errors import RankTooHigh, UnknownTargets
from registry.core.targets import check_parameters, check_rank, check_targets, means, modules_of, names_of

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"]


def base(model_type: str, *names: str) -> BaseModel:
    """Matrices but for norms."""
    zero = Digest("b3", "0" * 64)
    rows = [Tensor(name, "F32", (4,) if "norm" in name else (4, 4), zero) for name in names]
    return BaseModel.of(rows, {"model_type": model_type, "tie_word_embeddings": True})


def test_a_target_is_the_end_of_a_modules_name() -> None:
    for target in ("q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        assert means(target, MODULES[0])
    for target in ("proj", "self_attn", "q_proj.weight", "layers.0"):
        assert not means(target, MODULES[0])


def test_what_means_nothing_is_named_with_what_may_have_been_meant() -> None:
    check_targets(["q_proj", "lm_head"], MODULES)
    with pytest.raises(UnknownTargets, match=r"Targets 'q_prj', 'x' match no module .* Did you mean 'q_proj'"):
        check_targets(["q_prj", "up_proj", "x"], MODULES)
    with pytest.raises(UnknownTargets, match=r"There are 'lm_head', 'q_proj', 'up_proj'\."):
        check_targets(["zzz"], MODULES)


def test_a_parameter_is_meant_by_any_run_of_parts_of_its_name() -> None:
    names = [f"{module}.weight" for module in MODULES]
    check_parameters(["q_proj", "layers.0", "mlp.up_proj.weight", "lm_head"], names)
    with pytest.raises(UnknownTargets, match=r"'layers\.1'"):
        check_parameters(["layers.0", "layers.1"], names)


def test_a_tied_head_is_a_module_too() -> None:
    tied = base("llama", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
    assert set(modules_of(tied)) == {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"}
    assert "model.norm.weight" in names_of(tied)


def test_of_an_unknown_type_a_table_tells_nothing() -> None:
    assert modules_of(base("strange", "a.weight")) == names_of(base("strange", "a.weight")) == ()


def sized(model_type: str, dtype: str = "F32", **shapes: tuple[int, int]) -> BaseModel:
    zero = Digest("b3", "0" * 64)
    rows = [Tensor(f"{name.replace('__', '.')}.weight", dtype, shape, zero) for name, shape in shapes.items()]
    return BaseModel.of(rows, {"model_type": model_type, "tie_word_embeddings": True})


def test_a_rank_above_the_smaller_side_of_a_targeted_matrix_is_refused() -> None:
    made = sized(
        "llama", model__layers__0__self_attn__q_proj=(32, 32), model__layers__0__self_attn__k_proj=(8, 32),
        model__embed_tokens=(4, 32),
    )  # fmt: skip
    check_rank(32, ["q_proj"], made)
    check_rank(8, ["all-linear"], made)  # an embedding is no linear layer
    check_rank(9, ["all-linear"], made, but=["k_proj"])  # trained whole
    for targets in (["all-linear"], ["q_proj", "k_proj"]):
        with pytest.raises(RankTooHigh, match=r"Rank 9 .*k_proj', which is 8×32; at most 8"):
            check_rank(9, targets, made)
    with pytest.raises(RankTooHigh, match="embed_tokens"):
        check_rank(5, ["embed_tokens"], made)


def test_sides_are_told_as_outputs_and_inputs_however_they_are_stored() -> None:
    with pytest.raises(RankTooHigh, match="c_attn', which is 24×8;"):
        check_rank(9, ["c_attn"], sized("gpt2", transformer__h__0__attn__c_attn=(8, 24)))


def test_a_rank_is_not_judged_by_what_is_stored_in_few_bits_or_of_a_type_that_nobody_knows() -> None:
    check_rank(9, ["q_proj"], sized("llama", "U8", model__layers__0__self_attn__q_proj=(512, 1)))
    check_rank(9, ["q_proj"], sized("nobody", model__layers__0__self_attn__q_proj=(8, 8)))
