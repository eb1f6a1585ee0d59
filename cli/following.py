"""A job that was asked for, followed to its end: bars, curves, and what a Ctrl-C leaves."""

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from registry.core.errors import LoractlError, WorkFailed

from . import config
from .output import Bar, Output, ago, number, plot, sparkline, table
from .results import job_lines, result_of, took
from .searches import show_search

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.schemas import EventInfo, JobInfo, JobRequest


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
    out.emit(job, lambda: told_end(job, curve, refs))


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
    return result_of(job) or job.id


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
             number(min((loss for _, loss in result.get("held_out", [])), default=None)), took(job),
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


def told_end(job: "JobInfo", curve: Sequence[tuple[float, float]], refs: Sequence[str] = ()) -> None:
    """Print what came of a job, with the curve of its loss."""
    result = job.result or {}
    curve = [(float(step), float(loss)) for step, loss in result.get("loss", [])] or curve
    if len(curve) > 1:
        curves = {"loss": curve, "held out": [(float(step), float(loss)) for step, loss in result.get("held_out", [])]}
        click.echo(plot({name: points for name, points in curves.items() if len(points) > 1},
                        title=f"{job.kind} {job.id}", x="step"))  # fmt: skip
    if job.kind == "search" and result:
        show_search(result)
    job_lines(job, refs)
