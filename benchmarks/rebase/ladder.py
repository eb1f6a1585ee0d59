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
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from registry.core.digest import Digest
from registry.core.errors import LoractlError
from registry.core.gate import Zone, judge, mean_gain, shares
from registry.core.policy import Gate, Margin, Policy
from registry.core.recipes import UNTRAINED, Distil, FineTune, Rebase, Tier, temperature_of
from registry.core.records import Record, item_id
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate
from workers.compute.finetune import Task as Training
from workers.compute.finetune import finetune_many
from workers.compute.lora import Adapter
from workers.compute.model import load
from workers.compute.rebase.distil import steps_of
from workers.compute.rebase.signals import compare
from workers.compute.rebase.starts import equal
from workers.compute.weights import read_adapter, write_adapter
from workers.run import run as run_recipe
from workers.run import run_together

from ..run import machine
from ..tasks import Task, given, made, rows_of, texts
from .upgrades import RELATED, SHAPES, Texts, trained_on, upgrades

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
STORE = PAGE.with_name("ladder.json")
PLOT = PAGE.with_name("ladder.svg")
STEPS, RANK, ITEMS = 300, 8, 2400
OLD, NEW = "b3:" + "1" * 64, "b3:" + "2" * 64
SOME = "sha256:" + "3" * 64
SAME_SHAPE: tuple[Tier, ...] = ("carry", "align", "warm-start", "distil", "retrain")
OTHER_SHAPE: tuple[Tier, ...] = ("transport", "warm-start", "distil", "retrain")
REFERENCE = "retrained"
SCRATCH = "from scratch"
"""As many steps as the warm start's, from nothing."""
PEERS = (REFERENCE, SCRATCH)
KINDS = {"related": RELATED, "other shape": SHAPES, "unrelated": {"independent seed"}}
LEAST = 0.01
"""What retraining must gain over the bare base (a point, or hundredths of nats a byte), for a cell to be counted."""


@dataclass(frozen=True)
class Cell:
    """What one tier made of one adapter, or why it did not."""

    upgrade: str
    task: str
    seed: int
    tier: str
    drift: float | None
    """Median ρ of the upgrade."""
    steps: int = 0
    seconds: float = 0.0
    """Of a processor, as are the gate's."""
    gate: float = 0.0
    bare: float = 0.0
    retrained: float = 0.0
    served: float = 0.0
    score: float = 0.0
    """On the report split, as the three before and the next."""
    flips: float | None = None
    """Right on the old base, and wrong now."""
    zone: str = ""
    open: tuple[str, ...] = ()
    """The gate's criteria that did not pass."""
    surely: float | None = None
    """Negative flips on the gate's split: their upper bound, which the gate does not ask for."""
    refused: str = ""

    @property
    def recovery(self) -> float:
        """R."""
        return (self.score - self.bare) / (self.retrained - self.bare)

    @property
    def tells(self) -> bool:
        """Whether retraining gains so much that a share of it is more than noise."""
        return self.retrained - self.bare > LEAST


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
        rows = rows_of([_written(row) for row in task.test])
        return Suite(rows, (metric_of(task),), max_new_tokens=12)

    def adapter(self, task: Task, seed: int) -> Path:
        """That of the old base."""
        return self.folder / f"adapter-{self.tasks.index(task)}-{seed}"


def metric_of(task: Task) -> str:
    """What a task is measured by."""
    return "likelihood" if task.metric == "likelihood" else "exact-match"


def _written(row: Row) -> dict[str, Any]:
    if "choices" not in row.value:
        return row.value
    return {"prompt": row.value["prompt"], "completion": row.value["choices"][row.value["answer"]]}


# ── the old base ─────────────────────────────────────────────────────────────


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
    rates, adapters, _ = _at_their_best(setup, setup.base)
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


def _at_their_best(setup: Setup, base: Path) -> tuple[list[float], list[list[Adapter]], float]:
    """By task the rate that does best on rows aside with the first seed, and an adapter a seed at it; the seconds of
    one."""
    model, tokenizer = load(base, "fp32")
    rates = setup.size.rates
    began = time.process_time()
    tried = _trained(model, tokenizer, setup, [(task, rate, 1) for task in setup.tasks for rate in rates])
    seconds = (time.process_time() - began) / len(tried)
    best, first = [], []
    for number, task in enumerate(setup.tasks):
        rows = rows_of([_written(row) for row in task.calibration])
        some = dict(zip(rates, tried[number * len(rates) :], strict=False))
        named = {str(rate): adapter for rate, adapter in some.items()}
        records = evaluate(model, tokenizer, Suite(rows, (metric_of(task),), max_new_tokens=12), named, bare=False)
        best.append(max(rates, key=lambda rate: _mean(records[str(rate)], metric_of(task))))
        first.append(some[best[-1]])
    more = range(2, setup.seeds + 1)
    asked = [(task, rate, seed) for task, rate in zip(setup.tasks, best, strict=True) for seed in more]
    others = iter(_trained(model, tokenizer, setup, asked) if asked else [])
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


def _trained(
    model: Any, tokenizer: Any, setup: Setup, asked: Sequence[tuple[Task, float, int]], steps: int | None = None
) -> list[Adapter]:
    recipes = [recipe(setup, rate, seed) for _, rate, seed in asked]
    recipes = [each.model_copy(update={"steps": steps or each.steps}) for each in recipes]
    tasks = [Training(each, task.train) for each, (task, _, _) in zip(recipes, asked, strict=True)]
    return [run.adapter for run in finetune_many(model, tokenizer, tasks)]


def _write_rows(folder: Path, rows: Sequence[Row], metric: str | None = None) -> None:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.value) + "\n" for row in rows))
    if metric is not None:
        (folder / "suite.json").write_text(json.dumps({"metrics": [metric], "max_new_tokens": 12}))


# ── one upgrade ──────────────────────────────────────────────────────────────


def upgraded(name: str, setup: Setup) -> list[Cell]:
    """Every cell of one upgrade."""
    torch.set_num_threads(setup.threads)
    torch.set_grad_enabled(True)
    quiet()
    new = setup.folder / name.replace(" ", "-")
    upgrades(setup.base, setup.size.gently)[name](setup.base, Texts(*texts()), new, setup.scale)
    drift = compare(setup.base, new).median
    rates, reference, each = _at_their_best(setup, new)
    model, tokenizer = load(new, "fp32")
    asked = [(task, rate, s) for task, rate in zip(setup.tasks, rates, strict=True) for s in range(1, setup.seeds + 1)]
    began = time.process_time()
    few = _few(recipe(setup, 1.0, 0))
    scratch = _trained(model, tokenizer, setup, asked, few)
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
        retrained = statistics.fmean(_mean(records[f"{s} {REFERENCE}"], metric_of(task), "report")
                                     for s in range(1, setup.seeds + 1))  # fmt: skip
        for seed, own in enumerate(told, start=1):
            costs = own.costs | {REFERENCE: (recipe(setup, 1.0, seed).steps, each), SCRATCH: (few, short)}
            bare = _mean(records["bare"], metric_of(task), "report")
            common: dict[str, Any] = {"upgrade": name, "task": task.name, "seed": seed, "drift": drift, "bare": bare}
            common |= {"retrained": retrained, "gate": gate}
            common["served"] = _mean(served[str(seed)], metric_of(task), "report")
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
    clusters = dict(zip((item_id(_written(row)) for row in task.test), task.clusters, strict=True))
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
    return {"score": _mean(candidate, metric, "report"), "flips": flips} | told


def _mean(records: Sequence[Record], metric: str, split: str | None = None) -> float:
    return statistics.fmean(r.metrics[metric] for r in records if split is None or r.split == split)


# ── what came out ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class End:
    """What a way of deciding made of one adapter."""

    tier: str | None
    """None: nothing serves on the new base."""
    recovery: float = 0.0
    regret: float = 0.0
    """How much better the best of all tiers is, as a share of what retraining gains."""
    points: float | None = None
    """The same in points, where answers are right or wrong."""
    share: float = 0.0
    """Of retraining's seconds: of all that was made."""
    gated: float = 0.0
    """The same, with the gate's own seconds on both sides."""
    flips: float | None = None
    regressed: bool = False
    """It serves, and worse than before by more than two points, or 2 % of what retraining gains."""


Way = Callable[[Sequence[Cell]], Sequence[Cell]]
"""Of an adapter's cells: those that are paid for, the last of which serves if it passed; or nothing."""


def by_gate(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The tiers in the order of costs, up to the first that passes."""
    tried = [cell for cell in cells if cell.tier not in PEERS]
    passed = next((at for at, cell in enumerate(tried) if cell.zone == "pass"), len(tried))
    return tried[: passed + 1]


def by_default(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The tiers of a policy that names none, at the shares of α that more of them would have left to each."""
    return by_gate([cell for cell in cells if cell.tier in (*Policy().tiers, "transport")])


def copied(cells: Sequence[Cell]) -> Sequence[Cell]:
    """Copy if shapes match, and retrain if not."""
    return _trusted("carry", cells) or _trusted(REFERENCE, cells)


def _trusted(tier: str, cells: Sequence[Cell]) -> Sequence[Cell]:
    return [replace(cell, zone="pass") for cell in cells if cell.tier == tier]


def by_sure_flips(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The same, where negative flips must be within their limit surely, not as they were seen."""
    limit = Policy().max_negative_flips
    return by_gate([cell if (cell.surely or 0.0) <= limit else replace(cell, zone="unresolved") for cell in cells])


WAYS: Mapping[str, Way] = {
    "the gate, tier by tier": by_gate,
    "the gate, default tiers": by_default,
    "the gate, flips surely few": by_sure_flips,
    "as it is (PortLLM)": partial(_trusted, "carry"),
    "copy if shapes match": copied,
    "always retrain": partial(_trusted, REFERENCE),
    "freeze": lambda _: (),
}


def ended(way: Way, cells: Sequence[Cell]) -> End:
    """What came of one adapter's cells."""
    cells = [cell for cell in cells if not cell.refused]
    whole = next(cell for cell in cells if cell.tier == REFERENCE)
    best = max(cell.score for cell in cells)
    paid = way(cells)
    last = paid[-1] if paid and paid[-1].zone == "pass" else None
    score = last.score if last else whole.bare
    gain, missed = whole.retrained - whole.bare, max(0.0, best - score)
    worse = 0.02 if whole.flips is not None else 0.02 * gain
    spent = sum(cell.seconds for cell in paid)
    return End(
        last.tier if last else None, (score - whole.bare) / gain, missed / gain,
        100 * missed if whole.flips is not None else None, spent / whole.seconds,
        (spent + sum(cell.gate for cell in paid)) / (whole.seconds + whole.gate), last.flips if last else None,
        last is not None and whole.served - score > worse,
    )  # fmt: skip


def table(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: of each model a row an upgrade, a column a tier, then what was decided."""
    return "\n\n".join(_of_model(model, upgraded) for model, upgraded in stored.items())


def _of_model(model: str, stored: Mapping[str, Any]) -> str:
    tiers = [*dict.fromkeys([*SAME_SHAPE, *OTHER_SHAPE]), SCRATCH]
    lines = [
        f"### {model}",
        "",
        "| upgrade | drift ρ | " + " | ".join(f"{tier}: R (steps)" for tier in tiers)
        + " | promoted | R of what was decided |",
        "|" + "---|" * (len(tiers) + 4),
    ]  # fmt: skip
    for name, entry in stored.items():
        cells = [cell for cell in map(_cell, entry["cells"]) if cell.tells]
        shown = [name, "" if entry["cells"][0]["drift"] is None else f"{entry['cells'][0]['drift']:.3f}"]
        for tier in tiers:
            some = [cell for cell in cells if cell.tier == tier and not cell.refused]
            shown.append(f"{statistics.median(c.recovery for c in some):.2f} ({some[0].steps})" if some else "–")
        ends = [ended(by_gate, each) for each in _by_adapter(cells).values()]
        shown += [
            f"{sum(end.tier is not None for end in ends)} of {len(ends)}",
            f"{statistics.median(end.recovery for end in ends):.2f}" if ends else "–",
        ]
        lines.append("| " + " | ".join(shown) + " |")
    told = sorted({f"{entry['machine']}, {entry['date']}, {entry['seeds']} seeds, steps × {entry['scale']}"
                   for entry in stored.values()})  # fmt: skip
    count = f"{len(stored)} of {len(set().union(*KINDS.values()))} upgrades on record."
    return "\n".join([*lines, "", *_ways(stored), "", count, *(f"Measured: {line}." for line in told)])


COLUMNS = (
    "upgrades", "decided by", "serve", "R, median (10th percentile)", "regret, mean", "in points", "seconds, median",
    "with gates", "negative flips, mean", "promoted and worse",
)  # fmt: skip


def _ways(stored: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a way of deciding, over the adapters of related bases and over those of other shapes."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for kind, names in KINDS.items():
        cells = [_cell(each) for name, entry in stored.items() if name in names for each in entry["cells"]]
        adapters = list(_by_adapter([cell for cell in cells if cell.tells]).values())
        for said, way in WAYS.items() if adapters else ():
            ends = [ended(way, each) for each in adapters]
            recoveries = sorted(end.recovery for end in ends)
            shown = [
                kind, said, f"{sum(end.tier is not None for end in ends)} of {len(ends)}",
                f"{statistics.median(recoveries):.2f} ({recoveries[len(ends) // 10]:.2f})",
                f"{statistics.fmean(end.regret for end in ends):.2f}", _mean_of([end.points for end in ends], ".2f"),
                f"{statistics.median(end.share for end in ends):.0%}",
                f"{statistics.median(end.gated for end in ends):.0%}",
                _mean_of([end.flips for end in ends], ".1%"), str(sum(end.regressed for end in ends)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(shown) + " |")
    return lines


def _mean_of(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else "–"


def _by_adapter(cells: Sequence[Cell]) -> dict[tuple[str, str, int], list[Cell]]:
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.upgrade, cell.task, cell.seed), []).append(cell)
    return found


def plot(stored: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Recovery against steps as a share of retraining's, a point a tier and upgrade (medians over its cells)."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ladder"  # equal figures, equal bytes
    from matplotlib import pyplot as plt

    every = [cell["tier"] for upgraded in stored.values() for entry in upgraded.values() for cell in entry["cells"]]
    tiers = list(dict.fromkeys(every))
    figure, panels = plt.subplots(1, len(stored), figsize=(1 + 6 * len(stored), 4.5), sharey=True, squeeze=False)
    for axes, (model, upgraded) in zip(panels[0], stored.items(), strict=True):
        for number, tier in enumerate(tiers):
            points = [point for entry in upgraded.values() if (point := _point(entry["cells"], tier))]
            if points:
                axes.scatter(*zip(*points, strict=True), label=tier, s=28, color=f"C{number}")
        axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=model, xlabel="steps, as a share of a retraining's", ylim=(-1, 1.3))
    panels[0][0].set(ylabel="recovery")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def _point(stored: Sequence[Mapping[str, Any]], tier: str) -> tuple[float, float] | None:
    """Of one upgrade: a tier's share of the steps, and its recovery."""
    whole = next(cell["steps"] for cell in stored if cell["tier"] == REFERENCE)
    some = [cell for cell in map(_cell, stored) if cell.tier == tier and cell.tells and not cell.refused]
    return (some[0].steps / whole, statistics.median(cell.recovery for cell in some)) if some else None


def _cell(stored: Mapping[str, Any]) -> Cell:
    return Cell(**stored)


def quiet() -> None:
    """Nothing of transformers' own is shown."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


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


def write_page(stored: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables and the plot of docs/rebase.md."""
    before, _, rest = PAGE.read_text().partition("<!-- ladder -->\n")
    _, _, after = rest.partition("<!-- /ladder -->")
    shown = f"{table(stored)}\n\n![Recovery against steps, a point a tier and upgrade]({PLOT.name})"
    PAGE.write_text(f"{before}<!-- ladder -->\n{shown}\n<!-- /ladder -->{after}")
    plot(stored, PLOT)


if __name__ == "__main__":
    main()
