"""Fits: how adapters of each target set stand to each base, computed once per (base, base, target set).

A pair (base, target set) appears with the first version that has it, a base with its registration; either
completes the rows, so that queries only join. One at a time: two that commit at once would miss each other.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func
from sqlmodel import Session, and_, col, delete, or_, select

from registry.core.base_model import BaseModel
from registry.core.fit import Derivation as Descent
from registry.core.fit import TargetSet as Targets
from registry.core.fit import classify
from registry.core.manifest import canonical_json
from registry.core.route import Signals
from registry.db.models import Base, BaseTable, Derivation, TargetFit, TargetSet, Version

from .blobs import add_once

_LOCK = 0x6C6F7261  # "lora"
"""The advisory lock of who computes fits."""
_REASONS = 12
"""Reasons kept of one fit."""


def ensure_fits(session: Session, *, new: Base) -> int:
    """Compute what is missing about fit to ``new``, of every (old base, target set) that has versions; how many."""
    _one_at_a_time(session)
    known = select(TargetFit.old_id, TargetFit.target_set_id).where(TargetFit.new_id == new.id)
    done = {(old, target) for old, target in session.exec(known)}
    pairs = session.exec(
        select(Version.base_id, Version.target_set_id)
        .where(col(Version.target_set_id).is_not(None), Version.base_id != new.id)
        .distinct()
    )
    missing = [(old, target) for old, target in pairs if target is not None and (old, target) not in done]
    assert new.id is not None
    return _compute(session, ((old, new.id, target) for old, target in missing))


def ensure_pair(session: Session, *, old: Base, target_set_id: int) -> int:
    """Compute how adapters that patch this target set of ``old`` stand to every other base; how many were missing."""
    _one_at_a_time(session)
    others = select(Base.id).where(Base.id != old.id)
    known = select(TargetFit.new_id).where(TargetFit.old_id == old.id, TargetFit.target_set_id == target_set_id)
    done = set(session.exec(known).all())
    missing = {new for new in session.exec(others) if new is not None} - done
    assert old.id is not None
    return _compute(session, ((old.id, new, target_set_id) for new in sorted(missing)))


def recompute(session: Session, *, old: Base, new: Base) -> int:
    """Compute again how adapters on ``old`` stand to ``new``, after a measurement; how many."""
    _one_at_a_time(session)
    return _again(session, and_(col(TargetFit.old_id) == old.id, col(TargetFit.new_id) == new.id))


def recompute_all(session: Session, base: Base) -> int:
    """Compute again all fits from and to ``base``, whose tokenizer came or changed; how many."""
    _one_at_a_time(session)
    return _again(session, or_(col(TargetFit.old_id) == base.id, col(TargetFit.new_id) == base.id))


def _again(session: Session, which: ColumnElement[bool]) -> int:
    rows = session.exec(select(TargetFit).where(which)).all()
    triples = [(row.old_id, row.new_id, row.target_set_id) for row in rows]
    session.exec(delete(TargetFit).where(which))
    session.expire_all()
    return _compute(session, triples)


def _one_at_a_time(session: Session) -> None:
    """Wait until others that compute fits have committed; what they made is seen by the next statement.

    Writers of SQLite are one at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.exec(select(func.pg_advisory_xact_lock(_LOCK)))


def keep_target_set(session: Session, targets: Targets) -> TargetSet:
    """The row of a target set, made with the first adapter that has it."""
    digest = str(targets.digest)
    add_once(session, TargetSet, {"digest": digest, "body": canonical_json(list(targets.tensors))})
    return session.exec(select(TargetSet).where(TargetSet.digest == digest)).one()


def model_of(session: Session, base_id: int) -> BaseModel:
    """The base model of a row, from its table."""
    row = session.get(BaseTable, base_id)
    assert row is not None
    return BaseModel.from_compressed(row.body)


def _compute(session: Session, triples: Iterable[tuple[int, int, int]]) -> int:
    models: dict[int, BaseModel] = {}
    sets: dict[int, Targets] = {}
    made: list[dict[str, Any]] = []
    for old_id, new_id, target_id in triples:
        for base_id in (old_id, new_id):
            if base_id not in models:
                models[base_id] = model_of(session, base_id)
        if target_id not in sets:
            sets[target_id] = _targets(session, target_id)
        descent = _descent(session, old_id, new_id)
        drift = measured_drift(session, old_id=old_id, new_id=new_id)
        fit = classify(sets[target_id], models[old_id], models[new_id], descent, drift)
        made.append(
            {
                "old_id": old_id,
                "new_id": new_id,
                "target_set_id": target_id,
                "fit": str(fit.class_),
                "reasons": [{"subject": reason.subject, "text": reason.text} for reason in fit.reasons[:_REASONS]],
                "vocabulary_changed": fit.vocabulary_changed,
                "drift": fit.drift,
            }
        )
    if made:
        add_once(session, TargetFit, *made)
    return len(made)


def _targets(session: Session, target_id: int) -> Targets:
    row = session.get(TargetSet, target_id)
    assert row is not None
    return Targets(tuple(json.loads(row.body)))


def signals(session: Session, *, old: Base, new: Base, target_set_id: int | None) -> Signals:
    """What was measured between two bases for adapters with this target set: what routing starts from."""
    assert old.id is not None and new.id is not None
    if old.id == new.id:
        return Signals(lineage="same")
    if target_set_id is None:
        return Signals()
    descent = _descent(session, old.id, new.id)
    drift = measured_drift(session, old_id=old.id, new_id=new.id) or {}
    found = [drift[name] for name in _targets(session, target_set_id).tensors if isinstance(drift.get(name), float)]
    stored = session.get(TargetFit, (old.id, new.id, target_set_id))
    return Signals(
        lineage=descent.kind if descent else "continued" if drift else "unknown",
        drift=stored.drift if stored else None,
        most=max(found, default=None),
    )


def measured_drift(session: Session, *, old_id: int, new_id: int) -> dict[str, float] | None:
    """Tensor -> ‖W2 − W1‖/‖W1‖ by the newest measurement; what somebody only declared is none."""
    rows = reversed(_measured(session, old_id, new_id))
    return next((row.detail["drift"] for row in rows if row.detail.get("drift")), None)


def _descent(session: Session, old_id: int, new_id: int) -> Descent | None:
    """How ``new`` came from ``old``, where that was measured."""
    for row in _measured(session, old_id, new_id):
        if row.kind in ("cast", "quantised"):
            return Descent("cast" if row.kind == "cast" else "quantised", True, row.detail.get("error"))
    return None


def _measured(session: Session, old_id: int, new_id: int) -> Sequence[Derivation]:
    between = (Derivation.child_id == new_id, Derivation.parent_id == old_id, Derivation.evidence == "measured")
    return session.exec(select(Derivation).where(*between).order_by(col(Derivation.id))).all()
