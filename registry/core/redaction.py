"""Text without secrets, for whatever leaves a process beside its answers: logs and traces.

The second line of defence; the first is to put none there. Cut out are secrets of tokens, signatures in URLs,
passwords in URLs, and every value under a name that holds a secret.
"""

import re

_SECRET_KEYS = re.compile(r"token|secret|password|authorization|signature|key$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(lora_[A-Za-z0-9]+_)[A-Za-z0-9_-]+|((?:X-Amz-[A-Za-z-]+|signature|sig)=)[^&\s\"']+|(://[^:/@\s]*:)[^@/\s]+@"
)


def clean(key: object, value: object) -> object:
    """``value`` as it may be shown under ``key``."""
    return "***" if isinstance(key, str) and _SECRET_KEYS.search(key) and value else redact(value)


def redact(value: object) -> object:
    """Text without tokens, signatures and passwords of URLs, inside lists and mappings too."""
    match value:
        case str():
            return _SECRET_TEXT.sub(lambda m: f"{m[1] or m[2] or m[3]}***{'@' if m[3] else ''}", value)
        case dict():
            return {key: clean(key, part) for key, part in value.items()}
        case list() | tuple():
            return [redact(part) for part in value]
        case _:
            return value
