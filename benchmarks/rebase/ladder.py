"""`python -m benchmarks.rebase.ladder`: adapters carried over to successors of their base by every tier of the cascade.

Each cell is one upgrade, one task and one seed: an adapter trained on the old base, and what every tier makes of it on
the new one, by the very recipes that a campaign runs. The retrained reference is the best of three rates on the new
base, at the recorded steps with a rate that ends at zero; cells in which it gains next to nothing are left out. Quoted,
on a split that nothing was chosen by, is

    recovery  R = (S(W2 + x) − S(W2)) ⁄ (S(W2 + retrained) − S(W2))

and what the gate says, on a split of its own. What was decided is the first tier that passes, in the order of costs;
an adapter that nothing passes for stays frozen, and counts with what then serves on the new base: nothing. The same is
told of other ways of deciding. Costs are seconds of a processor, which whoever else works on it does not lengthen.

Model and tasks are those of `benchmarks.tasks`. Upgrades that are done are kept in docs/ladder.json, by model; the
tables and the plot of docs/rebase.md are made from all of them. Peers: what is carried as it is is PortLLM
(arXiv:2410.10870).
"""

import argparse
import datetime as dt
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from registry.core.digest import Digest
from registry.core.errors import LoractlError
from registry.core.gate import Zone, judge, mean_gain, shares
from registry.core.policy import Gate, Margin, Policy
from registry.core.recipes import UNTRAINED, Distil, FineTune, Rebase, Tier, temperature_of
from registry.core.records import Record, item_id
from workers.compute.evaluate import evaluate
from workers.compute.lora import Adapter
from workers.compute.model import load
from workers.compute.rebase.distil import steps_of
from workers.compute.rebase.signals import compare
from workers.compute.rebase.starts import equal
from workers.compute.weights import read_adapter
from workers.run import run as run_recipe
from workers.run import run_together

from ..run import machine
from ..tasks import Task, texts
from .decided import OTHER_SHAPE, PAGE, REFERENCE, SAME_SHAPE, SCRATCH, Cell, table, write_page
from .setting import (
    ITEMS,
    NEW,
    OLD,
    SOME,
    Setup,
    at_their_best,
    chosen_rates,
    mean_of,
    metric_of,
    prepared,
    quiet,
    recipe,
    trained,
    written,
)
from .upgrades import SHAPES, Texts, upgrades

STORE = PAGE.with_name("ladder.json")


def upgraded(name: str, setup: Setup) -> list[Cell]:
    """Every cell of one upgrade."""
    torch.set_num_threads(setup.threads)
    torch.set_grad_enabled(True)
    quiet()
    new = setup.folder / name.replace(" ", "-")
    upgrades(setup.base, setup.size.gently)[name](setup.base, Texts(*texts()), new, setup.scale)
    drift = compare(setup.base, new).median
    rates, reference, each = at_their_best(setup, new)
    model, tokenizer = load(new, "fp32")
    asked = [(task, rate, s) for task, rate in zip(setup.tasks, rates, strict=True) for s in range(1, setup.seeds + 1)]
    began = time.process_time()
    few = _few(recipe(setup, 1.0, 0))
    scratch = trained(model, tokenizer, setup, asked, few)
    short = (time.process_time() - began) / len(asked)
    made = _made(setup, new)
    cells: list[Cell] = []
    for number, task in enumerate(setup.tasks):
        mine = slice(number * setup.seeds, (number + 1) * setup.seeds)
        told = [made[number, seed] for seed in range(1, setup.seeds + 1)]
        candidates = {f"{seed} {REFERENCE}": adapter for seed, adapter in enumerate(reference[number], start=1)}
        candidates |= {f"{seed} {SCRATCH}": adapter for seed, adapter in enumerate(scratch[mine], start=1)}
        for seed, own in enumerate(told, start=1):
            candidates |= {f"{seed} {tier}": adapter for tier, adapter in own.adapters.items()}
        began = time.process_time()
        same = {name: _first_of(candidates, adapter) for name, adapter in candidates.items()}
        found = evaluate(model, tokenizer, setup.suite(task), {name: candidates[name] for name in same.values()})
        gate = (time.process_time() - began) / len(found)
        records = found | {name: found[first] for name, first in same.items()}
        served = _served(setup, task)
        retrained = statistics.fmean(mean_of(records[f"{s} {REFERENCE}"], metric_of(task), "report")
                                     for s in range(1, setup.seeds + 1))  # fmt: skip
        for seed, own in enumerate(told, start=1):
            costs = own.costs | {REFERENCE: (recipe(setup, 1.0, seed).steps, each), SCRATCH: (few, short)}
            bare = mean_of(records["bare"], metric_of(task), "report")
            common: dict[str, Any] = {"upgrade": name, "task": task.name, "seed": seed, "drift": drift, "bare": bare}
            common |= {"retrained": retrained, "gate": gate}
            common["served"] = mean_of(served[str(seed)], metric_of(task), "report")
            alone = dict.fromkeys((REFERENCE, SCRATCH), Policy().alpha)
            alphas = dict[str, float](shares(Policy().alpha, list(own.adapters)).items()) | alone
            for tier, alpha in alphas.items():
                told_of = _judged(task, alpha, records[f"{seed} {tier}"], served[str(seed)], served["bare"],
                                  records["bare"])  # fmt: skip
                cells.append(Cell(**common, tier=tier, steps=costs[tier][0], seconds=costs[tier][1], **told_of))
            cells += [Cell(**common, tier=tier, refused=why) for tier, why in own.refused.items()]
    return cells


def _first_of(candidates: Mapping[str, Adapter], adapter: Adapter) -> str:
    """The first that is the same as ``adapter``: what aligning leaves as it was is carrying, and is scored once."""
    return next(name for name, other in candidates.items() if equal(other, adapter))


@dataclass(frozen=True)
class Made:
    """What the tiers make of one adapter: the adapters, steps and seconds of each, and who refused."""

    adapters: dict[Tier, Adapter] = field(default_factory=dict)
    costs: dict[str, tuple[int, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def _made(setup: Setup, new: Path) -> dict[tuple[int, int], Made]:
    """By task and seed what every tier makes of the adapter, by the recipes of jobs; those that train, train together,
    and begin at what those before made without.

    What is done together costs each an equal share.
    """
    rates = chosen_rates(setup)
    found = {(number, seed): Made() for number in range(len(setup.tasks)) for seed in range(1, setup.seeds + 1)}
    inputs = [
        {"base": new, "old": setup.base, "adapter": setup.adapter(setup.tasks[number], seed),
         "inputs": setup.folder / f"rows-{number}", "suite": setup.folder / f"suite-{number}",
         "dataset.0": setup.folder / f"rows-{number}"} for number, seed in found
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=setup.folder) as out:
        for tier in OTHER_SHAPE if new.name.replace("-", " ") in SHAPES else SAME_SHAPE:
            recipes = [
                _asked(tier, recipe(setup, rates[number], seed, NEW), _name(number, seed),
                       metric_of(setup.tasks[number]), given)
                for (number, seed), given in zip(found, inputs, strict=True)
            ]  # fmt: skip
            outs = [Path(out) / f"{tier}-{place}" for place in range(len(found))]
            seconds = _run(recipes, inputs, outs)
            for made, given, folder, took in zip(found.values(), inputs, outs, seconds, strict=True):
                if (refusal := folder / "error.json").exists():
                    made.refused[tier] = json.loads(refusal.read_text())["detail"]
                    continue
                made.adapters[tier] = read_adapter(folder / "adapter")
                made.costs[tier] = (json.loads((folder / "result.json").read_text())["steps"], took)
                if tier in UNTRAINED:
                    given[f"made.{tier}"] = folder / "adapter"
    return found


def _run(recipes: Sequence[Rebase], inputs: Sequence[Mapping[str, Path]], outs: Sequence[Path]) -> list[float]:
    """Leave outcomes in ``outs``; the seconds of each."""
    began = time.process_time()
    if steps_of(recipes[0]) is not None:
        run_together(recipes, inputs, outs, lambda _: None)
        return [(time.process_time() - began) / len(recipes)] * len(recipes)
    seconds = []
    for one, given_to, out in zip(recipes, inputs, outs, strict=True):
        began = time.process_time()
        try:
            run_recipe(one, given_to, out, lambda _: None)
        except LoractlError as error:
            out.mkdir(exist_ok=True)
            (out / "error.json").write_text(json.dumps(error.problem(), default=str))
        seconds.append(time.process_time() - began)
    return seconds


def _name(number: int, seed: int) -> str:
    """A digest of an adapter's own: what a teacher leaves is found by it."""
    return str(Digest.sha256(f"{number} {seed}".encode()))


def _few(recorded: FineTune) -> int:
    return Policy().warm_start(recorded.steps)[0]


def distilled(recorded: FineTune, metric: str) -> Distil:
    """How an adapter by this recipe is taught, as a job would plan it."""
    return Distil(
        temperature=temperature_of(metric),
        steps=max(4, min(100, recorded.steps * 2 // 3)), learning_rate=recorded.learning_rate, batch_tokens=512,
        max_length=256, max_new_tokens=64, precision="fp32",
    )  # fmt: skip


def _asked(tier: Tier, recorded: FineTune, adapter: str, metric: str, given: Mapping[str, Path]) -> Rebase:
    made = dict.fromkeys((role.removeprefix("made.") for role in given if role.startswith("made.")), SOME)
    warm = recorded.model_copy(update={"steps": _few(recorded)})
    training = {"warm-start": warm, "retrain": recorded}.get(tier)
    return Rebase(
        tier=tier, adapter=adapter, old=OLD, base=NEW, training=training, suite=SOME if training else None,
        candidates=Policy().warm_start(recorded.steps)[1] if tier == "warm-start" else 3,
        distil=distilled(recorded, metric) if tier == "distil" else None,
        inputs=SOME if tier in ("distil", "transport") else None,
        made=made if tier not in UNTRAINED else {},
    )  # fmt: skip


def _served(setup: Setup, task: Task) -> dict[str, list[Record]]:
    """Records of the old base and its adapters, by seed."""
    model, tokenizer = load(setup.base, "fp32")
    adapters = {str(seed): read_adapter(setup.adapter(task, seed)) for seed in range(1, setup.seeds + 1)}
    return evaluate(model, tokenizer, setup.suite(task), adapters)


def _judged(
    task: Task, alpha: float, candidate: Sequence[Record], serving: Sequence[Record],
    old_bare: Sequence[Record], bare: Sequence[Record],
) -> dict[str, Any]:  # fmt: skip
    metric = metric_of(task)
    margin = Margin(value=0.02, of_gain=True) if metric == "likelihood" else Margin(value=0.02)
    gate = Gate(suite="items", metric=metric, margin=margin)
    clusters = dict(zip((item_id(written(row)) for row in task.test), task.clusters, strict=True))
    verdict = judge(
        candidate, serving, bare, gate=gate, policy=Policy(gates=(gate,)), alpha=alpha,
        gain=mean_gain(serving, old_bare, gate), clusters=clusters if metric == "likelihood" else None,
    )  # fmt: skip
    flips = None
    if metric != "likelihood":
        before = {record.item: record.metrics[metric] for record in serving if record.split == "report"}
        now = {record.item: record.metrics[metric] for record in candidate if record.split == "report"}
        flips = statistics.fmean(now[item] < value for item, value in before.items())
    surely = next((told.upper for told in verdict.criteria if told.name == "negative-flips"), None)
    left = [told.name for told in verdict.criteria if told.zone is not Zone.PASS]
    told = {"zone": str(verdict.zone), "open": left, "surely": surely}
    return {"score": mean_of(candidate, metric, "report"), "flips": flips} | told


def main() -> None:
    """Measure what was asked for, and write the page from all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="upgrades; without a name all of them")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="WORD", help="those with one of these in their names")
    parser.add_argument("--items", type=int, default=ITEMS, help="of a task, at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a quick look")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="upgrades side by side")
    parser.add_argument("--store", type=Path, default=STORE, help="where results are kept")
    asked = parser.parse_args()
    quiet()
    stored: dict[str, dict[str, Any]] = json.loads(asked.store.read_text()) if asked.store.exists() else {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("LORACTL_BENCH_DIR")) as scratch:
        threads = max(1, (os.cpu_count() or 1) // asked.jobs)
        setup = prepared(Path(scratch), asked.seeds, asked.scale, asked.tasks, asked.items, threads)
        order = list(upgrades(setup.base))
        about = {"machine": machine(), "date": dt.datetime.now(dt.UTC).date().isoformat(), "seeds": asked.seeds,
                 "scale": asked.scale}  # fmt: skip
        own = stored.setdefault(setup.base.name, {})
        with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(upgraded, name, setup): name for name in asked.names or order}
            for done in as_completed(running):
                own[running[done]] = about | {"cells": [asdict(cell) for cell in done.result()]}
                stored[setup.base.name] = {name: own[name] for name in order if name in own}
                asked.store.write_text(json.dumps(stored, indent=1) + "\n")
                print(table({setup.base.name: {running[done]: own[running[done]]}}), flush=True)
    if asked.store == STORE:
        write_page(stored)


if __name__ == "__main__":
    main()
