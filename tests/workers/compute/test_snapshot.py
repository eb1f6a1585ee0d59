"""Copies of a folder of checkpoints are of one moment, whoever writes meanwhile, and gathering keeps the furthest."""

import threading
from pathlib import Path

import pytest
import torch

from workers.compute import checkpoint, snapshot
from workers.compute.checkpoint import State
from workers.compute.weights import read_tensors


def left(folder: Path, step: int, *runs: str) -> None:
    """What runs leave at a step."""
    states = {run: State(step, {"x": torch.full((2,), float(step))}, {}) for run in runs}
    checkpoint.save(folder, states)


def read(folder: Path, *runs: str) -> list[int]:
    found = [checkpoint.read(folder, run) for run in runs]
    return [state.step if state is not None else 0 for state in found]


def test_a_copy_holds_all_runs_as_they_were_together_while_somebody_writes_on(tmp_path: Path) -> None:
    folder, copy = tmp_path / "checkpoint", tmp_path / "copy"
    left(folder, 1, "a", "b")
    over = threading.Event()

    def write() -> None:
        step = 1
        while not over.is_set():
            left(folder, step := step + 1, "a", "b")
            over.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[list[int]] = []
        while len(seen) < 20:
            try:
                snapshot.take(folder, {copy: snapshot.every})
            except FileNotFoundError:  # as it says, when it is written too fast
                continue
            seen.append(read(copy, "a", "b"))
    finally:
        over.set()
        writer.join()
    assert all(a == b > 0 for a, b in seen)
    assert seen[-1][0] > seen[0][0]


def test_each_copy_has_the_runs_that_are_meant(tmp_path: Path) -> None:
    left(tmp_path / "company", 7, "a 1", "a 2", "b")
    copies = {tmp_path / "a": lambda run: run.startswith("a"), tmp_path / "b": lambda run: run == "b"}
    snapshot.take(tmp_path / "company", copies)
    assert read(tmp_path / "a", "a 1", "a 2", "b") == [7, 7, 0]
    assert read(tmp_path / "b", "a 1", "a 2", "b") == [0, 0, 7]
    assert [snapshot.steps(tmp_path / name) for name in ("a", "b", "company")] == [14, 7, 21]
    assert snapshot.steps(tmp_path / "company", lambda run: run == "b") == 7


def test_phases_are_copied_with_what_they_noted_and_nothing_half_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    left(folder / "first", 3, "a")
    left(folder / "second", 2, "b")
    (folder / "first" / "scored.json").write_text("[]")
    (folder / "first" / "records-a.jsonl").write_text("")
    for name in ("second/scored.json.partial", "second/x-9.safetensors", "second/y-1.safetensors.partial"):
        (folder / name).write_text("half")
    snapshot.take(folder, {tmp_path / "copy": snapshot.every})
    names = sorted(path.name for path in (tmp_path / "copy").rglob("*") if path.is_file())
    assert names == sorted([
        "checkpoint.json", "checkpoint.json", "records-a.jsonl", "scored.json",
        *(path.name for path in folder.glob("*/????????????????-?.safetensors")),
    ])  # fmt: skip
    assert snapshot.steps(tmp_path / "copy") == 5


def test_a_large_run_is_in_several_files_and_read_copied_and_replaced_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST", 16)
    folder, copy = tmp_path / "checkpoint", tmp_path / "copy"
    tensors = {name: torch.full((size,), float(size)) for name, size in {"a": 3, "b": 1, "c": 9, "d": 2}.items()}
    for step in (1, 12):
        checkpoint.save(folder, {"run": State(step, tensors, {"losses": [1.0]})})
        assert sorted(len(read_tensors(path)) for path in folder.glob("*.safetensors")) == [1, 1, 2]
    snapshot.take(folder, {copy: snapshot.every})
    snapshot.gather([copy], tmp_path / "gathered")
    for place in (folder, copy, tmp_path / "gathered"):
        state = checkpoint.read(place, "run")
        assert state is not None
        assert (state.step, state.told["losses"], snapshot.steps(place)) == (12, [1.0], 12)
        assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())
    next(copy.glob("*.1.safetensors")).unlink()
    assert checkpoint.read(copy, "run") is None


def test_a_folder_without_checkpoints_is_at_step_0(tmp_path: Path) -> None:
    assert snapshot.steps(tmp_path / "nothing") == 0


@pytest.mark.parametrize("own", [0, 2, 9])
def test_the_furthest_of_each_run_is_gathered(tmp_path: Path, own: int) -> None:
    left(tmp_path / "alone", 5, "a")
    left(tmp_path / "company", 3, "a", "b")
    if own:
        left(tmp_path / "here", own, "a")
    for _ in range(2):  # again changes nothing
        snapshot.gather([tmp_path / "alone", tmp_path / "company"], tmp_path / "here")
        assert read(tmp_path / "here", "a", "b") == [max(5, own), 3]
    assert read(tmp_path / "alone", "a") == [5]


def test_a_lesson_that_was_written_is_gathered_whole_and_none_that_is_there_is_touched(tmp_path: Path) -> None:
    for place in ("first", "second"):
        for lesson in ("a", "b"):
            folder = tmp_path / place / "lessons" / lesson
            folder.mkdir(parents=True)
            for name in ("lesson.jsonl", "lesson.safetensors"):
                (folder / name).write_text(f"{place} {lesson}")
        left(tmp_path / place, 3, "a")
        left(tmp_path / place / "phase", 5, "a")
    here = tmp_path / "here" / "lessons" / "b"
    here.mkdir(parents=True)
    (here / "lesson.jsonl").write_text("half of mine")
    snapshot.gather([tmp_path / "first", tmp_path / "second"], tmp_path / "here")
    assert {path.relative_to(tmp_path / "here").as_posix(): path.read_text()
            for path in (tmp_path / "here").rglob("lesson.*")} == {
        "lessons/a/lesson.jsonl": "first a", "lessons/a/lesson.safetensors": "first a",
        "lessons/b/lesson.jsonl": "half of mine",
    }  # fmt: skip
    assert not (tmp_path / "here" / "phase" / snapshot.INDEX).exists()
