"""The LoRA paper's own claim (Hu et al. 2021, arXiv:2106.09685, sections 4 and 5) at our scale: as good as full
fine-tuning, with a fraction of what is trained, stored and held in memory.

For each task LoRA and full fine-tuning get the same rows, steps and schedule, each at the best of its rates: chosen on
calibration rows, quoted on test rows that nothing was chosen by, over `SEEDS` orders of the rows (and beginnings of A).
What is quoted is the share of full fine-tuning's gain over the bare base that LoRA gets, with the 95 % interval of
their difference by item: items by the gate's own intervals (score limits for right or wrong, bootstrap by clusters for
likelihood), seeds by Student's t, the two half-widths added as squares. The claim is met where the lower end is above
nine tenths of the gain.

Model and tasks are those of `tasks`.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from registry.core.gate import mean_interval, score_interval, student_quantile
from registry.core.recipes import FineTune, FullFineTune
from registry.core.records import Record
from tests.workers import factories
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune, finetune_many
from workers.compute.full import tune, write_tuned
from workers.compute.lora import fresh
from workers.compute.model import load
from workers.compute.weights import write_adapter

from .house import Memory, apart
from .table import Row as Line
from .table import at_least
from .tasks import Task, given, made

SEEDS, STEPS, BATCH, RANK = 4, 300, 256, 16
MARGIN = 0.1
LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LINEARS = ("self_attn", "mlp")
"""What LoRA patches here: embedding and head, which are one, stay."""
ALPHA = 0.025
"""Of each end of an interval."""


def run(scale: float = 1.0) -> list[Line]:
    steps, seeds = max(4, round(STEPS * scale)), SEEDS if scale >= 0.1 else 2
    with tempfile.TemporaryDirectory() as folder:
        base, tasks = given() or made(Path(folder), scale)
        tasks, workers = (tasks, os.cpu_count()) if scale >= 0.1 else ([_few(tasks[-1])], 1)
        # A product of so small a model is no work for two threads: a process a core.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            asked = [
                [pool.submit(way, base, task, steps, seeds) for way in (_lora, _full, _bare)] for task in tasks
            ]
            alike = pool.submit(_full, base, tasks[-1], steps, seeds, LINEARS)
            found = [[each.result() for each in of_task] for of_task in asked]
            lines = [
                _line(task, steps, ours, theirs, bare) for task, (ours, theirs, bare) in zip(tasks, found, strict=True)
            ]
            ours, _, bare = found[-1]
            lines.append(_line(tasks[-1], steps, ours, alike.result(), bare, "full fine-tuning of the same matrices"))
    return [*lines, *_sizes(scale)]


def _few(task: Task) -> Task:
    return replace(task, calibration=task.calibration[:8], test=task.test[:8], clusters=task.clusters[:8])


def _one_thread() -> None:
    torch.set_num_threads(1)


# ── quality ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Found:
    """At which rate, and what each item of the test was worth, by seed."""

    rate: float
    values: Sequence[Sequence[float]]

    @property
    def mean(self) -> float:
        """Over seeds and items."""
        return statistics.fmean(map(statistics.fmean, self.values))


def _line(
    task: Task, steps: int, ours: Found, theirs: Found, bare: Found, peer: str = "full fine-tuning"
) -> Line:
    difference, half = _difference(ours.values, theirs.values, task)
    low, high, gained = difference - half, difference + half, theirs.mean - bare.mean
    unit = "of items" if task.metric == "accuracy" else "nat a byte"
    return Line(
        claim=f"LoRA's gain over that of {peer}, each at its best rate: {task.name}",
        measured=(ours.mean - bare.mean) / gained, unit="×", target=f"lower end ≥ {1 - MARGIN:g}",
        passed=(gained + low) / gained >= 1 - MARGIN,
        peer=f"{peer}, {theirs.mean:.4g} {unit}; bare base, {bare.mean:.4g}",
        note=f"{ours.mean:.4g}; 95 % interval of the difference {low:+.2g} to {high:+.2g}, of the share "
        f"{1 + low / gained:.3g} to {1 + high / gained:.3g}; rates {ours.rate:g} and {theirs.rate:g}; rank {RANK} on "
        f"all linears, {steps} steps of {BATCH} tokens, {len(task.test)} items, {len(ours.values)} seeds",
    )  # fmt: skip


def _lora(base: Path, task: Task, steps: int, seeds: int) -> Found:
    model, tokenizer = load(base, "fp32")

    def scored(rates: Sequence[float], some: Sequence[int], rows: Sequence[Row]) -> list[list[float]]:
        options = _common(steps) | {"targets": ("all-linear",), "rank": RANK, "alpha": 2.0 * RANK}
        recipes = [FineTune(**options, learning_rate=rate, seed=seed) for rate in rates for seed in some]
        trained = finetune_many(model, tokenizer, [Training(recipe, task.train) for recipe in recipes])
        adapters = {str(place): each.adapter for place, each in enumerate(trained)}
        found = evaluate(model, tokenizer, Suite(rows, (task.metric,)), adapters, bare=False)
        return [_values(found[name], task) for name in adapters]

    return _at_its_best(scored, LORA_RATES, task, seeds)


def _full(base: Path, task: Task, steps: int, seeds: int, parameters: tuple[str, ...] = ()) -> Found:
    def scored(rates: Sequence[float], some: Sequence[int], rows: Sequence[Row]) -> list[list[float]]:
        options = _common(steps) | {"parameters": parameters}
        recipes = [FullFineTune(**options, learning_rate=rate, seed=seed) for rate in rates for seed in some]
        return [_tuned(base, recipe, task, rows) for recipe in recipes]

    return _at_its_best(scored, FULL_RATES, task, seeds)


def _bare(base: Path, task: Task, _steps: int, _seeds: int) -> Found:
    model, tokenizer = load(base, "fp32")
    return Found(0.0, [_values(evaluate(model, tokenizer, Suite(task.test, (task.metric,)), {})["bare"], task)])


Scored = Callable[[Sequence[float], Sequence[int], Sequence[Row]], list[list[float]]]


def _at_its_best(scored: Scored, rates: Sequence[float], task: Task, seeds: int) -> Found:
    means = map(statistics.fmean, scored(rates, [0], task.calibration))
    best = max(zip(rates, means, strict=True), key=lambda each: each[1])[0]
    return Found(best, scored([best], range(1, seeds + 1), task.test))  # seed 0, which chose the rate, is flattered


def _common(steps: int) -> dict[str, Any]:
    return {
        "base": factories.BASE, "datasets": (factories.DATASET,), "steps": steps, "batch_tokens": BATCH,
        "max_length": BATCH, "long_rows": "drop", "precision": "fp32", "warmup_steps": min(10, steps - 1),
    }  # fmt: skip


def _tuned(base: Path, recipe: FullFineTune, task: Task, rows: Sequence[Row]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        write_tuned(base, tune(base, recipe, task.train), Path(folder) / "out")
        model, tokenizer = load(Path(folder) / "out", "fp32")
        return _values(evaluate(model, tokenizer, Suite(rows, (task.metric,)), {})["bare"], task)


def _values(records: Sequence[Record], task: Task) -> list[float]:
    return [record.metrics[task.metric] for record in records]


def _difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], task: Task
) -> tuple[float, float]:
    """The mean of ours − theirs, and the half-width of its interval over items and seeds."""
    by_seed = [
        [a - b for a, b in zip(left, right, strict=True)] for left, right in zip(ours, theirs, strict=True)
    ]
    by_item = [statistics.fmean(each) for each in zip(*by_seed, strict=True)]
    if task.metric == "accuracy":
        gains, losses = (
            round(statistics.fmean(sum(sign * value > 0 for value in seed) for seed in by_seed)) for sign in (1, -1)
        )
        low, high = score_interval(gains, losses, len(by_item), ALPHA)
    else:
        low, high = mean_interval(by_item, ALPHA, clusters=task.clusters)
    means = [statistics.fmean(seed) for seed in by_seed]
    spread = student_quantile(1 - ALPHA, len(means) - 1) * statistics.stdev(means) / math.sqrt(len(means))
    return statistics.fmean(by_item), math.hypot((high - low) / 2, spread)


# ── what it takes ────────────────────────────────────────────────────────────


def _sizes(scale: float) -> list[Line]:
    """The paper's ratios: parameters of its largest shape, and the file and the memory of one that fits here."""
    weights, factors = _of_the_largest()
    layers = 12 if scale >= 0.5 else 2
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        many = _save_wide(base, layers)
        full, full_bytes = apart(_trained_fully, base)
        lora, lora_bytes = apart(_trained_lora, base)
    shape = f"Llama of {many / 1e6:.0f} million parameters, fp32, rank 4 on q and v"
    return [
        at_least("parameters of a full fine-tuning over LoRA's, 175 B, rank 4 on q and v", weights / factors, 9000,
                 peer=f"{weights / 1e9:.1f} B parameters", note=f"{factors / 1e6:.1f} million; the paper says 10,000"),
        at_least("file of a full fine-tuning over LoRA's", full_bytes / lora_bytes, 500,
                 peer=f"{full_bytes / 1e6:.0f} MB", note=f"{lora_bytes / 1e6:.2f} MB; {shape}"),
        at_least("memory of a full fine-tuning over LoRA's", full / lora, 3,
                 peer=f"{full:,.0f} MB above imports",
                 note=f"{lora:,.0f} MB, 64 tokens a step; the paper says 3; {shape}"),
    ]  # fmt: skip


def _of_the_largest() -> tuple[int, int]:
    """Parameters of a model of GPT-3's shape, made without values, and of an adapter for it."""
    config = OPTConfig(hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96,
                       word_embed_proj_dim=12288, max_position_embeddings=2048)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    adapter = fresh(model, factories.recipe(rank=4, targets=("q_proj", "v_proj")))
    return weights, sum(patch.a_RI.numel() + patch.b_OR.numel() for patch in adapter.patches.values())


def _save_wide(folder: Path, layers: int) -> int:
    model = factories.llama(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=12, initializer_range=0.02,
    )  # fmt: skip
    factories.saved(model, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(work: Callable[[Callable[[dict[str, Any]], None]], Path]) -> tuple[float, int]:
    """MB that a training holds at most until its last step, above imports; bytes of the weights that it leaves."""
    before, peaks = Memory.of(os.getpid()), []
    folder = work(lambda _: peaks.append(before.growth()))
    return peaks[-1], sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _trained_fully(base: Path) -> tuple[float, int]:
    recipe = FullFineTune(base=factories.BASE, datasets=(factories.DATASET,), steps=3, batch_tokens=64,
                          max_length=64, precision="fp32")  # fmt: skip

    def work(report: Callable[[dict[str, Any]], None]) -> Path:
        write_tuned(base, tune(base, recipe, factories.rows(), report=report), base.parent / "tuned")
        return base.parent / "tuned"

    return _measured(work)


def _trained_lora(base: Path) -> tuple[float, int]:
    recipe = factories.recipe(rank=4, targets=("q_proj", "v_proj"), steps=3, batch_tokens=64)

    def work(report: Callable[[dict[str, Any]], None]) -> Path:
        trained = finetune(*load(base, "fp32"), recipe, factories.rows(), report=report)
        write_adapter(trained.adapter, base.parent / "lora", base=factories.BASE, recipe="sha256:" + "0" * 64)
        return base.parent / "lora"

    return _measured(work)
