"""Backup and restore as a process: ``python -m registry.backup backup DIR``, ``… restore DIR [SNAPSHOT]``.

It needs the registry's settings (database, store), as API and daemons do; ``loractl backup`` and ``restore`` start it.
Lines of JSON go to stdout: progress, and at last the result or the refusal.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from registry.core.errors import LocalFailure, LoractlError
from registry.db import migrate
from registry.parts import Parts
from registry.services import backup
from registry.settings import Settings


def tell(**line: Any) -> None:
    """One line."""
    print(json.dumps(line), flush=True)  # noqa: T201  # its output


def progress(what: str, done: int, total: int) -> None:
    """Tell how far it is."""
    tell(what=what, done=done, total=total)


def main(arguments: list[str]) -> int:
    """Do it; the exit status."""
    verb, folder, *more = arguments
    parts: Parts | None = None
    try:
        parts = Parts.of(Settings.from_environment(os.environ))
        if verb == "backup":
            result = backup.back_up(parts.database, parts.store, Path(folder), parts.clock, progress)
        else:
            migrate.upgrade(parts.database)
            name = more[0] if more else None
            result = backup.restore(
                parts.database, parts.store, Path(folder), parts.clock, name=name, progress=progress
            )
    except LoractlError as error:
        tell(error=error.problem())
        return 1
    except OSError as error:
        tell(error=LocalFailure.of(error, error.filename or folder).problem())
        return 1
    finally:
        if parts is not None:
            parts.close()
    tell(result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
