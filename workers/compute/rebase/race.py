"""Candidates for one adapter, trained together for equally long, and the one that measures best (docs: rebase).

Warm start, distillation and retraining differ in who starts, in what is learnt and in the measure; the rest is here.
The candidates of any number of adapters go through one run on their common base (`finetune.as_trained`): each adapter
has its outcome as soon as its own candidates have ended, and a candidate that diverges is out of its race alone.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from registry.core.errors import LoractlError, TrainingFailed

from ..bank import parts_of
from ..finetune import Outcome, Report, Task, Trained, as_trained, silent
from ..model import Model, Tokenizer
from .starts import without_basis

Measure = Callable[[Mapping[str, Trained]], Mapping[str, dict[str, Any]]]
"""What is known of each that came to its end: ``score``, the higher the better, and what else there is to tell."""


@dataclass(frozen=True)
class Entrant:
    """A candidate: what it starts from, and its training."""

    start: str
    task: Task


@dataclass(frozen=True)
class Race:
    """The candidates for one adapter, by name."""

    entrants: Mapping[str, Entrant]
    measure: Measure
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was known of every start before a step."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to say of it in the end."""
    owner: str = ""
    """Whose race it is: in front of what the candidates' checkpoints are found by."""


@dataclass(frozen=True)
class Chosen:
    """The candidate that won, and what was known of each when it did."""

    trained: Trained
    start: str
    candidate: str
    candidates: Mapping[str, Mapping[str, Any]]
    starts: Mapping[str, Mapping[str, Any]]
    steps: int
    """That all candidates took together: what the tier cost."""
    told: Mapping[str, Any] = field(default_factory=dict)


def as_raced(
    model: Model,
    tokenizer: Tokenizer,
    races: Sequence[Race],
    *,
    report: Report = silent,
    checkpoint_dir: Path | None = None,
    unwanted: Collection[int] = (),
) -> Iterator[tuple[int, Chosen | LoractlError]]:
    """Run all races at once and give each winner, by its place, when its race ends.

    ``report`` is called after every step of every candidate, with the race as ``task``, the ``candidate``, and steps
    counted over all of the race. ``unwanted`` are places that are looked at after every step: their races end without
    an outcome. A checkpoint is left where a report asks to stop, and when training ends, before anything is measured.
    """
    runs = [(place, name) for place, race in enumerate(races) for name in race.entrants]
    given_up: set[int] = set()

    def told(now: dict[str, Any]) -> None:
        place, name = runs[now["task"]]
        names = list(races[place].entrants)
        step = (now["step"] - 1) * len(names) + names.index(name) + 1
        given_up.update(run for run, (owner, _) in enumerate(runs) if owner in unwanted)
        report(now | {"task": place, "step": step, "steps": now["steps"] * len(names), "candidate": name})

    tasks = [replace(races[place].entrants[name].task, owner=races[place].owner) for place, name in runs]
    ended: list[dict[str, Outcome]] = [{} for _ in races]
    options: dict[str, Any] = {"report": told, "checkpoint_dir": checkpoint_dir, "unwanted": given_up}
    until = max((task.recipe.steps for task in tasks), default=0) if checkpoint_dir is not None else None
    for run, outcome in as_trained(model, tokenizer, tasks, **options, until=until):
        place, name = runs[run]
        ended[place][name] = outcome
        if len(ended[place]) == len(races[place].entrants):
            yield place, _won(races[place], ended[place])


def raced(
    model: Model, tokenizer: Tokenizer, race: Race, report: Report = silent, checkpoint_dir: Path | None = None
) -> Chosen:
    """One race alone; what it fails by is raised."""
    [(_, outcome)] = as_raced(model, tokenizer, [race], report=report, checkpoint_dir=checkpoint_dir)
    if isinstance(outcome, LoractlError):
        raise outcome
    return outcome


def _won(race: Race, ended: Mapping[str, Outcome]) -> Chosen | LoractlError:
    failed: dict[str, LoractlError] = {}
    trained: dict[str, Trained] = {}
    for name in race.entrants:
        outcome = ended[name]
        if isinstance(outcome, Trained) and not _is_finite(outcome):
            outcome = TrainingFailed(step=len(outcome.losses), reason="what was trained is no number any more")
        if isinstance(outcome, Trained):
            trained[name] = replace(outcome, adapter=without_basis(outcome.adapter))
        else:
            failed[name] = outcome
    try:
        found = race.measure(trained) if trained else {}
    except LoractlError as error:
        return error
    sound = [name for name in trained if math.isfinite(found[name]["score"])]
    if not sound:
        return next(iter(failed.values()), TrainingFailed(step=0, reason="no candidate's score is a number"))
    best = max(sound, key=lambda name: found[name]["score"])  # the first of equal ones
    candidates = {
        name: {"steps": len(run.losses), "learning_rate": run.rate} | found[name] for name, run in trained.items()
    } | {name: {"dropped": error.message} for name, error in failed.items()}
    steps = sum(len(run.losses) for run in trained.values())
    return Chosen(trained[best], race.entrants[best].start, best, candidates, race.starts, steps, race.told)


def _is_finite(trained: Trained) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in parts_of(trained.adapter).values())
