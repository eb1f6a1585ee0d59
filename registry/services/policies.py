"""Policies: revisioned per adapter, with a default per namespace."""

from datetime import datetime

from sqlmodel import Session

from registry.core.errors import BadRequest, GateLoosened, PolicyNotFound
from registry.core.gate import require_possible
from registry.core.metrics import is_binary
from registry.core.names import check_name
from registry.core.policy import Policy, loosened
from registry.core.recipes import FineTune, parse_recipe
from registry.core.suites import SuiteSpec
from registry.db import queries
from registry.db.models import StoredPolicy

from . import audit, pools
from .gates import every_gate
from .references import find_data, find_dataset
from .tokens import Caller


def effective(session: Session, namespace: str, name: str) -> Policy:
    """The adapter's policy, else its namespace's, else the empty one: no gates."""
    found = stored(session, namespace, name)
    return Policy.model_validate(found.body) if found else Policy()


def stored(session: Session, namespace: str, name: str) -> StoredPolicy | None:
    """The row that is in force for a series (``name`` empty: for the namespace)."""
    return queries.newest_policy(session, namespace, *{name, ""})


def show(session: Session, caller: Caller, namespace: str, name: str) -> StoredPolicy:
    """The policy in force; `PolicyNotFound` where there is none."""
    caller.require("read", namespace)
    found = stored(session, namespace, name)
    if found is None:
        raise PolicyNotFound(name=f"{namespace}/{name}" if name else namespace)
    return found


def put(
    session: Session, caller: Caller, namespace: str, name: str, policy: Policy, now: datetime
) -> tuple[StoredPolicy, list[str]]:
    """A new revision, and notes such as the smallest suite that can pass.

    Whoever may promote sets it, on record. To take the last gate (or the wanted evidence) from an alias, or to ask
    less than before (`GateLoosened`), needs admin, as moving it by force does: else one could be had by the other.
    `DatasetNotFound` for a suite that is not there, `GateImpossible` for a gate that never can pass, `PoolUnusable`
    for a pool that can decide nothing,
    `BadRequest` for a guard or a recipe that is none, or whose datasets the caller may not read.
    """
    check_name(namespace, "namespace")
    if name:
        check_name(name, "adapter name")
    caller.require("promote", namespace)
    for alias in policy.aliases:
        check_name(alias, "alias")
    if policy.guard is not None and policy.guard.margin.of_gain:
        raise BadRequest(problems="guard.margin: a guard has no gain; its margin must be absolute")
    if policy.recipe is not None:
        _check_recipe(session, caller, policy.recipe)
    subject = f"{namespace}/{name}" if name else namespace
    in_force = effective(session, namespace, name)
    if ungated(in_force, policy):
        caller.require("admin", namespace)
    if (less := loosened(in_force, policy)) and not caller.can("admin", namespace):
        raise GateLoosened(name=subject, what="; ".join(less), namespace=namespace)
    note = pools.require_usable(session, caller, policy, subject)
    notes = [note] if note else []
    for gate in every_gate(policy):
        suite = find_dataset(session, caller, "suite", gate.suite)
        if gate.metric not in (measured := SuiteSpec.parse(suite.spec).measured()):
            told = f"{gate.suite} does not measure {gate.metric}, so its gate could never open"
            raise BadRequest(problems=f"{told}; what it measures: {', '.join(measured)}")
        needed = require_possible(gate, policy, n=suite.gate_rows, name=subject)
        kind = "without a flip, at least" if is_binary(gate.metric) else "at least"
        notes.append(f"{gate.suite}: {suite.gate_rows} gate items; {kind} {needed} are needed at margin {gate.margin}")
    if name and queries.adapter_by_name(session, namespace, name) is None:
        notes.append(f"there is no adapter {subject} yet: the policy waits for its first push")
    before = queries.newest_policy(session, namespace, name)
    row = StoredPolicy(
        namespace=namespace,
        name=name,
        revision=before.revision + 1 if before else 1,
        body=policy.model_dump(mode="json"),
        created_by=caller.token_id,
        created_at=now,
    )
    session.add(row)
    session.flush()
    audit.record(
        session,
        "policy.set",
        subject,
        actor=caller.token_id,
        namespace=namespace,
        now=now,
        before=before.body if before else None,
        after=row.body,
    )
    return row, notes


def ungated(before: Policy, after: Policy) -> set[str]:
    """Aliases that had gates, or wanted evidence, and have none any more."""

    def without(kept: object) -> set[str]:
        return set(before.aliases) - set(after.aliases if kept else ())

    return (without(after.gates) if before.gates else set()) | (without(after.evidence) if before.evidence else set())


def _check_recipe(session: Session, caller: Caller, text: str) -> None:
    recipe = parse_recipe(text.encode())
    if not isinstance(recipe, FineTune):
        raise BadRequest(problems="recipe: expected one of kind 'finetune'")
    for digest in recipe.datasets:
        find_data(session, caller, "dataset", digest)
