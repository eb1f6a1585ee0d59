"""What came of the ladder's upgrades: ways of deciding held against each other, as tables and a plot (`ladder`)."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from registry.core.policy import Policy
from registry.core.recipes import Tier

from .upgrades import RELATED, SHAPES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
PLOT = PAGE.with_name("ladder.svg")
SAME_SHAPE: tuple[Tier, ...] = ("carry", "align", "warm-start", "distil", "retrain")
OTHER_SHAPE: tuple[Tier, ...] = ("transport", "warm-start", "distil", "retrain")
REFERENCE = "retrained"
SCRATCH = "from scratch"
"""As many steps as the warm start's, from nothing."""
PEERS = (REFERENCE, SCRATCH)
KINDS = {"related": RELATED, "other shape": SHAPES, "unrelated": {"independent seed"}}
LEAST = 0.01
"""What retraining must gain over the bare base (a point, or hundredths of nats a byte), for a cell to be counted."""


@dataclass(frozen=True)
class Cell:
    """What one tier made of one adapter, or why it did not."""

    upgrade: str
    task: str
    seed: int
    tier: str
    drift: float | None
    """Median ρ of the upgrade."""
    steps: int = 0
    seconds: float = 0.0
    """Of a processor, as are the gate's."""
    gate: float = 0.0
    bare: float = 0.0
    retrained: float = 0.0
    served: float = 0.0
    score: float = 0.0
    """On the report split, as the three before and the next."""
    flips: float | None = None
    """Right on the old base, and wrong now."""
    zone: str = ""
    open: tuple[str, ...] = ()
    """The gate's criteria that did not pass."""
    surely: float | None = None
    """Negative flips on the gate's split: their upper bound, which the gate does not ask for."""
    refused: str = ""

    @property
    def recovery(self) -> float:
        """R."""
        return (self.score - self.bare) / (self.retrained - self.bare)

    @property
    def tells(self) -> bool:
        """Whether retraining gains so much that a share of it is more than noise."""
        return self.retrained - self.bare > LEAST


@dataclass(frozen=True)
class End:
    """What a way of deciding made of one adapter."""

    tier: str | None
    """None: nothing serves on the new base."""
    recovery: float = 0.0
    regret: float = 0.0
    """How much better the best of all tiers is, as a share of what retraining gains."""
    points: float | None = None
    """The same in points, where answers are right or wrong."""
    share: float = 0.0
    """Of retraining's seconds: of all that was made."""
    gated: float = 0.0
    """The same, with the gate's own seconds on both sides."""
    flips: float | None = None
    regressed: bool = False
    """It serves, and worse than before by more than two points, or 2 % of what retraining gains."""


Way = Callable[[Sequence[Cell]], Sequence[Cell]]
"""Of an adapter's cells: those that are paid for, the last of which serves if it passed; or nothing."""


def by_gate(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The tiers in the order of costs, up to the first that passes."""
    tried = [cell for cell in cells if cell.tier not in PEERS]
    passed = next((at for at, cell in enumerate(tried) if cell.zone == "pass"), len(tried))
    return tried[: passed + 1]


def by_default(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The tiers of a policy that names none, at the shares of α that more of them would have left to each.

    Those that train begin at what align made as well, which such an upgrade would have them make, unpaid here.
    """
    return by_gate([cell for cell in cells if cell.tier in (*Policy().tiers, "transport")])


def copied(cells: Sequence[Cell]) -> Sequence[Cell]:
    """Copy if shapes match, and retrain if not."""
    return _trusted("carry", cells) or _trusted(REFERENCE, cells)


def _trusted(tier: str, cells: Sequence[Cell]) -> Sequence[Cell]:
    return [replace(cell, zone="pass") for cell in cells if cell.tier == tier]


def by_sure_flips(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The same, where negative flips must be within their limit surely, not as they were seen."""
    limit = Policy().max_negative_flips
    return by_gate([cell if (cell.surely or 0.0) <= limit else replace(cell, zone="unresolved") for cell in cells])


WAYS: Mapping[str, Way] = {
    "the gate, tier by tier": by_gate,
    "the gate, default tiers": by_default,
    "the gate, flips surely few": by_sure_flips,
    "as it is (PortLLM)": partial(_trusted, "carry"),
    "copy if shapes match": copied,
    "always retrain": partial(_trusted, REFERENCE),
    "freeze": lambda _: (),
}


def ended(way: Way, cells: Sequence[Cell]) -> End:
    """What came of one adapter's cells."""
    cells = [cell for cell in cells if not cell.refused]
    whole = next(cell for cell in cells if cell.tier == REFERENCE)
    best = max(cell.score for cell in cells)
    paid = way(cells)
    last = paid[-1] if paid and paid[-1].zone == "pass" else None
    score = last.score if last else whole.bare
    gain, missed = whole.retrained - whole.bare, max(0.0, best - score)
    worse = 0.02 if whole.flips is not None else 0.02 * gain
    spent = sum(cell.seconds for cell in paid)
    return End(
        last.tier if last else None, (score - whole.bare) / gain, missed / gain,
        100 * missed if whole.flips is not None else None, spent / whole.seconds,
        (spent + sum(cell.gate for cell in paid)) / (whole.seconds + whole.gate), last.flips if last else None,
        last is not None and whole.served - score > worse,
    )  # fmt: skip


def table(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: of each model a row an upgrade, a column a tier, then what was decided."""
    return "\n\n".join(_of_model(model, upgraded) for model, upgraded in stored.items())


def _of_model(model: str, stored: Mapping[str, Any]) -> str:
    tiers = [*dict.fromkeys([*SAME_SHAPE, *OTHER_SHAPE]), SCRATCH]
    lines = [
        f"### {model}",
        "",
        "| upgrade | drift ρ | " + " | ".join(f"{tier}: R (steps)" for tier in tiers)
        + " | promoted | R of what was decided |",
        "|" + "---|" * (len(tiers) + 4),
    ]  # fmt: skip
    for name, entry in stored.items():
        cells = [cell for cell in map(_cell, entry["cells"]) if cell.tells]
        shown = [name, "" if entry["cells"][0]["drift"] is None else f"{entry['cells'][0]['drift']:.3f}"]
        for tier in tiers:
            some = [cell for cell in cells if cell.tier == tier and not cell.refused]
            shown.append(f"{statistics.median(c.recovery for c in some):.2f} ({some[0].steps})" if some else "–")
        ends = [ended(by_gate, each) for each in _by_adapter(cells).values()]
        shown += [
            f"{sum(end.tier is not None for end in ends)} of {len(ends)}",
            f"{statistics.median(end.recovery for end in ends):.2f}" if ends else "–",
        ]
        lines.append("| " + " | ".join(shown) + " |")
    told = sorted({f"{entry['machine']}, {entry['date']}, {entry['seeds']} seeds, steps × {entry['scale']}"
                   for entry in stored.values()})  # fmt: skip
    count = f"{len(stored)} of {len(set().union(*KINDS.values()))} upgrades on record."
    return "\n".join([*lines, "", *_ways(stored), "", count, *(f"Measured: {line}." for line in told)])


COLUMNS = (
    "upgrades", "decided by", "serve", "R, median (10th percentile)", "regret, mean", "in points", "seconds, median",
    "with gates", "negative flips, mean", "promoted and worse",
)  # fmt: skip


def _ways(stored: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a way of deciding, over the adapters of related bases and over those of other shapes."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for kind, names in KINDS.items():
        cells = [_cell(each) for name, entry in stored.items() if name in names for each in entry["cells"]]
        adapters = list(_by_adapter([cell for cell in cells if cell.tells]).values())
        for said, way in WAYS.items() if adapters else ():
            ends = [ended(way, each) for each in adapters]
            recoveries = sorted(end.recovery for end in ends)
            shown = [
                kind, said, f"{sum(end.tier is not None for end in ends)} of {len(ends)}",
                f"{statistics.median(recoveries):.2f} ({recoveries[len(ends) // 10]:.2f})",
                f"{statistics.fmean(end.regret for end in ends):.2f}", _mean_of([end.points for end in ends], ".2f"),
                f"{statistics.median(end.share for end in ends):.0%}",
                f"{statistics.median(end.gated for end in ends):.0%}",
                _mean_of([end.flips for end in ends], ".1%"), str(sum(end.regressed for end in ends)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(shown) + " |")
    return lines


def _mean_of(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else "–"


def _by_adapter(cells: Sequence[Cell]) -> dict[tuple[str, str, int], list[Cell]]:
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.upgrade, cell.task, cell.seed), []).append(cell)
    return found


def plot(stored: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Recovery against steps as a share of retraining's, a point a tier and upgrade (medians over its cells)."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ladder"  # equal figures, equal bytes
    from matplotlib import pyplot as plt

    every = [cell["tier"] for upgraded in stored.values() for entry in upgraded.values() for cell in entry["cells"]]
    tiers = list(dict.fromkeys(every))
    figure, panels = plt.subplots(1, len(stored), figsize=(1 + 6 * len(stored), 4.5), sharey=True, squeeze=False)
    for axes, (model, upgraded) in zip(panels[0], stored.items(), strict=True):
        for number, tier in enumerate(tiers):
            points = [point for entry in upgraded.values() if (point := _point(entry["cells"], tier))]
            if points:
                axes.scatter(*zip(*points, strict=True), label=tier, s=28, color=f"C{number}")
        axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=model, xlabel="steps, as a share of a retraining's", ylim=(-1, 1.3))
    panels[0][0].set(ylabel="recovery")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _point(stored: Sequence[Mapping[str, Any]], tier: str) -> tuple[float, float] | None:
    """Of one upgrade: a tier's share of the steps, and its recovery."""
    whole = next(cell["steps"] for cell in stored if cell["tier"] == REFERENCE)
    some = [cell for cell in map(_cell, stored) if cell.tier == tier and cell.tells and not cell.refused]
    return (some[0].steps / whole, statistics.median(cell.recovery for cell in some)) if some else None


def _cell(stored: Mapping[str, Any]) -> Cell:
    return Cell(**stored)


def write_page(stored: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables and the plot of docs/rebase.md."""
    before, _, rest = PAGE.read_text().partition("<!-- ladder -->\n")
    _, _, after = rest.partition("<!-- /ladder -->")
    shown = f"{table(stored)}\n\n![Recovery against steps, a point a tier and upgrade]({PLOT.name})"
    PAGE.write_text(f"{before}<!-- ladder -->\n{shown}\n<!-- /ladder -->{after}")
    plot(stored, PLOT)
