"""Routes of tokens: make, list, revoke."""

from fastapi import APIRouter

from registry.db.models import Token
from registry.schemas import NewToken, Page, TokenInfo, TokenRequest
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
def list_tokens(parts: Parts, caller: User) -> Page[TokenInfo]:
    """Tokens that the caller administers."""
    with parts.database.read() as session:
        return Page(items=[_info(token) for token in tokens.listed(session, caller)])


@router.delete("/{identity}")
def revoke_token(identity: str, parts: Parts, caller: User) -> TokenInfo:
    """Refuse the token from now on, on every API process within a second."""
    with parts.database.write() as session:
        info = _info(tokens.revoke(session, caller, identity, parts.clock()))
    parts.forget(identity)
    return info
