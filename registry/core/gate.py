"""The gate: may a candidate take the place of what serves? Paired, on the same items, in three zones.

For a difference d = S(candidate) − S(reference), measured item by item, and one-sided bounds L ≤ d ≤ U,
each wrong with probability α, a criterion "at least b" is

    PASS        L > b        the candidate is good enough, whatever the luck of the draw
    FAIL        U < b        it is not
    UNRESOLVED  otherwise    this suite cannot tell; nothing moves

A verdict passes when every criterion does (an intersection-union test: each at α, all together at α), and
fails when one of them fails. Two criteria are limits on what was seen, not tests: negative flips and the parse rate
(docs/adr/0030); what they count is in the first difference. The tiers that an upgrade may try share the policy's
α (`shares`).

Right-or-wrong metrics: the score interval for paired proportions (Tango 1998, Stat. Med. 17:891), kept from
excluding zero where the exact sign test does not. It never collapses: without a single discordant pair
of n its bounds are ±z²/(n + z²). Continuous metrics: the wider of Student's t and the bootstrap-t, over
clusters where there are some (Efron and Tibshirani 1993, ch. 12; Hall 1988, Ann. Stat. 16:927): the percentile
bootstrap and t alone open too often on skewed differences. On large suites the bootstrap-t's place is taken by
the expansion that it estimates. Measured in tests/core/test_gate.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from statistics import NormalDist
from typing import Literal, TypeVar

from .errors import GateImpossible, GateIncomplete, ItemsDiffer
from .manifest import Frozen
from .metrics import Metric, is_binary, is_share
from .policy import Gate, Policy
from .records import Record, Split

PARSE_MARGIN = 0.005
"""How much the share of parsed outputs may fall."""
MIN_CONTINUOUS = 100
"""Items (or clusters) below which no continuous criterion passes: too few to have seen the tail of the losses.

At 2 % nominal and n = 150 it opens falsely 1.7 % of the time on normal differences, 3.0 % on log-normal ones.
"""
RESAMPLES = 4999
MOST_RESAMPLED = 500
"""Items (or clusters) up to which a mean's error is resampled; beyond, its skewness is corrected for by a formula.

The work would grow with the suite (seconds at 30 000 items), and what it tells falls as 1/√n.
"""
_LARGEST_SUITE = 100_000_000
_FAR = 1e9
"""The bound of what nothing is known about: JSON has no infinity."""


class Zone(StrEnum):
    """Where an interval lies to its bound."""

    PASS = "pass"  # noqa: S105  # a verdict, not a password
    FAIL = "fail"
    UNRESOLVED = "unresolved"


Look = TypeVar("Look", bound=str)
"""What may open the gate once: a tier, or a pool."""
Name = Literal["not-worse", "adds-value", "negative-flips", "guard", "parse-rate"]


class Criterion(Frozen):
    """One thing that must hold, what was measured, and where that leaves it."""

    name: Name
    suite: str
    metric: Metric
    estimate: float
    lower: float
    upper: float
    bound: float
    at_most: bool = False
    """The estimate must stay at or under the bound (flips); otherwise above it."""
    zone: Zone
    n: int

    def __str__(self) -> str:
        what = {
            "not-worse": "against what serves",
            "adds-value": "over the bare base",
            "negative-flips": "right before and wrong now",
            "guard": "on the guard suite",
            "parse-rate": "of outputs that parse",
        }[self.name]
        share = is_share(self.metric) or self.name == "parse-rate"
        sign = "" if self.at_most else "+"
        estimate, lower, upper, bound = (
            f"{100 * x:{sign}.2f}" if share else f"{x:{sign}.4g}"
            for x in (self.estimate, self.lower, self.upper, self.bound)
        )
        unit = " points" if share else " nat/byte" if self.metric == "likelihood" else ""
        return (
            f"{self.name} {self.zone}: {self.metric} on {self.suite} {estimate}{unit} {what} "
            f"(between {lower} and {upper}, n = {self.n}); {'at most' if self.at_most else 'above'} {bound} is needed"
        )


class Verdict(Frozen):
    """What the gate says about one candidate, with every number it rests on."""

    zone: Zone
    criteria: tuple[Criterion, ...]
    reason: str
    """The deciding criterion, in words."""
    alpha: float
    bare: tuple[Criterion, ...] = ()
    """Per suite: how the bare new base stands to what serves; decides nothing here, but whether to retire."""

    @property
    def adds_value(self) -> bool:
        """Whether the candidate is shown to be better than the bare base, on every suite."""
        return all(criterion.zone is Zone.PASS for criterion in self.criteria if criterion.name == "adds-value")

    @property
    def bare_suffices(self) -> bool:
        """Whether the bare base is shown to be no worse than what serves, on every suite."""
        return bool(self.bare) and all(criterion.zone is Zone.PASS for criterion in self.bare)


class Quoted(Frozen):
    """Scores before and after on the report split, which nothing was chosen or judged by, and their difference."""

    suite: str
    metric: Metric
    n: int
    before: float
    after: float
    bare: float
    """The new base alone."""
    lower: float
    upper: float
    """Of after − before, each side wrong with the policy's α."""


# ── intervals ────────────────────────────────────────────────────────────────


def score_statistic(gains: float, losses: float, n: float, difference: float) -> float:
    """Tango's z for H₀: p₁₂ − p₂₁ = Δ, with x₁₂ = ``gains``, x₂₁ = ``losses`` of ``n`` pairs, Δ = ``difference``.

    z = (x₁₂ − x₂₁ − nΔ) / √(n(2q̃ + Δ(1 − Δ))), where q̃, the likelihood's maximum for p₂₁ under H₀, is the
    larger root of 2n·q² + (−x₁₂ − x₂₁ + (2n − x₁₂ + x₂₁)Δ)·q − x₂₁Δ(1 − Δ) = 0.
    """
    a = 2 * n
    b = -gains - losses + (2 * n - gains + losses) * difference
    c = -losses * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    top = gains - losses - n * difference
    variance = n * (2 * q + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, top) if top else 0.0
    return top / math.sqrt(variance)


def score_interval(gains: int, losses: int, n: int, alpha: float) -> tuple[float, float]:
    """Tango's limits, each at ``alpha``: the differences that the score test does not reject."""
    z = NormalDist().inv_cdf(1 - alpha)
    estimate = (gains - losses) / n
    lower = _root(lambda d: score_statistic(gains, losses, n, d) - z, -1.0, estimate)
    return lower, _root(lambda d: score_statistic(gains, losses, n, d) + z, estimate, 1.0)


def paired_interval(gains: int, losses: int, n: int, alpha: float) -> tuple[float, float]:
    """One-sided bounds at ``alpha`` for the difference of two paired proportions.

    ``gains`` of ``n`` items went from wrong to right, ``losses`` from right to wrong. The score limits,
    pulled back to zero where the exact sign test (McNemar) cannot tell the direction: with few discordant
    pairs the score test is too sure of it.
    """
    lower, upper = score_interval(gains, losses, n, alpha)
    if lower > 0 and binomial_tail(gains, gains + losses, 0.5) > alpha:
        lower = 0.0
    if upper < 0 and binomial_tail(losses, gains + losses, 0.5) > alpha:
        upper = 0.0
    return lower, upper


def proportion_interval(count: int, n: int, alpha: float) -> tuple[float, float]:
    """Exact one-sided bounds for a proportion (Clopper and Pearson 1934)."""
    lower = 0.0 if count == 0 else _root(lambda p: alpha - binomial_tail(count, n, p), 0.0, count / n)
    upper = 1.0 if count == n else _root(lambda p: 1 - alpha - binomial_tail(count + 1, n, p), count / n, 1.0)
    return lower, upper


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X ≥ k) for X ~ Binomial(n, p), summed away from the mean so that few terms count."""
    if k <= 0:
        return 1.0
    if k > n or p <= 0:
        return 0.0
    if p >= 1:
        return 1.0
    if k <= n * p:
        return 1.0 - binomial_tail(n - k + 1, n, 1 - p)
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    term = total = math.exp(log)
    for i in range(k, n):
        term *= (n - i) / (i + 1) * p / (1 - p)
        total += term
        if term < total * 1e-17:
            break
    return min(total, 1.0)


def mean_interval(
    values: Sequence[float], alpha: float, *, clusters: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """One-sided bounds at ``alpha`` for the mean of ``values``: the wider of Student's t and the bootstrap-t.

    Beyond `MOST_RESAMPLED` the quantiles of the studentised mean come from its Edgeworth expansion (Hall 1992,
    The Bootstrap and Edgeworth Expansion, 2.4), with z the normal quantile and γ the skewness of the values,

        t± = ±t − γ(2z² + 1)/(6√G)

    With ``clusters`` (a name per value) whole clusters are drawn, and the mean Σs/Σm of cluster sums s and sizes
    m has the linearised variance G/(G−1) · Σ(s − mean·m)²/(Σm)².
    """
    import numpy as np

    names = range(len(values)) if clusters is None else clusters
    sums: dict[object, float] = defaultdict(float)
    sizes: dict[object, float] = defaultdict(float)
    for name, value in zip(names, values, strict=True):
        sums[name] += value
        sizes[name] += 1.0
    s_G, m_G = np.array(list(sums.values())), np.array(list(sizes.values()))
    G = len(s_G)
    mean = float(s_G.sum() / m_G.sum())
    if G < 2:
        return -_FAR, _FAR
    se = math.sqrt(G / (G - 1) * float(((s_G - mean * m_G) ** 2).sum())) / float(m_G.sum())
    if se <= 1e-12 * max(1.0, abs(mean)):
        return mean, mean  # every item moved by the same amount: nothing here varies
    t = student_quantile(1 - alpha, G - 1)
    e_G = s_G - mean * m_G
    if G > MOST_RESAMPLED:
        skewness = float((e_G**3).mean()) / float((e_G**2).mean()) ** 1.5
        shift = skewness * (2 * NormalDist().inv_cdf(1 - alpha) ** 2 + 1) / (6 * math.sqrt(G))
        return mean - max(t, t - shift) * se, mean + max(t, t + shift) * se
    rng = np.random.default_rng(seed)
    t_R = np.empty(RESAMPLES)
    rows = max(1, 2_000_000 // G)
    sums_G5 = np.stack([e_G, m_G, e_G * e_G, e_G * m_G, m_G * m_G], axis=1)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, G, (min(rows, RESAMPLES - start), G))
        R = len(drawn)
        times_RG = np.bincount((drawn + G * np.arange(R)[:, None]).ravel(), minlength=R * G).reshape(R, G)
        e_R, m_R, ee_R, em_R, mm_R = (times_RG.astype(float) @ sums_G5).T
        d_R = e_R / m_R  # the draw's mean less ours
        squares_R = np.maximum(ee_R - 2 * d_R * em_R + d_R**2 * mm_R, 0.0)
        se_R = np.sqrt(G / (G - 1) * squares_R) / m_R
        # A draw without spread says nothing of its error: it counts as far out, on its side.
        t_R[start : start + R] = d_R / np.maximum(se_R, 1e-3 * se)
    t_R.sort()
    tail = max(int(alpha * (RESAMPLES + 1)), 1)
    return mean - max(t, float(t_R[-tail])) * se, mean + max(t, -float(t_R[tail - 1])) * se


def student_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t, by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between ``low`` and ``high``, to the last bit that matters."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# ── the verdict ──────────────────────────────────────────────────────────────


def shares(alpha: float, tiers: Sequence[Look]) -> dict[Look, float]:
    """What each of ``tiers`` may spend of ``alpha``: the first one half, the others equal parts of the other half.

    A pool (`registry.core.pool`) is one look more, behind all tiers. The first that passes is promoted, so whatever the
    candidates have in common, P(a worse one is) ≤ Σ αᵢ = α (Bonferroni). The first has most because it is the cheapest:
    what it cannot show costs a training.
    """
    first, *others = tiers
    if not others:
        return {first: alpha}
    return {first: alpha / 2} | {tier: alpha / 2 / len(others) for tier in others}


def judge_pool(
    candidate: Sequence[Record],
    serving: Sequence[Record],
    bare: Sequence[Record],
    *,
    suite: Verdict,
    gate: Gate,
    pool: str,
    policy: Policy,
    alpha: float,
) -> Verdict:
    """The verdict on a candidate that ``suite``, the verdict of its suites, could not tell apart from what serves.

    Records are of the inputs of ``pool``, where equal answers stand as equally right. Not being worse and negative
    flips are decided there, at ``alpha``; the parse rate and the value over the bare base likewise where the suite did
    not pass them (``bare``: on a part of the inputs, chosen by their hash). What else the suite passed stands: a
    verdict is an intersection of criteria, and each is tested on items that were not chosen by its outcome.
    """
    named = gate.model_copy(update={"suite": pool})
    pairs = _pairs(candidate, serving, named, ("the candidate", "the serving version"))
    criteria = []
    for told in suite.criteria:
        if told.suite != gate.suite or told.metric != gate.metric or told.name == "guard":
            criteria.append(told)
        elif told.name == "not-worse":
            criteria.append(_difference("not-worse", pairs, named, told.bound, alpha, None))
        elif told.name == "negative-flips":
            criteria.append(_flips(pairs, named, policy.max_negative_flips, alpha))
        elif told.zone is Zone.PASS:
            criteria.append(told)
        elif told.name == "parse-rate":
            criteria.append(_parse_rate(pairs, named, alpha) or told)
        else:
            asked = {record.item for record in bare}
            some = [record for record in candidate if record.item in asked]
            over_bare = _pairs(some, bare, named, ("the candidate", "the bare base"))
            criteria.append(_difference("adds-value", over_bare, named, 0.0, alpha, None))
    return _verdict(criteria, suite.bare, alpha)


def mean_gain(adapted: Sequence[Record], bare: Sequence[Record], gate: Gate) -> float:
    """S(W1 + ΔW) − S(W1) on the gate split: what a margin "of gain" is a share of."""
    pairs = _pairs(adapted, bare, gate, ("the serving version", "the bare old base"))
    return sum(a.metrics[gate.metric] - b.metrics[gate.metric] for a, b in pairs) / len(pairs)


def judge(
    candidate: Sequence[Record],
    serving: Sequence[Record] | None,
    bare: Sequence[Record],
    *,
    gate: Gate,
    policy: Policy,
    alpha: float,
    gain: float | None = None,
    guard: tuple[Sequence[Record], Sequence[Record]] | None = None,
    clusters: Mapping[str, str] | None = None,
) -> Verdict:
    """The verdict on ``candidate``, from records per item of which only the gate split is looked at.

    ``serving`` is what serves now (None at a first promotion: there is nothing to be worse than), ``bare`` the
    candidate's base alone, ``gain`` what `mean_gain` says (for margins of gain; at or below zero nothing may be lost),
    ``guard`` the records of candidate and reference on the policy's guard suite, ``clusters`` item -> group of
    items that were drawn together. Records that do not pair are refused (`ItemsDiffer`), and so is a
    gate that lacks a part (`GateIncomplete`).

    Criteria: not worse than serving by the margin; better than bare; for right-or-wrong metrics at most the
    policy's share of all items right before and wrong now (on a continuous scale a flip has no natural
    threshold, and the mean is bounded already); the guard suite; the parse rate. Flips and the parse rate pass
    on what was seen: a flip, or an output that does not parse, is also wrong, so the first criterion already
    bounds the error.
    """
    over_bare = _pairs(candidate, bare, gate, ("the candidate", "the bare base"))
    criteria, alone = [], []
    if serving is not None:
        pairs = _pairs(candidate, serving, gate, ("the candidate", "the serving version"))
        bound = -_margin(gate, gain)
        criteria.append(_difference("not-worse", pairs, gate, bound, alpha, clusters))
        bare_pairs = _pairs(bare, serving, gate, ("the bare base", "the serving version"))
        alone.append(_difference("not-worse", bare_pairs, gate, bound, alpha, clusters))
    criteria.append(_difference("adds-value", over_bare, gate, 0.0, alpha, clusters))
    if serving is not None and is_binary(gate.metric):
        criteria.append(_flips(pairs, gate, policy.max_negative_flips, alpha))
    if policy.guard is not None:
        if guard is None:
            raise GateIncomplete(suite=policy.guard.suite, missing="the guard suite's records are not given")
        if policy.guard.margin.of_gain:
            raise GateIncomplete(suite=policy.guard.suite, missing="a guard has no gain; its margin must be absolute")
        guarded = _pairs(*guard, policy.guard, ("the candidate", "its reference"))
        criteria.append(_difference("guard", guarded, policy.guard, -policy.guard.margin.value, alpha, clusters))
    if serving is not None and (parsed := _parse_rate(pairs, gate, alpha)):
        criteria.append(parsed)
    return _verdict(criteria, alone, alpha)


def quote(
    candidate: Sequence[Record], serving: Sequence[Record], bare: Sequence[Record], *, gate: Gate, alpha: float
) -> Quoted | None:
    """What the report split says of a candidate that was promoted; None where the suite has no item there."""
    if not any(record.split == "report" for record in candidate):
        return None
    pairs = _pairs(candidate, serving, gate, ("the candidate", "the serving version"), "report")
    over_bare = _pairs(candidate, bare, gate, ("the candidate", "the bare base"), "report")
    found = _difference("not-worse", pairs, gate, 0.0, alpha, None)
    before, after, alone = (
        math.fsum(record.metrics[gate.metric] for record in side) / len(pairs)
        for side in ([b for _, b in pairs], [a for a, _ in pairs], [b for _, b in over_bare])
    )
    return Quoted(
        suite=gate.suite, metric=gate.metric, n=len(pairs), before=before, after=after, bare=alone,
        lower=found.lower, upper=found.upper,
    )  # fmt: skip


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict from those of several suites: all must pass, one failure fails."""
    criteria = [criterion for verdict in verdicts for criterion in verdict.criteria]
    alone = [criterion for verdict in verdicts for criterion in verdict.bare]
    return _verdict(criteria, alone, max(verdict.alpha for verdict in verdicts))


def _verdict(criteria: Sequence[Criterion], alone: Sequence[Criterion], alpha: float) -> Verdict:
    zones = {criterion.zone for criterion in criteria}
    zone = next((zone for zone in (Zone.FAIL, Zone.UNRESOLVED) if zone in zones), Zone.PASS)
    deciding = next(criterion for criterion in criteria if criterion.zone is zone)
    return Verdict(zone=zone, criteria=tuple(criteria), reason=str(deciding), alpha=alpha, bare=tuple(alone))


def _margin(gate: Gate, gain: float | None) -> float:
    if not gate.margin.of_gain:
        return gate.margin.value
    if gain is None:
        raise GateIncomplete(
            suite=gate.suite, missing=f"the margin {gate.margin} needs the gain of what serves over its bare base"
        )
    return gate.margin.value * max(gain, 0.0)


Pair = tuple[Record, Record]


def _pairs(
    left: Sequence[Record], right: Sequence[Record], gate: Gate, names: tuple[str, str], split: Split = "gate"
) -> list[Pair]:
    """Records of a split that stand for the same item, in order of item."""
    sides = []
    for records, name in zip((left, right), names, strict=True):
        side = {record.item: record for record in records if record.split == split}
        if not side:
            raise GateIncomplete(suite=gate.suite, missing=f"{name} has no record in the {split} split")
        without = sum(gate.metric not in record.metrics for record in side.values())
        if without:
            raise GateIncomplete(suite=gate.suite, missing=f"{without} records of {name} lack '{gate.metric}'")
        sides.append(side)
    if odd := sides[0].keys() ^ sides[1].keys():
        reason = f"{len(odd)} items of {gate.suite} are in only one of them, such as {min(odd)}"
        raise ItemsDiffer(left=names[0], right=names[1], reason=reason)
    return [(sides[0][item], sides[1][item]) for item in sorted(sides[0])]


def _difference(
    name: Name, pairs: Sequence[Pair], gate: Gate, bound: float, alpha: float, clusters: Mapping[str, str] | None
) -> Criterion:
    metric, n = gate.metric, len(pairs)
    values = [a.metrics[metric] - b.metrics[metric] for a, b in pairs]
    enough = n
    if is_binary(metric):
        lower, upper = paired_interval(values.count(1), values.count(-1), n, alpha)
    else:
        groups = None if clusters is None else [clusters.get(a.item, a.item) for a, _ in pairs]
        enough = n if groups is None else len(set(groups))
        lower, upper = mean_interval(values, alpha, clusters=groups)
    zone = _zone(lower, upper, bound)
    if zone is Zone.PASS and not is_binary(metric) and enough < MIN_CONTINUOUS:
        zone = Zone.UNRESOLVED
    return Criterion(
        name=name, suite=gate.suite, metric=metric, estimate=math.fsum(values) / n, lower=lower, upper=upper,
        bound=bound, zone=zone, n=n,
    )


def _zone(lower: float, upper: float, bound: float) -> Zone:
    if lower > bound:
        return Zone.PASS
    return Zone.FAIL if upper < bound else Zone.UNRESOLVED


def _flips(pairs: Sequence[Pair], gate: Gate, limit: float, alpha: float) -> Criterion:
    n = len(pairs)
    flipped = sum(now.metrics[gate.metric] < before.metrics[gate.metric] for now, before in pairs)
    lower, upper = proportion_interval(flipped, n, alpha)
    zone = Zone.PASS if flipped / n <= limit else Zone.FAIL if lower > limit else Zone.UNRESOLVED
    return Criterion(
        name="negative-flips", suite=gate.suite, metric=gate.metric, estimate=flipped / n, lower=lower, upper=upper,
        bound=limit, at_most=True, zone=zone, n=n,
    )


def _parse_rate(pairs: Sequence[Pair], gate: Gate, alpha: float) -> Criterion | None:
    moves = [a.parsed - b.parsed for a, b in pairs if a.parsed is not None and b.parsed is not None]
    if not moves:
        return None
    n = len(moves)
    lower, upper = paired_interval(moves.count(1), moves.count(-1), n, alpha)
    seen = sum(moves) / n
    zone = Zone.PASS if seen >= -PARSE_MARGIN else _zone(lower, upper, -PARSE_MARGIN)
    return Criterion(
        name="parse-rate", suite=gate.suite, metric=gate.metric, estimate=seen, lower=lower, upper=upper,
        bound=-PARSE_MARGIN, zone=zone, n=n,
    )


# ── what a suite can decide ──────────────────────────────────────────────────


def smallest_n(gate: Gate, policy: Policy, *, alpha: float | None = None, discordance: float = 0.0) -> int | None:
    """Items in the gate split from which a candidate as good as what serves passes; None where no number is enough.

    ``discordance`` is the share of items on which the two differ, half for the better and half for the worse;
    at 0 nothing flips at all. ``alpha`` is what the first of the policy's tiers has, unless given. A margin of
    gain is taken at the largest that a gain can be, 1. For continuous metrics the spread is not known beforehand:
    the floor is all that can be said.
    """
    looks = (*policy.tiers, *(["pool"] if policy.pool else []))
    alpha = shares(policy.alpha, looks)[looks[0]] if alpha is None else alpha
    if not is_binary(gate.metric):
        return MIN_CONTINUOUS
    z = NormalDist().inv_cdf(1 - alpha)
    margin, limit = gate.margin.value, policy.max_negative_flips

    def passes(n: int) -> bool:
        half = n * discordance / 2
        if score_statistic(half, half, n, -margin) <= z:
            return False
        return half <= n * limit

    high = 1
    while not passes(high):
        high *= 2
        if high > _LARGEST_SUITE:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def require_possible(gate: Gate, policy: Policy, *, n: int, name: str) -> int:
    """The smallest n of ``gate``; `GateImpossible` when a suite of ``n`` gate items can never pass."""
    needed = smallest_n(gate, policy)
    if needed is None or n < needed:
        raise GateImpossible(
            suite=gate.suite, n=n, margin=str(gate.margin), needed=needed or "any number of items", name=name
        )
    return needed
