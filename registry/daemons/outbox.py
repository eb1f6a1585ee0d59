"""The outbox: tells webhooks what changed, one row at a time each, to addresses that may be told.

A name is resolved once, its address is checked, and the connection goes to just that address: a name that means
something else a moment later leads nowhere inside. Redirects are not followed.
"""

import asyncio
import socket
from urllib.parse import urlsplit

import httpx
import structlog

from registry.core.errors import AddressRefused
from registry.db.models import AuditRow, Webhook
from registry.parts import Parts
from registry.services import webhooks
from registry.services.seals import Seals

TIMEOUT_S = 10.0
log = structlog.get_logger()


def step(parts: Parts) -> bool:
    """Tell one webhook one thing; whether there was any."""
    now = parts.clock()
    with parts.database.write() as session:
        hook = webhooks.claim(session, now)
    if hook is None:
        return False
    secret = webhooks.secret_of(hook, Seals(parts.settings.seal_keys))
    if secret is None:
        log.warning("webhook-sealed", webhook=hook.id)
        with parts.database.write() as session:
            webhooks.waits(session, hook, "its secret is sealed by a key that LORACTL_SEAL_KEYS lacks", parts.clock())
        return True
    with parts.database.read() as session:
        row, seen = webhooks.following(session, hook)
    error = send(hook, secret, row, parts) if row is not None else None
    with parts.database.write() as session:
        if row is None or error is None:
            webhooks.told(session, hook, seen, parts.clock())
        else:
            webhooks.refused(session, hook, row, error, parts.clock())
    return True


def send(hook: Webhook, secret: str, row: AuditRow, parts: Parts) -> str | None:
    """Post one change; what went wrong, None when the receiver took it (2xx)."""
    told = webhooks.body(row)
    try:
        address = reachable(hook.url, private=parts.settings.webhook_private)
        url, host = httpx.URL(hook.url), urlsplit(hook.url).netloc
        headers = {
            "host": host,
            "content-type": "application/json",
            "user-agent": "loractl-webhook",
            "x-loractl-event": row.event,
            "x-loractl-seq": str(row.seq),
            "x-loractl-signature": webhooks.signature(secret, told, parts.clock()),
        }
        status = asyncio.run(_post(url.copy_with(host=address), told, headers, {"sni_hostname": url.host}))
    except AddressRefused as refusal:
        return refusal.message
    except TimeoutError:
        return f"no answer within {TIMEOUT_S:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None if 200 <= status < 300 else f"HTTP {status}"


async def _post(url: httpx.URL, body: bytes, headers: dict[str, str], extensions: dict[str, str]) -> int:
    """The answer's status, and nothing else of it: a receiver may answer as slowly and as long as it likes.

    `TimeoutError` where all of it took too long.
    """
    async with (
        asyncio.timeout(TIMEOUT_S),
        httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
        client.stream("POST", url, content=body, headers=headers, extensions=extensions) as reply,
    ):
        return reply.status_code


def reachable(url: str, *, private: bool) -> str:
    """The address behind the name in ``url``; `AddressRefused` for one that is not on the internet, unless allowed."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    address = str(found[0][4][0])
    webhooks.check_address(address, parts.hostname or "", private=private)
    return address
