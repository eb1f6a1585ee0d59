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
    return {key: "***" if _SECRET_KEYS.search(key) and value else redact(value) for key, value in event.items()}


def redact(value: object) -> object:
    """Text without tokens, signatures and passwords of URLs; other values as they are."""
    if not isinstance(value, str):
        return value
    return _SECRET_TEXT.sub(lambda m: f"{m[1] or m[2] or m[3]}***{'@' if m[3] else ''}", value)


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True


def configure(level: str = "info") -> None:
    """Log as JSON lines on stderr from ``level`` on; called once by each process's edge."""
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
    handler.addFilter(_Redacting())
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)
