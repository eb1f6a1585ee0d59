import math

import pytest

from registry.core.recipes import recipe_digest
from tests.workers import factories
from workers.compute.finetune import finetune
from workers.compute.lora import fresh
from workers.compute.rate import default_rate, share_of, with_rate

Q_AND_V = ("q_proj", "v_proj")


def test_q_and_v_of_a_llama_keep_the_rate_that_was_the_default() -> None:
    model, recipe = factories.llama(), factories.recipe(targets=Q_AND_V, learning_rate=None)
    assert with_rate(model, recipe, fresh(model, recipe)).learning_rate == pytest.approx(2e-4)


def test_a_quarter_of_the_matrices_is_trained_at_twice_the_rate() -> None:
    assert default_rate(0.25) == pytest.approx(2 * default_rate(1.0))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_neither_as_targeted_nor_as_there(tied: bool) -> None:
    model = factories.llama(tied=tied)
    assert share_of(model, fresh(model, factories.recipe(targets=("all-linear",)))) == 1.0
    assert share_of(model, fresh(model, factories.recipe(targets=("q_proj",)))) == pytest.approx(1 / 7)


def test_conv1d_counts_as_a_linear_matrix() -> None:
    model = factories.gpt2()
    assert share_of(model, fresh(model, factories.recipe(targets=("c_attn",)))) == pytest.approx(1 / 4)


def test_a_training_without_a_rate_is_the_training_at_the_rate_it_reports() -> None:
    model, tokenizer, rows = factories.llama(), factories.tokenizer(), factories.rows()
    unsaid = factories.recipe(targets=("all-linear",), learning_rate=None)
    found = finetune(model, tokenizer, unsaid, rows)
    assert found.rate == pytest.approx(2e-4 / math.sqrt(3.5))
    said = unsaid.model_copy(update={"learning_rate": found.rate})
    assert finetune(model, tokenizer, said, rows).losses == found.losses
    assert recipe_digest(said) != recipe_digest(unsaid)


def test_a_rate_that_is_said_stays() -> None:
    model, recipe = factories.llama(), factories.recipe(learning_rate=0.5)
    assert with_rate(model, recipe, fresh(model, recipe)) is recipe
