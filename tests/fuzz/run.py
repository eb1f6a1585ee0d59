"""`python -m tests.fuzz.run [--cases N] [--target T]… [--engine E]…`: bad inputs, counted.

Two engines: ``drawn`` (hypothesis draws inputs that are nearly right) and ``guided`` (atheris changes bytes and keeps
what reaches a new place in our code; Linux).
Each target has a process of its own, so that a crash is one line of the table and its memory is its own. What was
found is left in ``--keep``; with ``--record`` the table of docs/fuzzing.md counts the run in.
"""

import argparse
import datetime as dt
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

ENGINES = ("drawn", "guided", "api")
CORPUS = Path(__file__).with_name("corpus")
ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "fuzzing.md"
BATCH = 2000
"""hypothesis remembers what it drew: in batches, so that it forgets again."""
MEMORY_MB = 1024
"""What a target may hold at most."""


@dataclass
class Told:
    """How a target stood it."""

    engine: str
    target: str
    cases: int = 0
    taken: int = 0
    """Inputs that were not refused."""
    seconds: float = 0.0
    peak_mb: int = 0
    findings: list[str] = field(default_factory=list)
    """The end of each traceback, and where its input is."""


def drawn(name: str, cases: int, start: int, keep: Path) -> Told:
    """``cases`` inputs that hypothesis draws, in this process."""
    from tests.fuzz.targets import TARGETS

    target, told, began = TARGETS[name], Told("drawn", name), time.monotonic()
    outcomes: Counter[str] = Counter()
    last = b""

    def case(data: bytes) -> None:
        nonlocal last
        last = data
        outcomes[target.outcome(data)] += 1

    for number, first in enumerate(range(0, cases, BATCH)):
        quiet = settings(
            max_examples=min(BATCH, cases - first), database=None, deadline=None, print_blob=False,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        try:
            quiet(seed(start + number)(given(target.inputs)(case)))()
        except Exception as error:  # noqa: BLE001  # each is a finding
            place = kept(name, last, keep)
            told.findings.append(
                f"{type(error).__name__}: {str(error)[:300]} ({_where(traceback.format_exc())}) ← {place}"
            )
            break
    told.cases, told.taken = sum(outcomes.values()), outcomes["taken"]
    return _measured(told, began)


def kept(name: str, data: bytes, keep: Path) -> Path:
    """Where the input of a finding lies from now on."""
    keep.mkdir(parents=True, exist_ok=True)
    place = keep / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    place.write_bytes(data)
    return place


def _where(trace: str) -> str:
    """The last place of ours in a traceback."""
    ours = re.findall(rf'File "{re.escape(str(ROOT))}/(\S+)", line (\d+)', trace)
    return ":".join(ours[-1]) if ours else "?"


def _measured(told: Told, began: float) -> Told:
    told.seconds = round(time.monotonic() - began, 1)
    told.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return told


def guided(name: str, cases: int, start: int, keep: Path) -> Told:
    """``cases`` inputs by coverage, in a process of atheris's."""
    from tests.fuzz.targets import TARGETS

    began = time.monotonic()
    told = Told("guided", name)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        seeds = [*TARGETS[name].seeds, *(path.read_bytes() for path in CORPUS.glob(f"{name}-*"))]
        for number, data in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(data)
        words = Path(scratch) / "words"
        found = {word for data in seeds for word in re.findall(rb"[A-Za-z_@:!{}\[\]\"-]{2,24}", data)}
        words.write_text("".join('"' + re.sub(r'(["\\])', r"\\\1", word.decode()) + '"\n' for word in sorted(found)))
        crashes = Path(scratch) / "crashes"
        crashes.mkdir()
        command = [sys.executable, "-m", "tests.fuzz.guided", name, str(corpus), f"-runs={cases}", f"-seed={start + 1}"]
        command += [
            "-max_len=4096",
            "-timeout=300",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-dict={words}",
            "-print_final_stats=1",
        ]
        command += [f"-artifact_prefix={crashes}/"]
        # A child's peak begins at that of whoever starts it; the shell is small, and forks.
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
        taken = Path(scratch) / "taken"
        taken.touch()
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TAKEN": str(taken)},
        )
        said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", said))
        told.cases = int(stats.get("number_of_executed_units", 0))
        told.peak_mb = int(stats.get("peak_rss_mb", 0))
        told.taken = int(taken.read_bytes() or b"0")
        for crash in crashes.iterdir():
            cause = (re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", said, re.MULTILINE) or [crash.name])[-1]
            place = kept(name, crash.read_bytes(), keep)
            told.findings.append(f"{cause[:300]} ({_where(said)}) ← {place}")
        if done.returncode and not told.findings:
            told.findings.append(f"ended with {done.returncode}: {said[-500:]}")
    told.seconds = round(time.monotonic() - began, 1)
    return told


def api(name: str, cases: int, start: int, keep: Path) -> Told:
    """``cases`` requests that schemathesis draws of our OpenAPI document."""
    from tests.fuzz.api import asked

    return _measured(asked(name, cases, start, keep), time.monotonic())


def names(engine: str) -> list[str]:
    """The targets of an engine."""
    if engine == "api":
        from tests.fuzz.api import PLACES

        return list(PLACES)
    from tests.fuzz.targets import TARGETS

    return [name for name, target in TARGETS.items() if engine == "drawn" or target.guided]


def apart(engine: str, target: str, cases: int, start: int, keep: Path) -> Told:
    """One target in a process of its own; a process that dies is a finding, too."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "tests.fuzz.run", "--one", f"{engine}/{target}", "--cases", str(cases)]
        command += ["--seed", str(start), "--keep", str(keep), "--told-to", out.name]
        done = subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        told = Path(out.name).read_bytes()
        if done.returncode or not told:
            said = done.stderr.decode(errors="replace")
            return Told(engine, target, findings=[f"its process ended with {done.returncode}: {said[-800:]}"])
        return Told(**json.loads(told))


def runs(engines: Sequence[str], targets: Sequence[str], cases: int, start: int, keep: Path) -> Iterator[Told]:
    """Each target under each engine, ``cases`` for each."""
    for engine in engines:
        for target in names(engine):
            if not targets or target in targets:
                yield apart(engine, target, cases, start, keep)


# ── the page ─────────────────────────────────────────────────────────────────

_ROW = re.compile(r"^\| (\w+) \| ([\w+ -]+) \| ([\d,]+) \| ([\d,]+) \| (\d+) MB \| ([\d-]+) \|$", re.MULTILINE)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def record(told: Sequence[Told], today: str) -> None:
    """Count runs without a finding into the table of docs/fuzzing.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {(row[0], row[1]): row[2:] for row in _ROW.findall(table)}
    for one in told:
        if one.findings:
            continue
        cases, taken, peak, _ = rows.get((one.engine, one.target), ("0", "0", "0", ""))
        counts = (int(cases.replace(",", "")) + one.cases, int(taken.replace(",", "")) + one.taken)
        rows[one.engine, one.target] = (f"{counts[0]:,}", f"{counts[1]:,}", str(max(int(peak), one.peak_mb)), today)
    lines = ["| engine | target | cases | taken | memory at most | last run |", "|---|---|---|---|---|---|"]
    order = sorted(rows, key=lambda key: (ENGINES.index(key[0]), key[1]))
    lines += [
        f"| {key[0]} | {key[1]} | {' | '.join(rows[key][:2])} | {rows[key][2]} MB | {rows[key][3]} |" for key in order
    ]
    total = sum(int(rows[key][0].replace(",", "")) for key in order)
    lines += ["", f"In all {total:,} cases."]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def line(told: Told) -> str:
    """One target for whoever watches."""
    head = f"{told.engine:6} {told.target:16} {told.cases:>9,} cases, {told.taken:>9,} taken, {told.seconds:7.1f} s, {told.peak_mb} MB"
    return "\n".join([head, *(f"    FOUND: {finding}" for finding in told.findings)])


def main() -> None:
    """Run, print a line a target, and end with 1 when something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each target")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="repeatable; without it all")
    parser.add_argument("--target", action="append", default=[], help="repeatable; without it all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "loractl-fuzz-found")
    parser.add_argument("--record", action="store_true", help="count the run into docs/fuzzing.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--told-to", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        engine, _, target = asked.one.partition("/")
        one = {"drawn": drawn, "guided": guided, "api": api}[engine](target, asked.cases, asked.seed, asked.keep)
        asked.told_to.write_text(json.dumps(asdict(one)))
        return
    told = []
    for one in runs(asked.engine or ENGINES, asked.target, asked.cases, asked.seed, asked.keep):
        told.append(one)
        print(line(one), flush=True)
        if asked.record:
            record([one], dt.datetime.now(dt.UTC).date().isoformat())
    found = sum(len(one.findings) for one in told)
    print(f"{sum(one.cases for one in told):,} cases, {found} findings")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
