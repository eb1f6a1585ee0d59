"""Evaluations: what a claimed job measured, as a summary in a row and records per item in a blob.

They come in only through the end of a job (`registry.services.jobs`), which is why a gate may trust them.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlmodel import Session, col, select

from registry.core.digest import Digest
from registry.core.gate import Verdict
from registry.core.policy import Evidence
from registry.core.records import Record, summary
from registry.db import queries
from registry.db.models import Adapter, Base, DatasetVersion, Evaluation, Version
from registry.schemas import EvaluationInfo
from registry.storage.base import BlobStore

from .gates import Scored, verdict
from .policies import effective


def record(
    session: Session,
    store: BlobStore,
    *,
    base: Base,
    version: Version | None,
    suite: DatasetVersion,
    harness: str,
    records: Sequence[Record],
    blob: Digest,
    job_id: str,
    seconds: float,
    now: datetime,
) -> Evaluation:
    """A new evaluation; a merely declared binding becomes behavioural when the version is shown to add value.

    That takes the records of the version and of its bare base, in whichever order they come.
    """
    assert base.id is not None and suite.id is not None
    row = Evaluation(
        base_id=base.id,
        version_id=version.id if version else None,
        suite_id=suite.id,
        harness=harness,
        summary={metric: dict(by_split) for metric, by_split in summary(records).items()},
        records=str(blob),
        job_id=job_id,
        seconds=seconds,
        created_at=now,
    )
    session.add(row)
    session.flush()
    declared = select(Version).where(Version.base_id == base.id, Version.evidence == Evidence.DECLARED)
    if version is not None:
        declared = declared.where(Version.id == version.id)
    else:
        scored = select(Evaluation.version_id).where(Evaluation.base_id == base.id, queries.on_suite(suite.digest))
        declared = declared.where(col(Version.id).in_(scored))
    for waiting in session.exec(declared).all():
        _strengthen(session, store, base, waiting)
    return row


def _strengthen(session: Session, store: BlobStore, base: Base, version: Version) -> None:
    adapter = session.get_one(Adapter, version.adapter_id)
    policy = effective(session, adapter.namespace, adapter.name)
    found = verdict(session, store, policy, candidate=Scored(base, version), serving=None)
    if isinstance(found, Verdict) and found.adds_value:
        shown = next(str(criterion) for criterion in found.criteria if criterion.name == "adds-value")
        version.evidence = Evidence.BEHAVIOURAL
        version.binding = {**version.binding, "behavioural": shown}
        session.add(version)


def listed(session: Session, adapter: Adapter, *, after: int, limit: int) -> Sequence[Evaluation]:
    """Evaluations of an adapter's versions, oldest first, after a cursor."""
    query = (
        select(Evaluation)
        .join(Version)
        .where(Version.adapter_id == adapter.id, col(Evaluation.id) > after)
        .order_by(col(Evaluation.id))
        .limit(limit)
    )
    return session.exec(query).all()


def described(session: Session, rows: Sequence[Evaluation]) -> list[EvaluationInfo]:
    """Evaluations in the words of the wire; four queries for any number."""
    bases = {b.id: b for b in session.exec(select(Base).where(col(Base.id).in_({r.base_id for r in rows})))}
    suites = queries.dataset_refs(session, {row.suite_id for row in rows})
    ids = {row.version_id for row in rows if row.version_id is not None}
    query = select(Version.id, Adapter.namespace, Adapter.name, Version.number).join(Adapter)
    refs = {i: f"{ns}/{name}@v{n}" for i, ns, name, n in session.exec(query.where(col(Version.id).in_(ids)))}
    return [
        EvaluationInfo(
            base=bases[row.base_id].digest,
            version=refs.get(row.version_id) if row.version_id else None,
            suite=suites[row.suite_id],
            summary=row.summary,
            records=row.records,
            job=row.job_id,
            created_at=row.created_at,
        )
        for row in rows
    ]
