"""The learning rate of a recipe that names none.

    rate = 2e-4 · (share ⁄ (2⁄7))^−½        share: targeted matrices ⁄ linear matrices of the base, its head apart

Fewer matrices have to move further for the same change of the model. The level is that of q and v of a Llama, 2 of the
7 matrices of a block, where 2e-4 has been the default; the exponent was fitted (docs/adr/0011, benchmarks/rates.py).
"""

from registry.core.recipes import FineTune, Training

from .lora import LINEAR, Adapter
from .model import Model

LEVEL = 2e-4
SHARE = 2 / 7
"""The share at which the default rate is `LEVEL`."""
EXPONENT = 0.5


def default_rate(share: float) -> float:
    """The rate for a share of targeted matrices, from above 0 to 1."""
    return float(LEVEL * (share / SHARE) ** -EXPONENT)


def share_of(model: Model, adapter: Adapter) -> float:
    """Matrices that the adapter patches over linear matrices of the model without its head, at most 1."""
    head = model.get_output_embeddings()
    linear = sum(isinstance(module, LINEAR) and module is not head for module in model.modules())
    return min(1.0, len(adapter.patches) / max(1, linear))


def with_rate(model: Model, recipe: FineTune, adapter: Adapter) -> FineTune:
    """The recipe with the rate that it is trained at, for an adapter of its placement."""
    if recipe.learning_rate is not None:
        return recipe
    return recipe.model_copy(update={"learning_rate": default_rate(share_of(model, adapter))})


def rate_of(recipe: Training) -> float:
    """The rate of a recipe that has one."""
    assert recipe.learning_rate is not None, "with_rate gives every recipe one"
    return recipe.learning_rate
