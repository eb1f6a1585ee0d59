"""What is fed: bytes that are nearly right.

Every input of every target is bytes, so that one form serves hypothesis, the coverage-guided engine and the corpus.
Noise alone is refused at the first byte; what goes deep is a good input with a few places changed, as here.
"""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from registry.core.safetensors import PREFIX_BYTES

HOSTILE_TEXTS = (
    "", " ", "\0", "\x7f", "\ud800", "\u202e", "İ", "ß", "é", "e\u0301", "\U0010ffff", "../x", "..", "/", "\\", "a//b", "con",
    "sha256:", "sha256:" + "0" * 64, "b3:" + "f" * 64, "team/bot@v0", "team/bot:prod", "v9999999999", "NaN", "1e999", "{0}",
    "{x.y}", "%s", "%00", "'; --", "<b>", "x" * 5000, "٣", "\n", "a\nb", "http://[::1", "*", "(a+)+$",
)  # fmt: skip
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), 1 << 31, 1 << 53, 1 << 63, 1 << 64,
    -(1 << 63), 10**400, [], {}, [[]], [{}], {"": {}}, ["a", 1, None], {"a": [1, {"b": None}]}, *HOSTILE_TEXTS,
)  # fmt: skip

_values = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(-(1 << 65), 1 << 65),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.recursive(
        st.sampled_from(HOSTILE),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(HOSTILE_TEXTS), inner, max_size=3),
        max_leaves=6,
    ),
)


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value, itself first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, one in inner for place in _places(one, (*here, key)))]


def _changed(value: Any, place: Sequence[Any], how: str, new: Any) -> Any:
    """``value`` with one place put right, taken out, or joined by another; where it is gone by now, as it was."""
    if not place:
        return new if how == "put" else [value, new] if how == "wrap" else value
    key, *rest = place
    if isinstance(value, dict) and key in value:
        if not rest and how == "remove":
            return {name: one for name, one in value.items() if name != key}
        if not rest and how == "rename":
            return {(str(new)[:60] if name == key else name): one for name, one in value.items()}
        if not rest and how == "add":
            return {**value, str(new)[:60]: value[key]}
        return {**value, key: _changed(value[key], rest, how, new)}
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        if not rest and how in ("remove", "rename"):
            return value[:key] + value[key + 1 :]
        if not rest and how == "add":
            return [*value, value[key]]
        return [*value[:key], _changed(value[key], rest, how, new), *value[key + 1 :]]
    return value


_HOWS = st.sampled_from(["put", "put", "put", "remove", "rename", "add", "wrap"])


def near(*examples: Any) -> SearchStrategy[Any]:
    """JSON values that are one of ``examples`` with up to four places changed."""

    def edited(example: Any) -> SearchStrategy[Any]:
        places = _places(example)
        edits = st.lists(st.tuples(st.sampled_from(places), _HOWS, _values), max_size=4)
        return edits.map(lambda some: _all(example, some))

    return st.one_of([edited(example) for example in examples])


def _all(value: Any, edits: Sequence[tuple[tuple[Any, ...], str, Any]]) -> Any:
    for place, how, new in edits:
        value = _changed(value, place, how, new)
    return value


def written(value: Any) -> bytes:
    """JSON as Python writes it when asked for nothing: NaN, infinities and lone surrogates as they come."""
    return json.dumps(value).encode()


def jsons(*examples: Any) -> SearchStrategy[bytes]:
    """JSON texts near ``examples``; some are cut, or have a byte changed."""
    return near(*examples).map(written) | spliced(*map(written, examples))


def spliced(*examples: bytes) -> SearchStrategy[bytes]:
    """Bytes that are one of ``examples`` with a piece replaced, left out, or joined by others."""

    def splice(example: bytes, at: int, length: int, new: bytes) -> bytes:
        at %= len(example) + 1
        return example[:at] + new + example[at + length :]

    pieces = st.one_of(
        st.binary(max_size=6), st.sampled_from([_utf8(text) for text in HOSTILE_TEXTS]), st.sampled_from(examples)
    )
    return st.builds(splice, st.sampled_from(examples), st.integers(0, 1 << 14), st.integers(0, 8), pieces)


def texts(*examples: str) -> SearchStrategy[bytes]:
    """Texts near ``examples``, and any others."""
    anything = st.text(st.characters(exclude_categories=()), max_size=80).map(_utf8)
    return spliced(*map(_utf8, examples)) | anything


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def said(data: bytes) -> str:
    """A text as the shell gives it to a program: bytes that are not UTF-8 become lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def safetensors(header: Any) -> bytes:
    """A file's start: the length of the header, and the header."""
    text = header if isinstance(header, bytes) else written(header)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def tables(*shapes: dict[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Headers of tensors (dtype and shape by name) that lie one behind the other; two or four bytes an element."""
    found = []
    for some in shapes:
        at, header = 0, {}
        for name, (dtype, shape) in some.items():
            size = (4 if dtype == "F32" else 2) * (shape[0] if shape else 1) * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        found.append(header)
    return found
