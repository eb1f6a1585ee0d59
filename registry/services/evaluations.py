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

from . import audit
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
    told = {"base": base.digest, "version": version.digest if version else None, "suite": suite.digest}
    of = session.get_one(Adapter, version.adapter_id).namespace if version else None
    audit.record(session, "evaluation.recorded", job_id, actor=audit.ITSELF, namespace=of, now=now, after=told)
    declared = select(Version).where(Version.base_id == base.id, Version.evidence == Evidence.DECLARED)
    if version is not None:
        declared = declared.where(Version.id == version.id)
    else:
        scored = select(Evaluation.version_id).where(Evaluation.base_id == base.id, queries.on_suite(suite.digest))
        declared = declared.where(col(Version.id).in_(scored))
    for waiting in session.exec(declared).all():
        _strengthen(session, store, base, waiting, now)
    return row


def _strengthen(session: Session, store: BlobStore, base: Base, version: Version, now: datetime) -> None:
    adapter = session.get_one(Adapter, version.adapter_id)
    policy = effective(session, adapter.namespace, adapter.name)
    found = verdict(session, store, policy, candidate=Scored(base, version), serving=None)
    if isinstance(found, Verdict) and found.adds_value:
        shown = next(str(criterion) for criterion in found.criteria if criterion.name == "adds-value")
        audit.record(
            session,
            "version.evidence",
            f"{adapter.namespace}/{adapter.name}@v{version.number}",
            actor=audit.ITSELF,
            namespace=adapter.namespace,
            now=now,
            before={"evidence": version.evidence},
            after={"evidence": Evidence.BEHAVIOURAL, "behavioural": shown},
        )
        version.evidence = Evidence.BEHAVIOURAL
        version.binding = {**version.binding, "behavioural": shown}
        session.add(version)


def described(rows: Sequence[queries.Scoring]) -> list[EvaluationInfo]:
    """Evaluations in the words of the wire."""
    return [
        EvaluationInfo(
            base=base,
            version=version,
            suite=suite,
            summary=row.summary,
            records=row.records,
            job=row.job_id,
            created_at=row.created_at,
        )
        for row, base, suite, version in rows
    ]
