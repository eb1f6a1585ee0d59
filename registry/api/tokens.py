"""Routes of tokens: make, list, rotate, revoke."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from registry.db.models import Token
from registry.schemas import NewToken, Page, RotateRequest, TokenInfo, TokenRequest
from registry.services import tokens

from .deps import Parts, User

router = APIRouter(prefix="/v1/tokens", tags=["tokens"])


def _info(token: Token) -> TokenInfo:
    return TokenInfo.model_validate(token, from_attributes=True)


@router.post("", status_code=201)
def create_token(request: TokenRequest, parts: Parts, caller: User) -> NewToken:
    """Make a token; its text is in this answer and nowhere else."""
    with parts.database.write() as session:
        token, text = tokens.create(session, caller, **request.model_dump(), now=parts.clock())
        return NewToken(**_info(token).model_dump(), token=text)


@router.get("")
def list_tokens(
    parts: Parts, caller: User, prefix: Annotated[str, Query(max_length=21)] = ""
) -> Page[TokenInfo]:
    """Tokens that the caller administers; with ``prefix`` those whose text begins so: lora_ID, or a part of it."""
    with parts.database.read() as session:
        return Page(items=[_info(token) for token in tokens.listed(session, caller, prefix)])


@router.post("/{identity}/rotate")
def rotate_token(identity: str, request: RotateRequest, parts: Parts, caller: User) -> NewToken:
    """A new secret, in this answer and nowhere else; the old one is good for ``grace_s`` seconds more."""
    settings = parts.settings
    fixed = {tokens.split(text)[0] for text in (settings.bootstrap_token, settings.bootstrap_worker_token) if text}
    with parts.database.write() as session:
        token, text = tokens.rotate(
            session, caller, identity, timedelta(seconds=request.grace_s), parts.clock(), fixed=fixed
        )
        made = NewToken(**_info(token).model_dump(), token=text)
    parts.forget(identity)
    return made


@router.delete("/{identity}")
def revoke_token(identity: str, parts: Parts, caller: User) -> TokenInfo:
    """Refuse the token from now on, on every API process within a second."""
    with parts.database.write() as session:
        info = _info(tokens.revoke(session, caller, identity, parts.clock()))
    parts.forget(identity)
    return info
