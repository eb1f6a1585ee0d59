"""`python -m benchmarks.rebase.widths [--in DIR]`: adapters between two models of other widths, without training.

Two small Llamas of their own width, depth alike, and seed learn the same texts; adapters for the same tasks are trained
on both. Each is brought to the other base: by weights alone, by text (`transport`, 512 prompts, no labels), and on the
same text by what has been published (`published`). Then what LoRASuite made, what ours made, and a fresh adapter take
21 steps on 100 rows, as LoRASuite does. What is quoted is the share of the gain in loss that training on the new base
gives, on rows that nobody saw:

    (bare − brought) ⁄ (bare − trained)

LORACTL_BENCH_DATA (a folder with banking77, clinc150, e2e and gsm8k) names the data; without it sentences made here are
taken. ``--in`` keeps bases and adapters, and takes what is there. Written between the marks in docs/rebase.md.
"""

import argparse
import csv
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from registry.core.recipes import FineTune
from workers.compute.data import Row
from workers.compute.finetune import Task, finetune_many
from workers.compute.lora import Adapter
from workers.compute.model import Model, Tokenizer, load
from workers.compute.rebase.transport import transport
from workers.compute.weights import read_adapter, write_adapter

from ..tasks import rows_of, texts
from .exactness import loss
from .published import published

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rebase.md"
TARGET = 0.4
"""Share of the gap, the median over cells."""
WIDTHS = (64, 96)
FREE = ("by weights", "LoRASuite", "Theseus", "BiCo", "by text")
"""Ways without training."""
STEPS, ROWS = 21, 100
TUNED = {f"{way}, then {STEPS} steps": way for way in ("LoRASuite", "by text")}
FRESH = f"{STEPS} steps from nothing"
WAYS = (*FREE, *TUNED, FRESH)
RATE = 5e-3
GENTLE = 3
"""What the rate is divided by where something is begun from: by LoRASuite's authors as by us."""
VOCABULARY, LAYERS, HEAD = 1024, 4, 16


@dataclass(frozen=True)
class Sizes:
    """How much is done: of all, or for a test."""

    pretraining: int = 2500
    steps: int = 300
    prompts: int = 512
    test: int = 120


ALL = Sizes()


@dataclass(frozen=True)
class Cell:
    """One task and direction: nats per token of the completion."""

    task: str
    old: int
    new: int
    bare: float
    trained: float
    brought: Mapping[str, float]

    def closed(self, way: str) -> float:
        """The share of the gap."""
        return (self.bare - self.brought[way]) / (self.bare - self.trained)


def cells(folder: Path, sizes: Sizes = ALL) -> Iterator[Cell]:
    """Every cell; bases and adapters are taken from ``folder``, or made and left there."""
    told, tasks = _material()
    for seed, width in enumerate(WIDTHS):
        _base(folder / f"base-{width}", width, seed, told, sizes.pretraining)
        _adapters(folder, width, {name: train for name, (train, _) in tasks.items()}, sizes.steps)
    for old, new in (WIDTHS, WIDTHS[::-1]):
        base = folder / f"base-{new}"
        model, tokenizer = load(base, "fp32")
        for name, (train, test) in tasks.items():
            test = test[: sizes.test]
            adapter, trained = (read_adapter(folder / f"adapter-{width}-{name}") for width in (old, new))
            prompts = train[: sizes.prompts]
            same = [(token, token) for token in range(VOCABULARY)]
            brought = {
                "by weights": transport(adapter, folder / f"base-{old}", base).adapter,
                **published(folder / f"base-{old}", model, tokenizer, adapter, prompts, same),
                "by text": transport(adapter, folder / f"base-{old}", base, prompts).adapter,
            }
            brought |= _tuned(model, tokenizer, train[:ROWS], brought)
            yield Cell(
                name, old, new, loss(model, tokenizer, test, None), loss(model, tokenizer, test, trained),
                {way: loss(model, tokenizer, test, one) for way, one in brought.items()},
            )  # fmt: skip


def _tuned(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Row], brought: Mapping[str, Adapter]
) -> dict[str, Adapter]:
    """A few steps on a few rows, from what was brought and from nothing."""
    gentle = _recipe(STEPS, RATE / GENTLE)
    asked = {name: Task(gentle, rows, brought[way]) for name, way in TUNED.items()}
    asked[FRESH] = Task(_recipe(STEPS, RATE), rows)
    runs = finetune_many(model, tokenizer, list(asked.values()))
    return {name: run.adapter for name, run in zip(asked, runs, strict=True)}


# ── models and tasks ─────────────────────────────────────────────────────────

Tasks = dict[str, tuple[list[Row], list[Row]]]


def _material() -> tuple[list[str], Tasks]:
    """Texts to learn, and tasks that are not among them: rows to train on, and to quote."""
    data = os.environ.get("LORACTL_BENCH_DATA")
    if not data:
        plain_texts, asked = texts()
        return plain_texts, {"sentences": (_rows(asked[::2]), _rows(asked[1::2]))}
    folder = Path(data)
    with (folder / "gsm8k" / "train.jsonl").open() as file:
        told = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, file)]
    clinc = json.loads((folder / "clinc150" / "data_full.json").read_text())
    told += [text for text, _ in clinc["train"] + clinc["val"]]

    def table(name: str, prompt: str, answer: str) -> list[tuple[str, str]]:
        with (folder / name).open(newline="") as file:
            return [(f"{row[prompt]}\n", row[answer].replace("_", " ")) for row in csv.DictReader(file)]

    pairs: dict[str, list[list[tuple[str, str]]]] = {
        "intents of a bank": [table(f"banking77/{part}.csv", "text", "category") for part in ("train", "test")],
        "requests": [[(f"{a}\n", b.replace("_", " ")) for a, b in clinc[part]] for part in ("train", "test")],
        "restaurants": [table(f"e2e/{part}.csv", "mr", "ref") for part in ("devset", "testset_w_refs")],
    }
    for train, test in pairs.values():
        random.Random(0).shuffle(train)
        random.Random(1).shuffle(test)
    return told, {name: (_rows(train[:4000]), _rows(test)) for name, (train, test) in pairs.items()}


def _rows(pairs: Sequence[tuple[str, str]]) -> list[Row]:
    return rows_of([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def _base(folder: Path, width: int, seed: int, told: Sequence[str], steps: int) -> None:
    """A Llama of this width that has learnt the texts, unless it is there."""
    if folder.exists():
        return
    tokenizer = _tokenizer(told)
    mixed = list(told)
    random.Random(0).shuffle(mixed)
    ids = torch.tensor([token for text in mixed for token in (*tokenizer(text)["input_ids"], 2)])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD // 2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=max(steps, 100), pct_start=0.05)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 129, (16,), generator=chance)
        batch_BT = torch.stack([ids[start : start + 128] for start in starts])
        optimiser.zero_grad()
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _tokenizer(told: Sequence[str]) -> Tokenizer:
    tokens = Tokens(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet)
    tokens.train_from_iterator(told, trainer)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _adapters(folder: Path, width: int, tasks: Mapping[str, Sequence[Row]], steps: int) -> None:
    """Adapters of all linear modules, for the tasks that none is there for."""
    wanted = [name for name in tasks if not (folder / f"adapter-{width}-{name}").exists()]
    if not wanted:
        return
    recipe = _recipe(steps, RATE)
    runs = finetune_many(*load(folder / f"base-{width}", "fp32"), [Task(recipe, tasks[name]) for name in wanted])
    for name, run in zip(wanted, runs, strict=True):
        write_adapter(run.adapter, folder / f"adapter-{width}-{name}", base=recipe.base, recipe=recipe.datasets[0])


def _recipe(steps: int, rate: float) -> FineTune:
    return FineTune(
        base="b3:" + "1" * 64, datasets=("sha256:" + "2" * 64,), targets=("all-linear",), rank=8, alpha=16.0,
        learning_rate=rate, steps=steps, batch_tokens=1024, max_length=200, precision="fp32",
    )  # fmt: skip


# ── the table ────────────────────────────────────────────────────────────────


def table(found: Sequence[Cell]) -> str:
    """Markdown: a row per cell, and the medians."""
    lines = [
        f"| task | widths | bare | trained there | {' | '.join(WAYS)} |",
        f"|---|---|---|---|{'---|' * len(WAYS)}",
    ]
    for cell in found:
        shares = " | ".join(f"{cell.closed(way):.0%}" for way in WAYS)
        lines.append(f"| {cell.task} | {cell.old} → {cell.new} | {cell.bare:.3f} | {cell.trained:.3f} | {shares} |")
    medians = {way: median(cell.closed(way) for cell in found) for way in WAYS}
    missed = "" if medians["by text"] >= TARGET else " **missed**"
    shares = " | ".join(f"{medians[way]:.0%}" for way in WAYS)
    lines.append(f"| median; target {TARGET:.0%} | | | | {shares}{missed} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="folder", type=Path, metavar="DIR", help="keep bases and adapters here")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for cell in cells(args.folder or Path(scratch)):
            found.append(cell)
            print(table(found).splitlines()[-2], flush=True)
    made = table(found)
    print(made)
    before, _, rest = PAGE.read_text().partition("<!-- widths -->\n")
    _, _, after = rest.partition("<!-- /widths -->")
    PAGE.write_text(f"{before}<!-- widths -->\n{made}\n<!-- /widths -->{after}")


if __name__ == "__main__":
    main()
