"""Adapters: show, search, history, lineage, and the two questions of the registry.

*What is compatible with these weights?* (`compatible`) and *which version belongs to them?* (`resolve`).
Fit is never computed adapter by adapter: it is stored per (base, base, target set) and joined
(`registry.services.fits`).
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlmodel import Session, col, select

from registry.core.engines import ENGINES
from registry.core.errors import AliasNotFound, BadRequest, NoCompatibleVersion
from registry.core.fit import FitClass
from registry.core.lifecycle import VersionState
from registry.core.manifest import Lineage, Manifest
from registry.core.names import BaseReference, Reference
from registry.core.policy import Evidence
from registry.db import queries
from registry.db.models import (
    Adapter,
    Alias,
    AliasMove,
    Base,
    Dataset,
    DatasetVersion,
    Job,
    JobEvent,
    StoredManifest,
    TargetFit,
    Token,
    Version,
    VersionParent,
)
from registry.schemas import (
    AdapterInfo,
    AliasInfo,
    EvaluationInfo,
    FitInfo,
    LineageInfo,
    LineageNode,
    LogEntry,
    Provenance,
    VersionInfo,
)

from . import bases, evaluations, signatures, standing
from .references import find_adapter, find_version, nearest
from .tokens import Caller

BY_DEFAULT = (FitClass.EXACT, FitClass.DERIVED)
"""Fits that pull and resolve give unasked; anything else only by name."""


# ── show ─────────────────────────────────────────────────────────────────────


def describe(session: Session, rows: Sequence[tuple[Version, Adapter]]) -> list[VersionInfo]:
    """Versions in the words of the wire, with aliases, signers and newest evaluations; four queries for any number."""
    called = bases.named(session, {version.base_id for version, _ in rows})
    aliases = queries.alias_names_of_versions(session, [version.id or 0 for version, _ in rows])
    return _described(session, rows, called, aliases)


def _described(
    session: Session,
    rows: Sequence[tuple[Version, Adapter]],
    called: Mapping[int, tuple[str, str]],
    aliases: Mapping[int, list[str]],
) -> list[VersionInfo]:
    ids = [version.id for version, _ in rows if version.id is not None]
    signers = signatures.signers(session, ids)
    found = queries.newest_evaluations_of(session, ids)
    scored: defaultdict[int | None, list[EvaluationInfo]] = defaultdict(list)
    for scoring, info in zip(found, evaluations.described(found), strict=True):
        scored[scoring.evaluation.version_id].append(info)
    return [
        _info(version, adapter, called[version.base_id]).model_copy(
            update={
                "aliases": aliases.get(version.id or 0, []),
                "signed_by": signers.get(version.id or 0, []),
                "evaluations": scored[version.id],
            }
        )
        for version, adapter in rows
    ]


def _info(version: Version, adapter: Adapter, base: tuple[str, str]) -> VersionInfo:
    return VersionInfo(
        ref=f"{adapter.namespace}/{adapter.name}@v{version.number}",
        version=version.number,
        digest=version.digest,
        base=base[0],
        base_ref=base[1],
        evidence=version.evidence,
        binding=version.binding,
        peft_type=version.peft_type,
        runnable=version.runnable,
        rank=version.rank,
        targets=version.spec.get("targets", []),
        engines=version.spec.get("engines", {}),
        size=version.size,
        message=version.message,
        job=version.job_id,
        created_by=version.created_by,
        created_at=version.created_at,
        status=version.status,
        status_reason=version.status_reason,
    )


def describe_aliases(session: Session, adapter: Adapter) -> list[AliasInfo]:
    """The aliases of a series on every base."""
    return _alias_infos(session, queries.aliases_of(session, [adapter.id or 0]))


def describe_alias(session: Session, row: Alias) -> AliasInfo:
    """One alias."""
    all_ = queries.aliases_of(session, [row.adapter_id])
    return _alias_infos(session, [one for one in all_ if (one.base_id, one.name) == (row.base_id, row.name)])[0]


def _alias_infos(session: Session, pointing: Sequence[queries.Pointing]) -> list[AliasInfo]:
    called = bases.named(session, {alias.base_id for alias in pointing})
    return [_alias_info(alias, called) for alias in pointing]


def _alias_info(alias: queries.Pointing, called: Mapping[int, tuple[str, str]]) -> AliasInfo:
    base, base_ref = called[alias.base_id]
    return AliasInfo(
        alias=alias.name,
        base=base,
        base_ref=base_ref,
        version=alias.number,
        digest=alias.digest,
        generation=alias.generation,
        moved_at=alias.moved_at,
        actor=alias.actor,
        reason=alias.reason,
    )


def describe_adapters(session: Session, rows: Sequence[Adapter]) -> list[AdapterInfo]:
    """Series with their newest version and aliases; five queries for any number."""
    ids = {row.id: row for row in rows if row.id is not None}
    newest = queries.newest_versions(session, ids)
    pointing = queries.aliases_of(session, ids)
    called = bases.named(session, {version.base_id for version in newest} | {alias.base_id for alias in pointing})
    aliases: defaultdict[int, list[AliasInfo]] = defaultdict(list)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for alias in pointing:
        aliases[alias.adapter_id].append(_alias_info(alias, called))
        names[alias.version_id] = sorted([*names[alias.version_id], alias.name])
    described = _described(session, [(version, ids[version.adapter_id]) for version in newest], called, names)
    latest = {version.adapter_id: info for version, info in zip(newest, described, strict=True)}
    return [
        AdapterInfo(
            name=f"{row.namespace}/{row.name}",
            task=row.task,
            latest=latest.get(row.id or 0),
            aliases=aliases[row.id or 0],
            created_at=row.created_at,
        )
        for row in rows
    ]


def page(
    session: Session,
    *,
    namespaces: Sequence[str] | None,
    text: str | None,
    task: str | None,
    after: tuple[str, str],
    limit: int,
) -> Sequence[Adapter]:
    """Series by name whose name or task holds ``text``, after a cursor."""
    return queries.adapters_page(session, namespaces=namespaces, text=text, task=task, after=after, limit=limit)


def versions_page(session: Session, adapter: Adapter, *, before: int, limit: int) -> Sequence[Version]:
    """Versions newest first, below a number."""
    query = select(Version).where(Version.adapter_id == adapter.id, Version.number < before)
    return session.exec(query.order_by(col(Version.number).desc()).limit(limit)).all()


def manifest_body(session: Session, digest: str) -> bytes:
    """The canonical bytes of a stored manifest."""
    return session.get_one(StoredManifest, digest).body


# ── the two questions ────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Filter:
    """What the compatible adapters must be besides compatible."""

    classes: tuple[FitClass, ...] = BY_DEFAULT
    alias: str | None = None
    engine: str | None = None
    max_rank: int | None = None
    evidence: Evidence | None = None
    namespace: str | None = None
    task: str | None = None

    @property
    def engine_bit(self) -> int | None:
        """The engine's bit in `Version.engines`; `BadRequest` for an unknown one."""
        if self.engine is None:
            return None
        if self.engine not in ENGINES:
            raise BadRequest(problems=f"engine '{self.engine}' is unknown; known are {', '.join(ENGINES)}")
        return 1 << list(ENGINES).index(self.engine)

    @property
    def evidence_levels(self) -> list[str] | None:
        """The levels that are strong enough."""
        return None if self.evidence is None else [level for level in Evidence if level.at_least(self.evidence)]


def compatible(
    session: Session, caller: Caller, base: Base, wanted: Filter, *, after: int, limit: int
) -> list[tuple[Version, Adapter, FitInfo]]:
    """Adapters that fit ``base``: of each series the newest version on its base, or what the alias names there."""
    assert base.id is not None
    namespaces = caller.readable()
    if wanted.namespace is not None:
        namespaces = [wanted.namespace] if namespaces is None or wanted.namespace in namespaces else []
    rows = queries.compatible_versions(
        session,
        base_id=base.id,
        exact=FitClass.EXACT in wanted.classes,
        classes=[fit for fit in wanted.classes if fit is not FitClass.EXACT],
        alias=wanted.alias,
        max_rank=wanted.max_rank,
        engine_bit=wanted.engine_bit,
        evidence=wanted.evidence_levels,
        namespaces=namespaces,
        task=wanted.task,
        after=after,
        limit=limit,
    )
    return [(version, adapter, _fit_info(version, base, stored)) for version, adapter, stored in rows]


def _fit_info(version: Version, base: Base, stored: TargetFit | None) -> FitInfo:
    if version.base_id == base.id:
        return FitInfo(fit=FitClass.EXACT, reasons=[])
    if stored is None:
        told = {"subject": "", "text": "this kind of adapter names no tensors that it patches"}
        return FitInfo(fit=FitClass.UNKNOWN, reasons=[told])
    return FitInfo(
        fit=stored.fit, reasons=stored.reasons, vocabulary_changed=stored.vocabulary_changed, drift=stored.drift
    )


def fit_of(session: Session, version: Version, base: Base) -> FitInfo:
    """How one version stands to ``base``, as stored."""
    if version.base_id == base.id or version.target_set_id is None:
        return _fit_info(version, base, None)
    stored = session.get(TargetFit, (version.base_id, base.id, version.target_set_id))
    return _fit_info(version, base, stored)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The one version for a base, how it fits, and whether the base was assumed."""

    version: Version
    adapter: Adapter
    base: Base
    fit: FitInfo
    assumed: bool


def resolve(
    session: Session,
    caller: Caller,
    reference: Reference,
    base: Base | None,
    *,
    classes: Sequence[FitClass] = BY_DEFAULT,
    engine: str | None = None,
) -> Resolved:
    """The version that ``reference`` means for ``base``; `NoCompatibleVersion` with the nearest candidates.

    An alias or a bare name means the version on that very base first, then the best of what ``classes`` allow.
    Without a base, the current revision of the adapter's line is meant. Where the namespace requires signatures, a
    version without one is given only to who names it: `SignatureRequired`.
    """
    adapter = find_adapter(session, caller, reference.series)
    assert adapter.id is not None
    assumed = base is None
    if base is None:
        base = _assumed_base(session, adapter, reference)
    bit = Filter(engine=engine).engine_bit
    candidates = _candidates(session, adapter, reference, base)
    order = list(FitClass)
    graded = sorted(
        ((fit_of(session, version, base), version) for version in candidates),
        key=lambda pair: (order.index(FitClass(pair[0].fit)), -pair[1].number),
    )
    for fit, version in graded:
        if fit.fit in classes and (bit is None or version.engines & bit):
            if reference.exact is None:
                signatures.require_signed(session, adapter, version)
            return Resolved(version, adapter, base, fit, assumed)
    raise NoCompatibleVersion(
        ref=str(reference),
        base=bases.labels(session, [base])[base.id or 0],
        digest=base.digest,
        wanted=" or ".join(classes) + (f" for {engine}" if engine else ""),
        nearest=_nearest(session, graded[:3], engine, bit),
        candidates=[{"version": version.number, "fit": fit.model_dump()} for fit, version in graded[:10]],
    )


def exact(session: Session, version_ids: Iterable[int]) -> dict[int, Resolved]:
    """version id -> what `resolve` gives where an alias points to it on its own base."""
    query = select(Version, Adapter, Base).join(Adapter).join(Base, col(Base.id) == Version.base_id)
    rows = session.exec(query.where(col(Version.id).in_(set(version_ids)))).all()
    return {
        version.id or 0: Resolved(version, adapter, base, _fit_info(version, base, None), assumed=False)
        for version, adapter, base in rows
    }


def pointer(caller: Caller, reference: Reference, base: str | None) -> queries.Pointer | None:
    """The alias on a base by its digest that is asked for, where the caller may read it; None for other questions.

    What `queries.pointed_at` gives for it is all that an answer of `resolve` depends on and that may change, so that
    an answer which was made from the same facts can be given again.
    """
    series, alias = reference.series, reference.alias
    digest = None if base is None else BaseReference.parse(base).digest
    if alias is None or digest is None or not caller.can("read", series.namespace):
        return None
    return queries.Pointer(series.namespace, series.name, alias, str(digest))


def _assumed_base(session: Session, adapter: Adapter, reference: Reference) -> Base:
    version = find_version(session, adapter, replace(reference, alias=None))
    if reference.exact is not None:
        return session.get_one(Base, version.base_id)
    return queries.current_base_of_line_of(session, version.base_id) or session.get_one(Base, version.base_id)


def _candidates(session: Session, adapter: Adapter, reference: Reference, base: Base) -> Sequence[Version]:
    assert adapter.id is not None and base.id is not None
    if reference.exact is not None:
        named = find_version(session, adapter, reference)
        standing.require_bytes(named, standing.ref(adapter, named))
        return [named]
    query = select(Version).where(Version.adapter_id == adapter.id)
    if reference.alias is not None:
        query = query.join(Alias, col(Alias.version_id) == Version.id).where(
            Alias.adapter_id == adapter.id, Alias.name == reference.alias
        )
        exact = session.exec(query.where(Alias.base_id == base.id)).first()
        if exact is not None:
            standing.require_live(exact, standing.ref(adapter, exact))
            return [exact]
        query = query.where(Version.status == VersionState.LIVE)
    else:
        query = query.where(col(Version.latest))
    found = session.exec(query.order_by(col(Version.number).desc())).all()
    if not found and reference.alias is not None:
        others = session.exec(select(Alias.name).where(Alias.adapter_id == adapter.id).distinct()).all()
        raise AliasNotFound(
            name=str(reference.series),
            alias=reference.alias,
            base=bases.labels(session, [base])[base.id],
            nearest=nearest(reference.alias, others),
        )
    return found


def _nearest(session: Session, graded: Sequence[tuple[FitInfo, Version]], engine: str | None, bit: int | None) -> str:
    if not graded:
        return ""
    called = bases.named(session, {version.base_id for _, version in graded})
    listed = "; ".join(
        f"v{version.number} on {called[version.base_id][1]} is {fit.fit}"
        + (f", not loadable by {engine}" if bit is not None and not version.engines & bit else "")
        for fit, version in graded
    )
    return f" Nearest: {listed}."


# ── history and lineage ──────────────────────────────────────────────────────


NEWEST = ((1 << 31) - 1, (1 << 31) - 1)
"""Before everything in `history`."""


def history(
    session: Session, adapter: Adapter, *, before: tuple[int, int] = NEWEST, limit: int
) -> tuple[list[LogEntry], tuple[int, int]]:
    """What happened to an adapter, newest first: versions and alias moves, who and why; and where to go on.

    ``before`` is (number of a version, id of a move): each of the two goes on below its own last one, so that
    clocks which differ between processes leave nothing out.
    """
    assert adapter.id is not None
    versions = versions_page(session, adapter, before=before[0], limit=limit)
    query = select(AliasMove).where(AliasMove.adapter_id == adapter.id, col(AliasMove.id) < before[1])
    moves = session.exec(query.order_by(col(AliasMove.id).desc()).limit(limit)).all()
    named = {i for m in moves for i in (m.from_version_id, m.to_version_id) if i is not None}
    numbers = dict(session.exec(select(Version.id, Version.number).where(col(Version.id).in_(named))).all())
    called = bases.named(session, {v.base_id for v in versions} | {m.base_id for m in moves})
    names = _actor_names(session, {v.created_by for v in versions} | {m.actor for m in moves})
    made = [
        LogEntry(
            at=version.created_at,
            actor=names.get(version.created_by, version.created_by),
            event="version",
            detail=f"v{version.number} on {called[version.base_id][1]} ({version.evidence})"
            + (f": {version.message}" if version.message else "")
            + ("" if version.status == VersionState.LIVE else f" — {version.status}: {version.status_reason}"),
            facts={"version": version.number, "digest": version.digest, "job": version.job_id},
        )
        for version in versions
    ]
    moved_to = [
        LogEntry(
            at=moved.at,
            actor=names.get(moved.actor, moved.actor),
            event="alias",
            detail=f"{moved.name} on {called[moved.base_id][1]}: "
            + (f"v{numbers[moved.from_version_id]}" if moved.from_version_id else "unset")
            + (f" → v{numbers[moved.to_version_id]}" if moved.to_version_id else " → unset")
            + (f" ({moved.reason})" if moved.reason else ""),
            facts={"verdict": moved.verdict, "campaign": moved.campaign_id, "generation": moved.generation},
        )
        for moved in moves
    ]
    told = list(heapq.merge(made, moved_to, key=lambda entry: entry.at, reverse=True))[:limit]
    of_versions = sum(entry.event == "version" for entry in told)
    of_moves = len(told) - of_versions
    version_told = versions[of_versions - 1].number if of_versions else before[0]
    move_told = moves[of_moves - 1].id if of_moves else None
    return told, (version_told, move_told or before[1])


def _actor_names(session: Session, ids: set[str]) -> dict[str, str]:
    rows = session.exec(select(Token.id, Token.name).where(col(Token.id).in_(ids)))
    return dict(rows.all())


def lineage(session: Session, caller: Caller, version: Version) -> LineageInfo:
    """Everything a version was made from, as far as the caller may read it: versions, datasets, recipes."""
    nodes: dict[str, LineageNode] = {}
    edges: list[tuple[str, str, str]] = []
    waiting = [version.digest]
    while waiting:
        digest = waiting.pop()
        if digest in nodes:
            continue
        node, row = _node(session, caller, digest, version if digest == version.digest else None)
        nodes[digest] = node
        if row is None:
            continue
        for parent in session.exec(select(VersionParent).where(VersionParent.version_id == row.id)):
            edges.append((digest, parent.parent, parent.relation))
            waiting.append(parent.parent)
    return LineageInfo(root=version.digest, nodes=list(nodes.values()), edges=edges)


def _provenance(session: Session, version: Version, origins: Lineage) -> Provenance:
    """Who and what made a version: of a worker's from its job's row, of a person's what there is besides their word."""
    made = Provenance(
        by=_actor_names(session, {version.created_by}).get(version.created_by, version.created_by),
        recorded={key.removeprefix("loractl."): text for key, text in version.spec.get("recorded", {}).items()},
        datasets=list(origins.datasets),
        at=version.created_at,
    )
    job = session.get(Job, version.job_id) if version.job_id else None
    if job is None:
        return made
    result, claimed = job.result or {}, _claimed_by(session, job)
    versions = {**result.get("versions", {}), **claimed}
    told = {"device": result.get("device"), "versions": {name: str(text) for name, text in sorted(versions.items())}}
    how = {"job": job.id, "kind": job.kind, "worker": job.worker, "attempt": job.attempt, "recipe": job.recipe_digest}
    return made.model_copy(update=how | told)


def _claimed_by(session: Session, job: Job) -> dict[str, str]:
    """The release of the worker that claimed the last attempt, as it said then: ``loractl/0.1.0``."""
    query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.kind == "claimed")
    event = session.exec(query.order_by(col(JobEvent.id).desc()).limit(1)).first()
    program, _, release = str((event.data if event else {}).get("agent", "")).partition("/")
    return {program: release} if program == "loractl" and release else {}


def _node(
    session: Session, caller: Caller, digest: str, root: Version | None
) -> tuple[LineageNode, Version | None]:
    query = (
        select(Version, Adapter, Base)
        .join(Adapter)
        .join(Base, col(Base.id) == Version.base_id)
        .where(Version.digest == digest)
        .order_by(col(Version.id))
    )
    for version, adapter, base in session.exec(query if root is None else query.where(Version.id == root.id)).all():
        if caller.can("read", adapter.namespace):
            origins = Manifest.parse(manifest_body(session, digest)).lineage
            node = LineageNode(
                digest=digest,
                ref=standing.ref(adapter, version),
                kind="adapter",
                base=base.digest,
                recipe=origins.recipe,
                provenance=_provenance(session, version, origins),
            )
            return node, version
    data = session.exec(select(DatasetVersion, Dataset).join(Dataset).where(DatasetVersion.digest == digest)).all()
    for row, dataset in data:
        if caller.can("read", dataset.namespace):
            ref = f"{dataset.namespace}/{dataset.name}@v{row.number}"
            return LineageNode(digest=digest, ref=ref, kind=dataset.kind, base=None, recipe=None), None
    if tuned := session.exec(select(Base).where(Base.manifest == digest)).first():  # an adapter was extracted from it
        assert tuned.id is not None
        called = bases.labels(session, [tuned])[tuned.id]
        return LineageNode(digest=digest, ref=called, kind="base", base=tuned.digest, recipe=None), None
    return LineageNode(digest=digest, ref=None, kind="unknown", base=None, recipe=None), None
