"""Tier 3: a few steps on the new base from the best of what tiers 0 to 2 give, and from scratch (docs: rebase).

    θ ← θ_start − steps of AdamW on   loss + ½·pull·(1 − t/T)·‖θ − θ_start‖²

Candidates are the best start at a third and at a tenth of the recorded rate, and a fresh adapter at the rate itself:
all with the same steps and rows, in one run, so that the start has to earn its place. The recorded rate is for factors
that begin at zero; a few steps of it undo more of a start than they teach (docs: rebase). After a short training the
tenth is left out, since all of them together are to cost well under a retraining. The calibration split of the suite
chooses, without one the loss of the last quarter of training.

Under `FEW` rows only the core of a start is trained (r×r numbers a module, as LoRA-XS, arXiv:2405.17604, has them):

    ΔW = s·(c·B)·R·A        R = I⁄c at the start, c = √(I⁄r)

A step of AdamW moves every number by the rate, whatever its size is; c makes it change R as much as it would have
changed A, whose numbers are about 1⁄√I.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from registry.core.recipes import PULL, FineTune

from ..data import Row
from ..evaluate import Suite, evaluate
from ..finetune import Task, Trained
from ..lora import Adapter
from ..metrics import difference
from ..model import Model, Tokenizer
from ..rate import rate_of, with_rate
from .race import Entrant, Measure, Race
from .starts import SCRATCH, Starts, best_of, calibration_of, fitting, score_of, scratch, standing

BY_ITEMS = 256
"""Items of the calibration split by which candidates are compared, at most."""
FEW = 50
"""Rows below which only the core of a start is trained."""
GENTLE = {"{}, a third of the rate": 3, "{}, a tenth of the rate": 10}
"""What the recorded rate is divided by where training begins from a start; if there is room for one, the first."""


def warm_start(
    model: Model, tokenizer: Tokenizer, recipe: FineTune, rows: Sequence[Row], starts: Starts, suite: Suite | None,
    candidates: int = 3,
) -> Race:  # fmt: skip
    """The race of one adapter by ``recipe``, whose steps, rates and pull are this tier's."""
    starts = fitting(model, starts)
    told = standing(model, tokenizer, suite, rows, starts)
    fresh = scratch(model, recipe, starts)
    entrants = {}
    if (best := best_of(told)) != SCRATCH:
        entrants = from_start(model, recipe, rows, best, starts.adapters[best], candidates - 1)
    entrants[SCRATCH] = Entrant(SCRATCH, Task(recipe.model_copy(update={"pull": 0.0}), rows, fresh))
    return Race(entrants, by_score(model, tokenizer, suite), told)


def from_start(
    model: Model, recipe: FineTune, rows: Sequence[Row], name: str, start: Adapter, many: int
) -> dict[str, Entrant]:
    """The start at ``many`` of the gentle rates, held to where it began."""
    few = len(rows) < FEW
    full = with_rate(model, recipe, start).model_copy(update={"pull": recipe.pull or PULL})
    found = {}
    for called, by in list(GENTLE.items())[:many]:
        gentle = full.model_copy(update={"learning_rate": rate_of(full) / by})
        found[called.format(name)] = Entrant(name, task_from(gentle, rows, start, core=few))
    return found


def task_from(recipe: FineTune, rows: Sequence[Row], start: Adapter, *, core: bool = False) -> Task:
    """Training on from ``start``; three factors, too, by its own: those of its old base are not the new one's."""
    if core or recipe.variant == "three-factor":
        return Task(recipe.model_copy(update={"variant": "plain"}), rows, with_core(start))
    return Task(recipe, rows, start)


def with_core(adapter: Adapter) -> Adapter:
    """The adapter with its own B and A fixed and only R between them trained; lengths and biases still are."""
    patches = {}
    for name, patch in adapter.patches.items():
        rank, inputs = patch.a_RI.shape
        patches[name] = replace(patch, basis_OR=patch.b_OR.float() * math.sqrt(inputs / rank))
    return replace(adapter, patches=patches)


def by_score(model: Model, tokenizer: Tokenizer, suite: Suite | None) -> Measure:
    """The suite's main metric on its calibration split, with the paired difference from scratch; else the loss."""
    calibration = calibration_of(suite, BY_ITEMS)
    return by_loss if calibration is None else partial(_scored, model, tokenizer, calibration)


def _scored(
    model: Model, tokenizer: Tokenizer, calibration: Suite, trained: Mapping[str, Trained]
) -> dict[str, dict[str, Any]]:
    adapters = {name: run.adapter for name, run in trained.items()}
    records = evaluate(model, tokenizer, calibration, adapters, bare=False)
    found: dict[str, dict[str, Any]] = {
        name: {"loss": last_quarter(trained[name]), "score": score_of(calibration, own)}
        for name, own in records.items()
    }
    for name, own in records.items():
        if name != SCRATCH and SCRATCH in records:
            over = difference(own, records[SCRATCH], calibration.main_metric())
            found[name]["over_scratch"] = over.dump()
    return found


def by_loss(trained: Mapping[str, Trained]) -> dict[str, dict[str, Any]]:
    """What was learnt in the end, where nothing else can be asked."""
    return {name: {"loss": last_quarter(run), "score": -last_quarter(run)} for name, run in trained.items()}


def last_quarter(trained: Trained) -> float:
    """The mean loss of the last quarter of the steps."""
    return fmean(trained.losses[-max(1, len(trained.losses) // 4) :])
