"""A few seconds of bad inputs for every reader, the same each time; hours of them: `make fuzz`."""

import dataclasses
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.targets import TARGETS, Target

CORPUS = sorted(path.name for path in run.CORPUS.iterdir())


@pytest.mark.parametrize("name", CORPUS)
def test_what_was_found_once_is_answered(name: str) -> None:
    TARGETS[name.rpartition("-")[0]].outcome((run.CORPUS / name).read_bytes())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_good_input_is_taken(target: Target) -> None:
    assert "taken" in {target.outcome(data) for data in target.seeds}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_a_refusal_leaves_a_reader(name: str, tmp_path: Path) -> None:
    told = run.drawn(name, 40, 1, tmp_path)
    assert told.findings == []
    assert told.cases >= 20  # small ones are drawn once


def test_inputs_led_by_coverage_are_counted(tmp_path: Path) -> None:
    told = run.guided("digest", 2000, 1, tmp_path)
    assert told.findings == []
    assert told.cases >= 2000
    assert 0 < told.peak_mb < run.MEMORY_MB


def test_a_reader_that_falls_is_found_with_what_it_fell_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(data: bytes) -> None:
        assert b"lora_A" not in data, "over a factor"

    monkeypatch.setitem(TARGETS, "header", dataclasses.replace(TARGETS["header"], read=fall))
    [found] = run.drawn("header", 100, 1, tmp_path).findings
    assert "AssertionError: over a factor" in found
    assert b"lora_A" in Path(found.rpartition("← ")[2]).read_bytes()


def test_the_table_counts_runs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "fuzzing.md"
    page.write_text(f"before\n{run.BEGIN}\n{run.END}\nafter\n")
    monkeypatch.setattr(run, "PAGE", page)
    first = run.Told("drawn", "header", cases=1500, taken=2, peak_mb=90)
    fallen = run.Told("drawn", "digest", cases=5, findings=["x"])
    run.record([first, fallen], "2026-01-01")
    run.record([dataclasses.replace(first, cases=500, peak_mb=80)], "2026-01-02")
    assert "| drawn | header | 2,000 | 4 | 90 MB | 2026-01-02 |" in page.read_text()
    assert "digest" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("In all 2,000 cases.\n" + run.END + "\nafter\n")
