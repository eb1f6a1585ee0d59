"""`python -m benchmarks.rebase.labelfree`: adapters brought to new weights without a label, by what the old ones say.

A small Llama that knows stories (benchmarks/tasks.py makes it) gets an adapter a task, is trained on with other
stories, and is taught by its old self with the adapter (`distil`): once on the tasks' prompts, once on texts that the
old one wrote from nothing. What is quoted is the recovery on test rows that nothing was chosen by,

    R(x) = (S(W2 + x) − S(W2)) ⁄ (S(W2 + retrained) − S(W2))

with the retrained adapter at the best of three rates, as the one on the old weights. Written between the marks in
docs/rebase.md.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks.tasks import Task, made, stories
from registry.core.recipes import Distil, FineTune, FullFineTune, Rebase, temperature_of
from tests.workers import factories
from workers.compute.evaluate import Suite, evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune_many
from workers.compute.full import tune, write_tuned
from workers.compute.lora import Adapter
from workers.compute.model import Model, Tokenizer, load
from workers.compute.panel import BARE
from workers.compute.rebase.distil import distil, write_lesson
from workers.compute.rebase.race import Chosen, as_raced
from workers.compute.rebase.signals import compare
from workers.compute.rebase.starts import Starts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
RATES = (2e-3, 4e-3, 8e-3)
STEPS, TAUGHT = 300, 200
UPGRADES = {"short": 20, "medium": 100, "long": 400}
"""Steps that the base is trained on for."""
TARGETS = {"inputs": 0.97, "texts": 0.90}


@dataclass(frozen=True)
class Cell:
    """One upgrade and task: scores on test rows, and how often the student's likeliest token is its teacher's."""

    upgrade: str
    drift: float
    task: str
    scores: Mapping[str, float]
    agreement: Mapping[str, float]

    def recovery(self, way: str) -> float:
        """R of a way: carry, inputs or texts."""
        bare = self.scores[BARE]
        return (self.scores[way] - bare) / (self.scores["retrained"] - bare)


def cells(scale: float = 1.0, upgrades: Mapping[str, int] = UPGRADES) -> Iterator[Cell]:
    """Every cell, upgrade by upgrade."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        old, tasks = made(folder, scale)
        model, tokenizer = load(old, "fp32")
        teachers = [_trained(model, tokenizer, task, scale) for task in tasks]
        asked = Distil(
            texts=max(8, round(512 * scale)), max_new_tokens=80, steps=max(3, round(TAUGHT * scale)),
            learning_rate=4e-3, batch_tokens=512, max_length=192, precision="fp32",
        )  # fmt: skip
        for task, teacher in zip(tasks, teachers, strict=True):
            surely = asked.model_copy(update={"temperature": temperature_of(task.metric)})
            for way, rows, how in (("inputs", task.train, surely), ("texts", [], asked)):
                write_lesson(model, tokenizer, how, teacher, rows, folder / way / task.name)
        for upgrade, steps in upgrades.items():
            yield from _upgraded(folder, upgrade, max(2, round(steps * scale)), tasks, teachers, asked, scale)


def _upgraded(
    folder: Path,
    upgrade: str,
    steps: int,
    tasks: Sequence[Task],
    teachers: Sequence[Adapter],
    asked: Distil,
    scale: float,
) -> Iterator[Cell]:
    old, new = folder / "base", folder / upgrade
    recipe = FullFineTune(
        base=factories.BASE, datasets=(factories.DATASET,), steps=steps, batch_tokens=1024, max_length=128,
        learning_rate=2e-3, warmup_steps=1, precision="fp32",
    )  # fmt: skip
    write_tuned(old, tune(old, recipe, stories(random.Random(7), 600, " while ")), new)
    model, tokenizer = load(new, "fp32")
    rebase = Rebase(
        tier="distil", adapter=factories.ADAPTER, old=factories.OTHER_BASE, base=factories.BASE, distil=asked
    )  # fmt: skip
    ways = [(place, way) for place in range(len(tasks)) for way in TARGETS]
    races = [
        distil(model, tokenizer, rebase, folder / way / tasks[place].name, Starts({"carry": teachers[place]}, {}))
        for place, way in ways
    ]
    chosen = {ways[at]: outcome for at, outcome in as_raced(model, tokenizer, races)}
    for place, task in enumerate(tasks):
        students: dict[str, Chosen] = {}
        for way in TARGETS:
            student = chosen[place, way]
            assert isinstance(student, Chosen), student
            students[way] = student
        adapters = {"carry": teachers[place], "retrained": _trained(model, tokenizer, task, scale)}
        adapters |= {way: student.trained.adapter for way, student in students.items()}
        found = evaluate(model, tokenizer, Suite(task.test, (task.metric,)), adapters)
        agreement = {way: student.candidates[student.candidate]["agreement"] for way, student in students.items()}
        agreement["carry"] = students["inputs"].starts["carry"]["agreement"]
        scores = {name: fmean(record.metrics[task.metric] for record in records) for name, records in found.items()}
        yield Cell(upgrade, compare(old, new).median or 0.0, task.name, scores, agreement)


def _trained(model: Model, tokenizer: Tokenizer, task: Task, scale: float) -> Adapter:
    """At the best of three rates, by rows that are not quoted."""
    recipes = [
        FineTune(
            base=factories.BASE, datasets=(factories.DATASET,), targets=("all-linear",), rank=16, alpha=32.0,
            learning_rate=rate, steps=max(3, round(STEPS * scale)), batch_tokens=256, max_length=192, precision="fp32",
        )
        for rate in RATES
    ]  # fmt: skip
    trained = finetune_many(model, tokenizer, [Training(recipe, task.train) for recipe in recipes])
    adapters = {str(place): run.adapter for place, run in enumerate(trained)}
    found = evaluate(model, tokenizer, Suite(task.calibration, (task.metric,)), adapters, bare=False)
    return adapters[max(found, key=lambda name: fmean(record.metrics[task.metric] for record in found[name]))]


def table(found: Sequence[Cell]) -> str:
    """Markdown: a row per cell, and the medians against their targets."""
    lines = [
        "| upgrade | ρ | task | bare | retrained | R: carry | inputs | own texts | agreement, likewise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in found:
        recovery = " | ".join(f"{cell.recovery(way):.2f}" for way in ("carry", *TARGETS))
        agreement = ", ".join(f"{cell.agreement[way]:.1%}" for way in ("carry", *TARGETS))
        lines.append(
            f"| {cell.upgrade} | {cell.drift:.2f} | {cell.task} | {cell.scores[BARE]:.3f} | "
            f"{cell.scores['retrained']:.3f} | {recovery} | {agreement} |"
        )
    carried = median(cell.recovery("carry") for cell in found)
    medians = []
    for way, target in TARGETS.items():
        middle = median(cell.recovery(way) for cell in found)
        medians.append(f"{middle:.2f} (≥ {target:g}: {'met' if middle >= target else '**missed**'})")
    lines.append(f"| median | | | | | {carried:.2f} | {' | '.join(medians)} | |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of all steps; below 1 nothing is written")
    scale = parser.parse_args().scale
    lines = table(list(cells(scale)))
    print(lines)
    if scale == 1:
        before, _, rest = PAGE.read_text().partition("<!-- labelfree -->\n")
        _, _, after = rest.partition("<!-- /labelfree -->")
        PAGE.write_text(f"{before}<!-- labelfree -->\n{lines}\n<!-- /labelfree -->{after}")


if __name__ == "__main__":
    main()
