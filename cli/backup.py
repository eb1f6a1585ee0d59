"""Commands of an operator, on a machine of the registry: backup and restore. They start `registry.backup`."""

import json
import os
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from registry.core.errors import ChildFailed, LoractlError, ToolMissing

from .output import Command, Output, command, fields, size
from .up import server_environment

_DIR = click.option("--dir", "house", default="loractl-data", show_default=True, metavar="DIR",
                    type=click.Path(file_okay=False, path_type=Path),
                    help="The folder of loractl up; ignored where LORACTL_DATABASE_URL is set.")  # fmt: skip
_FOLDER = click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))


@command(None, "loractl backup /backups/registry", "loractl backup /backups/registry --dir loractl-data --json")
@_FOLDER
@_DIR
def backup(out: Output, folder: Path, house: Path) -> None:
    """Copy database and blobs to one consistent point, while the registry runs; what DIR holds is not copied again.

    Run it where the registry's settings are: on its machine, or with its LORACTL_* variables set.
    """
    made = _run(out, house, "backup", str(folder))
    out.emit(made, lambda: _told("backed up", made))
    if made["lost"]:
        raise click.exceptions.Exit(1)


@command(None, "loractl restore /backups/registry --dir loractl-new")
@_FOLDER
@_DIR
@click.option("--snapshot", metavar="NAME", help="Which one; default: the newest.")
def restore(out: Output, folder: Path, house: Path, snapshot: str | None) -> None:
    """Bring a backup into an empty installation, every blob verified; start the registry after it."""
    made = _run(out, house, "restore", str(folder), *([snapshot] if snapshot else []))
    out.emit(made, lambda: _told("restored", made))


def _told(what: str, made: dict[str, Any]) -> None:
    fields({
        what: made["name"],
        "rows": str(sum(made["rows"].values())),
        "blobs": f"{made['blobs']}, {size(made['bytes'])}",
        "copied": size(made["copied"]) if what == "backed up" else None,
        "lost": "\n".join(made["lost"]) or "none",
    })  # fmt: skip


def _run(out: Output, house: Path, *line: str) -> dict[str, Any]:
    if find_spec("sqlmodel") is None:
        raise ToolMissing(what=f"loractl {line[0]}", extra="server")
    environment = dict(os.environ)
    if "LORACTL_DATABASE_URL" not in environment:
        environment = server_environment(house.absolute(), make=line[0] == "restore")
    words = [sys.executable, "-m", "registry.backup", *line]
    last: dict[str, Any] = {}
    tail: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as child, out.progress() as bar:
        assert child.stdout is not None
        for text in child.stdout:
            try:
                last = json.loads(text)
            except ValueError:
                tail.append(text.strip())
                continue
            if "done" in last:
                bar(last["what"], last["done"], last["total"])
    if "error" in last:
        raise LoractlError.from_problem(last["error"])
    if "result" not in last:
        raise ChildFailed(name=line[0], how=f"ended with status {child.returncode}", tail=" ".join(tail), log="above")
    result: dict[str, Any] = last["result"]
    return result


COMMANDS: dict[str, Command] = {"backup": backup, "restore": restore}
