"""Structured logs: events are constant, data are keywords, objects are ids; secrets never get here.

One JSON object a line on stderr. Values under names that hold secrets, and query strings of signed URLs,
are cut out by a processor as a second line of defence; the first is not to log them
(`tests/test_logs.py`).
"""

import logging
import re
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger

_SECRET_KEYS = re.compile(r"token|secret|password|authorization|signature|key$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(lora_[A-Za-z0-9]+_)[A-Za-z0-9_-]+|((?:X-Amz-[A-Za-z-]+|signature|sig)=)[^&\s\"']+|(://[^:/@\s]*:)[^@/\s]+@"
)


def without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """``event`` with secret values replaced by ``***``."""
    return {key: _clean(key, value) for key, value in event.items()}


def _clean(key: object, value: object) -> object:
    return "***" if isinstance(key, str) and _SECRET_KEYS.search(key) and value else redact(value)


def redact(value: object) -> object:
    """Text without tokens, signatures and passwords of URLs, inside lists and mappings too."""
    match value:
        case str():
            return _SECRET_TEXT.sub(lambda m: f"{m[1] or m[2] or m[3]}***{'@' if m[3] else ''}", value)
        case dict():
            return {key: _clean(key, part) for key, part in value.items()}
        case list() | tuple():
            return [redact(part) for part in value]
        case _:
            return value


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
