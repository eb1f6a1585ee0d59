"""Checkpoints of several runs in one folder: a file a run, and an index that names the files of one moment.

The index is written last and at once, so that whoever reads it finds all runs as they were together, however the
writer ended. A run is found by what it is, not by its place, so that it can go on in other company.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .weights import read_metadata, read_tensors, write_file, write_tensors

INDEX = "checkpoint.json"


@dataclass(frozen=True, eq=False)
class State:
    """Where a run is: tensors by name, and what else there is to know, as JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]


def save(folder: Path, states: Mapping[str, State], keep: Collection[str] = ()) -> None:
    """Leave the runs' states by their identities, and those of ``keep`` as they were left before."""
    folder.mkdir(parents=True, exist_ok=True)
    before = files_of(folder)
    index = {identity: before[identity] for identity in keep if identity in before}
    for identity, state in states.items():
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{state.step}.safetensors"
        if before.get(identity) != name:
            told = {"identity": identity, "step": state.step, **state.told}
            write_tensors(folder / name, state.tensors, {"run": json.dumps(told)})
        index[identity] = name
    write_file(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    for path in folder.glob("*.safetensors"):
        if path.name not in index.values():
            path.unlink()


def gather(earlier: Sequence[Path], folder: Path) -> None:
    """Begin ``folder`` with what runs left in ``earlier`` ones, where they were in other company; the furthest of each.

    Nothing happens where there is a checkpoint already: the company is the same, and goes on to the same bytes.
    """
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for place in earlier:
        for identity, name in files_of(place).items():
            if identity not in index or _step(index[identity]) < _step(name):
                with contextlib.suppress(FileNotFoundError):  # whoever goes on there has just gone further
                    (folder / name).unlink(missing_ok=True)
                    os.link(place / name, folder / name)
                    index[identity] = name
    if index:
        write_file(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())


def _step(name: str) -> int:
    return int(name.removesuffix(".safetensors").rpartition("-")[2])


def files_of(folder: Path) -> dict[str, str]:
    """The names of the files of the newest checkpoint, by the runs' identities."""
    path = folder / INDEX
    found: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
    return {identity: name for identity, name in found.items() if (folder / name).is_file()}


def read(folder: Path, identity: str) -> State | None:
    """Where a run was left; None where it never was."""
    name = files_of(folder).get(identity)
    if name is None:
        return None
    told = json.loads(read_metadata(folder / name)["run"])
    return State(told["step"], read_tensors(folder / name), told)
