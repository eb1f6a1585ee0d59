"""``loractl base …``, and what BASE means to every other command: a local folder, line@rev, line, or a digest."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.core.errors import BadReference
from registry.core.names import BaseReference

from . import config
from .output import Bar, Output, ago, command, fields, number, short, size, table
from .parameters import no_path

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.core.base_model import BaseModel
    from registry.schemas import BaseInfo, DiffInfo, PushInfo

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group("base", short_help="Base models: push, list, show, rollback, diff, digest.")
def base() -> None:
    """Base models, identified by content and never by name alone."""


COMMANDS: dict[str, click.Command] = {"base": base}


@dataclass(frozen=True)
class Wanted:
    """A BASE as it was typed: its digest or reference, and its table when it was a folder."""

    ref: str
    model: "BaseModel | None" = None

    def digest(self, client: "RegistryClient") -> str:
        """The base digest; asks the registry when anything else was typed."""
        return self.ref if BaseReference.parse(self.ref).digest else client.base(self.ref).digest


def wanted(text: str, bar: Bar) -> Wanted:
    """Parse a BASE; a folder is hashed, with what is known of its files from last time."""
    from registry.transfer import digested

    folder = Path(text)
    if folder.is_dir():
        model = digested(folder, progress=bar, cache=config.hashes())
        return Wanted(str(model.digest), model)
    return Wanted(str(BaseReference.parse(no_path(text))))


def register(client: "RegistryClient", model: "BaseModel") -> "BaseInfo":
    """Make a base known by its tensor table, without weights."""
    from registry.schemas import BaseRegistration
    from registry.transfer import table_of

    return client.register_base(BaseRegistration(table=table_of(model)))


@command(
    base,
    "loractl base push ./llama --line llama",
    "loractl base push ./llama-new --line llama --parent llama --how continued",
    "loractl base push ./llama --line llama --no-weights",
    "loractl base push ./llama --line llama --location hf://meta-llama/Llama-3.2-1B@<commit>",
)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--line", required=True, help="The line it becomes the newest revision of.")
@click.option("--revision", type=click.IntRange(1), help="The number it must get; refused when it would get another.")
@click.option("--unlike", is_flag=True, help="Go on with a model that has no tensor in common with the line's newest.")
@click.option("--no-weights", is_flag=True, help="Register its tensor table only; jobs that need the weights wait.")
@click.option("--location", metavar="URI", help="Where the weights are, pinned, in place of uploading them.")
@click.option("--name", "names", multiple=True, metavar="ORG/MODEL", help="A name that adapters declare it by.")
@click.option("--parent", metavar="BASE", help="The base that it was made from.")
@click.option("--how", type=click.Choice(["cast", "quantised", "merged", "continued"]), help="How, from its parent.")
@click.option("-m", "--message", default="", metavar="TEXT", help="What is new in it.")
def push(
    out: Output,
    folder: Path,
    line: str,
    revision: int | None,
    unlike: bool,
    no_weights: bool,
    location: str | None,
    names: tuple[str, ...],
    parent: str | None,
    how: str | None,
    message: str,
) -> None:
    """Register the base model in DIR as the newest revision of a line."""
    from registry import transfer
    from registry.schemas import BaseRegistration, Wishes

    if no_weights and location:
        raise click.UsageError("--no-weights and --location exclude each other.")
    if (parent is None) != (how is None):
        raise click.UsageError("--parent and --how belong together.")
    with config.connect() as client, out.progress() as bar, out.if_interrupted(
        "Nothing is lost: repeat the command, and it resumes behind the parts that arrived."
    ):
        model = transfer.digested(folder, progress=bar, cache=config.hashes())
        wishes = Wishes(
            line=line,
            revision=revision,
            names=list(names),
            message=message,
            parent=wanted(parent, bar).digest(client) if parent else None,
            parent_kind=how,
            unlike=unlike,
        )
        if no_weights or location:
            registration = BaseRegistration(table=transfer.table_of(model), wishes=wishes, location=location)
            info = client.register_base(registration)
            out.emit(info, lambda: _show(info))
            return
        pushed = transfer.push_base(client, folder, wishes, base=model, progress=bar, cache=config.hashes())
    out.emit(pushed, lambda: pushed_lines(pushed))


def pushed_lines(info: "PushInfo") -> None:
    """What a push made, for people."""
    made = info.outcome or {}
    fields({
        "pushed": made.get("ref") or info.version_digest,
        "digest": short(made.get("digest") or info.version_digest),
        "base": short(made.get("base")),
        "evidence": made.get("evidence"),
        "aliases": ", ".join(made.get("aliases") or []),
        "signed": ", ".join(short(key) for key in made.get("signed") or []),
    })  # fmt: skip
    for warning in made.get("warnings") or []:
        click.echo(f"warning  {warning}")


@command(base, "loractl base list", "loractl base list --line llama --json", name="list")
@click.option("--line", help="Only the revisions of this line.")
def list_bases(out: Output, line: str | None) -> None:
    """List base models."""
    from registry.client import every

    with config.connect() as client:
        found = list(every(lambda cursor: client.bases(line=line, cursor=cursor)))
    if line is not None:
        found = [info for info in found if any(revision.split("@")[0] == line for revision in info.revisions)]
    out.emit(found, lambda: table(
        ["revisions", "digest", "type", "parameters", "weights", "registered"],
        ([", ".join(info.revisions), short(info.digest), info.model_type, f"{info.parameters:,}", info.weights,
          ago(info.created_at)] for info in found),
        empty="No base models yet. Push one: loractl base push DIR --line LINE",
    ))  # fmt: skip


@command(base, "loractl base show llama@r2", "loractl base show b3:0123… --json")
@click.argument("ref", metavar="REF")
def show(out: Output, ref: str) -> None:
    """Show one base model."""
    with config.connect() as client:
        info = client.base(str(BaseReference.parse(ref)))
    out.emit(info, lambda: _show(info))


def _show(info: "BaseInfo") -> None:
    fields({
        "base": info.digest,
        "revisions": ", ".join(info.revisions),
        "names": ", ".join(info.names),
        "type": info.model_type,
        "parameters": f"{info.parameters:,}",
        "weights": info.weights + (f" ({size(info.size)})" if info.size else ""),
        "location": info.location,
        "weights digest": info.weights_digest,
        "arch digest": f"{info.arch_digest} ({info.arch_kind})",
        "vocabulary": short(info.vocabulary_digest),
        "chat template": short(info.template_digest),
        "registered": ago(info.created_at),
    })  # fmt: skip


@command(base, "loractl base rollback llama@r1")
@click.argument("ref", metavar="LINE@rN")
def rollback(out: Output, ref: str) -> None:
    """Make what an earlier revision is the newest of its line again, under a new number."""
    from registry.schemas import RevisionRequest

    reference = BaseReference.parse(ref)
    if reference.line is None or reference.revision is None:
        raise BadReference(
            value=ref, what="a revision", rule="expected the line and the number to go back to", examples="llama@r1"
        )
    with config.connect() as client:
        info = client.repeat_revision(reference.line, RevisionRequest(revision=reference.revision))
    out.emit(info, lambda: _show(info))


@command(base, "loractl base diff llama@r1 llama@r2")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def diff(out: Output, a: str, b: str) -> None:
    """Compare two base models tensor by tensor."""
    with config.connect() as client:
        info = client.diff_bases(str(BaseReference.parse(a)), str(BaseReference.parse(b)))
    out.emit(info, lambda: _diff(info))


def _diff(info: "DiffInfo") -> None:
    def some(names: list[str]) -> str:
        return f"{len(names)}" + (f": {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else "")

    fields({
        "a": info.a,
        "b": info.b,
        "equal tensors": str(info.equal),
        "changed": some(info.changed),
        "added": some(info.added),
        "removed": some(info.removed),
        "reshaped": some(info.reshaped),
        "vocabulary": "changed" if info.vocabulary_changed else "same",
        "chat template": "changed" if info.template_changed else "same",
        "derivation": " ".join(str(value) for value in (info.derivation or {}).values() if isinstance(value, str)),
        "drift": number(info.drift) or "not measured",
    })  # fmt: skip
    for name, (left, right) in sorted((name, pair) for name, pair in info.arch.items() if len(pair) == 2):
        click.echo(f"arch {name}: {left} → {right}")


@command(base, "loractl base digest ./llama")
@click.argument("folder", metavar="DIR", type=FOLDER)
def digest(out: Output, folder: Path) -> None:
    """Compute the base digest of a local folder; asks no registry."""
    from registry.transfer import digested

    with out.progress() as bar:
        model = digested(folder, progress=bar, cache=config.hashes())
    document = {
        "digest": model.digest,
        "weights": model.weights,
        "arch": model.arch,
        "model_type": model.model_type,
        "tensors": len(model.by_name),
        "bytes": model.size,
    }
    out.emit(document, lambda: click.echo(str(model.digest)))
