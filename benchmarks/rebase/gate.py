"""`python -m benchmarks.rebase.gate`: how often the gate opens, falsely and rightly, over simulated campaigns.

A campaign has three tiers. Each one's candidate differs from what serves on a share of the items (its discordance),
drawn afresh: independent candidates are the worst case of an error that tiers share. `registry.core.gate.judge` sees
records as a worker would write them, and the first tier that passes is promoted. Beside it, in the same run and on the
same draws, a naive gate: one candidate, the percentile bootstrap of the difference. Written between the marks in
docs/rebase.md.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from registry.core.gate import Verdict, Zone, judge, shares
from registry.core.policy import Gate, Margin, Policy
from registry.core.records import Record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
CAMPAIGNS = 10_000
SIZES, DISCORDANCES = (100, 300, 1000, 3000), (0.01, 0.02, 0.05)
POLICY = Policy()
ALPHAS = tuple(shares(POLICY.alpha, POLICY.tiers).values())
RESAMPLES = 2000
RIGHT, BARE = 0.9, 0.6
"""What serves gets right, and the bare base of it: far apart, so that rule 1 decides."""


@dataclass(frozen=True)
class Cell:
    """Campaigns of one kind: n items, of which the candidates differ on a share, at a true difference in score."""

    n: int
    discordance: float
    margin: float
    difference: float
    """S(candidate) − S(serving): minus the margin is what must not pass, 0 what should."""


@dataclass(frozen=True)
class Rate:
    """How often something opened over a cell's campaigns."""

    cell: Cell
    campaigns: int
    bootstrap: float
    """The naive gate, one candidate."""
    one: float
    """This gate, one candidate with the whole of α."""
    tiers: float
    """A campaign whose three tiers share α."""

    @property
    def met(self) -> bool:
        """At most α when worse (and three standard errors of the simulation), at least 80 % when as good."""
        if self.cell.difference < 0:
            luck = 3 * math.sqrt(POLICY.alpha * (1 - POLICY.alpha) / self.campaigns)
            return max(self.one, self.tiers) <= POLICY.alpha + luck
        return min(self.one, self.tiers) >= 0.8


WORSE = tuple(Cell(n, share, 0.01, -0.01) for n in SIZES for share in DISCORDANCES)
AS_GOOD = (Cell(2000, 0.02, 0.01, 0.0), Cell(1000, 0.02, 0.02, 0.0))


def simulate(cell: Cell, campaigns: int = CAMPAIGNS, seed: int = 0) -> Rate:
    """The rates of one cell."""
    rng = np.random.default_rng([seed, cell.n, round(1e4 * cell.discordance), round(1e4 * cell.margin)])
    gain, loss = (cell.discordance + cell.difference) / 2, (cell.discordance - cell.difference) / 2
    drawn_CT3 = rng.multinomial(cell.n, [gain, loss, 1 - gain - loss], (campaigns, len(ALPHAS)))

    def opened(tier: int, opens: Callable[[int, int], bool]) -> np.ndarray:
        pairs, which_C = np.unique(drawn_CT3[:, tier, :2], axis=0, return_inverse=True)
        found: np.ndarray = np.array([opens(int(gains), int(losses)) for gains, losses in pairs])[which_C]
        return found

    def gate(alpha: float) -> Callable[[int, int], bool]:
        return lambda gains, losses: passes(gains, losses, cell.n, cell.margin, alpha)

    def naive(gains: int, losses: int) -> bool:
        rest = cell.n - gains - losses
        again_R3 = rng.multinomial(cell.n, np.array([gains, losses, rest]) / cell.n, RESAMPLES)
        lower = np.quantile((again_R3[:, 0] - again_R3[:, 1]) / cell.n, POLICY.alpha)
        return bool(lower > -cell.margin)

    tiers_TC = np.array([opened(tier, gate(alpha)) for tier, alpha in enumerate(ALPHAS)])
    return Rate(
        cell=cell,
        campaigns=campaigns,
        bootstrap=float(opened(0, naive).mean()),
        one=float(opened(0, gate(POLICY.alpha)).mean()),
        tiers=float(tiers_TC.any(axis=0).mean()),
    )


def passes(gains: int, losses: int, n: int, margin: float, alpha: float) -> bool:
    """Whether the gate passes a candidate that gained and lost so many items of ``n``."""
    return verdict(gains, losses, n, margin, alpha).zone is Zone.PASS


@cache
def verdict(gains: int, losses: int, n: int, margin: float, alpha: float) -> Verdict:
    """What the gate says of it."""
    right, wrong = _records(n, 1), _records(n, 0)
    served, bare = round(RIGHT * n), round(BARE * n)
    assert losses <= served - bare and gains <= n - served
    return judge(
        [*wrong[:losses], *right[losses:served], *right[served : served + gains], *wrong[served + gains :]],
        [*right[:served], *wrong[served:]],
        [*wrong[: served - bare], *right[served - bare : served], *wrong[served:]],
        gate=Gate(suite="team/suite", metric="accuracy", margin=Margin(value=margin)),
        policy=POLICY,
        alpha=alpha,
    )


@cache
def _records(n: int, value: int) -> tuple[Record, ...]:
    return tuple(Record(item=f"{i:016x}", split="gate", metrics={"accuracy": value}) for i in range(n))


def table(rates: Sequence[Rate]) -> str:
    """The table in Markdown, in percent of the campaigns."""
    heads = ("items", "differ on", "margin, points", "in truth", "bootstrap", "gate", "three tiers", "allowed", "")
    lines = [heads, ("---",) * len(heads)]
    for rate in rates:
        cell = rate.cell
        worse = cell.difference < 0
        lines.append((
            f"{cell.n:,}", f"{cell.discordance:.0%}", f"{100 * cell.margin:g}",
            f"{-100 * cell.difference:g} point worse" if worse else "as good",
            *(f"{100 * value:.1f} %" for value in (rate.bootstrap, rate.one, rate.tiers)),
            "≤ 2 %" if worse else "≥ 80 %", "met" if rate.met else "**missed**",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: Sequence[Rate], path: Path) -> None:
    """How often a candidate that is one margin worse is let pass, by the size of the suite."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for mark, discordance in zip("osv", DISCORDANCES, strict=True):
            mine = [rate for rate in found if rate.cell.difference < 0 and rate.cell.discordance == discordance]
            sizes = [rate.cell.n for rate in mine]
            for name, color, values in (
                ("bootstrap", "tab:orange", [100 * rate.bootstrap for rate in mine]),
                ("three tiers", "tab:blue", [100 * rate.tiers for rate in mine]),
            ):
                axes.plot(sizes, values, marker=mark, color=color, label=f"{name}, differ on {discordance:.0%}")
        axes.axhline(100 * POLICY.alpha, linestyle=":", color="gray", label="allowed")
        axes.set(xscale="log", xlabel="items", ylabel="opens falsely, % of campaigns")
        axes.set_xticks(SIZES, map(str, SIZES))
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def rates(campaigns: int = CAMPAIGNS) -> Iterator[Rate]:
    """All cells, told as they come."""
    for cell in (*WORSE, *AS_GOOD):
        found = simulate(cell, campaigns)
        print(table([found]).splitlines()[-1], flush=True)
        verdict.cache_clear()
        yield found


def main() -> None:
    """Simulate, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found = list(rates())
    before, _, rest = PAGE.read_text().partition("<!-- gate -->\n")
    _, _, after = rest.partition("<!-- /gate -->")
    plot(found, PAGE.with_name("rebase-gate.svg"))
    shown = "![How often it opens falsely, by the number of items](rebase-gate.svg)"
    PAGE.write_text(f"{before}<!-- gate -->\n{table(found)}\n\n{shown}\n<!-- /gate -->{after}")


if __name__ == "__main__":
    main()
