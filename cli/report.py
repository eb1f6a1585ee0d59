"""The report of an upgrade: Markdown for people, its facts as JSON, and three plots as SVG and PNG.

What is quoted are scores on the report split, which nothing was chosen or judged by; the gate's own verdicts stand
beside them. `write` makes a folder; every file is written whole or not at all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.core.errors import ToolMissing
from registry.core.metrics import is_share

from .output import markdown, number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from registry.schemas import CampaignInfo

PLOTTED = "plots of a report"


@dataclass(frozen=True, slots=True)
class Quote:
    """One gate of a promoted adapter on the report split, in points where the metric is a share."""

    adapter: str
    suite: str
    metric: str
    n: int
    before: float
    after: float
    bare: float
    lower: float
    upper: float

    @property
    def kept(self) -> float | None:
        """The share of the gain over the bare new base that is left, (after − bare) ⁄ (before − bare)."""
        return (self.after - self.bare) / (self.before - self.bare) if self.before > self.bare else None


def quotes(info: "CampaignInfo") -> list[Quote]:
    """What the report split says, adapter by adapter."""
    return [_quote(item.adapter, found) for item in info.items for found in item.report]


def _quote(adapter: str, found: dict[str, Any]) -> Quote:
    times = 100.0 if is_share(found["metric"]) else 1.0
    scores = {name: times * found[name] for name in ("before", "after", "bare", "lower", "upper")}
    return Quote(adapter=adapter, suite=found["suite"], metric=found["metric"], n=found["n"], **scores)


def scores_text(info: "CampaignInfo") -> str:
    """The scores on the report split as a table; empty where nothing was promoted."""
    found = quotes(info)
    if not found:
        return ""
    rows = [
        [q.adapter, q.suite, q.metric, q.n, number(q.bare), number(q.before), number(q.after),
         f"{q.after - q.before:+.4g} ({q.lower:+.4g} to {q.upper:+.4g})", _percent(q.kept)]
        for q in found
    ]  # fmt: skip
    heads = ["adapter", "suite", "metric", "n", "new base alone", "before", "after", "difference", "gain kept"]
    return f"""## On the report split

Items that nothing was chosen or judged by; shares in points of a hundred. Either side of a difference is wrong with the
probability α of the adapter's policy.

{markdown(heads, rows)}"""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


# ── files ────────────────────────────────────────────────────────────────────


def write(info: "CampaignInfo", text: str, folder: Path) -> list[Path]:
    """``report.md``, ``report.json`` and the plots in ``folder``; what was written. `ToolMissing` without matplotlib.

    The text and the facts are written all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(info)
    shown = "\n\n".join(f"![{name}]({name}.svg)" for name in drawn)
    written = [
        whole(folder / "report.json", lambda path: path.write_text(json.dumps(plain(info), indent=2))),
        whole(folder / "report.md", lambda path: path.write_text(f"{text}\n\n{shown}".rstrip() + "\n")),
    ]
    return [*written, *(path for name, draw in drawn.items() for path in _figure(folder, name, draw))]


def whole(path: Path, make: Callable[[Path], object]) -> Path:
    """The file that ``make`` writes, under its name only once all of it is there."""
    part = path.with_name(f".{path.name}.partial{path.suffix}")
    make(part)
    return part.replace(path)


def _figure(folder: Path, name: str, draw: Callable[["Axes"], None]) -> Iterator[Path]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissing(what=PLOTTED, extra="plots") from error

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        draw(figure.add_subplot())
        yield whole(folder / f"{name}.svg", lambda path: figure.savefig(path, metadata={"Date": None}))
        yield whole(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=144))


# ── plots ────────────────────────────────────────────────────────────────────


def plots(info: "CampaignInfo") -> dict[str, Callable[["Axes"], None]]:
    """name -> what draws it; those for which there is nothing to show are left out."""
    found = quotes(info)
    drawn: dict[str, Callable[[Axes], None]] = {}
    for metric in sorted({q.metric for q in found}):
        mine = [q for q in found if q.metric == metric]
        drawn[f"scores-{metric.replace(':', '-')}"] = partial(_scores, mine)
    spent = [item.cost for item in info.items if item.cost["retrain_seconds"]]
    costs = [(cost["retrain_seconds"], cost["seconds"]) for cost in spent]
    if costs:
        drawn["costs"] = partial(_costs, costs)
    drift = {item.adapter: (item.plan.get("signals") or {}).get("drift") for item in info.items}
    if kept := [(moved, 100 * q.kept) for q in found if (moved := drift[q.adapter]) is not None and q.kept is not None]:
        drawn["drift"] = partial(_drift, kept)
    return drawn


def _scores(found: list[Quote], axes: "Axes") -> None:
    """After against before: on the line nothing changed."""
    before, after = [q.before for q in found], [q.after for q in found]
    below = [max(q.after - q.before - q.lower, 0) for q in found]
    above = [max(q.upper - q.after + q.before, 0) for q in found]
    axes.errorbar(before, after, yerr=[below, above], fmt="o", markersize=4, capsize=2, label="adapter")
    _diagonal(axes, [*before, *after], "as before")
    unit = ", points" if is_share(found[0].metric) else ""
    axes.set(xlabel=f"{found[0].metric} before{unit}", ylabel=f"after, with the interval of the difference{unit}")
    axes.legend()


def _costs(found: list[tuple[float, float]], axes: "Axes") -> None:
    """What the upgrade took against what training anew takes."""
    axes.scatter([anew for anew, _ in found], [max(spent, 0.1) for _, spent in found], s=16, label="adapter")
    axes.set(xscale="log", yscale="log", xlabel="training anew, device seconds", ylabel="upgrade, gate included")
    _diagonal(axes, [anew for anew, _ in found], "as dear as training anew")
    axes.legend()


def _drift(found: list[tuple[float, float]], axes: "Axes") -> None:
    """How much of an adapter's gain is left, against how far its modules moved."""
    axes.scatter([drift for drift, _ in found], [kept for _, kept in found], s=16)
    axes.axhline(100, linestyle=":", linewidth=1, color="gray")
    axes.set(xlabel="median drift ‖W₂ − W₁‖ ⁄ ‖W₁‖ of its modules", ylabel="gain kept, %")


def _diagonal(axes: "Axes", values: list[float], label: str) -> None:
    ends = [min(values), max(values)]
    axes.plot(ends, ends, linestyle=":", linewidth=1, color="gray", label=label)
