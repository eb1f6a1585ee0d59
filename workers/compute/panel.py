"""Many adapters and the bare base asked the same questions together: what is likely, and what comes next.

Rows of like length are put together, and one pass through the base answers them for as many adapters as fit (see
`bank`). `evaluate` asks what a suite asks, `lm_eval` what tasks of that harness ask.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .data import padded
from .finetune import Report, silent
from .lora import Adapter
from .model import Model, Tokenizer, takes_padding
from .shelf import Shelf

BARE = "bare"
MAX_LENGTH = 2048
_BATCH_TOKENS = 2048
_TOGETHER = 16
"""Adapters in one pass, the bare base among them."""
_GENERATED = 128
"""Rows that are generated at once: a step for many costs little more than one for few."""
_GENERATED_TOKENS = 16384
"""Tokens that are remembered at once, of prompts and of what is written."""


@dataclass(frozen=True)
class Query:
    """One row for the model: ids, and per position from ``first`` on the tokens whose log-probability is asked."""

    ids: tuple[int, ...]
    first: int
    asked: tuple[tuple[int, ...], ...]
    """Per position as many tokens as there are alternatives."""


@dataclass(frozen=True)
class Answer:
    """Per alternative of a query: Σ ln p of its tokens, and, where that was asked, whether each was the likeliest."""

    log_p: tuple[float, ...]
    greedy: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Text:
    """What a model wrote, and whether it came to an end of its own."""

    text: str
    ended: bool
    ids: tuple[int, ...] = ()
    """Its tokens, that of its end among them."""


class Panel:
    """The members: named adapters, and `BARE` for the base alone. Answers come by name, in the order of what was asked.

    ``steps`` is how many answers are wanted altogether, for the progress.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter],
        *,
        bare: bool = True,
        report: Report = silent,
        steps: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names = ([BARE] if bare else []) + list(adapters)
        self.limit = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", None) or MAX_LENGTH)
        """Tokens of a row, at most."""
        self.steps = steps
        self._step = 0
        self._report = report
        self._shelf = Shelf(model, adapters, _TOGETHER)
        # Rows of an adapted head must stand in their order, so that there nothing is left out before it.
        self._whole = self._shelf.touches(model.get_output_embeddings())

    @contextmanager
    def seated(self) -> Iterator[None]:
        """The adapters are attached to the model, and nothing of it is trained."""
        with torch.inference_mode(), self._shelf.attached():
            yield

    def log_probabilities(self, queries: Sequence[Query], *, greedy: bool = False) -> dict[str, list[Answer]]:
        """What each member finds likely; rows that are too long for all members at once are read by some at a time."""
        found: dict[str, dict[int, Answer]] = {name: {} for name in self.names}
        for company in _parts(self.names, _TOGETHER):
            for batch in _batches(queries, len(company)):
                rows = [queries[i] for i in batch]
                for some in _parts(company, max(1, _BATCH_TOKENS // (len(rows) * len(rows[-1].ids)))):
                    self._seat(some, len(rows))
                    answers = _answers(self.model, rows, len(some), self._whole, greedy)
                    for name, own in zip(some, answers, strict=True):
                        found[name].update(zip(batch, own, strict=True))
                    self._tell(len(rows) * len(some), len(some))
        return {name: [own[i] for i in range(len(queries))] for name, own in found.items()}

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        until: Sequence[str] = (),
        *,
        temperature: float = 0.0,
        seed: int = 0,
        at_least: int = 0,
    ) -> dict[str, list[Text]]:
        """What each member writes, up to ``length`` tokens, its own end, or one of the texts ``until``.

        Greedily, or at a ``temperature`` by chance that is drawn from the seed and the number of the batch. Its own end
        does not come before ``at_least`` tokens.
        """
        found: dict[str, dict[int, Text]] = {name: {} for name in self.names}
        self._shelf.use([(None, 1)])
        mixed = len(set(map(len, prompts))) > 1 and takes_padding(self.model)
        numbers = itertools.count()
        how: dict[str, Any] = {"max_new_tokens": length, "do_sample": False}
        if temperature:  # else the model's own generation_config would cut its distribution
            how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        if at_least:
            how["min_new_tokens"] = at_least
        for company in _parts(self.names, _TOGETHER):
            for batch in _prompts(prompts, length, len(company), mixed):
                rows = [prompts[i] for i in batch]
                for some in _parts(company, max(1, _GENERATED_TOKENS // (len(rows) * (len(rows[-1]) + length)))):
                    self._seat(some, len(rows))
                    with _chance(self.model, f"{seed}/{next(numbers)}") if temperature else nullcontext():
                        made = _generate(self.model, self.tokenizer, rows * len(some), until, how)
                    for place, name in enumerate(some):
                        own = made[place * len(rows) : (place + 1) * len(rows)]
                        found[name].update(zip(batch, own, strict=True))
                    self._tell(len(rows) * len(some), len(some))
        return {name: [own[i] for i in range(len(prompts))] for name, own in found.items()}

    def _seat(self, names: Sequence[str], rows: int) -> None:
        self._shelf.use([(None if name == BARE else name, rows) for name in names])

    def _tell(self, answers: int, adapters: int) -> None:
        self._step += answers
        self._report({"step": self._step, "steps": max(self.steps, self._step), "adapters": adapters})


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    """Who goes through the base together: at most ``size``."""
    return [names[start : start + size] for start in range(0, len(names), size)]


def _batches(queries: Sequence[Query], many: int) -> Iterator[list[int]]:
    """Places of queries of like length together, at most `_BATCH_TOKENS` tokens for ``many``, padded (at least one)."""
    batch: list[int] = []
    for i in sorted(range(len(queries)), key=lambda i: (len(queries[i].ids), i)):
        if batch and len(queries[i].ids) * (len(batch) + 1) * many > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _answers(model: Model, batch: Sequence[Query], many: int, whole: bool, greedy: bool) -> list[list[Answer]]:
    """Per member and query the answer."""
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
    log_z_N, top_N = logits_NV.logsumexp(dim=1), logits_NV.argmax(dim=1) if greedy else None
    found: list[list[Answer]] = []
    at = 0
    for _ in range(many):
        found.append([])
        for query in batch:
            span = slice(at, at := at + len(query.asked))
            asked_NC = torch.tensor(query.asked, device=model.device)
            log_p_C = (logits_NV[span].gather(1, asked_NC) - log_z_N[span, None]).sum(0)
            likeliest = () if top_N is None else tuple((top_N[span, None] == asked_NC).all(0).tolist())
            found[-1].append(Answer(tuple(log_p_C.tolist()), likeliest))
    return found


def _prompts(prompts: Sequence[Sequence[int]], length: int, many: int, mixed: bool) -> Iterator[list[int]]:
    """Places of prompts by length, as many as `_GENERATED` rows and `_GENERATED_TOKENS` tokens are (at least one).

    Rows are those of ``many``; tokens those of one, ``length`` more than its prompts'. Unless ``mixed``, of one length.
    """
    ordered = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for _, alike in groupby(ordered, key=lambda i: mixed or len(prompts[i])):
        batch: list[int] = []
        for i in alike:
            rows = len(batch) + 1
            if batch and (rows * many > _GENERATED or rows * (len(prompts[i]) + length) > _GENERATED_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        yield batch


@contextmanager
def _chance(model: Model, seed: str) -> Iterator[None]:
    """Draws inside the block follow from the seed, and those after it from what came before it."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(random.Random(seed).getrandbits(32))  # more bits are not heard on processors
        yield


def _generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], until: Sequence[str], how: dict[str, Any]
) -> list[Text]:
    """The continuations of prompts; it ends when all did.

    Shorter prompts are padded on their left, where nothing looks; positions count from a prompt's own first token.
    """
    ids_BT = padded(prompts, left=True).to(model.device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    width = ids_BT.shape[1]
    there_BT = (torch.arange(width, device=model.device) >= width - lengths_B[:, None]).long()
    end = tokenizer.eos_token_id
    config = GenerationConfig(eos_token_id=end, pad_token_id=end, bos_token_id=None, **how)
    stops = StoppingCriteriaList([_Until(tokenizer, until, width)] if until else [])
    made_BT = model.generate(ids_BT, attention_mask=there_BT, generation_config=config, stopping_criteria=stops)
    rows = made_BT[:, width:].tolist()
    return [_text(tokenizer, row[: row.index(end) + 1] if end in row else row) for row in rows]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> Text:
    ended = tokenizer.eos_token_id in ids[-1:]
    return Text(tokenizer.decode(ids, skip_special_tokens=True), ended, tuple(ids))


class _Until(StoppingCriteria):
    """A row ends with one of these texts; looked for in its last tokens, of which each is a byte at least."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str], width: int) -> None:
        self.tokenizer, self.until, self.width = tokenizer, until, width
        self.tail = max(len(text.encode()) for text in until) + 1

    def __call__(self, ids_BT: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended."""
        _ = scores, kwargs
        tails = ids_BT[:, max(self.width, ids_BT.shape[1] - self.tail) :].tolist()
        ended = [any(text in self.tokenizer.decode(tail) for text in self.until) for tail in tails]
        return torch.tensor(ended, device=ids_BT.device)
