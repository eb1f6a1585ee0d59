"""Commands that make adapters out of weights that are there: combine, compress, extract."""

from typing import Any

import click

from registry.core.names import Reference, SeriesName

from . import bases
from .following import ask
from .output import Output, command
from .parameters import bytes_of
from .work import job_options

_SHARE = click.FloatRange(0, 1, min_open=True)


def into_options(function: Any) -> Any:
    """Where a new adapter goes."""
    function = click.option("-m", "--message", default="", metavar="TEXT", help="What is new in it.")(function)
    function = click.option("--alias", "aliases", multiple=True, metavar="A", help="An alias to point at the result.")(
        function
    )
    return click.option(
        "--into", "--output", "name", required=True, metavar="NAME", help="The adapter it becomes a version of."
    )(function)


@command(
    None,
    "loractl combine team/french:prod team/legal:prod --into team/french-legal",
    "loractl combine team/a@v3 team/b@v1 --weight 0.7 --weight 0.3 --method svd --rank 16 --into team/ab",
    "loractl combine team/a team/b team/c --method ties --density 0.2 --into team/abc --no-wait",
)
@click.argument("refs", nargs=-1, required=True, metavar="REF…")
@click.option("--method", type=click.Choice(["linear", "concat", "svd", "ties", "dare"]), default="concat",
              show_default=True, help="concat: the exact sum, ranks add up. svd: the same, cut. linear: factors are "
              "added. ties, dare: by TIES merging, by DARE.")  # fmt: skip
@click.option("--weight", "weights", multiple=True, type=float, metavar="W",
              help="What a REF's update is multiplied by, one for each, in their order; default: 1.")  # fmt: skip
@click.option("--rank", type=click.IntRange(1, 4096), help="svd, ties, dare: of every module; default: the largest.")
@click.option("--energy", type=_SHARE, help="svd, ties, dare: the share of the update's square norm to keep.")
@click.option("--density", type=_SHARE, help="ties, dare: the share of the update's elements that stay.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="dare: of what is dropped.")
@into_options
@job_options
def combine(
    out: Output, refs: tuple[str, ...], method: str, weights: tuple[float, ...], rank: int | None,
    energy: float | None, density: float | None, seed: int, name: str, aliases: tuple[str, ...], message: str,
    queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Make one adapter of several on one base."""
    if len(refs) < 2:
        raise click.UsageError("Name two adapters or more.")
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} times --weight for {len(refs)} adapters: give one for each, or none.")
    if (density is None) == (method in ("ties", "dare")):
        raise click.UsageError("--density belongs to the methods ties and dare, which need it.")
    if (rank or energy) and method in ("linear", "concat"):
        raise click.UsageError(f"--rank and --energy cut what svd, ties and dare give; {method} takes neither.")
    if rank and energy:
        raise click.UsageError("--rank and --energy exclude each other.")
    recipe: dict[str, Any] = {"kind": "combine", "adapters": [str(Reference.parse(ref)) for ref in refs]}
    recipe |= {"method": method, "rank": rank, "energy": energy, "density": density}
    recipe |= {"weights": list(weights) or None, "seed": seed if method == "dare" else 0}
    _make(out, recipe, name, aliases, message, queue, fresh, no_wait)


@command(
    None,
    "loractl compress team/bot:prod --into team/bot-small",
    "loractl compress team/bot@v3 --into team/bot --energy 0.99",
    "loractl compress team/bot@v3 --into team/bot-small --bytes 20MB",
)
@click.argument("ref", metavar="REF")
@click.option("--energy", type=_SHARE, help="The share of the update's square norm to keep; default: 0.95.")
@click.option("--rank", type=click.IntRange(1, 4096), help="The rank of every module, at most.")
@click.option("--bytes", "size", metavar="SIZE", help="Of all factors together, at most; such as 20MB.")
@into_options
@job_options
def compress(
    out: Output, ref: str, energy: float | None, rank: int | None, size: str | None, name: str,
    aliases: tuple[str, ...], message: str, queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Make an adapter smaller: the best update of lower rank, module by module."""
    given = {"energy": energy, "rank": rank, "bytes": None if size is None else bytes_of(size)}
    if sum(value is not None for value in given.values()) > 1:
        raise click.UsageError("--energy, --rank and --bytes exclude each other.")
    _make(out, {"kind": "compress", "adapter": str(Reference.parse(ref)), **given}, name, aliases, message,
          queue, fresh, no_wait)  # fmt: skip


@command(
    None,
    "loractl extract --base llama@r1 --tuned chat@r1 --into team/chat",
    "loractl extract --base llama@r1 --tuned chat@r1 --into team/chat --rank 32 --rest drop",
)
@click.option("--base", "base_text", required=True, metavar="REF", help="The base model before the fine-tune.")
@click.option("--tuned", "tuned_text", required=True, metavar="REF", help="The base model after it.")
@click.option("--energy", type=_SHARE, help="The share of the difference's square norm to keep; default: 0.95.")
@click.option("--rank", type=click.IntRange(1, 4096), help="The rank of every module, at most.")
@click.option("--rest", type=click.Choice(["refuse", "replace", "drop"]), default="refuse", show_default=True,
              help="Differing parameters that are no linear layer's weight: refuse them by name and size, replace "
              "embeddings, output heads and biases whole, or leave all as in the base.")  # fmt: skip
@into_options
@job_options
def extract(
    out: Output, base_text: str, tuned_text: str, energy: float | None, rank: int | None, rest: str, name: str,
    aliases: tuple[str, ...], message: str, queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Make an adapter of a full fine-tune: what it changed in the linear layers, as low-rank updates."""
    if energy and rank:
        raise click.UsageError("--energy and --rank exclude each other.")
    recipe: dict[str, Any] = {"kind": "extract", "energy": energy, "rank": rank, "rest": rest}
    with out.progress() as bar:
        recipe |= {"base": bases.wanted(base_text, bar).ref, "tuned": bases.wanted(tuned_text, bar).ref}
    _make(out, recipe, name, aliases, message, queue, fresh, no_wait)


def _make(
    out: Output, recipe: dict[str, Any], name: str, aliases: tuple[str, ...], message: str,
    queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    from registry.schemas import JobRequest
    from registry.schemas import Output as Goes

    goes = Goes(adapter=str(SeriesName.parse(name)), aliases=list(aliases), message=message)
    ask(out, JobRequest(recipe=recipe, output=goes, queue=queue, fresh=fresh), no_wait)


COMMANDS: dict[str, click.Command] = {"combine": combine, "compress": compress, "extract": extract}
