"""The Celery app of a worker: ``celery -A workers.app worker -Q cpu``.

A message only wakes (docs/adr/0001-the-database-is-the-truth.md): early acks, prefetch 1, no result
backend, no times of arrival, and no remote control, so that whoever reaches the broker can wake us and
nothing else. The worker needs a URL, a token and a broker; nothing else of the registry.
"""

import logging
import os
import shutil
from tempfile import mkdtemp

from celery import Celery
from celery.signals import (
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from registry import logs, traces
from registry.settings import WorkerSettings

from .processes import Word, die_with

settings = WorkerSettings.from_environment(os.environ)
_counts = mkdtemp(prefix="loractl-metrics-") if settings.metrics_port else None
if _counts:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _counts  # before prometheus_client is imported; the pool inherits it
from .metrics import Meters, forget, serve  # noqa: E402

meters = Meters()
app = Celery("workers", broker=settings.broker_url, include=["workers.tasks"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_concurrency=1,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # a broker that is away for a night comes back to waiting workers
    accept_content=["json"],
)
if settings.broker_url.startswith("sqla"):
    from kombu.transport.sqlalchemy import Transport

    # How often an idle worker looks (docs/adr/0005). As a transport option it would be passed on to SQLAlchemy.
    Transport.polling_interval = 0.25
logs.configure(settings.log_level)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would name signed URLs


stopping = Word()
"""Said on SIGTERM: jobs that do not end within their grace are handed back (`workers.jobs`)."""


@worker_shutting_down.connect
def _told(**_: object) -> None:
    stopping.say()


@worker_ready.connect
def _ready(**_: object) -> None:
    if settings.metrics_port:
        serve(settings.metrics_host, settings.metrics_port)


@worker_process_shutdown.connect
def _left(pid: int, **_: object) -> None:
    traces.flush()
    forget(pid)


@worker_shutdown.connect
def _ended(**_: object) -> None:
    if _counts:
        shutil.rmtree(_counts, ignore_errors=True)


@worker_process_init.connect
def _bound(**_: object) -> None:
    """A pool process ends with its worker: none goes on alone beside the worker that is started next.

    Each sends traces of its own: a thread that sends does not outlive a fork.
    """
    die_with(os.getppid())()
    traces.configure(os.environ, "worker")
