"""Commands that take a version out of use, or back: yank, quarantine, reinstate, delete."""

import click

from registry.core.errors import BadRequest
from registry.core.names import Reference

from . import config
from .output import Command, Output, command, fields

_FORCE = click.option("--force", is_flag=True, help="Go on although something refers to it; what follows is named.")
_REASON = click.option("-m", "--message", "reason", default="", help="Why; whoever asks for it is told.")
_REF = click.argument("ref", metavar="REF")


def _move(out: Output, move: str, ref: str, reason: str, *, force: bool = False) -> None:
    from registry.schemas import StandingRequest

    name = Reference.parse(ref)
    if name.exact is None:
        raise BadRequest(problems=f"'{ref}' does not name one version; expected {name.series}@vN or a digest")
    with config.connect() as client:
        request = StandingRequest(reason=reason, force=force)
        done = client.change_standing(str(name.series), name.exact, move, request)
    out.emit(done, lambda: fields({
        "version": done.version.ref,
        "standing": done.version.status,
        "follows": "\n".join(done.follows) or "nothing else",
    }))  # fmt: skip


@command(None, 'loractl yank team/bot@v3 -m "answers in the wrong language"')
@_REF
@_REASON
@_FORCE
def yank(out: Output, ref: str, reason: str, force: bool) -> None:
    """Give a version to nobody any more who does not ask for just this one; they are warned."""
    _move(out, "yank", ref, reason, force=force)


@command(None, 'loractl quarantine team/bot@v3 -m "trained on data that must not leave"')
@_REF
@_REASON
def quarantine(out: Output, ref: str, reason: str) -> None:
    """Give the bytes of a version to nobody, at once; what points at it stays, and says why. For admins."""
    _move(out, "quarantine", ref, reason)


@command(None, "loractl reinstate team/bot@v3")
@_REF
@_REASON
def reinstate(out: Output, ref: str, reason: str) -> None:
    """Take back a yank, or, as an admin, a quarantine."""
    _move(out, "reinstate", ref, reason)


@command(None, 'loractl delete team/bot@v3 -m "a mistake"', "loractl delete team/bot@v3 --force")
@_REF
@_REASON
@_FORCE
def delete(out: Output, ref: str, reason: str, force: bool) -> None:
    """Delete a version for good. Its number stays as a tombstone and is not given again. For admins."""
    _move(out, "delete", ref, reason, force=force)


COMMANDS: dict[str, Command] = {"yank": yank, "quarantine": quarantine, "reinstate": reinstate, "delete": delete}
