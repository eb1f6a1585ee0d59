"""Routing: with which tier the upgrade of one adapter begins, from what was measured of the two bases.

A route never accepts anything, the gate does; it leaves out tiers that would be made and evaluated for nothing. On a
ladder of drifting bases (docs: rebase) ΔW as it is kept, by the median ρ = ‖W₂ − W₁‖ ⁄ ‖W₁‖ of the patched modules,

    ρ    0.02   0.10   0.31   1.41
    R    0.98   0.88   0.55  −0.52         R: the share of the adapter's gain that is left

and ρ ≈ √2 is what weights have that know nothing of each other. Such bases may still be the same in other coordinates,
which `align` finds out. `refitted` takes the thresholds from what became of upgrades.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from .manifest import Frozen
from .recipes import Tier

Lineage = Literal["same", "cast", "quantised", "merged", "continued", "unknown"]
"""How the new base came from the old one; ``continued`` is also said where nothing but the measurement is known."""
AS_THEY_WERE: frozenset[Lineage] = frozenset({"same", "cast", "quantised"})
"""Lineages of bases that are the old one, rounding aside: ΔW as it is is all that there is to try."""
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Signals(Frozen):
    """What was measured for one adapter between its base and the new one; None: it was not."""

    lineage: Lineage = "unknown"
    drift: Share | None = None
    """The median ρ of the modules that the adapter patches."""
    most: Share | None = None
    """The largest ρ of them."""
    inside: Share | None = None
    """The median ρ of them within what the adapter reads and writes, in place of all of W."""
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    """cos(ΔW·x₁, ΔW·x₂): whether the adapter would say the same on the new base's activations."""
    excess: float | None = None
    """KL of the adapted models less that of the bare ones, in nats a token."""
    alpha: float | None = None
    """The multiple of ΔW that comes nearest to the old base with the adapter."""


class Thresholds(Frozen):
    """Where a route turns; the defaults are read off the ladder above."""

    carry: Share = 0.10
    """Up to this drift ΔW is tried as it is."""
    unrelated: Share = 1.2
    """From this drift of a module on the bases may lie in different coordinates."""
    alike: Annotated[float, Field(ge=-1, le=1)] = 0.95
    """From this cosine on ΔW is tried as it is, whatever the drift; with less than half of it it is not."""
    multiple: Share = 0.5
    """From this best multiple of ΔW on it is tried, whatever the drift: below, the new base wants little of it."""


@dataclass(frozen=True, slots=True)
class Route:
    """The tiers to try, in this order, why, and what is left out with the reason."""

    tiers: tuple[Tier, ...]
    reasons: tuple[str, ...]
    skipped: tuple[tuple[Tier, str], ...] = ()

    @property
    def start(self) -> Tier | None:
        """The tier to begin with; None: there is none."""
        return self.tiers[0] if self.tiers else None


def route(signals: Signals, tiers: Sequence[Tier], thresholds: Thresholds | None = None) -> Route:
    """Which of ``tiers`` to try, in their order; where all look hopeless, the last one is left all the same."""
    limits = thresholds or Thresholds()
    carries, why = _carries(signals, limits)
    reasons = [why]
    skipped: list[tuple[Tier, str]] = []
    for tier in tiers:
        if tier == "carry" and not carries:
            skipped.append((tier, why))
        elif tier == "align" and (told := _stays(signals, limits)):
            skipped.append((tier, told))
    if len(skipped) == len(tiers) > 0:
        last, told = skipped.pop()
        reasons.append(f"{last} is the last tier that the policy names, though {told}")
    left = {tier for tier, _ in skipped}
    return Route(tuple(tier for tier in tiers if tier not in left), tuple(reasons), tuple(skipped))


def _carries(signals: Signals, limits: Thresholds) -> tuple[bool, str]:
    """Whether ΔW as it is deserves a try, and why."""
    if signals.lineage in AS_THEY_WERE:
        return True, f"the new base is the old one ({signals.lineage})"
    if signals.cosine is not None and signals.cosine >= limits.alike:
        return True, f"the adapter says the same on the new base: cosine {signals.cosine:.3f} ≥ {limits.alike:g}"
    if signals.cosine is not None and signals.cosine < limits.alike / 2:
        return False, f"the adapter says another thing on the new base: cosine {signals.cosine:.3f}"
    if signals.alpha is not None:
        told = f"{signals.alpha:g} times the update comes nearest to the old base's answers"
        tried = signals.alpha >= limits.multiple
        return tried, f"{told}, {'≥' if tried else '<'} {limits.multiple:g}"
    if signals.drift is None:
        return True, "the drift is not measured"
    if signals.drift <= limits.carry:
        return True, f"drift {signals.drift:.3g} of the patched modules ≤ {limits.carry:g}"
    return False, f"drift {signals.drift:.3g} of the patched modules > {limits.carry:g}"


def _stays(signals: Signals, limits: Thresholds) -> str | None:
    """Why aligning would leave everything where it is; None where it may not."""
    if signals.lineage in AS_THEY_WERE:
        return f"the new base lies where the old one does ({signals.lineage})"
    if signals.most is None or signals.most >= limits.unrelated:
        return None
    return f"no patched module drifted by {limits.unrelated:g} or more ({signals.most:.3g}): it would be carry again"


# ── thresholds from what became of upgrades ──────────────────────────────────


class Outcome(Frozen):
    """One upgrade in a ledger: its signals, and what the tiers that were tried cost and came to."""

    signals: Signals
    seconds: dict[Tier, Share]
    """Device seconds by tier that was tried, its evaluation included."""
    passed: frozenset[Tier]
    """Those that the gate let pass; none: it stayed frozen."""
    retrain_seconds: Annotated[float, Field(gt=0)]
    """What the unit of regret is: training anew."""


@dataclass(frozen=True, slots=True)
class Refit:
    """Thresholds, and the mean regret of a decision by those before and by these, in retrainings."""

    thresholds: Thresholds
    before: float
    after: float
    outcomes: int


def regret(outcome: Outcome, tiers: Sequence[Tier], thresholds: Thresholds) -> float:
    """What the route spends beyond the cheapest tier that passes, in retrainings; 1 where it misses all that do.

    Tiers that nobody tried have no say: nothing is known of them.
    """
    known = [tier for tier in tiers if tier in outcome.seconds]
    good = [tier for tier in known if tier in outcome.passed]
    spent = 0.0
    for tier in route(outcome.signals, known, thresholds).tiers:
        spent += outcome.seconds[tier]
        if tier in outcome.passed:
            return (spent - min(outcome.seconds[other] for other in good)) / outcome.retrain_seconds
    return spent / outcome.retrain_seconds + (1.0 if good else 0.0)


def refitted(outcomes: Sequence[Outcome], tiers: Sequence[Tier], start: Thresholds | None = None) -> Refit:
    """The thresholds of least mean regret over ``outcomes``, one after the other until none moves.

    Candidates lie half way between neighbouring values that were observed; of equals the one nearest to ``start``.
    """
    before = best = start or Thresholds()
    if not outcomes:
        return Refit(before, 0.0, 0.0, 0)

    def mean(limits: Thresholds) -> float:
        return fmean(regret(outcome, tiers, limits) for outcome in outcomes)

    seen: dict[str, Callable[[Signals], float | None]] = {
        "carry": lambda signals: signals.drift, "unrelated": lambda signals: signals.most,
        "alike": lambda signals: signals.cosine, "multiple": lambda signals: signals.alpha,
    }  # fmt: skip
    while True:
        found = best
        for name, observed in seen.items():
            own = getattr(before, name)
            values = {value for outcome in outcomes if (value := observed(outcome.signals)) is not None}
            tried = [best.model_copy(update={name: value}) for value in (own, *_between(values))]
            best = min([best, *tried], key=lambda limits: (mean(limits), abs(getattr(limits, name) - own)))
        if best == found:
            return Refit(best, mean(before), mean(best), len(outcomes))


def _between(values: Collection[float]) -> list[float]:
    """Half way between neighbours."""
    return [(one + other) / 2 for one, other in pairwise(sorted(values))]
