"""The Celery app of a worker: ``celery -A workers.app worker -Q cpu``.

A message only wakes (docs/adr/0001-the-database-is-the-truth.md): early acks, prefetch 1, no result
backend, no times of arrival. The worker needs a URL, a token and a broker; nothing else of the registry.
"""

import os

from celery import Celery

from registry import logs
from registry.settings import WorkerSettings

settings = WorkerSettings.from_environment(os.environ)
app = Celery("workers", broker=settings.broker_url, include=["workers.tasks"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_concurrency=1,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    accept_content=["json"],
)
logs.configure(settings.log_level)
