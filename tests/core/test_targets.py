"""Words of a recipe and the names of a base: what means what, and what may have been meant."""

import pytest

from registry.core.base_model import BaseModel, Tensor
from registry.core.digest import Digest
from registry.core.errors import UnknownTargets
from registry.core.targets import check_parameters, check_targets, means, modules_of, names_of

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
