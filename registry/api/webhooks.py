"""Routes of webhooks: add, list, remove, test."""

from fastapi import APIRouter

from registry.schemas import NewWebhook, Page, WebhookInfo, WebhookRequest
from registry.services import webhooks
from registry.services.seals import Seals

from .deps import Parts, User

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post("", status_code=201)
def add_webhook(request: WebhookRequest, parts: Parts, caller: User) -> NewWebhook:
    """Tell an address what changes from now on; the secret that signs is in this answer and nowhere else."""
    with parts.database.write() as session:
        seals, private = Seals(parts.settings.seal_keys), parts.settings.webhook_private
        row, secret = webhooks.add(session, caller, request, parts.clock(), seals, private=private)
        return NewWebhook.model_validate(row.model_dump() | {"secret": secret})


@router.get("")
def list_webhooks(parts: Parts, caller: User) -> Page[WebhookInfo]:
    """Webhooks that the caller administers, and how they fare."""
    with parts.database.read() as session:
        return Page(items=[WebhookInfo.model_validate(row.model_dump()) for row in webhooks.listed(session, caller)])


@router.delete("/{identity}", status_code=204)
def remove_webhook(identity: str, parts: Parts, caller: User) -> None:
    """Tell it nothing more."""
    with parts.database.write() as session:
        webhooks.remove(session, caller, identity, parts.clock())


@router.post("/{identity}/test")
def test_webhook(identity: str, parts: Parts, caller: User) -> WebhookInfo:
    """Let it be told a ``webhook.test``, on the way that everything goes."""
    with parts.database.write() as session:
        return WebhookInfo.model_validate(webhooks.test(session, caller, identity, parts.clock()).model_dump())
