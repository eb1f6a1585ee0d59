"""`python -m tests.faults.run [--setup S]… [--episodes N] [--seed N]`: registries are hurt, healed, and looked at.

An episode is a few seconds in which people push, pull, move aliases and work on a town of real processes, and in which
one thing goes wrong. Then all is healed, what was begun comes to its end, and every law of `laws` must hold. The seed
decides what goes wrong and when, and what people do; how the machine mixes it is chance, so that an episode that failed
may pass again: what it left is kept in ``--keep``.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import laws
from tests.faults.faults import Fault, faults_of
from tests.faults.people import journals
from tests.faults.town import SETUPS, Town, town


@dataclass(frozen=True)
class Episode:
    """What went wrong in it, and what was broken afterwards."""

    setup: str
    seed: int
    fault: str
    seconds: float
    served_s: float
    """From the beginning of healing until every API answered."""
    did: Counter[str] = field(default_factory=Counter)
    breaches: Sequence[str] = ()


def episode(here: Town, fault: Fault, seed: int, seen: set[str]) -> Episode:
    """One of them."""
    chance = random.Random(seed)
    began = time.monotonic()
    before = Counter(line["did"] for line in journals(here.place.folder))
    here.gather(seed)
    time.sleep(chance.uniform(0.1, 1.5))
    fault(here, chance)
    healed = time.monotonic()
    here.heal()
    served = time.monotonic() - healed
    time.sleep(chance.uniform(0.3, 1.0))
    here.leave()
    broken = laws.come_to_rest(here, seed)
    broken += laws.breaches(here, seen)
    did = Counter(line["did"] for line in journals(here.place.folder)) - before
    for journal in (here.place.folder / "journals").glob("*"):  # what it promised was looked at
        _forget_breaches(journal)
    return Episode(here.setup, seed, fault.__name__, time.monotonic() - began, served, did, broken)


def _forget_breaches(journal: Path) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"did": "breach"' not in line and line.endswith("\n")))


def episodes(setup: str, count: int, seed: int, folder: Path, until: float | None = None) -> Iterator[Episode]:
    """``count`` in one town, every fault in its turn; a town that was broken is left for a new one."""
    done, lives = 0, 0
    while done < count and (until is None or time.time() < until):
        lives += 1
        home = folder / f"{setup}-{seed}-{lives}"
        seen: set[str] = set()
        with town(setup, home) as here:
            faults = faults_of(here)
            while done < count and (until is None or time.time() < until):
                number = seed + done
                told = episode(here, faults[number % len(faults)], number, seen)
                done += 1
                yield told
                if told.breaches or done % 25 == 0:  # journals and tables grow, and every law reads all of them
                    break
        if not told.breaches:
            shutil.rmtree(home)


def main() -> None:
    """Run, print a line an episode, and end with 1 when a law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="append", choices=SETUPS, help="repeatable; without it all four, in turns")
    parser.add_argument("--episodes", type=int, default=20, help="of each")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--minutes", type=float, help="begin none after so long")
    parser.add_argument("--keep", type=Path, help="where towns live; those in which a law was broken stay")
    asked = parser.parse_args()
    until = time.time() + 60 * asked.minutes if asked.minutes else None
    told: list[Episode] = []
    with tempfile.TemporaryDirectory() as scratch:
        for setup in asked.setup or SETUPS:
            for one in episodes(setup, asked.episodes, asked.seed, asked.keep or Path(scratch), until):
                told.append(one)
                print(line(one), flush=True)
    print(summary(told))
    sys.exit(any(one.breaches for one in told))


def line(one: Episode) -> str:
    """One episode for whoever watches."""
    did = ", ".join(f"{count} {did}" for did, count in sorted(one.did.items()))
    head = f"{one.setup:16} seed {one.seed} {one.fault:18} {one.seconds:5.1f} s, served {one.served_s:4.1f} s: {did}"
    return "\n".join([head, *(f"    BROKEN: {breach}" for breach in one.breaches)])


def summary(told: Sequence[Episode]) -> str:
    """A table: a row a fault, a column a town."""
    setups = list(dict.fromkeys(one.setup for one in told))
    rows = [f"| fault | {' | '.join(setups)} |", "|" + "---|" * (len(setups) + 1)]
    for fault in dict.fromkeys(one.fault for one in told):
        cells = []
        for setup in setups:
            some = [one for one in told if (one.setup, one.fault) == (setup, fault)]
            cells.append(f"{sum(not one.breaches for one in some)} of {len(some)}")
        rows.append(f"| {fault.replace('_', ' ')} | {' | '.join(cells)} |")
    broken = sum(bool(one.breaches) for one in told)
    did: Counter[str] = sum((one.did for one in told), Counter())
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(did.items()))
    return "\n".join([*rows, "", f"{len(told)} episodes, {broken} with a law broken. In all: {counted}."])


if __name__ == "__main__":
    main()
