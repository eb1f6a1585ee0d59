"""Celery's tasks: five lines; the work is in `workers.jobs`."""

from .app import app, meters, settings, stopping
from .jobs import Worker


@app.task(name="loractl.wake")
def wake(queue: str) -> None:
    """There may be work on this queue: take it until there is none."""
    with Worker(settings, stopping=stopping, meters=meters) as worker:
        worker.work(queue)
