"""Checkpoints of several runs in one folder: files for each, and an index that names the files of one moment.

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

from .snapshot import files_of, names_of, write_index
from .weights import read_metadata, read_tensors, write_tensors

LARGEST = 4 << 30
"""Bytes of tensors in a file, where there is more than one tensor: a store takes 5 GB at once."""


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
        parts = _parts(state.tensors)
        names = names_of(hashlib.sha256(identity.encode()).hexdigest()[:16], state.step, len(parts))
        if before.get(identity) != names:
            told = {"run": json.dumps({"identity": identity, "step": state.step, **state.told})}
            for name, tensors in zip(names, parts, strict=True):
                write_tensors(folder / name, tensors, told)
        index[identity] = names
    write_index(folder, index)
    for path in set(folder.glob("*.safetensors")) - {folder / name for names in index.values() for name in names}:
        path.unlink()


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in the order of their names, in as many files as keep each small enough to be sent."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        size += tensor.nbytes
        if size > LARGEST and parts[-1]:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    return parts


def read(folder: Path, identity: str) -> State | None:
    """Where a run was left; None where it never was."""
    names = files_of(folder).get(identity)
    if names is None:
        return None
    told = json.loads(read_metadata(folder / names[0])["run"])
    tensors = {key: tensor for name in names for key, tensor in read_tensors(folder / name).items()}
    return State(told["step"], tensors, told)
