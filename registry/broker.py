"""Wake workers: the only Celery in the registry.

A message says "there may be work on this queue" and nothing else; the database is the truth
(docs/adr/0001-the-database-is-the-truth.md). It is sent after the commit, and a broker that is down, or
that lost everything, costs time only: the reconciler wakes again.
"""

import structlog
from celery import Celery
from kombu.exceptions import ChannelError, OperationalError

WAKE = "loractl.wake"
_AT_ONCE = 32
"""Wake-ups sent by one call: enough for any worker that might be idle, soon followed by the next call's."""
_ONE_TRY = {"max_retries": 0, "socket_timeout": 2, "socket_connect_timeout": 2}
"""Whoever asked for work waits for this (kombu alone tries for six seconds), and the reconciler repeats."""
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
            broker_pool_limit=None,  # a connection a message: none that broke is used again, and messages are few
            broker_transport_options=_ONE_TRY if "redis" in url else {},
        )

    def wake(self, queue: str) -> bool:
        """Tell a worker of ``queue`` to look; False when the broker is not there (the reconciler repeats).

        Whatever goes wrong here, what was committed before stays true and is answered so.
        """
        try:
            self._celery.send_task(WAKE, kwargs={"queue": queue}, queue=queue, retry=False)
        except Exception as error:  # noqa: BLE001  # kombu passes on errors of every driver it knows
            log.warning("broker-unreachable", queue=queue, reason=type(error).__name__)
            return False
        return True

    def wake_for(self, queue: str, jobs: int) -> int:
        """One wake-up a waiting job, less those that lie in the queue unheard; how many were sent.

        So a queue whose workers are away does not fill up, and after a lost broker all idle workers hear of it.
        """
        try:
            with self._celery.connection_for_write() as connection:
                unheard = _length(connection.default_channel, queue)
        except Exception as error:  # noqa: BLE001  # as above
            log.warning("broker-unreachable", queue=queue, reason=type(error).__name__)
            return 0
        lacking = min(jobs, _AT_ONCE) - unheard
        return sum(self.wake(queue) for _ in range(lacking))

    def ping(self) -> str | None:
        """None when the broker answers, else why not."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=0, timeout=2)
        except (OperationalError, OSError) as error:
            return str(error) or type(error).__name__
        return None


def _length(channel: object, queue: str) -> int:
    try:
        declared = channel.queue_declare(queue=queue, passive=True)  # type: ignore[attr-defined]
    except ChannelError:
        return 0  # nobody sent to it yet
    found: int = declared.message_count
    return found
