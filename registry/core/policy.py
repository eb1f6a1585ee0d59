"""Policy: what must hold before an alias of an adapter moves, and what is done when its base changes.

Revisioned, per adapter, with a default per namespace. The verdict itself is `registry.core.gate`.
Whoever may promote sets it; asking less of a candidate than before (`loosened`) needs admin, as moving an alias by
force does: else one could be had by the other.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from .manifest import Frozen
from .metrics import Metric
from .recipes import TIERS, Tier

Action = Literal["auto", "ask", "frozen"]


class Evidence(StrEnum):
    """How we know that an adapter belongs to its base; stronger is earlier (docs/concepts.md)."""

    RECORDED = "recorded"
    RESOLVED = "resolved"
    BEHAVIOURAL = "behavioural"
    DECLARED = "declared"

    def at_least(self, other: "Evidence") -> bool:
        """Whether this is as strong as ``other`` or stronger."""
        order = list(Evidence)
        return order.index(self) <= order.index(other)


class Margin(Frozen):
    """How much worse than what serves a candidate may be: absolute, or a share of the adapter's gain.

    A share is of S(W1 + ΔW) − S(W1), the gain over the bare old base: the sensible unit for likelihood,
    whose size depends on the task. Printed and parsed as ``0.01`` and ``2%gain``.
    """

    value: Annotated[float, Field(gt=0, lt=1)]
    of_gain: bool = False

    def __str__(self) -> str:
        return f"{self.value * 100:g}%gain" if self.of_gain else f"{self.value:g}"


class Gate(Frozen):
    """A suite, the metric read from it, and the margin."""

    suite: str
    """A suite's reference, ``namespace/name`` or with ``@vN``; without a version its newest one."""
    metric: Metric
    margin: Margin


class Policy(Frozen):
    """Everything that decides how one adapter is promoted and carried over."""

    gates: tuple[Gate, ...] = ()
    guard: Gate | None = None
    """A general suite that must not get worse."""
    aliases: tuple[str, ...] = ("prod",)
    """The gated aliases."""
    max_negative_flips: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the items seen that may have been right and be wrong now."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """One-sided error of all tiers together."""
    evidence: Evidence | None = None
    """The weakest binding that a gated alias accepts; None for any."""
    action: Action = "auto"
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)] = TIERS
    """The tiers that an upgrade may try, in this order."""
    warm_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of each candidate of the warm start (tier 3); None: a twentieth of the recorded ones, from 20 to 60."""
    budget_seconds: Annotated[float, Field(gt=0)] | None = None
    """Device seconds that one upgrade may spend on one adapter."""
    recipe: str | None = None
    """JSON of the FineTune used where a version has none of its own (an adapter made outside)."""
    retained: str | None = None
    """A dataset reference with the inputs kept for label-free repair."""
    pool: str | None = None
    """A dataset reference with unlabelled inputs, on which what the suite cannot tell is decided: people label those
    on which what serves and the candidate differ (`registry.core.pool`)."""

    def warm_start(self, recorded: int) -> tuple[int, int]:
        """Steps, and how many candidates take them, of a warm start for what was trained for ``recorded`` steps.

        candidates · steps ≤ recorded ⁄ 2: the whole race must cost well under what it is to save. Where three do not
        fit, the tenth of the rate is left out; where two do not, each takes a quarter. What a policy says stays,
        up to the training's own steps.
        """
        steps = min(self.warm_steps or min(60, max(20, round(recorded / 20))), recorded)
        candidates = 3 if 3 * steps <= recorded / 2 else 2
        return (steps if self.warm_steps else min(steps, max(1, recorded // 4))), candidates

    def is_gated(self, alias: str) -> bool:
        """Whether ``alias`` moves only by a promotion: the policy names it, and demands scores or evidence."""
        return alias in self.aliases and bool(self.gates or self.evidence)


_LOOKS = 12
"""Times that a choice among variants reads the calibration split: eight candidates, and the text on both bases."""
_DEAR = 5
"""A token of these many small passes takes about as long as five of a training's (SmolLM2-135M on a processor)."""
_BYTES_A_TOKEN = 4


def variants_pay(steps: int, batch_tokens: int, suite_bytes: int) -> bool:
    """Whether a carry's choice among its variants costs at most a quarter of the training that it may save.

        _DEAR · _LOOKS · tokens(calibration) ≤ ¼ · 3 · steps · batch_tokens

    A step reads a token forward and, at twice the price, backward. The calibration split is a fifth of the suite.
    """
    return _DEAR * _LOOKS * suite_bytes / 5 / _BYTES_A_TOKEN <= 3 * steps * batch_tokens / 4


def loosened(before: Policy, after: Policy) -> list[str]:
    """What ``after`` asks less of a candidate than ``before``, in words: gates, guard, margins, alpha, flips, evidence.

    A gate is the same one when suite and metric are, whichever version of the suite it names. A margin in another
    unit cannot be compared, so it counts as wider.
    """
    found = []
    for kind, old, new in (
        ("gate", before.gates, after.gates),
        ("guard", (before.guard,) if before.gates and before.guard else (), (after.guard,) if after.guard else ()),
    ):
        for gate in old:
            called = f"the {kind} {gate.suite} ({gate.metric})"
            margins = [other.margin for other in new if _measure(other) == _measure(gate)]
            if not margins:
                found.append(f"{called} is gone")
            elif not any(m.of_gain == gate.margin.of_gain and m.value <= gate.margin.value for m in margins):
                found.append(f"{called} had the margin {gate.margin} and has {', '.join(map(str, margins))}")
    if before.gates and after.alpha > before.alpha:
        found.append(f"alpha was {before.alpha:g} and is {after.alpha:g}")
    if before.gates and after.max_negative_flips > before.max_negative_flips:
        found.append(f"negative flips were {before.max_negative_flips:g} at most and are {after.max_negative_flips:g}")
    if before.evidence is not None and not (after.evidence and after.evidence.at_least(before.evidence)):
        found.append(f"the evidence was {before.evidence} and is {after.evidence or 'any'}")
    return found


def _measure(gate: Gate) -> tuple[str, str]:
    return gate.suite.partition("@")[0], gate.metric
