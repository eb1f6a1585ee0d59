"""How the best learning rate falls with the share of matrices that are targeted: what the default rate was fitted on.

    python -m benchmarks.rates BASE rows.jsonl [rows.jsonl …]        a base folder, and rows of one task per file

For each task and placement all rates go through one many-adapter run with equal rows and seeds; the rate with the
least loss on rows held out is the minimum of a parabola through the best and its neighbours, in logarithms. The
exponent is the slope of ln(best rate) over ln(share), with an intercept per task. It measures no claim of ours against
anybody, so it is no benchmark of `run`.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.workers import factories
from workers.compute.data import Row, parse_rows
from workers.compute.finetune import Task, finetune_many
from workers.compute.lora import LINEAR, target_modules
from workers.compute.model import Model, Tokenizer, load

PLACEMENTS = (
    ("q_proj",), ("down_proj",), ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"), ("all-linear",),
)  # fmt: skip
RATES = tuple(2e-3 * 2 ** (step / 2) for step in range(12))
SEEDS = (0,)


def losses(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Row], targets: tuple[str, ...], steps: int
) -> list[float]:
    """The loss on rows held out by rate, the mean over the seeds."""
    recipes = [
        factories.recipe(
            targets=targets, rank=8, alpha=16.0, learning_rate=rate, steps=steps, batch_tokens=256, max_length=256,
            seed=seed, held_out=0.2, look_every=steps,
        )
        for seed in SEEDS for rate in RATES
    ]  # fmt: skip
    trained = finetune_many(model, tokenizer, [Task(recipe, rows) for recipe in recipes])
    found = [run.held_out[-1][1] for run in trained]
    return [statistics.fmean(found[place :: len(RATES)]) for place in range(len(RATES))]


def best(values: Sequence[float]) -> float:
    """ln of the rate at the minimum of the parabola through the least value and its neighbours."""
    place = min(range(1, len(values) - 1), key=values.__getitem__)
    left, middle, right = values[place - 1 : place + 2]
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return math.log(RATES[place]) + max(-1.0, min(1.0, shift)) * math.log(RATES[1] / RATES[0])


def slope(points: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """Least squares of y over x with an intercept per task, and the slope's standard error."""
    tasks = {task for task, _, _ in points}
    middle = {}
    for task in tasks:
        xs, ys = zip(*((x, y) for name, x, y in points if name == task), strict=True)
        middle[task] = statistics.fmean(xs), statistics.fmean(ys)
    centred = [(x - middle[task][0], y - middle[task][1]) for task, x, y in points]
    spread = sum(x * x for x, _ in centred)
    found = sum(x * y for x, y in centred) / spread
    rest = sum((y - found * x) ** 2 for x, y in centred)
    return found, math.sqrt(rest / max(1, len(points) - len(tasks) - 1) / spread)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the losses, the best rates and the exponent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--most", type=int, default=1500, help="rows taken of a file")
    args = parser.parse_args(argv)
    model, tokenizer = load(args.base, "fp32")
    linear = [module for module in model.modules() if isinstance(module, LINEAR)]
    count = len(linear) - (model.get_output_embeddings() in linear)
    points = []
    print("task", "targets", "share", "best rate", *(f"{rate:.3g}" for rate in RATES), sep="\t")
    for path in args.rows:
        rows = parse_rows(path.read_bytes(), path.name)[: args.most]
        for targets in PLACEMENTS:
            share = len(target_modules(model, targets)) / count
            found = losses(model, tokenizer, rows, targets, args.steps)
            points.append((path.stem, math.log(share), best(found)))
            shown = (f"{value:.4f}" for value in found)
            print(path.stem, "+".join(targets), f"{share:.3f}", f"{math.exp(points[-1][2]):.2e}", *shown, sep="\t")
            sys.stdout.flush()
    found_slope, error = slope(points)
    print(f"best rate ~ share^{found_slope:.3f} (standard error {error:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
