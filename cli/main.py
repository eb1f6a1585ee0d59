"""``loractl``: the group of all commands, the error boundary, and the exit codes.

    0 done · 1 refused by the registry, or failed here · 2 wrong usage · 3 not reachable · 4 gate not passed
    130 interrupted

A refusal is printed on stderr as its message and the command that helps; with ``--json`` the document on
stdout is ``{"error": {code, detail, hint, facts}}``. Commands live in the module named here and are
imported when they are used, so that ``loractl --help`` is quick.
"""

import errno
import importlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from registry import traces
from registry.core import errors

EXIT: dict[type[BaseException], int] = {
    errors.LoractlError: 1,
    errors.Usage: 2,
    errors.Unavailable: 3,
    errors.GateNotPassed: 4,
}
INTERRUPTED = 130

COMMANDS = {
    "up": "up",
    "login": "admin", "whoami": "admin", "doctor": "admin", "token": "admin", "completion": "admin",
    "base": "bases",
    "push": "adapters", "pull": "adapters", "list": "adapters", "show": "adapters", "log": "adapters",
    "diff": "adapters", "alias": "adapters", "promote": "adapters", "rollback": "adapters", "policy": "adapters",
    "yank": "standing", "quarantine": "standing", "reinstate": "standing", "delete": "standing",
    "sign": "keys", "verify": "keys", "key": "keys",
    "dataset": "data", "suite": "data", "train": "work", "evaluate": "work", "merge": "work", "rebase": "work",
    "combine": "updates", "compress": "updates", "extract": "updates",
    "export": "export",
    "jobs": "jobs",
    "upgrade": "upgrades", "schedule": "upgrades",
    "webhook": "webhooks", "audit": "audit", "quota": "upkeep", "fsck": "upkeep",
    "backup": "backup", "restore": "backup",
}  # fmt: skip
"""Command -> the module of `cli` that has it under ``COMMANDS``; in the order of the help."""


class Lazy(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the contract."""
        _ = ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, from its module."""
        _ = ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cli.{COMMANDS[cmd_name]}")
        found: click.Command = module.COMMANDS[cmd_name]
        return found


@click.command(cls=Lazy, context_settings={"max_content_width": 100})
@click.version_option(package_name="loractl", message="loractl %(version)s")
def cli() -> None:
    """A registry that knows which weights every LoRA adapter belongs to.

    \b
    Start one here:     loractl up
    or log in to one:   loractl login URL --token TOKEN
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run, and leave with the exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # rather a question mark than no table
    command = next((word for word in arguments if word in COMMANDS), "")
    try:
        with traced(f"loractl {command}".strip()):
            status = cli.main(arguments, prog_name="loractl", standalone_mode=False)
        sys.stdout.flush()
    except errors.LoractlError as error:
        _report(error, error.problem(), error.message, error.hint, as_json, debug)
        return exit_code(error)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"See: {context.command_path} --help" if context else ""
        _report(error, _problem("usage", error.format_message(), hint), error.format_message(), hint, as_json, debug)
        return 2
    except (KeyboardInterrupt, click.Abort) as error:
        _report(error, _problem("interrupted", "Interrupted.", ""), "Interrupted.", "", as_json, debug)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: the flush at exit must not fail
        return 1
    except Exception as error:  # noqa: BLE001  # the boundary: people see a sentence, --debug shows the rest
        if isinstance(error, OSError) and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what did not go out goes nowhere
        if (refused := _known(error)) is not None:
            _report(error, refused.problem(), refused.message, refused.hint, as_json, debug)
            return exit_code(refused)
        detail = f"Failed in a way that loractl does not know: {type(error).__name__}: {error}"
        hint = "Repeat with --debug to see where, and report it."
        _report(error, _problem("internal-error", detail, hint), detail, hint, as_json, debug)
        return 1
    return status if isinstance(status, int) else 0  # what a command left with by click's Exit


def _known(error: Exception) -> errors.LoractlError | None:
    """The refusal that a failure is: what this machine's files refuse, and a request found wrong before it was sent.

    pydantic is not imported for this.
    """
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return errors.LocalFailure.of(error, error.filename or "what it prints")
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(error, pydantic.ValidationError):
        return None
    return errors.BadRequest.of(error.errors())


@contextmanager
def traced(name: str) -> Iterator[None]:
    """The command as the first span of a trace, where the environment says that traces go somewhere.

    Not `loractl up`, whose children have traces of their own. A collector that is away is nothing that people typed.
    """
    if name != "loractl up" and traces.configure(os.environ, "cli"):
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    span = traces.begin(name)
    try:
        with traces.within(span):
            yield
    finally:
        traces.end(span, "failed" if sys.exception() else "done")


def exit_code(error: errors.LoractlError) -> int:
    """The code of the nearest class in the table."""
    return next(EXIT[cls] for cls in type(error).__mro__ if cls in EXIT)


def _problem(code: str, detail: str, hint: str) -> dict[str, Any]:
    return {"code": code, "detail": detail, "hint": hint, "facts": {}}


def _report(
    error: BaseException, problem: dict[str, Any], message: str, hint: str, as_json: bool, debug: bool
) -> None:
    if debug:
        traceback.print_exception(error)
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {message}", err=True)
    if hint:
        click.echo(f"{click.style('Help:', bold=True)}  {hint}", err=True)
    if as_json:
        click.echo(json.dumps({"error": problem}, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
