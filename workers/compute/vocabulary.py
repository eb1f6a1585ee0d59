"""A base's tokenizer as llama.cpp reads it (docs/gguf.md, `tokenizer.ggml.*`): tokens, their kinds, merges or scores.

llama.cpp knows two algorithms that are exactly those of tokenizers.json files: byte-level BPE by merges, where the
regular expression that cuts text into words has a name of its own, and SentencePiece's BPE by scores. What is neither
is refused: with a wrong name the file loads, answers, and is wrong.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from registry.core.errors import ForeignTokenizer, NotExportable

from .model import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens."""

_GPT2 = "bytes by GPT-2's own words"
_DIGITS = "single digits"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{NUMBERS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.replace("{NUMBERS}", "{1,3}"), _WORDS.replace("{NUMBERS}", "")
_PRE: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
}
"""llama.cpp's names of how text is cut into words, and of whether a word that is a token needs no merges."""

_PHI3_OTHERS = {"<unk>", "<s>", "<|endoftext|>"}
"""In a model with "phi-3" in its name, the special tokens that do not swallow the spaces behind them."""


def vocabulary(tokenizer: Tokenizer, rows: int, name: str) -> dict[str, Any]:
    """The facts of ``tokenizer`` for a base whose embedding has ``rows`` rows (those without a token are unused), and
    the model's name, which llama.cpp takes a rule of tokenising from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refusal("it has no tokenizer.json")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"]["type"]
    if kind != "BPE":
        raise _refusal(f"it is of type {kind}, and only BPE is written")
    tokens = {int(i): token for token, i in described["model"]["vocab"].items()}
    added = {int(token["id"]): token for token in described["added_tokens"]}
    tokens |= {i: token["content"] for i, token in added.items()}
    if (highest := max(tokens)) >= rows:
        raise ForeignTokenizer(token=highest, rows=rows)
    kinds = [_kind(tokens.get(i), added.get(i), described["model"]) for i in range(rows)]
    texts = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    by_scores = bool(described["model"].get("byte_fallback"))
    merges = [(left, right) for left, right in map(_pair, described["model"]["merges"])]
    if not merges:
        raise _refusal("it has no merges, and llama.cpp does not start without")
    facts: dict[str, Any] = {
        "general.name": _name(name, described["added_tokens"]),
        "tokenizer.ggml.model": "llama" if by_scores else "gpt2",
        "tokenizer.ggml.pre": "default" if by_scores else _pre(described),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
    }
    if by_scores:
        facts["tokenizer.ggml.scores"] = _scores(texts, kinds, merges)
        facts["tokenizer.ggml.add_space_prefix"] = _space_in_front(described)
    else:
        facts["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    return facts | _specials(tokenizer)


def _refusal(reason: str) -> NotExportable:
    return NotExportable(what="The base's tokenizer", reason=reason)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _kind(token: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> int:
    if token is None:
        return UNUSED
    if token == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _name(name: str, added: Sequence[Mapping[str, Any]]) -> str:
    """The model's name, with or without "phi-3", by which llama.cpp decides whether special tokens swallow spaces."""
    swallow = {token["content"] for token in added if token["rstrip"]}
    others = {token["content"] for token in added} - swallow
    if any(token["lstrip"] or token["single_word"] for token in added) or (swallow and others != _PHI3_OTHERS):
        raise _refusal("its special tokens take spaces or words from around them, and llama.cpp's do not")
    named = re.search("phi-?3", name, re.IGNORECASE) is not None
    if swallow:
        return name if named else f"phi-3 {name}"
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


# ── by merges ────────────────────────────────────────────────────────────────


def _pre(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps = tuple(step for one in _flat(described["pre_tokenizer"]) if (step := _step(one)))
    ignores = bool(described["model"].get("ignore_merges"))
    normalizers = {one["type"] for one in _flat(described["normalizer"])} - {"NFC"}  # llama.cpp takes text as composed
    if (steps, ignores) not in _PRE or normalizers:
        raise _refusal(
            f"llama.cpp's name for how it cuts text is not known here: {json.dumps(described['pre_tokenizer']):.200}"
        )
    return _PRE[steps, ignores]


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return [step] if inner is None else [one for part in inner for one in _flat(part)]


def _step(step: Mapping[str, Any]) -> str:
    """What a step does, in a word; nothing where it only spells bytes as letters."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return _GPT2 if words else ""
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return json.dumps(step)


# ── by scores ────────────────────────────────────────────────────────────────


def _scores(texts: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores by which SentencePiece's BPE does what the merges do: the earlier a token is merged, the higher.

    SentencePiece joins any two tokens that make a third, the best third first. Merges say the same where the merges
    of one token follow one another and are all there are: both are looked at.
    """
    normal = {text for text, kind in zip(texts, kinds, strict=True) if kind == NORMAL}
    ranks: dict[str, int] = {}
    found: dict[str, int] = {}
    before = ""
    for left, right in merges:
        token = left + right
        if token not in normal or left not in normal or right not in normal:
            continue
        if token != before and token in ranks:
            raise _refusal(f"the merges of '{token}' do not follow one another, so that no score says when it is made")
        ranks.setdefault(token, len(ranks))
        found[token] = found.get(token, 0) + 1
        before = token
    for token in normal:
        splits = sum(token[:at] in normal and token[at:] in normal for at in range(1, len(token)))
        if splits != found.get(token, 0):
            raise _refusal(f"it makes '{token}' by {found.get(token, 0)} merges; by scores there would be {splits}")
    return [
        -float(ranks.get(text, len(ranks))) if kind == NORMAL else 0.0
        for text, kind in zip(texts, kinds, strict=True)
    ]  # fmt: skip


def _space_in_front(described: Mapping[str, Any]) -> bool:
    """Whether ▁ is put before a text, by a normalizer or by the pre-tokenizer; other changes of a text are refused."""
    prepends = False
    for step in [*_flat(described["normalizer"]), *_flat(described["pre_tokenizer"])]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prepends = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
                prepends = prepends or scheme != "never"
            case _:
                raise _refusal(f"llama.cpp would not change text as it does: {json.dumps(step):.200}")
    return prepends


# ── special tokens ───────────────────────────────────────────────────────────


def _specials(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of special tokens, whether a text gets them at its ends, and the chat template."""
    ids = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id,
    }  # fmt: skip
    facts: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    bare, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = [ids["bos"]] if text[:1] == [ids["bos"]] and len(text) > len(bare) else []
    behind = [ids["eos"]] if len(text) > len(before + bare) else []
    if before + bare + behind != text:
        raise _refusal(f"it puts other tokens around a text than its first and last: {text} for {bare}")
    facts["tokenizer.ggml.add_bos_token"] = bool(before)
    facts["tokenizer.ggml.add_eos_token"] = bool(behind)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return facts | ({"tokenizer.chat_template": template} if template else {})
