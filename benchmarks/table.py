"""A row of the benchmark table: one claim, what was measured in one run beside its peer, and the target."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One measured claim."""

    claim: str
    measured: float
    unit: str
    """Such as "×" for a ratio to the peer, "MB", "ms"."""
    target: str
    """As written in the claim, such as "≥ 0.9"."""
    peer: str
    """What it was measured against, in the same run, with its own figure; empty without one."""
    passed: bool
    note: str = ""


def at_least(claim: str, measured: float, limit: float, *, unit: str = "×", peer: str = "", note: str = "") -> Row:
    """A row that passes from ``limit`` upwards."""
    return Row(claim, measured, unit, f"≥ {limit:g}", peer, measured >= limit, note)


def at_most(claim: str, measured: float, limit: float, *, unit: str, peer: str = "", note: str = "") -> Row:
    """A row that passes up to ``limit``."""
    return Row(claim, measured, unit, f"≤ {limit:g}", peer, measured <= limit, note)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best time of each of ``works``, run in turn so that a slow minute of the machine meets all of them."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    return best
