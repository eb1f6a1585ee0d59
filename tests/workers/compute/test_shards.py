"""Reading ahead: the disk is never far before what is needed, and never what fails."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.waiting import wait_for
from workers.compute.shards import Stored, read_ahead, stored_tensors


def steps(folder: Path, many: int) -> list[list[Stored]]:
    """A tensor a step."""
    save_file({f"t{number:02d}": torch.full((3, 5), float(number)) for number in range(many)}, folder / "x.safetensors")
    return [[tensor] for _, tensor in sorted(stored_tensors(folder).items())]


def at_work() -> bool:
    return any(thread.name == "read-ahead" for thread in threading.enumerate())


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors in the order in which they were read."""
    names: list[str] = []
    read = Stored.touch

    def touch(self: Stored, data: memoryview) -> Iterator[None]:
        yield from read(self, data)
        names.append(self.name)

    monkeypatch.setattr(Stored, "touch", touch)
    return names


def test_so_many_steps_are_read_and_the_next_one_when_one_is_done(tmp_path: Path, touched: list[str]) -> None:
    with read_ahead(steps(tmp_path, 6), 2) as done:
        for finished in range(4):
            wait_for(lambda: len(touched) == finished + 2)  # noqa: B023  # asked at once
            time.sleep(0.02)
            assert len(touched) == finished + 2
            done()
        wait_for(lambda: len(touched) == 6)
    assert touched == sorted(touched)
    assert not at_work()


def test_all_bytes_are_read_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [[tensor]] = steps(tmp_path, 1)
    read: list[tuple[int, int]] = []
    into = Stored.read_into

    def watched(self: Stored, file: int, at: int, data: memoryview) -> None:
        into(self, file, at, data)
        read.append((at, len(data)))

    monkeypatch.setattr(Stored, "read_into", watched)
    assert len(list(tensor.touch(memoryview(bytearray(16))))) == 4
    assert read == [(0, 16), (16, 16), (32, 16), (48, 12)]


def test_who_leaves_early_or_fails_leaves_no_thread_behind(tmp_path: Path, touched: list[str]) -> None:
    with read_ahead(steps(tmp_path, 9), 1):
        wait_for(lambda: bool(touched))
    with pytest.raises(ValueError, match="no"), read_ahead(steps(tmp_path, 9), 3):
        raise ValueError("no")
    assert not at_work()
    assert len(touched) < 9


def test_steps_without_tensors_hold_up_nothing(tmp_path: Path, touched: list[str]) -> None:
    [some] = steps(tmp_path, 1)
    with read_ahead([some, *([],) * 9], 2):
        wait_for(lambda: touched)
    assert not at_work()


def test_who_leaves_waits_for_no_end_of_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [[tensor]] = steps(tmp_path, 1)
    began = threading.Event()

    def touch(self: Stored, data: memoryview) -> Iterator[None]:  # as long as it is asked to
        began.set()
        while True:
            yield

    monkeypatch.setattr(Stored, "touch", touch)
    with read_ahead([[tensor]], 1):
        assert began.wait(30)
    assert not at_work()


def test_a_step_that_is_done_already_is_not_read_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, seen, go = steps(tmp_path, 4), list[str](), threading.Event()

    def touch(self: Stored, data: memoryview) -> Iterator[None]:
        go.wait(30)
        for _ in range(3):
            seen.append(self.name)
            yield

    monkeypatch.setattr(Stored, "touch", touch)
    with read_ahead(some, 4) as done:
        for _ in range(3):
            done()
        go.set()
        wait_for(lambda: seen.count("t03") == 3)
    assert seen == ["t00", "t01", "t02", "t03", "t03", "t03"]


def test_what_cannot_be_read_ahead_is_told_by_who_needs_it(tmp_path: Path, touched: list[str]) -> None:
    some = steps(tmp_path, 3)
    lost = Stored(tmp_path / "gone.safetensors", "gone", "F32", (1,), 0, 4)
    short = Stored(tmp_path / "x.safetensors", "short", "F32", (1 << 20,), 0, 4 << 20)
    with read_ahead([[lost], [short, *some[0]], some[1]], 3):
        wait_for(lambda: touched == ["t00", "t01"])
