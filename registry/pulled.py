"""What pulls wrote into a folder: the next one replaces that and nothing of yours, and the folder knows its base.

``DIR/.loractl/pulled.json`` has the digests of every path that a pull gave, those that are on their way too: it is
written before a file gets its name, and again when all have theirs, with the base of the version and the one that it
was pulled for.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import files
from .core.errors import LocalFailure, PathUnusable
from .core.signatures import BESIDE
from .schemas import Download

RECORD = "pulled.json"
Record = dict[str, list[str]]
"""path -> digests"""


def require_ours(folder: Path, wanted: Iterable[Download]) -> None:
    """`PathUnusable` names a file that would be replaced although no pull wrote it, or somebody changed it since."""
    record = _files(folder)
    for file in wanted:
        there = folder / file.path
        if there.is_file():
            actual = str(files.sha256_file(there))
            if actual != file.digest and actual not in record.get(file.path, ()):
                reason = "no pull wrote it as it is, and it would be lost; name another folder (--out), or say --force"
                raise PathUnusable(path=str(there), reason=reason)


def begin(folder: Path, wanted: Iterable[Download]) -> None:
    """Write down what is going to be written, beside what was before."""
    record = _files(folder)
    for file in wanted:
        record[file.path] = sorted({*record.get(file.path, ()), file.digest})
    _write(folder, {"files": record})


def end(folder: Path, wanted: Iterable[Download], bases: Iterable[str]) -> None:
    """Write down what lies there now, and the digests of the bases that it was given for."""
    record = {**_files(folder), **{file.path: [file.digest] for file in wanted}}
    _write(folder, {"files": record, "bases": sorted(set(bases))})


def bases_of(folder: Path) -> list[str]:
    """Digests of the bases that a folder's version was given for, while its weights lie there as they came."""
    record, found = _files(folder), _read(folder).get("bases")
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    ours = all(str(files.sha256_file(path)) in record.get(path.name, ()) for path in weights)
    return list(map(str, found)) if ours and isinstance(found, list) else []


def _files(folder: Path) -> Record:
    found = _read(folder).get("files")
    return {str(path): list(map(str, digests)) for path, digests in found.items()} if isinstance(found, dict) else {}


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / BESIDE / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / BESIDE / RECORD
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            file.write(json.dumps(record, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise LocalFailure.of(error, path) from error
