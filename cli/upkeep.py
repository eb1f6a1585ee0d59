"""Commands of upkeep: what namespaces hold and may hold, and whether bucket and rows agree."""

from typing import TYPE_CHECKING

import click

from . import config
from .output import Output, command, fields, short, size, table
from .parameters import bytes_of

if TYPE_CHECKING:
    from registry.schemas import FsckLine, QuotaInfo

FINDING = {"blob", "problem", "detail", "named_by", "repaired", "replica"}


@click.group("quota", short_help="What namespaces may hold: show, set.")
def quota() -> None:
    """How many bytes a namespace may hold, each blob counted once, and how long it keeps what nothing refers to."""


@command(quota, "loractl quota show team")
@click.argument("namespace", metavar="NAMESPACE")
def show(out: Output, namespace: str) -> None:
    """Show what a namespace holds and may hold."""
    with config.connect() as client:
        info = client.quota(namespace)
    out.emit(info, lambda: _quota(info))


@command(
    quota,
    "loractl quota set team --bytes 200GB",
    "loractl quota set team --bytes any --keep-days 90",
    name="set",
)
@click.argument("namespace", metavar="NAMESPACE")
@click.option("--bytes", "allowed", metavar="SIZE", help="At most so much, such as 200GB; 'any': any amount.")
@click.option("--keep-days", metavar="N", help="Delete older versions that nothing refers to; 'all': keep them.")
def set_bounds(out: Output, namespace: str, allowed: str | None, keep_days: str | None) -> None:
    """Set the bounds of a namespace; what is not named stays as it is.

    Kept whatever its age is what an alias points at, what something was made from, and the newest on each base.
    """
    from registry.schemas import QuotaRequest

    if allowed is None and keep_days is None:
        raise click.UsageError("Say what to set: --bytes SIZE, --keep-days N.")
    if keep_days not in (None, "all") and not (keep_days.isdigit() and int(keep_days)):
        raise click.UsageError(f"--keep-days {keep_days}: expected a number of days, from 1, or 'all'.")
    with config.connect() as client:
        now = client.quota(namespace)
        request = QuotaRequest(
            quota_bytes=now.quota_bytes if allowed is None else None if allowed == "any" else bytes_of(allowed),
            keep_days=now.keep_days if keep_days is None else None if keep_days == "all" else int(keep_days),
        )
        info = client.set_quota(namespace, request)
    out.emit(info, lambda: _quota(info))


def _quota(info: "QuotaInfo") -> None:
    fields({
        "namespace": info.namespace,
        "holds": size(info.used),
        "may hold": "any amount" if info.quota_bytes is None else size(info.quota_bytes),
        "keeps": "everything" if info.keep_days is None else f"unreferenced versions for {info.keep_days} days",
    })  # fmt: skip


@command(None, "loractl fsck", "loractl fsck --deep --repair", "loractl fsck --json")
@click.option("--deep", is_flag=True, help="Read every byte, instead of asking the store for sizes.")
@click.option("--repair", is_flag=True,
              help="Remove orphans; bring what is lost from the replica, or let a push bring it.")  # fmt: skip
def fsck(out: Output, deep: bool, repair: bool) -> None:
    """Compare the bucket with the database, both ways; exits with 1 when something is wrong and was not repaired.

    Finds blobs that are missing, of the wrong size, corrupt, orphaned, or unknown, and says what names them; with
    --deep also signatures that do not hold any more. A repair reads the registry's replica, where it has one
    (LORACTL_REPLICA_URL), and says what that had of each lost blob.
    """
    from registry.schemas import FsckRequest

    found, seen = [], {"rows": 0, "bucket": 0}
    with config.connect() as client, out.progress() as bar:
        for line in client.fsck(FsckRequest(deep=deep, repair=repair)):
            seen[line.what] = max(seen.get(line.what, 0), line.done)
            if line.kind == "finding":
                found.append(line)
            bar.count(line.what, line.done, line.total, f"{size(line.bytes)} of one blob" if line.bytes else "blobs")
    left = [line for line in found if not line.repaired]
    document = {
        "ok": not left, "rows": seen["rows"], "objects": seen["bucket"],
        "findings": [line.model_dump(include=FINDING) for line in found],
    }  # fmt: skip

    def show() -> None:
        click.echo(f"{seen['rows']} blobs and {seen['bucket']} objects were compared; {len(found)} findings.")
        if found:
            table(
                ["blob", "what", "detail", "named by", "repaired"],
                ([short(line.blob), line.problem, line.detail, ", ".join(line.named_by), _repaired(line)]
                 for line in found),
            )  # fmt: skip

    out.emit(document, show)
    if left:
        raise click.exceptions.Exit(1)


def _repaired(line: "FsckLine") -> str:
    if line.replica == "healed":
        return "from the replica"
    return f"{'yes' if line.repaired else ''}{f' (replica: {line.replica})' if line.replica else ''}"


COMMANDS: dict[str, click.Command] = {"quota": quota, "fsck": fsck}
