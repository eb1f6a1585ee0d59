"""The keeper sends what is newest, of all jobs together; a registry in trouble, or one that refuses, stops nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from registry.core.errors import FileTooLarge, LeaseLost, LoractlError, RegistryUnreachable, RouteNotFound
from registry.schemas import CheckpointRequest, CheckpointsRequest, CheckpointUploads
from registry.transfer import silent
from workers import checkpoints
from workers.checkpoints import Keeper, Kept, restore
from workers.compute.snapshot import every, names_of, write_index

LIMIT_S = 30.0


class Registry:
    """The registry as the keeper knows it; storage holds everything already."""

    def __init__(self, *refusals: LoractlError) -> None:
        self.refusals = list(refusals)
        self.asked: list[str] = []
        self.recorded: list[Mapping[str, CheckpointRequest]] = []

    def send_checkpoint(self, job_id: str, request: CheckpointRequest) -> CheckpointUploads:
        assert request.files
        self.asked.append(job_id)
        if self.refusals and isinstance(self.refusals[0], FileTooLarge):
            raise self.refusals.pop(0)
        return CheckpointUploads(put={})

    def record_checkpoints(self, request: CheckpointsRequest) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.recorded.append(request.checkpoints)

    def steps(self) -> list[dict[str, int]]:
        return [{job: request.step for job, request in one.items()} for one in self.recorded]


def leave(folder: Path, **steps: int) -> None:
    folder.mkdir(exist_ok=True)
    for run, step in steps.items():
        (folder / names_of(run, step, 1)[0]).write_text(f"{run} {step}")
    write_index(folder, {run: names_of(run, step, 1) for run, step in steps.items()})


def kept(said: list[str], *names: str, **more: Any) -> list[Kept]:
    return [Kept(name, 1, lambda run, name=name: run == name, said.append, **more) for name in names]  # type: ignore[misc]


def keeper(registry: Any, folder: Path, jobs: list[Kept]) -> Keeper:
    """One whose thread does nothing by itself before a test is over."""
    return Keeper(registry, folder, jobs, every=LIMIT_S)


def last_word(registry: Registry, folder: Path, *names: str, said: list[str] | None = None) -> None:
    with keeper(registry, folder, kept([] if said is None else said, *names)) as it:
        leave(folder, **{name: place + 3 for place, name in enumerate(names)})
        it.last_word()


def test_jobs_that_are_together_are_recorded_together(tmp_path: Path) -> None:
    registry = Registry()
    last_word(registry, tmp_path / "company", "a", "b")
    assert registry.steps() == [{"a": 3, "b": 4}]
    assert [path.name for path in tmp_path.iterdir()] == ["company"]


def test_who_is_over_is_left_out_and_the_others_are_recorded(tmp_path: Path) -> None:
    registry = Registry(LeaseLost(id="a", attempt=1, state="queued"))
    last_word(registry, tmp_path / "company", "a", "b")
    assert registry.steps() == [{"b": 4}]


def test_too_large_a_checkpoint_stays_here_and_the_job_says_so_once(tmp_path: Path) -> None:
    said: list[str] = []
    registry = Registry(FileTooLarge(path="checkpoint of job a", size=9, limit=1))
    it = keeper(registry, tmp_path / "company", kept(said, "a", "b"))
    leave(tmp_path / "company", a=1, b=1)
    it.look()
    leave(tmp_path / "company", a=2, b=2)
    it.look()
    assert registry.asked == ["a", "b", "b"]
    assert registry.steps() == [{"b": 1}, {"b": 2}]
    assert len(said) == 1
    assert "stay on the disk of this worker" in said[0]


def test_a_registry_that_is_away_is_asked_again(tmp_path: Path) -> None:
    registry = Registry(RegistryUnreachable(url="x", reason="gone"))
    it = keeper(registry, tmp_path / "c", kept([], "a"))
    leave(tmp_path / "c", a=1)
    assert it.look()
    assert registry.steps() == []
    assert it.look()
    assert registry.steps() == [{"a": 1}]
    assert not it.look()  # nothing new


def test_what_storage_has_is_not_sent_again_and_what_ended_neither(tmp_path: Path) -> None:
    registry = Registry()
    it = keeper(registry, tmp_path / "c", kept([], "a", "b", stored=5))
    leave(tmp_path / "c", a=5, b=6)
    it.look()
    it.leave("b")
    leave(tmp_path / "c", a=6, b=7)
    it.look()
    assert registry.steps() == [{"b": 6}, {"a": 6}]


def test_a_last_word_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LAST_WORD_S", -1.0)
    registry = Registry()
    last_word(registry, tmp_path / "c", "a")
    assert registry.steps() == []


def test_a_registry_that_keeps_no_checkpoints_yet_has_none(tmp_path: Path) -> None:
    def checkpoint(job_id: str, attempt: int) -> None:
        raise RouteNotFound(method="GET", path=f"/v1/jobs/{job_id}/checkpoint?attempt={attempt}")

    registry: Any = SimpleNamespace(checkpoint=checkpoint)
    assert restore(registry, Kept("j", 2, every, print), tmp_path / "checkpoint", 3, silent) == 0


def test_every_run_of_a_job_of_its_own_is_meant(tmp_path: Path) -> None:
    registry = Registry()
    with keeper(registry, tmp_path / "c", [Kept("j", 1, every, print)]) as it:
        leave(tmp_path / "c", carry=2, scratch=3)
        it.last_word()
    assert registry.steps() == [{"j": 5}]
