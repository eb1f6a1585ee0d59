"""The local store's signed URLs: ``/store/{key}?…``. The signature is the permission, so there is no token here.

Bytes are hashed and written in a thread, a few MiB at a time, while the next ones are received.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

from registry.core.errors import SignatureRefused
from registry.storage.base import CHECKSUM_HEADER
from registry.storage.local import Grant, Landing, LocalStore

BATCH = 2 << 20


class BlobResponse(FileResponse):
    """A file, whole or in ranges, in pieces large enough that threads do not cost more than bytes."""

    chunk_size = 1 << 20


def store_router(store: LocalStore) -> APIRouter:
    """The routes that serve ``store``; refusals are raised as they are."""
    router = APIRouter(prefix="/store", include_in_schema=False)

    @router.put("/{key:path}")
    async def put(key: str, request: Request) -> Response:
        grant = store.granted("PUT", key, request.query_params)
        _check_headers(grant, request)
        landing = await asyncio.to_thread(store.receive, grant)
        try:
            await _receive(landing, request.stream())
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            await asyncio.to_thread(landing.close)
        return Response(status_code=200)

    @router.get("/{key:path}")
    async def get(key: str, request: Request) -> Response:
        grant = store.granted("GET", key, request.query_params)
        path = await asyncio.to_thread(store.path, key)
        headers = {"X-Content-Type-Options": "nosniff"}
        filename = grant.filename or None
        return BlobResponse(path, headers=headers, media_type="application/octet-stream", filename=filename)

    return router


def _check_headers(grant: Grant, request: Request) -> None:
    """A signed header that is left out or changed is refused, as S3 does."""
    wanted = {"content-length": str(grant.size), CHECKSUM_HEADER: grant.sha256.base64 if grant.sha256 else ""}
    for name, value in wanted.items():
        if not hmac.compare_digest(value.encode(), request.headers.get(name, "").encode()):
            raise SignatureRefused(reason=f"it was signed for {name}: {value}")


async def _receive(landing: Landing, chunks: AsyncIterator[bytes]) -> None:
    """All ``chunks`` into ``landing``: one batch is written while the next is received."""
    writing: asyncio.Future[None] | None = None
    batch: list[bytes] = []
    size = 0
    try:
        async for chunk in chunks:
            batch.append(chunk)
            size += len(chunk)
            if size >= BATCH:
                if writing is not None:
                    await writing
                writing = asyncio.ensure_future(asyncio.to_thread(landing.write, batch))
                batch, size = [], 0
    finally:
        if writing is not None:
            await writing
    await asyncio.to_thread(landing.write, batch)
    await asyncio.to_thread(landing.keep)
