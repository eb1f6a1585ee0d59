"""`python -m benchmarks.run [names]`: measure in a process of its own each, and rewrite docs/benchmarks.md.

A benchmark is a module of this folder with ``run(scale: float = 1.0) -> list[Row]``. Rows are kept in
docs/benchmarks.json, so that those of benchmarks that were not run again stay in the table, with their date.
"""

import argparse
import dataclasses
import datetime as dt
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .table import Row

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "docs" / "benchmarks.json"
TABLE = ROOT / "docs" / "benchmarks.md"
_NOT_BENCHMARKS = {"__init__", "run", "table", "house", "fill", "load", "gigabyte", "rates", "tasks"}


def names() -> list[str]:
    """Every benchmark there is."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_BENCHMARKS)


def measure(name: str, scale: float) -> list[Row]:
    """The rows of one benchmark, run here."""
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run(scale)
    return rows


def measure_apart(name: str, scale: float) -> list[dict[str, Any]] | None:
    """The rows of one benchmark run in a process of its own; None when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.run", name, "--scale", str(scale), "--rows-to", str(out)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            return None
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def machine() -> str:
    """The machine, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    processors = f"{os.cpu_count()} × {_processor()}"
    return f"{processors}, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def table(stored: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Ratios are taken in one run, against a peer that does the same work on the same machine at the same time.",
        "Measure again: `make bench`, or `python -m benchmarks.run digest` for one of them.",
        "",
        "| claim | measured | target | | against | note |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(stored):
        for row in stored[name]["rows"]:
            verdict = "met" if row["passed"] else "**missed**"
            lines.append(
                f"| {row['claim']} | {_figure(row['measured'])} {row['unit']} | {row['target']} | {verdict} "
                f"| {row['peer']} | {row['note']} |"
            )
    lines += ["", "| benchmark | measured on | machine | scale |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {e['date']} | {e['machine']} | {e['scale']:g} |" for name, e in sorted(stored.items())]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> int:
    """Run the benchmarks that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=[*names(), []], help="which ones; all without a name")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the stated size, for a quick look")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows_to:
        rows = [dataclasses.asdict(row) for name in given.names for row in measure(name, given.scale)]
        given.rows_to.write_text(json.dumps(rows))
        return 0
    stored: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    failed = []
    for name in given.names or names():
        found = measure_apart(name, given.scale)
        if found is None:
            failed.append(name)
            continue
        today = dt.datetime.now(dt.UTC).date().isoformat()
        stored[name] = {"rows": found, "date": today, "machine": machine(), "scale": given.scale}
        for row in found:
            verdict = "met" if row["passed"] else "MISSED"
            figure = f"{_figure(row['measured'])} {row['unit']} ({row['target']})"
            print(f"{verdict:6} {figure:20} {row['claim']}  {row['note']}", flush=True)
        STORE.write_text(json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        TABLE.write_text(table(stored))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
