"""`python -m benchmarks.rebase.rates`: how fast a start may be trained that is good already.

Adapters of the ladder's tasks are carried to successors of their base and trained on for a few steps, at the recorded
rate and at shares of it, held to the start; beside them the start itself and a fresh adapter at the recorded rate.
Scores are of the report split, in points for what is right or wrong, else in nats a byte. Written between the marks in
docs/rebase.md; why the warm start takes the rates that it takes is in docs/adr/0029.

Model and tasks are those of `benchmarks.tasks`.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from registry.core.records import item_id, split_of
from workers.compute.evaluate import evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune_many
from workers.compute.lora import Adapter, restarted
from workers.compute.model import Model, Tokenizer, load
from workers.compute.rebase.carry import carry
from workers.compute.rebase.warm_start import PULL
from workers.compute.weights import read_adapter

from ..run import machine
from ..tasks import texts
from .ladder import NEW, PAGE, Setup, chosen_rates, metric_of, prepared, quiet, recipe
from .upgrades import Texts, upgrades

UPGRADES = ("medium training", "domain merged in")
STEPS = (20, 60)
SHARES = {"1": 1, "⅓": 3, "⅒": 10, "1⁄30": 30}
FRESH = "fresh"
COLUMNS = ("upgrade", "task", "carried", *(f"{steps} steps: {at}" for steps in STEPS for at in (*SHARES, FRESH)))


def rows(setup: Setup, upgrade: str) -> list[list[str]]:
    """A row a task: what each rate makes of the carried adapter."""
    new = setup.folder / upgrade.replace(" ", "-")
    upgrades(setup.base)[upgrade](setup.base, Texts(*texts()), new, setup.scale)
    model, tokenizer = load(new, "fp32")
    starts = [carry(read_adapter(setup.adapter(task, 1)), setup.base, new) for task in setup.tasks]
    asked: list[Training] = []
    for task, rate, start in zip(setup.tasks, chosen_rates(setup), starts, strict=True):
        for steps in STEPS:
            for by in SHARES.values():
                gentle = recipe(setup, rate / by, 1, NEW).model_copy(update={"steps": steps, "pull": PULL})
                asked.append(Training(gentle, task.train, start))
            full = recipe(setup, rate, 1, NEW).model_copy(update={"steps": steps})
            asked.append(Training(full, task.train, restarted(start, 1)))
    trained = [run.adapter for run in finetune_many(model, tokenizer, asked)]
    each = len(trained) // len(setup.tasks)
    found = []
    for number, (task, start) in enumerate(zip(setup.tasks, starts, strict=True)):
        members = dict(zip(COLUMNS[2:], [start, *trained[number * each : (number + 1) * each]], strict=True))
        found.append([upgrade, task.name, *_scores(setup, number, members, model, tokenizer)])
    return found


def _scores(setup: Setup, number: int, members: dict[str, Adapter], model: Model, tokenizer: Tokenizer) -> list[str]:
    task = setup.tasks[number]
    suite, metric = setup.suite(task), metric_of(task)
    report = replace(suite, rows=[row for row in suite.rows if split_of(item_id(row.value)) == "report"])
    records = evaluate(model, tokenizer, report, members, bare=False)
    means = [statistics.fmean(record.metrics[metric] for record in records[name]) for name in members]
    return [f"{mean:.3f}" if metric == "likelihood" else f"{100 * mean:.1f}" for mean in means]


def table(found: Sequence[Sequence[str]], about: str) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(f"| {' | '.join(row)} |" for row in found)]
    return "\n".join([*lines, "", about])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.5, help="share of the adapters' steps")
    asked = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORACTL_BENCH_DIR")) as scratch:
        setup = prepared(Path(scratch), 1, asked.scale)
        found = [row for upgrade in UPGRADES for row in rows(setup, upgrade)]
        about = f"Measured: {machine()}, {setup.base.name}, one seed, steps of the adapters × {asked.scale}."
    before, _, rest = PAGE.read_text().partition("<!-- rates -->\n")
    _, _, after = rest.partition("<!-- /rates -->")
    PAGE.write_text(f"{before}<!-- rates -->\n{table(found, about)}\n<!-- /rates -->{after}")


if __name__ == "__main__":
    main()
