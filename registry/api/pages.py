"""Cursors of pages: opaque text on the wire, the last key seen inside."""

import base64
import binascii
import json
from typing import Annotated, Any

from fastapi import Query

from registry.core.errors import BadRequest
from registry.core.manifest import check_json

Limit = Annotated[int, Query(ge=1, le=500)]


def cursor(*key: Any) -> str:
    """A cursor that stands behind ``key``."""
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def behind(text: str | None, start: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key in a cursor, ``start`` without one; `BadRequest` for a text that is none of ours."""
    if text is None:
        return start
    try:
        key = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        check_json(key)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise BadRequest(problems=f"'{text[:50]}' is not a cursor of this registry") from error
    if not isinstance(key, list) or [type(part) for part in key] != [type(part) for part in start]:
        raise BadRequest(problems=f"'{text[:50]}' is not a cursor of this list")
    if any(isinstance(part, int) and not 0 <= part < 1 << 63 for part in key):
        raise BadRequest(problems=f"'{text[:50]}' is not a cursor of this list")
    return tuple(key)
