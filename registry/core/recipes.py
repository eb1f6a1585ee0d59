"""Recipes: the frozen, hashable requests for work that a worker runs.

A recipe names everything by content digest, so that equal work is equal bytes: base models by base
digest, adapters, datasets and suites by the digest of their version. The dump of a recipe is stored with
whatever came out of it. `workers.run` runs any of them by hand, without a registry.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from .digest import Digest
from .errors import BadRequest
from .manifest import BaseDigest, Frozen, Sha256, canonical_json

Precision = Literal["auto", "fp32", "bf16"]
Metric = Literal["likelihood", "accuracy", "exact-match"]
Tier = Literal["carry", "warm-start", "retrain"]
TIERS: tuple[Tier, ...] = ("carry", "warm-start", "retrain")


def _not_blank(value: str) -> str:
    if not value or value != value.strip():
        raise ValueError("empty, or with spaces around it")
    return value


Target = Annotated[str, AfterValidator(_not_blank)]


class FineTune(Frozen):
    """Train one LoRA adapter on a frozen base; loss on completions only (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["finetune"] = "finetune"
    base: BaseDigest
    datasets: Annotated[tuple[Sha256, ...], Field(min_length=1)]
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Last parts of module names, or the one word ``all-linear``."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    rank_stabilised: bool = False
    """Scale by α/√r in place of α/r (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    learning_rate_b_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Rate of B over rate of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 100
    batch_tokens: Annotated[int, Field(ge=8)] = 512
    """Tokens a step, padding included; rows are taken until the next one would exceed it (at least one)."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longer rows are cut on the left of the prompt; a completion that does not fit is refused."""
    precision: Precision = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    start: Sha256 | None = None
    """Version whose factors training starts from (same targets and ranks), else A random and B = 0."""
    pull: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the pull ½·pull·(1 − t/T)·‖θ − θ_start‖² towards the start, decaying to zero (with ``start``)."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0 for none. Not a part of the result."""


class Evaluate(Frozen):
    """Score adapters and the bare base on a suite, with a record per item."""

    kind: Literal["evaluate"] = "evaluate"
    base: BaseDigest
    suite: Sha256
    adapters: tuple[Sha256, ...] = ()
    bare: bool = True
    """Score the base without any adapter too: the gate asks whether an adapter adds value."""
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.adapters and not self.bare:
            raise ValueError("nothing to evaluate: no adapter and not the bare base")
        return self


class Merge(Frozen):
    """W + scale·B·A as a new base model, streamed."""

    kind: Literal["merge"] = "merge"
    base: BaseDigest
    adapter: Sha256


class Rebase(Frozen):
    """Carry ``adapter`` from ``old`` to ``base`` by one tier of the cascade (docs: rebase)."""

    kind: Literal["rebase"] = "rebase"
    tier: Tier
    adapter: Sha256
    old: BaseDigest
    base: BaseDigest
    training: FineTune | None = None
    """warm-start and retrain: the recorded recipe on the new base, with the steps and rates of this tier."""
    suite: Sha256 | None = None
    """warm-start: its calibration split chooses among the starts; without one the training loss does."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tier == "carry") != (self.training is None):
            raise ValueError(f"tier '{self.tier}' {'takes no' if self.training else 'needs a'} training recipe")
        if self.training is not None and self.training.base != self.base:
            raise ValueError("the training recipe is for another base")
        return self


class Compare(Frozen):
    """Relative drift ρ = ‖W2 − W1‖/‖W1‖ per tensor, and whether ``base`` is exactly a cast of ``old``."""

    kind: Literal["compare"] = "compare"
    old: BaseDigest
    base: BaseDigest


Recipe = Annotated[FineTune | Evaluate | Merge | Rebase | Compare, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[FineTune | Evaluate | Merge | Rebase | Compare] = TypeAdapter(Recipe)


def parse_recipe(data: bytes | dict[str, Any]) -> FineTune | Evaluate | Merge | Rebase | Compare:
    """A recipe from JSON; `BadRequest` names the field and what is allowed there."""
    try:
        return _ADAPTER.validate_json(data) if isinstance(data, bytes) else _ADAPTER.validate_python(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
        )
        raise BadRequest(problems=problems) from error


def recipe_digest(recipe: Frozen) -> Digest:
    """SHA-256 of the recipe's canonical JSON: equal work has one digest."""
    return Digest.sha256(canonical_json(recipe.model_dump(mode="json", exclude={"checkpoint_every"})))


def inputs_of(recipe: FineTune | Evaluate | Merge | Rebase | Compare) -> dict[str, str]:
    """What a worker must have on disk before it runs ``recipe``: role -> digest.

    Roles are the names of `workers.run --in`: ``base``, ``old``, ``adapter``, ``adapter.N``, ``dataset.N``,
    ``suite``, ``start``.
    """
    found: dict[str, str] = {"base": recipe.base}
    match recipe:
        case FineTune():
            found |= _training_inputs(recipe)
        case Evaluate():
            found["suite"] = recipe.suite
            found |= {f"adapter.{i}": digest for i, digest in enumerate(recipe.adapters)}
        case Merge():
            found["adapter"] = recipe.adapter
        case Rebase():
            found["adapter"] = recipe.adapter
            found["old"] = recipe.old
            if recipe.training is not None:
                found |= _training_inputs(recipe.training)
            if recipe.suite is not None:
                found["suite"] = recipe.suite
        case Compare():
            found["old"] = recipe.old
    return found


def _training_inputs(recipe: FineTune) -> dict[str, str]:
    found = {f"dataset.{i}": digest for i, digest in enumerate(recipe.datasets)}
    return found | ({"start": recipe.start} if recipe.start else {})
