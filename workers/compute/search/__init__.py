"""Searches: an adapter whose rank, scale or placement is found by measuring, on the calibration split of a suite."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from registry.core.recipes import Search

from ..data import Row
from ..evaluate import Suite
from ..finetune import Report, silent
from ..model import Model, Tokenizer
from .by_rank import by_rank
from .by_scale import by_scale
from .by_targets import by_targets
from .study import Found, Study

_BY = {"rank": by_rank, "scale": by_scale, "targets": by_targets}


def search(
    model: Model,
    tokenizer: Tokenizer,
    recipe: Search,
    rows: Sequence[Row],
    suite: Suite,
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
) -> tuple[Study, Found]:
    """Search as ``recipe`` says; the study tells what it was measured by.

    What is finished lies in ``checkpoint_dir``, from which the same call goes on when it was interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="loractl-") as scratch:
        study = Study(model, tokenizer, recipe, rows, suite, report, checkpoint_dir or Path(scratch))
        return study, _BY[recipe.over](study)
