"""A folder of checkpoints as files: how far its runs are, and copies of one moment while somebody writes on.

    checkpoint.json             identity of a run -> the names of its files; written last and at once
    <run>-<step>.safetensors    a run as it was at that step; a large one goes on in <run>-<step>.1.safetensors …
    <phase>/…                   of a search: the same, and what the phase noted beside

Nothing here reads a tensor, so that whoever only moves checkpoints about needs no torch.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from registry.files import atomic_write

INDEX = "checkpoint.json"
_WEIGHTS = ".safetensors"
_TRIES = 5
Mine = Callable[[str], bool]
"""Whether a run, by its identity, is one of those that are meant."""


def every(_: str) -> bool:
    """All runs are meant."""
    return True


def names_of(run: str, step: int, many: int) -> list[str]:
    """The names of a run's files; ``run`` stands for its identity."""
    return [f"{run}-{step}{f'.{part}' if part else ''}{_WEIGHTS}" for part in range(many)]


def files_of(folder: Path) -> dict[str, list[str]]:
    """The names of the files of the newest checkpoint, by the runs' identities."""
    path = folder / INDEX
    found: dict[str, list[str]] = json.loads(path.read_bytes()) if path.is_file() else {}
    return {run: names for run, names in found.items() if all((folder / name).is_file() for name in names)}


def write_index(folder: Path, index: Mapping[str, Sequence[str]]) -> None:
    """Say which files are the newest checkpoint."""
    with atomic_write(folder / INDEX) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode())


def steps(folder: Path, mine: Mine = every) -> int:
    """Steps that the runs have made together, in all phases: what grows while there is progress."""
    return sum(
        _step(names)
        for path in folder.rglob(INDEX)
        for identity, names in files_of(path.parent).items() if mine(identity)
    )  # fmt: skip


def gather(earlier: Sequence[Path], folder: Path) -> None:
    """Link into ``folder`` what runs left in ``earlier`` ones, in other company or elsewhere; the furthest of each, and
    what lies beside them: lessons, which are written once."""
    folder.mkdir(parents=True, exist_ok=True)
    before = files_of(folder)
    index = dict(before)
    for place in earlier:
        for identity, names in files_of(place).items():
            if identity not in index or _step(index[identity]) < _step(names):
                with contextlib.suppress(FileNotFoundError):  # whoever goes on there has just gone further
                    for name in names:
                        (folder / name).unlink(missing_ok=True)
                        os.link(place / name, folder / name)
                    index[identity] = names
        _bring(place, folder)
    if index != before:
        write_index(folder, index)


def _bring(place: Path, folder: Path) -> None:
    """Link folders of ``place`` that are no runs' and of which nothing is there; in the order of names, in which a
    lesson's end comes last."""
    for inner in sorted(path for path in place.glob("*/**") if path.is_dir()):
        there, files = folder / inner.relative_to(place), sorted(path for path in inner.iterdir() if path.is_file())
        if (inner / INDEX).exists() or (there.exists() and any(there.iterdir())):
            continue
        there.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # whoever goes on there writes it anew
            for path in files:
                os.link(path, there / path.name)


def take(folder: Path, copies: Mapping[Path, Mine]) -> None:
    """Make each of ``copies`` the folder as it is at one moment, with the runs that are meant; by links, so at once.

    `FileNotFoundError` when it changes faster than it can be linked.
    """
    for last in range(_TRIES):
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir(parents=True)
        try:
            _take(folder, copies)
        except FileNotFoundError:  # a newer checkpoint took the place of this one
            if last == _TRIES - 1:
                raise
        else:
            return


def _take(folder: Path, copies: Mapping[Path, Mine]) -> None:
    for path in _notes_first(folder):
        where = path.parent.relative_to(folder)
        index = json.loads(path.read_bytes()) if path.name == INDEX else {}
        for copy, mine in copies.items():
            (copy / where).mkdir(parents=True, exist_ok=True)
            if path.name != INDEX:
                os.link(path, copy / where / path.name)
                continue
            kept = {identity: names for identity, names in index.items() if mine(identity)}
            for name in itertools.chain(*kept.values()):
                os.link(path.parent / name, copy / where / name)
            write_index(copy / where, kept)


def _notes_first(folder: Path) -> Iterator[Path]:
    """Files that a copy has beside those that indexes name: a note is written after what it speaks of."""
    for path in sorted(folder.rglob("*"), key=lambda path: (path.suffix != ".json", path)):
        named_by_index = path.suffix == _WEIGHTS and (path.parent / INDEX).exists()
        if path.is_file() and path.suffix != ".partial" and not named_by_index:
            yield path


def _step(names: Sequence[str]) -> int:
    return int(names[0].removesuffix(_WEIGHTS).rpartition("-")[2])
