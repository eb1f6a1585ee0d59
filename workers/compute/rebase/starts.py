"""What tiers 0 to 2 make of an adapter, as places for tiers 3 to 5 to start from, and which of them stands best.

Without steps, each is scored beside the bare base on some of the calibration split of the suite; without a suite, or
where that split is empty, by the likelihood of some of the rows that are going to be trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from registry.core.errors import NotRunnable
from registry.core.recipes import FineTune
from registry.core.records import Record

from ..bank import parts_of
from ..data import Row
from ..evaluate import Suite, evaluate
from ..lora import Adapter, fitted, fresh, restarted
from ..metrics import mean
from ..model import Model, Tokenizer
from ..panel import BARE
from .align import align
from .carry import carry
from .transport import transport

SCRATCH = "scratch"
BY_ITEMS = 128
"""Items of the calibration split by which starts are compared, at most: they lie far apart, and all of a large suite
would cost more than the training that begins there."""
_LOOKED_AT = 64
"""Rows of the training by which starts are compared where there is no suite."""


@dataclass(frozen=True)
class Starts:
    """The adapter as tiers without training bring it to the new base, and what kept the others from it."""

    adapters: Mapping[str, Adapter]
    refused: Mapping[str, str]


def starts_of(
    adapter: Adapter, old: Path, base: Path, unlabelled: Sequence[Row] = (), given: Mapping[str, Adapter] | None = None
) -> Starts:
    """``adapter``, made on the base in folder ``old``, as a start on the base in folder ``base``.

    What aligning leaves as it was is carrying, and comes once. Where it cannot be aligned it is transported, with what
    both bases make of the prompts of ``unlabelled`` rows. Tiers that made theirs already are ``given``.
    """
    given = given or {}
    made: dict[str, Adapter] = {}
    refused: dict[str, str] = {}
    for tier, make in {
        "carry": lambda: carry(adapter, old, base),
        "align": lambda: align(adapter, old, base).adapter,
        "transport": lambda: transport(adapter, old, base, unlabelled or None).adapter,
    }.items():
        if tier == "transport" and tier not in given and "align" not in refused:
            continue
        try:
            found = given[tier] if tier in given else make()
        except NotRunnable as error:
            refused[tier] = error.message
            continue
        if not any(equal(found, other) for other in made.values()):
            made[tier] = found
    return Starts(made, refused)


def equal(one: Adapter, other: Adapter) -> bool:
    """Whether both have the same parts, to the bit."""
    mine, theirs = parts_of(one), parts_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def fitting(model: Model, starts: Starts) -> Starts:
    """The starts whose shapes are those of the model; the others are refused with the reason."""
    kept, refused = {}, dict(starts.refused)
    for name, adapter in starts.adapters.items():
        try:
            fitted(model, adapter)
        except NotRunnable as error:
            refused[name] = error.message
        else:
            kept[name] = adapter
    return Starts(kept, refused)


def scratch(model: Model, recipe: FineTune, starts: Starts) -> Adapter:
    """A fresh adapter with the modules, ranks and scales of those that it competes with; else as the recipe says."""
    first = next(iter(starts.adapters.values()), None)
    return fresh(model, recipe) if first is None else restarted(first, recipe.seed)


def calibration_of(suite: Suite | None, most: int = BY_ITEMS) -> Suite | None:
    """Of the split that chooses among candidates at ``most`` so many items; None when there is none."""
    calibration = None if suite is None else suite.only("calibration", most)
    return calibration if calibration is not None and calibration.rows else None


def standing(
    model: Model, tokenizer: Tokenizer, suite: Suite | None, rows: Sequence[Row], starts: Starts
) -> dict[str, dict[str, Any]]:
    """What is known of every start before a step: its score, the bare base's beside it, or why it is none."""
    told: dict[str, dict[str, Any]] = {name: {"refused": why} for name, why in starts.refused.items()}
    if not starts.adapters:
        return told
    asked = calibration_of(suite) or Suite(rows[:: -(-len(rows) // _LOOKED_AT)], ("likelihood",))
    records = evaluate(model, tokenizer, asked, starts.adapters)
    return told | {name: {"score": score_of(asked, found)} for name, found in records.items()}


def score_of(suite: Suite, records: Sequence[Record]) -> float:
    """The mean of the suite's main metric over the items that it applies to."""
    metric = suite.main_metric()
    return mean([record for record in records if metric in record.metrics], metric)


def best_of(told: Mapping[str, Mapping[str, Any]]) -> str:
    """The start with the best score; `SCRATCH` where the base alone is better than all, or there is none."""
    scores = {name: found["score"] for name, found in told.items() if "score" in found}
    best = max(scores, key=lambda name: (scores[name], name != BARE), default=BARE)
    return SCRATCH if best == BARE else best


def without_basis(adapter: Adapter) -> Adapter:
    """The adapter as plain factors: what was held fixed while it was trained is forgotten."""
    return replace(adapter, patches={name: replace(patch, basis_OR=None) for name, patch in adapter.patches.items()})
