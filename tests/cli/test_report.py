"""The report of an upgrade: what is quoted, and the files that it is written to."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cli.report import quotes, write
from cli.upgrades import report_text
from registry.core.errors import ToolMissing
from registry.schemas import CampaignInfo

AT = datetime(2026, 1, 1, tzinfo=UTC)
QUOTED: dict[str, Any] = {
    "suite": "team/suite", "metric": "accuracy", "n": 200, "before": 0.9, "after": 0.88, "bare": 0.4,
    "lower": -0.05, "upper": 0.01,
}  # fmt: skip
COST = {"tiers": {"carry": {"steps": 0, "seconds": 3.0}}, "seconds": 3.0, "steps": 0}


def item(name: str, state: str, report: list[dict[str, Any]], seconds: float | None) -> dict[str, Any]:
    return {
        "adapter": name, "alias": "prod", "serving": "v1", "state": state, "tier": "carry", "fit": "same-shape",
        "final": None, "reason": "because", "plan": {"signals": {"drift": 0.05}}, "scores": {}, "verdicts": {},
        "cost": COST | {"retrain_seconds": seconds, "retrain_steps": 40}, "report": report,
    }  # fmt: skip


def campaign(*items: dict[str, Any]) -> CampaignInfo:
    digest = "b3:" + "1" * 64
    return CampaignInfo.model_validate({
        "id": "c1", "line": "llama", "old": digest, "new": digest, "old_ref": "llama@r1", "new_ref": "llama@r2",
        "state": "finished", "reason": "", "parallel": None, "budget_seconds": None, "spent_seconds": 9.0,
        "deadline": None, "items": items, "created_by": "admin", "created_at": AT, "started_at": AT, "finished_at": AT,
    })  # fmt: skip


PROMOTED = campaign(item("team/bot", "promoted", [QUOTED], 60.0), item("team/other", "frozen", [], None))


def test_what_is_quoted_is_in_points_and_says_how_much_of_the_gain_is_left() -> None:
    [found] = quotes(PROMOTED)
    assert (found.before, found.after, found.lower) == pytest.approx((90, 88, -5))
    assert found.kept == pytest.approx(0.96)
    assert "| team/bot | team/suite | accuracy | 200 | 40 | 90 | 88 | -2 (-5 to +1) | 96 % |" in report_text(PROMOTED)


def test_an_upgrade_that_promoted_nothing_quotes_nothing() -> None:
    assert "report split" not in report_text(campaign(item("team/other", "frozen", [], None)))


def test_a_gain_that_was_none_cannot_be_kept() -> None:
    [found] = quotes(campaign(item("team/bot", "promoted", [QUOTED | {"bare": 0.95}], None)))
    assert found.kept is None


def test_a_report_is_a_folder_with_its_facts_and_plots(tmp_path: Path) -> None:
    written = write(PROMOTED, report_text(PROMOTED), tmp_path / "report")
    plots = ["costs", "drift", "scores-accuracy"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(
        ["report.json", "report.md", *(f"{name}.{form}" for name in plots for form in ("svg", "png"))]
    )
    assert sorted(written) == sorted((tmp_path / "report").iterdir())
    assert CampaignInfo.model_validate(json.loads((tmp_path / "report" / "report.json").read_text())) == PROMOTED
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"]({name}.svg)" in text for name in plots)
    assert "accuracy before, points" in (tmp_path / "report" / "scores-accuracy.svg").read_text()
    assert (tmp_path / "report" / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(PROMOTED, "text", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_without_matplotlib_the_text_is_written_and_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ToolMissing, match="the extra 'plots'"):
        write(PROMOTED, "text", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
