"""Structured logs: events are constant, data are keywords, objects are ids; secrets never get here.

One JSON object a line on stderr. Values under names that hold secrets, and query strings of signed URLs,
are cut out by a processor as a second line of defence; the first is not to log them
(`tests/test_logs.py`).
"""

import logging
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger

from . import traces
from .core.redaction import clean, redact


def without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """``event`` with secret values replaced by ``***``."""
    return {key: clean(key, value) for key, value in event.items()}


def with_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """``event`` with the id of the trace that it belongs to, if it does to one."""
    place = traces.current()
    return event if place is None else {**event, "trace": place.split("-")[1]}


class _Redacting(logging.Formatter):
    """Lines of libraries: the whole text is cleaned, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


def configure(level: str = "info") -> None:
    """Log as JSON lines on stderr from ``level`` on; called once by each process's edge.

    Libraries log from warnings on, through the same cleaning; so do uvicorn's loggers, whose own handlers
    would print the query strings of signed URLs.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            with_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            without_secrets,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
