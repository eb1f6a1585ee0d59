"""Tasks of lm-eval (Gao et al., EleutherAI's harness) asked of many adapters in one pass.

Prompts, filters and scores are lm-eval's own: its `evaluate` runs once for each member of a `Panel`, on a model that is
that member. Whoever asks first asks for all: the panel answers what is new for every member together, and the others
find their answers there. Texts become tokens, and long ones are cut, as lm-eval's ``hf`` model does it.

What a template of a task may reach is its row: templates are rendered in Jinja's sandbox, because a suite is pushed by
people who need not be trusted with the worker.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from registry.core.errors import BadConfig, ToolMissing, UnusableDataset
from registry.core.metrics import Metric
from registry.core.rows import parse_object
from registry.core.tasks import Task, metric_of, require_files

from .data import Row, called, rows_of
from .model import Tokenizer
from .panel import Panel, Query, Text

_PER_UNIT = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2)}
"""What lm-eval gives as (ln p, words or bytes) of an item is ln p ⁄ unit here, in nat or bits: higher is better."""
_SEED = 1234
"""lm-eval's own for the choice of examples."""
_MAX_GENERATED = 256
_UNTRUE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What a task that means nothing ends in, wherever in lm-eval that is."""
_Span = tuple[tuple[int, ...], int]
"""Tokens of a context and its continuation, and where that begins."""
_Request = tuple[str, tuple[str, ...], int]
"""A context, the texts that end what is written behind it, and how many tokens that is at most."""


@dataclass(frozen=True)
class Questions:
    """A task, and the rows that its examples are taken from, by split."""

    task: Task
    shots: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """What lm-eval gives for one row: its scores, and what was written, if that was asked."""

    scores: dict[Metric, float]
    output: Text | None = None


def version() -> str:
    """lm-eval's version, which its scores depend on; `ToolMissing` where it is not installed."""
    try:
        return f"lm-eval {metadata.version('lm-eval')}"
    except metadata.PackageNotFoundError as error:
        raise ToolMissing(what="Tasks of lm-eval", extra="lm-eval") from error


def read(folder: Path, tasks: Sequence[Task], data: str = "") -> tuple[list[Row], tuple[Questions, ...]]:
    """The rows of a suite that its ``tasks`` score, and the tasks with their examples."""
    version()
    lines = {path.name: rows_of(path, parse_object, data) for path in sorted(folder.glob("*.jsonl"))}
    scored = require_files(tasks, lines)
    rows = [row for name in sorted(scored) for row in lines[name]]
    if not rows:
        raise UnusableDataset(path=called(min(scored), data), reason="there are no rows")
    return rows, tuple(Questions(task, _shots(task, lines)) for task in tasks)


def _shots(task: Task, lines: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    splits = task.dataset_kwargs.data_files
    return {split: [row.value for file in task.files(split) for row in lines[file]] for split in splits}


def answers(panel: Panel, rows: Sequence[Row], questions: Sequence[Questions]) -> dict[str, list[Answered]]:
    """By member, what it makes of each row; `BadConfig` for a task that lm-eval cannot ask."""
    import jinja2
    from lm_eval.evaluator import evaluate

    known = _Known(panel)
    places = {one.task.task: _places(one.task, rows) for one in questions}
    at = ""
    found: dict[str, dict[int, Answered]] = {name: {} for name in panel.names}
    try:
        with _tamed(), panel.seated():
            for one in (some for some in questions if places[some.task.task]):
                at = one.task.task
                built = _built(one, [rows[i].value for i in places[at]])
                for name in panel.names:
                    built.set_fewshot_seed(seed=_SEED)  # every member has the same examples in front
                    told = evaluate(_member(name, known), {"tasks": {at: built}, "groups": {}}, bootstrap_iters=0)
                    own = _by_row(told["samples"][at], known.outputs[name])
                    found[name].update({places[at][i]: answered for i, answered in own.items()})
    except (*_UNTRUE, jinja2.TemplateError) as error:
        reason = f"lm-eval cannot ask it: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise BadConfig(path=f"suite.json, task '{at}'", reason=reason) from error
    return {name: [own[i] for i in range(len(rows))] for name, own in found.items()}


def _places(task: Task, rows: Sequence[Row]) -> list[int]:
    """Which rows are the task's, in the order of its files and lines."""
    return [i for file in task.items() for i, row in enumerate(rows) if row.path == file]


def _built(one: Questions, rows: Sequence[Mapping[str, Any]]) -> Any:
    """lm-eval's task over these rows, with its own defaults for what was not said."""
    from lm_eval.api.task import ConfigurableTask

    said = one.task.model_dump(exclude_unset=True, exclude={"dataset_kwargs", "dataset_path", "metadata"})
    splits = {name: _Docs(docs) for name, docs in one.shots.items()}
    splits[str(one.task.test_split or one.task.validation_split)] = _Docs(rows)
    return ConfigurableTask(config={"num_fewshot": 0, **said, "custom_dataset": lambda: splits})


class _Docs(list[dict[str, Any]]):
    """Rows as lm-eval takes them from Hugging Face's datasets: every row has every key."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.features = dict.fromkeys(key for row in rows for key in row)
        super().__init__({key: row.get(key) for key in self.features} for row in rows)


def _by_row(samples: Sequence[Mapping[str, Any]], outputs: Mapping[_Request, Text]) -> dict[int, Answered]:
    """By row, the scores of all filters together, and the output."""
    scores: dict[int, dict[Metric, float]] = defaultdict(dict)
    written: dict[int, Text] = {}
    for sample in samples:
        row = sample["doc_id"]
        for name in sample["metrics"]:
            value = sample[name]
            if name in _PER_UNIT:
                value = value[0] / value[1] / _PER_UNIT[name]
            scores[row][metric_of(name, sample["filter"])] = float(value)
        if request := _request(sample["arguments"][0]):
            written[row] = outputs[request]
    return {row: Answered(own, written.get(row)) for row, own in scores.items()}


# ── the model that lm-eval sees ──────────────────────────────────────────────


class _Known:
    """What all members have answered so far."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.likely: dict[str, dict[_Span, tuple[float, bool]]] = {name: {} for name in panel.names}
        self.outputs: dict[str, dict[_Request, Text]] = {name: {} for name in panel.names}

    def ask_likelihoods(self, spans: Sequence[_Span]) -> None:
        """Ask what was not asked before; continuations of one token share the row of their context."""
        new = [span for span in dict.fromkeys(spans) if span not in self.likely[self.panel.names[0]]]
        rows: dict[_Span, list[_Span]] = defaultdict(list)
        for ids, first in new:
            rows[ids[:-1] if len(ids) == first + 1 else ids, first].append((ids, first))
        queries = [_query([ids for ids, _ in alike], first) for (_, first), alike in rows.items()]
        self.panel.steps += len(queries) * len(self.panel.names)
        for name, found in self.panel.log_probabilities(queries, greedy=True).items():
            for alike, answer in zip(rows.values(), found, strict=True):
                self.likely[name].update(zip(alike, zip(answer.log_p, answer.greedy, strict=True), strict=True))

    def ask_outputs(self, requests: Sequence[_Request]) -> None:
        """Have written what was not written before, those together that go equally far."""
        new: dict[tuple[tuple[str, ...], int], list[_Request]] = defaultdict(list)
        for request in dict.fromkeys(requests):
            if request not in self.outputs[self.panel.names[0]]:
                new[request[1:]].append(request)
        tokenizer, limit = self.panel.tokenizer, self.panel.limit
        self.panel.steps += sum(map(len, new.values())) * len(self.panel.names)
        for (until, far), alike in new.items():
            length = min(far, limit - 1)
            prompts = [_encode(tokenizer, context)[length - limit :] or [_prefix(tokenizer)] for context, _, _ in alike]
            for name, texts in self.panel.continuations(prompts, length, until).items():
                self.outputs[name].update(zip(alike, (_cut(text, until) for text in texts), strict=True))


def _query(alike: Sequence[tuple[int, ...]], first: int) -> Query:
    """One row for continuations that begin at ``first``: of a single one all tokens, of several the last."""
    *_, ids = alike
    spoken = [(token,) for token in ids[first:-1]]
    return Query(ids[:-1], first, (*spoken, tuple(ids[-1] for ids in alike)))


def _request(arguments: Sequence[Any]) -> _Request | None:
    """What an output depends on; None where none is asked."""
    context, *rest = arguments
    if not rest or not isinstance(rest[0], Mapping):
        return None
    until = rest[0].get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    return context, stops, rest[0].get("max_gen_toks", _MAX_GENERATED)


def _cut(text: Text, until: Sequence[str]) -> Text:
    """What comes before the first of the texts that it ends with; one that met such a text has ended."""
    kept = text.text
    for stop in until:
        kept = kept.split(stop)[0]
    return Text(kept, text.ended or kept != text.text)


def _encode(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Tokens with the special ones in front, unless the text itself begins with one."""
    begins = tokenizer.decode([_prefix(tokenizer)])
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special and not (begins and text.startswith(begins)))
    return ids


def _prefix(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise ValueError("the tokenizer has neither a token for the beginning nor one for the end of a text")
    return int(found)


def _member(name: str, known: _Known) -> Any:
    """A member of the panel as a model of lm-eval's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, limit = known.panel.tokenizer, known.panel.limit

    class Member(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """Answers of one member, asked of all."""

        @property
        def eot_token_id(self) -> int | None:
            """The end of a text."""
            found: int | None = tokenizer.eos_token_id
            return found

        @property
        def prefix_token_id(self) -> int:
            """What stands before a text that has nothing before it."""
            return _prefix(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Tokens of a text."""
            return _encode(tokenizer, string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            spans = [_span(context, continuation, limit) for _, context, continuation in requests]
            known.ask_likelihoods(spans)
            return [known.likely[name][span] for span in spans]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """ln p of whole texts, in windows of the context's length."""
            windows = [
                [(None, *make_disjoint_window(pair)) for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=limit, context_len=1,
                )]
                for request in requests
            ]  # fmt: skip
            found = iter(self._loglikelihood_tokens([window for own in windows for window in own]))
            return [math.fsum(next(found)[0] for _ in own) for own in windows]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """What is written greedily."""
            wanted = [wish for request in requests if (wish := _request(request.args))]
            known.ask_outputs(wanted)
            return [known.outputs[name][wish].text for wish in wanted]

    return Member()


def _span(context: Sequence[int], continuation: Sequence[int], limit: int) -> _Span:
    """The tokens that count, cut on their left to what the base takes."""
    if not 0 < len(continuation) <= limit:
        raise ValueError(f"a continuation gives {len(continuation)} tokens; 1 to {limit} are allowed for this base")
    ids = (*context, *continuation)[-(limit + 1) :]
    return ids, len(ids) - len(continuation)


@contextmanager
def _tamed() -> Iterator[None]:
    """lm-eval with templates in a sandbox, each made once, and without its bars and its talk."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lm_eval.utils.env.filters["regex_replace"]
    made = cache(sandbox.from_string)

    def render(template: str, doc: Mapping[str, Any]) -> str:
        return made(template).render(**doc)

    places = [(lm_eval.utils, "apply_template", render), (lm_eval.api.task, "tqdm", _silent),
              (lm_eval.api.model, "tqdm", _silent)]  # fmt: skip
    before = [getattr(module, name) for module, name, _ in places]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        for module, name, value in places:
            setattr(module, name, value)
        yield
    finally:
        logger.setLevel(level)
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _silent(what: Iterable[Any], **_: Any) -> Iterable[Any]:
    return what
