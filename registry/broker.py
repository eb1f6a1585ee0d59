"""Wake workers: the only Celery in the registry.

A message says "there may be work on this queue" and nothing else; the database is the truth
(docs/adr/0001-the-database-is-the-truth.md). It is sent after the commit, and a broker that is down
costs time only: the reconciler wakes again.
"""

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

WAKE = "loractl.wake"
_STALE_S = 60
"""A busy worker finds only fresh wake-ups when it is free again; the reconciler repeats them."""
log = structlog.get_logger()


class Broker:
    """A connection to the broker that sends wake-ups by task name."""

    def __init__(self, url: str) -> None:
        """``url`` as kombu spells it: ``redis://…``, or ``sqla+sqlite:///…`` in embedded mode."""
        self._celery = Celery("registry", broker=url, set_as_current=False)
        self._celery.conf.update(
            task_ignore_result=True,
            task_serializer="json",
            broker_connection_retry_on_startup=False,
            broker_transport_options={"socket_timeout": 2, "socket_connect_timeout": 2} if "redis" in url else {},
        )

    def wake(self, queue: str) -> bool:
        """Tell the workers of ``queue`` to look; False when the broker is not there (the reconciler repeats)."""
        try:
            self._celery.send_task(WAKE, kwargs={"queue": queue}, queue=queue, retry=False, expires=_STALE_S)
        except (OperationalError, OSError) as error:
            log.warning("broker-unreachable", queue=queue, reason=type(error).__name__)
            return False
        return True

    def ping(self) -> str | None:
        """None when the broker answers, else why not."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except (OperationalError, OSError) as error:
            return str(error) or type(error).__name__
        return None
