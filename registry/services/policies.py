"""Policies: revisioned per adapter, with a default per namespace."""

from datetime import datetime

from sqlmodel import Session

from registry.core.errors import DatasetNotFound, GateImpossible, PolicyNotFound
from registry.core.gate import smallest_n
from registry.core.names import Reference, SeriesName, check_name
from registry.core.policy import Gate, Policy
from registry.core.recipes import FineTune
from registry.core.records import CONTINUOUS
from registry.db import queries
from registry.db.models import DatasetVersion, StoredPolicy

from .tokens import Caller


def effective(session: Session, namespace: str, name: str) -> Policy:
    """The adapter's policy, else its namespace's, else the empty one: no gates."""
    found = stored(session, namespace, name)
    return Policy.model_validate(found.body) if found else Policy()


def stored(session: Session, namespace: str, name: str) -> StoredPolicy | None:
    """The row that is in force for a series (``name`` empty: for the namespace)."""
    own = queries.newest_policy(session, namespace, name) if name else None
    return own or queries.newest_policy(session, namespace, "")


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

    `DatasetNotFound` for a suite that is not there, `GateImpossible` for a gate that never can pass.
    """
    caller.require("promote", namespace)
    check_name(namespace, "namespace")
    if name:
        check_name(name, "adapter name")
    notes = []
    for gate in (*policy.gates, *((policy.guard,) if policy.guard else ())):
        suite = suite_of(session, caller, gate)
        needed = smallest_n(gate, policy)
        if needed is None or suite.gate_rows < needed:
            raise GateImpossible(
                suite=gate.suite,
                n=suite.gate_rows,
                margin=str(gate.margin),
                needed=needed or "any number of items",
                name=f"{namespace}/{name}" if name else namespace,
            )
        kind = "at least" if gate.metric in CONTINUOUS else "without a flip, at least"
        notes.append(f"{gate.suite}: {suite.gate_rows} gate items; {kind} {needed} are needed at margin {gate.margin}")
    if policy.recipe is not None:
        FineTune.model_validate_json(policy.recipe)
    newest = queries.newest_policy(session, namespace, name)
    row = StoredPolicy(
        namespace=namespace,
        name=name,
        revision=newest.revision + 1 if newest else 1,
        body=policy.model_dump(mode="json"),
        created_by=caller.token_id,
        created_at=now,
    )
    session.add(row)
    session.flush()
    return row, notes


def suite_of(session: Session, caller: Caller | None, gate: Gate) -> DatasetVersion:
    """The suite version a gate means: the newest where its reference names none; `DatasetNotFound`."""
    reference = Reference.parse(gate.suite, "suite")
    series: SeriesName = reference.series
    visible = caller is None or caller.can("read", series.namespace)
    found = queries.dataset_version(
        session, "suite", series.namespace, series.name, reference.version,
        str(reference.digest) if reference.digest else None,
    ) if visible else None
    if found is None:
        raise DatasetNotFound(kind="suite", ref=gate.suite, nearest="")
    return found
