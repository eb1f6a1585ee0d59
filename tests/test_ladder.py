"""The ladder of upgrades on a small model: every tier takes part, and the gate decides."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.rebase import decided, ladder, rates
from benchmarks.rebase.setting import prepared

ABOUT = {"machine": "a machine", "date": "2026-01-01", "seeds": 1, "scale": 0.02}


def test_the_ladder_carries_an_adapter_by_every_tier_and_decides_by_the_gate(tmp_path: Path) -> None:
    setup = prepared(tmp_path, seeds=1, scale=0.02, named=["kinds"])
    cells = ladder.upgraded("short training", setup)
    assert {(cell.task, cell.seed) for cell in cells} == {(setup.tasks[0].name, 1)}
    assert {cell.tier for cell in cells} == {*decided.SAME_SHAPE, *decided.PEERS}
    assert not [cell.refused for cell in cells if cell.refused]
    told = [
        replace(cell, zone="pass" if cell.tier == "align" else "fail", score=4.0 if cell.tier == "retrain" else 2.0,
                bare=0.0, retrained=2.0, served=3.0, seconds=1.0, gate=1.0)
        for cell in cells
    ]  # fmt: skip
    end = decided.ended(decided.by_gate, told)
    assert (end.tier, end.recovery, end.regret, end.share, end.gated) == ("align", 1.0, 1.0, 2.0, 2.0)
    assert end.regressed
    assert decided.ended(decided.copied, told).tier == "carry"
    assert decided.ended(decided.WAYS["freeze"], told).recovery == 0.0
    elsewhere = [replace(cell, refused="another shape") if cell.tier == "carry" else cell for cell in told]
    assert decided.ended(decided.copied, elsewhere).tier == decided.REFERENCE
    page = decided.table({"a model": {"short training": ABOUT | {"cells": [asdict(cell) for cell in told]}}})
    assert "| related | the gate, tier by tier | 1 of 1 | 1.00 (1.00) | 1.00 |" in page


def test_flips_that_may_be_too_many_keep_a_gate_shut_that_asks_for_certainty() -> None:
    cell = decided.Cell("an upgrade", "a task", 1, "carry", 0.1, zone="pass", surely=0.06)
    ways = {"unsure": cell, "sure": replace(cell, surely=0.04), "of no such thing": replace(cell, surely=None)}
    passed = {name: decided.by_sure_flips([one])[-1].zone == "pass" for name, one in ways.items()}
    assert passed == {"unsure": False, "sure": True, "of no such thing": True}
    assert decided.by_gate([cell])[-1].zone == "pass"


def test_what_each_rate_makes_of_a_start_is_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "STEPS", (2,))
    monkeypatch.setattr(rates, "TEACHERS", {"likeliest": 0.0})
    setup = prepared(tmp_path, seeds=1, scale=0.02, named=["kinds"])
    many = (len(rates.SHARES) + 1, len(rates.TAUGHT))
    for found, columns in zip(rates.rows(setup, "short training"), many, strict=True):
        [(upgrade, task, *scores)] = found
        assert (upgrade, task) == ("short training", setup.tasks[0].name)
        assert len(scores) == 1 + columns
        assert all(0 <= float(score) <= 100 for score in scores)
