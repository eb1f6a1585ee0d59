"""What was seen over all runs: lines in ``docs/faults.jsonl`` and ``docs/soaks.jsonl``, and the page `make docs` makes.

A line is appended when its episode, or its soak, is over, so that a run that is killed, or two at once, lose nothing.
Whoever found out why a law was broken adds it to the line, as ``was``.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

Line = dict[str, Any]
HEAD = """# Faults on record

Every episode that `python -m tests.faults.run --record docs/faults.jsonl` ran, whatever came of it: a registry of
real processes is hurt while people use it, healed, and every law of `tests/faults/laws.py` is looked at. What each
misfortune is stands in `tests/faults/faults.py`; how often it came, in which installation, stands here.
"""
SOAK = """Nothing is hurt. People push, pull, move aliases, delete and work while two collectors go through everything
without a pause (`python -m tests.faults.soak`). *Told to come again*: refusals that say so, and races that somebody
else won, by their codes. Then every law is looked at, for all that was ever done, and every version that was promised
is pulled. Memory is that of our own processes, in the second tenth of the time and in the last."""


def append(file: Path, line: Line) -> None:
    """Put one episode on record."""
    with file.open("ab", buffering=0) as record:
        record.write(json.dumps({"on": f"{datetime.now(UTC):%Y-%m-%d}", **line}).encode() + b"\n")


def lines(file: Path) -> list[Line]:
    """All that are on record; none where there is no file."""
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def page(told: Sequence[Line], long: Sequence[Line] = ()) -> str:
    """What is on record of episodes and of soaks, as a page."""
    broken = [line for line in told if line["broken"]]
    days = sorted({line["on"] for line in told})
    did = sum((Counter(line["did"]) for line in told), Counter[str]())
    text = [HEAD, *table(told), "", f"{len(told)} episodes, {len(broken)} with a law broken; {days[0]} to {days[-1]}."]
    text += ["", f"What people did in them: {', '.join(f'{count} {done}' for done, count in sorted(did.items()))}."]
    if broken:
        text += ["", "## Where a law was broken", ""]
        text += ["| when | where | fault | seed | what was seen first | what it was |", "|---|---|---|---|---|---|"]
    for line in broken:
        cells = [line["on"], line["setup"], _words(line["fault"]), str(line["seed"]), *map(_cell, line["broken"][:1])]
        text.append(f"| {' | '.join([*cells, line.get('was', 'not known yet')])} |")
    text += ["", "## Recovery", "", "On two cores, alone on them or beside other work, ten times what they can do.", ""]
    text += ["| what | beside | times | median s | 95 % within s | longest s |", "|---|---|---|---|---|---|"]
    text += _recoveries(told)
    if long:
        text += ["", "## Soaks", "", SOAK, "", *soaks(long)]
    return "\n".join(text) + "\n"


def soaks(told: Iterable[Line]) -> list[str]:
    """A row each, and below what somebody noted."""
    told = list(told)
    rows = ["| when | where | operations | of them | minutes | told to come again | laws broken | MB early → late |"]
    rows += ["|---" * 8 + "|"]
    for line in told:
        did: dict[str, int] = line["did"]
        of = ", ".join(f"{did[one]:,} {one}" for one in sorted(did) if one in line["counted"])
        again = ", ".join(f"{count:,} {one}" for one, count in sorted(did.items()) if ": " in one) or "nobody"
        grown = ", ".join(f"{name} {early} → {late}" for name, (early, late) in line["memory"].items())
        cells = [line.get("on", "now"), line["setup"], f"{line['operations']:,}", of, f"{line['seconds'] / 60:.0f}"]
        rows.append(f"| {' | '.join([*cells, again, str(len(line['broken'])), grown])} |")
    return rows + [text for line in told if "note" in line for text in ("", f"{line['operations']:,}: {line['note']}.")]


def table(told: Iterable[Line]) -> list[str]:
    """A row a fault, a column an installation: how many episodes, and in how many a law was broken if in any."""
    told = list(told)
    setups, faults = (sorted({line[key] for line in told}) for key in ("setup", "fault"))
    rows = [f"| fault | {' | '.join(setups)} |", "|---" * (len(setups) + 1) + "|"]
    for fault in faults:
        cells = []
        for setup in setups:
            some = [line for line in told if (line["setup"], line["fault"]) == (setup, fault)]
            broken = sum(bool(line["broken"]) for line in some)
            cells.append(f"{len(some)}, {broken} broken" if broken else str(len(some) or ""))
        rows.append(f"| {_words(fault)} | {' | '.join(cells)} |")
    sums = [sum(line["setup"] == setup for line in told) for setup in setups]
    return [*rows, f"| together | {' | '.join(map(str, sums))} |"]


def _recoveries(told: Sequence[Line]) -> list[str]:
    rows = []
    for what in sorted({what for line in told for what in line["recovered"]}):
        for alone in (True, False):
            some = [line for line in told if line.get("alone", False) == alone]
            took = sorted(s for line in some for s in line["recovered"].get(what, ()))
            if took:
                high = min(quantiles(took, n=20)[-1], took[-1]) if len(took) > 1 else took[0]
                cells = [what, "nothing" if alone else "other work", str(len(took)), f"{median(took):.1f}"]
                rows.append(f"| {' | '.join([*cells, f'{high:.1f}', f'{took[-1]:.1f}'])} |")
    return rows


def _words(fault: str) -> str:
    return fault.replace("_", " ")


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]
