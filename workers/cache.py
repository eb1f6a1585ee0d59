"""What jobs need, on this worker's disk: bases, adapters and datasets by manifest digest, within a quota.

An entry is filled once, verified byte by byte (`registry.transfer.fetch`), and locked while a job uses it;
what was used longest ago goes first when the quota is passed. Several workers may share a folder.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from registry.core.digest import Digest
from registry.core.errors import LocalFailure
from registry.schemas import Download
from registry.transfer import Progress, fetch, silent

_COMPLETE = ".complete"
"""Ending of the mark beside an entry: within it are the files of a version, whatever their names are."""


class Cache:
    """A folder of entries named by digest."""

    def __init__(self, root: Path, quota: int) -> None:
        """``quota`` in bytes; entries in use may exceed it."""
        self.root, self.quota = root, quota
        self.root.mkdir(parents=True, exist_ok=True)

    def holds(self, limit: int = 1000) -> list[str]:
        """Manifest digests of complete entries, the last used first."""
        ages = [(_age(path.with_suffix("")), path.stem) for path in self.root.glob(f"*{_COMPLETE}")]
        return [str(Digest("sha256", name)) for _, name in sorted(ages, reverse=True)[:limit]]

    @contextmanager
    def use(
        self, manifest: str, downloads: Callable[[], Sequence[Download]], progress: Progress = silent
    ) -> Iterator[Path]:
        """The folder with the files of ``manifest``, fetched if need be, kept while the block runs."""
        folder = self.root / Digest.parse(manifest).hex
        with self._lock(folder) as lock:
            while not self._mine(folder, lock):
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _mark(folder).exists():
                    self._fill(folder, downloads, progress)
            yield folder

    def _mine(self, folder: Path, lock: IO[str]) -> bool:
        """Whether the entry is complete; then it is locked against eviction from now on."""
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not _mark(folder).exists():
            return False
        os.utime(_mark(folder))
        return True

    def _fill(self, folder: Path, downloads: Callable[[], Sequence[Download]], progress: Progress) -> None:
        wanted = downloads()
        self._make_room(sum(file.size for file in wanted))
        fetch(wanted, folder, refresh=downloads, progress=progress)
        try:
            _mark(folder).touch()
        except OSError as error:
            raise LocalFailure.of(error, folder) from error

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago, halves of broken downloads too, until ``size`` more fit."""
        entries = sorted((path for path in self.root.iterdir() if path.is_dir()), key=_age)
        sizes = {folder: _size(folder) for folder in entries}
        total = sum(sizes.values()) + size
        for folder in entries:
            if total <= self.quota:
                return
            with self._lock(folder) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # a job uses it
                _mark(folder).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # another worker may be at it
                total -= sizes[folder]

    def _lock(self, folder: Path) -> IO[str]:
        return folder.with_suffix(".lock").open("w")


def _mark(folder: Path) -> Path:
    return folder.with_suffix(_COMPLETE)


def _size(folder: Path) -> int:
    """Bytes of an entry; what goes away meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _age(folder: Path) -> float:
    """When the entry was used last; 0 for one that goes away at this moment."""
    for path in (_mark(folder), folder):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            continue
    return 0.0
