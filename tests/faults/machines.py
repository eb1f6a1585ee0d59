"""What a machine can be made to lack here: room on a disk, the right time, the newest release, the others.

A disk is a tmpfs whose size can be changed; another time comes from libfaketime, an older release from the history, a
host from a network namespace. What cannot be had says why (`NotHere`).
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tests import servers

HOUSE = Path(__file__).parents[2]
ROOM = 1 << 30
"""Bytes of a disk that is not full."""
MIGRATIONS_BACK = 3
PAGE = os.sysconf("SC_PAGE_SIZE")


class NotHere(Exception):  # noqa: N818  # our exceptions say what happened
    """What this machine, or this checkout, has no means for; the message says which."""


# ── room ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Disk:
    """A file system of its own at ``path``, in memory."""

    path: Path

    def fill(self, left: int) -> None:
        """Leave room for ``left`` bytes more, or nearly so."""
        self._resize(ROOM - shutil.disk_usage(self.path).free + left)

    def empty(self) -> None:
        """There is room again."""
        self._resize(ROOM)

    def _resize(self, size: int) -> None:
        pages = max(1, -(-size // PAGE))
        _mount("-o", f"remount,size={pages * PAGE}", str(self.path))


@contextmanager
def disk(path: Path) -> Iterator[Disk]:
    """A disk at ``path`` with what was there; afterwards it is a folder again, and holds what the disk held."""
    path.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path))
    try:
        _copy(aside, path)
        shutil.rmtree(aside)
        yield Disk(path)
        _copy(path, aside)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
    path.rmdir()
    aside.rename(path)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["cp", "--archive", f"{source}/.", str(target)], check=True)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"a disk of one's own takes the right to mount: {done.stderr.strip()}")


@cache
def can_mount() -> None:
    """`NotHere` where nothing may be mounted."""
    if not shutil.which("mount"):
        raise NotHere("a disk of one's own takes the program mount")
    with tempfile.TemporaryDirectory() as folder, disk(Path(folder) / "disk"):
        pass


# ── time ─────────────────────────────────────────────────────────────────────


def another_time(seconds: float) -> dict[str, str]:
    """The environment of a process whose clock is ``seconds`` ahead; how long things take stays true."""
    found = find_spec("libfaketime")
    if found is None or found.origin is None:
        raise NotHere("another time takes libfaketime: pip install 'loractl[dev]'")
    library = Path(found.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+.1f}", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }  # fmt: skip


@cache
def can_shift_time() -> None:
    """`NotHere` where processes do not believe another time."""
    command = [sys.executable, "-c", "import time; print(time.time())"]
    told = subprocess.run(command, env=another_time(3600), check=False, capture_output=True, text=True)
    if told.returncode or float(told.stdout) < time.time() + 3000:
        raise NotHere(f"libfaketime does not work here: {told.stderr.strip() or told.stdout}")


# ── an older release ─────────────────────────────────────────────────────────


@cache
def older_release() -> Path:
    """The code as it was before the last `MIGRATIONS_BACK` migrations came; it goes with this process."""
    added = sorted((HOUSE / "migrations" / "versions").glob("0*.py"))[-MIGRATIONS_BACK]
    log = ("log", "--diff-filter=A", "--format=%H", "-1", "--", str(added.relative_to(HOUSE)))
    came = _git(*log)
    commit = _git("rev-parse", "--verify", f"{came}^") if came else ""
    if not commit:
        raise NotHere(f"an older release takes the history from before {added.name}: git fetch --unshallow")
    place = tempfile.TemporaryDirectory(prefix="loractl-older-")
    _KEPT.append(place)
    archive = Path(place.name) / "release.tar"
    _git("archive", "--format=tar", f"--output={archive}", commit, "registry", "migrations", "workers")
    subprocess.run(["tar", "-xf", archive, "-C", place.name], check=True)  # Python's own takes filters from 3.11.4 on
    return Path(place.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(HOUSE), *words], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# ── hosts of their own ───────────────────────────────────────────────────────

NETWORK = "10.77.0"
HUB = f"{NETWORK}.1"
"""Where the driver, people, database and broker are."""
APART = "LORACTL_TESTS_APART"
"""Set where mounts and network are this program's own."""


@dataclass(frozen=True)
class Host:
    """A network of its own, on a wire to the hub's switch."""

    address: str
    wire: str
    through: tuple[str, ...]
    """The beginning of a command that runs there."""

    def cut(self) -> None:
        """Packets vanish, and nobody is told."""
        _run("ip", "link", "set", self.wire, "down")

    def slow(self, kbit: int) -> None:
        """What goes there goes at so many thousand bits a second."""
        _run("tc", "qdisc", "replace", "dev", self.wire, "root", "tbf", "rate", f"{kbit}kbit",
             "burst", "16kb", "latency", "1s")  # fmt: skip

    def heal(self) -> None:
        """The wire is there, and as fast as it can be."""
        _run("ip", "link", "set", self.wire, "up")
        subprocess.run(["tc", "qdisc", "del", "dev", self.wire, "root"], check=False, capture_output=True)


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """One for each of ``names``; the hub is this process's own network, which must not be the machine's."""
    can_part()
    with ExitStack() as stack:
        _run("ip", "link", "add", "name", "switch", "type", "bridge")
        stack.callback(_run, "ip", "link", "del", "switch")
        _run("ip", "address", "add", f"{HUB}/24", "dev", "switch")
        _run("ip", "link", "set", "switch", "up")
        made = {}
        for number, name in enumerate(names, 2):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            command = ["unshare", "--net", "sleep", "infinity"]
            holder = stack.enter_context(servers.running(f"host {name}", command, folder))
            holder.wait_until(lambda at=holder.process.pid: _network(at) != _network("self"))  # type: ignore[misc]
            wire, address = f"wire{number}", f"{NETWORK}.{number}"
            through = ("nsenter", f"--net=/proc/{holder.process.pid}/ns/net", "--")
            there = str(holder.process.pid)
            _run("ip", "link", "add", "name", wire, "type", "veth", "peer", "name", "up0", "netns", there)
            _run("ip", "link", "set", wire, "master", "switch", "up")
            _run(*through, "ip", "address", "add", f"{address}/24", "dev", "up0")
            for device in ("lo", "up0"):
                _run(*through, "ip", "link", "set", device, "up")
            made[name] = Host(address, wire, through)
        yield made


def can_part() -> None:
    """`NotHere` where networks cannot be made, or where this process is in the machine's own."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "unshare", "nsenter"))):
        raise NotHere("hosts of their own take root, ip, tc, unshare and nsenter")
    if APART not in os.environ:
        raise NotHere("hosts of their own take a network apart: python -m tests.faults.run makes one")


def part() -> None:
    """Begin this program again apart: mounts and networks that it makes are seen by nobody and end with it."""
    if APART in os.environ or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return
    apart = ["unshare", "--mount", "--net"]
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode == 0:
        again = shlex.join([sys.executable, *sys.orig_argv[1:]])
        line = f"ip link set lo up && {APART}=1 exec {again}"
        os.execvp("unshare", [*apart, "sh", "-c", line])  # noqa: S606  # this process becomes that one


def _network(process: int | str) -> Path:
    return Path(f"/proc/{process}/ns/net").readlink()


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{shlex.join(words)}: {done.stderr.strip()}")
