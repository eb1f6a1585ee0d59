"""`python -m benchmarks.rebase.rates`: how fast a start may be trained that is good already.

Adapters of the ladder's tasks are carried to successors of their base and trained on for a few steps, at the recorded
rate and at shares of it, held to the start; beside them the start itself and a fresh adapter at the recorded rate.
A second table does the same for what the old base teaches (`distil`), by answers that it draws and by its likeliest
ones. Scores are of the report split, in points for what is right or wrong, else in nats a byte. Written between the
marks in docs/rebase.md; why warm starts and distillations take the rates that they take is in docs/adr/0029.

Model and tasks are those of `benchmarks.tasks`.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

from registry.core.recipes import PULL, Rebase
from registry.core.records import item_id, split_of
from workers.compute.evaluate import evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune_many
from workers.compute.lora import Adapter, restarted
from workers.compute.model import Model, Tokenizer, load
from workers.compute.rebase.carry import carry
from workers.compute.rebase.distil import read_lesson, steps_of, write_lesson
from workers.compute.weights import read_adapter

from ..run import machine
from ..tasks import texts
from .decided import PAGE
from .ladder import distilled
from .setting import NEW, OLD, SOME, Setup, chosen_rates, metric_of, prepared, quiet, recipe
from .upgrades import Texts, upgrades

UPGRADES = ("medium training", "domain merged in")
STEPS = (20, 60)
SHARES = {"1": 1, "⅓": 3, "⅒": 10, "1⁄30": 30}
FRESH = "fresh"
COLUMNS = ("upgrade", "task", "carried", *(f"{steps} steps: {at}" for steps in STEPS for at in (*SHARES, FRESH)))
TEACHERS = {"drawn": 1.0, "likeliest": 0.0}
"""At which temperature answers are written."""
TAUGHT = {"1, free": (1, 0.0), "1": (1, PULL), "⅓": (3, PULL), "⅓, free": (3, 0.0), "⅒": (10, PULL)}
"""What the recorded rate is divided by, and the pull to the start."""
LESSONS = ("upgrade", "task", "carried", *(f"{way}: {at}" for way in TEACHERS for at in TAUGHT))
Rows = Sequence[Sequence[str]]


def rows(setup: Setup, upgrade: str) -> tuple[Rows, Rows]:
    """Of both tables a row a task: what each rate makes of the carried adapter."""
    quiet()
    torch.set_num_threads(1)
    new = setup.folder / upgrade.replace(" ", "-")
    upgrades(setup.base, setup.size.gently)[upgrade](setup.base, Texts(*texts()), new, setup.scale)
    starts = [carry(read_adapter(setup.adapter(task, 1)), setup.base, new) for task in setup.tasks]
    asked = [_trainings(setup, place, starts[place]) for place in range(len(setup.tasks))]
    lessons = [_lessons(setup, place, starts[place], new) for place in range(len(setup.tasks))]
    model, tokenizer = load(new, "fp32")
    first, second = (_measured(setup, upgrade, starts, some, model, tokenizer) for some in (asked, lessons))
    return first, second


def _trainings(setup: Setup, place: int, start: Adapter) -> list[Training]:
    """In the order of `COLUMNS`."""
    task, rate = setup.tasks[place], chosen_rates(setup)[place]
    asked = []
    for steps in STEPS:
        few = recipe(setup, rate, 1, NEW).model_copy(update={"steps": steps})
        gentle = [few.model_copy(update={"learning_rate": rate / by, "pull": PULL}) for by in SHARES.values()]
        asked += [
            *(Training(each, task.train, start) for each in gentle),
            Training(few, task.train, restarted(start, 1)),
        ]
    return asked


def _lessons(setup: Setup, place: int, start: Adapter, new: Path) -> list[Training]:
    """In the order of `LESSONS`."""
    task, rate = setup.tasks[place], chosen_rates(setup)[place]
    model, tokenizer = load(setup.base, "fp32")
    asked: list[Training] = []
    for way, temperature in TEACHERS.items():
        taught = distilled(recipe(setup, rate, 1, NEW), metric_of(task)).model_copy(update={"temperature": temperature})
        folder = setup.folder / f"{new.name}-{place}-{way}"
        write_lesson(model, tokenizer, taught, read_adapter(setup.adapter(task, 1)), task.train, folder)
        examples = read_lesson(folder, tokenizer).examples
        plain = steps_of(Rebase(tier="distil", adapter=SOME, old=OLD, base=NEW, distil=taught, inputs=SOME))
        assert plain is not None
        for by, pull in TAUGHT.values():
            gentle = plain.model_copy(update={"learning_rate": rate / by, "pull": pull})
            asked.append(Training(gentle, examples, start))
    return asked


def _measured(
    setup: Setup, upgrade: str, starts: Sequence[Adapter], asked: Sequence[Sequence[Training]],
    model: Model, tokenizer: Tokenizer,
) -> Rows:  # fmt: skip
    trained = iter([run.adapter for run in finetune_many(model, tokenizer, [one for some in asked for one in some])])
    found = []
    for place, task in enumerate(setup.tasks):
        members = {
            str(number): adapter for number, adapter in enumerate([starts[place], *islice(trained, len(asked[place]))])
        }
        found.append([upgrade, task.name, *_scores(setup, place, members, model, tokenizer)])
    return found


def _scores(setup: Setup, number: int, members: dict[str, Adapter], model: Model, tokenizer: Tokenizer) -> list[str]:
    task = setup.tasks[number]
    suite, metric = setup.suite(task), metric_of(task)
    report = replace(suite, rows=[row for row in suite.rows if split_of(item_id(row.value)) == "report"])
    records = evaluate(model, tokenizer, report, members, bare=False)
    means = [statistics.fmean(record.metrics[metric] for record in records[name]) for name in members]
    return [f"{mean:.3f}" if metric == "likelihood" else f"{100 * mean:.1f}" for mean in means]


def table(columns: Sequence[str], found: Rows) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *found))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.5, help="share of the adapters' steps")
    asked = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORACTL_BENCH_DIR")) as scratch:
        setup = prepared(Path(scratch), 1, asked.scale)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            found = list(pool.map(rows, [setup] * len(UPGRADES), UPGRADES))
        about = f"Measured: {machine()}, {setup.base.name}, one seed, steps of the adapters × {asked.scale}."
    tables = [table(columns, [row for each in found for row in each[place]])
              for place, columns in enumerate((COLUMNS, LESSONS))]  # fmt: skip
    before, _, rest = PAGE.read_text().partition("<!-- rates -->\n")
    _, _, after = rest.partition("<!-- /rates -->")
    shown = "\n\n".join([tables[0], "Distilled:", tables[1], about])
    PAGE.write_text(f"{before}<!-- rates -->\n{shown}\n<!-- /rates -->{after}")


if __name__ == "__main__":
    main()
