"""The benchmark of streaming on a small shape: it finds the drift that it made."""

from pathlib import Path

import pytest

from benchmarks.rebase import streaming


def test_streaming_finds_the_drift_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"HIDDEN": 64, "NEURONS": 128, "HEADS": 4, "GROUPS": 2, "VOCABULARY": 256, "RANK": 2, "_TILE": 1 << 16}
    for name, value in (small | {"_FILE": 100_000}).items():
        monkeypatch.setattr(streaming, name, value)
    found, stayed, moved = streaming.run(tmp_path, 2 / 32)
    assert found.drift == pytest.approx(streaming.DRIFT, rel=0.02)
    assert found.first == "carry"
    assert (stayed.moved, stayed.spaces, stayed.away) == (0, 11, 0.0)
    assert moved.away < 1e-5
    assert moved.moved >= 3, "the stream, and the neurons of each layer; two groups may stay in their order"
    assert "times of reading both" in streaming.table(found, stayed, moved, 2 / 32)
