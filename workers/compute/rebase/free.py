"""Tier 0 with its variants: what can be tried without a step of training, and which of it is clearly better.

Candidates are the adapter as it is, multiples of it, without its component along the drift, and with its inputs
expressed anew (`carry`). A suite's calibration split chooses; without a suite, how near the new base with a candidate
comes to the old one with the adapter on unlabelled text, in KL. Another than the plain carry is taken only where the
lower bound of the paired difference to it is above zero, the error shared by all candidates; the gate's items are not
looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from registry.core.gate import mean_interval
from registry.core.recipes import LEAST_ITEMS

from ..data import Row
from ..evaluate import Suite, evaluate
from ..finetune import Report, silent
from ..lora import Adapter
from ..metrics import ALPHA, Difference, difference
from ..model import Model, Tokenizer, load
from .carry import carry, expressed, shifted
from .starts import score_of
from .text import Seen, asked, divergence, likelihoods, seen_by

PLAIN = "as it is"
ALPHAS = (0.25, 0.5, 0.75, 1.25, 1.5)
"""Multiples of ΔW that are tried beside 1."""


@dataclass(frozen=True)
class Carried:
    """The adapter for the new base, which candidate it is, why, and what is known of each."""

    adapter: Adapter
    chosen: str
    reason: str
    candidates: dict[str, dict[str, Any]]


Measured = Mapping[str, tuple[float, Difference]]
"""By candidate: its score, and how much better than the plain carry it is."""


def best_carried(
    adapter: Adapter, old: Path, base: Path, suite: Suite | None, inputs: Sequence[Row] = (), report: Report = silent
) -> Carried:
    """``adapter``, made on the base in folder ``old``, as it is best carried to the one in folder ``base``.

    One model is in memory at a time. ``inputs``: rows whose prompts are the text; without them those of the
    calibration split are.
    """
    plain = {PLAIN: carry(adapter, old, base)}
    calibration = suite.only("calibration") if suite is not None else None
    rows = inputs or (calibration.rows if calibration is not None and not calibration.questions else ())
    items = len(calibration.rows) if calibration is not None else len(rows)
    if items < LEAST_ITEMS:
        return Carried(plain[PLAIN], PLAIN, f"{items} items choose nothing; {LEAST_ITEMS} may", {PLAIN: {}})
    seen = seen_by(*load(old), rows, adapter) if rows else None
    model, tokenizer = load(base)
    if seen is not None and asked(model, tokenizer, rows) != seen.prompts:
        seen = None  # the tokens of either base are others, so positions do not pair
    candidates = plain | {f"× {alpha:g}": carry(adapter, old, base, alpha) for alpha in ALPHAS}
    candidates["shifted"] = carry(shifted(adapter, old, base), old, base)
    if seen is not None:
        candidates["expressed"] = expressed(plain[PLAIN], seen.read, model, seen.texts)
    share = ALPHA / (len(candidates) - 1)
    if calibration is not None:
        measured = _by_suite(model, tokenizer, calibration, candidates, share, report)
    elif seen is not None:
        measured = _by_text(model, seen, candidates, share)
    else:
        return Carried(plain[PLAIN], PLAIN, "the bases cut text into other tokens: nothing to compare by", {PLAIN: {}})
    told = {name: {"score": score, "better": better.dump()} for name, (score, better) in measured.items()}
    clearly = [name for name, (_, better) in measured.items() if better.clearly_better]
    if not clearly:
        return Carried(plain[PLAIN], PLAIN, "nothing is clearly better", told)
    best = max(clearly, key=lambda name: measured[name][0])
    reason = f"better than the plain carry by {measured[best][1].estimate:.4g}, at least {measured[best][1].lower:.4g}"
    return Carried(candidates[best], best, reason, told)


def _by_suite(
    model: Model, tokenizer: Tokenizer, suite: Suite, candidates: Mapping[str, Adapter], alpha: float, report: Report
) -> Measured:
    records = evaluate(model, tokenizer, suite, candidates, bare=False, report=report)
    metric = suite.main_metric()
    return {
        name: (score_of(suite, own), difference(own, records[PLAIN], metric, alpha)) for name, own in records.items()
    }


def _by_text(model: Model, seen: Seen, candidates: Mapping[str, Adapter], alpha: float) -> Measured:
    """−KL by text: positions of one text are not independent of each other."""
    near: dict[str, list[float]] = {}
    for name, adapter in candidates.items():
        [found_PV] = likelihoods(model, seen.texts, [adapter])
        near[name] = [-float(some.mean()) for some in seen.by_text(divergence(seen.adapted_PV, found_PV))]
    measured = {}
    for name, own in near.items():
        values = [one - other for one, other in zip(own, near[PLAIN], strict=True)]
        measured[name] = (
            fsum(own) / len(own), Difference(fsum(values) / len(values), *mean_interval(values, alpha))
        )  # fmt: skip
    return measured
