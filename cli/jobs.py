"""Commands about work: datasets, suites, training, evaluation, merging, rebasing, and jobs themselves."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import (
    BadConfig,
    BadRequest,
    LoractlError,
    PathUnusable,
    ToolMissing,
    TrainedOnAnother,
    WorkFailed,
)
from registry.core.names import Reference, SeriesName

from . import bases, config
from .output import Bar, Output, ago, command, fields, number, plot, short, size, sparkline, table
from .parameters import METRIC, METRICS, TIER, bytes_of
from .searches import searched, show_search

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.core.digest import Digest
    from registry.schemas import DatasetInfo, EventInfo, JobInfo, JobRequest

_BAR = re.compile(r"\d+%\|.*\||\b\d+(\.\d+)?\w?(it|\w+) \[\d+:\d+|\[\d+:\d+<.*\]")
"""A line of tqdm, such as "Loading weights:  12%|█▎  | 3/25 [00:00<00:01, 20it/s]"."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE_OR_FOLDER = click.Path(exists=True, path_type=Path)


@click.group("dataset", short_help="Training data: push, list.")
def dataset() -> None:
    """Training data: JSONL files, content-addressed and versioned."""


@click.group("suite", short_help="Evaluation suites: push, list.")
def suite() -> None:
    """Evaluation suites: JSONL with what is measured on it."""


@click.group("jobs", short_help="Jobs: list, show, watch, logs, cancel, retry.")
def jobs() -> None:
    """Work that was asked for: its state, progress and results."""


# ── datasets and suites ──────────────────────────────────────────────────────


@command(dataset, "loractl dataset push reviews.jsonl team/reviews", name="push")
@click.argument("file", type=FILE)
@click.argument("name", metavar="NAME")
@click.option("-m", "--message", default="", metavar="TEXT", help="What is new in it.")
def dataset_push(out: Output, file: Path, name: str, message: str) -> None:
    """Push FILE as the next version of a dataset.

    Lines are {"prompt": …, "completion": …} or {"messages": […]}.
    """
    _push_data(out, "dataset", file, name, {}, message)


@command(
    suite,
    "loractl suite push reviews-test.jsonl team/reviews-test",
    "loractl suite push test.jsonl team/test --metric chrf --metric likelihood --max-new-tokens 40",
    "loractl suite push orders.jsonl team/orders --metric exact-match --form json",
    "loractl suite push ./capitals team/capitals",
    name="push",
)
@click.argument("path", type=FILE_OR_FOLDER)
@click.argument("name", metavar="NAME")
@click.option("--metric", "metrics", multiple=True, type=METRIC, metavar="METRIC",
              help=f"What is measured: {METRICS}; default: by the form of its rows.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), help="How far a generation may go.")
@click.option("--form", metavar="FORM", help="What an output must be: json, or regex:EXPRESSION.")
@click.option("-m", "--message", default="", metavar="TEXT", help="What is new in it.")
def suite_push(
    out: Output,
    path: Path,
    name: str,
    metrics: tuple[str, ...],
    max_new_tokens: int | None,
    form: str | None,
    message: str,
) -> None:
    """Push PATH, a JSONL file or a folder of them, as the next version of a suite.

    Lines are as in a dataset, with "references": […] beside the completion where several texts are right; or
    {"prompt": …, "choices": […], "answer": i}.

    A folder may hold a suite.json, {"metrics": […], "max_new_tokens": n, "form": …}, which options overrule. With
    {"lm_eval": {"tasks": ["capitals.yaml", …]}} its lines are of any form: tasks of lm-eval, YAML files beside it
    whose data_files are the folder's, make questions of them.
    """
    if form is not None and form != "json" and not form.startswith("regex:"):
        raise click.UsageError(f"--form {form}: expected json, or regex: with an expression behind it.")
    from registry.files import read_spec

    asked = {"metrics": list(dict.fromkeys(metrics)), "max_new_tokens": max_new_tokens, "form": form}
    spec = read_spec(path) | {key: value for key, value in asked.items() if value}
    _push_data(out, "suite", path, name, spec, message)


def _push_data(out: Output, kind: Any, file: Path, name: str, spec: dict[str, Any], message: str) -> None:
    from registry.transfer import push_dataset

    series = str(SeriesName.parse(name, kind))
    with config.connect() as client, out.progress() as bar, out.if_interrupted("Nothing is lost: repeat the command."):
        info = push_dataset(
            client, kind, file, series, spec=spec, message=message, progress=bar, cache=config.hashes()
        )
    out.emit(info, lambda: bases.pushed_lines(info))


@command(dataset, "loractl dataset list", name="list")
def dataset_list(out: Output) -> None:
    """List datasets."""
    _list_data(out, "dataset")


@command(suite, "loractl suite list", name="list")
def suite_list(out: Output) -> None:
    """List suites."""
    _list_data(out, "suite")


def _list_data(out: Output, kind: Any) -> None:
    from registry.client import every

    with config.connect() as client:
        found: list[DatasetInfo] = list(every(lambda cursor: client.datasets(kind, cursor=cursor)))
    out.emit(found, lambda: table(
        [kind, "newest", "rows", "in the gate split", "size", "pushed"],
        ([i.name, f"v{i.version}", f"{i.rows:,}", f"{i.gate_rows:,}" if kind == "suite" else "", size(i.size),
          ago(i.created_at)] for i in found),
        empty=f"Nothing there. Push one: loractl {kind} push FILE NAME",
    ))  # fmt: skip


# ── work ─────────────────────────────────────────────────────────────────────


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
        raise PathUnusable(path=str(path), reason=error.strerror or str(error)) from error
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


def ask(out: Output, request: "JobRequest", no_wait: bool, refs: Sequence[str] = ()) -> None:
    """Ask for a job, and unless ``no_wait`` follow it to its end; ``refs``: what people call its adapters."""
    with config.connect() as client:
        job = client.submit(request)
        if no_wait:
            out.emit(job, lambda: click.echo(job.id))
            return
        if job.reused:
            out.say(f"Job {job.id} does this already ({job.state}, asked {ago(job.created_at)}; --fresh repeats it).")
        job, curve = follow(out, client, job)
    out.emit(job, lambda: _ended(job, curve, refs))


def follow(out: Output, client: "RegistryClient", job: "JobInfo") -> tuple["JobInfo", list[tuple[float, float]]]:
    """Wait for a job with live progress; the ended job and its loss curve. `WorkFailed` when it did not succeed."""
    curve: list[tuple[float, float]] = []
    with out.progress(after=0) as bar, out.if_interrupted(
        f"Job {job.id} goes on without you. Watch it: loractl jobs watch {job.id}; end it: loractl jobs cancel {job.id}"
    ):
        for event in client.events(job.id):
            _draw(bar, job.kind, event.kind, event.data, curve)
    return succeeded(client.job(job.id)), curve


def ask_all(out: Output, requests: Sequence["JobRequest"], no_wait: bool) -> None:
    """Ask for several jobs, and unless ``no_wait`` follow all of them, each with its bar, to the end of the last.

    Where one is refused, those before it are cancelled. `WorkFailed` for the first that did not succeed, when all have
    ended.
    """
    with config.connect() as client:
        jobs = _submitted(out, client, requests)
        if no_wait:
            out.emit({"jobs": jobs}, lambda: click.echo("\n".join(job.id for job in jobs)))
            return
        curves = _follow_all(out, client, jobs)
        jobs = [client.job(job.id) for job in jobs]
    if not out.as_json:  # there a failure is the one document
        _all_ended(jobs, curves)
    ended = [succeeded(job) for job in jobs]
    out.emit({"jobs": ended}, lambda: None)


def _submitted(out: Output, client: "RegistryClient", requests: Sequence["JobRequest"]) -> list["JobInfo"]:
    jobs: list[JobInfo] = []
    for request in requests:
        try:
            jobs.append(client.submit(request))
        except LoractlError:
            if new := [job.id for job in jobs if not job.reused]:
                out.say(f"Recipe {len(jobs) + 1} is refused; cancelling what was asked for before it: {' '.join(new)}")
            for job in new:
                client.cancel_job(job)
            raise
    return jobs


def _goal(job: "JobInfo") -> str:
    return str(job.output.get("adapter") or job.output.get("line") or job.id)


def _follow_all(
    out: Output, client: "RegistryClient", jobs: Sequence["JobInfo"]
) -> list[list[tuple[float, float]]]:
    """Wait for all jobs with live progress; their loss curves."""
    curves: list[list[tuple[float, float]]] = [[] for _ in jobs]
    told: SimpleQueue[tuple[int, EventInfo | Exception | None]] = SimpleQueue()

    def listen(place: int) -> None:
        try:
            for event in client.events(jobs[place].id):
                told.put((place, event))
            told.put((place, None))
        except Exception as error:  # noqa: BLE001  # raised again by the thread that waits
            told.put((place, error))

    listeners = [Thread(target=listen, args=(place,), daemon=True) for place in range(len(jobs))]
    ids = " ".join(job.id for job in jobs)
    left = set(range(len(jobs)))
    with out.progress(after=0) as bar, out.if_interrupted(
        f"The jobs go on without you. See them: loractl jobs list; end them, one by one: loractl jobs cancel ID ({ids})"
    ):
        for listener in listeners:
            listener.start()
        while left:
            place, event = told.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left.discard(place)
            else:
                data = {key: value for key, value in event.data.items() if key != "phase"}
                _draw(bar, _goal(jobs[place]), event.kind, data, curves[place])
    return curves


def _all_ended(jobs: Sequence["JobInfo"], seen: Sequence[Sequence[tuple[float, float]]]) -> None:
    results = [job.result or {} for job in jobs]
    curves = [[(float(step), float(loss)) for step, loss in result.get("loss", [])] or list(curve)
              for result, curve in zip(results, seen, strict=True)]  # fmt: skip
    drawn = {_goal(job): curve for job, curve in zip(jobs, curves, strict=True) if len(curve) > 1}
    if drawn:
        click.echo(plot(drawn, title="loss", x="step"))
    table(
        ["result", "job", "state", "steps", "last loss", "held out", "took", "error"],
        [
            [", ".join(str(item.get("ref")) for item in result.get("made", [])) or _goal(job), job.id, job.state,
             str(result.get("steps") or ""), number(curve[-1][1]) if curve else "",
             number(min((loss for _, loss in result.get("held_out", [])), default=None)), _took(job),
             (job.error or {}).get("detail")]
            for job, result, curve in zip(jobs, results, curves, strict=True)
        ],
    )  # fmt: skip


def succeeded(job: "JobInfo") -> "JobInfo":
    """The job itself when it succeeded; else why it did not."""
    if job.state == "succeeded":
        return job
    problem = job.error or {}
    if problem.get("code") == WorkFailed.code:
        reason = problem["facts"]["reason"]
    else:
        reason = f"{problem.get('detail') or f'it is {job.state}'}\n{problem.get('hint') or ''}".strip()
    raise WorkFailed(id=job.id, reason=reason, problem=problem)


def _draw(bar: Bar, kind: str, event: str, data: dict[str, Any], curve: list[tuple[float, float]]) -> None:
    step, steps, loss = data.get("step"), data.get("steps"), data.get("loss")
    if step is not None and loss is not None:
        if curve and step < curve[-1][0]:
            curve.clear()  # another phase of a search
        curve.append((float(step), float(loss)))
    losses = [point[1] for point in curve]
    note = f"loss {losses[-1]:.3f} {sparkline(losses)}" if losses else event
    bar.count(data.get("phase", kind), step or 0, steps or 0, note)


def _ended(job: "JobInfo", curve: Sequence[tuple[float, float]], refs: Sequence[str] = ()) -> None:
    result = job.result or {}
    curve = [(float(step), float(loss)) for step, loss in result.get("loss", [])] or curve
    if len(curve) > 1:
        curves = {"loss": curve, "held out": [(float(step), float(loss)) for step, loss in result.get("held_out", [])]}
        click.echo(plot({name: points for name, points in curves.items() if len(points) > 1},
                        title=f"{job.kind} {job.id}", x="step"))  # fmt: skip
    if job.kind == "search" and result:
        show_search(result)
    _job(job, refs)


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
        raise PathUnusable(path=str(target), reason=error.strerror or str(error)) from error
    with beside as scratch, out.progress() as bar:  # on the disk of the result, which is renamed
        digest = digested(base, progress=bar, cache=config.hashes()).digest
        adapter = Path(ref)
        if not adapter.is_dir():
            adapter = Path(scratch) / "adapter"
            name = Reference.parse(ref)
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
    shown["logits"] = _told_deviation(result.get("deviation"))
    out.emit(document, lambda: fields(shown))


def refuse_other_base(adapter: Path, base: "Digest") -> None:
    """`TrainedOnAnother` when the adapter in this folder records another base than ``base``."""
    from registry.files import read_adapter

    recorded = read_adapter(adapter).recorded_base
    if recorded not in (None, base):
        raise TrainedOnAnother(path=str(adapter), recorded=str(recorded), base=str(base))


def _told_deviation(deviation: dict[str, Any] | None) -> str:
    if deviation is None:
        return ""
    return (
        f"off by {deviation['largest']:.2g} at most ({deviation['relative']:.2g} of their norm); "
        f"the same token is the likeliest at {deviation['agreement']:.1%} of {deviation['positions']} positions"
    )


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


# ── jobs ─────────────────────────────────────────────────────────────────────


@command(jobs, "loractl jobs list", "loractl jobs list --state running --json", name="list")
@click.option("--state", type=click.Choice(["queued", "running", "succeeded", "failed", "cancelled"]))
@click.option("--campaign", metavar="ID", help="Only the jobs of an upgrade.")
@click.option("--limit", type=click.IntRange(1, 500), default=30, show_default=True)
def jobs_list(out: Output, state: str | None, campaign: str | None, limit: int) -> None:
    """List jobs, newest first."""
    with config.connect() as client:
        found = client.jobs(state=state, campaign=campaign, limit=limit).items
    out.emit(found, lambda: table(
        ["job", "kind", "state", "queue", "for", "attempt", "worker", "asked", "took"],
        ([job.id, job.kind, job.state, job.queue, _result_of(job), f"{job.attempt}/{job.max_attempts}", job.worker,
          ago(job.created_at), _took(job)] for job in found),
        empty="No jobs. Ask for one: loractl train RECIPE.toml",
    ))  # fmt: skip


@command(jobs, "loractl jobs show j0123", name="show")
@click.argument("job_id", metavar="ID")
def jobs_show(out: Output, job_id: str) -> None:
    """Show a job, its result, and its loss when it is a training."""
    with config.connect() as client:
        job = client.job(job_id)
    out.emit(job, lambda: _ended(job, []))


@command(jobs, "loractl jobs watch j0123", name="watch")
@click.argument("job_id", metavar="ID")
def jobs_watch(out: Output, job_id: str) -> None:
    """Wait for a job with live progress; exits with 1 when it does not succeed."""
    with config.connect() as client:
        job, curve = follow(out, client, client.job(job_id))
    out.emit(job, lambda: _ended(job, curve))


@command(jobs, "loractl jobs logs j0123", "loractl jobs logs j0123 --follow", name="logs")
@click.argument("job_id", metavar="ID")
@click.option("--follow", "go_on", is_flag=True, help="Until the job has ended.")
def jobs_logs(out: Output, job_id: str, go_on: bool) -> None:
    """Print everything that happened to a job."""
    with config.connect() as client:
        client.job(job_id)
        events = client.events(job_id, follow=go_on)
        if out.as_json:
            found = list(events)
            out.emit(found, lambda: None)
            return
        for event in events:
            if (words := told_event(event.kind, event.data)) is not None:
                click.echo(f"{event.at:%H:%M:%S}  {event.attempt}  {event.kind:<12} {words}")


def told_event(kind: str, data: dict[str, Any]) -> str | None:
    """What happened, for people; None for a step of somebody's progress bar."""
    if kind == "log":
        line = _ESCAPES.sub("", str(data.get("line", "")).rpartition("\r")[2])
        return None if _BAR.search(line) else line
    if "detail" in data:  # a refusal
        return "  ".join(str(data[key]) for key in ("code", "detail", "hint") if data.get(key))
    return "  ".join(_pairs(data))


def _pairs(data: dict[str, Any], within: str = "") -> Iterator[str]:
    for key, value in data.items():
        name = f"{within}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _pairs(value, f"{name} ")
        elif key not in ("kind", "task") and value is not None:
            shown = [_plain(item) for item in value] if isinstance(value, list) else [_plain(value)]
            yield f"{name} {', '.join(shown)}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):  # such as what a job made
        return str(value.get("ref") or short(value.get("digest")) or " ".join(_pairs(value)))
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return number(value) if isinstance(value, float) else str(value)


@command(jobs, "loractl jobs cancel j0123", name="cancel")
@click.argument("job_id", metavar="ID")
def jobs_cancel(out: Output, job_id: str) -> None:
    """End a job; a running one is told by its worker's next heartbeat."""
    with config.connect() as client:
        job = client.cancel_job(job_id)
    state = "its worker was told to stop" if job.state == "running" else job.state
    out.emit(job, lambda: click.echo(f"{job.id}: {state}"))


@command(jobs, "loractl jobs retry j0123", name="retry")
@click.argument("job_id", metavar="ID")
@click.option("--no-wait", is_flag=True, help="Leave at once.")
def jobs_retry(out: Output, job_id: str, no_wait: bool) -> None:
    """Queue a failed or cancelled job again."""
    with config.connect() as client:
        job = client.retry_job(job_id)
        if no_wait:
            out.emit(job, lambda: click.echo(f"{job.id}: {job.state}"))
            return
        job, curve = follow(out, client, job)
    out.emit(job, lambda: _ended(job, curve))


def told_rows(counted: dict[str, int]) -> str:
    """What became of a training's rows, where it is told."""
    if not counted:
        return ""
    words = [f"{counted['trained']:,} trained on"]
    words += [f"{counted[key]:,} {key.replace('_', ' ')}" for key in ("held_out", "cut", "dropped") if counted[key]]
    longer = f" (longer than {counted['max_length']:,} tokens)" if counted["cut"] or counted["dropped"] else ""
    return ", ".join(words) + longer


def _but(job: "JobInfo") -> str:
    if job.cancel_requested and job.state == "running":
        return " (cancelling)"
    if job.held_by is not None and job.state in ("queued", "running"):
        return f" (held by the paused upgrade {job.held_by})"
    return ""


def _job(job: "JobInfo", refs: Sequence[str]) -> None:
    result = job.result or {}
    made = ", ".join(str(item.get("ref") or short(item.get("digest"))) for item in result.get("made", []))
    fields({
        "job": job.id,
        "kind": job.kind,
        "state": job.state + _but(job),
        "queue": job.queue,
        "made": made,
        "steps": str(result.get("steps") or ""),
        "learning rate": number(result.get("learning_rate")),
        "rows": told_rows(result.get("rows") or {}),
        "logits": _told_deviation(result.get("deviation")),
        "took": _took(job),
        "worker": job.worker,
        "attempt": f"{job.attempt} of {job.max_attempts}",
        "campaign": job.campaign,
        "origin": job.origin,
        "asked": ago(job.created_at),
        "error": (job.error or {}).get("detail"),
        "help": (job.error or {}).get("hint"),
    })  # fmt: skip
    rows = [
        [_who(name, job, refs), metric, split, number(mean.get("mean")), f"{mean.get('n', 0):.0f}"]
        for name, summary in (result.get("metrics") or {}).items()
        for metric, splits in summary.items()
        for split, mean in splits.items()
    ]
    if rows:
        click.echo()
        table(["adapter", "metric", "split", "mean", "n"], rows)
    if modules := _modules(result.get("modules") or {}):
        click.echo()
        table(["module", "how many", "rank before", "rank now", "least energy kept"], modules)
    if spaces := _spaces(result.get("matches") or {}):
        click.echo()
        table(["space", "layers", "alike before", "alike by the map found", "taken in"], spaces)
    if job.kind == "rebase" and result.get("candidates"):
        click.echo()
        table(["candidate", "steps", "rate", "score", "over scratch", "agreement", ""], tried(result))


def tried(result: dict[str, Any]) -> list[list[str]]:
    """Rows of what a warm start, a distillation or a retraining knew of every start, and of every candidate."""
    starts = [(name, {"steps": 0} | found, "") for name, found in (result.get("starts") or {}).items()]
    taken = {result.get("candidate"): "taken"}
    trained = [(name, found, taken.get(name, "")) for name, found in result["candidates"].items()]
    return [
        [name, str(found.get("steps", "")), number(found.get("learning_rate")), number(found.get("score")),
         _interval(found.get("over_scratch")), number(found.get("agreement")),
         found.get("refused") or found.get("dropped") or word]
        for name, found, word in (*starts, *trained)
    ]  # fmt: skip


def _interval(found: list[float] | None) -> str:
    return f"{number(found[0])} ({number(found[1])} to {number(found[2])})" if found else ""


def _spaces(matches: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of how like two bases are in their spaces, a row for a space of all layers."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, match in matches.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(match)
    return [
        [kind, str(len(found)), *(number(fmean(match[when] for match in found)) for when in ("before", "after")),
         str(sum(match["moved"] for match in found))]
        for kind, found in kinds.items()
    ]  # fmt: skip


def _modules(modules: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of ranks and kept energy, a row for all modules of one kind: those with the same last part of their name."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, module in modules.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(module)
    return [
        [kind, str(len(found)), _span([m["before"] for m in found]), _span([m["after"] for m in found]),
         number(min((m["energy"] for m in found if m["energy"] is not None), default=None))]
        for kind, found in kinds.items()
    ]  # fmt: skip


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _who(name: str, job: "JobInfo", refs: Sequence[str]) -> str:
    adapters = refs or [short(digest) for digest in job.recipe.get("adapters") or []]
    return adapters[int(name)] if name.isdecimal() and int(name) < len(adapters) else name


def _result_of(job: "JobInfo") -> str:
    return str(job.output.get("adapter") or job.output.get("line") or "")


def _took(job: "JobInfo") -> str:
    if job.started_at is None:
        return ""
    seconds = (job.finished_at.timestamp() if job.finished_at else time.time()) - job.started_at.timestamp()
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


COMMANDS: dict[str, click.Command] = {
    "dataset": dataset, "suite": suite, "train": train, "evaluate": evaluate, "merge": merge, "rebase": rebase,
    "jobs": jobs,
}  # fmt: skip
