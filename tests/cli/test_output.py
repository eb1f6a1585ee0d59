"""Values as people read them."""

import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli import output
from cli.output import Output, ago, markdown, number, plain, plot, short, size, sparkline


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (250_000_000, "250 MB"), (3.2e12, "3.2 TB")]
)
def test_sizes_have_units_of_a_thousand(count: float, text: str) -> None:
    assert size(count) == text


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 40))
def test_a_sparkline_is_as_wide_as_its_values_or_as_asked(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(len(values), width)


def test_a_sparkline_falls_where_the_values_fall() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 1]) == "▁▁▁"


def test_times_are_told_from_now() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert ago(now - timedelta(seconds=5), now) == "5 s ago"
    assert ago(now + timedelta(hours=5), now) == "in 5 h"
    assert ago(now - timedelta(days=90), now) == "2025-11-02"
    assert ago(None) == ""


def test_digests_are_shortened_and_other_text_is_not() -> None:
    assert short("sha256:" + "0123456789abcdef" * 4) == "sha256:0123456789ab"
    assert short("team/bot@v1") == "team/bot@v1"
    assert short(None) == ""
    assert number(None) == ""


def test_markdown_cells_cannot_break_the_table() -> None:
    assert markdown(["a"], [["x|y\nz"], [None]]) == "| a |\n| --- |\n| x\\|y z |\n|  |"


def test_a_table_that_does_not_fit_breaks_no_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["j0123456789abcdef", "", "a long reason in words", "sha256:0123456789ab"]] * 2
    headings = ["job", "nothing", "why", "digest"]

    def drawn(width: int) -> list[str]:
        monkeypatch.setattr(output, "_console", lambda: Console(width=width, highlight=False))
        output.table(headings, rows)
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    wide = drawn(80)
    assert len(wide) == 4
    assert "nothing" not in wide[0]
    narrow = drawn(50)  # the words of the reason go under one another
    assert len(narrow) > 4
    assert all(any(whole in line for line in narrow) for whole in (rows[0][0], rows[0][3]))
    record = ["job     j0123456789abcdef", "why     a long reason in words", "digest  sha256:0123456789ab"]
    assert drawn(40) == [*record, "", *record]


def test_plain_values_are_json_whatever_is_inside() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    assert plain({"a": (1, [None, at])}) == {"a": [1, [None, "2026-01-01 00:00:00+00:00"]]}


def test_a_plot_names_its_curve_only_where_there_are_several() -> None:
    one = plot({"loss": [(1, 2.0), (2, 1.0)]}, title="training", x="step")
    assert "training" in one
    assert "step" in one
    assert "loss" not in one
    assert "\x1b" not in one
    two = plot({"first": [(1, 2.0), (2, 1.0)], "second": [(1, 1.0), (2, 2.0)]}, title="t", x="step")
    assert "first" in two
    assert "second" in two


def test_a_bar_is_drawn_after_a_second_or_where_work_takes_longer_anyway_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out = Output(as_json=False)
    with out.progress() as bar:
        bar.count("finetune", 0, 0, "queued")
    assert "queued" not in capsys.readouterr().err
    with out.progress(after=0) as bar:
        bar.count("finetune", 0, 0, "queued")
    assert "queued" in capsys.readouterr().err
