"""What the upgrades of a benchmark start from: a base, tasks of `benchmarks.tasks`, and adapters of them on it."""

import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import transformers

from registry.core.recipes import FineTune
from registry.core.records import Record
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune_many
from workers.compute.lora import Adapter
from workers.compute.model import load
from workers.compute.weights import write_adapter

from ..tasks import Task, given, made, rows_of, texts
from .upgrades import Texts, trained_on

STEPS, RANK, ITEMS = 300, 8, 2400
OLD, NEW = "b3:" + "1" * 64, "b3:" + "2" * 64
SOME = "sha256:" + "3" * 64


@dataclass(frozen=True)
class Size:
    """What suits a model of some size."""

    rates: tuple[float, ...]
    """Of adapters, to take the best of."""
    gently: float
    """What the rates of its successors' training are multiplied by."""
    ends: bool
    """Whether it has seen where texts end: one that never did answers rightly and goes on, and is never right."""


SMALL = Size((2e-3, 4e-3, 8e-3), 1.0, ends=False)
LARGE = Size((5e-4, 1e-3, 2e-3), 0.1, ends=True)
_IS_LARGE = 50 << 20
"""Bytes of a base's weights."""


def size_of(base: Path) -> Size:
    """By the size of its files."""
    return LARGE if sum(file.stat().st_size for file in base.glob("*.safetensors")) > _IS_LARGE else SMALL


@dataclass(frozen=True)
class Setup:
    """What all upgrades start from."""

    base: Path
    tasks: Sequence[Task]
    folder: Path
    seeds: int
    scale: float
    size: Size = SMALL
    threads: int = 1

    def suite(self, task: Task) -> Suite:
        """All items of a task; words that are chosen from are written: a pass an item, not a pass a word."""
        rows = rows_of([written(row) for row in task.test])
        return Suite(rows, (metric_of(task),), max_new_tokens=12)

    def adapter(self, task: Task, seed: int) -> Path:
        """That of the old base."""
        return self.folder / f"adapter-{self.tasks.index(task)}-{seed}"


def metric_of(task: Task) -> str:
    """What a task is measured by."""
    return "likelihood" if task.metric == "likelihood" else "exact-match"


def written(row: Row) -> dict[str, Any]:
    """A row whose answer is written: of one to choose from, the right choice."""
    if "choices" not in row.value:
        return row.value
    return {"prompt": row.value["prompt"], "completion": row.value["choices"][row.value["answer"]]}


def prepared(
    folder: Path, seeds: int, scale: float, named: Sequence[str] = (), items: int = ITEMS, threads: int = 1
) -> Setup:
    """Base, tasks (those whose names hold one of the words, or all), and their adapters, each at the best of its rates.

    ``threads``: of each upgrade.
    """
    found = given(items, more=True)
    base, tasks = found or made(folder / "made", scale)
    tasks = [task for task in tasks if any(word in task.name for word in named) or not named]
    if not tasks:
        raise SystemExit(f"No task is called by {', '.join(named)}.")
    size = size_of(base)
    if found and not size.ends:
        base = _ending(base, folder / "old" / base.name, scale)
    setup = Setup(base, tasks, folder, seeds, scale, size, threads)
    rates, adapters, _ = at_their_best(setup, setup.base)
    for number, task in enumerate(tasks):
        for seed, adapter in enumerate(adapters[number], start=1):
            write_adapter(adapter, setup.adapter(task, seed), base=OLD, recipe=SOME)
        _write_rows(folder / f"suite-{number}", setup.suite(task).rows, metric_of(task))
        _write_rows(folder / f"rows-{number}", task.train)
    (folder / "rates.json").write_text(json.dumps(rates))
    return setup


def _ending(base: Path, folder: Path, scale: float) -> Path:
    """A base that has seen where texts end."""
    folder.parent.mkdir()
    trained_on(100, 1e-3, seed=9)(base, Texts(*texts()), folder, scale)
    return folder


def at_their_best(setup: Setup, base: Path) -> tuple[list[float], list[list[Adapter]], float]:
    """By task the rate that does best on rows aside with the first seed, and an adapter a seed at it; the seconds of
    one."""
    model, tokenizer = load(base, "fp32")
    rates = setup.size.rates
    began = time.process_time()
    tried = trained(model, tokenizer, setup, [(task, rate, 1) for task in setup.tasks for rate in rates])
    seconds = (time.process_time() - began) / len(tried)
    best, first = [], []
    for number, task in enumerate(setup.tasks):
        rows = rows_of([written(row) for row in task.calibration])
        some = dict(zip(rates, tried[number * len(rates) :], strict=False))
        named = {str(rate): adapter for rate, adapter in some.items()}
        records = evaluate(model, tokenizer, Suite(rows, (metric_of(task),), max_new_tokens=12), named, bare=False)
        best.append(max(rates, key=lambda rate: mean_of(records[str(rate)], metric_of(task))))
        first.append(some[best[-1]])
    more = range(2, setup.seeds + 1)
    asked = [(task, rate, seed) for task, rate in zip(setup.tasks, best, strict=True) for seed in more]
    others = iter(trained(model, tokenizer, setup, asked) if asked else [])
    return best, [[one, *islice(others, len(more))] for one in first], seconds


def chosen_rates(setup: Setup) -> list[float]:
    """By task, the rate that its adapters on the old base were trained at."""
    found: list[float] = json.loads((setup.folder / "rates.json").read_text())
    return found


def recipe(setup: Setup, rate: float, seed: int, base: str = OLD) -> FineTune:
    """The recorded recipe of an adapter."""
    return FineTune(
        base=base, datasets=(SOME,), targets=("all-linear",), rank=RANK, alpha=2.0 * RANK, learning_rate=rate,
        steps=max(8, round(STEPS * setup.scale)), batch_tokens=256, max_length=256, long_rows="drop",
        warmup_steps=4, precision="fp32", seed=seed,
    )  # fmt: skip


def trained(
    model: Any, tokenizer: Any, setup: Setup, asked: Sequence[tuple[Task, float, int]], steps: int | None = None
) -> list[Adapter]:
    """An adapter for each task, rate and seed, all in one run; ``steps`` in place of the recorded ones."""
    recipes = [recipe(setup, rate, seed) for _, rate, seed in asked]
    recipes = [each.model_copy(update={"steps": steps or each.steps}) for each in recipes]
    tasks = [Training(each, task.train) for each, (task, _, _) in zip(recipes, asked, strict=True)]
    return [run.adapter for run in finetune_many(model, tokenizer, tasks)]


def _write_rows(folder: Path, rows: Sequence[Row], metric: str | None = None) -> None:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.value) + "\n" for row in rows))
    if metric is not None:
        (folder / "suite.json").write_text(json.dumps({"metrics": [metric], "max_new_tokens": 12}))


def mean_of(records: Sequence[Record], metric: str, split: str | None = None) -> float:
    """The mean of a metric over the records, or over those of one split."""
    return statistics.fmean(r.metrics[metric] for r in records if split is None or r.split == split)


def quiet() -> None:
    """Nothing of transformers' own is shown."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
