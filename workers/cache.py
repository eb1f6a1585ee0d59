"""What jobs need, on this worker's disk: bases, adapters and datasets by manifest digest, within a quota.

An entry is filled once, verified byte by byte (`registry.transfer.fetch`), and locked while a job uses it;
what was used longest ago goes first when the quota is passed. Several workers may share a folder.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from registry.core.digest import Digest
from registry.schemas import Download
from registry.transfer import Progress, fetch, silent

_COMPLETE = ".complete"


class Cache:
    """A folder of entries named by digest."""

    def __init__(self, root: Path, quota: int) -> None:
        """``quota`` in bytes; entries in use may exceed it."""
        self.root, self.quota = root, quota
        self.root.mkdir(parents=True, exist_ok=True)

    def holds(self) -> list[str]:
        """Manifest digests of complete entries."""
        return [str(Digest("sha256", path.parent.name)) for path in self.root.glob(f"*/{_COMPLETE}")]

    @contextmanager
    def use(
        self, manifest: str, downloads: Callable[[], Sequence[Download]], progress: Progress = silent
    ) -> Iterator[Path]:
        """The folder with the files of ``manifest``, fetched if need be, kept while the block runs."""
        name = Digest.parse(manifest).hex
        folder = self.root / name
        with (self.root / f"{name}.lock").open("w") as lock:
            if not (folder / _COMPLETE).exists():
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (folder / _COMPLETE).exists():
                    wanted = downloads()
                    self._make_room(sum(file.size for file in wanted))
                    fetch(wanted, folder, refresh=downloads, progress=progress)
                    (folder / _COMPLETE).touch()
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (folder / _COMPLETE).exists():  # evicted between the two locks
                raise FileNotFoundError(folder)
            os.utime(folder / _COMPLETE)
            yield folder

    def _make_room(self, size: int) -> None:
        entries = sorted((path.stat().st_mtime, path.parent) for path in self.root.glob(f"*/{_COMPLETE}"))
        sizes = {folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for _, folder in entries}
        total = sum(sizes.values()) + size
        for _, folder in entries:
            if total <= self.quota:
                return
            with (self.root / f"{folder.name}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # a job uses it
                (folder / _COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)
                total -= sizes[folder]
