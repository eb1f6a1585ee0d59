"""Base models: named by content, registered by their table, members of lines, derived from each other.

A base may be here without its weights: its table is enough to bind adapters to it. Weights come by a push,
or stay at a pinned location (``hf://org/name@<commit>``; ``file://`` under a configured root, in embedded
mode). A location is stored and checked for form; jobs run only on weights that were uploaded, and refuse
others with `WeightsAbsent` and the command that uploads them.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import func
from sqlmodel import Session, col, select, update

from registry.core.base_model import BaseModel, diff
from registry.core.digest import Digest
from registry.core.errors import BadRequest, BaseNotFound, PathUnusable, RevisionTaken, UnlikeLine
from registry.core.names import BaseReference, check_name
from registry.db import queries
from registry.db.models import Base, BaseTable, Derivation, Line, Revision, StoredManifest
from registry.schemas import (
    BaseInfo,
    BaseRegistration,
    DerivationInfo,
    DerivationRequest,
    DiffInfo,
    RevisionRequest,
    Wishes,
)
from registry.settings import Settings

from . import audit, fits
from .blobs import add_once
from .references import nearest, one_of
from .tokens import Caller

NAMESPACE = "base"
"""The namespace whose scopes decide about base models."""
_HINTS = 16
_HINT_TABLE_BYTES = 1 << 20
_PINNED = re.compile(r"hf://[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}@[0-9a-f]{40}")


def register(
    session: Session, caller: Caller, settings: Settings, model: BaseModel, request: BaseRegistration, now: datetime
) -> Base:
    """Make a base known by its table; doing it again changes nothing.

    Anybody who may publish anywhere may bring a table, so that an author needs no administrator. A line, names,
    a derivation or a location speak for everybody: they need ``publish`` on the namespace ``base``.
    """
    wishes = request.wishes
    if wishes.line or wishes.names or wishes.parent or request.location or not caller.can_somewhere("publish"):
        caller.require("publish", NAMESPACE)
    if wishes.line and not wishes.unlike:
        require_like(session, wishes.line, model)
    location = check_location(request.location, settings) if request.location else None
    base = ensure(session, model, caller.token_id, now)
    if location and base.location != location:
        _audit(session, "base.located", base, caller.token_id, now, {"location": base.location}, {"location": location})
        base.location = location
        session.add(base)
    apply_wishes(session, base, wishes, caller.token_id, now)
    return base


def ensure(session: Session, model: BaseModel, actor: str, now: datetime) -> Base:
    """The row of ``model``; a new one gets its table and how every known adapter stands to it."""
    digest = str(model.digest)
    if found := queries.base_by_digest(session, digest):
        return found
    tokenizer = model.tokenizer
    add_once(
        session,
        Base,
        {
            "digest": digest,
            "weights_digest": str(model.weights),
            "arch_digest": str(model.arch),
            "arch_kind": model.arch_kind,
            "model_type": model.model_type[:64],
            "parameters": model.parameters,
            "vocabulary_digest": tokenizer.vocabulary and str(tokenizer.vocabulary),
            "template_digest": tokenizer.chat_template and str(tokenizer.chat_template),
            "weights": "absent",
            "names": [],
            "created_by": actor,
            "created_at": now,
        },
    )
    base = session.exec(select(Base).where(Base.digest == digest)).one()
    add_once(session, BaseTable, {"base_id": base.id, "body": model.to_compressed()})
    _audit(session, "base.known", base, actor, now, None, {"parameters": base.parameters, "type": base.model_type})
    fits.ensure_fits(session, new=base)
    return base


def _audit(
    session: Session,
    event: str,
    base: Base,
    actor: str,
    now: datetime,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> None:
    audit.record(
        session, event, base.digest, actor=actor, namespace=NAMESPACE, now=now, before=before, after=after
    )


def keep_full(session: Session, base: Base, model: BaseModel) -> None:
    """Mark a base as read completely; its table and tokenizer are what the files hold."""
    tokenizer, before = model.tokenizer, base.vocabulary_digest
    base.weights = "full"
    base.vocabulary_digest = str(tokenizer.vocabulary) if tokenizer.vocabulary else None
    base.template_digest = str(tokenizer.chat_template) if tokenizer.chat_template else None
    table = session.get_one(BaseTable, base.id)
    table.body = model.to_compressed()
    session.add_all([base, table])
    if base.vocabulary_digest != before:
        session.flush()
        fits.recompute_all(session, base)


def not_taken(base: Base, model: BaseModel) -> list[str]:
    """A warning when ``model``, whose weights are here, came with another tokenizer: the first files are kept."""
    tokenizer = model.tokenizer
    pairs = (
        ("tokenizer", tokenizer.vocabulary, base.vocabulary_digest),
        ("chat template", tokenizer.chat_template, base.template_digest),
    )
    differ = [what for what, mine, kept in pairs if mine is not None and str(mine) != kept]
    if not differ:
        return []
    what = f"this {' and this '.join(differ)} {'was' if len(differ) == 1 else 'were'} not taken"
    here = f"base {Digest.parse(base.digest).short} is here with the files that came first, and adapters rest on those"
    way_out = "an adapter may bring its own: the tokenizer's files in its folder are pushed and pulled with it"
    return [f"{here}: {what}; {way_out}"]


def apply_wishes(session: Session, base: Base, wishes: Wishes, actor: str, now: datetime) -> Revision | None:
    """Names, a declared derivation and the line that a push or a registration asked for."""
    if wishes.names:  # which others may be adding to
        query = select(Base).where(Base.id == base.id).with_for_update()
        base = session.exec(query.execution_options(populate_existing=True)).one()
    fresh = [name for name in wishes.names if name not in base.names]
    if fresh:
        names = [*base.names, *fresh]
        _audit(session, "base.named", base, actor, now, {"names": base.names}, {"names": names})
        base.names = names
        session.add(base)
    if wishes.parent is not None and wishes.parent_kind is not None:
        declare(session, base, wishes.parent, wishes.parent_kind, {}, actor, now)
    return add_revision(session, wishes.line, base, wishes.revision, actor, now) if wishes.line else None


def require_like(session: Session, line: str, model: BaseModel) -> None:
    """`UnlikeLine` when ``line`` would go on with another model.

    A line is what upgrades follow: each adapter on its newest revision would be carried to what is none of its kind.
    """
    newest = queries.base_of_revision(session, line, None)
    if newest is None or newest.id is None or newest.digest == str(model.digest):
        return
    if not fits.model_of(session, newest.id).by_name.keys() & model.by_name.keys():
        called = labels(session, [newest])[newest.id]
        raise UnlikeLine(line=line, newest=called, base=model.digest.short)


def repeat(session: Session, caller: Caller, line: str, request: RevisionRequest, now: datetime) -> Base:
    """Make what an earlier revision of ``line`` is its newest again; it gets a new number, and nothing is rewritten."""
    caller.require("publish", NAMESPACE)
    base = find(session, f"{check_name(line, 'line')}@r{request.revision}")
    add_revision(session, line, base, None, caller.token_id, now)
    return base


def add_revision(session: Session, line: str, base: Base, wanted: int | None, actor: str, now: datetime) -> Revision:
    """Make ``base`` the newest revision of ``line``; the same one when it is that already.

    `RevisionTaken` when ``wanted`` is not the number it gets.
    """
    add_once(session, Line, {"name": line, "next_revision": 1, "created_at": now})
    row = session.exec(select(Line).where(Line.name == line).with_for_update()).one()
    newest = session.exec(
        select(Revision).where(Revision.line_id == row.id).order_by(col(Revision.number).desc()).limit(1)
    ).first()
    if newest is not None and newest.base_id == base.id and wanted in (None, newest.number):
        return newest
    number = newest.number + 1 if newest else 1
    if wanted not in (None, number):
        raise RevisionTaken(line=line, wanted=wanted, next=number)
    session.exec(update(Line).where(col(Line.id) == row.id).values(next_revision=number + 1))
    assert row.id is not None and base.id is not None
    revision = Revision(line_id=row.id, number=number, base_id=base.id, created_by=actor, created_at=now)
    session.add(revision)
    session.flush()
    before = {"revision": newest.number, "base": session.get_one(Base, newest.base_id).digest} if newest else None
    audit.record(
        session,
        "line.revision",
        line,
        actor=actor,
        namespace=NAMESPACE,
        now=now,
        before=before,
        after={"revision": number, "base": base.digest},
    )
    return revision


def declare(
    session: Session, child: Base, parent: str, kind: str, detail: dict[str, Any], actor: str, now: datetime
) -> Derivation:
    """Record a person's word on how ``child`` came from ``parent`` (a reference)."""
    return record_derivation(session, child, find(session, parent), kind, "declared", detail, now, actor)


def record_derivation(
    session: Session,
    child: Base,
    parent: Base,
    kind: str,
    evidence: str,
    detail: dict[str, Any],
    now: datetime,
    actor: str = audit.ITSELF,
) -> Derivation:
    """Record how ``child`` came from ``parent``; what was measured replaces what was declared, never the reverse.

    ``detail`` of a measurement: ``error`` (relative), ``drift`` (tensor -> ‖W2 − W1‖/‖W1‖), ``job``.
    """
    assert child.id is not None and parent.id is not None
    if child.id == parent.id:
        raise BadRequest(problems=f"base {child.digest} cannot be derived from itself")
    add_once(
        session,
        Derivation,
        {
            "child_id": child.id,
            "parent_id": parent.id,
            "kind": kind,
            "evidence": evidence,
            "detail": detail,
            "created_at": now,
        },
    )
    query = select(Derivation).where(
        Derivation.child_id == child.id, Derivation.parent_id == parent.id, Derivation.kind == kind
    )
    row = session.exec(query.with_for_update()).one()
    if evidence == "measured" and (row.evidence, row.detail) != (evidence, detail):
        row.evidence, row.detail = evidence, detail
        session.add(row)
        session.flush()
    told = {"parent": parent.digest, "kind": kind, "evidence": row.evidence, "job": row.detail.get("job")}
    _audit(session, "base.derived", child, actor, now, None, told)
    if evidence == "measured":
        fits.recompute(session, old=parent, new=child)
    return row


def derive(session: Session, caller: Caller, ref: str, request: DerivationRequest, now: datetime) -> DerivationInfo:
    """Declare a derivation of an existing base."""
    caller.require("publish", NAMESPACE)
    child, parent = find(session, ref), find(session, request.parent)
    row = record_derivation(session, child, parent, request.kind, "declared", request.detail, now, caller.token_id)
    return DerivationInfo(
        child=child.digest, parent=parent.digest, kind=row.kind, evidence=row.evidence, detail=row.detail
    )


# ── finding ──────────────────────────────────────────────────────────────────


def find(session: Session, ref: str) -> Base:
    """The base that ``ref`` means: a digest or its beginning, ``line@rN``, or a line's newest.

    `BaseNotFound` with the nearest name.
    """
    reference = BaseReference.parse(ref)
    if reference.digest is not None:
        found = queries.base_by_digest(session, str(reference.digest))
    elif reference.begins is not None:
        found = one_of(queries.bases_beginning(session, str(reference.begins)), ref, "one base model")
    else:
        found = queries.base_of_revision(session, str(reference.line), reference.revision)
    if found is None:
        raise BaseNotFound(ref=ref[:100], nearest=nearest(ref.partition("@")[0], queries.line_names(session)))
    return found


def labels(session: Session, bases: Iterable[Base]) -> dict[int, str]:
    """What people call bases: the newest ``line@rN``, else the short digest."""
    return {i: name for i, (_, name) in named(session, [row.id for row in bases if row.id is not None]).items()}


def named(session: Session, ids: Iterable[int]) -> dict[int, tuple[str, str]]:
    """base id -> its digest, and what people call it."""
    found = queries.base_names(session, ids)
    return {i: (digest, name or Digest.parse(digest).short) for i, (digest, name) in found.items()}


def meant_by(session: Session, name: str | None, revision: str | None) -> list[Base]:
    """The registered bases that a declared name and revision stand for: by their names elsewhere, or by line."""
    if not name:
        return []
    wanted = {f"{name}@{revision}"} if revision else set()
    every = session.exec(select(Base)).all()
    for called in (wanted, {name}):
        if found := [base for base in every if called & set(base.names)]:
            return found
    line, _, number = name.partition("@r")
    query = select(Base).join(Revision).join(Line).where(Line.name == line)
    if number:
        query = query.where(Revision.number == (int(number) if number.isdigit() and len(number) < 10 else 0))
    return list({base.digest: base for base in session.exec(query)}.values())


def models(session: Session) -> dict[str, BaseModel]:
    """Some of the newest registered bases by label: where a refused adapter might belong.

    A hint at the end of a refusal, so it may not cost much: few bases, and none with a table of many megabytes.
    """
    small = func.length(col(BaseTable.body)) <= _HINT_TABLE_BYTES
    newest = select(Base).join(BaseTable).where(small).order_by(col(Base.id).desc())
    rows = session.exec(newest.limit(_HINTS)).all()
    called = labels(session, rows)
    return {called[row.id]: fits.model_of(session, row.id) for row in rows if row.id is not None}


def check_location(location: str, settings: Settings) -> str:
    """``location`` itself when it pins its content, or lies under an allowed root in embedded mode."""
    if _PINNED.fullmatch(location):
        return location
    parts = urlsplit(location)
    if parts.scheme != "file":
        raise BadRequest(problems="location: expected hf://ORG/NAME@<40 hexadecimal digits of the commit>, or file://")
    if settings.mode != "embedded":
        raise BadRequest(problems="location: file:// is for embedded mode; upload the weights instead")
    path = Path(unquote(parts.path)).resolve()
    if parts.netloc or not any(path.is_relative_to(root) for root in settings.file_roots):
        roots = ", ".join(map(str, settings.file_roots)) or "no folder is configured: LORACTL_FILE_ROOTS"
        raise PathUnusable(path=str(path), reason=f"it is not below an allowed root ({roots})")
    return f"file://{path}"


# ── showing ──────────────────────────────────────────────────────────────────


def page(session: Session, caller: Caller, *, line: str | None, before: int, limit: int) -> Sequence[Base]:
    """Bases, newest first, of one line where it is given; ``before`` is the last id seen."""
    _may_read(caller)
    query = select(Base).where(col(Base.id) < before)
    if line is not None:
        query = query.where(col(Base.id).in_(select(Revision.base_id).join(Line).where(Line.name == line)))
    return session.exec(query.order_by(col(Base.id).desc()).limit(limit)).all()


def show(session: Session, caller: Caller, ref: str) -> BaseInfo:
    """One base."""
    _may_read(caller)
    return infos(session, [find(session, ref)])[0]


def table(session: Session, caller: Caller, ref: str) -> tuple[str, bytes]:
    """A base's digest and its compressed tensor table."""
    _may_read(caller)
    base = find(session, ref)
    row = session.get(BaseTable, base.id)
    assert row is not None
    return base.digest, row.body


def infos(session: Session, rows: Sequence[Base]) -> list[BaseInfo]:
    """Bases as they travel."""
    names = queries.revision_names(session, [row.id for row in rows if row.id is not None])
    manifests = [row.manifest for row in rows if row.manifest]
    query = select(StoredManifest.digest, StoredManifest.size).where(col(StoredManifest.digest).in_(manifests))
    sizes = dict(session.exec(query).all())
    return [
        BaseInfo(
            digest=row.digest,
            weights_digest=row.weights_digest,
            arch_digest=row.arch_digest,
            arch_kind=row.arch_kind,
            model_type=row.model_type,
            parameters=row.parameters,
            weights="absent" if row.weights == "absent" else "full" if row.weights == "full" else "parts",
            revisions=names.get(row.id or 0, []),
            names=row.names,
            location=row.location,
            vocabulary_digest=row.vocabulary_digest,
            template_digest=row.template_digest,
            manifest=row.manifest,
            size=sizes.get(row.manifest) if row.manifest else None,
            created_at=row.created_at,
        )
        for row in rows
    ]


def difference(session: Session, caller: Caller, a_ref: str, b_ref: str) -> DiffInfo:
    """How base ``b`` differs from base ``a``, tensor by tensor."""
    _may_read(caller)
    a, b = find(session, a_ref), find(session, b_ref)
    assert a.id is not None and b.id is not None
    found = diff(fits.model_of(session, a.id), fits.model_of(session, b.id))
    row = session.exec(
        select(Derivation)
        .where(Derivation.child_id == b.id, Derivation.parent_id == a.id)
        .order_by(col(Derivation.evidence).desc(), col(Derivation.id).desc())
    ).first()
    drifts = sorted((fits.measured_drift(session, old_id=a.id, new_id=b.id) or {}).values())
    return DiffInfo(
        a=a.digest,
        b=b.digest,
        equal=found.same,
        changed=list(found.changed),
        added=list(found.added),
        removed=list(found.removed),
        reshaped=list(found.reshaped),
        arch={name: list(pair) for name, pair in found.arch.items()},
        vocabulary_changed=found.vocabulary_changed,
        template_changed=found.chat_template_changed,
        derivation={"kind": row.kind, "evidence": row.evidence, "detail": row.detail} if row else None,
        drift=drifts[len(drifts) // 2] if drifts else None,
    )


def _may_read(caller: Caller) -> None:
    if not caller.can_somewhere("read"):
        caller.require("read", NAMESPACE)
