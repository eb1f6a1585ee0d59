"""Names of metrics: what is one, and which are right or wrong."""

import re

import pytest
from pydantic import TypeAdapter, ValidationError

from registry.core.metrics import NAMED, Metric, check_metric, is_binary, is_generated, is_share

OTHERS = [
    "custom:sql-runs", "custom-binary:sql.runs_2", "lm-eval:acc_norm", "lm-eval:exact_match,strict-match", "lm-eval:f1",
]


@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_a_metric_is_taken_by_its_name_alone(name: str) -> None:
    assert TypeAdapter(Metric).validate_python(name) == name
    assert re.search(TypeAdapter(Metric).json_schema()["pattern"], name)


@pytest.mark.parametrize(
    "name",
    ["", "beauty", "Likelihood", "f1 ", "custom:", "custom:Sql", "custom:-a", "custom:a/b", "custom:a\n", "lm-eval:",
     "lm-eval:acc,", "lm-eval:acc,a,b", "custom-other:a", "likelihood\n", "custom:" + "a" * 65],
)  # fmt: skip
def test_what_is_no_metric_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(ValueError, match="is no metric; allowed are likelihood, accuracy"):
        check_metric(name)
    with pytest.raises(ValidationError):
        TypeAdapter(Metric).validate_python(name)


def test_right_or_wrong_shows_in_the_name() -> None:
    assert [name for name in [*NAMED, *OTHERS] if is_binary(name)] == [
        "accuracy", "exact-match", "custom-binary:sql.runs_2", "lm-eval:acc_norm", "lm-eval:exact_match,strict-match",
    ]  # fmt: skip


def test_what_has_no_known_range_is_not_printed_in_points() -> None:
    assert [name for name in [*NAMED, *OTHERS] if not is_share(name)] == ["likelihood", "custom:sql-runs", "lm-eval:f1"]


def test_what_looks_at_an_output_needs_one() -> None:
    assert [name for name in [*NAMED, *OTHERS] if not is_generated(name)] == [
        "likelihood", "accuracy", "lm-eval:acc_norm", "lm-eval:exact_match,strict-match", "lm-eval:f1",
    ]  # fmt: skip
