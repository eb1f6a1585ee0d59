"""Every SELECT that more than one service asks, named by its question.

Functions take a session and give rows or None; what a missing row means is the caller's to say. Pages use keyset
pagination: the last id seen is the cursor.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    String,
    and_,
    bindparam,
    column,
    or_,
    true,
    tuple_,
    union_all,
)
from sqlalchemy import select as columns
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, func, select

from registry.core.lifecycle import VersionState

from .among import among
from .models import (
    Adapter,
    Alias,
    AliasMove,
    Base,
    Dataset,
    DatasetVersion,
    Evaluation,
    Line,
    Namespace,
    Revision,
    Signature,
    SigningKey,
    StoredManifest,
    StoredPolicy,
    TargetFit,
    Version,
)

# ── bases ────────────────────────────────────────────────────────────────────


def base_by_digest(session: Session, digest: str) -> Base | None:
    """The base model with this digest."""
    return session.exec(select(Base).where(Base.digest == digest)).first()


def bases_beginning(session: Session, digits: str) -> Sequence[Base]:
    """Bases whose digest begins so; of many the first two."""
    return session.exec(select(Base).where(col(Base.digest).startswith(digits)).limit(2)).all()


def base_of_revision(session: Session, line: str, number: int | None) -> Base | None:
    """The base behind ``line@rN``; the newest revision without a number."""
    query = select(Base).join(Revision).join(Line).where(Line.name == line)
    if number is not None:
        query = query.where(Revision.number == number)
    return session.exec(query.order_by(col(Revision.number).desc()).limit(1)).first()


def revision_names(session: Session, base_ids: Iterable[int]) -> dict[int, list[str]]:
    """base id -> its ``line@rN`` names, oldest first."""
    found: dict[int, list[str]] = {}
    for base_id, line, number in session.execute(_revision_names(), {"bases": {*base_ids}}):
        found.setdefault(base_id, []).append(f"{line}@r{number}")
    return found


@cache
def _revision_names() -> Select[int, str, int]:
    query = columns(col(Revision.base_id), col(Line.name), col(Revision.number)).join(Line)
    return query.where(among(col(Revision.base_id), "bases")).order_by(col(Revision.id))


def base_names(session: Session, base_ids: Iterable[int]) -> dict[int, tuple[str, str | None]]:
    """base id -> its digest and its newest ``line@rN`` name, None outside of lines."""
    rows = session.execute(_base_names(), {"bases": {*base_ids}})
    return {i: (digest, line and f"{line}@r{number}") for i, digest, line, number in rows}


@cache
def _base_names() -> Select[*tuple[Any, ...]]:
    return (
        columns(col(Base.id), col(Base.digest), col(Line.name), col(Revision.number))
        .outerjoin(Revision, col(Revision.base_id) == Base.id)
        .outerjoin(Line, col(Line.id) == Revision.line_id)
        .where(among(col(Base.id), "bases"))
        .order_by(col(Revision.id))
    )


def current_base_of_line_of(session: Session, base_id: int) -> Base | None:
    """The newest base of the line that ``base_id`` last joined."""
    line_id = select(Revision.line_id).where(Revision.base_id == base_id).order_by(col(Revision.id).desc()).limit(1)
    query = (
        select(Base)
        .join(Revision)
        .where(Revision.line_id == line_id.scalar_subquery())
        .order_by(col(Revision.number).desc())
        .limit(1)
    )
    return session.exec(query).first()


def line_names(session: Session) -> Sequence[str]:
    """Names of all lines."""
    return session.exec(select(Line.name).order_by(Line.name)).all()


# ── adapters and versions ────────────────────────────────────────────────────


def adapter_by_name(session: Session, namespace: str, name: str) -> Adapter | None:
    """The series ``namespace/name``."""
    return session.execute(_adapter_by_name(), {"namespace": namespace, "name": name}).scalars().first()


@cache
def _adapter_by_name() -> Select[Adapter]:
    return columns(Adapter).where(
        col(Adapter.namespace) == bindparam("namespace"), col(Adapter.name) == bindparam("name")
    )


def adapters_by_name(session: Session, names: Iterable[tuple[str, str]]) -> Sequence[Adapter]:
    """Those of the series (namespace, name) that are there."""
    named = tuple_(col(Adapter.namespace), col(Adapter.name)).in_(list(names))
    return session.exec(select(Adapter).where(named)).all()


def adapter_names(session: Session, namespaces: Sequence[str] | None) -> list[str]:
    """Names of the series in ``namespaces`` (None: all), for suggestions."""
    query = select(Adapter.namespace, Adapter.name).limit(5000)
    if namespaces is not None:
        query = query.where(col(Adapter.namespace).in_(namespaces))
    return [f"{namespace}/{name}" for namespace, name in session.exec(query)]


def version_by_number(session: Session, adapter_id: int, number: int) -> Version | None:
    """``@vN`` of a series."""
    return session.exec(select(Version).where(Version.adapter_id == adapter_id, Version.number == number)).first()


def version_by_digest(session: Session, adapter_id: int, digest: str) -> Version | None:
    """``@sha256:…`` of a series."""
    return session.execute(_version_by_digest(), {"adapter": adapter_id, "digest": digest}).scalars().first()


@cache
def _version_by_digest() -> Select[Version]:
    return columns(Version).where(
        col(Version.adapter_id) == bindparam("adapter"), col(Version.digest) == bindparam("digest")
    )


def versions_beginning(session: Session, adapter_id: int, digits: str) -> Sequence[Version]:
    """Versions of a series whose digest begins so; of many the first two."""
    query = select(Version).where(Version.adapter_id == adapter_id, col(Version.digest).startswith(digits))
    return session.exec(query.limit(2)).all()


def latest_version(session: Session, adapter_id: int, base_id: int | None = None) -> Version | None:
    """The newest live version of a series, on one base where ``base_id`` is given."""
    query = select(Version).where(Version.adapter_id == adapter_id, Version.status == VersionState.LIVE)
    if base_id is not None:
        query = query.where(Version.base_id == base_id, col(Version.latest))
    return session.exec(query.order_by(col(Version.number).desc()).limit(1)).first()


def newest_versions(session: Session, adapter_ids: Iterable[int]) -> Sequence[Version]:
    """The newest live version of each series that has one."""
    return session.execute(_newest_versions(), {"series": {*adapter_ids}}).scalars().all()


@cache
def _newest_versions() -> Select[Version]:
    live = (among(col(Version.adapter_id), "series"), col(Version.status) == VersionState.LIVE)
    newest = columns(func.max(Version.id)).where(*live).group_by(col(Version.adapter_id))
    return columns(Version).where(col(Version.id).in_(newest))


def namespaces_of_version(session: Session, digest: str) -> Sequence[str]:
    """Namespaces in which a version with this manifest digest lives."""
    query = select(Adapter.namespace).join(Version).where(Version.digest == digest).distinct()
    return session.exec(query).all()


def manifests_of_versions(session: Session, digests: Iterable[str]) -> dict[tuple[str, str, str], bytes]:
    """(namespace, name, digest) of every version with one of these manifests that is not deleted -> the manifest."""
    rows = session.execute(_manifests_of_versions(), {"digests": {*digests}})
    return {(namespace, name, digest): body for namespace, name, digest, body in rows}


@cache
def _manifests_of_versions() -> Select[str, str, str, bytes]:
    return (
        columns(col(Adapter.namespace), col(Adapter.name), col(Version.digest), col(StoredManifest.body))
        .join(Version)
        .join(StoredManifest, col(StoredManifest.digest) == Version.digest)
        .where(among(col(Version.digest), "digests"), col(Version.status) != VersionState.DELETED)
    )


# ── aliases ──────────────────────────────────────────────────────────────────


def alias_row(session: Session, adapter_id: int, base_id: int, name: str) -> Alias | None:
    """Where an alias of a series points on one base."""
    return session.exec(
        select(Alias).where(Alias.adapter_id == adapter_id, Alias.base_id == base_id, Alias.name == name)
    ).first()


class Pointing(NamedTuple):
    """An alias on a base, the version that it points to, and its last move."""

    adapter_id: int
    base_id: int
    name: str
    generation: int
    version_id: int
    number: int
    digest: str
    moved_at: datetime
    actor: str
    reason: str


def aliases_of(session: Session, adapter_ids: Iterable[int]) -> list[Pointing]:
    """Aliases of these series, by base and name."""
    return [Pointing(*row) for row in session.execute(_aliases_of(), {"series": {*adapter_ids}})]


@cache
def _aliases_of() -> Select[*tuple[Any, ...]]:
    last = and_(
        col(AliasMove.adapter_id) == Alias.adapter_id,
        col(AliasMove.base_id) == Alias.base_id,
        col(AliasMove.name) == Alias.name,
        col(AliasMove.generation) == Alias.generation,
    )
    return (
        columns(col(Alias.adapter_id), col(Alias.base_id), col(Alias.name), col(Alias.generation))
        .add_columns(col(Alias.version_id), col(Version.number), col(Version.digest))
        .add_columns(col(AliasMove.at), col(AliasMove.actor), col(AliasMove.reason))
        .join(AliasMove, last)
        .join(Version, col(Version.id) == Alias.version_id)
        .where(among(col(Alias.adapter_id), "series"))
        .order_by(col(Alias.adapter_id), col(Alias.base_id).desc(), col(Alias.name))
    )


def alias_names_of_versions(session: Session, version_ids: Iterable[int]) -> dict[int, list[str]]:
    """version id -> names of aliases that point at it."""
    found: dict[int, list[str]] = {}
    for version_id, name in session.execute(_alias_names_of_versions(), {"versions": {*version_ids}}):
        found.setdefault(version_id, []).append(name)
    return found


@cache
def _alias_names_of_versions() -> Select[int, str]:
    query = columns(col(Alias.version_id), col(Alias.name)).where(among(col(Alias.version_id), "versions"))
    return query.order_by(col(Alias.name))


class Pointed(NamedTuple):
    """What an alias means on a base, and all that may change about the description of that version.

    Histories only grow, so their lengths tell whether anything was added; the newest id would not, since ids are
    given out before rows are seen.
    """

    version_id: int
    evidence: str
    moves: int
    """Of all aliases of the series."""
    evaluations: int
    """Of the version."""
    revisions: int
    """Of the base."""
    status: str
    """Of the version."""
    signatures: int
    """Of the version, revoked ones too."""
    living: int
    """Those of them whose key is not revoked; with the number of all it tells whether another counts now."""
    signature_required: bool | None
    """None: the namespace has no row."""
    engines: int
    """Of the version: a bit for each engine that loads it."""

    def given(self, *, exact: bool, engine_bit: int | None) -> bool:
        """Whether that version is what `resolve` gives for this alias and base; if not, it refuses."""
        signed = not self.signature_required or self.living > 0
        loads = engine_bit is None or self.engines & engine_bit != 0
        return exact and loads and signed and self.status == VersionState.LIVE


class Pointer(NamedTuple):
    """An alias of a series on the base with a digest."""

    namespace: str
    name: str
    alias: str
    base: str


def pointed_at(session: Session, asked: Sequence[Pointer]) -> list[Pointed | None]:
    """What each alias means, None where it is not set; on PostgreSQL one statement for any number."""
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        lists = dict(zip(Pointer._fields, map(list, zip(*asked, strict=True)), strict=True))
        found = {place: Pointed(*facts) for *facts, place in connection.execute(_pointed_at_many(), lists)}
        return [found.get(place) for place in range(1, len(asked) + 1)]
    rows = (connection.execute(_pointed_at_one(), pointer._asdict()).first() for pointer in asked)
    return [None if row is None else Pointed(*row) for row in rows]


@cache
def _pointed_at_one() -> Select[*tuple[Any, ...]]:
    return _pointed_at(*(bindparam(field, type_=String) for field in Pointer._fields))


@cache
def _pointed_at_many() -> Select[*tuple[Any, ...]]:
    lists = (bindparam(field, type_=ARRAY(String)) for field in Pointer._fields)
    texts = (column(field, String) for field in Pointer._fields)
    asked = func.unnest(*lists).table_valued(*texts, with_ordinality="place").render_derived(name="asked")
    return _pointed_at(*(asked.c[field] for field in Pointer._fields)).add_columns(asked.c.place)


def _pointed_at(
    namespace: ColumnElement[str], name: ColumnElement[str], alias: ColumnElement[str], base: ColumnElement[str]
) -> Select[*tuple[Any, ...]]:
    moves = columns(func.count(col(AliasMove.id))).where(col(AliasMove.adapter_id) == Adapter.id)
    evaluations = columns(func.count(col(Evaluation.id))).where(col(Evaluation.version_id) == Version.id)
    revisions = columns(func.count(col(Revision.id))).where(col(Revision.base_id) == Base.id)
    histories = (moves.scalar_subquery(), evaluations.scalar_subquery(), revisions.scalar_subquery())
    signed = columns(func.count(col(Signature.id))).where(col(Signature.version_id) == Version.id)
    living = signed.join(SigningKey, col(SigningKey.id) == Signature.key_id).where(col(SigningKey.revoked_at).is_(None))
    required = columns(col(Namespace.require_signature)).where(col(Namespace.name) == Adapter.namespace)
    signing = (signed.scalar_subquery(), living.scalar_subquery(), required.scalar_subquery())
    return (
        columns(col(Version.id), col(Version.evidence), *histories, col(Version.status), *signing)
        .add_columns(col(Version.engines))
        .join_from(Adapter, Alias, col(Alias.adapter_id) == Adapter.id)
        .join(Base, col(Base.id) == Alias.base_id)
        .join(Version, col(Version.id) == Alias.version_id)
        .where(col(Adapter.namespace) == namespace, col(Adapter.name) == name)
        .where(col(Alias.name) == alias, col(Base.digest) == base)
    )


# ── evaluations ──────────────────────────────────────────────────────────────


def newest_evaluation(
    session: Session, *, base_id: int, digest: str | None, suite: str, harness: str | None = None
) -> Evaluation | None:
    """The newest scoring of a version's content (None: the bare base) on a suite's, by one harness where given.

    Content, not rows: the same version and the same suite may be pushed to several namespaces.
    """
    query = select(Evaluation).where(Evaluation.base_id == base_id, on_suite(suite))
    if digest is None:
        query = query.where(col(Evaluation.version_id).is_(None))
    else:
        query = query.where(col(Evaluation.version_id).in_(select(Version.id).where(Version.digest == digest)))
    if harness is not None:
        query = query.where(Evaluation.harness == harness)
    return session.exec(query.order_by(col(Evaluation.id).desc()).limit(1)).first()


def on_suite(*digests: str) -> ColumnElement[bool]:
    """The condition that an evaluation is on a suite with one of these digests, whatever it is called."""
    return col(Evaluation.suite_id).in_(select(DatasetVersion.id).where(col(DatasetVersion.digest).in_(digests)))


class Scoring(NamedTuple):
    """An evaluation, and the names of what it is about."""

    evaluation: Evaluation
    base: str
    suite: str
    version: str | None


def newest_evaluations_of(session: Session, version_ids: Iterable[int]) -> list[Scoring]:
    """The newest scoring of each version on each base and suite."""
    return _scorings(session, _newest_evaluations_of(), {"versions": {*version_ids}})


@cache
def _newest_evaluations_of() -> Select[*tuple[Any, ...]]:
    newest = (
        columns(func.max(Evaluation.id))
        .where(among(col(Evaluation.version_id), "versions"))
        .group_by(col(Evaluation.version_id), col(Evaluation.base_id), col(Evaluation.suite_id))
    )
    return _scored().where(col(Evaluation.id).in_(newest))


def evaluations_of(session: Session, adapter_id: int, *, after: int, limit: int) -> list[Scoring]:
    """Scorings of a series' versions, oldest first, after a cursor."""
    query = _scored().where(col(Version.adapter_id) == adapter_id, col(Evaluation.id) > after)
    return _scorings(session, query.limit(limit), {})


def _scored() -> Select[*tuple[Any, ...]]:
    suite = (col(Dataset.namespace), col(Dataset.name), col(DatasetVersion.number))
    version = (col(Adapter.namespace), col(Adapter.name), col(Version.number))
    return (
        columns(Evaluation)
        .add_columns(col(Base.digest), *suite, *version)
        .join(Base, col(Base.id) == Evaluation.base_id)
        .join(DatasetVersion, col(DatasetVersion.id) == Evaluation.suite_id)
        .join(Dataset, col(Dataset.id) == DatasetVersion.dataset_id)
        .outerjoin(Version, col(Version.id) == Evaluation.version_id)
        .outerjoin(Adapter, col(Adapter.id) == Version.adapter_id)
        .order_by(col(Evaluation.id))
    )


def _scorings(session: Session, query: Select[*tuple[Any, ...]], values: dict[str, Any]) -> list[Scoring]:
    return [
        Scoring(row, base, f"{place}/{suite}@v{number}", version and f"{namespace}/{name}@v{version}")
        for row, base, place, suite, number, namespace, name, version in session.execute(query, values)
    ]


# ── data and policies ────────────────────────────────────────────────────────


def dataset_version(
    session: Session, kind: str, namespace: str, name: str, number: int | None = None, digits: str | None = None
) -> DatasetVersion | None:
    """A version of a dataset or suite: the newest, or that of a number, or the newest whose digest begins so."""
    query = (
        select(DatasetVersion)
        .join(Dataset)
        .where(Dataset.kind == kind, Dataset.namespace == namespace, Dataset.name == name)
    )
    if number is not None:
        query = query.where(DatasetVersion.number == number)
    if digits is not None:
        query = query.where(col(DatasetVersion.digest).startswith(digits))
    return session.exec(query.order_by(col(DatasetVersion.number).desc()).limit(1)).first()


def dataset_names(session: Session, kind: str, namespaces: Sequence[str] | None) -> list[str]:
    """Names of the series of a kind in ``namespaces`` (None: all), for suggestions."""
    query = select(Dataset.namespace, Dataset.name).where(Dataset.kind == kind).limit(5000)
    if namespaces is not None:
        query = query.where(col(Dataset.namespace).in_(namespaces))
    return [f"{namespace}/{name}" for namespace, name in session.exec(query)]


def newest_policy(session: Session, namespace: str, *names: str) -> StoredPolicy | None:
    """The newest policy of a series, or of the namespace for ``""``; of two, a series' own goes before ``""``."""
    return session.execute(_newest_policy(), {"namespace": namespace, "names": {*names}}).scalars().first()


@cache
def _newest_policy() -> Select[StoredPolicy]:
    return (
        columns(StoredPolicy)
        .where(col(StoredPolicy.namespace) == bindparam("namespace"), among(col(StoredPolicy.name), "names"))
        .order_by(col(StoredPolicy.name).desc(), col(StoredPolicy.revision).desc())
        .limit(1)
    )


# ── compatibility ────────────────────────────────────────────────────────────

_Id = int | ColumnElement[int]
_RANGES = 200
"""Ranges of one union: SQLite takes 500 at most."""


def compatible_versions(
    session: Session,
    *,
    base_id: int,
    exact: bool,
    classes: Sequence[str],
    alias: str | None,
    max_rank: int | None,
    engine_bit: int | None,
    evidence: Sequence[str] | None,
    namespaces: Sequence[str] | None,
    task: str | None,
    after: int,
    limit: int,
) -> Sequence[tuple[Version, Adapter, TargetFit | None]]:
    """Versions bound to a base, where ``exact``, or standing to it in one of ``classes``, and how they stand.

    Of each series and base the newest, or what ``alias`` names. One index range per (base, target set), each cut at
    ``limit``, so that the cost does not grow with the number of adapters. PostgreSQL walks the ranges in one LATERAL,
    since a union of them is built and planned for longer than it runs; SQLite has no LATERAL and takes the union.
    """

    def narrowed(old_id: _Id, target_set_id: _Id | None) -> Select[int | None]:
        where: type[Version | Alias] = Version if alias is None else Alias  # whose index gives the range in order
        key = col(Version.id) if alias is None else col(Alias.version_id)
        query: Select[Any] = columns(key.label("id")).where(col(where.base_id) == old_id)
        if alias is None:
            query = query.where(col(Version.latest))
        else:
            pointed = aliased(Version)  # asked of each by its id: a set of all that fell would hold every tombstone
            status = columns(col(pointed.status)).where(col(pointed.id) == key).scalar_subquery()
            query = query.where(col(Alias.name) == alias, status == VersionState.LIVE)
            if any(narrow is not None for narrow in (max_rank, engine_bit, evidence, namespaces, task)):
                query = query.join(Version, col(Version.id) == key)
        if target_set_id is not None:
            query = query.where(col(where.target_set_id) == target_set_id)
        if max_rank is not None:
            query = query.where(col(Version.rank) <= max_rank)
        if engine_bit is not None:
            query = query.where(col(Version.engines).bitwise_and(engine_bit) != 0)
        if evidence is not None:
            query = query.where(col(Version.evidence).in_(evidence))
        if namespaces is not None or task is not None:
            query = query.join(Adapter, col(Adapter.id) == Version.adapter_id)
            if namespaces is not None:
                query = query.where(col(Adapter.namespace).in_(namespaces))
            if task is not None:
                query = query.where(col(Adapter.task) == task)
        return query.where(key > after).order_by(key).limit(limit)

    ranges = columns(col(TargetFit.old_id), col(TargetFit.target_set_id)).where(
        col(TargetFit.new_id) == base_id, col(TargetFit.old_id) != base_id, col(TargetFit.fit).in_(classes)
    )
    parts = [columns(narrowed(base_id, None).subquery().c.id)] if exact else []
    if not classes:
        pass
    elif session.get_bind().dialect.name == "postgresql":
        pairs = ranges.subquery("ranges")
        within = narrowed(pairs.c.old_id, pairs.c.target_set_id).lateral()
        parts.append(columns(within.c.id).select_from(pairs).join(within, true()))
    else:
        parts += [columns(narrowed(*pair).subquery().c.id) for pair in session.execute(ranges)]
    ids: list[int] = []
    for first in range(0, len(parts), _RANGES):
        ids += session.execute(union_all(*parts[first : first + _RANGES]).order_by("id").limit(limit)).scalars()
    if not ids:
        return []
    stands = and_(
        col(TargetFit.old_id) == Version.base_id,
        col(TargetFit.new_id) == base_id,
        col(TargetFit.target_set_id) == Version.target_set_id,
    )
    query = select(Version, Adapter, TargetFit).join(Adapter, col(Adapter.id) == Version.adapter_id)
    query = query.outerjoin(TargetFit, stands).where(col(Version.id).in_(sorted(ids)[:limit]))
    return session.exec(query.order_by(col(Version.id))).all()


def adapters_page(
    session: Session,
    *,
    namespaces: Sequence[str] | None,
    text: str | None,
    task: str | None,
    after: tuple[str, str],
    limit: int,
) -> Sequence[Adapter]:
    """Series by name, after a cursor, whose name or task holds ``text``."""
    query = select(Adapter).where(
        or_(
            col(Adapter.namespace) > after[0],
            and_(col(Adapter.namespace) == after[0], col(Adapter.name) > after[1]),
        )
    )
    if namespaces is not None:
        query = query.where(col(Adapter.namespace).in_(namespaces))
    if task is not None:
        query = query.where(col(Adapter.task) == task)
    if text:
        in_name = col(Adapter.name).contains(text, autoescape=True)
        query = query.where(or_(in_name, col(Adapter.task).contains(text, autoescape=True)))
    return session.exec(query.order_by(Adapter.namespace, Adapter.name).limit(limit)).all()
