"""The demo when it cannot go on; its whole story is in tests/test_end_to_end.py."""

import json
from pathlib import Path

import pytest

from docs.demo import run


def test_a_step_that_fails_ends_the_demo_with_the_logs_and_no_registry(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    ended = run.main(["--quick", "--base", str(tmp_path / "empty"), "--dir", str(tmp_path / "demo")])
    told, _ = capfd.readouterr()
    assert ended == 1
    assert "The demo failed: 'loractl base push ./base-v1" in told
    assert "daemons.log" in told
    assert not (tmp_path / "demo" / "registry" / "up.json").exists()


@pytest.mark.parametrize(
    ("spent", "said"),
    [
        ({"steps": 40, "seconds": 31.4}, "40 steps, 31 s"),
        ({"steps": 0, "seconds": 2.0}, "0 steps, 2 s"),
        ({"steps": None, "seconds": None}, ""),
    ],
)
def test_a_cost_that_is_not_known_is_left_out(spent: dict[str, float | None], said: str) -> None:
    assert run.cost(spent, "steps", "seconds") == said


def test_the_folder_is_cleared_but_for_the_base_that_was_built(tmp_path: Path) -> None:
    for name in ("base-v1", "registry", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "triage.toml").write_text(json.dumps({}))
    run.Demo(tmp_path, None, quick=True).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["base-v1"]
