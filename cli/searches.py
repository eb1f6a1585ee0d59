"""Searches over rank, scale and targets: the words they are asked for in, and their findings as tables and plots."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .output import number, plot, table
from .parameters import bytes_of

ORDER = (
    "one search at a time, in this order: --targets auto, --scale auto, --rank auto; each from the recipe found before"
)
_WIDTH = 41


def searched(
    recipe: dict[str, Any], rank: str | None, scale: str | None, targets: str | None, energy: float | None,
    budget: str | None, suite: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The recipe itself, with its rank when one is named, or the search that starts from it."""
    given = {"rank": rank == "auto", "scale": scale == "auto", "targets": targets == "auto"}
    autos = [over for over, asked in given.items() if asked]
    if rank is not None and rank != "auto":
        if not rank.isdecimal() or int(rank) < 1:
            raise click.UsageError(f"--rank {rank}: expected a whole number above 0, or auto.")
        recipe = recipe | {"rank": int(rank)}
    if len(autos) > 1:
        raise click.UsageError(f"--{' and --'.join(autos)} auto together: {ORDER}.")
    if energy is not None and (autos != ["rank"] or budget is not None):
        raise click.UsageError("--energy goes with --rank auto, and without --bytes.")
    if budget is not None and autos not in (["rank"], ["targets"]):
        raise click.UsageError("--bytes goes with --rank auto or --targets auto.")
    if not autos:
        if suite is not None:
            raise click.UsageError("--suite is for a search: --rank auto, --scale auto or --targets auto.")
        return recipe
    if suite is None:
        raise click.UsageError(
            f"--{autos[0]} auto chooses by a suite: --suite S. Push one: loractl suite push FILE NAME"
        )
    if recipe["kind"] != "finetune":
        raise click.UsageError(f"--{autos[0]} auto is for adapters, not for a recipe of kind '{recipe['kind']}'.")
    wanted: dict[str, Any] = {"kind": "search", "over": autos[0], "training": recipe, "suite": suite}
    if "base" in recipe:
        wanted["base"] = recipe["base"]
    if energy is not None:
        wanted["energy"] = energy
    if budget is not None:
        wanted["bytes"] = bytes_of(budget)
    return wanted


def show_search(result: Mapping[str, Any]) -> None:
    """What a search found, for people."""
    candidates = result["candidates"]
    {"rank": _by_rank, "scale": _by_scale, "targets": _by_targets}[result["over"]](result, candidates)
    items = ", ".join(f"{count:,} of the {split} split" for split, count in result["items"].items())
    click.echo(f"\n{result['reason']}.\nScores are {result['metric']} on items: {items}; the first one chose.\n")


def _by_rank(result: Mapping[str, Any], candidates: Mapping[str, dict[str, Any]]) -> None:
    ranks = sorted((found["rank"], found["score"]["calibration"]) for name, found in candidates.items()
                   if name.startswith("rank-") or name == "full")  # fmt: skip
    click.echo(plot({"energy": [(float(rank), share) for rank, share in result["spectrum"]]},
                    title="share of ‖ΔW‖² kept", x="rank of every module"))  # fmt: skip
    if len(ranks) > 1:
        click.echo(plot({result["metric"]: [(float(rank), score) for rank, score in ranks]},
                        title=f"{result['metric']} by rank", x="rank of every module"))  # fmt: skip
    rows = sorted(candidates.items(), key=lambda item: item[1].get("bytes", 0))
    table(
        ["", "candidate", "rank", "mean", "energy", "bytes", "score", "report", "against the full rank"],
        ([_mark(name, result), name, found.get("rank", ""), number(found.get("mean_rank")), number(found.get("energy")),
          f"{found['bytes']:,}" if "bytes" in found else "", *_scores(found), _interval(found.get("against_full"))]
         for name, found in rows),
    )  # fmt: skip


def _by_scale(result: Mapping[str, Any], candidates: Mapping[str, dict[str, Any]]) -> None:
    tried = [found for found in candidates.values() if "scale" in found]
    rates = sorted({found["learning_rate"] for found in tried})
    longest = max(found["steps"] for found in tried)
    shown = sorted(found["score"]["calibration"] for found in tried if "score" in found)
    rows = []
    for scale in sorted({found["scale"] for found in tried}):
        own = {found["learning_rate"]: found for found in tried if found["scale"] == scale}
        rows.append([f"{scale:g}", *(_cell(own[rate], shown, longest) if rate in own else "" for rate in rates)])
    click.echo(f"{result['metric']} by scale (down) and learning rate (across)")
    table(["scale", *(f"{rate:.3g}" for rate in rates)], rows)
    click.echo("* ended early, after a quarter or half of the steps; shades: the worst ░ to the best █")
    for name, found in candidates.items():
        if "dropped" in found:
            click.echo(f"{name} was dropped: {found['dropped']}")


def _cell(found: Mapping[str, Any], shown: Sequence[float], longest: int) -> str:
    if "score" not in found:
        return "diverged"
    score = found["score"]["calibration"]
    shade = "░▒▓█"[min(3, 4 * shown.index(score) // len(shown))]
    early = "*" if found["steps"] < longest else ""
    return f"{shade} {number(score)}{early}"


def _by_targets(result: Mapping[str, Any], candidates: Mapping[str, dict[str, Any]]) -> None:
    gains = {name: found["gain"] for name, found in candidates.items() if "gain" in found}
    low = min(0.0, *(lower for _, lower, _ in gains.values()))
    high = max(0.0, *(upper for _, _, upper in gains.values()))
    table(
        ["", "placement", "rank", "bytes", "rate", "score", "report", "gain over", "gain", f"{low:.3g} … {high:.3g}"],
        ([_mark(name, result), name, found.get("rank", ""), f"{found['bytes']:,}" if "bytes" in found else "",
          f"{found['learning_rate']:.3g}" if "learning_rate" in found else "", *_scores(found), found.get("over", ""),
          _interval(found.get("gain")) or found.get("dropped", ""),
          _whisker(found["gain"], low, high) if "gain" in found else ""] for name, found in candidates.items()),
    )  # fmt: skip


def _whisker(gain: Sequence[float], low: float, high: float) -> str:
    """Estimate and bounds on a line from ``low`` to ``high``, and where zero is."""

    def at(value: float) -> int:
        return round((value - low) / ((high - low) or 1.0) * (_WIDTH - 1))

    estimate, lower, upper = gain
    cells = [" "] * _WIDTH
    cells[at(0.0)] = "│"
    for place in range(at(lower), at(upper) + 1):
        cells[place] = "─"
    cells[at(estimate)] = "●"
    return "".join(cells)


def _mark(name: str, result: Mapping[str, Any]) -> str:
    return "→" if name == result["chosen"] else ""


def _scores(found: Mapping[str, Any]) -> tuple[str, str]:
    score = found.get("score", {})
    return number(score.get("calibration")), number(score.get("report"))


def _interval(found: Sequence[float] | None) -> str:
    if found is None:
        return ""
    estimate, lower, upper = found
    return f"{estimate:+.3g} ({lower:+.3g} to {upper:+.3g})"
