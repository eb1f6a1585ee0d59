"""Evaluation: many adapters and the bare base on one suite, with one load of the base and a record per item.

A suite is a folder with ``*.jsonl`` rows (see `data`) and, when it asks for other than the default, a
``suite.json`` beside them:

    {"metrics": ["likelihood", "chrf"], "max_new_tokens": 32, "form": "json"}

By default rows with choices are scored by accuracy and likelihood, others by likelihood. ``form`` is what every output
must be, whatever it says: ``json``, or ``regex:`` and an expression that matches all of it; a record's `parsed` is
the answer. Rows of like length are put together, and one pass through the base answers them for as many adapters as
fit (see `bank`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor
from transformers import GenerationConfig

from registry.core.digest import Digest
from registry.core.errors import BadConfig
from registry.core.manifest import canonical_json
from registry.core.metrics import ALLOWED, Metric, check_metric, is_generated
from registry.core.records import Record, item_id, split_of

from . import metrics as metric
from .bank import Bank
from .data import Example, Row, padded, read_rows, tokenize
from .finetune import Report, silent
from .lora import Adapter
from .model import Model, Tokenizer, check_tokens, takes_padding

BARE = "bare"
HARNESS = 1
"""Raised whenever the same model would get another score: old records then no longer pair with new ones."""
GENERATION = 2
"""The same, of what is generated. 2: prompts of unlike length together, padded; several references."""
_BATCH_TOKENS = 2048
_TOGETHER = 16
"""Adapters in one pass, the bare base among them."""
_GENERATED = 32
"""Rows that are generated at once."""
_GENERATED_TOKENS = 16384
"""Tokens of the prompts that are read at once."""
_MAX_LENGTH = 2048
_PATIENCE_S = 5.0
"""What an expression may take for one output."""


@dataclass(frozen=True)
class Suite:
    """Rows, the metrics asked for (None: by the form of the row), how far a generation may go, and its form."""

    rows: Sequence[Row]
    metrics: tuple[Metric, ...] | None = None
    max_new_tokens: int = 64
    form: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Suite":
        """The suite of a folder; `BadConfig` says what its suite.json may hold."""
        path = folder / "suite.json"
        try:
            spec = json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError:
            spec = None
        if not isinstance(spec, dict):
            raise BadConfig(path=path.name, reason="not a JSON object")
        names, length, form = spec.get("metrics"), spec.get("max_new_tokens", 64), spec.get("form")
        if names is not None and not _are_metrics(names):
            raise BadConfig(path=path.name, reason=f"metrics are {names}; allowed are {ALLOWED}")
        for name in names or ():
            metric.version_of(name)  # a custom one that nobody brings is refused before a model is loaded
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise BadConfig(path=path.name, reason=f"max_new_tokens is {length}; it must be a whole number above 0")
        if form is not None and (problem := _form_problem(form)):
            raise BadConfig(path=path.name, reason=f"form is {json.dumps(form)}; {problem}")
        return cls(read_rows(folder), None if names is None else tuple(names), length, form)

    def only(self, split: str) -> "Suite":
        """The suite's rows of one split."""
        rows = [row for row in self.rows if split_of(item_id(row.value)) == split]
        return replace(self, rows=rows)

    def metrics_of(self, example: Example) -> tuple[Metric, ...]:
        """What this row is scored by."""
        if example.answer is None:
            return tuple(name for name in self.metrics or ("likelihood",) if name != "accuracy")
        return tuple(name for name in self.metrics or ("accuracy", "likelihood") if not is_generated(name))

    def main_metric(self) -> Metric:
        """The metric that chooses among candidates: the first one asked for, else the first row's first."""
        return self.metrics[0] if self.metrics else "accuracy" if "choices" in self.rows[0].value else "likelihood"

    def harness(self, precision: str) -> Digest:
        """Digest of all that decides a score beside the model and the rows."""
        spec: dict[str, Any] = {"harness": HARNESS, "metrics": self.metrics, "max_new_tokens": self.max_new_tokens}
        made = sorted(name for name in self.metrics or () if is_generated(name))
        if made:
            versions = sorted({version for name in made if (version := metric.version_of(name))})
            spec |= {"generation": GENERATION, "form": self.form, "versions": versions}
        return Digest.sha256(canonical_json(spec | {"precision": precision, "max_length": _MAX_LENGTH}))


def _are_metrics(names: object) -> bool:
    try:
        return isinstance(names, list) and bool(names) and all(check_metric(name) for name in names)
    except (TypeError, ValueError):
        return False


def _form_problem(form: object) -> str | None:
    if form == "json":
        return None
    if not isinstance(form, str) or not form.startswith("regex:"):
        return "allowed are 'json', and 'regex:' with an expression behind it"
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


@dataclass(frozen=True)
class Query:
    """One row for the model: ids, and per position from ``first`` on the tokens whose log-probability is asked."""

    item: int
    choices: tuple[int, ...]
    """The choices that the columns of ``asked`` belong to."""
    ids: tuple[int, ...]
    first: int
    asked: tuple[tuple[int, ...], ...]


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
    limit = min(_MAX_LENGTH, getattr(model.config, "max_position_embeddings", None) or _MAX_LENGTH)
    examples = [tokenize(tokenizer, row, limit) for row in suite.rows]
    check_tokens(model, (token for e in examples for ids in (e.prompt, *e.completions) for token in ids))
    for example in examples:
        if not suite.metrics_of(example):
            raise example.row.refuse(f"none of the suite's metrics {', '.join(suite.metrics or ())} applies to it")
    names = ([BARE] if bare else []) + list(adapters)
    bank = Bank(model, list(adapters.values()))
    order = {name: which for which, name in enumerate(adapters)}
    # Rows of an adapted head must stand in their order, so that there nothing is left out before it.
    whole = bank.touches(model.get_output_embeddings())
    queries = [
        query
        for i, example in enumerate(examples)
        if not all(map(is_generated, suite.metrics_of(example)))
        for query in _queries(i, example)
    ]
    length = min(suite.max_new_tokens, limit - 1)
    prompts = [
        (i, example.prompt[length - limit :])
        for i, example in enumerate(examples)
        if any(map(is_generated, suite.metrics_of(example)))
    ]
    outputs: dict[str, dict[int, tuple[str, bool]]] = {name: {} for name in names}
    scores: dict[str, list[list[float]]] = {name: [[0.0] * len(e.completions) for e in examples] for name in names}
    mixed = len({len(prompt) for _, prompt in prompts}) > 1 and takes_padding(model)
    step, steps = 0, (len(queries) + len(prompts)) * len(names)
    with torch.inference_mode(), bank.attached():
        for company in _parts(names, _TOGETHER):
            for batch in _batches(queries, len(company)):
                tokens = len(batch) * len(batch[-1].ids)
                for some in _parts(company, max(1, _BATCH_TOKENS // tokens)):  # a long row is too much for all at once
                    bank.assign([(order.get(name), len(batch)) for name in some])
                    found = _log_probabilities(model, batch, len(some), whole)
                    for name, answers in zip(some, found, strict=True):
                        for query, values in zip(batch, answers, strict=True):
                            for choice, value in zip(query.choices, values, strict=True):
                                scores[name][query.item][choice] = value
                    step += len(batch) * len(some)
                    report({"step": step, "steps": steps, "adapters": len(some)})
            for asked in _prompts(prompts, len(company), mixed):
                for some in _parts(company, max(1, _GENERATED_TOKENS // (len(asked) * len(asked[-1][1])))):
                    bank.assign([(order.get(name), len(asked)) for name in some])
                    made = _generate(model, tokenizer, [prompt for _, prompt in asked] * len(some), length)
                    for place, name in enumerate(some):
                        own = made[place * len(asked) : (place + 1) * len(asked)]
                        outputs[name] |= {i: text for (i, _), text in zip(asked, own, strict=True)}
                    step += len(asked) * len(some)
                    report({"step": step, "steps": steps, "adapters": len(some)})
    return {
        name: [_record(suite, e, scores[name][i], outputs[name].get(i)) for i, e in enumerate(examples)]
        for name in names
    }


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    """Who goes through the base together: at most ``size``."""
    return [names[start : start + size] for start in range(0, len(names), size)]


def _queries(item: int, example: Example) -> Iterator[Query]:
    """One row per completion; choices of a single token share one row and one position."""
    first = len(example.prompt)
    if all(len(completion) == 1 for completion in example.completions):
        asked = tuple(completion[0] for completion in example.completions)
        yield Query(item, tuple(range(len(asked))), example.prompt, first, (asked,))
        return
    for choice, completion in enumerate(example.completions):
        ids = example.prompt + completion[:-1]
        yield Query(item, (choice,), ids, first, tuple((token,) for token in completion))


def _batches(queries: Sequence[Query], many: int) -> Iterator[list[Query]]:
    """Queries of like length together, at most `_BATCH_TOKENS` tokens for ``many``, padded (at least one query)."""
    batch: list[Query] = []
    for query in sorted(queries, key=lambda query: (len(query.ids), query.item)):
        if batch and len(query.ids) * (len(batch) + 1) * many > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(query)
    if batch:
        yield batch


def _log_probabilities(model: Model, batch: Sequence[Query], many: int, whole: bool) -> list[list[list[float]]]:
    """Per adapter, query and choice: the sum of ln p over the completion's tokens."""
    ids_BT = padded([query.ids for query in batch])
    asked_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, query in enumerate(batch):
        asked_BT[row, query.first - 1 : len(query.ids)] = True
    asked_BT = asked_BT.repeat(many, 1).to(model.device)
    inputs = {"input_ids": ids_BT.repeat(many, 1).to(model.device), "use_cache": False}
    if whole:
        logits_NV: Tensor = model(**inputs).logits[asked_BT].float()
    else:
        logits_NV = model(**inputs, logits_to_keep=asked_BT).logits.reshape(int(asked_BT.sum()), -1).float()
    log_z_N = logits_NV.logsumexp(dim=1)
    found: list[list[list[float]]] = []
    at = 0
    for _ in range(many):
        found.append([])
        for query in batch:
            span = slice(at, at := at + len(query.asked))
            asked_NC = torch.tensor(query.asked, device=model.device)
            found[-1].append((logits_NV[span].gather(1, asked_NC) - log_z_N[span, None]).sum(0).tolist())
    return found


def _prompts(
    prompts: Sequence[tuple[int, tuple[int, ...]]], many: int, mixed: bool
) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Prompts together by length, at most `_GENERATED` rows for ``many``; of equal length unless ``mixed``."""
    ordered = sorted(prompts, key=lambda item: (len(item[1]), item[0]))
    size = max(1, _GENERATED // many)
    for _, group in groupby(ordered, key=lambda item: mixed or len(item[1])):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """The greedy continuations of prompts, and whether each came to an end of its own; it ends when all did.

    Shorter prompts are padded on their left, where nothing looks; positions count from a prompt's own first token.
    """
    ids_BT = padded(prompts, left=True).to(model.device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = ids_BT.shape[1]
    there_BT = (torch.arange(width, device=model.device) >= width - lengths_B[:, None]).long()
    end = tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end, bos_token_id=None
    )
    made_BT = model.generate(ids_BT, attention_mask=there_BT, generation_config=greedy)
    rows = made_BT[:, width:].tolist()
    return [(tokenizer.decode(row, skip_special_tokens=True), end in row) for row in rows]


def _record(suite: Suite, example: Example, scores: Sequence[float], output: tuple[str, bool] | None) -> Record:
    right = example.answer or 0
    text, ended = output or ("", None)
    references = [example.texts[right], *example.row.value.get("references", ())]
    values: dict[Metric, float] = {}
    for name in suite.metrics_of(example):
        match name:
            case "likelihood":
                values[name] = metric.likelihood(scores[right], example.texts[right])
            case "accuracy":
                values[name] = metric.accuracy(scores, example.texts, right)
            case _:
                values[name] = metric.comparison(name)(text.strip(), references)
    item = item_id(example.row.value)
    parsed = ended if output is None or suite.form is None else has_form(text, suite.form)
    return Record(
        item=item, split=split_of(item), metrics=values, parsed=parsed, output=text if output is not None else None
    )
