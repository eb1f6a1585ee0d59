"""Tier 3: a few steps on the new base from the best of the carried adapter and a fresh one (docs: rebase).

Both starts are given the same steps, rows and rates in one run, so that carrying has to earn its place; the calibration
split of a suite chooses between what came out, without a suite the loss of the last quarter of training.
The carried adapter is held to where it began by a pull that decays to zero over these steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from registry.core.recipes import FineTune

from ..data import Row
from ..evaluate import Suite, evaluate
from ..finetune import Report, Task, Trained, finetune_many, silent
from ..lora import Adapter, restarted
from ..metrics import mean
from ..model import Model, Tokenizer

PULL = 0.01
"""Where the recipe names none."""


@dataclass(frozen=True)
class Chosen:
    """The candidate that won, and what was known of each when it did."""

    trained: Trained
    start: str
    candidates: dict[str, dict[str, Any]]
    steps: int
    """Steps that all candidates took together: what the tier cost."""


def warm_start(
    model: Model,
    tokenizer: Tokenizer,
    recipe: FineTune,
    rows: Sequence[Row],
    carried: Adapter,
    suite: Suite | None = None,
    report: Report = silent,
    checkpoint: Path | None = None,
) -> Chosen:
    """Train from ``carried`` and from scratch by ``recipe`` (its steps, rates and pull are this tier's) and choose."""
    starts = {"carry": carried, "scratch": restarted(carried, recipe.seed)}
    pulls = {"carry": recipe.pull or PULL, "scratch": 0.0}
    tasks = [Task(recipe.model_copy(update={"pull": pulls[name]}), rows, start) for name, start in starts.items()]

    def shifted(progress: dict[str, Any]) -> None:
        place = progress["task"]
        step = (progress["step"] - 1) * len(tasks) + place + 1
        report(progress | {"step": step, "steps": recipe.steps * len(tasks), "candidate": list(starts)[place]})

    runs = finetune_many(model, tokenizer, tasks, report=shifted, checkpoint_dir=checkpoint)
    trained = dict(zip(starts, runs, strict=True))
    steps = sum(len(run.losses) for run in trained.values())
    candidates = {name: {"loss": fmean(run.losses[-max(1, recipe.steps // 4) :])} for name, run in trained.items()}
    calibration = suite.only("calibration") if suite is not None else None
    if calibration is None or not calibration.rows:
        best = min(trained, key=lambda name: candidates[name]["loss"])
        return Chosen(trained[best], best, candidates, steps)
    metric = calibration.main_metric()
    adapters = {name: run.adapter for name, run in trained.items()} | {"carry, no steps": carried}
    records = evaluate(model, tokenizer, calibration, adapters)
    for name, found in records.items():
        candidates.setdefault(name, {})["score"] = mean(found, metric)
    best = max(trained, key=lambda name: candidates[name]["score"])
    return Chosen(trained[best], best, candidates, steps)
