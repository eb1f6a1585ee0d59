"""Tier 4: what the old base and its adapter say is taught to the new base, and no labels are read (docs: rebase).

    loss = Σ_n KL(p_teacher ‖ q_student) ⁄ N        over what the teacher wrote, where both have one vocabulary
    loss = Σ_n −ln q_student(token) ⁄ N             else: through the text alone

The teacher completes retained inputs, or writes texts from their beginning on. What it wrote, and what it found likely
there, is a *lesson* in two files, so that one model is in memory at a time and a lesson is written once:

    lesson.jsonl          a row per text, of how many tokens it is, and whether it came to its own end
    lesson.safetensors    ids of all texts (M), the likeliest tokens at each and their ln p (M×K)

Distillation: Hinton et al. 2015, arXiv:1503.02531; through text: Kim and Rush 2016, arXiv:1606.07947.
Legend: M tokens of all texts, K likeliest of them.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from registry.core.errors import BadDataset, NotRunnable, UnusableDataset
from registry.core.recipes import Distil, FineTune, Rebase, Steps
from registry.core.records import item_id

from ..bank import attached
from ..data import Example, Row, Taught, chunks, encoded, pack, prompts_of
from ..finetune import Report, Task, Trained, silent
from ..lora import Adapter
from ..loss import Loss
from ..model import Model, Tokenizer, check_tokens
from ..panel import BARE, Panel
from ..weights import read_metadata, read_tensors, write_file, write_tensors
from .race import Entrant, Race
from .starts import SCRATCH, Starts, best_of, fitting, scratch

_TEXTS, _TENSORS = "lesson.jsonl", "lesson.safetensors"
_BATCH_TOKENS = 2048
_MOST_LOOKED_AT = 256
"""Texts held out by which candidates are compared, at most."""


# ── the teacher ──────────────────────────────────────────────────────────────


def is_written(folder: Path) -> bool:
    """Whether a lesson is there, all of it."""
    return (folder / _TENSORS).is_file()


def write_lesson(
    model: Model,
    tokenizer: Tokenizer,
    recipe: Distil,
    teacher: Adapter,
    inputs: Sequence[Row],
    folder: Path,
    report: Report = silent,
) -> None:
    """Let ``teacher`` on its own base complete ``inputs``, or without any write texts, and keep it in ``folder``."""
    rows = _asked(recipe, inputs)

    def told(now: dict[str, Any]) -> None:
        report({"phase": "the teacher writes", "step": now["step"], "steps": now["steps"]})

    panel = Panel(model, tokenizer, {"teacher": teacher}, bare=False, report=told, steps=len(rows))
    limit = min(panel.limit, recipe.max_length)
    length = min(recipe.max_new_tokens, limit - 1)
    prompts = [ids[length - limit :] for ids in prompts_of(tokenizer, rows)]
    check_tokens(model, (token for prompt in prompts for token in prompt))
    with panel.seated():
        # Who has learnt to answer and stop would leave it at that where nothing is asked.
        least = 0 if inputs else length // 4
        texts = panel.continuations(
            prompts, length, temperature=recipe.temperature, seed=recipe.seed, at_least=least
        )["teacher"]
    # By length, so that little is padded when they are read once more.
    written = sorted(zip(rows, prompts, texts, strict=True), key=lambda one: len(one[1]) + len(one[2].ids))
    with attached(model, teacher) as bank:
        loss = Loss(model, head_is_adapted=bank.touches(model.get_output_embeddings()))
        examples = (Example(row, prompt, (text.ids,), (text.text,)) for row, prompt, text in written)
        packed = (pack([some], together=False).to(model.device) for some in chunks(examples, _BATCH_TOKENS))
        likely = [[said_NK.cpu() for said_NK in loss.likeliest(each, recipe.likeliest)] for each in packed]
    lines = [
        json.dumps({
            "row": _answered(row, text.text).value, "tokens": len(text.ids), "ended": text.ended,
            "input": [row.where, row.line],
        })
        for row, _, text in written
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _TEXTS, "\n".join(lines).encode() + b"\n")
    tensors = {
        "ids": torch.tensor([token for *_, text in written for token in text.ids], dtype=torch.int32),
        "top": torch.cat([top_NK.int() for top_NK, _ in likely]),
        "log_p": torch.cat([log_p_NK for _, log_p_NK in likely]),
    }
    write_tensors(folder / _TENSORS, tensors, {"vocabulary": vocabulary_of(tokenizer)})


def _asked(recipe: Distil, inputs: Sequence[Row]) -> list[Row]:
    """What the teacher is asked: inputs in an order by the seed, again and again where it answers by chance."""
    if not inputs:
        return [Row({"prompt": ""}, "the beginning of a text", 0)] * recipe.texts
    order = random.Random(recipe.seed).sample(inputs, len(inputs))
    times = -(-recipe.texts // len(order)) if recipe.temperature else 1
    return (order * times)[: recipe.texts]


def _answered(row: Row, text: str) -> Row:
    """The row with the teacher's text in place of whatever was there."""
    if "messages" in row.value:
        answer = {"role": "assistant", "content": text}
        return replace(row, value={"messages": [*row.value["messages"][:-1], answer]})
    return replace(row, value={"prompt": row.value["prompt"], "completion": text})


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """A digest of which token has which id."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


# ── the student ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Lesson:
    """What a student is taught, in its own tokens."""

    examples: Sequence[Example]
    tokens: int
    """That the teacher wrote."""
    by_logits: bool
    """Whether the student hears how likely other tokens were, or reads the text alone."""

    def dump(self) -> dict[str, Any]:
        """For a result."""
        through = "likeliest tokens" if self.by_logits else "text"
        return {"texts": len(self.examples), "tokens": self.tokens, "through": through}


def read_lesson(folder: Path, tokenizer: Tokenizer, size: int | None = None) -> Lesson:
    """The lesson of ``folder`` for a student with this tokenizer; texts that give it no token are left out.

    ``size``: rows of its embedding; the teacher may have more, beyond the vocabulary: they count among all others.
    """
    tensors = read_tensors(folder / _TENSORS)
    known_MK = tensors["top"] < (tensors["top"].max() + 1 if size is None else size)
    top_MK, log_p_MK = tensors["top"].where(known_MK, 0), tensors["log_p"].where(known_MK, -math.inf)
    by_logits = read_metadata(folder / _TENSORS)["vocabulary"] == vocabulary_of(tokenizer)
    told = [json.loads(line) for line in (folder / _TEXTS).read_text().splitlines()]
    rows = [Row(each["row"], *each.get("input", (_TEXTS, at))) for at, each in enumerate(told, start=1)]
    tokens = sum(each["tokens"] for each in told)
    if not by_logits:
        read = [(each, one) for each, row in zip(told, rows, strict=True) for one in _encoded(tokenizer, row)]
        return Lesson([one if each["ended"] else replace(one, end=()) for each, one in read], tokens, by_logits)
    examples, at = [], 0
    for each, row, prompt in zip(told, rows, prompts_of(tokenizer, rows), strict=True):
        span = slice(at, at := at + each["tokens"])
        taught = Taught(top_MK[span], log_p_MK[span])
        examples.append(Example(row, prompt, (tuple(tensors["ids"][span].tolist()),), ("",), taught=taught))
    return Lesson(examples, tokens, by_logits)


def _encoded(tokenizer: Tokenizer, row: Row) -> Iterable[Example]:
    """What a student reads of a text; nothing of one that gives it no token, or that its template writes otherwise."""
    text: str = row.value["messages"][-1]["content"] if "messages" in row.value else row.value["completion"]
    if not text:
        return
    with suppress(BadDataset, UnusableDataset):
        yield from encoded(tokenizer, [row])


def distil(model: Model, tokenizer: Tokenizer, recipe: Rebase, folder: Path, starts: Starts) -> Race:
    """The race of one student that is taught by the lesson in ``folder``: from its best start, held to it, and from
    scratch.

    What chooses is the agreement with the teacher on texts held out.
    """
    training = steps_of(recipe)
    assert training is not None and recipe.distil is not None
    lesson = read_lesson(folder, tokenizer, model.get_input_embeddings().weight.shape[0])
    starts = fitting(model, starts)
    if not starts.adapters:
        raise NotRunnable(what="Distilling", reason="; ".join(starts.refused.values()))
    if not lesson.examples:
        raise NotRunnable(what="Distilling", reason="the teacher wrote nothing that the new base can read")
    kept, held = _apart(lesson.examples, recipe.distil.held_out)
    agreed = partial(_agreement, model, held[:: -(-len(held) // _MOST_LOOKED_AT)])
    told: dict[str, dict[str, Any]] = {name: {"refused": why} for name, why in starts.refused.items()}
    told |= {name: agreed(adapter) for name, adapter in ((BARE, None), *starts.adapters.items())}

    def measure(trained: Mapping[str, Trained]) -> dict[str, dict[str, Any]]:
        return {name: agreed(run.adapter) for name, run in trained.items()}

    entrants = {}
    if (best := best_of(told)) != SCRATCH:
        entrants[best] = Entrant(best, Task(training, kept, starts.adapters[best]))
    free = training.model_copy(update={"pull": 0.0})
    entrants[SCRATCH] = Entrant(SCRATCH, Task(free, kept, scratch(model, training, starts)))
    source = "inputs" if recipe.inputs else "texts of the teacher's own"
    return Race(entrants, measure, told, {"lesson": {"source": source} | lesson.dump()})


def _apart(examples: Sequence[Example], share: float) -> tuple[Sequence[Example], Sequence[Example]]:
    """Texts to learn and texts held out: of those that differ, every so many-th in the order of their lengths."""
    names = [item_id(example.value) for example in examples]
    every = list(dict.fromkeys(names))
    if not share or len(every) == 1:
        return examples, examples
    aside = set(every[:: round(1 / share)])
    named = list(zip(names, examples, strict=True))
    return [each for name, each in named if name not in aside], [each for name, each in named if name in aside]


def steps_of(recipe: Rebase) -> FineTune | None:
    """The training of a rebase: of a distillation its data are what the teacher writes, to these inputs where it has
    some. None where nothing is trained."""
    if recipe.distil is None:
        return recipe.training
    steps = recipe.distil.model_dump(include=set(Steps.model_fields) | {"quantised", "pull"})
    return FineTune(base=recipe.base, datasets=(recipe.inputs or recipe.adapter,), **steps)


@torch.no_grad()
def _agreement(model: Model, examples: Sequence[Example], adapter: Adapter | None) -> dict[str, float]:
    """Mean loss over the tokens of ``examples``, as a score, and how often the likeliest token is the teacher's."""
    total = same = asked = 0.0
    with nullcontext() if adapter is None else attached(model, adapter) as bank:
        loss = Loss(model, head_is_adapted=bank is not None and bank.touches(model.get_output_embeddings()))
        for some in chunks(sorted(examples, key=lambda example: len(example.ids)), _BATCH_TOKENS):
            packed = pack([some], together=False).to(model.device)
            theirs_N: Tensor = packed.targets_N if packed.top_NK is None else packed.top_NK[:, 0]
            total += float(loss(packed)[1].double().sum())
            same += float((loss.likeliest(packed, 1)[0][:, 0] == theirs_N).sum())
            asked += len(theirs_N)
    return {"score": -total / asked, "divergence": total / asked, "agreement": same / asked}
