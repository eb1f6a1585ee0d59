"""Metrics of generated texts, against figures worked out by hand, and custom ones from a package that is installed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.core.errors import BadConfig
from registry.core.records import parse_records, to_jsonl
from tests.workers import factories
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate
from workers.compute.metrics import bleu, chrf, comparison, f1, rouge_l
from workers.compute.panel import BARE

TEXTS = ["the cat sat on the mat", "a cat is on the mat today", "x"]


@pytest.mark.parametrize("name", ["exact-match", "f1", "bleu", "chrf", "rouge-l"])
def test_a_reference_itself_scores_one_and_nothing_scores_zero(name: str) -> None:
    compare = comparison(name)
    assert [compare(text, TEXTS) for text in TEXTS] == [1, 1, 1]
    assert compare("", TEXTS) == 0


@pytest.mark.parametrize("name", ["exact-match", "f1", "bleu", "chrf", "rouge-l"])
def test_one_reference_more_never_makes_a_score_worse(name: str) -> None:
    compare = comparison(name)
    for output in ("the cat sat on a mat", "cat", "dogs"):
        assert compare(output, TEXTS[:1]) <= compare(output, [*TEXTS[:1], output]) == 1


def test_f1_is_over_words_without_case_punctuation_and_articles() -> None:
    assert f1("The CAT, sat!", ["a cat sat"]) == 1
    assert f1("cat dog", ["cat"]) == pytest.approx(2 / 3)  # half of what is said is right, all of it is found
    assert f1("the", ["a"]) == 1
    assert f1("the", ["cat"]) == 0


def test_bleu_is_the_geometric_mean_of_precisions_with_the_brevity_penalty() -> None:
    # n-grams of "the cat sat on": 4/4, 3/3, 2/2 and 1/1 right; 4 words for 6: exp(1 − 6/4).
    assert bleu("the cat sat on", TEXTS[:1]) == pytest.approx(2.718281828 ** (1 - 6 / 4), rel=1e-6)


def test_chrf_is_the_f2_of_character_n_grams() -> None:
    # "ab" for "abc": 1-grams P = 1, R = 2/3; 2-grams P = 1, R = 1/2; no longer ones in the output.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf("ab", ["abc"]) == pytest.approx(5 * precision * recall / (4 * precision + recall), rel=1e-6)


def test_rouge_l_is_the_f_of_the_longest_common_subsequence() -> None:
    # "cat … mat" is common: 2 of 3 words said, 2 of 6.
    assert rouge_l("cat likes mat", TEXTS[:1]) == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))


# ── custom metrics ───────────────────────────────────────────────────────────

CODE = """
def short(output, references):
    return 1 / (1 + len(output))

def known(output, references):
    return output in references

def broken(output, references):
    return 0.5

def endless(output, references):
    return float("inf")
"""
ENTRY_POINTS = """
[loractl.metrics]
short = some_scores:short
endless = some_scores:endless

[loractl.metrics.binary]
known = some_scores:known
broken = some_scores:broken
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "some_scores.py").write_text(CODE)
    facts = tmp_path / "some_scores-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: some-scores\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield facts
    sys.modules.pop("some_scores", None)


def suite(*metrics: str) -> Suite:
    return Suite([Row({"prompt": "ab", "completion": "c"}, "x.jsonl", 1)], metrics, max_new_tokens=3)


def test_a_custom_metric_is_an_entry_point_of_a_package(package: Path) -> None:
    wanted = suite("custom:short", "custom-binary:known")
    record = evaluate(factories.llama(), factories.tokenizer(), wanted, {})[BARE][0]
    assert record.output is not None
    assert record.metrics == {"custom:short": 1 / (1 + len(record.output.strip())), "custom-binary:known": 0}
    assert parse_records(to_jsonl([record])) == (record,)


def test_the_version_of_the_package_is_a_part_of_the_harness(package: Path) -> None:
    before = suite("custom:short").harness("fp32")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: some-scores\nVersion: 1.3\n")
    assert suite("custom:short").harness("fp32") != before


def test_a_custom_metric_is_called_by_the_group_it_is_in(package: Path) -> None:
    with pytest.raises(BadConfig, match=r"there are: .*custom-binary:known, custom:endless, custom:short"):
        comparison("custom:known")


def test_a_custom_metric_that_breaks_its_word_is_refused(package: Path) -> None:
    with pytest.raises(BadConfig, match=r"custom-binary:broken returned 0.5; 0 or 1 is allowed"):
        comparison("custom-binary:broken")("a", ["b"])
    with pytest.raises(BadConfig, match=r"custom:endless returned inf; any finite number is allowed"):
        comparison("custom:endless")("a", ["b"])
