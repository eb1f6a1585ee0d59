"""Commits: from what the verifier read to a version, in the caller's transaction, all or nothing.

Everything a commit rests on is checked in it: the version's number comes from the series' counter, the
newest-on-this-base mark moves under the series' lock, wished aliases move by compare-and-set against what
they were when the push was opened. Two pushes of one folder give one version, whoever is second.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlmodel import Session, col, select, update

from registry.core.adapter import AdapterSpec
from registry.core.digest import Digest
from registry.core.engines import bits, profiles
from registry.core.errors import (
    AliasMoved,
    BadRequest,
    BaseNotFound,
    GateNotPassed,
    SignatureRequired,
    VersionDeleted,
    VersionQuarantined,
    VersionYanked,
)
from registry.core.fit import Binding, TargetSet, binding_evidence
from registry.core.lifecycle import VersionState
from registry.core.manifest import Listing, Manifest
from registry.core.names import SeriesName
from registry.db import queries
from registry.db.models import (
    Adapter,
    Base,
    Dataset,
    DatasetVersion,
    Job,
    Push,
    Version,
    VersionParent,
)
from registry.schemas import Wishes

from . import aliases, audit, bases, blobs, fits, policies, pushes, signatures, standing

ALIAS_WAITS = (AliasMoved, SignatureRequired, VersionYanked, VersionQuarantined, VersionDeleted)
"""Why an alias does not move to the result of a job, which is there all the same."""

# ── before the bytes ─────────────────────────────────────────────────────────


def base_of(session: Session, manifest: Listing) -> Base:
    """The base that an adapter's manifest is bound to; `BaseNotFound`."""
    found = queries.base_by_digest(session, str(manifest.base))
    if found is None:
        raise BaseNotFound(ref=str(manifest.base), nearest="")
    return found


def look_early(session: Session, series: SeriesName, manifest: Listing, wishes: Wishes) -> None:
    """Refuse before any byte is sent what config and manifest alone show to be wrong.

    `BaseNotFound`; `EvidenceContradicts` when the declared base name stands for other weights here.
    """
    declared, revision = manifest.config.get("base_model_name_or_path"), manifest.config.get("revision")
    spec = AdapterSpec(
        peft_type="",
        declared_base=declared if isinstance(declared, str) else None,
        declared_revision=revision if isinstance(revision, str) else None,
    )
    binding(session, spec, base_of(session, manifest), series, trust_base=wishes.trust_base)


def binding(session: Session, spec: AdapterSpec, base: Base, series: SeriesName, *, trust_base: bool) -> Binding:
    """How we know that the adapter belongs to ``base``; `EvidenceContradicts`."""
    meant = bases.meant_by(session, spec.declared_base, spec.declared_revision)
    known = [base, *meant]
    if spec.recorded_base is not None and (recorded := queries.base_by_digest(session, str(spec.recorded_base))):
        known.append(recorded)
    called = bases.labels(session, known)
    return binding_evidence(
        spec,
        Digest.parse(base.digest),
        declared=[Digest.parse(row.digest) for row in meant],
        labels={Digest.parse(row.digest): called[row.id] for row in known if row.id is not None},
        trust_base=trust_base,
        name=str(series),
    )


def require_not_deleted(session: Session, series: SeriesName, manifest: Listing) -> None:
    """`VersionDeleted` when just this content was deleted from the series."""
    adapter = queries.adapter_by_name(session, series.namespace, series.name)
    version = queries.version_by_digest(session, adapter.id or 0, str(manifest.digest)) if adapter else None
    if adapter is not None and version is not None and version.status == VersionState.DELETED:
        standing.require_bytes(version, standing.ref(adapter, version))


def require_ungated(session: Session, series: SeriesName, manifest: Listing, wishes: Wishes) -> None:
    """`GateNotPassed` for a wished alias that the policy gates: nothing can have been evaluated before its push."""
    for alias in _gated(session, series, wishes.aliases):
        raise GateNotPassed(
            alias=alias,
            name=str(series),
            version=str(manifest.digest),
            reason="the policy gates it, and a version is evaluated after its push: "
            f"push without --alias, then loractl promote {series}@vN {alias}",
        )


def seen(session: Session, series: SeriesName, manifest: Listing, wishes: Wishes) -> dict[str, int]:
    """The generation of every wished alias as it is now (0: not there), which the commit compares with."""
    base = queries.base_by_digest(session, str(manifest.base))
    adapter = queries.adapter_by_name(session, series.namespace, series.name)
    if adapter is None or adapter.id is None or base is None or base.id is None:
        return dict.fromkeys(wishes.aliases, 0)
    rows = {alias: queries.alias_row(session, adapter.id, base.id, alias) for alias in wishes.aliases}
    return {alias: row.generation if row else 0 for alias, row in rows.items()}


def _gated(session: Session, series: SeriesName, wished: list[str]) -> list[str]:
    policy = policies.effective(session, series.namespace, series.name)
    return [alias for alias in wished if policy.is_gated(alias)]


# ── the commit ───────────────────────────────────────────────────────────────


def commit(session: Session, push: Push, now: datetime) -> dict[str, Any]:
    """Make what a verified push promises; its outcome, which the push keeps.

    `AliasMoved` when a wished alias is not where it was when the push was opened.
    """
    if push.state == "committed":
        return push.outcome or {}
    manifest, wishes = Manifest.parse(push.manifest), wishes_of(push)
    author = _author(session, push)
    pushes.move(session, push, "commit", now, actor=author)
    blobs.keep_manifest(session, manifest)
    facts = push.facts or {}
    match push.kind:
        case "adapter":
            outcome = _commit_adapter(session, push, manifest, wishes, facts, now)
        case "base":
            outcome = _commit_base(session, push, manifest, wishes, facts, now)
        case _:
            outcome = _commit_dataset(session, push, manifest, facts, now)
    push.outcome = {"digest": push.manifest_digest, "base": manifest.base, "aliases": [], "warnings": []} | outcome
    push.findings = None
    push.facts = None
    session.add(push)
    session.flush()
    audit.record(
        session,
        f"{push.kind}.version",
        outcome["ref"],
        actor=author,
        namespace=push.namespace,
        reason=wishes.message,
        now=now,
        after=push.outcome | {"job": push.job_id},
    )
    return push.outcome


def commit_verified(session: Session, push_id: str, job: Job, now: datetime) -> dict[str, Any]:
    """Commit a verified push of ``job`` in the transaction that ends it; its outcome.

    Equal work gives equal bytes: where the job's result was there already, its committed push will do.
    `MoveNotAllowed` when the push is not verified (yet), `BadRequest` when it is not of this job.
    """
    push = pushes.locked(session, push_id)
    if push.job_id == job.id:
        return commit(session, push, now)
    same = push.kind == "base" or f"{push.namespace}/{push.name}" == job.output.get("adapter")
    if push.state != "committed" or not same:
        raise BadRequest(problems=f"pushes: {push_id} is not a push of job {job.id}")
    made = dict(push.outcome or {})
    try:
        with session.begin_nested():
            wish_again(session, push, pushes.wishes_of_job(Wishes(), push.kind, job), job.created_by, now)
    except ALIAS_WAITS as error:  # the work is there all the same
        return made | {"warnings": [*made.get("warnings", ()), error.message]}
    return push.outcome or {}


def wishes_of(push: Push) -> Wishes:
    """What was asked for with the push."""
    return Wishes.model_validate({key: value for key, value in push.wishes.items() if key in Wishes.model_fields})


def sign_again(
    session: Session, push: Push, signed: Sequence[signatures.Accepted], actor: str, now: datetime
) -> None:
    """Keep signatures that a repeated push brought for a version that is there already."""
    adapter = queries.adapter_by_name(session, push.namespace, push.name) if signed else None
    if adapter is None or adapter.id is None:
        return
    version = queries.version_by_digest(session, adapter.id, push.manifest_digest)
    assert version is not None
    signatures.keep(session, adapter, version, signed, actor, now)
    had = (push.outcome or {}).get("signed", [])
    push.outcome = (push.outcome or {}) | {"signed": sorted({*had, *(key.fingerprint for key, _ in signed)})}
    session.add(push)


def wish_again(session: Session, push: Push, wishes: Wishes, actor: str, now: datetime) -> None:
    """Grant what a repeated push wishes for a version that is there already: aliases, a line, names."""
    manifest, outcome = Manifest.parse(push.manifest), dict(push.outcome or {})
    if push.kind == "adapter" and wishes.aliases:
        series = SeriesName(push.namespace, push.name)
        adapter = queries.adapter_by_name(session, push.namespace, push.name)
        assert adapter is not None and adapter.id is not None
        version = queries.version_by_digest(session, adapter.id, push.manifest_digest)
        assert version is not None
        gated = _gated(session, series, wishes.aliases)
        before = {alias: at for alias, at in seen(session, series, manifest, wishes).items() if alias not in gated}
        _move_aliases(session, adapter, base_of(session, manifest), version, before, actor, wishes.message, now)
        outcome["aliases"] = list(before)
    elif push.kind == "base" and (wishes.line or wishes.names or wishes.parent):
        revision = bases.apply_wishes(session, base_of(session, manifest), wishes, actor, now)
        if revision is not None:
            outcome |= {"ref": f"{wishes.line}@r{revision.number}", "version": f"r{revision.number}"}
    if outcome != push.outcome:
        push.outcome = outcome
        session.add(push)


def _commit_adapter(
    session: Session, push: Push, manifest: Manifest, wishes: Wishes, facts: dict[str, Any], now: datetime
) -> dict[str, Any]:
    series = SeriesName(push.namespace, push.name)
    base = base_of(session, manifest)
    blobs.add_once(
        session,
        Adapter,
        {"namespace": push.namespace, "name": push.name, "next_version": 1, "task": wishes.task, "created_at": now},
    )
    adapter = session.exec(
        select(Adapter)
        .where(Adapter.namespace == push.namespace, Adapter.name == push.name)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    assert adapter.id is not None and base.id is not None
    if wishes.task and adapter.task != wishes.task:
        adapter.task = wishes.task
        session.add(adapter)
    version = queries.version_by_digest(session, adapter.id, push.manifest_digest)
    if version is None:
        version = _new_version(session, push, manifest, wishes, facts, adapter, base, now)
    elif version.status == VersionState.DELETED:
        standing.require_bytes(version, standing.ref(adapter, version))
    warnings, author = list(facts.get("warnings", [])), _author(session, push)
    signed = signatures.accept(session, push.namespace, str(series), manifest, push.wishes.get("signatures", ()))
    signatures.keep(session, adapter, version, signed, author, now)
    if push.job_id is None:
        signatures.require_signed(session, adapter, version, hold=True)
    gated = _gated(session, series, wishes.aliases)  # now: the policy may be younger than the push
    promote = f"loractl promote {series}@v{version.number}"
    warnings += [f"alias '{alias}' is gated: {promote} {alias}, once evaluated" for alias in gated]
    seen_at = push.wishes.get("seen", {})
    expected = {alias: int(seen_at.get(alias, 0)) for alias in wishes.aliases if alias not in gated}
    if push.job_id is None:
        _move_aliases(session, adapter, base, version, expected, author, wishes.message, now)
    else:
        for alias, generation in list(expected.items()):
            if kept := _move_for_job(session, adapter, base, version, {alias: generation}, author, wishes, now):
                warnings.append(kept)
                del expected[alias]
    return {
        "ref": f"{series}@v{version.number}",
        "version": f"v{version.number}",
        "evidence": version.evidence,
        "aliases": list(expected),
        "signed": [key.fingerprint for key, _ in signed],
        "warnings": warnings,
    }


def _new_version(
    session: Session,
    push: Push,
    manifest: Manifest,
    wishes: Wishes,
    facts: dict[str, Any],
    adapter: Adapter,
    base: Base,
    now: datetime,
) -> Version:
    assert adapter.id is not None and base.id is not None
    number = session.exec(
        update(Adapter)
        .where(col(Adapter.id) == adapter.id)
        .values(next_version=Adapter.next_version + 1)
        .returning(col(Adapter.next_version))
        .execution_options(synchronize_session=False)
    ).scalar_one() - 1
    session.exec(
        update(Version)
        .where(col(Version.adapter_id) == adapter.id, col(Version.base_id) == base.id, col(Version.latest))
        .values(latest=False)
        .execution_options(synchronize_session=False)
    )
    targets = TargetSet(tuple(facts["target_set"])) if facts["target_set"] else None
    target_set = fits.keep_target_set(session, targets) if targets else None
    known = target_set is None or session.exec(
        select(Version.id).where(Version.base_id == base.id, Version.target_set_id == target_set.id).limit(1)
    ).first()
    version = Version(
        adapter_id=adapter.id,
        number=number,
        digest=push.manifest_digest,
        base_id=base.id,
        target_set_id=target_set.id if target_set else None,
        latest=True,
        evidence=facts["evidence"],
        binding=facts["binding"],
        peft_type=facts["peft_type"],
        runnable=facts["runnable"],
        rank=facts["rank"],
        engines=facts["engines"],
        spec=facts["spec"],
        size=manifest.size,
        message=wishes.message,
        job_id=push.job_id,
        created_by=_author(session, push),
        created_at=now,
    )
    session.add(version)
    session.flush()
    assert version.id is not None
    lineage = manifest.lineage
    origins = [(p, "parent") for p in lineage.parents] + [(d, "dataset") for d in lineage.datasets]
    rows = [{"version_id": version.id, "parent": parent, "relation": relation} for parent, relation in origins]
    blobs.add_once(session, VersionParent, *rows)
    if target_set is not None and not known:
        assert target_set.id is not None
        fits.ensure_pair(session, old=base, target_set_id=target_set.id)
    return version


def adapter_facts(spec: AdapterSpec, base: Base, targets: TargetSet, bound: Binding, actor: str) -> dict[str, Any]:
    """What a version's row keeps of an adapter, as JSON."""
    verdicts = profiles(spec)
    return {
        "peft_type": spec.peft_type,
        "runnable": spec.runnable,
        "rank": spec.max_rank,
        "target_set": [] if spec.opaque else list(targets.tensors),
        "evidence": str(bound.evidence),
        "binding": {
            "recorded": str(spec.recorded_base) if spec.recorded_base else None,
            "declared": spec.declared_base,
            "revision": spec.declared_revision,
        }
        | ({"overridden": bound.overridden, "trusted_by": actor} if bound.overridden else {}),
        "engines": bits(verdicts),
        "spec": {
            "modules": len(spec.modules),
            "targets": list(spec.targets),
            "ranks": sorted({module.rank for module in spec.modules}),
            "scales": sorted({module.scale for module in spec.modules}),
            "features": list(spec.features),
            "engines": {name: "yes" if v.loads else "; ".join(v.reasons) for name, v in verdicts.items()},
            "why_not_runnable": spec.why_not_runnable,
            "recorded": dict(spec.recorded),
        },
        "warnings": [
            *([f"the binding contradicts {bound.overridden}; trusted on record"] if bound.overridden else []),
            *([f"not runnable here: {spec.why_not_runnable}"] if spec.why_not_runnable else []),
            *([f"base {Digest.parse(base.digest).short} is here without its weights: jobs need them"]
              if base.weights == "absent" else []),
        ],
    }  # fmt: skip


def _commit_base(
    session: Session, push: Push, manifest: Manifest, wishes: Wishes, facts: dict[str, Any], now: datetime
) -> dict[str, Any]:
    actor = _author(session, push)
    model = pushes.read_table(facts["table"])
    base = bases.ensure(session, model, actor, now)
    warnings = bases.not_taken(base, model) if base.weights == "full" else []
    if base.weights != "full":
        base.weights, base.manifest = facts["verified"], push.manifest_digest
        if base.weights == "full":
            bases.keep_full(session, base, model)
        session.add(base)
        session.flush()
    revision = bases.apply_wishes(session, base, wishes, actor, now)
    if push.job_id is not None:  # others say it themselves: a digest in a lineage tells nobody what is in the registry
        for parent in manifest.lineage.parents:
            _merged_from(session, base, parent, now)
    name = f"r{revision.number}" if revision else None
    ref = f"{wishes.line}@{name}" if name else base.digest
    return {"ref": ref, "version": name, "base": base.digest, "warnings": warnings}


def _merged_from(session: Session, base: Base, parent: str, now: datetime) -> None:
    """A base whose manifest names an adapter version as its parent was merged from that adapter's base."""
    version = session.exec(select(Version).where(Version.digest == parent).limit(1)).first()
    if version is not None and version.base_id != base.id:
        old = session.get(Base, version.base_id)
        assert old is not None
        bases.record_derivation(session, base, old, "merged", "declared", {"adapter": parent}, now)


def _commit_dataset(
    session: Session, push: Push, manifest: Manifest, facts: dict[str, Any], now: datetime
) -> dict[str, Any]:
    row = {"kind": push.kind, "namespace": push.namespace, "name": push.name, "next_version": 1, "created_at": now}
    blobs.add_once(session, Dataset, row)
    dataset = session.exec(
        select(Dataset)
        .where(Dataset.kind == push.kind, Dataset.namespace == push.namespace, Dataset.name == push.name)
        .with_for_update()
    ).one()
    assert dataset.id is not None
    version = session.exec(
        select(DatasetVersion).where(
            DatasetVersion.dataset_id == dataset.id, DatasetVersion.digest == push.manifest_digest
        )
    ).first()
    if version is None:
        number = session.exec(
            update(Dataset)
            .where(col(Dataset.id) == dataset.id)
            .values(next_version=Dataset.next_version + 1)
            .returning(col(Dataset.next_version))
            .execution_options(synchronize_session=False)
        ).scalar_one() - 1
        version = DatasetVersion(
            dataset_id=dataset.id,
            number=number,
            digest=push.manifest_digest,
            rows=facts["rows"],
            gate_rows=facts["gate_rows"],
            calibration_rows=facts.get("calibration_rows"),  # not in facts of a push that the release before verified
            spec=manifest.config,
            size=manifest.size,
            created_by=_author(session, push),
            created_at=now,
        )
        session.add(version)
        session.flush()
    ref = f"{push.namespace}/{push.name}@v{version.number}"
    return {"ref": ref, "version": f"v{version.number}", "rows": version.rows, "gate_rows": version.gate_rows}


def _move_aliases(
    session: Session,
    adapter: Adapter,
    base: Base,
    version: Version,
    expected: dict[str, int],
    actor: str,
    message: str,
    now: datetime,
) -> None:
    for alias, generation in expected.items():
        aliases.move(
            session,
            adapter=adapter,
            base=base,
            alias=alias,
            version=version,
            expected=generation,
            actor=actor,
            reason=message or "pushed",
            now=now,
        )


def _move_for_job(
    session: Session,
    adapter: Adapter,
    base: Base,
    version: Version,
    expected: dict[str, int],
    author: str,
    wishes: Wishes,
    now: datetime,
) -> str | None:
    """Move one alias to a job's result; an alias that cannot move, or not yet, is a warning, for the work is done."""
    try:
        with session.begin_nested():
            _move_aliases(session, adapter, base, version, expected, author, wishes.message, now)
    except SignatureRequired as error:
        return f"{error.message} Sign it, and move '{', '.join(expected)}' then: {error.hint}"
    except ALIAS_WAITS as error:
        return error.message
    return None


def _author(session: Session, push: Push) -> str:
    job = session.get(Job, push.job_id) if push.job_id else None
    return job.created_by if job else push.created_by
