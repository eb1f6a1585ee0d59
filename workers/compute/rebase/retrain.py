"""Tier 5: the recorded recipe on the new base, from the best start where that still recovers enough (docs: rebase).

recovered = (S(W2 + ΔW) − S(W2)) ⁄ (S(W1 + ΔW) − S(W1))        on the calibration split of the suite
"""

from collections.abc import Sequence

from registry.core.recipes import FineTune

from ..data import Row
from ..evaluate import Suite, evaluate
from ..finetune import Task
from ..lora import Adapter
from ..model import Model, Tokenizer
from ..panel import BARE
from .race import Entrant, Race
from .starts import SCRATCH, Starts, best_of, calibration_of, fitting, score_of, standing
from .warm_start import by_loss, task_from

ENOUGH = 0.3
"""The share of its gain that an adapter must keep without a step, to be worth starting from."""


def retrain(
    model: Model,
    tokenizer: Tokenizer,
    recipe: FineTune,
    rows: Sequence[Row],
    starts: Starts,
    suite: Suite | None,
    before: float | None,
) -> Race:
    """The whole ``recipe`` from the best start, or from nothing; ``before``: the adapter's gain on its own base."""
    starts = fitting(model, starts)
    told = standing(model, tokenizer, suite, rows, starts) if calibration_of(suite) else {}
    for found in told.values():
        if "score" in found:
            found["recovered"] = recovered(before, found["score"] - told[BARE]["score"])
    best = best_of(told)
    enough = best != SCRATCH and (told[best]["recovered"] or 0.0) > ENOUGH
    name = best if enough else SCRATCH
    task = task_from(recipe, rows, starts.adapters[best]) if enough else Task(recipe, rows)
    return Race({name: Entrant(name, task)}, by_loss, told)


def recovered(before: float | None, after: float | None) -> float | None:
    """The share of the gain ``before`` that is left ``after`` carrying; None when there was none to keep."""
    return None if before is None or after is None or before <= 0 else after / before


def gain(model: Model, tokenizer: Tokenizer, suite: Suite | None, adapter: Adapter) -> float | None:
    """S(W + ΔW) − S(W) on the calibration split; None when the split is empty."""
    calibration = calibration_of(suite)
    if calibration is None:
        return None
    records = evaluate(model, tokenizer, calibration, {"adapter": adapter})
    return score_of(calibration, records["adapter"]) - score_of(calibration, records[BARE])
