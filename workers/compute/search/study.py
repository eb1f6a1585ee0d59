"""What every search is made of: candidates trained together, scored in one pass, and compared item by item.

A study lives in a folder. What a phase has trained is a checkpoint there, what it has scored are records, and what
diverged is noted with its reason: a search that was killed goes on from what is finished, and ends in the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from registry.core.errors import SuiteTooSmall, TrainingFailed
from registry.core.recipes import LEAST_ITEMS, FineTune, Search
from registry.core.records import Record, Split, item_id, parse_records, split_of, to_jsonl

from ..bank import attached
from ..data import Row, tokenize
from ..evaluate import Suite, evaluate
from ..finetune import Report, Task, Trained, as_trained
from ..lora import Adapter
from ..metrics import ALPHA, Difference, difference, mean
from ..model import Model, Tokenizer, context_of
from ..panel import MAX_LENGTH
from ..weights import write_file

Records = dict[str, tuple[Record, ...]]


@dataclass(frozen=True)
class Found:
    """What a search ended with."""

    adapter: Adapter
    trained: Trained
    recipe: FineTune
    """That trains one like it."""
    chosen: str
    reason: str
    candidates: dict[str, dict[str, Any]]
    """What was known of each in the end."""
    facts: dict[str, Any]


class Study:
    """One search on its way."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        recipe: Search,
        rows: Sequence[Row],
        suite: Suite,
        report: Report,
        folder: Path,
    ) -> None:
        """`SuiteTooSmall` when the suite cannot choose anything."""
        self.model, self.recipe = model, recipe
        self._tokenizer, self._rows, self._report, self._folder = tokenizer, rows, report, folder
        looked_at = [row for row in suite.rows if split_of(item_id(row.value)) != "gate"]
        self._suite = replace(suite, rows=looked_at)
        self.metric = suite.main_metric()
        self.items = dict.fromkeys(("calibration", "report"), 0)
        for row in looked_at:
            scored = self.metric != "accuracy" or "choices" in row.value
            self.items[split_of(item_id(row.value))] += scored
        if self.items["calibration"] < LEAST_ITEMS:
            raise SuiteTooSmall(n=self.items["calibration"], metric=self.metric, needed=LEAST_ITEMS)

    # ── training ──

    def train(self, phase: str, recipes: Mapping[str, FineTune], until: int | None = None) -> dict[str, Trained]:
        """Train all that have not diverged, together, up to step ``until``, and give those that have not."""
        folder = self._folder / phase
        failed = self.failed(phase)
        names = [name for name in recipes if name not in failed]
        steps = max(recipe.steps for recipe in recipes.values()) if until is None else until
        what = f"train {len(names)} candidates" if len(recipes) > 1 else "train"
        found: dict[str, Trained] = {}
        for place, outcome in as_trained(
            self.model, self._tokenizer, [Task(recipes[name], self._rows) for name in names],
            report=self._once_a_step(what, steps, len(names)), checkpoint_dir=folder, until=steps,
        ):  # fmt: skip
            name = names[place]
            if isinstance(outcome, Trained) and not self._answers(outcome.adapter):
                outcome = TrainingFailed(step=len(outcome.losses), reason="what it answers is no number any more")
            if isinstance(outcome, Trained):
                found[name] = outcome
            elif isinstance(outcome, TrainingFailed):
                failed[name] = outcome.message
                folder.mkdir(parents=True, exist_ok=True)
                write_file(folder / _FAILED, json.dumps(failed, indent=2).encode())
            else:
                raise outcome  # a request that is wrong, not a candidate that diverged
        return {name: found[name] for name in names if name in found}

    @torch.no_grad()
    def _answers(self, adapter: Adapter) -> bool:
        """Whether the model is one with the adapter: the step after the last loss may have been a step too far."""
        limit = min(MAX_LENGTH, context_of(self.model) or MAX_LENGTH)
        example = tokenize(self._tokenizer, self._suite.rows[0], limit)
        ids = torch.tensor([example.prompt + example.completions[0]], device=self.model.device)
        with attached(self.model, adapter):
            return bool(torch.isfinite(self.model(input_ids=ids).logits).all())

    def all_failed(self, phase: str) -> TrainingFailed:
        """The refusal when nothing of a phase can be gone on with."""
        return TrainingFailed(step=0, reason=f"every candidate diverged: {'; '.join(self.failed(phase).values())}")

    def failed(self, phase: str) -> dict[str, str]:
        """Why candidates of a phase were dropped."""
        path = self._folder / phase / _FAILED
        noted: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
        return noted

    def _once_a_step(self, what: str, steps: int, many: int) -> Report:
        losses: dict[int, float] = {}
        told = 0

        def report(progress: dict[str, Any]) -> None:
            nonlocal told
            losses[progress["task"]] = progress["loss"]
            if progress["step"] > told:
                told = progress["step"]
                self._report({
                    "phase": what, "step": told, "steps": steps, "loss": min(losses.values()), "candidates": many,
                })  # fmt: skip

        return report

    # ── scoring ──

    def scored(self, phase: str) -> Records | None:
        """The records that a phase has left; None before it was scored."""
        folder = self._folder / phase
        if not (folder / _SCORED).is_file():
            return None
        names = json.loads((folder / _SCORED).read_bytes())
        return {name: parse_records((folder / f"records-{name}.jsonl").read_bytes()) for name in names}

    def score(self, phase: str, adapters: Mapping[str, Adapter]) -> Records:
        """The records of all adapters and of the bare base, from one pass over calibration and report split."""
        if (before := self.scored(phase)) is not None:
            return before
        what = f"score {len(adapters)} candidates"

        def report(progress: dict[str, Any]) -> None:
            self._report({"phase": what, "step": progress["step"], "steps": progress["steps"]})

        found = evaluate(self.model, self._tokenizer, self._suite, adapters, report=report)
        folder = self._folder / phase
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in found.items():
            write_file(folder / f"records-{name}.jsonl", to_jsonl(records))
        write_file(folder / _SCORED, json.dumps(list(found)).encode())
        return {name: parse_records(to_jsonl(records)) for name, records in found.items()}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The mean of the metric by split: what chooses, and what is quoted."""
        with_it = [record for record in records if self.metric in record.metrics]
        splits: tuple[Split, ...] = ("calibration", "report")
        return {split: mean(with_it, self.metric, split) for split in splits if self.items[split]}

    def score_of(self, records: Sequence[Record]) -> float:
        """The mean of the metric on the calibration split."""
        return self.scores(records)["calibration"]

    def difference(self, one: Sequence[Record], other: Sequence[Record], alpha: float = ALPHA) -> Difference:
        """One less the other, with bounds that are each wrong with probability ``alpha``, paired as in the gate."""
        return difference(one, other, self.metric, alpha, "calibration")


_FAILED = "failed.json"
_SCORED = "scored.json"
