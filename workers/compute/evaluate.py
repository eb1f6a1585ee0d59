"""Evaluation: many adapters and the bare base on one suite, with one load of the base and a record per item.

A suite is a folder with ``*.jsonl`` rows (see `data`) and, when it asks for other than the default, a suite.json beside
them (`registry.core.suites`). A record's `parsed` is whether the output had the ``form`` that was asked for. With
``lm_eval`` (`registry.core.tasks`) the rows are those of tasks of lm-eval, and `lm_eval` scores them.
How many adapters answer together is the matter of `panel`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import regex

from registry.core.digest import Digest
from registry.core.errors import BadConfig, ScoreNotANumber
from registry.core.manifest import canonical_json
from registry.core.metrics import Metric, is_generated
from registry.core.records import Record, item_id, split_of
from registry.core.suites import SUITE_FILE, SuiteSpec, metrics_of
from registry.files import read_spec

from . import lm_eval
from . import metrics as metric
from .data import Example, Row, encoded, read_rows, shortened
from .finetune import Report, silent
from .lora import Adapter
from .model import Model, Tokenizer, check_tokens
from .panel import MAX_LENGTH, Panel, Query, Text

HARNESS = 1
"""Raised whenever the same model would get another score: old records then no longer pair with new ones."""
GENERATION = 2
"""The same, of what is generated. 2: prompts of unlike length together, padded; several references."""
_PATIENCE_S = 5.0
"""What an expression may take for one output."""


@dataclass(frozen=True)
class Suite:
    """Rows, the metrics asked for (None: by the form of the row), how far a generation may go, and its form.

    ``questions``: the tasks of lm-eval that make questions of the rows.
    """

    rows: Sequence[Row]
    metrics: tuple[Metric, ...] | None = None
    max_new_tokens: int = 64
    form: str | None = None
    questions: tuple[lm_eval.Questions, ...] = ()

    @classmethod
    def read(cls, folder: Path, data: str = "") -> "Suite":
        """The suite of a folder, which people call ``data``; `BadConfig` says what its suite.json may hold."""
        spec = SuiteSpec.parse(read_spec(folder))
        for name in spec.metrics or ():
            metric.version_of(name)  # a custom one that nobody brings is refused before a model is loaded
        if spec.form and spec.form != "json" and (problem := _form_problem(spec.form)):
            raise BadConfig(path=SUITE_FILE, reason=f"form is {json.dumps(spec.form)}; {problem}")
        if spec.tasks:
            rows, questions = lm_eval.read(folder, spec.tasks, data)
        else:
            rows, questions = read_rows(folder, data), ()
        return cls(rows, spec.metrics, spec.max_new_tokens, spec.form, questions)

    def only(self, split: str, most: int | None = None) -> "Suite":
        """The suite's rows of one split; at ``most`` so many of them, by their hashes, wherever they stand."""
        items = [item_id(row.value) for row in self.rows]
        kept = set(sorted({item for item in items if split_of(item) == split})[:most])
        return replace(self, rows=[row for item, row in zip(items, self.rows, strict=True) if item in kept])

    def metrics_of(self, example: Example) -> tuple[Metric, ...]:
        """What this row is scored by."""
        return metrics_of(self.metrics, choices=example.answer is not None)

    def main_metric(self) -> Metric:
        """The metric that chooses among candidates: the first one asked for, else the first row's first."""
        if self.questions:
            return (self.metrics or self.questions[0].task.metrics())[0]
        return self.metrics[0] if self.metrics else "accuracy" if "choices" in self.rows[0].value else "likelihood"

    def harness(self, precision: str, quantised: str | None = None) -> Digest:
        """Digest of all that decides a score beside the model and the rows."""
        spec: dict[str, Any] = {"harness": HARNESS, "metrics": self.metrics, "max_new_tokens": self.max_new_tokens}
        if quantised:
            spec["quantised"] = quantised
        made = sorted(name for name in self.metrics or () if is_generated(name))
        if self.questions:
            spec |= {"generation": GENERATION, "form": self.form, "versions": [lm_eval.version()]}
        elif made:
            versions = sorted({version for name in made if (version := metric.version_of(name))})
            spec |= {"generation": GENERATION, "form": self.form, "versions": versions}
        return Digest.sha256(canonical_json(spec | {"precision": precision, "max_length": MAX_LENGTH}))


def _form_problem(form: str) -> str | None:
    try:
        regex.compile(form.removeprefix("regex:"))
    except regex.error as error:
        return f"the expression does not compile: {error}"
    return None


def has_form(output: str, form: str) -> bool:
    """Whether an output, without the spaces at its ends, is JSON, or is matched as a whole."""
    text = output.strip()
    if form == "json":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
        return True
    try:
        return regex.fullmatch(form.removeprefix("regex:"), text, timeout=_PATIENCE_S) is not None
    except TimeoutError as error:
        reason = f"{form} takes over {_PATIENCE_S:g} s for one output; avoid repeats within repeats"
        raise BadConfig(path="suite.json", reason=reason) from error


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    suite: Suite,
    adapters: Mapping[str, Adapter],
    *,
    bare: bool = True,
    report: Report = silent,
) -> dict[str, list[Record]]:
    """Records by adapter name (`BARE` for the base alone), in the order of the suite's rows."""
    panel = Panel(model, tokenizer, adapters, bare=bare, report=report)
    if suite.questions:
        answered = lm_eval.answers(panel, suite.rows, suite.questions)
        return {name: list(map(partial(_of_task, suite), suite.rows, own)) for name, own in answered.items()}
    examples = [shortened(example, panel.limit) for example in encoded(tokenizer, suite.rows)]
    check_tokens(model, (token for e in examples for ids in (e.prompt, *e.completions) for token in ids))
    wanted = [suite.metrics_of(example) for example in examples]
    for example, metrics in zip(examples, wanted, strict=True):
        if not metrics:
            raise example.row.refuse(f"none of the suite's metrics {', '.join(suite.metrics or ())} applies to it")
    scored = [i for i, metrics in enumerate(wanted) if not all(map(is_generated, metrics))]
    written = [i for i, metrics in enumerate(wanted) if any(map(is_generated, metrics))]
    asked = {i: list(queries_of(examples[i])) for i in scored}
    length = min(suite.max_new_tokens, panel.limit - 1)
    panel.steps = (sum(map(len, asked.values())) + len(written)) * len(panel.names)
    with panel.seated():
        answers = panel.log_probabilities([query for queries in asked.values() for query in queries])
        texts = panel.continuations([examples[i].prompt[length - panel.limit :] for i in written], length)
    found: dict[str, list[Record]] = {}
    for name in panel.names:
        own = iter(answers[name])
        scores = {i: [value for _ in queries for value in next(own).log_p] for i, queries in asked.items()}
        outputs = dict(zip(written, texts[name], strict=True))
        found[name] = [_record(suite, e, scores.get(i, ()), outputs.get(i)) for i, e in enumerate(examples)]
    return found


def queries_of(example: Example) -> Iterator[Query]:
    """One row per completion, in their order; choices of a single token share one row and one position."""
    first = len(example.prompt)
    if all(len(completion) == 1 for completion in example.completions):
        yield Query(example.prompt, first, (tuple(completion[0] for completion in example.completions),))
        return
    for completion in example.completions:
        yield Query(example.prompt + completion[:-1], first, tuple((token,) for token in completion))


def _record(suite: Suite, example: Example, scores: Sequence[float], output: Text | None) -> Record:
    right = example.answer or 0
    references = [example.texts[right], *example.row.value.get("references", ())]
    values: dict[Metric, float] = {}
    for name in suite.metrics_of(example):
        match name:
            case "likelihood":
                values[name] = metric.likelihood(scores[right], example.texts[right])
            case "accuracy":
                values[name] = metric.accuracy(scores, example.texts, right)
            case _:
                values[name] = metric.comparison(name)(output.text.strip() if output else "", references)
    item = item_id(example.row.value)
    split = split_of(item)
    _check_finite(example.row, values, scores)
    if output is None:
        return Record(item=item, split=split, metrics=values)
    parsed = output.ended if suite.form is None else has_form(output.text, suite.form)
    return Record(item=item, split=split, metrics=values, parsed=parsed, output=output.text)


def _check_finite(row: Row, values: Mapping[Metric, float], scores: Sequence[float]) -> None:
    """NaN compares with nothing, so that even the choice of the likeliest would mean nothing."""
    for name, value in values.items():
        odd = next((score for score in (value, *scores) if not math.isfinite(score)), None)
        if odd is not None:
            raise ScoreNotANumber(path=row.where, line=row.line, metric=name, value=f"{odd:g}")


def _of_task(suite: Suite, row: Row, answered: lm_eval.Answered) -> Record:
    item = item_id(row.value)
    kept = {name: value for name, value in answered.scores.items() if name in (suite.metrics or answered.scores)}
    if not kept:
        asked, there = ", ".join(suite.metrics or ()), ", ".join(answered.scores)
        raise row.refuse(f"none of the suite's metrics {asked} applies to it; its task has {there}")
    output = answered.output
    if output is None:
        return Record(item=item, split=split_of(item), metrics=kept)
    parsed = output.ended if suite.form is None else has_form(output.text, suite.form)
    return Record(item=item, split=split_of(item), metrics=kept, parsed=parsed, output=output.text)
