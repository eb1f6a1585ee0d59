"""Tier 5: the recorded recipe on the new base, from the carried factors where those still recover enough.

recovered = (S(W2 + ΔW) − S(W2)) ⁄ (S(W1 + ΔW) − S(W1))        on the calibration split of the suite
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from registry.core.recipes import FineTune

from ..data import Row
from ..evaluate import Suite, evaluate
from ..finetune import Report, finetune, silent
from ..lora import Adapter
from ..metrics import mean
from ..model import Model, Tokenizer
from ..panel import BARE
from .warm_start import Chosen

ENOUGH = 0.3
"""The share of its gain that an adapter must keep when carried, to be worth starting from."""


def retrain(
    model: Model,
    tokenizer: Tokenizer,
    recipe: FineTune,
    rows: Sequence[Row],
    carried: Adapter,
    share: float | None,
    report: Report = silent,
    checkpoint: Path | None = None,
) -> Chosen:
    """Train the whole ``recipe`` from the better start: ``share`` recovered (None when nothing measured it) decides."""
    start = "carry" if share is not None and share > ENOUGH else "scratch"
    trained = finetune(
        model, tokenizer, recipe, rows,
        start=carried if start == "carry" else None, report=report, checkpoint_dir=checkpoint,
    )  # fmt: skip
    candidates: dict[str, dict[str, Any]] = {"carry": {"recovered": share}, "scratch": {}}
    return Chosen(trained, start, candidates, recipe.steps)


def recovered(before: float | None, after: float | None) -> float | None:
    """The share of the gain ``before`` that is left ``after`` carrying; None when there was none to keep."""
    return None if before is None or after is None or before <= 0 else after / before


def gain(model: Model, tokenizer: Tokenizer, suite: Suite, adapter: Adapter) -> float | None:
    """S(W + ΔW) − S(W) on the calibration split; None when the split is empty."""
    calibration = suite.only("calibration")
    if not calibration.rows:
        return None
    records = evaluate(model, tokenizer, calibration, {"adapter": adapter})
    metric = calibration.main_metric()
    return mean(records["adapter"], metric) - mean(records[BARE], metric)
