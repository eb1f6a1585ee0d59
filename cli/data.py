"""Commands about training data and evaluation suites."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.core.names import SeriesName

from . import bases, config
from .output import Output, ago, command, size, table
from .parameters import FILE, METRIC, METRICS

if TYPE_CHECKING:
    from registry.schemas import DatasetInfo


FILE_OR_FOLDER = click.Path(exists=True, path_type=Path)


@click.group("dataset", short_help="Training data: push, list.")
def dataset() -> None:
    """Training data: JSONL files, content-addressed and versioned."""


@click.group("suite", short_help="Evaluation suites: push, list.")
def suite() -> None:
    """Evaluation suites: JSONL with what is measured on it."""


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


COMMANDS: dict[str, click.Command] = {"dataset": dataset, "suite": suite}
