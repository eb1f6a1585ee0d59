"""The course of a training, whatever is trained: rows in batches, rates by step, losses so far, and when it ends.

Deterministic: the order of rows is drawn from the seed and the epoch, so that a number of steps is a place in the data.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from registry.core.errors import TrainingFailed, UnusableDataset
from registry.core.recipes import Training

from .data import Example, batches, chunks, hold_out, shortened
from .model import Model, check_tokens, context_of
from .rate import rate_of


@dataclass(frozen=True)
class Counted:
    """What became of the rows that were given."""

    trained: int = 0
    held_out: int = 0
    cut: int = 0
    """Of both, those whose prompt was too long."""
    dropped: int = 0
    """Neither trained on nor held out, because they were too long."""
    max_length: int = 0
    """What was too long: more tokens than this."""


@dataclass(eq=False, kw_only=True)
class Course:
    """How far a training is."""

    recipe: Training
    counted: Counted
    ahead: Iterator[list[Example]]
    """The batches of the coming steps."""
    held: Sequence[Sequence[Example]]
    """Rows held out, in batches."""
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    looks: list[tuple[int, float]] = field(default_factory=list)
    """Steps after which rows held out were looked at, and their loss."""

    @property
    def step(self) -> int:
        """Steps made."""
        return len(self.losses)

    @property
    def best_look(self) -> tuple[int, float]:
        """The look with the lowest loss, the first of equal ones."""
        return min(self.looks, key=lambda look: look[1])

    @property
    def ended(self) -> bool:
        """Whether no step is left to make."""
        return self.step >= self.recipe.steps or self._lost_patience

    @property
    def _lost_patience(self) -> bool:
        if not self.looks or not self.recipe.patience:
            return False
        since = len(self.looks) - 1 - self.looks.index(self.best_look)
        return since >= self.recipe.patience

    @property
    def wants_a_look(self) -> bool:
        """Whether rows held out are due after the step just made."""
        due = self.step % self.recipe.look_every == 0 or self.step >= self.recipe.steps
        return bool(self.held) and due

    @property
    def is_best(self) -> bool:
        """Whether the look just made is the best so far, and there is patience that asks."""
        return bool(self.recipe.patience) and self.best_look == self.looks[-1]

    @property
    def wants_a_checkpoint(self) -> bool:
        """Whether one is due after the step just made."""
        every = self.recipe.checkpoint_every
        return bool(every) and self.step % every == 0

    def told(self) -> dict[str, Any]:
        """The step just made, for a report."""
        now = {"step": self.step, "steps": self.recipe.steps, "loss": self.losses[-1], "tokens": self.tokens}
        return now | ({"held_out": self.looks[-1][1]} if self.looks and self.looks[-1][0] == self.step else {})

    def noted(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {"losses": self.losses, "tokens": self.tokens, "looks": self.looks}

    def go_to(self, noted: dict[str, Any]) -> None:
        """Be where a checkpoint was made."""
        self.losses, self.tokens = noted["losses"], noted["tokens"]
        self.looks = [(step, loss) for step, loss in noted["looks"]]
        self.ahead = itertools.islice(self.ahead, self.step, None)


def laid_out(
    model: Model, recipe: Training, examples: Sequence[Example]
) -> tuple[Iterator[list[Example]], list[list[Example]], Counted]:
    """The batches of a training, without end; what is held out, in batches; and what became of all examples."""
    limit = min(recipe.max_length, context_of(model) or recipe.max_length)
    if of_a_suite := next((one.row for one in examples if "choices" in one.row.value), None):
        raise of_a_suite.refuse("rows with 'choices' are for suites; training needs one completion")
    kept, held = hold_out(examples, recipe.held_out)
    long = sum(len(example.ids) > limit for example in (*kept, *held))
    kept, held = ([_fitted(one, limit, recipe) for one in some if _stays(one, limit, recipe)] for some in (kept, held))
    if not kept or (recipe.held_out and not held):
        path = examples[0].row.where if examples else "the dataset"
        raise UnusableDataset(path=path, reason=_nothing_left(examples, limit))
    check_tokens(model, (token for example in (*kept, *held) for token in example.ids))
    dropped = long if recipe.long_rows == "drop" else 0
    counted = Counted(len(kept), len(held), long - dropped, dropped, limit)
    return batches(kept, recipe.batch_tokens, recipe.seed), list(chunks(held, recipe.batch_tokens)), counted


def _stays(example: Example, limit: int, recipe: Training) -> bool:
    return len(example.ids) <= limit or recipe.long_rows != "drop"


def _fitted(example: Example, limit: int, recipe: Training) -> Example:
    if len(example.ids) > limit and recipe.long_rows == "refuse":
        reason = f"{len(example.ids)} tokens; at most {limit} are allowed, unless long_rows says 'cut' or 'drop'"
        raise example.row.refuse(reason)
    return shortened(example, limit)


def _nothing_left(examples: Sequence[Example], limit: int) -> str:
    if not examples:
        return "there are no rows"
    return f"with rows of more than {limit} tokens dropped, none of {len(examples)} is left to train on, or held out"


def learning_rate(recipe: Training, step: int) -> float:
    """The rate at a step counted from 0: a linear rise over the warm-up, then the schedule down towards 0."""
    rate = rate_of(recipe)
    if step < recipe.warmup_steps:
        return rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    match recipe.schedule:
        case "constant":
            return rate
        case "linear":
            return rate * (1 - done)
        case "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * done))


def no_number(what: str, value: float, step: int, batch: Sequence[Example]) -> TrainingFailed | None:
    """The failure when a loss or a gradient is no number, with the rows it came from."""
    if math.isfinite(value):
        return None
    rows = "rows " + ", ".join(f"{example.row.where}:{example.row.line}" for example in batch)
    return TrainingFailed(step=step, reason=f"the {what} is {value} on {rows}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's errors of memory are of this kind on every device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
