"""Rows of JSONL to tokens: prompts that are read, completions that are learnt and scored.

The forms of a row are those of `registry.core.rows`.

Prompt and completion are tokenised apart and concatenated, in training as in evaluation, so that no token
spans their border and generation meets exactly what was trained; a completion that continues a word's
space begins with that space. The prompt gets the special tokens that the tokenizer puts in front, the
completion the end-of-sequence token behind. Messages go through the tokenizer's chat template; only the
last turn, the assistant's, is the completion, and the template's own end of turn is part of it.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from registry.core.errors import BadDataset, UnusableDataset
from registry.core.records import item_id
from registry.core.rows import parse_row
from registry.files import DATA_FILE

from .model import Tokenizer

_ROW = 256
"""Rows of packed sequences are this long or as the longest sequence: longer ones spend more on attention."""
_AT_ONCE = 4096
"""Rows whose texts go to the tokenizer together."""


@dataclass(frozen=True)
class Row:
    """A parsed line, and where it stands."""

    value: dict[str, Any]
    path: str
    """The name of its file."""
    line: int
    data: str = ""
    """What people call the dataset or suite that the file is of; empty where the file's name is all there is to say."""

    @property
    def where(self) -> str:
        """What people call the file."""
        return called(self.path, self.data)

    def refuse(self, reason: str) -> BadDataset | UnusableDataset:
        """The refusal of this row; of one that stands in no line, of all."""
        if not self.line:
            return UnusableDataset(path=self.where, reason=reason)
        return BadDataset(path=self.where, line=self.line, reason=reason)


@dataclass(frozen=True, eq=False)
class Taught:
    """What a teacher found likely for each of T tokens: K tokens, the likeliest first, and ln p of each."""

    top_TK: Tensor
    log_p_TK: Tensor


@dataclass(frozen=True)
class Example:
    """A row in tokens."""

    row: Row
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """One completion, or every choice."""
    texts: tuple[str, ...]
    """Their texts, without any end token: what is measured in UTF-8 bytes."""
    answer: int | None = None
    """The index of the right choice; None when there was nothing to choose from."""
    end: tuple[int, ...] = ()
    """What follows a completion in training: the end of sequence, or the template's end of turn."""
    taught: Taught | None = field(default=None, compare=False)
    """What a teacher says of completion and end, token by token; None where these themselves are the target."""

    @property
    def value(self) -> dict[str, Any]:
        """The row's."""
        return self.row.value

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt, right completion and end, as trained on."""
        return self.prompt + self.completions[self.answer or 0] + self.end


# ── rows ─────────────────────────────────────────────────────────────────────


Parse = Callable[[bytes, str, int], dict[str, Any]]
"""One of the functions of `registry.core.rows` that make something of a line, the file's name and its number."""


def called(path: str, data: str = "") -> str:
    """What people call a file of the dataset or suite that they call ``data``: as that, where it was pushed as one."""
    if not data:
        return path
    return data if path == DATA_FILE else f"{data}/{path}"


def read_rows(folder: Path, data: str = "") -> list[Row]:
    """The rows of every ``.jsonl`` file of a dataset or suite, by file name and line; refused as ``data`` says."""
    paths = sorted(folder.rglob("*.jsonl"))
    if not paths:
        raise UnusableDataset(path=data or folder.name, reason="there is no .jsonl file")
    rows = [row for path in paths for row in rows_of(path, parse_row, data)]
    if not rows:
        raise UnusableDataset(path=called(paths[0].name, data), reason="there are no rows")
    return rows


def rows_of(path: Path, parse: Parse, data: str = "") -> list[Row]:
    """The rows of one file."""
    return parse_rows(path.read_bytes(), path.name, parse, data)


def parse_rows(content: bytes, path: str, parse: Parse = parse_row, data: str = "") -> list[Row]:
    """One row per line that is not blank; `BadDataset` names the line that is no row."""
    lines, where = enumerate(content.split(b"\n"), start=1), called(path, data)
    return [Row(parse(line, where, number), path, number, data) for number, line in lines if line.strip()]


# ── tokens ───────────────────────────────────────────────────────────────────


def tokenize(tokenizer: Tokenizer, row: Row, max_length: int) -> Example:
    """The row in tokens; its prompt is cut on the left to ``max_length``, a completion that does not fit is refused."""
    [example] = encoded(tokenizer, [row])
    return shortened(example, max_length)


def encoded(tokenizer: Tokenizer, rows: Sequence[Row | Example]) -> list[Example]:
    """Rows in tokens, however many; one whose completion gives none is refused. What is in tokens stays as it is."""
    texts = [row for row in rows if isinstance(row, Row)]
    some = (texts[at : at + _AT_ONCE] for at in range(0, len(texts), _AT_ONCE))
    made = iter([example for part in some for example in _encoded(tokenizer, part)])
    return [next(made) if isinstance(row, Row) else row for row in rows]


def _encoded(tokenizer: Tokenizer, rows: Sequence[Row]) -> Iterator[Example]:
    before = [_before(tokenizer, row) for row in rows]
    said = [_said(tokenizer, row, text) for row, text in zip(rows, before, strict=True)]
    prompts = _prompts(tokenizer, rows, before)
    ids = iter(_ids(tokenizer, [text for texts, end in said for text in (*texts, end or "")]))
    at_the_end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    for row, prompt, (texts, end) in zip(rows, prompts, said, strict=True):
        completions, after = tuple(next(ids) for _ in texts), next(ids)
        if min(map(len, completions)) == 0:
            raise row.refuse("a completion gives no tokens")
        answer = row.value.get("answer") if "choices" in row.value else None
        yield Example(row, prompt, completions, texts, answer, at_the_end if end is None else after)


def prompts_of(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """What stands before the completion of each row, in tokens: at least one."""
    return _prompts(tokenizer, rows, [_before(tokenizer, row) for row in rows])


def _prompts(tokenizer: Tokenizer, rows: Sequence[Row], before: Sequence[str | None]) -> list[tuple[int, ...]]:
    by_template = iter(_ids(tokenizer, [text for text in before if text is not None]))
    plain = [row.value["prompt"] for row, text in zip(rows, before, strict=True) if text is None]
    with_specials = iter(_ids(tokenizer, plain, add_special_tokens=True))
    found = [_leading(tokenizer, next(with_specials)) if text is None else next(by_template) for text in before]
    return [ids or _beginning(tokenizer, row) for row, ids in zip(rows, found, strict=True)]


def shortened(example: Example, max_length: int) -> Example:
    """The example with its prompt cut on the left, so that it fits with any of its completions."""
    longest = max(map(len, example.completions)) + len(example.end)
    if longest >= max_length:
        reason = f"the completion has {longest} tokens; at most {max_length - 1} fit, beside one of the prompt"
        raise example.row.refuse(reason)
    return replace(example, prompt=example.prompt[longest - max_length :])


def _ids(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[tuple[int, ...]]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)
    return [tuple(ids) for ids in found["input_ids"]]


def _leading(tokenizer: Tokenizer, ids: tuple[int, ...]) -> tuple[int, ...]:
    """A prompt with the special tokens in front, without one that the tokenizer may put behind."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def _beginning(tokenizer: Tokenizer, row: Row) -> tuple[int, ...]:
    """An empty prompt: something must stand before the first token that is predicted."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (token,)
    raise row.refuse("the prompt gives no tokens, and the tokenizer has no token to begin with")


def _before(tokenizer: Tokenizer, row: Row) -> str | None:
    """Of messages all but the last, and what the template puts in front of an answer; None of other rows."""
    if "messages" not in row.value:
        return None
    if not tokenizer.chat_template:
        raise row.refuse("the base's tokenizer has no chat template, which 'messages' need")
    messages = row.value["messages"][:-1]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _said(tokenizer: Tokenizer, row: Row, before: str | None) -> tuple[tuple[str, ...], str | None]:
    """The texts that may complete the prompt, and the template's end of turn; None: the token that ends a sequence."""
    if before is None:
        return tuple(row.value.get("choices") or [row.value["completion"]]), None
    messages = row.value["messages"]
    text = messages[-1]["content"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(before + text):
        text = text.strip()
        if not text or not whole.startswith(before + text):
            raise row.refuse("the chat template does not put the last message behind the generation prompt unchanged")
    return (text,), whole[len(before) + len(text) :].rstrip("\n")


_Given = TypeVar("_Given", bound=Row | Example)


def _row_of(given: Row | Example) -> Row:
    return given if isinstance(given, Row) else given.row


def hold_out(rows: Sequence[_Given], share: float) -> tuple[list[_Given], list[_Given]]:
    """Rows to train on and rows held out, drawn by their content: a row that is there twice is on one side."""
    if not share:
        return list(rows), []
    sides: tuple[list[_Given], list[_Given]] = ([], [])
    for row in rows:
        drawn = hashlib.sha256(b"loractl/1 held out\0" + item_id(row.value).encode()).digest()
        sides[int.from_bytes(drawn[:8], "big") < share * (1 << 64)].append(row)
    for side, word in zip(sides, ("to train on", "aside"), strict=True):
        if not side:
            reason = f"held_out = {share:g} keeps none of its {len(rows)} rows {word}"
            raise UnusableDataset(path=_row_of(rows[0]).where, reason=reason)
    return sides


# ── batches ──────────────────────────────────────────────────────────────────


def batches(examples: Sequence[Example], batch_tokens: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end: every epoch in an order of its own, drawn from the seed and the epoch's number.

    Rows are taken until the next one would exceed ``batch_tokens`` (at least one).
    """
    return chunks(_epochs(examples, seed), batch_tokens)


def _epochs(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    for epoch in itertools.count():
        order = list(examples)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from order


def chunks(examples: Iterable[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Examples in their order, in batches of at most ``batch_tokens`` (or of one)."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        if batch and size + len(example.ids) > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += len(example.ids)
    if batch:
        yield batch


@dataclass(frozen=True)
class Packed:
    """Sequences laid one behind another in rows of equal length.

    Each begins at position 0, by which transformers tells where one ends: none looks into another. Rows are filled up
    with the token 0 at positions that count from 0 again, as a sequence that nobody asks.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    asked_BT: Tensor
    """The positions that predict a completion's token."""
    targets_N: Tensor
    """Those tokens, row by row."""
    weights_N: Tensor
    """1 ⁄ the number of such tokens in the batch that each belongs to, so that a weighted sum is a mean per batch."""
    owner_N: Tensor
    """The batch that each belongs to."""
    rows: tuple[int, ...]
    """Rows per batch, in order."""
    top_NK: Tensor | None = None
    """Where an example of theirs is taught: the teacher's likeliest tokens at each of these positions, and ln p of
    each, −∞ where there are fewer; of an example that is not, its own token for sure."""
    log_p_NK: Tensor | None = None

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Packed(**moved, rows=self.rows)


def pack(many: Sequence[Sequence[Example]], *, together: bool = True, asked: Sequence[float] | None = None) -> Packed:
    """Batches as rows of one length, one batch behind the other; with ``together`` rows hold several sequences.

    Without it every sequence has a row of its own, for models that would let one look into another. ``asked``: tokens
    that are asked of each batch, where this is only a part of it.
    """
    asked = list(map(asked_of, many)) if asked is None else asked
    if together:
        width = max(_width(batch) for batch in many if batch)
        lines = [_laid_out(batch, width) for batch in many]
    else:
        width = max(len(example.ids) for batch in many for example in batch)
        lines = [[[example] for example in batch] for batch in many]
    shape = (sum(map(len, lines)), width)
    ids_BT, asked_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    owner_B = torch.zeros(shape[0], dtype=torch.long)
    row = 0
    for owner, batch_lines in enumerate(lines):
        for line in batch_lines:
            at = 0
            for example in line:
                end = at + len(example.ids)
                ids_BT[row, at:end] = torch.tensor(example.ids)
                positions_BT[row, at:end] = torch.arange(end - at)
                asked_BT[row, at + len(example.prompt) - 1 : end - 1] = True
                at = end
            positions_BT[row, at:] = torch.arange(width - at)
            owner_B[row] = owner
            row += 1
    owner_N = owner_B[:, None].expand(shape)[asked_BT]
    weights_N = 1 / torch.tensor(asked)[owner_N].float()
    targets_N = ids_BT.roll(-1, dims=1)[asked_BT]
    taught = _taught([example for batch_lines in lines for line in batch_lines for example in line])
    return Packed(ids_BT, positions_BT, asked_BT, targets_N, weights_N, owner_N, tuple(map(len, lines)), *taught)


def _taught(examples: Sequence[Example]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What teachers say of these examples' tokens; nothing where there is no teacher."""
    if all(example.taught is None for example in examples):
        return None, None
    said = [example.taught or _certain(example) for example in examples]
    most = max(each.top_TK.shape[1] for each in said)
    tops, log_ps = (
        [F.pad(x_TK, (0, most - x_TK.shape[1]), value=fill) for x_TK in found]
        for found, fill in (([each.top_TK for each in said], 0), ([each.log_p_TK for each in said], -math.inf))
    )
    return torch.cat(tops).long(), torch.cat(log_ps)


def _certain(example: Example) -> Taught:
    asked_T1 = torch.tensor(example.ids[len(example.prompt) :], dtype=torch.int32)[:, None]
    return Taught(asked_T1, torch.zeros(asked_T1.shape))


def asked_of(batch: Sequence[Example]) -> int:
    """How many tokens of completions, ends among them, a batch asks for."""
    return sum(len(example.ids) - len(example.prompt) for example in batch)


def _width(batch: Sequence[Example]) -> int:
    """The length of a batch's rows when it is alone: its longest sequence, or `_ROW`, or all of it."""
    longest = max(len(example.ids) for example in batch)
    return min(sum(len(example.ids) for example in batch), max(longest, _ROW))


def _laid_out(batch: Sequence[Example], width: int) -> list[list[Example]]:
    """First fit, longest first; equal lengths in their order, so that equal batches are equal rows."""
    lines: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(batch, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            lines.append([example])
            room.append(width - size)
        else:
            lines[place].append(example)
            room[place] -= size
    return lines


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Rows of ids as one matrix, padded with id 0, which nothing looks at."""
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for ids_T, row in zip(ids_BT, rows, strict=True):
        ids_T[len(ids_T) - len(row) if left else 0 :][: len(row)] = torch.tensor(row)
    return ids_BT
