"""The ladder of upgrades on a small model: every tier takes part, and the gate decides."""

from dataclasses import replace
from pathlib import Path

from benchmarks.rebase import ladder


def test_the_ladder_carries_an_adapter_by_every_tier_and_decides_by_the_gate(tmp_path: Path) -> None:
    setup = ladder.prepared(tmp_path, seeds=1, scale=0.02, most=1)
    cells = ladder.upgraded("short training", setup)
    assert {(cell.task, cell.seed) for cell in cells} == {(setup.tasks[0].name, 1)}
    assert {cell.tier for cell in cells} == {*ladder.SAME_SHAPE, ladder.REFERENCE}
    assert not [cell.refused for cell in cells if cell.refused]
    end = ladder.decided([
        replace(cell, zone="pass" if cell.tier == "align" else "fail", score=2.0, bare=0.0, retrained=2.0)
        for cell in cells
    ])  # fmt: skip
    assert (end.tier, end.recovery, end.regret) == ("align", 1.0, 0.0)
