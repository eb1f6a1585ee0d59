import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from registry.core.errors import BadFile, BadHeader, BadTensor, LfsPointer, LoractlError, PickleRefused
from registry.core.manifest import MAX_VALUES
from registry.core.safetensors import DTYPE_BITS, Header, TensorInfo, header_bytes, parse_header

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(table: Any, data: int = 0) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def parsed(table: Any, data: int = 0) -> Header:
    content = file_of(table, data)
    return parse_header(content, len(content), "x.safetensors")


@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20).filter(lambda n: n.isascii()),
        st.tuples(
            st.sampled_from([np.float32, np.float16, np.int64, np.uint8]), st.lists(st.integers(1, 4), max_size=3)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_the_library_writes_is_read_back(tensors: dict[str, tuple[Any, list[int]]]) -> None:
    arrays = {f"t{name.replace('.', '')}": np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()}
    arrays = {name: array for name, array in arrays.items() if not set(name) & set("/\\")} or {"a": np.zeros(1)}
    content = save(arrays, {"k": "v"})
    header = parse_header(content, len(content), "x")
    assert {t.name: t.shape for t in header} == {name: array.shape for name, array in arrays.items()}
    assert {t.name: t.size for t in header} == {name: array.nbytes for name, array in arrays.items()}
    assert header.metadata == {"k": "v"}


def test_offsets_are_absolute() -> None:
    content = file_of({"a": A}, 16)
    assert parsed({"a": A}, 16).tensors == (TensorInfo("a", "F32", (2, 2), len(content) - 16, len(content)),)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_a_refusal(content: bytes) -> None:
    with pytest.raises(LoractlError):
        parse_header(content, len(content), "x")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_header_does_more_than_a_refusal(text: bytes, size: int) -> None:
    content = len(text).to_bytes(8, "little") + b"{" + text[1:]
    with pytest.raises(BadFile):
        parse_header(content, size, "x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_no_json_in_a_header_does_more_than_a_refusal(entry: Any) -> None:
    with pytest.raises(BadFile):
        parsed({"a": entry}, 8)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(cut: int) -> None:
    content = file_of({"a": A}, 16)[:cut]
    with pytest.raises(BadHeader, match=r"truncated|cannot hold"):
        parse_header(content, len(content), "x")


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(BadHeader, match="bytes after the last tensor"):
        parsed({"a": A}, 17)


@pytest.mark.parametrize(
    ("offsets", "word"), [([8, 24], "overlaps"), ([0, 16], "overlaps"), ([20, 36], "leaves a hole")]
)
def test_overlaps_and_holes_are_refused(offsets: list[int], word: str) -> None:
    with pytest.raises(BadTensor, match=word):
        parsed({"a": A, "b": A | {"data_offsets": offsets}}, 40)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "F31"}, "unknown dtype"),
        ({"dtype": 3}, "unknown dtype"),
        ({"shape": [2, -2]}, "none negative"),
        ({"shape": [True, 4]}, "whole numbers"),
        ({"shape": "22"}, "whole numbers"),
        ({"shape": [1] * 9}, "at most 8"),
        ({"shape": [0, 4], "data_offsets": [0, 0]}, "empty"),
        ({"shape": [1 << 40, 1 << 40]}, "at most"),
        ({"shape": [2, 3]}, "24 bytes, but its offsets hold 16"),
        ({"data_offsets": [16, 0]}, "offsets hold -16"),
        ({"data_offsets": [0]}, "two whole numbers"),
        ({"extra": 1}, "exactly"),
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}, "do not end at a byte"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(BadTensor, match=word) as refusal:
        parsed({"a": A | change}, 16)
    assert refusal.value.tensor == "a"


@pytest.mark.parametrize(
    "name", ["../../x", "a/../b", "..", "/etc/x", "\\x", "a\nb", "a\x00b", "", "\ud800", "x" * 1025]
)
def test_names_that_could_mean_a_path_or_hide_are_refused(name: str) -> None:
    with pytest.raises(BadTensor):
        parsed({name: A}, 16)


def test_dots_that_are_no_path_are_a_name() -> None:
    assert parsed({"model..x/a..b": A}, 16).tensors[0].name == "model..x/a..b"


def test_a_key_twice_is_refused() -> None:
    entry = json.dumps(A)
    with pytest.raises(BadHeader, match="occurs twice"):
        parsed(f'{{"a": {entry}, "a": {entry}}}'.encode(), 16)


def test_a_key_twice_at_the_end_of_a_long_header_is_found_in_one_pass() -> None:
    entries = ",".join(f'"k{number}":0' for number in range(300_000))
    with pytest.raises(BadHeader, match="'z' occurs twice"):
        parsed(f'{{{entries},"z":0,"z":1}}'.encode())


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(BadHeader, match="not JSON"):
        parsed(b'{"a":' * 100_000)


def test_an_oversize_header_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadHeader, match="at most 100000000"):
        header_bytes((1 << 40).to_bytes(8, "little") + b"{", 1 << 41, "x")


def test_no_tensors_are_refused() -> None:
    with pytest.raises(BadHeader, match="no tensors"):
        parsed({"__metadata__": {"a": "b"}})


def test_a_header_of_more_values_than_tensors_have_is_refused_before_it_is_read() -> None:
    text = b'{"a":[' + b"[]," * (MAX_VALUES // 2 + 1) + b"[]]}"
    tracemalloc.start()
    with pytest.raises(BadHeader, match="values"):
        parsed(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(text)  # read, they would be 170 bytes each


@pytest.mark.parametrize("metadata", [{"a": 1}, [], "x", {"a": "\0"}, {"loractl.note": "\ud800"}])
def test_metadata_must_be_texts(metadata: Any) -> None:
    with pytest.raises(BadHeader, match="__metadata__"):
        parsed({"__metadata__": metadata, "a": A}, 16)


def test_a_git_lfs_pointer_is_recognised() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    with pytest.raises(LfsPointer, match="not the file it stands for"):
        parse_header(pointer, len(pointer), "x.safetensors")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02\x8a\x0a", b"\x80\x04\x95"])
def test_a_pickle_under_another_name_is_recognised(start: bytes) -> None:
    with pytest.raises(PickleRefused, match="runs its author's code"):
        parse_header(start + bytes(100), 100 + len(start), "x.safetensors")


def test_a_header_whose_length_looks_like_a_pickle_is_read() -> None:
    text = json.dumps({"a": A}).encode().ljust(0x0280)
    assert len(parsed(text, 16).tensors) == 1


def test_gguf_is_recognised() -> None:
    with pytest.raises(BadHeader, match="GGUF"):
        parse_header(b"GGUF" + bytes(100), 104, "x")


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_its_size(dtype: str) -> None:
    size = DTYPE_BITS[dtype]
    assert parsed({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, size).tensors[0].size == size
