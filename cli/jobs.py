"""Commands about jobs themselves: list, show, watch, logs, cancel, retry."""

import re
from collections.abc import Iterator
from typing import Any

import click

from . import config
from .following import follow, told_end
from .output import Output, ago, command, number, short, table
from .results import result_of, took

_BAR = re.compile(r"\d+%\|.*\||\b\d+(\.\d+)?\w?(it|\w+) \[\d+:\d+|\[\d+:\d+<.*\]")
"""A line of tqdm, such as "Loading weights:  12%|█▎  | 3/25 [00:00<00:01, 20it/s]"."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@click.group("jobs", short_help="Jobs: list, show, watch, logs, cancel, retry.")
def jobs() -> None:
    """Work that was asked for: its state, progress and results."""


@command(jobs, "loractl jobs list", "loractl jobs list --state running --json", name="list")
@click.option("--state", type=click.Choice(["queued", "running", "succeeded", "failed", "cancelled"]))
@click.option("--campaign", metavar="ID", help="Only the jobs of an upgrade.")
@click.option("--limit", type=click.IntRange(1, 500), default=30, show_default=True)
def jobs_list(out: Output, state: str | None, campaign: str | None, limit: int) -> None:
    """List jobs, newest first."""
    with config.connect() as client:
        found = client.jobs(state=state, campaign=campaign, limit=limit).items
    out.emit(found, lambda: table(
        ["job", "kind", "state", "queue", "for", "asked", "took"],
        ([job.id, job.kind, job.state + (f" {job.attempt}/{job.max_attempts}" if job.attempt > 1 else ""),
          "" if job.queue == "cpu" else job.queue, result_of(job), ago(job.created_at), took(job)] for job in found),
        empty="No jobs. Ask for one: loractl train RECIPE.toml",
    ))  # fmt: skip


@command(jobs, "loractl jobs show j0123", name="show")
@click.argument("job_id", metavar="ID")
def jobs_show(out: Output, job_id: str) -> None:
    """Show a job, its result, and its loss when it is a training."""
    with config.connect() as client:
        job = client.job(job_id)
    out.emit(job, lambda: told_end(job, []))


@command(jobs, "loractl jobs watch j0123", name="watch")
@click.argument("job_id", metavar="ID")
def jobs_watch(out: Output, job_id: str) -> None:
    """Wait for a job with live progress; exits with 1 when it does not succeed."""
    with config.connect() as client:
        job, curve = follow(out, client, client.job(job_id))
    out.emit(job, lambda: told_end(job, curve))


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
    out.emit(job, lambda: told_end(job, curve))


COMMANDS: dict[str, click.Command] = {"jobs": jobs}
