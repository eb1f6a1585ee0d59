"""`python -m benchmarks.rebase.pool`: how often a campaign opens that may ask for labels, falsely and rightly.

As in `benchmarks.rebase.gate` a campaign has three tiers, whose candidates differ from what serves on a share of the
items, drawn afresh. Where none passes, and one is unresolved, the one that came nearest answers a pool of other items;
those on which it differs are labelled, and `registry.core.pool` judges. The pool is one look more: all four share α.
Beside it a campaign without a pool. Written between the marks in docs/rebase.md.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from registry.core import pool
from registry.core.gate import Verdict, Zone, shares
from registry.core.policy import Gate, Margin, Policy
from registry.core.pool import POOL, Answered

from . import gate as suites

PAGE = suites.PAGE
CAMPAIGNS = 10_000
SUITE = 500
SIZES, DISCORDANCES = (2000,), (0.01, 0.02, 0.05)
MARGIN = 0.01
POLICY = Policy(
    gates=(Gate(suite="team/suite", metric="accuracy", margin=Margin(value=MARGIN)),), pool="team/inputs"
)
ALPHAS = shares(POLICY.alpha, (*POLICY.tiers, POOL))
ALONE = shares(POLICY.alpha, POLICY.tiers)
_EQUAL, _OURS, _THEIRS = "the same", "candidate", "serving"


@dataclass(frozen=True)
class Cell:
    """Campaigns of one kind: a suite of `SUITE` items, a pool of N inputs, candidates at a true difference in score."""

    n: int
    discordance: float
    difference: float


@dataclass(frozen=True)
class Rate:
    """How often a cell's campaigns opened, with the pool and without, and what it asked of people."""

    cell: Cell
    campaigns: int
    without: float
    opened: float
    asked: float
    """The share of campaigns that asked for labels."""
    labels: float
    """Of those, how many on average."""

    @property
    def met(self) -> bool:
        """At most α when worse, and three standard errors of the simulation."""
        luck = 3 * math.sqrt(POLICY.alpha * (1 - POLICY.alpha) / self.campaigns)
        return self.cell.difference >= 0 or self.opened <= POLICY.alpha + luck


CELLS = tuple(Cell(n, share, difference) for difference in (-MARGIN, 0.0) for n in SIZES for share in DISCORDANCES)


def simulate(cell: Cell, campaigns: int = CAMPAIGNS, seed: int = 0) -> Rate:
    """The rates of one cell."""
    rng = np.random.default_rng([seed, cell.n, round(1e4 * cell.discordance), round(1e4 * (cell.difference + 1))])
    gain, loss = (cell.discordance + cell.difference) / 2, (cell.discordance - cell.difference) / 2
    chances = [gain, loss, 1 - gain - loss]
    drawn_CT3 = rng.multinomial(SUITE, chances, (campaigns, len(POLICY.tiers)))
    pool_C3 = rng.multinomial(cell.n, chances, campaigns)
    without, opened, labels = 0, 0, []
    for tiers, (gains, losses, _) in zip(drawn_CT3.tolist(), pool_C3.tolist(), strict=True):
        without += any(
            suites.passes(g, w, SUITE, MARGIN, ALONE[tier]) for tier, (g, w, _) in zip(POLICY.tiers, tiers, strict=True)
        )
        each = zip(POLICY.tiers, tiers, strict=True)
        found = [suites.verdict(g, w, SUITE, MARGIN, ALPHAS[tier]) for tier, (g, w, _) in each]
        if any(one.zone is Zone.PASS for one in found):
            opened += 1
        elif undecided := [one for one in found if pool.settles(one, POLICY.gates[0])]:
            zone, asked = on_pool(gains, losses, cell.n, max(undecided, key=lambda one: one.criteria[0].estimate))
            opened += zone is Zone.PASS
            labels += [asked] if asked else []
    return Rate(
        cell, campaigns, without / campaigns, opened / campaigns, len(labels) / campaigns,
        float(np.mean(labels)) if labels else 0.0,
    )  # fmt: skip


_known: dict[tuple[int, int, int, tuple[Zone, ...]], tuple[Zone, int]] = {}


def on_pool(gains: int, losses: int, n: int, suite: Verdict) -> tuple[Zone, int]:
    """What the pool says of a candidate that was right alone, and wrong alone, so often; and the labels it took."""
    key = (gains, losses, n, tuple(told.zone for told in suite.criteria))
    if key not in _known:
        differ = gains + losses
        ours = [*_answers(n, _OURS)[:differ], *_answers(n, _EQUAL)[differ:]]
        theirs = [*_answers(n, _THEIRS)[:differ], *_answers(n, _EQUAL)[differ:]]
        candidate, serving = ({one.item: one for one in side} for side in (ours, theirs))
        bare = serving if pool.asks_bare(suite, POLICY.gates[0]) else None
        asked = pool.questions(serving, candidate, bare)
        right = {one.item: _OURS if place < gains else _THEIRS for place, one in enumerate(asked)}
        labels = {
            one.item: "".join(letter for letter, text in one.answers.items() if text == right[one.item])
            for one in asked
        }
        found = pool.verdict(serving, candidate, bare, labels, suite=suite, policy=POLICY, alpha=ALPHAS[POOL])
        _known[key] = found.zone, len(asked)
    return _known[key]


@cache
def _answers(n: int, text: str) -> tuple[Answered, ...]:
    return tuple(Answered(item=f"{i:016x}", input={"prompt": str(i)}, answer=text) for i in range(n))


def table(rates: Sequence[Rate]) -> str:
    """The table in Markdown, in percent of the campaigns."""
    heads = ("pool", "differ on", "in truth", "suite alone", "with the pool", "asked", "labels", "allowed", "")
    lines = [heads, ("---",) * len(heads)]
    for rate in rates:
        cell, worse = rate.cell, rate.cell.difference < 0
        lines.append((
            f"{cell.n:,}", f"{cell.discordance:.0%}", "1 point worse" if worse else "as good",
            *(f"{100 * value:.1f} %" for value in (rate.without, rate.opened, rate.asked)), f"{rate.labels:.0f}",
            "≤ 2 %" if worse else "", ("met" if rate.met else "**missed**") if worse else "",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates(campaigns: int = CAMPAIGNS) -> Iterator[Rate]:
    """All cells, told as they come."""
    for cell in CELLS:
        found = simulate(cell, campaigns)
        print(table([found]).splitlines()[-1], flush=True)
        _known.clear()
        yield found


def main() -> None:
    """Simulate, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found = list(rates())
    before, _, rest = PAGE.read_text().partition("<!-- pool -->\n")
    _, _, after = rest.partition("<!-- /pool -->")
    PAGE.write_text(f"{before}<!-- pool -->\n{table(found)}\n<!-- /pool -->{after}")


if __name__ == "__main__":
    main()
