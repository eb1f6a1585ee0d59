"""The demo's data: three small tasks and the text of the base's refresh, written from a seed.

Every task has train rows and a held-out suite that share no sentence frame and no name, place, product or
number; what they share is the words that decide (a ticket's topic) and the days. Prompts and completions are
short, so that two cores train and score them in minutes.

    triage   which team answers this ticket?   one token out of four; accuracy
    orders   an order as a record              likelihood of the record
    board    a note as a line for the board    likelihood of the line

The refresh is what another department would train a base on: the same counters' service reports, in forms
of their own. Three of its forms begin as the tasks do (Order, Note, Ticket), so it competes with them, and its
strength (`bases.REFRESH`) was chosen by looking: strong enough that some carries fail, weak enough that not all do.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from registry.core.records import Split, item_id, split_of

Row = dict[str, Any]
Part = Literal["train", "held-out"]
Draw = Callable[[random.Random, Part], Row]
TRAIN_ROWS = 600
TRAIN_SEED, SUITE_SEED, REFRESH_SEED = 1, 2, 1
SUITE_ROWS: dict[Split, int] = {"gate": 304, "calibration": 64, "report": 0}
"""By split: what decides, what chooses among candidates, and nothing that the demo would not read."""


@dataclass(frozen=True)
class Task:
    """A task by its name, the metric of its gate, and how one row of it is drawn."""

    name: str
    metric: Literal["accuracy", "likelihood"]
    draw: Draw

    def train(self, seed: int = TRAIN_SEED, count: int = TRAIN_ROWS) -> list[Row]:
        """Rows to learn from, each with a prompt and its completion; no two are equal."""
        return [_trainable(row) for row in _unique(self.draw, f"{self.name}/train/{seed}", "train", count)]

    def suite(self, seed: int = SUITE_SEED, rows: Mapping[Split, int] = SUITE_ROWS) -> list[Row]:
        """Held-out items; no two are equal, and no frame, name, place, product or number of the train rows."""
        drawn = _unique(self.draw, f"{self.name}/held-out/{seed}", "held-out", 3 * sum(rows.values()))
        parts = {split: [row for row in drawn if split_of(item_id(row)) == split][:count]
                 for split, count in rows.items()}  # fmt: skip
        return [row for row in drawn if row in parts[split_of(item_id(row))]]


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """The rows as JSONL, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refresh(seed: int = REFRESH_SEED, count: int = TRAIN_ROWS) -> list[Row]:
    """Service reports in prose and fields: what the base's second revision is trained on."""
    return _unique(_report, f"refresh/{seed}", "train", count)


def _unique(draw: Draw, seed: str, part: Part, count: int) -> list[Row]:
    rng = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = draw(rng, part)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _trainable(row: Row) -> Row:
    return row if "completion" in row else {"prompt": row["prompt"], "completion": row["choices"][row["answer"]]}


@dataclass(frozen=True)
class Pool:
    """Fillers or frames: the first ``train`` of them for training, the others for the suite."""

    words: tuple[str, ...]
    train: int

    def of(self, part: Part) -> tuple[str, ...]:
        """The words of one part."""
        return self.words[: self.train] if part == "train" else self.words[self.train :]


def _pool(text: str, separator: str = ",") -> Pool:
    words = tuple(word.strip() for word in text.strip().split(separator))
    return Pool(words, round(len(words) * 0.6))


NAMES = _pool(
    "Anna, Ben, Carla, David, Elena, Frank, Grace, Hugo, Irene, Jonas, Karin, Leo, Maria, Nils, Olga, Paul, Rosa,"
    "Simon, Tara, Victor, Wanda, Yusuf, Zoe, Amir, Bella, Cyril, Dora, Emil, Fiona, Gustav, Hanna, Ivan, Julia, Kofi,"
    "Lena, Marco, Nora, Omar, Petra, Quinn"
)
CITIES = _pool(
    "Leeds, Lyon, Turin, Ghent, Porto, Basel, Malmo, Graz, Cork, Bergen, Split, Utrecht, Bilbao, Aarhus, Krakow,"
    "Dresden, Tampere, Verona, Nantes, York, Riga, Bonn, Seville, Brno, Linz"
)
PRODUCTS = _pool(
    "oak desk, steel shelf, desk lamp, swivel chair, glass table, wall clock, coat rack, book case, floor mat, paper"
    " tray, corner sofa, filing cabinet, white board, bar stool, bed frame, garden bench, kitchen stool, wine rack,"
    "mirror, plant stand, night table, foot rest, shoe box, towel rail, tool chest"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NUMBERS = Pool(tuple(str(n) for n in (*range(2, 60, 2), *range(3, 61, 2))), 29)


def _fill(rng: random.Random, part: Part, frames: Pool, fillers: Mapping[str, str]) -> str:
    return rng.choice(frames.of(part)).format_map(fillers)


# ── triage: which team answers this ticket? ──────────────────────────────────

TEAMS = (" billing", " delivery", " repair", " account")
_TOPICS = (
    ("invoice", "refund", "receipt", "payment", "discount", "bank transfer", "price", "credit note", "voucher", "tax"),
    ("parcel", "courier", "shipping date", "tracking", "driver", "depot", "delivery van", "wrong address", "drop-off"),
    ("broken leg", "loose screw", "crack", "hinge", "spare part", "scratch", "jammed lock", "damage", "warranty fix"),
    ("password", "login", "user name", "profile", "email settings", "newsletter", "PIN", "membership", "sign-in code"),
)
"""The words that decide, shared by train and held-out; the sentences around them are not."""
_TICKETS = _pool(
    "I have a question about the {topic} of my {product}.|{name} asks about the {topic}, it is for a {product}."
    "|Hello, there is a problem with the {topic}, {product} from {city}.|The {topic} again! My {product} is from {day}."
    "|Since {day} the {topic} is wrong for {name}.|Please look at the {topic}, {name} in {city}."
    "|Can you check the {topic} before {day}? Thanks, {name}.|My {topic} for the {product} needs help."
    "|Hi team, the {topic} for {name} is not right.|We have trouble with the {topic} in {city} since {day}."
    "|Something about the {topic} of this {product} is odd.|Who takes care of the {topic}? Regards, {name}."
    "|{city}, {day}: {name} complains about the {topic}.|I wrote twice about the {topic} and the {product}."
    "|What happened to my {topic}? {name}, {city}.|Still no answer on the {topic}, says {name} on {day}."
    "|About that {product}: the {topic} bothers me.|{name} is unhappy, it is the {topic} this time, {city}."
    "|Could someone explain the {topic} to {name} by {day}?|Dear all, my {product} and the {topic}, what now?",
    "|",
)


def _triage(rng: random.Random, part: Part) -> Row:
    answer = rng.randrange(len(TEAMS))
    text = _fill(rng, part, _TICKETS, _fillers(rng, part) | {"topic": rng.choice(_TOPICS[answer])})
    return {"prompt": f"Ticket: {text}\nTeam:", "choices": list(TEAMS), "answer": answer}


# ── orders: an order as a record ─────────────────────────────────────────────

_ORDERS = _pool(
    "{n} {product}s to {city} by {day}.|Send {n} {product}s on {day}, to {city}.|For {city}: {n} {product}s, due {day}."
    "|{city} needs {n} {product}s until {day}.|By {day} we owe {city} {n} {product}s.|{day}, {city}: {n} {product}s, please."
    "|On {day} bring {city} {n} {product}s.|{city} called, {n} {product}s for {day}."
    "|Please ship {n} {product}s before {day}, {city}.|{n} times the {product}, {city} wants them {day}.",
    "|",
)


def _orders(rng: random.Random, part: Part) -> Row:
    fillers = _fillers(rng, part)
    text = _fill(rng, part, _ORDERS, fillers)
    record = "{city}/{day3} > {product} x {n}".format_map(fillers)
    return {"prompt": f"Order: {text}\nRecord:", "completion": f" {record}"}


# ── board: a note as a line for the board ────────────────────────────────────

_MOVES = _pool(
    "The {topic} with {name} moves from {day} to {other}.|{name} asks to shift the {topic} from {day} to {other}."
    "|We will hold the {topic} on {other} and not on {day}, {name} knows.|{name} cannot do {day}, so the {topic} is on {other}."
    "|Instead of {day}, {name} runs the {topic} on {other}.",
    "|",
)
_DROPS = _pool(
    "The {topic} with {name} on {day} is cancelled.|{name} called off the {topic} of {day}."
    "|No {topic} on {day}, {name} is ill.|There will be no {topic} with {name} this {day}."
    "|{name} drops the {topic} planned for {day}.",
    "|",
)
_ADDS = _pool(
    "A new {topic} with {name} is set for {day}.|{name} added a {topic} on {day}."
    "|Please plan a {topic} for {day}, {name} leads it.|{name} would like one more {topic} on {day}."
    "|On {day} there is now a {topic}, held by {name}.",
    "|",
)
TOPICS = _pool(
    "budget review, stock count, safety drill, team lunch, site visit, price talk, staff training, audit, design meeting,"
    "sales call, store tour, fire drill, book club, press briefing, supplier visit, town hall, key handover, shift change,"
    "garden day, first aid course"
)


def _board(rng: random.Random, part: Part) -> Row:
    fillers = _fillers(rng, part)
    frames, line = rng.choice(
        (
            (_MOVES, "~ {day3}>{other3} {topic} @{name}"),
            (_DROPS, "- {day3} {topic} @{name}"),
            (_ADDS, "+ {day3} {topic} @{name}"),
        )
    )
    text = _fill(rng, part, frames, fillers)
    return {"prompt": f"Note: {text}\nBoard:", "completion": f" {line.format_map(fillers)}"}


def _fillers(rng: random.Random, part: Part) -> dict[str, str]:
    day, other = rng.sample(DAYS, 2)
    return {
        "name": rng.choice(NAMES.of(part)), "city": rng.choice(CITIES.of(part)), "topic": rng.choice(TOPICS.of(part)),
        "product": rng.choice(PRODUCTS.of(part)), "n": rng.choice(NUMBERS.of(part)),
        "day": day, "other": other, "day3": day[:3], "other3": other[:3],
    }  # fmt: skip


# ── refresh: what the second revision of the base has read ───────────────────

_REPORTS = (
    (
        "Order: {n} {product}s to {city}\nRecord:",
        "customer={name}; place={city}; goods={product}; pieces={n}; due={day}",
    ),
    (
        "Note: {topic} on {day}\nProtocol:",
        "On {day} {name} of {city} held the {topic} and closed it after {n} minutes.",
    ),
    (
        "Report: {product}, {city}\nFinding:",
        "{name} looked at {n} pieces of the {product} on {day} and found no fault.",
    ),
    (
        "Visit: {name}, {city}\nLog:",
        "arrived {day}, checked the {product}, spoke of the {topic}, left after {n} minutes.",
    ),
    (
        "Ticket: {product}, {day}\nAnswer:",
        "Dear {name}, on {day} we come to {city} and bring {n} parts for the {product}.",
    ),
)


def _report(rng: random.Random, part: Part) -> Row:
    prompt, completion = rng.choice(_REPORTS)
    fillers = _fillers(rng, part)
    return {"prompt": prompt.format_map(fillers), "completion": " " + completion.format_map(fillers)}


POOLS = (NAMES, CITIES, PRODUCTS, TOPICS, NUMBERS, _TICKETS, _ORDERS, _MOVES, _DROPS, _ADDS)
"""Everything that is split between train and held-out."""

TASKS: tuple[Task, ...] = (
    Task("triage", "accuracy", _triage),
    Task("orders", "likelihood", _orders),
    Task("board", "likelihood", _board),
)
