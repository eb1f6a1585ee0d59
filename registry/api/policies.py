"""Routes of policies: of an adapter, and the default of its namespace."""

from fastapi import APIRouter

from registry.core.policy import Policy
from registry.db.models import StoredPolicy
from registry.schemas import PolicyInfo
from registry.services import policies
from registry.services.tokens import Caller

from .deps import AppParts, Parts, User

router = APIRouter(prefix="/v1", tags=["policies"])


def _info(row: StoredPolicy, wanted: str, notes: list[str]) -> PolicyInfo:
    return PolicyInfo(
        name=f"{row.namespace}/{row.name}" if row.name else row.namespace,
        revision=row.revision,
        inherited=row.name != wanted,
        policy=Policy.model_validate(row.body),
        created_by=row.created_by,
        created_at=row.created_at,
        notes=notes,
    )


def _show(parts: AppParts, caller: Caller, namespace: str, name: str) -> PolicyInfo:
    with parts.database.read() as session:
        return _info(policies.show(session, caller, namespace, name), name, [])


def _put(parts: AppParts, caller: Caller, namespace: str, name: str, policy: Policy) -> PolicyInfo:
    with parts.database.write() as session:
        row, notes = policies.put(session, caller, namespace, name, policy, parts.clock())
        return _info(row, name, notes)


@router.get("/adapters/{namespace}/{name}/policy")
def show_policy(namespace: str, name: str, parts: Parts, caller: User) -> PolicyInfo:
    """The policy in force for an adapter: its own, else its namespace's."""
    return _show(parts, caller, namespace, name)


@router.put("/adapters/{namespace}/{name}/policy")
def set_policy(namespace: str, name: str, policy: Policy, parts: Parts, caller: User) -> PolicyInfo:
    """A new revision of an adapter's policy."""
    return _put(parts, caller, namespace, name, policy)


@router.get("/namespaces/{namespace}/policy")
def show_default_policy(namespace: str, parts: Parts, caller: User) -> PolicyInfo:
    """The default policy of a namespace."""
    return _show(parts, caller, namespace, "")


@router.put("/namespaces/{namespace}/policy")
def set_default_policy(namespace: str, policy: Policy, parts: Parts, caller: User) -> PolicyInfo:
    """A new revision of a namespace's default policy."""
    return _put(parts, caller, namespace, "", policy)
