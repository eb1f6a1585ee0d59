"""Which registry, and with which token: LORACTL_URL and LORACTL_TOKEN, else what ``loractl login`` kept.

The file is ``loractl/config.json`` in the XDG configuration folder, mode 0600, replaced atomically.
"""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.core.errors import LocalFailure, NotLoggedIn, PathUnusable

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.files import HashCache


@dataclass(frozen=True, slots=True)
class Login:
    """A registry's URL, a token, and where both were found."""

    url: str
    token: str | None = field(repr=False)
    source: str


def path(env: Mapping[str, str] = os.environ) -> Path:
    """Where the login is kept."""
    folder = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or Path.home()) / ".config")
    return Path(folder) / "loractl" / "config.json"


def load(env: Mapping[str, str] = os.environ) -> Login:
    """The login; the environment goes first. `NotLoggedIn` when there is none."""
    kept = _kept(path(env))
    url = (env.get("LORACTL_URL") or kept.get("url") or "").strip().rstrip("/")
    if not url:
        raise NotLoggedIn
    # A kept token belongs to the kept registry: it is not sent to another one.
    token = env.get("LORACTL_TOKEN") or (kept.get("token") if url == str(kept.get("url")).rstrip("/") else None)
    return Login(url, token, "LORACTL_URL" if env.get("LORACTL_URL") else str(path(env)))


def save(login: Login, env: Mapping[str, str] = os.environ) -> Path:
    """Keep the login for the next command; where."""
    target = path(env)
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(target, json.dumps({"url": login.url, "token": login.token}, indent=1) + "\n")
    except OSError as error:
        raise LocalFailure.of(error, target) from error
    return target


def write_secret(target: Path, text: str, *, anew: bool = False) -> None:
    """Replace a file by one that only its owner can read; ``anew``: FileExistsError where there is one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if anew:
            _link(aside, target)
        else:
            aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _link(aside: Path, target: Path) -> None:
    """Whole or not at all, and of two at once one; where a file has one name only, as nearly so as can be."""
    try:
        target.hardlink_to(aside)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        aside.replace(target)


def connect(env: Mapping[str, str] = os.environ) -> "RegistryClient":
    """A client of the registry that one is logged in to."""
    from registry.client import RegistryClient

    login = load(env)
    return RegistryClient(login.url, login.token)


def _kept(file: Path) -> dict[str, str]:
    try:
        kept = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PathUnusable(path=str(file), reason=f"{error}; log in again: loractl login URL --token TOKEN") from error
    return kept if isinstance(kept, dict) else {}


def hashes(env: Mapping[str, str] = os.environ) -> "HashCache":
    """Digests of local files that were hashed before."""
    from registry.files import HashCache

    folder = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".cache")
    return HashCache(Path(folder) / "loractl" / "hashes")
