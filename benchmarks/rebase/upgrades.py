"""Successors of a base model, as bases get them: trained on, merged, made to answer, made anew, resized, renumbered.

Each is a function of the old base's folder, texts and a new folder. Texts are of what the base is made for, and none of
the tasks that adapters are measured on; independent models learn from what the old one writes, and from the texts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from registry.core.recipes import FineTune, FullFineTune
from tests.workers import factories
from workers.compute.data import Row
from workers.compute.finetune import finetune
from workers.compute.full import tune, write_tuned
from workers.compute.merge import merge
from workers.compute.model import load

from ..tasks import rows_of
from .rewrites import renumbered, vocabulary

LENGTH = 160
"""Tokens of a text, at most."""
LETTERS = 300
FIRST = "ABEHILMOSTW"
"""Letters that texts of a model begin with."""


@dataclass(frozen=True)
class Texts:
    """What the base is trained on anew: plain texts, and questions with their answers."""

    plain: Sequence[str]
    answered: Sequence[tuple[str, str]]


Make = Callable[[Path, Texts, Path, float], None]
"""Of the old base, the texts and a scale of the steps, into a new folder."""


def trained_on(steps: int, rate: float, seed: int = 0) -> Make:
    """Continued training on plain text."""

    def make(old: Path, texts: Texts, new: Path, scale: float) -> None:
        _tuned(old, _told(texts.plain), new, round(steps * scale), rate, seed)

    return make


def merged(rate: float) -> Make:
    """An adapter of another domain, merged."""

    def make(old: Path, texts: Texts, new: Path, scale: float) -> None:
        recipe = FineTune(
            **_common(max(4, round(300 * scale))), targets=("all-linear",), rank=16, alpha=32.0, learning_rate=rate
        )
        made = finetune(*load(old, "fp32"), recipe, _told(texts.plain[: len(texts.plain) // 3]))
        merge(old, made.adapter, new)

    return make


def instructed(rate: float) -> Make:
    """Trained to answer."""

    def make(old: Path, texts: Texts, new: Path, scale: float) -> None:
        rows = rows_of([{"prompt": asked, "completion": answer} for asked, answer in texts.answered])
        _tuned(old, rows, new, round(300 * scale), rate)

    return make


def anew(seed: int, **shape: Any) -> Make:
    """A model with weights of its own, from chance on, in the old one's shape but for what is said of it."""

    def make(old: Path, texts: Texts, new: Path, scale: float) -> None:
        config = AutoConfig.from_pretrained(old)
        for name, value in shape.items():
            setattr(config, name, value)
        config.head_dim = config.hidden_size // config.num_attention_heads
        config.initializer_range = 0.05
        torch.manual_seed(seed)
        raw = new.with_name(f"{new.name}-raw")
        AutoModelForCausalLM.from_config(config).save_pretrained(raw)
        AutoTokenizer.from_pretrained(old).save_pretrained(raw)
        stories = _written_by(old, max(64, round(6000 * scale)), seed)
        _tuned(raw, _told([*stories, *texts.plain]), new, round(2500 * scale), 4e-3, seed, tokens=4096)

    return make


def renamed(rate: float) -> Make:
    """Tokens in another order, and some new ones; then a little training."""

    def make(old: Path, texts: Texts, new: Path, scale: float) -> None:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(old), AutoTokenizer.from_pretrained(old)
        order = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(5)).tolist()
        vocabulary(model, order, more=16, seed=7)
        raw = new.with_name(f"{new.name}-raw")
        model.save_pretrained(raw)
        renumbered(tokenizer, order).save_pretrained(raw)
        _tuned(raw, _told(texts.plain), new, round(30 * scale), rate)

    return make


def upgrades(old: Path, gently: float = 1.0) -> dict[str, Make]:
    """Name -> how it is made; the related ones come first. ``gently``: what the rates of trained ones are times."""
    config = AutoConfig.from_pretrained(old)
    wider = {"hidden_size": config.hidden_size * 3 // 2, "intermediate_size": config.intermediate_size * 3 // 2}
    return {
        "short training": trained_on(30, 1e-3 * gently),
        "medium training": trained_on(200, 2e-3 * gently),
        "long training": trained_on(1500, 4e-3 * gently),
        "domain merged in": merged(4e-3 * gently),
        "made to answer": instructed(1e-3 * gently),
        "vocabulary renumbered and extended": renamed(1e-3 * gently),
        "independent seed": anew(1),
        "other width": anew(2, **wider),
        "other depth": anew(3, num_hidden_layers=config.num_hidden_layers + 3),
    }


RELATED = {"short training", "medium training", "long training", "domain merged in", "made to answer"}
SHAPES = {"vocabulary renumbered and extended", "other width", "other depth"}


def _tuned(
    old: Path, rows: Sequence[Row], new: Path, steps: int, rate: float, seed: int = 0, tokens: int = 2048
) -> None:
    common = _common(max(4, steps)) | {"batch_tokens": tokens, "warmup_steps": min(20, max(4, steps) - 1)}
    write_tuned(old, tune(old, FullFineTune(**common, learning_rate=rate, seed=seed), rows), new)


def _common(steps: int) -> dict[str, Any]:
    return {
        "base": factories.BASE, "datasets": (factories.DATASET,), "steps": steps, "batch_tokens": 2048,
        "max_length": LENGTH, "long_rows": "drop", "precision": "fp32", "schedule": "cosine",
    }  # fmt: skip


def _told(texts: Sequence[str]) -> list[Row]:
    """Texts as rows: the first letters are given, the rest is learnt."""
    return rows_of([{"prompt": text[:4], "completion": text[4:LETTERS]} for text in texts if len(text) > 8])


@torch.no_grad()
def _written_by(folder: Path, many: int, seed: int) -> list[str]:
    """Texts sampled from a model, by its own chances, as many for each of some first letters."""
    model, tokenizer = load(folder, "fp32")
    torch.manual_seed(seed)
    found: list[str] = []
    for letter in FIRST:
        ids_BT = torch.tensor([tokenizer(letter).input_ids]).expand(-(-many // len(FIRST)), -1)
        out_BT = model.generate(ids_BT, do_sample=True, max_new_tokens=LENGTH, pad_token_id=tokenizer.pad_token_id)
        found += tokenizer.batch_decode(out_BT, skip_special_tokens=True)
    return random.Random(seed).sample(found, len(found))
