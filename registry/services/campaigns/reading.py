"""All that a decision of a campaign rests on, read afresh from the database."""

import math
from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError
from sqlmodel import Session, case, col, func, select

from registry.core.campaign import Facts, Progress, State, SuiteFacts, TierFacts
from registry.core.digest import Digest
from registry.core.errors import LoractlError
from registry.core.lifecycle import JobState, VersionState
from registry.core.manifest import canonical_json
from registry.core.policy import Gate, Policy
from registry.core.route import Signals
from registry.db import queries
from registry.db.models import (
    Adapter,
    Base,
    Campaign,
    CampaignItem,
    Dataset,
    DatasetVersion,
    Evaluation,
    Job,
    Line,
    Revision,
    TargetSet,
    Version,
)

from .. import fits, jobs, ledger, policies, pools, signatures
from ..adapters import fit_of
from ..gates import every_gate, suite_of
from ..references import find_data
from ..tokens import Caller
from . import access

_MEASURED = ("inside", "cosine", "excess", "alpha")
"""Signals of a comparison with adapters beyond those of their tensors."""


def spent_by(session: Session, campaign: Campaign) -> float:
    """Device seconds of all the campaign's jobs, also of attempts that came to no result."""
    told = func.coalesce(col(Job.result)["seconds"].as_float(), 0.0)
    made = case((col(Job.state) == JobState.SUCCEEDED, told), else_=0.0)
    query = select(func.sum(made + col(Job.lost_seconds))).where(Job.campaign_id == campaign.id)
    return session.exec(query).one() or 0.0


def facts_of(session: Session, actor: Caller, campaign: Campaign, item: CampaignItem, known: Facts | None) -> Facts:
    """All that a decision rests on, read afresh; verdicts and approvals are kept from ``known``, while they count."""
    adapter = session.get_one(Adapter, item.adapter_id)
    old, new = session.get_one(Base, campaign.old_id), session.get_one(Base, campaign.new_id)
    assert adapter.id is not None and old.id is not None and new.id is not None
    policy = policies.effective(session, adapter.namespace, adapter.name)
    suites = suites_of(session, policy)
    serving = session.get_one(Version, item.serving_id)
    source = original(session, serving)
    now_old = queries.alias_row(session, adapter.id, old.id, item.alias)
    now_new = queries.alias_row(session, adapter.id, new.id, item.alias)
    training = jobs.training_of(session, source, new.digest)
    made = session.get(Job, source.job_id) if source.job_id else None
    fit = fit_of(session, source, new)
    line = session.get_one(Line, campaign.line_id)
    old_of_source = session.get_one(Base, source.base_id)
    shape = f"{new.model_type} {new.parameters} {_targets(session, source)} r{source.rank}"
    begun = known if item.state != State.PLANNED else None  # what it was begun on stays
    facts = Facts(
        adapter=f"{adapter.namespace}/{adapter.name}",
        alias=item.alias,
        line=line.name,
        old=old.digest,
        new=new.digest,
        serving=serving.digest,
        source=source.digest if source.id != serving.id else None,
        serving_now=session.get_one(Version, now_old.version_id).digest if now_old else None,
        new_alias=session.get_one(Version, now_new.version_id).digest if now_new else None,
        generation=now_new.generation if now_new else 0,
        policy=policy,
        fit=fit.fit,
        fit_reason="; ".join(f"{r['subject']} {r['text']}".strip() for r in fit.reasons[:2]),
        signals=begun.signals if begun else _signals(session, old_of_source, new, source),
        measuring=begun is None and _compares(session, old_of_source, new),
        expected=begun.expected if begun else ledger.expected(session, shape),
        shape=shape,
        runnable=serving.runnable,
        old_weights=old.weights == "full",
        source_weights=old_of_source.weights == "full",
        new_weights=new.weights == "full",
        recipe=training is not None,
        datasets=training is not None and _all_there(session, actor, training.datasets),
        retained=_is_there(session, actor, policy.retained) if policy.retained else None,
        suites=tuple(_suite_facts(session, gate) for gate in every_gate(policy)),
        pool=pools.facts_of(session, actor, policy, old, known.pool if known else None),
        superseded_by=superseded_by(session, campaign),
        trained_steps=int(_number(made.result.get("steps"))) if made and made.result else None,
        trained_seconds=_number(made.result.get("seconds")) + made.lost_seconds if made and made.result else None,
        approved=known.approved if known else None,
        decided_by=known.decided_by if known else "",
        spent_before=known.spent_before if known else 0.0,
    )
    rules = rules_of(policy, suites)
    if any(suite.gate_n is None for suite in facts.suites):  # the machine freezes it with the reason
        return facts.model_copy(update={"tiers": known.tiers if known else ()}).under(rules)
    found = facts.model_copy(
        update={
            "serving_scores": _progress(session, campaign, old, serving.digest, suites),
            "bare_scores": _progress(session, campaign, new, None, suites),
            "bare_old_scores": _progress(session, campaign, old, None, suites),
            "reference_seconds": _scoring_seconds(session, old, serving.digest, suites)
            + _scoring_seconds(session, old, None, suites)
            + _scoring_seconds(session, new, None, suites),
            "tiers": tuple(_tier_facts(session, campaign, item, new, mine, suites) for mine in known.tiers)
            if known
            else (),
        }
    )
    candidates = [mine.version for mine in found.tiers if mine.version]
    unsigned = signatures.unsigned(session, adapter.namespace, adapter.id, candidates) if candidates else []
    return found.model_copy(update={"unsigned": tuple(unsigned)}).under(rules)


def _signals(session: Session, old: Base, new: Base, source: Version) -> Signals:
    """What was measured for the adapter: by the tensors that it patches, and by a comparison that it took part in."""
    found = fits.signals(session, old=old, new=new, target_set_id=source.target_set_id)
    query = select(Job).where(Job.kind == "compare", Job.base == new.digest, Job.state == JobState.SUCCEEDED)
    for job in session.exec(query.order_by(col(Job.finished_at).desc())):
        named = job.recipe.get("adapters") or []
        told = (job.result or {}).get("adapters")
        if job.recipe.get("old") != old.digest or source.digest not in named or not isinstance(told, list):
            continue
        with suppress(IndexError, AttributeError, ValidationError):  # a worker's words
            own = told[named.index(source.digest)]
            measured = {name: own[name] for name in _MEASURED if own.get(name) is not None}
            return Signals.model_validate(found.model_dump() | measured)
    return found


def _compares(session: Session, old: Base, new: Base) -> bool:
    """Whether a job compares the two right now."""
    query = select(Job.recipe).where(col(Job.state).in_(access.ACTIVE), Job.kind == "compare", Job.base == new.digest)
    return any(recipe.get("old") == old.digest for recipe in session.exec(query))


def original(session: Session, version: Version) -> Version:
    """What a carried version was first made from: rebases start from the original, they never stack."""
    seen = set()
    while version.digest not in seen:
        seen.add(version.digest)
        recipe = jobs.recorded_recipe(session, version)
        if recipe.get("kind") != "rebase" or recipe.get("tier") == "retrain":
            return version
        parent = queries.version_by_digest(session, version.adapter_id, str(recipe.get("adapter")))
        if parent is None:
            return version
        version = parent
    return version


def _targets(session: Session, version: Version) -> str:
    found = session.get(TargetSet, version.target_set_id) if version.target_set_id else None
    return found.digest[7:19] if found else "none"


def _suite_facts(session: Session, gate: Gate) -> SuiteFacts:
    try:
        return SuiteFacts(suite=gate.suite, gate_n=suite_of(session, gate).gate_rows)
    except LoractlError:
        return SuiteFacts(suite=gate.suite, gate_n=None)


def suites_of(session: Session, policy: Policy | None) -> list[DatasetVersion]:
    """The suites that a policy names, each content once."""
    found: dict[str, DatasetVersion] = {}
    for gate in every_gate(policy) if policy else ():
        try:
            suite = suite_of(session, gate)
        except LoractlError:
            continue
        found[suite.digest] = suite
    return list(found.values())


def rules_of(policy: Policy, suites: Sequence[DatasetVersion]) -> str:
    """Digest of what a verdict rests on besides the records and its share of α: gates, guard, limits, the suites."""
    words = policy.model_dump(mode="json", include={"gates", "guard", "max_negative_flips"})
    return str(Digest.sha256(canonical_json([words, [suite.digest for suite in suites]])))


def _is_there(session: Session, actor: Caller, dataset: str) -> bool:
    """Whether ``actor`` can read this dataset."""
    try:
        find_data(session, actor, "dataset", dataset)
    except LoractlError:
        return False
    return True


def _all_there(session: Session, actor: Caller, digests: Sequence[str]) -> bool:
    """Whether all these datasets are there for ``actor`` to read."""
    query = select(DatasetVersion.digest, Dataset.namespace).join(Dataset).where(Dataset.kind == "dataset")
    rows = session.exec(query.where(col(DatasetVersion.digest).in_(digests)))
    return {digest for digest, namespace in rows if actor.can("read", namespace)} == set(digests)


def _number(value: object) -> float:
    """What a worker reported as a number; 0 for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def superseded_by(session: Session, campaign: Campaign) -> str | None:
    """The revision to which the line has moved on since, if it has."""
    query = select(Revision).where(Revision.line_id == campaign.line_id).order_by(col(Revision.number).desc())
    rows = session.exec(query).all()
    mine = [row.number for row in rows if row.base_id == campaign.new_id]
    if not mine or rows[0].number == max(mine):
        return None
    return f"{session.get_one(Line, campaign.line_id).name}@r{rows[0].number}"


def scored_by(session: Session, campaign: Campaign, base: Base, suite: DatasetVersion) -> set[str | None]:
    """Versions (None: the bare base) that are scored on a suite, or are being scored for this campaign."""
    query = select(Evaluation.version_id, Version.digest).join(Version, isouter=True)
    rows = session.exec(query.where(Evaluation.base_id == base.id, queries.on_suite(suite.digest)))
    found: set[str | None] = {digest if version_id is not None else None for version_id, digest in rows}
    for job in scoring(session, campaign, base, suite):
        if job.state in access.ACTIVE:
            found |= set(job.recipe["adapters"]) | ({None} if job.recipe["bare"] else set())
    return found


def scoring(session: Session, campaign: Campaign, base: Base, suite: DatasetVersion) -> list[Job]:
    """The campaign's evaluations on ``base`` and ``suite``, oldest first."""
    query = select(Job).where(Job.campaign_id == campaign.id, Job.kind == "evaluate", Job.base == base.digest)
    rows = session.exec(query.order_by(col(Job.created_at)))
    return [job for job in rows if job.recipe["suite"] == suite.digest]


def _progress(
    session: Session, campaign: Campaign, base: Base, digest: str | None, suites: Sequence[DatasetVersion]
) -> Progress:
    """How far the scoring of a version (None: the bare base) is, on all suites together.

    The bare base is lost only when a job of its own failed: one that failed on an adapter says nothing of it.
    """
    found = Progress(job=JobState.SUCCEEDED)
    for suite in suites:
        assert base.id is not None
        if queries.newest_evaluation(session, base_id=base.id, digest=digest, suite=suite.digest) is not None:
            continue
        found = Progress()
        mine = [
            job
            for job in scoring(session, campaign, base, suite)
            if (digest in job.recipe["adapters"] if digest else job.recipe["bare"])
        ]
        if not mine or mine[-1].state == JobState.SUCCEEDED:
            continue
        last = mine[-1]
        if last.state in access.ACTIVE or digest or not last.recipe["adapters"]:
            return Progress(job=JobState(last.state), id=last.id, error=str((last.error or {}).get("detail", "")))
    return found


def _tier_facts(
    session: Session,
    campaign: Campaign,
    item: CampaignItem,
    new: Base,
    mine: TierFacts,
    suites: Sequence[DatasetVersion],
) -> TierFacts:
    job = session.get(Job, mine.produce.id) if mine.produce.id else None
    if job is None:
        return mine
    produce = Progress(job=JobState(job.state), id=job.id, error=str((job.error or {}).get("detail", "")))
    made = (job.result or {}).get("made") or []
    if not produce.done or not made:
        return mine.model_copy(update={"produce": produce, "seconds": job.lost_seconds})
    digest = str(made[0]["digest"])
    version = queries.version_by_digest(session, item.adapter_id, digest)
    evaluate = _progress(session, campaign, new, digest, suites)
    if version is not None and version.status != VersionState.LIVE:  # equal work was done before, and taken back
        evaluate = Progress(job=JobState.FAILED, error=f"@v{version.number} is {version.status}")
        mine = mine.model_copy(update={"verdict": None})
    result = job.result or {}
    return mine.model_copy(
        update={
            "produce": produce,
            "version": digest,
            "label": f"@v{version.number}" if version else digest[:19],
            "evaluate": evaluate,
            "steps": int(_number(result.get("steps"))),
            "told": {key: result[key] for key in ("start", "candidates", "signals") if key in result},
            "seconds": _number(result.get("seconds"))
            + job.lost_seconds
            + _scoring_seconds(session, new, digest, suites),
        }
    )


def _scoring_seconds(session: Session, base: Base, digest: str | None, suites: Sequence[DatasetVersion]) -> float:
    """Device seconds that went into scoring a version (None: the bare base) on these suites, each job's once."""
    on = queries.on_suite(*(suite.digest for suite in suites))
    query = select(Evaluation.job_id, func.max(Evaluation.seconds)).where(Evaluation.base_id == base.id, on)
    if digest is None:
        query = query.where(col(Evaluation.version_id).is_(None))
    else:
        query = query.where(col(Evaluation.version_id).in_(select(Version.id).where(Version.digest == digest)))
    return math.fsum(seconds for _, seconds in session.exec(query.group_by(Evaluation.job_id)))
