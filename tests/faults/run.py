"""`python -m tests.faults.run [--setup S]… [--episodes N] [--seed N]`: registries are hurt, healed, and looked at.

An episode is a few seconds in which people push, pull, move aliases and work on a town of real processes, and in which
one thing goes wrong. Then all is healed, what was begun comes to its end, and every law of `laws` must hold. The seed
decides what goes wrong and when, and what people do; how the machine mixes it is chance, so that an episode that failed
may pass again: what it left is kept in ``--keep``. With ``--record`` it adds to what is on record (`record`).
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

from tests.faults import laws, machines, record, recovery
from tests.faults.faults import MEANS, Fault, faults_of, why_not
from tests.faults.people import Journals
from tests.faults.town import SETUPS, Town, town
from tests.servers import ServerDown

USUAL = {"pushed", "moved", "finished"}
FIRST_S = 60.0
"""Nothing goes wrong before people have done what is usual, or for so long: else there would be nothing to hurt."""


@dataclass(frozen=True)
class Episode:
    """What went wrong in it, and what was broken afterwards."""

    setup: str
    seed: int
    fault: str
    seconds: float
    recovered: dict[str, list[float]] = field(default_factory=dict)
    """What came back, and after how many seconds."""
    did: Counter[str] = field(default_factory=Counter)
    breaches: Sequence[str] = ()


def episode(here: Town, fault: Fault, seed: int, seen: set[str]) -> Episode:
    """One of them."""
    chance = random.Random(seed)
    began = time.monotonic()
    before = _deeds(here)
    recovered: dict[str, list[float]] = {}
    broken: list[str] = []
    try:
        here.gather(seed)
        usual = USUAL | ({"upgrades"} if here.works else set())
        while not (_deeds(here) - before).keys() >= usual and time.monotonic() < began + FIRST_S:
            time.sleep(0.1)
        time.sleep(chance.uniform(0.1, 12 if here.works else 1.5))
        fault(here, chance)
        recovered["an API process that was started serves"] = [round(s, 1) for s in here.heal()]
        time.sleep(chance.uniform(0.3, 1.0))
        here.leave()
        broken += laws.come_to_rest(here, seed)
        broken += laws.breaches(here, seen)
        recovered |= recovery.look(here)
    except ServerDown as reason:  # what does not come back is a breach too
        broken.append(str(reason))
    did = _deeds(here) - before
    for journal in (here.place.folder / "journals").glob("*"):  # what it promised was looked at
        _forget_breaches(journal)
    return Episode(here.setup, seed, fault.__name__, time.monotonic() - began, recovered, did, broken)


def _deeds(here: Town) -> Counter[str]:
    return Counter(line["did"] for line in Journals(here.place.folder).news())


def _forget_breaches(journal: Path) -> None:
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"did": "breach"' not in line and line.endswith("\n")))


def episodes(
    setup: str, count: int, seed: int, folder: Path, until: float | None = None, names: Sequence[str] | None = None
) -> Iterator[Episode]:
    """``count`` in one town, every fault in its turn; a town that was broken is left for a new one."""
    done, lives = 0, 0
    while done < count and (until is None or time.time() < until):
        lives += 1
        home = folder / f"{setup}-{seed}-{lives}"
        seen: set[str] = set()
        with town(setup, home) as here:
            faults = [fault for fault in faults_of(here) if not names or fault.__name__ in names]
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
    parser.add_argument("--setup", action="append", choices=SETUPS, help="repeatable; without it all, in turns")
    parser.add_argument("--episodes", type=int, default=20, help="of each")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--minutes", type=float, help="begin none after so long")
    parser.add_argument("--fault", action="append", metavar="NAME", help="repeatable; without it all, in turns")
    parser.add_argument("--keep", type=Path, help="where towns live; those in which a law was broken stay")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a line an episode: docs/faults.jsonl")
    parser.add_argument("--alone", action="store_true", help="say on record that nothing else ran on this machine")
    asked = parser.parse_args()
    machines.part()
    until = time.time() + 60 * asked.minutes if asked.minutes else None
    told: list[Episode] = []
    print("".join(f"left out: {fault.__name__}: {why}\n" for fault in MEANS if (why := why_not(fault))), end="")
    with tempfile.TemporaryDirectory() as scratch:
        for setup in asked.setup or SETUPS:
            for one in episodes(setup, asked.episodes, asked.seed, asked.keep or Path(scratch), until, asked.fault):
                told.append(one)
                print(line(one), flush=True)
                if asked.record:
                    record.append(asked.record, on_record(one) | ({"alone": True} if asked.alone else {}))
    print("\n".join(record.table(map(on_record, told))))
    print(f"\n{len(told)} episodes, {sum(bool(one.breaches) for one in told)} with a law broken.")
    sys.exit(any(one.breaches for one in told))


def line(one: Episode) -> str:
    """One episode for whoever watches."""
    did = ", ".join(f"{count} {did}" for did, count in sorted(one.did.items()))
    head = f"{one.setup:16} seed {one.seed} {one.fault:18} {one.seconds:5.1f} s: {did}"
    return "\n".join([head, *(f"    BROKEN: {breach}" for breach in one.breaches)])


def on_record(one: Episode) -> record.Line:
    """What of it is kept for ever."""
    recovered = {what: took for what, took in one.recovered.items() if took}
    kept = {"setup": one.setup, "fault": one.fault, "seed": one.seed, "seconds": round(one.seconds, 1)}
    return {**kept, "did": dict(one.did), "broken": list(one.breaches), "recovered": recovered}


if __name__ == "__main__":
    main()
