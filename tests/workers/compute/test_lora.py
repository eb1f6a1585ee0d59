from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from registry.core.errors import NotRunnable, RankTooHigh, UnknownTargets
from registry.core.targets import modules_of, names_of
from tests.factories import base_of
from tests.workers import factories
from workers.compute.bank import Bank, attached
from workers.compute.lora import Adapter, fresh, takes_factors, target_modules
from workers.compute.model import Model


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
def test_a_fresh_adapter_changes_nothing(make: type[Model]) -> None:
    model = make()
    before = factories.logits(model)
    with attached(model, fresh(model, factories.recipe(targets=("all-linear",)))):
        assert torch.equal(factories.logits(model), before)


def test_a_detached_adapter_leaves_the_base_as_it_was() -> None:
    model = factories.llama()
    before = factories.logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with attached(model, factories.random_adapter(model)):
        assert not torch.allclose(factories.logits(model), before)
    assert torch.equal(factories.logits(model), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
def test_an_attached_adapter_answers_as_its_dense_update_would(make: type[Model]) -> None:
    model = make()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    with attached(model, adapter):
        adapted = factories.logits(model)
    for name, patch in adapter.patches.items():
        weight, update = model.get_submodule(name).weight, patch.update.dense()
        weight += update.T if make is factories.gpt2 else update
    torch.testing.assert_close(factories.logits(model), adapted, atol=1e-4, rtol=1e-4)


def test_all_linear_means_every_linear_module_but_the_head() -> None:
    found = target_modules(factories.llama(tied=False), ("all-linear",))
    assert len(found) == 2 * 7
    assert "lm_head" not in found


def test_a_target_is_the_end_of_a_name() -> None:
    found = target_modules(factories.llama(), ("0.self_attn.q_proj", "down_proj"))
    assert found == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_an_unknown_target_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownTargets, match=r"'q_porj' match no module.*'q_proj'"):
        target_modules(factories.llama(), ("q_porj", "v_proj"))


def test_equal_seeds_draw_equal_adapters() -> None:
    model = factories.llama()
    one, same, other = (fresh(model, factories.recipe(seed=seed)) for seed in (1, 1, 2))
    name = next(iter(one.patches))
    assert torch.equal(one.patches[name].a_RI, same.patches[name].a_RI)
    assert not torch.equal(one.patches[name].a_RI, other.patches[name].a_RI)


def test_an_adapter_of_other_shapes_is_refused_by_module_and_shape() -> None:
    adapter = factories.random_adapter(factories.llama(hidden_size=48))
    with pytest.raises(NotRunnable, match=r"q_proj.*32×32"):
        Bank(factories.llama(), [adapter])


def test_an_adapter_for_a_module_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(NotRunnable, match=r"no module 'model.layers.2.self_attn.q_proj'"):
        Bank(factories.llama(), [factories.random_adapter(factories.llama(num_hidden_layers=3))])


def test_names_without_the_base_prefix_find_their_modules() -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model)
    bare = Adapter({name.removeprefix("model."): patch for name, patch in adapter.patches.items()}, adapter.config)
    with attached(model, adapter):
        expected = factories.logits(model)
    with attached(model, bare):
        assert torch.equal(factories.logits(model), expected)


def test_a_rank_above_the_smaller_side_is_refused_with_the_highest_that_fits() -> None:
    with pytest.raises(RankTooHigh, match=r"Rank 17 .*k_proj.*16×32; at most 16"):
        fresh(factories.llama(), factories.recipe(rank=17, targets=("q_proj", "k_proj")))


@pytest.mark.parametrize("make", [factories.llama, lambda: factories.llama(tied=False), factories.gpt2])
def test_a_tensor_table_tells_the_names_that_the_loaded_model_has(make: Callable[[], Model], tmp_path: Path) -> None:
    made = make()
    table = base_of(factories.saved(made, tmp_path / "base"))
    modules = {name for name, module in made.named_modules() if takes_factors(module)}
    assert set(modules_of(table)) == modules
    assert set(names_of(table)) == {name for name, _ in made.named_parameters(remove_duplicate=False)}
