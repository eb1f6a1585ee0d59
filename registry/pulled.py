"""What pulls wrote into a folder, so that the next one replaces that and nothing of yours.

``DIR/.loractl/pulled.json`` has the digests of every path that a pull gave, those that are on their way too: it is
written before a file gets its name, and again when all have theirs.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import files
from .core.errors import LocalFailure, PathUnusable
from .core.signatures import BESIDE
from .schemas import Download

RECORD = "pulled.json"
Record = dict[str, list[str]]


def require_ours(folder: Path, wanted: Iterable[Download]) -> None:
    """`PathUnusable` names a file that would be replaced although no pull wrote it, or somebody changed it since."""
    record = _read(folder)
    for file in wanted:
        there = folder / file.path
        if there.is_file():
            actual = str(files.sha256_file(there))
            if actual != file.digest and actual not in record.get(file.path, ()):
                reason = "no pull wrote it as it is, and it would be lost; name another folder (--out), or say --force"
                raise PathUnusable(path=str(there), reason=reason)


def begin(folder: Path, wanted: Iterable[Download]) -> None:
    """Write down what is going to be written, beside what was before."""
    record = _read(folder)
    for file in wanted:
        record[file.path] = sorted({*record.get(file.path, ()), file.digest})
    _write(folder, record)


def end(folder: Path, wanted: Iterable[Download]) -> None:
    """Write down what lies there now."""
    _write(folder, {**_read(folder), **{file.path: [file.digest] for file in wanted}})


def _read(folder: Path) -> Record:
    try:
        found = json.loads((folder / BESIDE / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(path): list(map(str, digests)) for path, digests in found.items()} if isinstance(found, dict) else {}


def _write(folder: Path, record: Mapping[str, list[str]]) -> None:
    path = folder / BESIDE / RECORD
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            file.write(json.dumps(record, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise LocalFailure.of(error, path) from error
