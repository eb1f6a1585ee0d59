"""Recipes: the frozen, hashable requests for work that a worker runs.

A recipe names everything by content digest, so that equal work is equal bytes: base models by base
digest, adapters, datasets and suites by the digest of their version. The dump of a recipe is stored with
whatever came out of it. `workers.run` runs any of them by hand, without a registry.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from .digest import Digest
from .errors import BadRequest
from .manifest import BaseDigest, Frozen, Sha256, canonical_json
from .metrics import Metric, is_binary

Precision = Literal["auto", "fp32", "bf16"]
Quantisation = Literal["int8", "nf4"]
Tier = Literal["carry", "align", "transport", "warm-start", "distil", "retrain"]
Untrained = Literal["carry", "align", "transport"]
Combination = Literal["linear", "concat", "svd", "ties", "dare"]
Rest = Literal["refuse", "replace", "drop"]
Variant = Literal["plain", "dora", "three-factor"]
LongRows = Literal["cut", "refuse", "drop"]
TIERS: tuple[Tier, ...] = ("carry", "warm-start", "retrain")
"""Those that an upgrade tries where nobody names others."""
TRAINED: frozenset[Tier] = frozenset({"warm-start", "retrain"})
"""Those that take steps, and so a training recipe."""
UNTRAINED: frozenset[Tier] = frozenset(get_args(Untrained))
"""Those that take no step; the others begin at the best of what they make."""
RESHAPES: frozenset[Tier] = frozenset({"transport", "warm-start", "distil"})
"""Those that bring an adapter to a base of other shapes."""
UNLABELLED: frozenset[Tier] = frozenset({"transport", "distil"})
"""Those that read unlabelled text, where there is some."""
HOW = {"checkpoint_every", "activation_checkpointing"}
"""Fields that say how work is done, and change nothing about what comes out."""


def _not_blank(value: str) -> str:
    if not value or value != value.strip():
        raise ValueError("empty, or with spaces around it")
    return value


Target = Annotated[str, AfterValidator(_not_blank)]


class Steps(Frozen):
    """How any training goes: at which rates, on how many tokens at once, for how long."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """At its highest; None: it follows from the share of matrices that are targeted (`workers.compute.rate`)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 100
    batch_tokens: Annotated[int, Field(ge=8)] = 512
    """Tokens a step, padding included; rows are taken until the next one would exceed it (at least one)."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """In tokens, of a row; never above what the base was made for."""
    long_rows: LongRows = "cut"
    """What is done about longer ones: their prompt is cut on the left (a completion that does not fit is refused),
    the training is refused, or they are dropped. How many were cut or dropped is in the result."""
    precision: Precision = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0 for none. Not a part of the result."""
    activation_checkpointing: bool = False
    """Keep only what goes into each decoder layer and compute the rest again on the way back: less memory, about a
    third more time, the same bits. Not a part of the result."""


class Training(Steps):
    """What every training says: on which rows, at which rates, for how long; loss on completions only."""

    base: BaseDigest
    datasets: Annotated[tuple[Sha256, ...], Field(min_length=1)]
    sharded: bool = False
    """Divide the base and the rows of each step among all GPUs of the worker's machine, for a base that outgrows one
    of them (FSDP2); without several GPUs it changes nothing. The result is the same within rounding."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The share of rows that are looked at and not trained on, drawn by their content."""
    look_every: Annotated[int, Field(ge=1)] = 20
    """Steps between looks at the loss of rows held out; the last step has one, too."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Looks in a row without a better loss that end the training, with what it had at the best one; 0: it goes on to
    its last step and keeps what it has then."""

    @model_validator(mode="after")
    def _patient(self) -> Self:
        if self.patience and not self.held_out:
            raise ValueError("patience needs rows to look at: set held_out, such as 0.1")
        return self


class FineTune(Training):
    """Train one LoRA adapter on a frozen base (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["finetune"] = "finetune"
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Last parts of module names, or the one word ``all-linear``."""
    variant: Variant = "plain"
    """B·A; DoRA, with trained lengths of W's rows (Liu et al. 2024, arXiv:2402.09353); or three factors, of which only
    the middle one, r×r, is trained (LoRA-XS, Bałazy et al. 2024, arXiv:2405.17604)."""
    whole: tuple[Target, ...] = ()
    """Last parts of names of modules that are trained whole, as PEFT's ``modules_to_save``: they have no factors."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    quantised: Quantisation | None = None
    """Hold the base's linear weights in 8 or 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), embeddings and
    output head aside; None: as they are stored."""
    rank_stabilised: bool = False
    """Scale by α/√r in place of α/r (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learning_rate_b_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Rate of B over rate of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    start: Sha256 | None = None
    """Version whose factors training starts from (same targets and ranks), else A random and B = 0."""
    pull: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the pull ½·pull·(1 − t/T)·‖θ − θ_start‖² towards the start, decaying to zero (with ``start``)."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := sorted(set(self.targets) & set(self.whole)):
            raise ValueError(f"'{both[0]}' cannot have factors (targets) and be trained whole")
        return self


class FullFineTune(Training):
    """Train the base's own weights: what LoRA is compared with. The result is another base model."""

    kind: Literal["full-finetune"] = "full-finetune"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    parameters: tuple[Target, ...] = ()
    """Ends of the names of parameters, or of modules whose parameters are trained; empty: all of them."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type that weights are written in; by default each in the base's own."""


class Evaluate(Frozen):
    """Score adapters and the bare base on a suite, with a record per item."""

    kind: Literal["evaluate"] = "evaluate"
    base: BaseDigest
    suite: Sha256
    adapters: tuple[Sha256, ...] = ()
    bare: bool = True
    """Score the base without any adapter too: the gate asks whether an adapter adds value."""
    precision: Precision = "auto"
    quantised: Quantisation | None = None
    """Hold the base's linear weights in 8 or 4 bits: another model, whose records pair with its own only."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.adapters and not self.bare:
            raise ValueError("nothing to evaluate: no adapter and not the bare base")
        return self


class Answers(Frozen):
    """What adapters and the bare base answer to inputs that nobody labelled, as a suite asks; nothing is scored."""

    kind: Literal["answers"] = "answers"
    base: BaseDigest
    suite: Sha256
    """How it is asked: the form, the length of an answer. Its own rows are no inputs, and left out of them."""
    metric: Metric
    """Right-or-wrong: of rows with choices the answer is one of these, of others what is written."""
    inputs: Sha256
    """A dataset of which only the prompts and the choices are read; what asks the same is one input."""
    apart: tuple[Sha256, ...] = ()
    """Datasets whose inputs are left out: what is compared was trained on them."""
    adapters: tuple[Sha256, ...] = ()
    bare: bool = False
    precision: Precision = "auto"
    quantised: Quantisation | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.adapters and not self.bare:
            raise ValueError("nobody to ask: no adapter and not the bare base")
        return self


class Merge(Frozen):
    """W + scale·B·A as a new base model, streamed."""

    kind: Literal["merge"] = "merge"
    base: BaseDigest
    adapter: Sha256
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type that weights are written in; by default each in the base's own."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] | None = None
    """Size of the safetensors files, a larger tensor aside; by default the base's own files."""
    dequantise: bool = False
    """Of a base stored in 8 or 4 bits, write the numbers that its bits stand for; such a base is refused otherwise."""
    verify: bool = False
    """Run base and adapter, and the result, on the same tokens, and report how far their logits are apart."""


TEXTS = 512
"""That a teacher writes where nobody says how many."""
PULL = 0.01
"""To a start that is trained on from for a few steps, where nobody says how strong."""


def temperature_of(metric: str) -> float:
    """At which a teacher answers inputs (docs/adr/0029): its likeliest answers where they are right or wrong."""
    return 0.0 if is_binary(metric) else 1.0


class Distil(Steps):
    """How the new base is taught what the old one says with its adapter (tier distil)."""

    steps: Annotated[int, Field(ge=1)] = 100
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """The share of the teacher's texts by which candidates are compared, and on which none is trained; equal texts are
    on one side, and where all are equal, on both."""
    quantised: Quantisation | None = None
    """Hold both bases' linear weights in 8 or 4 bits."""
    pull: Annotated[float, Field(ge=0)] = PULL
    """As in a training with ``start``; a fresh adapter is held to nothing."""
    texts: Annotated[int, Field(ge=2)] = TEXTS
    """That the teacher writes: to each of ``inputs`` one, or several where it has fewer and a temperature."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Of a text, at most."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """That the teacher writes at; 0: its likeliest token each time."""
    likeliest: Annotated[int, Field(ge=1)] = 64
    """Tokens whose probabilities are taught, at each place; all others count as one."""


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
    """Its calibration split chooses. carry: among the variants that need no training; warm-start: among the starts,
    where without one the training loss does."""
    inputs: Sha256 | None = None
    """A dataset of which only the prompts are read: unlabelled text of what the adapter is for."""
    candidates: Literal[2, 3] = 3
    """warm-start: how many are trained; of two the start is tried at one rate alone, scratch beside it."""
    distil: Distil | None = None
    """distil: how; the old base with the adapter completes ``inputs``, or writes texts from nothing."""
    made: Annotated[dict[Untrained, Sha256], Field(exclude_if=lambda made: not made)] = Field(default_factory=dict)
    """Tiers that train: what those without training have made of ``adapter`` on ``base`` already, to begin at. What is
    not here is made anew."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tier in TRAINED) != (self.training is not None):
            raise ValueError(f"tier '{self.tier}' {'takes no' if self.training else 'needs a'} training recipe")
        if self.training is not None and self.training.base != self.base:
            raise ValueError("the training recipe is for another base")
        if (self.tier == "distil") != (self.distil is not None):
            raise ValueError(f"tier '{self.tier}' {'takes no' if self.distil else 'needs a'} 'distil'")
        if self.made and self.tier in UNTRAINED:
            raise ValueError(f"tier '{self.tier}' begins at nothing that others made; leave 'made' out")
        return self


FULL_RANK = 64
"""The rank that a search over ranks trains where nobody says which."""
ENERGY = 0.95
"""The share of ‖ΔW‖² that is kept where nobody says how much."""
Energy = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=4096)]


class Combine(Frozen):
    """Several adapters of one base as one adapter; the methods are those of `workers.compute.combine`."""

    kind: Literal["combine"] = "combine"
    base: BaseDigest
    adapters: Annotated[tuple[Sha256, ...], Field(min_length=2, max_length=100)]
    method: Combination = "concat"
    weights: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    """What each adapter's ΔW is multiplied by; None: each by 1."""
    rank: Rank | None = None
    """svd, ties, dare: the rank of every module; neither this nor ``energy``: the largest among its adapters."""
    energy: Energy | None = None
    """svd, ties, dare: the share of ‖ΔW‖² to keep, module by module."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """ties, dare: the share of ΔW's elements that stay."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """dare: of the elements that are dropped."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(f"{len(self.weights)} weights for {len(self.adapters)} adapters")
        if self.weights is not None and not any(self.weights):
            raise ValueError("weights: at least one must not be zero")
        if (self.density is not None) != (self.method in ("ties", "dare")):
            raise ValueError(f"method '{self.method}' {'takes no' if self.density else 'needs a'} density")
        if self.method in ("linear", "concat") and (self.rank or self.energy):
            raise ValueError(f"method '{self.method}' takes neither rank nor energy")
        if self.rank and self.energy:
            raise ValueError("rank and energy exclude each other")
        return self


class Compress(Frozen):
    """The same update in fewer parameters: by energy, by rank or by bytes; exactly one of them."""

    kind: Literal["compress"] = "compress"
    base: BaseDigest
    adapter: Sha256
    energy: Energy | None = None
    """The share of ‖ΔW‖² to keep, module by module; `ENERGY` when none of the three is given."""
    rank: Rank | None = None
    """Of every module, at most."""
    bytes: Annotated[int, Field(ge=1)] | None = None
    """Of all factors together, at most: ranks go where they keep most of ‖ΔW‖² per byte."""

    @model_validator(mode="before")
    @classmethod
    def _by_energy(cls, values: Any) -> Any:
        if isinstance(values, dict) and not any(values.get(key) is not None for key in ("energy", "rank", "bytes")):
            return {**values, "energy": ENERGY}
        return values

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.energy is not None) + (self.rank is not None) + (self.bytes is not None) != 1:
            raise ValueError("energy, rank and bytes exclude each other")
        return self


class Extract(Frozen):
    """A LoRA adapter on ``base`` out of a full fine-tune of it: the truncated SVD of W_tuned − W_base."""

    kind: Literal["extract"] = "extract"
    base: BaseDigest
    tuned: BaseDigest
    energy: Energy | None = None
    """The share of ‖W_tuned − W_base‖² to keep, module by module; `ENERGY` without a rank."""
    rank: Rank | None = None
    """Of every module, at most."""
    rest: Rest = "refuse"
    """What is done about parameters that differ and are no linear layer's weight: refused by name and size;
    replaced whole (embeddings, output heads, biases); or left as they are in the base."""

    @model_validator(mode="before")
    @classmethod
    def _by_energy(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("energy") is None and values.get("rank") is None:
            return {**values, "energy": ENERGY}
        return values

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.energy is not None and self.rank is not None:
            raise ValueError("energy and rank exclude each other")
        if self.base == self.tuned:
            raise ValueError("base and tuned are the same weights")
        return self


Times = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MOST_CANDIDATES = 64
LEAST_ITEMS = 20
"""Items of the calibration split below which nothing is chosen by it: 5 items that all changed for the better
are the fewest that tell at 5 % (½⁵ < 0.05), and it is rarely more than a quarter of the items that changes."""


class Search(Frozen):
    """Train one adapter whose rank, scale or placement is found by measuring, on the calibration split of a suite.

    rank       trains once at a high rank and cuts the update down by its spectrum
    scale      trains every pair of scale and rate at once and goes on with the better half, three times
    targets    adds groups of modules at equal bytes, as long as the next one's gain is clearly above zero
    """

    kind: Literal["search"] = "search"
    over: Literal["rank", "scale", "targets"]
    base: BaseDigest
    training: FineTune
    """Where the search starts from, and what it leaves as it is."""
    suite: Sha256
    """Its calibration split chooses, its report split is quoted, its gate split is not looked at."""
    full_rank: Rank | None = None
    """rank: the one that is trained; None: `FULL_RANK`, or what the targeted modules allow."""
    energy: Energy | None = None
    """rank: the share of ‖ΔW‖² to keep, module by module; `ENERGY` without ``bytes``."""
    bytes: Annotated[int, Field(ge=1)] | None = None
    """rank: of all factors together, at most. targets: what every placement gets, in float32; None: as many as the
    recipe's own rank takes on its own targets, or rank 1 on all modules where that is more."""
    scales: Annotated[tuple[Times, ...], Field(min_length=1)] = (0.25, 1.0, 4.0)
    """scale: what the recipe's alpha is multiplied by."""
    rates: Annotated[tuple[Times, ...], Field(min_length=1)] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """scale: what the recipe's learning rate is multiplied by."""
    found: FineTune | None = None
    """What the search ended with, on record in the lineage of the version that it made; nothing reads it before."""

    @model_validator(mode="before")
    @classmethod
    def _by_energy(cls, values: Any) -> Any:
        by_rank = isinstance(values, dict) and values.get("over") == "rank"
        if by_rank and values.get("energy") is None and values.get("bytes") is None:
            return {**values, "energy": ENERGY}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.training.base != self.base:
            raise ValueError("the training recipe is for another base")
        if self.training.start is not None:
            raise ValueError("a search trains from nothing: leave start out of the training recipe")
        if self.training.quantised is not None:
            raise ValueError("a search compares what it finds with full weights: leave quantised out of the recipe")
        if self.over != "rank" and (self.energy is not None or self.full_rank is not None):
            raise ValueError(f"energy and full_rank are for a search over the rank, not over the {self.over}")
        if self.over == "scale" and self.bytes is not None:
            raise ValueError("bytes are for a search over the rank or the targets")
        if self.energy is not None and self.bytes is not None:
            raise ValueError("energy and bytes exclude each other")
        for name, given in (("scales", self.scales), ("rates", self.rates)):
            if len(set(given)) != len(given):
                raise ValueError(f"{name}: {', '.join(map(str, given))} names one twice")
        if len(self.scales) * len(self.rates) > MOST_CANDIDATES:
            many = len(self.scales) * len(self.rates)
            raise ValueError(f"scales and rates: {many} pairs; at most {MOST_CANDIDATES} are trained at once")
        return self


class Compare(Frozen):
    """Relative drift ρ = ‖W2 − W1‖/‖W1‖ per tensor, and whether ``base`` is exactly a cast of ``old``."""

    kind: Literal["compare"] = "compare"
    old: BaseDigest
    base: BaseDigest
    adapters: Annotated[tuple[Sha256, ...], Field(max_length=100)] = ()
    """Adapters of ``old``: what the drift is where each of them reads and writes."""
    inputs: Sha256 | None = None
    """A dataset of which only the prompts are read, for what forward passes say of the adapters."""


AnyRecipe = (
    FineTune | FullFineTune | Evaluate | Answers | Merge | Rebase | Combine | Compress | Extract | Search | Compare
)
MakesAdapter = FineTune | Rebase | Combine | Compress | Extract | Search
"""Recipes whose result is a version of an adapter."""
MakesBase = Merge | FullFineTune
"""Recipes whose result is a base model."""
Recipe = Annotated[AnyRecipe, Field(discriminator="kind")]
BASE_ROLES = ("base", "old", "tuned")
"""Roles of `inputs_of` that are base models; all others are versions of adapters, datasets or suites."""
DATA_ROLES = ("dataset.", "suite", "inputs")
"""How the roles of datasets and suites begin."""
_ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)


def parse_recipe(data: bytes | dict[str, Any]) -> AnyRecipe:
    """A recipe from JSON; `BadRequest` names the field and what is allowed there."""
    try:
        return _ADAPTER.validate_json(data) if isinstance(data, bytes) else _ADAPTER.validate_python(data)
    except ValidationError as error:
        problems = "; ".join(_problem(item["loc"], item["type"], item["msg"]) for item in error.errors())
        raise BadRequest(problems=problems) from error


def _problem(where: tuple[int | str, ...], kind: str, said: str) -> str:
    """What is wrong with one field; of a key that there is none of, the nearest one."""
    path = ".".join(map(str, where))
    if kind != "extra_forbidden":
        return f"{path}: {said}"
    keys = {get_args(model.model_fields["kind"].annotation)[0]: model.model_fields for model in get_args(AnyRecipe)}
    keys["training"] = FineTune.model_fields
    near = get_close_matches(str(where[-1]), keys.get(where[-2], ()), n=1)
    return f"{path}: there is no such key{f'; did you mean {near[0]}?' if near else ''}"


def recipe_digest(recipe: Frozen) -> Digest:
    """SHA-256 of the recipe's canonical JSON: equal work has one digest."""
    return Digest.sha256(canonical_json(_what(recipe.model_dump(mode="json"))))


def _what(dumped: dict[str, Any]) -> dict[str, Any]:
    """A recipe, and the trainings within it, without how they are done."""
    kept = {name: value for name, value in dumped.items() if name not in HOW}
    return {name: _what(value) if isinstance(value, dict) else value for name, value in kept.items()}


def inputs_of(recipe: AnyRecipe) -> dict[str, str]:
    """What a worker must have on disk before it runs ``recipe``: role -> digest.

    Roles are the names of `workers.run --in`: ``base``, ``old``, ``tuned``, ``adapter``, ``adapter.N``, ``made.TIER``,
    ``dataset.N``, ``suite``, ``inputs``, ``start``. Combining and compressing read no base: factors are all there is to
    them.
    """
    found: dict[str, str] = {"base": recipe.base}
    match recipe:
        case FineTune() | FullFineTune():
            found |= _training_inputs(recipe)
        case Evaluate():
            found["suite"] = recipe.suite
            found |= {f"adapter.{i}": digest for i, digest in enumerate(recipe.adapters)}
        case Answers():
            found |= {"suite": recipe.suite, "inputs": recipe.inputs}
            found |= {f"adapter.{i}": digest for i, digest in enumerate(recipe.adapters)}
            found |= {f"dataset.{i}": digest for i, digest in enumerate(recipe.apart)}
        case Merge():
            found["adapter"] = recipe.adapter
        case Rebase():
            found["adapter"] = recipe.adapter
            found["old"] = recipe.old
            if recipe.training is not None:
                found |= _training_inputs(recipe.training)
            if recipe.suite is not None:
                found["suite"] = recipe.suite
            if recipe.inputs is not None:
                found["inputs"] = recipe.inputs
            found |= {f"made.{tier}": digest for tier, digest in recipe.made.items()}
        case Combine():
            return {f"adapter.{i}": digest for i, digest in enumerate(recipe.adapters)}
        case Compress():
            return {"adapter": recipe.adapter}
        case Extract():
            found["tuned"] = recipe.tuned
        case Search():
            found |= _training_inputs(recipe.training) | {"suite": recipe.suite}
        case Compare():
            found["old"] = recipe.old
            found |= {f"adapter.{i}": digest for i, digest in enumerate(recipe.adapters)}
            if recipe.inputs is not None:
                found["inputs"] = recipe.inputs
    return found


def _training_inputs(recipe: FineTune | FullFineTune) -> dict[str, str]:
    found = {f"dataset.{i}": digest for i, digest in enumerate(recipe.datasets)}
    return found | ({"start": recipe.start} if isinstance(recipe, FineTune) and recipe.start else {})
