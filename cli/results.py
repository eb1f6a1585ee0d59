"""A job as tables: what it is, who was tried, and what came of it."""

import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from .output import ago, fields, number, short, table

if TYPE_CHECKING:
    from registry.schemas import JobInfo


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


def _inputs(job: "JobInfo") -> dict[str, str]:
    """What its recipe is about, by name where that is known."""

    def called(*keys: str) -> str:
        found = (job.recipe.get(key) or [] for key in keys)
        digests = [one for some in found for one in ([some] if isinstance(some, str) else some)]
        return ", ".join(job.names.get(digest, short(digest)) for digest in digests)

    return {
        "base": called("base"),
        "from": called("old") if job.recipe.get("old") != job.recipe.get("base") else "",
        "adapter": called("adapter", "adapters"),
        "suite": called("suite"),
        "data": called("datasets", "inputs"),
    }


def job_lines(job: "JobInfo", refs: Sequence[str]) -> None:
    """Print what a job is; ``refs``: what people call its adapters."""
    result = job.result or {}
    made = ", ".join(str(item.get("ref") or short(item.get("digest"))) for item in result.get("made", []))
    fields({
        "job": job.id,
        "kind": job.kind,
        "state": job.state + _but(job),
        "queue": job.queue,
        **_inputs(job),
        "made": made,
        "steps": str(result.get("steps") or ""),
        "learning rate": number(result.get("learning_rate")),
        "rows": told_rows(result.get("rows") or {}),
        "logits": told_deviation(result.get("deviation")),
        "took": took(job),
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
    adapters = refs or [job.names.get(digest, short(digest)) for digest in job.recipe.get("adapters") or []]
    return adapters[int(name)] if name.isdecimal() and int(name) < len(adapters) else name


def result_of(job: "JobInfo") -> str:
    """Where what it makes goes to."""
    return str(job.output.get("adapter") or job.output.get("line") or "")


def took(job: "JobInfo") -> str:
    """How long it ran, or has been running."""
    if job.started_at is None:
        return ""
    seconds = (job.finished_at.timestamp() if job.finished_at else time.time()) - job.started_at.timestamp()
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def told_deviation(deviation: dict[str, Any] | None) -> str:
    """How far the logits of a merged model are from those of base and adapter, where it was measured."""
    if deviation is None:
        return ""
    return (
        f"off by {deviation['largest']:.2g} at most ({deviation['relative']:.2g} of their norm); "
        f"the same token is the likeliest at {deviation['agreement']:.1%} of {deviation['positions']} positions"
    )
