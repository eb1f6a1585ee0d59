"""Checkpoints of several runs in one folder: a file a run, and an index that names the files of one moment.

The index is written last and at once, so that whoever reads it finds all runs as they were together, however the
writer ended. A run is found by what it is, not by its place, so that it can go on in other company
(`workers.compute.snapshot`).
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .snapshot import files_of, name_of, write_index
from .weights import read_metadata, read_tensors, write_tensors


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
        name = name_of(hashlib.sha256(identity.encode()).hexdigest()[:16], state.step)
        if before.get(identity) != name:
            told = {"identity": identity, "step": state.step, **state.told}
            write_tensors(folder / name, state.tensors, {"run": json.dumps(told)})
        index[identity] = name
    write_index(folder, index)
    for path in folder.glob("*.safetensors"):
        if path.name not in index.values():
            path.unlink()


def read(folder: Path, identity: str) -> State | None:
    """Where a run was left; None where it never was."""
    name = files_of(folder).get(identity)
    if name is None:
        return None
    told = json.loads(read_metadata(folder / name)["run"])
    return State(told["step"], read_tensors(folder / name), told)
