"""The course of a training, whatever is trained: rows in batches, rates by step, losses so far, and when it ends.

Deterministic: the order of rows is drawn from the seed and the epoch, so that a number of steps is a place in the data.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from registry.core.errors import TrainingFailed
from registry.core.recipes import Training

from .data import Example, Row, batches, chunks, hold_out, tokenize
from .model import Model, Tokenizer, check_tokens


@dataclass(eq=False, kw_only=True)
class Course:
    """How far a training is."""

    recipe: Training
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
    model: Model, tokenizer: Tokenizer, recipe: Training, rows: Sequence[Row]
) -> tuple[Iterator[list[Example]], list[list[Example]]]:
    """The batches of a training, without end, and its rows held out, in batches."""
    kept, held = hold_out(rows, recipe.held_out)
    examples, aside = (
        [tokenize(tokenizer, _trainable(row), recipe.max_length) for row in some] for some in (kept, held)
    )
    check_tokens(model, (token for example in (*examples, *aside) for token in example.ids))
    return batches(examples, recipe.batch_tokens, recipe.seed), list(chunks(aside, recipe.batch_tokens))


def _trainable(row: Row) -> Row:
    if "choices" in row.value:
        raise row.refuse("rows with 'choices' are for suites; training needs one completion")
    return row


def learning_rate(recipe: Training, step: int) -> float:
    """The rate at a step counted from 0: a linear rise over the warm-up, then the schedule down towards 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    match recipe.schedule:
        case "constant":
            return recipe.learning_rate
        case "linear":
            return recipe.learning_rate * (1 - done)
        case "cosine":
            return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def no_number(what: str, value: float, step: int, batch: Sequence[Example]) -> TrainingFailed | None:
    """The failure when a loss or a gradient is no number, with the rows it came from."""
    if math.isfinite(value):
        return None
    rows = "rows " + ", ".join(f"{example.row.path}:{example.row.line}" for example in batch)
    return TrainingFailed(step=step, reason=f"the {what} is {value} on {rows}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's errors of memory are of this kind on every device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
