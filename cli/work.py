"""Commands that ask for work: train, evaluate, merge, rebase; a merge also on this machine."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import (
    BadConfig,
    BadRequest,
    LocalFailure,
    LoractlError,
    PathUnusable,
    ToolMissing,
    TrainedOnAnother,
    WorkFailed,
)
from registry.core.names import Reference

from . import bases, config
from .following import ask, ask_all
from .output import Bar, Output, command, fields
from .parameters import FILE, TIER, bytes_of, no_path
from .results import told_deviation
from .searches import searched

if TYPE_CHECKING:
    from registry.core.digest import Digest


@dataclass(frozen=True)
class RecipeFile:
    """A RECIPE.toml: the recipe with references, and where its result goes."""

    recipe: dict[str, Any]
    output: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: Path) -> RecipeFile:
    """Read a RECIPE.toml: keys of a fine-tune with references for digests, and a table ``[output]``."""
    import tomllib

    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(path=str(path), reason=f"it is not TOML: {error}") from error
    except OSError as error:
        raise LocalFailure.of(error, path) from error
    output = found.pop("output", {})
    if not isinstance(output, dict) or not set(output) <= {"adapter", "line", "aliases", "message", "task"}:
        raise BadConfig(path=str(path), reason="[output] takes adapter (or line), aliases, message and task")
    return RecipeFile({"kind": "finetune", **found}, output)


def job_options(function: Any) -> Any:
    """The options of every command that asks for a job."""
    function = click.option("--queue", default="cpu", show_default=True, help="Which workers do it.")(function)
    function = click.option("--fresh", is_flag=True, help="Do it even if an equal job has succeeded.")(function)
    return click.option("--no-wait", is_flag=True, help="Give the job's id, and leave.")(function)


@command(
    None,
    "loractl train recipe.toml",
    "loractl train recipe.toml --output team/bot --alias prod --no-wait",
    "loractl train german.toml french.toml polish.toml",
    "loractl train full.toml --line llama-bot",
    "loractl train recipe.toml --rank auto --energy 0.95 --suite team/reviews-test",
    "loractl train recipe.toml --scale auto --suite team/reviews-test",
    "loractl train recipe.toml --targets auto --suite team/reviews-test",
)
@click.argument("recipes", type=FILE, nargs=-1, required=True, metavar="RECIPE.toml…")
@click.option("--output", "name", metavar="NAME", help="The adapter it becomes a version of; default: [output].")
@click.option("--line", metavar="LINE", help="Full fine-tuning: the line it becomes the newest revision of.")
@click.option("--alias", "aliases", multiple=True, metavar="A", help="An alias to point at the result.")
@click.option("-m", "--message", metavar="TEXT", help="What is new in it.")
@click.option("--rank", metavar="N|auto", help="The rank; auto: train a high one, keep what carries the update.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="--rank auto: how much of ‖ΔW‖² to keep.")
@click.option("--bytes", "budget", metavar="SIZE", help="--rank auto: at most so large. --targets auto: each so large.")
@click.option("--scale", type=click.Choice(["auto"]), help="Search scale and learning rate together.")
@click.option("--targets", type=click.Choice(["auto"]), help="Add groups of modules as long as the next one helps.")
@click.option("--suite", "suite_ref", metavar="S", help="With auto: the suite whose calibration split chooses.")
@job_options
def train(
    out: Output, recipes: tuple[Path, ...], name: str | None, line: str | None, aliases: tuple[str, ...],
    message: str | None, rank: str | None, energy: float | None, budget: str | None, scale: str | None,
    targets: str | None, suite_ref: str | None, queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Fine-tune a LoRA adapter, or the base itself, by a recipe, and draw its loss.

    \b
    base = "llama@r2"
    datasets = ["team/reviews"]
    rank = 8
    steps = 200
    [output]
    adapter = "team/bot"
    aliases = ["prod"]

    With kind = "full-finetune" the base's own weights are trained, and the result is a base model: name its line.
    Several recipes are asked for and followed together; a worker trains those on one base at once.
    """
    from registry.schemas import JobRequest
    from registry.schemas import Output as Goes

    if len(recipes) > 1 and (name or line):
        raise click.UsageError("--output and --line name one result; of several recipes each has its own [output].")
    requests = []
    for recipe in recipes:
        read = load_recipe(recipe)
        given = {"adapter": name, "line": line, "aliases": list(aliases) or None, "message": message}
        output = read.output | {key: value for key, value in given.items() if value is not None}
        wanted = searched(read.recipe, rank, scale, targets, energy, budget, suite_ref)
        if read.recipe["kind"] == "full-finetune" and "line" not in output:
            raise BadRequest(
                problems=f'name the result of {recipe.name}: --line llama-bot, or line = "llama-bot" under [output]'
            )
        if read.recipe["kind"] == "finetune" and "adapter" not in output:
            raise BadRequest(
                problems=f'name the result of {recipe.name}: --output team/bot, or adapter = "team/bot" under [output]'
            )
        requests.append(JobRequest(recipe=wanted, output=Goes.model_validate(output), queue=queue, fresh=fresh))
    if len(requests) == 1:
        ask(out, requests[0], no_wait)
    else:
        ask_all(out, requests, no_wait)


@command(
    None,
    "loractl evaluate team/bot@v3 team/bot:prod --suite team/reviews-test",
    "loractl evaluate --for llama@r2 --suite team/reviews-test",
)
@click.argument("refs", nargs=-1, metavar="REF…")
@click.option("--suite", "suite_ref", required=True, metavar="S", help="The suite to score on.")
@click.option("--for", "base_text", metavar="BASE", help="On which base; default: that of the first REF.")
@click.option("--no-bare", is_flag=True, help="Do not score the bare base too.")
@click.option("--quantised", type=click.Choice(["int8", "nf4"]), help="Hold the base's linear weights in 8 or 4 bits.")
@job_options
def evaluate(
    out: Output, refs: tuple[str, ...], suite_ref: str, base_text: str | None, no_bare: bool, quantised: str | None,
    queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Score adapters, and the bare base, on a suite; per-item records are kept for the gates."""
    from registry.schemas import JobRequest

    if not refs and not base_text:
        raise click.UsageError("Name adapters, or a base: --for BASE.")
    Reference.parse(suite_ref, "suite")
    recipe: dict[str, Any] = {"kind": "evaluate", "suite": suite_ref, "bare": not no_bare, "quantised": quantised}
    recipe["adapters"] = [str(Reference.parse(ref)) for ref in refs]
    if base_text:
        recipe["base"] = _base(out, base_text)
    ask(out, JobRequest(recipe=recipe, queue=queue, fresh=fresh), no_wait, refs)


@command(
    None,
    "loractl merge team/bot:prod --line llama-bot",
    "loractl merge ./bot --local --for ./llama --out ./llama-bot",
    "loractl merge team/bot:prod --local --for ./llama --out ./llama-bot --dtype bf16 --max-shard-size 5GB --verify",
)
@click.argument("ref", metavar="REF")
@click.option("--for", "base_text", metavar="BASE", help="Into which base; with --local a folder.")
@click.option("--line", help="The line that the merged base becomes the newest revision of.")
@click.option("--local", is_flag=True, help="On this machine, into a folder; REF may be a folder too.")
@click.option("--out", "target", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="With --local.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Type of the weights; default: the base's.")
@click.option("--max-shard-size", metavar="SIZE", help="Size of a weight file, such as 5GB; default: the base's files.")
@click.option("--dequantise", is_flag=True, help="Write a base that is stored in 8 or 4 bits as full numbers.")
@click.option("--verify", is_flag=True, help="Also compare the logits of the result with those of base and adapter.")
@click.option("--trust-base", is_flag=True, help="--local: even if the adapter's file records another base.")
@job_options
def merge(
    out: Output, ref: str, base_text: str | None, line: str | None, local: bool, target: Path | None,
    dtype: str | None, max_shard_size: str | None, dequantise: bool, verify: bool, trust_base: bool, queue: str,
    fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Merge an adapter into its base: W + scale·B·A, as a new base model."""
    from registry.schemas import JobRequest
    from registry.schemas import Output as Goes

    wanted: dict[str, Any] = {"kind": "merge", "dtype": dtype, "dequantise": dequantise, "verify": verify}
    if max_shard_size:
        wanted["max_shard_bytes"] = bytes_of(max_shard_size)
    if local:
        if target is None or base_text is None or line:
            raise click.UsageError("--local takes --for FOLDER and --out DIR, and no --line.")
        _merge_here(out, ref, Path(base_text), target, wanted, trust_base)
        return
    if line is None or target is not None or trust_base:
        raise click.UsageError("Name the line of the result: --line LINE; or merge here: --local --for DIR --out DIR.")
    recipe = wanted | {"adapter": str(Reference.parse(ref))}
    if base_text:
        recipe["base"] = _base(out, base_text)
    ask(out, JobRequest(recipe=recipe, output=Goes(line=line), queue=queue, fresh=fresh), no_wait)


@command(
    None,
    "loractl rebase team/bot:prod --to llama@r2",
    "loractl rebase team/bot:prod --to llama@r2 --suite team/reviews-test --inputs team/questions",
    "loractl rebase team/bot@v3 --to llama@r2 --tier warm-start --suite team/reviews-test",
    "loractl rebase team/bot:prod --to llama-wide@r1 --tier transport --inputs team/reviews",
    "loractl rebase team/bot:prod --to llama@r2 --tier distil --inputs team/questions",
)
@click.argument("ref", metavar="REF")
@click.option("--to", "base_text", required=True, metavar="BASE", help="The new weights.")
@click.option("--tier", type=TIER, default="carry", show_default=True, help="How.")
@click.option("--suite", "suite_ref", metavar="S", help="Its calibration split chooses among what a tier tries.")
@click.option("--inputs", "inputs_ref", metavar="D", help="A dataset whose prompts are looked at, never its answers.")
@click.option("--output", "name", metavar="NAME", help="The adapter it becomes a version of; default: the same one.")
@click.option("--alias", "aliases", multiple=True, metavar="A", help="An alias to point at the result.")
@job_options
def rebase(
    out: Output, ref: str, base_text: str, tier: str, suite_ref: str | None, inputs_ref: str | None, name: str | None,
    aliases: tuple[str, ...], queue: str, fresh: bool, no_wait: bool,
) -> None:  # fmt: skip
    """Carry one adapter to another base by one tier of the cascade; campaigns choose by themselves."""
    from registry.schemas import JobRequest
    from registry.schemas import Output as Goes

    reference = Reference.parse(ref)
    recipe: dict[str, Any] = {"kind": "rebase", "tier": tier, "adapter": str(reference), "base": _base(out, base_text)}
    if suite_ref and tier not in ("align", "transport", "distil"):
        recipe["suite"] = str(Reference.parse(suite_ref, "suite"))
    if inputs_ref:
        recipe["inputs"] = str(Reference.parse(inputs_ref, "dataset"))
    goes = Goes(adapter=name or str(reference.series), aliases=list(aliases))
    ask(out, JobRequest(recipe=recipe, output=goes, queue=queue, fresh=fresh), no_wait)


def _base(out: Output, text: str) -> str:
    with out.progress() as bar:
        return bases.wanted(text, bar).ref


def _merge_here(
    out: Output, ref: str, base: Path, target: Path, wanted: dict[str, Any], trust_base: bool
) -> None:
    """Run the worker's own merge in a child process, on folders."""
    from importlib.util import find_spec

    from registry.transfer import digested, scanned

    from .adapters import fetched
    from .keys import pinned_keys

    if find_spec("torch") is None:
        raise ToolMissing(what="merging on this machine", extra="worker")
    if not base.is_dir():
        raise PathUnusable(path=str(base), reason="--local merges into a base folder")
    if target.exists() and any(target.iterdir()):
        raise PathUnusable(path=str(target), reason="it is not empty")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent)
    except OSError as error:
        raise LocalFailure.of(error, target) from error
    with beside as scratch, out.progress() as bar:  # on the disk of the result, which is renamed
        digest = digested(base, progress=bar, cache=config.hashes()).digest
        adapter = Path(ref)
        if not adapter.is_dir():
            adapter = Path(scratch) / "adapter"
            name = Reference.parse(no_path(ref))
            with config.connect() as client:
                fetched(client, name, adapter, {"base": str(digest)}, pinned_keys(name.series.namespace), bar)
        elif not trust_base:
            refuse_other_base(adapter, digest)
        version = scanned("adapter", adapter, base=digest, progress=bar).manifest.digest
        recipe = Path(scratch) / "recipe.json"
        recipe.write_text(json.dumps(wanted | {"base": str(digest), "adapter": str(version)}))
        work = Path(scratch) / "out"
        run_here(recipe, {"base": base, "adapter": adapter}, work, bar)
        (work / "base").replace(target)
        result = json.loads((work / "result.json").read_text())
        merged = digested(target, progress=bar, taken=result["tensors"])
    document = {"out": str(target), "base": str(digest), "adapter": str(version), "digest": str(merged.digest)} | result
    shown = {"merged": str(target), "digest": str(merged.digest), "changed": f"{result.get('changed')} tensors"}
    if bits := result.get("dequantised"):
        shown["dequantised"] = f"{bits}, into full numbers"
    shown["logits"] = told_deviation(result.get("deviation"))
    out.emit(document, lambda: fields(shown))


def refuse_other_base(adapter: Path, base: "Digest") -> None:
    """`TrainedOnAnother` when the adapter in this folder, or the pull that brought it, records another base."""
    from registry import pulled
    from registry.files import read_adapter

    own = read_adapter(adapter).recorded_base
    known = [str(own)] if own else pulled.bases_of(adapter)
    if known and str(base) not in known:
        raise TrainedOnAnother(path=str(adapter), recorded=" or ".join(known), base=str(base))


def run_here(recipe: Path, inputs: dict[str, Path], target: Path, bar: Bar) -> None:
    """``python -m workers.run`` in a child process; its progress on our bar, its refusal as ours."""
    reading, writing = os.pipe()
    line = [sys.executable, "-m", "workers.run", str(recipe), "--out", str(target), "--progress-fd", str(writing)]
    for role, folder in inputs.items():
        line += ["--in", f"{role}={folder.resolve()}"]

    def follow() -> None:
        with os.fdopen(reading) as lines:
            for now in map(json.loads, lines):
                bar("merging", now["step"], now["steps"])  # bytes

    reader = Thread(target=follow, daemon=True)
    reader.start()
    try:
        in_child(line, target / "error.json", pass_fds=(writing,))
    finally:
        os.close(writing)
        reader.join()


def in_child(line: list[str], refusal: Path, pass_fds: tuple[int, ...] = ()) -> None:
    """Run a program of ours in a child process; what it refuses, in the file ``refusal``, is refused here."""
    with subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=pass_fds
    ) as child:
        try:
            _, talk = child.communicate()
        except KeyboardInterrupt:
            child.wait()  # the terminal's Ctrl-C reached it too
            raise
    if child.returncode == 0:
        return
    if refusal.is_file():
        raise LoractlError.from_problem(json.loads(refusal.read_text()))
    last = talk.decode(errors="replace").strip().split("\n")[-1]
    raise WorkFailed(id="here", reason=last or f"it ended with status {child.returncode}")


COMMANDS: dict[str, click.Command] = {"train": train, "evaluate": evaluate, "merge": merge, "rebase": rebase}
