"""`python -m tests.faults.soak [--setup S] [--operations N]`: nothing goes wrong, for very long.

People push, pull, move aliases, delete and work as in an episode (`run`), and two collectors go through everything
without a pause, until so many operations were promised to have been done. Then every law must hold of all of them. With
``--record`` it is put on record, with what processes held early and late.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import psutil

from tests.faults import laws, machines, people, record
from tests.faults.people import Journals
from tests.faults.town import PLAIN, Town, town

OPERATIONS = ("pushed", "pulled", "moved", "deleted", "finished")
"""What a journal calls them: a push, a pull, a move of an alias, a deletion, a job that was done to its end."""
DATA = 0.02
"""Of what authors push; a store should not be full of it."""
LOOK_S = 30.0
Memory = dict[str, float]
"""Megabytes that each of our own processes holds, its children with it."""


def soak(here: Town, operations: int, seed: int, until: float | None = None) -> record.Line:
    """What was done, refused, held in memory and broken; after ``until`` (Unix time) it ends early."""
    journals, did, held, began = Journals(here.place.folder), Counter[str](), list[Memory](), time.monotonic()
    here.gather(seed, DATA)
    for name in ("ole", "pia"):
        here.comes(people.reader, name, seed)
    while _done(did) < operations and (until is None or time.time() < until):
        time.sleep(LOOK_S if held else 1)
        did.update(map(_what, journals.news()))
        held.append(_memory(here))
        took = time.monotonic() - began
        megabytes = ", ".join(f"{name} {held[-1][name]:.0f}" for name in held[-1])
        rate = f"{_done(did):7,} operations, {_done(did) / took:5.1f} a second"
        print(f"{took:6.0f} s {rate}; MB: {megabytes}", flush=True)
    took = time.monotonic() - began
    here.leave()
    broken = laws.come_to_rest(here, seed) + laws.breaches(here, set())
    did.update(map(_what, journals.news()))
    early, late = held[len(held) // 10 : len(held) // 5 + 1], held[-(len(held) // 10 + 1) :]
    grown = {name: [round(mean(one[name] for one in some)) for some in (early, late)] for name in held[0]}
    told = {"setup": here.setup, "seed": seed, "seconds": round(took), "operations": _done(did), "counted": OPERATIONS}
    return {**told, "did": dict(did), "memory": grown, "broken": broken}


def _done(did: Counter[str]) -> int:
    return sum(did[one] for one in OPERATIONS)


def _what(line: record.Line) -> str:
    return f"{line['did']}: {line['code']}" if line["did"] in ("refused", "lost") else str(line["did"])


def _memory(here: Town) -> Memory:
    return {name: _rss(psutil.Process(here.lives[name][0].process.pid)) for name in here.own}


def _rss(process: psutil.Process) -> float:
    family: Sequence[psutil.Process] = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in family) / 1e6


def main() -> None:
    """Run, print a line now and then, and end with 1 when a law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=PLAIN, default="postgres+s3")
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--minutes", type=float, help="end after so long, with what was done by then")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a line: docs/soaks.jsonl")
    asked = parser.parse_args()
    until = time.time() + 60 * asked.minutes if asked.minutes else None
    machines.part()
    with tempfile.TemporaryDirectory() as scratch, town(asked.setup, Path(scratch) / "town", disks_end=False) as here:
        told = soak(here, asked.operations, asked.seed, until)
    if asked.record:
        record.append(asked.record, told)
    print("\n".join(record.soaks([told])), *(f"    BROKEN: {breach}" for breach in told["broken"]), sep="\n")
    sys.exit(bool(told["broken"]))


if __name__ == "__main__":
    main()
