"""Routes of signing: the keys that a namespace trusts, and whether it requires signatures."""

from fastapi import APIRouter

from registry.schemas import KeyInfo, KeyRequest, Page, RevokeRequest, SigningInfo, SigningRequest
from registry.services import signatures

from .deps import Parts, User

router = APIRouter(prefix="/v1/namespaces/{namespace}", tags=["signing"])


@router.get("/keys")
def list_keys(namespace: str, parts: Parts, caller: User) -> Page[KeyInfo]:
    """Every key of the namespace, oldest first; revoked ones say since when, and why."""
    with parts.database.read() as session:
        return Page(items=[signatures.key_info(row) for row in signatures.keys(session, caller, namespace)])


@router.post("/keys", status_code=201)
def add_key(namespace: str, request: KeyRequest, parts: Parts, caller: User) -> KeyInfo:
    """Let signatures by a public key count in the namespace; adding it again changes nothing."""
    with parts.database.write() as session:
        return signatures.key_info(signatures.add_key(session, caller, namespace, request, parts.clock()))


@router.post("/keys/{fingerprint}/revoke")
def revoke_key(namespace: str, fingerprint: str, request: RevokeRequest, parts: Parts, caller: User) -> KeyInfo:
    """Let nothing count that the key signed, for good; the answer names what follows."""
    with parts.database.write() as session:
        row, follows = signatures.revoke(
            session, caller, namespace, fingerprint, request.reason, parts.clock()
        )
        return signatures.key_info(row, follows)


@router.get("/signing")
def show_signing(namespace: str, parts: Parts, caller: User) -> SigningInfo:
    """Whether the namespace gives only signed versions by alias."""
    with parts.database.read() as session:
        return signatures.signing(session, caller, namespace)


@router.put("/signing")
def set_signing(namespace: str, request: SigningRequest, parts: Parts, caller: User) -> SigningInfo:
    """Give only signed versions by alias from now on, or any again; the answer names what follows."""
    with parts.database.write() as session:
        return signatures.set_required(session, caller, namespace, request.required, parts.clock())
