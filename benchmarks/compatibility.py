"""The compatibility query over REST on PostgreSQL, 50 results, at 1 000, 10 000 and 100 000 adapters on 20 bases.

The questions vary over bases, fits, filters and pages, in an order drawn once and the same for every size; each is
asked by one client over one connection, and timed from the request to the parsed answer's last byte.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from registry.db.engine import Database
from tests import servers

from . import fill
from .house import Registry, fleet
from .table import Row, at_most

SIZES = (1_000, 10_000, 100_000)
ASKED = 400
LIMIT = 50
FILTERS: tuple[dict[str, str | int], ...] = (
    {},
    {"fit": "exact"},
    {"fit": "exact,derived,targets-equal"},
    {"fit": "exact,derived,targets-equal,same-shape"},
    {"alias": "prod"},
    {"fit": "exact,derived,targets-equal", "alias": "prod", "engine": "vllm", "max_rank": 32},
)


def run(scale: float = 1.0) -> list[Row]:
    sizes = [max(100, int(size * scale)) for size in SIZES]
    with (
        tempfile.TemporaryDirectory() as name,
        servers.postgres() as database,
        servers.seaweedfs() as storage,
        fleet(Path(name), database, storage, daemons=False) as registry,
    ):
        filled = fill.Filled(Database(database))
        filled.start()
        times, counts = {}, {}
        for size in sizes:
            filled.grow(size)
            times[size], counts[size] = _ask(registry, filled, max(20, int(ASKED * min(1.0, scale * 10))))
        filled.database.close()
    low, high = sizes[0], sizes[-1]
    figures = ", ".join(f"{size:,}: {_p95(times[size]):.1f} ms" for size in sizes)
    return [
        at_most(
            f"compatibility query, p95 at {LIMIT} results", _p95(times[high]), 50, unit="ms",
            note=f"{high:,} adapters, {2 * high:,} versions, {fill.BASES} bases, PostgreSQL, "
            f"{len(times[high])} questions of one client, {counts[high]:.0f} results on average, "
            f"median {statistics.median(times[high]):.1f} ms",
        ),
        at_most(
            f"compatibility query, p95 at {high:,} adapters against {low:,}", _p95(times[high]) / _p95(times[low]), 1.5,
            unit="×", note=f"flat means that only the page counts; p95 {figures}",
        ),
    ]  # fmt: skip


def _ask(registry: Registry, filled: fill.Filled, questions: int) -> tuple[list[float], float]:
    """Milliseconds per question, and results per answer."""
    draw = random.Random(1)
    times, results = [], 0
    with httpx.Client(base_url=registry.url, headers={"authorization": f"Bearer {registry.token}"}) as client:
        for number in range(questions + 20):
            base = draw.choice(filled.bases)
            wanted = dict(draw.choice(FILTERS)) | {"limit": LIMIT}
            path = f"/v1/bases/{base}/adapters"
            if draw.random() < 0.3:  # a later page
                cursor = client.get(path, params=wanted).json()["cursor"]
                if cursor is not None:
                    wanted["cursor"] = cursor
            began = time.perf_counter()
            answer = client.get(path, params=wanted)
            took = time.perf_counter() - began
            answer.raise_for_status()
            if number >= 20:  # the first ones warm up
                times.append(1000 * took)
                results += len(answer.json()["items"])
    return times, results / questions


def _p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]
