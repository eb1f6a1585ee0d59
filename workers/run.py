"""Run one recipe on local folders, without a registry, a queue or a network.

    python -m workers.run recipe.json --in base=DIR --in dataset.0=DIR --out DIR [--checkpoint DIR]

    python -m workers.run a.json b.json --in 0:base=DIR … --in 1:base=DIR … --out DIR --out DIR

Several recipes are trainings on one base, fine-tunings or rebases that train.

Roles of ``--in`` are those of `registry.core.recipes.inputs_of`. Written to ``--out``:

    result.json             kind, seconds, steps, device, precision, loss curve, metrics, candidates, drift …
    adapter/                finetune, search, rebase, combine, compress, extract: a PEFT folder
    base/                   full-finetune, merge: a model that transformers loads
    answers-<i>.jsonl       answers: per input, for adapter i; the bare base's in answers-bare.jsonl
    records-<i>.jsonl       evaluate: per item, for adapter i; the bare base's in records-bare.jsonl
    error.json              the refusal, instead of result.json; exit status 1

Progress goes to ``--progress-fd`` as lines of JSON, else to stderr for people. A termination signal stops
after the step at hand, leaves a checkpoint, and exits with 130; the same command then goes on from it.
Of trainings together each has an ``--out`` of its own; lines of progress say by ``task`` whose they are, and by
``ended`` that its outcome lies there; a file ``unwanted`` in an ``--out`` ends that one alone, after the step at hand.

A recipe with ``sharded`` runs in a process a GPU, which torchrun starts; started under torchrun, on several machines
say, any training does. The first process writes and reports; what one of them fails by ends all.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read once, when torch is loaded: threads that wait sleep. On cores shared with a registry and a database,
# threads that spin made one and the same step ten times as slow.

import torch
import transformers

from registry.core import pool
from registry.core.errors import BadRequest, LoractlError, NotRunnable, ProcessFailed
from registry.core.recipes import (
    Answers,
    Combine,
    Compare,
    Compress,
    Evaluate,
    Extract,
    FineTune,
    FullFineTune,
    MakesAdapter,
    Merge,
    Precision,
    Rebase,
    Recipe,
    Search,
    inputs_of,
    parse_recipe,
    recipe_digest,
)
from registry.core.records import summary, to_jsonl

from .compute import snapshot
from .compute.answers import answers, distinct
from .compute.bank import parts_of
from .compute.combine import combine
from .compute.compress import compress
from .compute.data import Row
from .compute.distributed import ALONE, Ranks, is_started_by_torchrun, load_sharded, ranks_of
from .compute.evaluate import Suite, evaluate
from .compute.extract import Other, extract
from .compute.finetune import Task, Trained, as_trained, finetune
from .compute.full import Tuned, tune, write_tuned
from .compute.inputs import Inputs
from .compute.lora import Adapter
from .compute.merge import Form, merge
from .compute.model import Model, Tokenizer, config_of, dtype_for, load
from .compute.plain import Kept
from .compute.quantised import form_of, loaded
from .compute.rebase.align import align
from .compute.rebase.carry import carry
from .compute.rebase.distil import distil, is_written, steps_of, write_lesson
from .compute.rebase.free import best_carried
from .compute.rebase.normalise import normalised
from .compute.rebase.race import Chosen, Race, as_raced, raced
from .compute.rebase.retrain import gain, retrain
from .compute.rebase.signals import compare
from .compute.rebase.starts import Starts, starts_of
from .compute.rebase.symmetries import Match
from .compute.rebase.transport import transport
from .compute.rebase.warm_start import warm_start
from .compute.search import search
from .compute.table import is_known
from .compute.verify import deviation
from .compute.weights import read_adapter, write_adapter, write_file
from .processes import die_with

Report = Callable[[dict[str, Any]], None]
Product = TypeVar("Product")
Given = TypeVar("Given")
CURVE_POINTS = 200
_REFUSAL = "error.json"
UNWANTED = "unwanted"


@dataclass(frozen=True)
class Result:
    """What ``result.json`` holds."""

    kind: str
    facts: dict[str, Any]

    def dump(self) -> dict[str, Any]:
        """One JSON object."""
        return {"kind": self.kind, **self.facts}


def run(
    recipe: Recipe, folders: Mapping[str, Path], out: Path, report: Report, checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Run ``recipe`` on ``folders`` by role, or `Inputs`; outputs and ``result.json`` lie in ``out`` when this returns.

    A KeyboardInterrupt out of ``report`` stops the work at a step's end, with a checkpoint where there is one.
    """
    inputs = folders if isinstance(folders, Inputs) else Inputs(folders)
    _check_inputs(recipe, inputs)
    if ranks.mesh is not None and not isinstance(recipe, FineTune | FullFineTune):
        raise BadRequest(problems=f"a recipe of kind '{recipe.kind}' runs in one process: leave torchrun out")
    if ranks.mesh is not None and isinstance(recipe, FineTune) and recipe.quantised:
        raise BadRequest(problems="a base in 8 or 4 bits is trained on in one process: leave torchrun or quantised out")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with inputs.naming():
        facts = _facts(recipe, inputs, out, report, checkpoint, ranks)
    result = _stamped(recipe, facts, time.monotonic() - began, ranks.many)
    if ranks.first:
        _leave(result, out)
    ranks.wait()
    return result


def run_together(
    recipes: Sequence[Recipe],
    inputs: Sequence[Mapping[str, Path]],
    outs: Sequence[Path],
    report: Report,
    checkpoint: Path | None = None,
) -> int:
    """Fine-tune several adapters, or rebase several by training, on one loaded base; how many were refused.

    What each made, or was refused by, lies in its ``out`` as soon as it ends. Whoever finds a file ``unwanted`` there
    ends after the step at hand, without an outcome.
    """
    company = _Company(recipes, inputs, outs, report, checkpoint)
    finetunes = [one for one in recipes if isinstance(one, FineTune) and not one.sharded]
    rebases = [one for one in recipes if isinstance(one, Rebase) and steps_of(one) is not None]
    trainings = finetunes or [steps for one in rebases if (steps := steps_of(one)) is not None]
    if len(trainings) != len(recipes) or len({(one.base, one.precision, one.quantised) for one in trainings}) != 1:
        raise BadRequest(
            problems="together go fine-tunings, or rebases that train, on one base, in one precision, "
            "quantised alike, none of them sharded"
        )
    if finetunes:
        _finetune_together(company, finetunes)
    else:
        _rebase_together(company, rebases, trainings[0])
    return company.refused


class _Company:
    """Recipes that are run together: who is left, and the word of everybody's end."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        inputs: Sequence[Mapping[str, Path]],
        outs: Sequence[Path],
        report: Report,
        checkpoint: Path | None,
    ) -> None:
        self.inputs = [one if isinstance(one, Inputs) else Inputs(one) for one in inputs]
        self.outs, self.refused = outs, 0
        self._recipes, self._report, self.checkpoint = recipes, report, checkpoint
        self._left = list(range(len(recipes)))
        self._seconds, self._counted = [0.0] * len(recipes), time.monotonic()
        for out in outs:
            out.mkdir(parents=True, exist_ok=True)
            (out / _REFUSAL).unlink(missing_ok=True)
        self.each(lambda place: _check_inputs(recipes[place], self.inputs[place]))

    def each(self, work: Callable[[int], Product]) -> dict[int, Product]:
        """What ``work`` makes for each that is left, by its place; whoever is refused has ended."""
        made: dict[int, Product] = {}
        for place in list(self._left):
            try:
                with self.inputs[place].naming():
                    made[place] = work(place)
            except LoractlError as error:
                self.end(place, error)
        return made

    def end(self, place: int, outcome: LoractlError | dict[str, Any]) -> None:
        """Leave the facts of a result, or the refusal, and say that it lies there."""
        self._count()
        self._left.remove(place)
        if isinstance(outcome, LoractlError):
            self.refused += 1
            _refused(outcome, self.outs[place])
        else:
            _leave(_stamped(self._recipes[place], outcome, self._seconds[place], 1), self.outs[place])
        with contextlib.suppress(KeyboardInterrupt):  # the next step hears of it
            self._report({"task": place, "ended": True})

    def _count(self) -> None:
        """Time since the last end is equally that of those who were here: together they cost what passed."""
        since, self._counted = self._counted, time.monotonic()
        for place in self._left:
            self._seconds[place] += (self._counted - since) / len(self._left)

    def teller(self, place: int) -> Report:
        """Who hears of what is done for one alone."""
        return lambda now: self._report(now | {"task": place})

    def options(self, places: Sequence[int]) -> dict[str, Any]:
        """How those at ``places`` are trained: who hears of a step, who is not wanted any more, and what is left."""
        unwanted: set[int] = set()

        def told(now: dict[str, Any]) -> None:
            unwanted.update(at for at, place in enumerate(places) if (self.outs[place] / UNWANTED).exists())
            self._report(now | {"task": places[now["task"]]})

        return {"report": told, "checkpoint_dir": self.checkpoint, "unwanted": unwanted}


def _finetune_together(company: _Company, recipes: Sequence[FineTune]) -> None:
    tasks = company.each(lambda place: _task(recipes[place], company.inputs[place]))
    if not tasks:
        return
    places = list(tasks)
    base = company.inputs[places[0]]["base"]
    model, tokenizer = load(base, recipes[0].precision, recipes[0].quantised)
    for at, outcome in as_trained(model, tokenizer, list(tasks.values()), **company.options(places)):
        place = places[at]
        if isinstance(outcome, Trained):
            company.end(place, _finetuned(model, recipes[place], outcome, company.outs[place]))
        else:
            company.end(place, outcome)


def _rebase_together(company: _Company, recipes: Sequence[Rebase], training: FineTune) -> None:
    bouts = company.each(lambda place: _bout(recipes[place], company.inputs[place]))
    if not bouts:
        return
    with _room_for_lessons(company.checkpoint) as lessons:
        found = _befores(list(bouts.values()), lessons, [company.teller(place) for place in bouts])
        befores = dict(zip(bouts, found, strict=True))
        model, tokenizer = load(company.inputs[min(bouts)]["base"], training.precision, training.quantised)
        races = company.each(lambda place: _race(model, tokenizer, bouts[place], befores[place], lessons))
    places = list(races)
    for at, outcome in as_raced(model, tokenizer, list(races.values()), **company.options(places)):
        place = places[at]
        if isinstance(outcome, Chosen):
            company.end(place, _rebased(model, bouts[place], outcome, company.outs[place]))
        else:
            company.end(place, outcome)


def _check_inputs(recipe: Recipe, inputs: Inputs) -> None:
    missing = sorted(inputs_of(recipe).keys() - inputs.keys())
    if missing:
        raise BadRequest(problems=f"a recipe of kind '{recipe.kind}' needs --in {', '.join(missing)}")


def _facts(
    recipe: Recipe, inputs: Inputs, out: Path, report: Report, checkpoint: Path | None, ranks: Ranks
) -> dict[str, Any]:
    """Do the work; what there is to tell of it."""
    match recipe:
        case FineTune():
            return _finetune(recipe, inputs, out, report, checkpoint, ranks)
        case FullFineTune():
            return _full_finetune(recipe, inputs, out, report, checkpoint, ranks)
        case Evaluate():
            return _evaluate(recipe, inputs, out, report)
        case Answers():
            return _answers(recipe, inputs, out, report)
        case Merge():
            return _merge(recipe, inputs, out, report)
        case Rebase():
            return _rebase(recipe, inputs, out, report, checkpoint)
        case Combine():
            return _combine(recipe, inputs, out, report)
        case Compress():
            return _compress(recipe, inputs, out, report)
        case Extract():
            return _extract(recipe, inputs, out, report)
        case Search():
            return _search(recipe, inputs, out, report, checkpoint)
        case Compare():
            return _compare(recipe, inputs, report)


def _stamped(recipe: Recipe, facts: dict[str, Any], seconds: float, processes: int) -> Result:
    """The result of a recipe, with what else there is to know of how it came about."""
    how = {
        "seconds": round(seconds, 3),
        "recipe": str(recipe_digest(recipe)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return Result(recipe.kind, facts | how)


def _leave(result: Result, out: Path) -> None:
    write_file(out / "result.json", json.dumps(result.dump(), indent=2, sort_keys=True).encode() + b"\n")


# ── one function per kind ────────────────────────────────────────────────────


def _finetune(
    recipe: FineTune, inputs: Inputs, out: Path, report: Report, checkpoint: Path | None, ranks: Ranks
) -> dict[str, Any]:
    task = _task(recipe, inputs)
    base, precision = inputs["base"], recipe.precision
    if ranks.mesh is None:
        model, tokenizer = load(base, precision, recipe.quantised)
    else:
        model, tokenizer = load_sharded(base, precision, ranks.mesh)
    options: dict[str, Any] = {"report": report, "checkpoint_dir": checkpoint, "ranks": ranks}
    trained = finetune(model, tokenizer, recipe, task.rows, start=task.start, **options)
    return _finetuned(model, recipe, trained, out if ranks.first else None)


def _finetuned(model: Model, recipe: FineTune, trained: Trained, out: Path | None) -> dict[str, Any]:
    if out is not None:
        _write(trained.adapter, out, recipe.base, recipe)
    count = sum(part.numel() for part in parts_of(trained.adapter).values())
    return _training_facts(trained, recipe.precision) | {"base": loaded(model), "trained": count}


def _task(recipe: FineTune, inputs: Inputs) -> Task:
    start = normalised(inputs["start"], inputs["base"]) if recipe.start else None
    if start is not None and (given := {patch.a_RI.shape[0] for patch in start.patches.values()}) != {recipe.rank}:
        raise BadRequest(problems=f"rank is {recipe.rank}, but the version to start from has ranks {sorted(given)}")
    return Task(recipe, inputs.rows(), start)


def _full_finetune(
    recipe: FullFineTune, inputs: Inputs, out: Path, report: Report, checkpoint: Path | None, ranks: Ranks
) -> dict[str, Any]:
    tuned = tune(inputs["base"], recipe, inputs.rows(), report=report, checkpoint_dir=checkpoint, ranks=ranks)
    if not ranks.first:
        return {}
    written = write_tuned(inputs["base"], tuned, out / "base", recipe.dtype)
    trained = sum(value.numel() for value in tuned.weights.values())
    facts = {"changed": len(written.changed), "trained": trained, "tensors": written.tensors}
    return _training_facts(tuned, recipe.precision) | facts


def _evaluate(recipe: Evaluate, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    suite = inputs.suite()
    adapters = {str(i): normalised(inputs[f"adapter.{i}"], inputs["base"]) for i in range(len(recipe.adapters))}
    model, tokenizer = load(inputs["base"], recipe.precision, recipe.quantised)
    records = evaluate(model, tokenizer, suite, adapters, bare=recipe.bare, report=report)
    for name, found in records.items():
        write_file(out / f"records-{name}.jsonl", to_jsonl(found))
    precision = _precision(recipe.precision)
    return {
        "precision": precision,
        "base": loaded(model),
        "harness": str(suite.harness(precision, recipe.quantised)),
        "metrics": {name: summary(found) for name, found in records.items()},
    }


def _answers(recipe: Answers, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    suite = replace(inputs.suite(), metrics=(recipe.metric,))
    apart = [*suite.rows, *(row for i in range(len(recipe.apart)) for row in inputs.unlabelled(f"dataset.{i}"))]
    rows = distinct(inputs.unlabelled(), apart)
    adapters = {str(i): normalised(inputs[f"adapter.{i}"], inputs["base"]) for i in range(len(recipe.adapters))}
    model, tokenizer = load(inputs["base"], recipe.precision, recipe.quantised)
    found = answers(model, tokenizer, suite, rows, adapters, bare=recipe.bare, report=report)
    for name, own in found.items():
        write_file(out / f"answers-{name}.jsonl", pool.to_jsonl(own))
    precision = _precision(recipe.precision)
    return {
        "precision": precision,
        "base": loaded(model),
        "harness": str(suite.harness(precision, recipe.quantised)),
        "inputs": len(rows),
        "answered": sorted(found),
    }


def _merge(recipe: Merge, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    base, adapter = inputs["base"], normalised(inputs["adapter"], inputs["base"])
    if recipe.verify and not is_known(base):
        kind = config_of(base).get("model_type")
        reason = f"a model of type '{kind}' is not known here, and nothing answers without one; merge without --verify"
        raise NotRunnable(what="--verify", reason=reason)
    form = Form(recipe.dtype, recipe.max_shard_bytes, recipe.dequantise)
    merged = merge(base, adapter, out / "base", report, form)
    facts = {"changed": len(merged.changed), "untied": merged.untied, "tensors": merged.tensors}
    facts["dequantised"] = form_of(config_of(base))
    return facts | ({"deviation": asdict(deviation(base, out / "base", adapter))} if recipe.verify else {})


def _rebase(recipe: Rebase, inputs: Inputs, out: Path, report: Report, checkpoint: Path | None) -> dict[str, Any]:
    adapter = normalised(inputs["adapter"], inputs["old"])
    if recipe.tier == "align":
        aligned = align(adapter, inputs["old"], inputs["base"], report)
        _write(aligned.adapter, out, recipe.base, recipe)
        return {"tier": recipe.tier, "steps": 0, "matches": _by_name(aligned.matches)}
    if recipe.tier == "transport":
        moved = transport(adapter, inputs["old"], inputs["base"], _unlabelled(recipe, inputs) or None, report)
        _write(moved.adapter, out, recipe.base, recipe)
        return {"tier": recipe.tier, "steps": 0} | moved.facts()
    if recipe.tier == "carry" and (recipe.suite or recipe.inputs):
        suite, rows = inputs.suite() if recipe.suite else None, _unlabelled(recipe, inputs)
        best = best_carried(adapter, inputs["old"], inputs["base"], suite, rows, report)
        _write(best.adapter, out, recipe.base, recipe)
        found = {"chosen": best.chosen, "reason": best.reason, "candidates": best.candidates}
        return {"tier": recipe.tier, "steps": 0, **found}
    if recipe.tier == "carry":
        _write(carry(adapter, inputs["old"], inputs["base"]), out, recipe.base, recipe)
        return {"tier": recipe.tier, "steps": 0}
    bout = _bout(recipe, inputs)
    with _room_for_lessons(checkpoint) as lessons:
        [before] = _befores([bout], lessons, [report])
        model, tokenizer = load(inputs["base"], bout.training.precision, bout.training.quantised)
        race = _race(model, tokenizer, bout, before, lessons)
    return _rebased(model, bout, raced(model, tokenizer, race, report, checkpoint), out)


@dataclass(frozen=True)
class _Bout:
    """A rebase that trains, as far as it comes without a model."""

    recipe: Rebase
    training: FineTune
    old: Path
    adapter: Adapter
    starts: Starts
    rows: Sequence[Row]
    suite: Suite | None

    def lesson(self, lessons: Path) -> Path:
        """Where the lesson of a distillation lies."""
        return lessons / recipe_digest(self.recipe).hex[:16]

    def asks_the_old_base(self, lessons: Path) -> bool:
        """Whether there is something to do on the adapter's own base."""
        if self.recipe.distil is not None:
            return not is_written(self.lesson(lessons))
        return self.recipe.tier == "retrain" and self.suite is not None

    def before(self, model: Model, tokenizer: Tokenizer, lessons: Path, report: Report) -> float | None:
        """What the adapter gains on its own base; of a distillation the lesson is written instead."""
        if self.recipe.distil is None:
            return gain(model, tokenizer, self.suite, self.adapter)
        write_lesson(model, tokenizer, self.recipe.distil, self.adapter, self.rows, self.lesson(lessons), report)
        return None


def _bout(recipe: Rebase, inputs: Inputs) -> _Bout:
    training = steps_of(recipe)
    assert training is not None
    adapter = normalised(inputs["adapter"], inputs["old"])
    rows = _unlabelled(recipe, inputs) if recipe.distil else inputs.rows()
    given: dict[str, Adapter] = {tier: read_adapter(inputs[f"made.{tier}"]) for tier in recipe.made}
    starts = starts_of(adapter, inputs["old"], inputs["base"], rows, given)
    suite = inputs.suite() if recipe.suite else None
    return _Bout(recipe, training, inputs["old"], adapter, starts, rows, suite)


@contextlib.contextmanager
def _room_for_lessons(checkpoint: Path | None) -> Iterator[Path]:
    """Where teachers leave what they wrote: beside the checkpoints, to go on from, or for as long as it is needed."""
    if checkpoint is not None:
        yield checkpoint / "lessons"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _befores(bouts: Sequence[_Bout], lessons: Path, reports: Sequence[Report]) -> list[float | LoractlError | None]:
    """What each adapter has to do on its own base before the new one is loaded: gain on it, or write its lesson.

    A base is loaded once for all that share it.
    """
    found: list[float | LoractlError | None] = [None] * len(bouts)
    asked = [place for place, bout in enumerate(bouts) if bout.asks_the_old_base(lessons)]
    for old in dict.fromkeys(bouts[place].old for place in asked):
        own = [place for place in asked if bouts[place].old == old]
        training = bouts[own[0]].training
        try:
            model, tokenizer = load(old, training.precision, training.quantised)
        except LoractlError as error:
            found = [error if place in own else before for place, before in enumerate(found)]
            continue
        for place in own:
            try:
                found[place] = bouts[place].before(model, tokenizer, lessons, reports[place])
            except LoractlError as error:
                found[place] = error
    return found


def _race(
    model: Model, tokenizer: Tokenizer, bout: _Bout, before: float | LoractlError | None, lessons: Path
) -> Race:
    if isinstance(before, LoractlError):
        raise before
    if bout.recipe.distil is not None:
        race = distil(model, tokenizer, bout.recipe, bout.lesson(lessons), bout.starts)
    elif bout.recipe.tier == "warm-start":
        race = warm_start(
            model, tokenizer, bout.training, bout.rows, bout.starts, bout.suite, bout.recipe.candidates
        )
    else:
        race = retrain(model, tokenizer, bout.training, bout.rows, bout.starts, bout.suite, before)
    return replace(race, owner=f"{recipe_digest(bout.recipe)} ")


def _rebased(model: Model, bout: _Bout, chosen: Chosen, out: Path) -> dict[str, Any]:
    _write(chosen.trained.adapter, out, bout.recipe.base, bout.recipe)
    facts = {"tier": bout.recipe.tier, "base": loaded(model), **chosen.told} | {
        name: getattr(chosen, name) for name in ("start", "candidate", "candidates", "starts")
    }
    return _training_facts(chosen.trained, bout.training.precision) | facts | {"steps": chosen.steps}


def _combine(recipe: Combine, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    adapters = [read_adapter(inputs[f"adapter.{i}"]) for i in range(len(recipe.adapters))]
    combined = combine(adapters, recipe, report)
    _write(combined.adapter, out, recipe.base, recipe)
    return {"method": recipe.method, "modules": _by_name(combined.modules)}


def _compress(recipe: Compress, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    made = compress(read_adapter(inputs["adapter"]), recipe, report)
    _write(made.adapter, out, recipe.base, recipe)
    size = {"before": made.bytes_before, "after": made.bytes_after}
    return {"modules": _by_name(made.modules), "energy": made.energy, "bytes": size}


def _extract(recipe: Extract, inputs: Inputs, out: Path, report: Report) -> dict[str, Any]:
    made = extract(inputs["base"], inputs["tuned"], recipe, report)
    _write(made.adapter, out, recipe.base, recipe)
    return {"modules": _by_name(made.modules), "energy": made.energy, "rest": _by_name(made.rest)}


def _search(recipe: Search, inputs: Inputs, out: Path, report: Report, checkpoint: Path | None) -> dict[str, Any]:
    suite = inputs.suite()
    model, tokenizer = load(inputs["base"], recipe.training.precision)
    rows = inputs.rows()
    study, found = search(model, tokenizer, recipe, rows, suite, report=report, checkpoint_dir=checkpoint)
    _write(found.adapter, out, recipe.base, recipe)
    told = {"over": recipe.over, "chosen": found.chosen, "reason": found.reason, "candidates": found.candidates}
    measured = {"metric": study.metric, "items": study.items, "found": found.recipe.model_dump(mode="json")}
    return _training_facts(found.trained, recipe.training.precision) | told | measured | found.facts


def _compare(recipe: Compare, inputs: Inputs, report: Report) -> dict[str, Any]:
    adapters = [normalised(inputs[f"adapter.{i}"], inputs["old"]) for i in range(len(recipe.adapters))]
    return asdict(compare(inputs["old"], inputs["base"], report, adapters, _unlabelled(recipe, inputs)))


def _by_name(found: Mapping[str, Kept] | Mapping[str, Other] | Mapping[str, Match]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in found.items()}


def _unlabelled(recipe: Rebase | Compare, inputs: Inputs) -> list[Row]:
    """Rows of which only the prompts are read."""
    return inputs.unlabelled() if recipe.inputs else []


def _write(adapter: Adapter, out: Path, base: str, recipe: MakesAdapter) -> None:
    write_adapter(adapter, out / "adapter", base=base, recipe=str(recipe_digest(recipe)))


def _training_facts(trained: Trained | Tuned, precision: Precision) -> dict[str, Any]:
    losses = list(enumerate(trained.losses, start=1))
    thin = -(-len(losses) // CURVE_POINTS)
    rate = {"learning_rate": trained.rate} if isinstance(trained, Trained) else {}
    held_out = {"held_out": [list(look) for look in trained.held_out], "kept": trained.kept}
    return {
        "steps": len(losses),
        "tokens": trained.tokens,
        "rows": asdict(trained.counted),
        "loss": [list(point) for point in losses if point[0] % thin == 0],
        "precision": _precision(precision),
    } | rate | (held_out if trained.held_out else {})


def _precision(asked: Precision) -> str:
    return "bf16" if dtype_for(asked) == torch.bfloat16 else "fp32"


# ── the command ──────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run once, and say how it ended: 0, 1 refused, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(prog="python -m workers.run", description="Run one recipe on local folders.")
    parser.add_argument("recipes", nargs="+", type=Path, metavar="recipe", help="a recipe as JSON")
    parser.add_argument("--in", dest="inputs", action="append", default=[], metavar="ROLE=DIR", type=_input)
    parser.add_argument("--called", action="append", default=[], metavar="ROLE=TEXT", type=_words,
                        help="what people call the data behind a role, for refusals")  # fmt: skip
    parser.add_argument("--out", dest="outs", action="append", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where to leave checkpoints and go on from")
    parser.add_argument("--from", dest="earlier", action="append", default=[], type=Path, metavar="DIR",
                        help="checkpoints to begin with where --checkpoint has none")  # fmt: skip
    parser.add_argument("--progress-fd", type=int, metavar="N", help="write progress as JSON lines to this descriptor")
    parser.add_argument("--processes", type=int, metavar="N", help="of a recipe with 'sharded'; one a GPU by default")
    args = parser.parse_args(argv)
    together = len(args.recipes) > 1
    if len(args.outs) != len(args.recipes):
        parser.error(f"{len(args.recipes)} recipes need as many --out, in their order; {len(args.outs)} were given")
    started_by_torchrun = is_started_by_torchrun(os.environ)
    many = 1 if together else _processes(args.recipes[0], args.processes)
    if not started_by_torchrun and many > 1:
        _start(many, sys.argv[1:] if argv is None else argv)
    if started_by_torchrun:
        die_with(os.getppid())()
    progress = args.progress_fd
    if progress is not None and started_by_torchrun:  # which closes what its children would inherit
        progress = os.open(f"/proc/{os.getppid()}/fd/{progress}", os.O_WRONLY)

    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    def report(now: dict[str, Any]) -> None:
        if progress is not None and ranks.first:
            os.write(progress, json.dumps(now).encode() + b"\n")
        elif ranks.first:
            words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in now.items())  # fmt: skip
            sys.stderr.write("  ".join(words) + "\n")
        if stopped:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    ranks = ALONE
    try:
        with ranks_of(os.environ) as ranks:
            if ranks.first:
                (args.outs[0] / _REFUSAL).unlink(missing_ok=True)
                if args.checkpoint is not None and args.earlier:
                    snapshot.gather(args.earlier, args.checkpoint)
            ranks.wait()
            recipes = [parse_recipe(path.read_bytes()) for path in args.recipes]
            if together:
                given = [Inputs(_of(place, args.inputs), _of(place, args.called)) for place in range(len(recipes))]
                return min(1, run_together(recipes, given, args.outs, report, args.checkpoint))
            run(recipes[0], Inputs(dict(args.inputs), dict(args.called)), args.outs[0], report, args.checkpoint, ranks)
    except KeyboardInterrupt:
        return 130
    except LoractlError as error:
        return max(_refused(error, out) for out in args.outs if not (out / "result.json").exists())
    except RuntimeError as error:
        if ranks.many == 1:
            raise
        return _refused(ProcessFailed(rank=ranks.rank, many=ranks.many, reason=str(error)), args.outs[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _refused(error: LoractlError, out: Path) -> int:
    """Leave the refusal, unless another process was refused before: it says why, and the others that they lost it."""
    if not (out / _REFUSAL).exists():
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / _REFUSAL, json.dumps(error.problem(), indent=2, default=str).encode() + b"\n")
        sys.stderr.write(f"{error.message}\n{error.hint}".strip() + "\n")
    return 1


def _of(place: int, given: Sequence[tuple[str, Given]]) -> dict[str, Given]:
    """What was given for one of several recipes: roles behind its number."""
    return {role.partition(":")[2]: value for role, value in given if role.startswith(f"{place}:")}


def _processes(path: Path, asked: int | None) -> int:
    """How many processes are to run the recipe in this file."""
    try:
        recipe = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return 1  # it is refused where it is read
    sharded = isinstance(recipe, dict) and recipe.get("sharded") is True
    return (asked or torch.cuda.device_count()) if sharded else 1


def _start(many: int, argv: Sequence[str]) -> None:
    """Become torchrun with the same command in so many processes."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // many)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(many), "-m", "workers.run"]
    os.execv(sys.executable, [sys.executable, *launch, *argv])  # noqa: S606  # our own command, and no shell


def _words(text: str) -> tuple[str, str]:
    role, equals, words = text.partition("=")
    if not equals or not words:
        raise argparse.ArgumentTypeError(f"'{text}' is not ROLE=TEXT")
    return role, words


def _input(text: str) -> tuple[str, Path]:
    role, equals, folder = text.partition("=")
    if not equals or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is not ROLE=DIR with a folder that is there")
    return role, Path(folder)


if __name__ == "__main__":
    sys.exit(main())
