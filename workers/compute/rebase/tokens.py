"""Which tokens two vocabularies share: by the bytes they stand for, special ones by what they are called or are for.

S (new × old, a one where both are one token) carries what an adapter holds by token, exactly and at its rank:

    embedding A′ = A·Sᵀ        head B′ = S·B
"""

import json
from pathlib import Path

from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..model import Tokenizer

NUMBERS = ("7", "42", "365", "2024", "31415", "1234567")
"""What two tokenizers are asked to cut."""
_ROLES = ("bos", "eos", "pad", "unk")


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a base folder; None where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError):
        return None


def shared_tokens(one: Tokenizer | None, two: Tokenizer | None, rows: tuple[int, int]) -> list[tuple[int, int]]:
    """Old and new ids of the tokens that both have, for tables of so many ``rows``; without tokenizers, ids mean the
    same. Empty where they share none."""
    if one is None or two is None:
        return [(token, token) for token in range(min(rows))]
    first, second = spellings(one), spellings(two)
    if first == second:  # rows beyond the vocabulary as well
        return [(token, token) for token in range(min(rows))]
    shared = {first[key]: second[key] for key in first.keys() & second.keys()}
    for role in _ROLES:
        a, b = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (one, two))
        if a is not None and b is not None and a not in shared and b not in shared.values():
            shared[a] = b
    return sorted((a, b) for a, b in shared.items() if a < rows[0] and b < rows[1])


def spellings(tokenizer: Tokenizer) -> dict[bytes | str, int]:
    """Every token's id by its bytes; a special one's by its name."""
    if not getattr(tokenizer, "is_fast", False):
        return dict(tokenizer.get_vocab())
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"]: token["content"] for token in told["added_tokens"] if token["special"]}
    by_letters = "ByteLevel" in json.dumps([told["decoder"], told["pre_tokenizer"]])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()} if by_letters else {}
    found: dict[bytes | str, int] = {}
    for token, place in sorted(tokenizer.get_vocab().items(), key=lambda item: not _is_byte(item[0])):
        found[special.get(place) or _spelled(token, letters)] = place
    return found


def number_cuts(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Into how many tokens each of `NUMBERS` is cut."""
    return tuple(len(tokenizer(number, add_special_tokens=False)["input_ids"]) for number in NUMBERS)


def _spelled(token: str, letters: dict[str, int]) -> bytes:
    if letters and all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    if _is_byte(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _is_byte(token: str) -> bool:
    """Whether it is a byte to fall back on, ``<0x0A>``; a piece that spells the same comes behind it, and stays."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
