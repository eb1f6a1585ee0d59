import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import BadManifest, BadPath, LoractlError
from registry.core.manifest import (
    MAX_DEPTH,
    MAX_FILES,
    MAX_VALUES,
    Draft,
    Manifest,
    canonical_json,
    check_json,
    check_path,
    check_values,
    parse_listing,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "manifest.json"
SHA = "sha256:" + "0" * 64
B3 = "b3:" + "1" * 64


def entry(path: str, size: int = 1) -> dict[str, Any]:
    return {"path": path, "size": size, "digest": SHA}


def manifest(*paths: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "adapter", "files": [entry(path) for path in paths or ("a",)], "base": B3} | changes


PATHS = st.lists(st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5}\.[a-z]{2})?", fullmatch=True), min_size=1, max_size=5)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
CONFIGS = st.dictionaries(TEXTS, st.integers() | TEXTS | st.none(), max_size=4)


@given(PATHS, CONFIGS)
def test_a_manifest_written_and_read_is_itself(paths: list[str], config: dict[str, Any]) -> None:
    unique = sorted({path for path in paths if not any(other.startswith(f"{path}/") for other in paths)})
    made = Manifest.parse(manifest(*unique, config=config))
    again = Manifest.parse(made.canonical())
    assert again == made
    assert again.digest == made.digest


@given(CONFIGS)
def test_the_order_of_keys_does_not_matter(config: dict[str, Any]) -> None:
    turned = dict(reversed(config.items()))
    assert Manifest.parse(manifest(config=config)).digest == Manifest.parse(manifest(config=turned)).digest


def test_the_canonical_bytes_and_the_digest_never_change() -> None:
    found = Manifest.parse(manifest("adapter_config.json", WEIGHTS, config={"r": 8, "ü": None, "a": 0.5}))
    assert found.canonical() == GOLDEN.read_bytes()
    assert str(found.digest) == DIGEST


WEIGHTS = "adapter_model.safetensors"
DIGEST = "sha256:12387279e6ef7e06795db047b222ce43d2342382749485a5a20b9d5d1afc6f25"


def test_canonical_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", ".", "..", "a\\b", "C:x", "a\x00b", "a\nb", "a/ b",
        " a", "a ", "x" * 513, "y" * 256, "a*", "a?", 'a"', "a<b", "a|b", "é" * 300,
    ],
)  # fmt: skip
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(BadPath):
        check_path(path)
    with pytest.raises(LoractlError):
        Manifest.parse(manifest(path))


@pytest.mark.parametrize("path", ["a", "a/b.c", ".hidden", "a..b", "ü/ö", "a b"])
def test_these_are_paths(path: str) -> None:
    assert check_path(path) == path


@given(st.text(max_size=40))
def test_a_path_that_passes_stays_below_its_folder(path: str) -> None:
    try:
        check_path(path)
    except BadPath:
        return
    assert (Path("/root") / path).resolve().is_relative_to("/root")
    assert path not in ("", ".")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"files": []}, "files"),
        ({"files": [entry("b"), entry("a")]}, "sorted and occur once"),
        ({"files": [entry("a"), entry("a")]}, "sorted and occur once"),
        ({"files": [entry("A"), entry("a")]}, "upper and lower case"),
        ({"files": [entry("a"), entry("a/b")]}, "both a file and a folder"),
        ({"files": [entry("a", -1)]}, "files.0.size"),
        ({"files": [entry("a", 1 << 45)]}, "files.0.size"),
        ({"files": [entry("a") | {"digest": B3}]}, "named by sha256"),
        ({"files": [entry("a") | {"digest": "x"}]}, "not a digest"),
        ({"files": [entry(f"{n:05d}") for n in range(MAX_FILES + 1)]}, "files"),
        ({"base": None}, "needs a base"),
        ({"base": SHA}, "named by b3"),
        ({"kind": "dataset"}, "has no base"),
        ({"kind": "other"}, "kind"),
        ({"schema": "loractl/2"}, "schema"),
        ({"extra": 1}, "extra"),
        ({"lineage": {"parents": ["x"]}}, "lineage.parents.0"),
        ({"lineage": {"parents": [SHA] * 1001}}, "lineage.parents.*at most 1000"),
        ({"lineage": {"datasets": [SHA] * 1001}}, "lineage.datasets.*at most 1000"),
    ],
)
def test_a_manifest_that_cannot_be_says_why(change: dict[str, Any], word: str) -> None:
    with pytest.raises(BadManifest, match=word):
        Manifest.parse(manifest() | change)


@given(st.binary(max_size=100))
def test_no_bytes_do_more_than_a_refusal(data: bytes) -> None:
    with pytest.raises(BadManifest):
        Manifest.parse(data)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("\0", "NUL"),
        ("\ud800", "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        (float("nan"), "not JSON compliant"),
        (1e999, "not JSON compliant"),
        (nested(MAX_DEPTH), "deep"),
    ],
)
def test_what_no_database_keeps_is_in_no_config_and_no_recipe(value: Any, word: str) -> None:
    for change in ({"config": {"a": value}}, {"lineage": {"recipe": {"a": [value]}}}):
        with pytest.raises(BadManifest, match=word):
            Manifest.parse(manifest() | change)


def test_a_value_that_stands_for_billions_is_refused_before_they_are_there() -> None:
    value: Any = ["x"] * 10
    for _ in range(20):
        value = [value] * 10
    with pytest.raises(ValueError, match=f"over {MAX_VALUES} values"):
        check_json(value)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="deep"):
        check_json(circle)
    check_json({"a": nested(MAX_DEPTH - 1), "é": [1.5, None, "ü"]})
    check_values(b"[" * MAX_VALUES)
    with pytest.raises(ValueError, match=f"over {MAX_VALUES} values"):
        check_values(b"[" * MAX_VALUES + b",")


def test_an_oversize_manifest_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadManifest, match="at most"):
        Manifest.parse(b" " * ((16 << 20) + 1))


def test_a_dataset_has_no_base_and_its_size_is_the_sum() -> None:
    found = Manifest.parse(json.dumps(manifest("a", "b", kind="dataset", base=None)).encode())
    assert found.size == 2


# ── drafts ───────────────────────────────────────────────────────────────────

DRAFT = {"kind": "base", "base": B3, "files": [entry("a"), {"path": "b", "size": 2}, {"path": "c", "size": 3}]}


def test_a_listing_with_a_file_that_lacks_its_digest_is_a_draft() -> None:
    draft = parse_listing(DRAFT)
    assert isinstance(draft, Draft)
    assert [late.path for late in draft.late] == ["b", "c"]
    assert isinstance(parse_listing(manifest("a")), Manifest)
    assert Draft.parse(draft.canonical()) == draft


def test_a_sealed_draft_is_the_manifest_that_was_never_open() -> None:
    told = {path: f"sha256:{digit * 64}" for path, digit in (("b", "1"), ("c", "2"))}
    files = [entry("a"), {"path": "b", "size": 2, "digest": told["b"]}, {"path": "c", "size": 3, "digest": told["c"]}]
    sealed = Draft.parse(DRAFT).sealed(told)
    assert sealed.canonical() == Manifest.parse(DRAFT | {"files": files}).canonical()
    assert sealed.digest != Draft.parse(DRAFT).digest


@pytest.mark.parametrize("paths", [[], ["b"], ["a", "b", "c"], ["b", "d"]])
def test_a_draft_is_sealed_with_the_digests_that_it_lacks_and_no_others(paths: list[str]) -> None:
    with pytest.raises(BadManifest):
        Draft.parse(DRAFT).sealed(dict.fromkeys(paths, SHA))


@pytest.mark.parametrize("change", [{"files": [*DRAFT["files"], {"path": "../x", "size": 1}]}, {"base": None}])
def test_a_draft_keeps_the_rules_of_a_manifest(change: dict[str, Any]) -> None:
    with pytest.raises((BadManifest, BadPath)):
        parse_listing(DRAFT | change)
