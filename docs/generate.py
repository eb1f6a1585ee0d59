"""Write docs/cli.md from the help of every command, docs/errors.md from the classes of refusals, docs/faults.md from
what is on record in docs/faults.jsonl and docs/soaks.jsonl.

``make docs`` runs this; `tests/test_docs.py` says when the pages are older than the code.
"""

from collections.abc import Iterator
from pathlib import Path

import click

from cli.main import cli
from registry import settings
from registry.core import errors
from registry.core.errors import LoractlError, refusals
from tests.faults import record

DOCS = Path(__file__).parent
MADE = "<!-- Made by `make docs`; change the help texts or the error classes and run it again. -->\n"
CLI = """# Commands

Every command takes `--json`: one document on stdout and nothing else there.
Exit codes: 0 done · 1 refused, or failed here · 2 wrong usage · 3 not reachable · 4 gate not passed · 130 interrupted.
"""
ERRORS = """# Errors

A refusal has a code, its facts, a sentence, and where there is one the command that helps.
Over HTTP it is `application/problem+json`; the client raises it again as the same exception. Words in braces are facts.
"""
WIDTH = 100


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Path and help of a command and of all below it, in the order in which the help lists them."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if (found := command.get_command(context, name)) is not None and not found.hidden:
                with click.Context(found, info_name=name, parent=context, terminal_width=WIDTH) as inner:
                    yield from commands(found, inner)


def cli_page() -> str:
    """The page of all commands."""
    parts = [MADE, CLI]
    context = click.Context(cli, info_name="loractl", terminal_width=WIDTH)
    for path, text in commands(cli, context):
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## {path}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def branch(refusal: type[LoractlError]) -> str:
    """The kind of refusal: the nearest class above that is no refusal itself."""
    return next(above.__name__ for above in refusal.__mro__[1:] if not getattr(above, "code", ""))


def errors_page() -> str:
    """The page of all refusals."""
    parts = [MADE, ERRORS]
    ours = [refusal for refusal in refusals() if refusal.__module__ in (errors.__name__, settings.__name__)]
    for refusal in ours:
        parts.append(f"## `{refusal.code}`\n\n{branch(refusal)} · {refusal.says}\n")
        if refusal.help:
            parts.append(f"> {refusal.help}\n")
    return "\n".join(parts)


def faults_page() -> str:
    """The page of all episodes."""
    return record.page(record.lines(DOCS / "faults.jsonl"), record.lines(DOCS / "soaks.jsonl"))


PAGES = {"cli.md": cli_page, "errors.md": errors_page, "faults.md": faults_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
