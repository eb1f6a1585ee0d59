"""What adapters and the bare base answer to unlabelled inputs, as a suite asks: what a gate's pool is made of.

The answer to a row with choices is the likeliest of them by byte, as `metrics.accuracy` has it; to others what is
written, greedily, without the spaces at its ends. Whether it is right depends on nothing else, so equal answers are
right together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from registry.core.errors import UnusableDataset
from registry.core.pool import Answered, input_id
from registry.core.rows import input_of, parse_input

from .data import Row, encoded, prompts_of, rows_of, shortened
from .evaluate import Suite, has_form, queries_of
from .finetune import Report, silent
from .lora import Adapter
from .metrics import likeliest
from .model import Model, Tokenizer, check_tokens
from .panel import Panel


def read_inputs(folder: Path, data: str = "") -> list[Row]:
    """The rows of every ``.jsonl`` file of a dataset, as `data.read_rows` reads them; they may lack an answer."""
    return [row for path in sorted(folder.rglob("*.jsonl")) for row in rows_of(path, parse_input, data)]


def distinct(rows: Iterable[Row], apart: Iterable[Row]) -> list[Row]:
    """The first row of each input that no row of ``apart`` asks, in order of the inputs' names."""
    gone = {input_id(row.value) for row in apart}
    left: dict[str, Row] = {}
    where = "the pool"
    for row in rows:
        where = row.where
        if (item := input_id(row.value)) not in gone:
            left.setdefault(item, row)
    if not left:
        reason = "every input of it is in the suite, or in what was trained on: a pool needs others"
        raise UnusableDataset(path=where, reason=reason)
    return [left[item] for item in sorted(left)]


def answers(
    model: Model,
    tokenizer: Tokenizer,
    suite: Suite,
    rows: Sequence[Row],
    adapters: Mapping[str, Adapter],
    *,
    bare: bool = False,
    report: Report = silent,
) -> dict[str, list[Answered]]:
    """Answers by adapter name (`BARE` for the base alone), in the order of ``rows``, by the suite's one metric."""
    panel = Panel(model, tokenizer, adapters, bare=bare, report=report)
    chosen = (suite.metrics or ("",))[0] == "accuracy"
    for row in rows:
        if ("choices" in row.value) != chosen:
            must = "need" if chosen else "must not have"
            raise row.refuse(f"the gate is on {suite.main_metric()}: inputs {must} 'choices'")
    return (_chosen if chosen else _written)(panel, suite, rows)


def _chosen(panel: Panel, _: Suite, rows: Sequence[Row]) -> dict[str, list[Answered]]:
    """The likeliest choice of each row."""
    asked = [replace(row, value={**input_of(row.value), "answer": 0}) for row in rows]
    examples = [shortened(example, panel.limit) for example in encoded(panel.tokenizer, asked)]
    check_tokens(panel.model, (token for e in examples for ids in (e.prompt, *e.completions) for token in ids))
    queries = [list(queries_of(example)) for example in examples]
    panel.steps = sum(map(len, queries)) * len(panel.names)
    with panel.seated():
        found = panel.log_probabilities([query for some in queries for query in some])
    told: dict[str, list[Answered]] = {}
    for name, own in found.items():
        left = iter(own)
        scores = [[value for _ in some for value in next(left).log_p] for some in queries]
        texts = [e.texts[likeliest(score, e.texts)] for e, score in zip(examples, scores, strict=True)]
        told[name] = [_answered(row, text) for row, text in zip(rows, texts, strict=True)]
    return told


def _written(panel: Panel, suite: Suite, rows: Sequence[Row]) -> dict[str, list[Answered]]:
    """What is written behind the prompt of each row."""
    length = min(suite.max_new_tokens, panel.limit - 1)
    prompts = [prompt[length - panel.limit :] for prompt in prompts_of(panel.tokenizer, rows)]
    check_tokens(panel.model, (token for prompt in prompts for token in prompt))
    panel.steps = len(prompts) * len(panel.names)
    with panel.seated():
        found = panel.continuations(prompts, length)
    return {
        name: [
            _answered(row, one.text.strip(), one.ended if suite.form is None else has_form(one.text, suite.form))
            for row, one in zip(rows, own, strict=True)
        ]
        for name, own in found.items()
    }


def _answered(row: Row, text: str, parsed: bool | None = None) -> Answered:
    return Answered(item=input_id(row.value), input=input_of(row.value), answer=text, parsed=parsed)
