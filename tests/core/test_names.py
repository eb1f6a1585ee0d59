import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.digest import Beginning, Digest
from registry.core.errors import BadName, BadReference
from registry.core.names import BaseReference, Reference, SeriesName, check_name

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,10}[a-z0-9])?", fullmatch=True)
SHA = st.from_regex(r"[0-9a-f]{64}", fullmatch=True).map(lambda h: Digest("sha256", h))
B3 = st.from_regex(r"[0-9a-f]{64}", fullmatch=True).map(lambda h: Digest("b3", h))
DIGITS = st.from_regex(r"[0-9a-f]{8,63}", fullmatch=True)
SERIES = st.builds(SeriesName, NAMES, NAMES)
REFERENCES = st.one_of(
    st.builds(Reference, SERIES),
    st.builds(Reference, SERIES, alias=NAMES),
    st.builds(Reference, SERIES, version=st.integers(1, 999_999_999)),
    st.builds(Reference, SERIES, digest=SHA),
    st.builds(Reference, SERIES, begins=DIGITS.map(lambda digits: Beginning("sha256", digits))),
)
BASES = st.one_of(
    st.builds(BaseReference, line=NAMES),
    st.builds(BaseReference, line=NAMES, revision=st.integers(1, 999_999_999)),
    st.builds(BaseReference, digest=B3),
    st.builds(BaseReference, begins=DIGITS.map(lambda digits: Beginning("b3", digits))),
)


@given(REFERENCES)
def test_a_reference_printed_and_parsed_is_itself(reference: Reference) -> None:
    assert Reference.parse(str(reference)) == reference


@given(BASES)
def test_a_base_reference_printed_and_parsed_is_itself(reference: BaseReference) -> None:
    assert BaseReference.parse(str(reference)) == reference


@given(SERIES)
def test_a_series_printed_and_parsed_is_itself(series: SeriesName) -> None:
    assert SeriesName.parse(str(series)) == series


@given(st.text(max_size=100))
def test_no_text_does_more_than_a_refusal(text: str) -> None:
    for parse in (Reference.parse, BaseReference.parse):
        with contextlib.suppress(BadReference):
            assert str(parse(text)) == text


@pytest.mark.parametrize("name", ["a", "0", "a-b_c.d", "a" * 64])
def test_these_are_names(name: str) -> None:
    assert check_name(name, "namespace") == name


@pytest.mark.parametrize(
    "name", ["", "A", "a" * 65, "-a", "a-", ".a", "a.", "a..b", "a/b", "a b", "é", "a\n", "..", "a:b", "a@b", "%2e%2e"]
)
def test_these_are_not_and_the_rule_is_said(name: str) -> None:
    with pytest.raises(BadName, match="1 to 64 characters"):
        check_name(name, "namespace")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("bot", "NAMESPACE/NAME"),
        ("a/b/c", "adapter name"),
        ("../b", "namespace"),
        ("team/bot:prod@v1", "an alias and a version at once"),
        ("team/bot@v0", "not a digest"),
        ("team/bot@v01", "not a digest"),
        ("team/bot@7", "not a digest"),
        ("team/bot:", "alias"),
        ("team/bot@b3:" + "0" * 64, "versions have sha256 digests"),
        ("team/bot@b3:" + "0" * 12, "versions have sha256 digests"),
        ("team/bot@sha256:0123abc", "at least the first 8"),
    ],
)
def test_a_reference_that_is_none_says_why(text: str, word: str) -> None:
    with pytest.raises(BadReference, match=word) as refusal:
        Reference.parse(text)
    assert refusal.value.hint.startswith("References look like this: team/bot")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("llama@v2", "expected @rN"),
        ("llama@", "expected @rN"),
        ("Llama", "line"),
        ("b3:12", "not a digest"),
        ("sha256:" + "0" * 64, "base digests start with b3:"),
    ],
)
def test_a_base_reference_that_is_none_says_why(text: str, word: str) -> None:
    with pytest.raises(BadReference, match=word):
        BaseReference.parse(text)
