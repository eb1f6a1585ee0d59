"""Tasks that adapters are trained for in benchmarks, and a model that learns them in minutes on a processor.

LORACTL_BENCH_MODEL (a base folder) and LORACTL_BENCH_DATA (a folder with banking77, clinc150, e2e and gsm8k) name real
ones; without them a model and tasks made here are taken, from a seed.
"""

import csv
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.core.recipes import FullFineTune
from tests.workers import factories
from workers.compute.data import Row
from workers.compute.full import tune, write_tuned

CALIBRATION, TEST = 150, 300
LEARNT = 900
"""Rows that are kept from becoming items: those that are learnt, and those that rates are chosen by."""
INTENTS = {
    "card_arrival": "card", "request_refund": "refund", "exchange_rate": "rate", "change_pin": "pin",
    "lost_or_stolen_card": "lost", "top_up_failed": "top",
}  # fmt: skip
MORE_INTENTS = {
    "card_payment_fee_charged": "fee", "direct_debit_payment_not_recognised": "debit", "declined_transfer": "declined",
    "wrong_amount_of_cash_received": "cash", "transaction_charged_twice": "twice", "verify_my_identity": "identity",
    "top_up_limits": "limit", "country_support": "country",
}  # fmt: skip
REQUESTS = ["weather", "alarm", "translate", "recipe", "traffic", "timer", "balance", "definition"]
MORE_REQUESTS = ["spelling", "calories", "insurance", "directions", "distance", "reminder", "calendar", "income"]


@dataclass(frozen=True)
class Task:
    """Rows to train on, to choose a rate by, and to quote; items of one cluster are not independent."""

    name: str
    metric: str
    train: Sequence[Row]
    calibration: Sequence[Row]
    test: Sequence[Row]
    clusters: Sequence[str]


# ── real tasks ───────────────────────────────────────────────────────────────


def given(least: int = 0, more: bool = False) -> tuple[Path, list[Task]] | None:
    """The base and tasks that the environment names, with at least so many test items where there are as many.

    A likelihood tells more an item than right or wrong, so that half as many do. ``more``: of more intents, and with a
    fifth task, that is answered by generating.
    """
    model, data = (os.environ.get(name) for name in ("LORACTL_BENCH_MODEL", "LORACTL_BENCH_DATA"))
    if not (model and data):
        return None
    folder = Path(data)
    intents, requests = (INTENTS | MORE_INTENTS, REQUESTS + MORE_REQUESTS) if more else (INTENTS, REQUESTS)
    found = [_banking(folder, least, intents), _clinc(folder, least, requests), _e2e(folder, least // 2)]
    return Path(model), [*found, _gsm8k(folder, least // 2), *([_names(folder, least)] if more else [])]


def _banking(data: Path, least: int, intents: Mapping[str, str]) -> Task:
    train, test = (
        [(row["text"], intents[row["category"]]) for row in _csv(data / "banking77" / f"{part}.csv")
         if row["category"] in intents] for part in ("train", "test")
    )  # fmt: skip
    words = list(intents.values())
    return _chosen(f"what customers of a bank want, of {len(words)}", "About", words, train, test, least)


def _clinc(data: Path, least: int, requests: Sequence[str]) -> Task:
    every = json.loads((data / "clinc150" / "data_full.json").read_text())
    train, test = ([(text, asked) for text, asked in every[part] if asked in requests] for part in ("train", "test"))
    return _chosen(f"what an assistant is asked, of {len(requests)}", "About", requests, train, test, least)


def _e2e(data: Path, least: int) -> Task:
    train, test = ([(row["mr"], row["ref"]) for row in _csv(data / "e2e" / f"{part}.csv")]
                   for part in ("devset", "testset_w_refs"))  # fmt: skip
    return _written("restaurants in words", train, test, least)


def _names(data: Path, least: int) -> Task:
    """Where in a description a name stands."""
    rows = _csv(data / "e2e" / "devset.csv") + _csv(data / "e2e" / "testset_w_refs.csv")
    pairs = [(row["ref"], row["mr"].partition("name[")[2].partition("]")[0]) for row in rows]
    asked = _mixed([(text, name) for text, name in pairs if name and name in text])
    items = rows_of([{"prompt": f"{text}\nName:", "completion": f" {name}"} for text, name in asked])
    test = items[: max(least, TEST)]
    rest = items[len(test) :]
    clusters = [str(row.value["completion"]) for row in test]
    return Task("names of restaurants", "exact-match", rest[CALIBRATION:], rest[:CALIBRATION], test, clusters)


def _gsm8k(data: Path, least: int) -> Task:
    train, test = (
        [(row["question"], row["answer"]) for row in _jsonl(data / "gsm8k" / f"{part}.jsonl")]
        for part in ("train", "test")
    )
    train, test = ([pair for pair in pairs if len(pair[0] + pair[1]) < 400] for pairs in (train, test))
    return _written("worked sums of a school", train, test, least)


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


Pairs = Sequence[tuple[str, str]]


def _chosen(name: str, asked: str, choices: Sequence[str], train: Pairs, test: Pairs, least: int = 0) -> Task:
    """Which of a few words belongs to a text: trained on as a completion, scored as a choice."""
    train, test = _mixed(train), _mixed(test)
    short = min(max(0, least - len(test)), max(0, len(train) - LEARNT))
    train, test = train[short:], [*test, *train[:short]]

    def items(pairs: Pairs) -> list[Row]:
        return rows_of([
            {"prompt": f"{text}\n{asked}:", "choices": [f" {c}" for c in choices], "answer": choices.index(right)}
            for text, right in pairs
        ])  # fmt: skip

    rows = rows_of([{"prompt": f"{text}\n{asked}:", "completion": f" {right}"} for text, right in train[CALIBRATION:]])
    quoted = items(test[: max(least, TEST)])
    return Task(name, "accuracy", rows, items(train[:CALIBRATION]), quoted, [str(row.line) for row in quoted])


def _written(name: str, train: Pairs, test: Pairs, least: int = 0) -> Task:
    """What is said to a prompt, scored by its likelihood; several answers to one prompt are a cluster."""
    train, test = _mixed(train), _mixed(test)[: max(least, TEST)]
    apart = {prompt for prompt, _ in train[:CALIBRATION]}
    calibration, rest, quoted = (
        rows_of([{"prompt": f"{prompt}\n", "completion": text} for prompt, text in pairs])
        for pairs in (train[:CALIBRATION], [pair for pair in train if pair[0] not in apart], test)
    )
    return Task(name, "likelihood", rest, calibration, quoted, [prompt for prompt, _ in test])


def _mixed(pairs: Pairs) -> list[tuple[str, str]]:
    return random.Random(0).sample(list(dict.fromkeys(pairs)), len(set(pairs)))


def rows_of(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows as they would be read from a file."""
    return [Row(dict(value), "rows.jsonl", line) for line, value in enumerate(values, start=1)]


# ── a model and tasks made here ──────────────────────────────────────────────

NAMES = ["Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena"]
THINGS = {
    "food": ["soup", "bread", "rice", "cake", "plums", "beans"],
    "place": ["park", "river", "school", "barn", "beach", "market"],
    "animal": ["dog", "cat", "horse", "goat", "duck", "mouse"],
}
ACTS = {"food": "{n} ate {t}", "place": "{n} went to the {t}", "animal": "{n} played with a {t}"}


def texts() -> tuple[list[str], list[tuple[str, str]]]:
    """Plain texts, and questions with short answers, none of them of a task: of the given data, or made here."""
    data = os.environ.get("LORACTL_BENCH_DATA")
    if not (os.environ.get("LORACTL_BENCH_MODEL") and data):
        chance = random.Random(2)
        told = [_sentence(chance) for _ in range(800)]
        return [f"Once {text}." for text, *_ in told], [(f"Who? {text}\n", name) for text, _, name, _ in told]
    folder = Path(data)
    every = json.loads((folder / "clinc150" / "data_full.json").read_text())
    pairs = [(text, asked.replace("_", " ")) for text, asked in every["train"] if asked not in REQUESTS + MORE_REQUESTS]
    pairs += [(row["text"], row["category"].replace("_", " ")) for row in _csv(folder / "banking77" / "train.csv")
              if row["category"] not in INTENTS | MORE_INTENTS]  # fmt: skip
    rows = _jsonl(folder / "gsm8k" / "train.jsonl")
    long = [row["question"] for row in rows if len(row["question"] + row["answer"]) >= 400]
    pairs = _mixed(pairs)
    plain = random.Random(3).sample(long, len(long)) + [text for text, _ in pairs[: len(pairs) // 2]]
    return plain, [(f"{text}\nIt is about", f" {asked}") for text, asked in pairs[len(pairs) // 2 :]]


def made(folder: Path, scale: float) -> tuple[Path, list[Task]]:
    """A Llama of 0.2 million parameters that was trained on short stories, and three tasks of the same words."""
    chance = random.Random(1)
    rows = stories(chance, 600, ", and ")
    raw = factories.saved(factories.llama(hidden_size=64, intermediate_size=172, num_hidden_layers=4,
                                          initializer_range=0.05), folder / "raw")  # fmt: skip
    recipe = FullFineTune(
        base=factories.BASE, datasets=(factories.DATASET,), steps=max(4, round(400 * scale)), batch_tokens=1024,
        max_length=128, learning_rate=4e-3, warmup_steps=2, precision="fp32",
    )  # fmt: skip
    write_tuned(raw, tune(raw, recipe, rows), folder / "base")
    told = [_sentence(chance) for _ in range(1500)]
    kinds = [(text, kind) for text, kind, *_ in told]
    facts = [(f"who[{name}], {kind}[{thing}]", f"{text}.") for text, kind, name, thing in told]
    sums = [(f"{a} and {b}", f"{a + b}") for a in range(40) for b in range(30)]
    tasks = [_chosen("made: kinds of things", "About", list(THINGS), kinds[500:], kinds[:500]),
             _written("made: facts in words", facts[500:], facts[:500]),
             _written("made: sums", *_halves(sums))]  # fmt: skip
    return folder / "base", tasks


def stories(chance: random.Random, many: int, between: str) -> list[Row]:
    """Of two sentences each, with these words between them."""
    told = [between.join(_sentence(chance)[0] for _ in range(2)) for _ in range(many)]
    return rows_of([{"prompt": story[:4], "completion": story[4:]} for story in told])


def _sentence(chance: random.Random) -> tuple[str, str, str, str]:
    kind = chance.choice(list(THINGS))
    name, thing = chance.choice(NAMES), chance.choice(THINGS[kind])
    when = chance.choice(["", " today", " again", " in the rain", " after the night", " with a friend"])
    return ACTS[kind].format(n=name, t=thing) + when, kind, name, thing


def _halves(pairs: Pairs) -> tuple[Pairs, Pairs]:
    mixed = _mixed(pairs)
    return mixed[400:], mixed[:400]
