"""Pushes: from a manifest to bytes in staging, up to the moment somebody asks for the commit.

    open → uploading → verifying → verified → committed         (rejected, expired, aborted: the other ends)

Clients write only below ``staging/{push}/``, by signed requests; `verification` reads what arrived and
`commits` makes the version, in one transaction. Opening the same push again, by the same caller and while
it lives, is resuming it; so after ``alias-moved`` one looks and repeats the push: the repetition takes the
aliases as they are now for what its author saw, and no byte is sent or read again.

A base may be opened as a draft, whose large files are named by path and size: those that are new here for certain are
sent at once, below a name that stands for their digest, and `seal` brings all digests (docs/adr/0019). From there on
such a push is like any other.

Verbs that talk to the store for long take the `Database` and hold no transaction meanwhile.
"""

import base64
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement
from sqlmodel import Session, col, delete, or_, select, update

from registry.core import lifecycle
from registry.core.base_model import BaseModel
from registry.core.digest import Digest
from registry.core.errors import (
    BadManifest,
    BadPath,
    BadRequest,
    BlobNotFound,
    BlobsMissing,
    DraftTaken,
    FileTooLarge,
    LoractlError,
    NotSealed,
    PartBusy,
    PickleRefused,
    PushExpired,
    PushNotFound,
    PushRejected,
    UploadNotFound,
)
from registry.core.lifecycle import PUSH, PushState
from registry.core.manifest import (
    MAX_MANIFEST_BYTES,
    Draft,
    FileEntry,
    Kind,
    LateFile,
    Listing,
    Manifest,
    parse_listing,
)
from registry.core.names import SeriesName, check_name
from registry.core.signatures import BESIDE
from registry.db.engine import Database
from registry.db.models import Base, Blob, Job, ManifestBlob, Push, PushBlob
from registry.schemas import BlobState, PartsInfo, PartsRequest, PushInfo, PushRequest, SignedRequest, Wishes
from registry.settings import Settings
from registry.storage.base import BlobStore, Stat, part_sizes
from registry.storage.base import SignedRequest as Signed

from . import audit, bases, blobs, commits, fits, quotas, signatures
from .tokens import Caller

BASES = "base"
"""The namespace whose scopes decide about base models."""
UNFINISHED = lifecycle.UNFINISHED
VERIFIED_WITHIN = timedelta(days=1)
"""How long a push whose commit was asked for may wait for a verifier at least, however little time was left."""
MAX_PARTS = 10_000
MAX_CONTENTS = 4
"""Contents of one part that are remembered as signed for."""
MAX_ADAPTER_WEIGHTS = 64
"""Safetensors files of one adapter."""
MAX_SMALL_FILE = 1 << 30
"""Bytes of a file that is no safetensors and no JSONL: it is read whole by nobody, but pulled by everybody."""
_ALIKE = 8
"""Bases with files of the same sizes that a draft is compared with, the newest first."""
_OURS = (BESIDE, ".partial")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


# ── opening ──────────────────────────────────────────────────────────────────


def open_push(
    session: Session,
    caller: Caller,
    settings: Settings,
    *,
    kind: Kind,
    series: SeriesName,
    request: PushRequest,
    now: datetime,
    job: Job | None = None,
) -> Push:
    """The push that ``request`` asks for: a new one, the same one again, or the committed one when it exists.

    ``series`` is the adapter, dataset or suite; for bases `base_series` of the wished line. A worker pushes
    only for a job that it claimed (``job``), whose planning checked the rights of who asked for it.
    """
    manifest = parse_listing(request.manifest)
    wishes = request.wishes if job is None else wishes_of_job(request.wishes, kind, job)
    if manifest.kind != kind:
        raise BadManifest(reason=f"its kind is '{manifest.kind}'; here goes '{kind}'")
    if isinstance(manifest, Draft) and kind != "base":
        raise BadManifest(reason="a file lacks its digest; only those of base models may come later")
    if len(manifest.canonical()) > MAX_MANIFEST_BYTES:
        raise BadManifest(reason=f"over {MAX_MANIFEST_BYTES} bytes")
    if job is None:
        _allow(caller, kind, series)
    check_files(manifest, settings)
    _check_wishes(kind, wishes)
    if kind == "adapter" and job is None:
        commits.require_ungated(session, series, manifest, wishes)
    if kind == "adapter":
        commits.require_not_deleted(session, series, manifest)
    signed = _signed(session, series, manifest, request) if job is None else []
    model = _promised(request, manifest) if kind == "base" else None
    if model is not None and wishes.line and not wishes.unlike:
        bases.require_like(session, wishes.line, model)
    if (found := committed(session, kind, series, manifest)) and not blobs.lacking(session, manifest):
        if job is None:
            commits.sign_again(session, found, signed, caller.token_id, now)
            commits.wish_again(session, found, wishes, caller.token_id, now)
        return found
    if kind == "adapter":
        commits.look_early(session, series, manifest, wishes)
    seen = commits.seen(session, series, manifest, wishes) if kind == "adapter" else {}
    stored = wishes.model_dump(mode="json") | {"seen": seen, "actor": caller.name}
    stored |= {"signatures": [bundle.document() for _, bundle in signed]}
    if push := _living(session, caller, kind, series, manifest, job, now):
        if push.state != PushState.VERIFYING:
            push.wishes = stored if push.state != PushState.VERIFIED else _late(push.wishes, stored)
            session.add(push)
        return push
    push = Push(
        id=f"p{secrets.token_hex(12)}",
        kind=kind,
        namespace=series.namespace,
        name=series.name,
        manifest_digest=str(manifest.digest),
        manifest=manifest.canonical(),
        draft=str(manifest.digest) if isinstance(manifest, Draft) else None,
        wishes=stored,
        state=PushState.OPEN,
        facts={"table": request.table} if model else None,
        created_by=caller.token_id,
        job_id=job.id if job else None,
        created_at=now,
        changed_at=now,
        expires_at=now + timedelta(seconds=settings.push_ttl_s),
    )
    session.add(push)
    session.flush()
    _want(session, caller, settings, push, {e.digest: e.size for e in manifest.files if isinstance(e, FileEntry)})
    if isinstance(manifest, Draft) and model is not None:
        for late in _surely_new(session, caller, settings, manifest, model):
            name, part_size = blobs.late_name(push.id, late.path), _part_size(late.size, settings.part_size)
            session.add(
                PushBlob(
                    push_id=push.id, digest=name, path=late.path, size=late.size, state="needed", part_size=part_size
                )
            )
        session.flush()
    quotas.require_room(session, push, now)
    asked = {"version": push.manifest_digest, "kind": kind, "series": str(series), "job": push.job_id}
    audit.record(
        session, "push.opened", push.id, actor=caller.token_id, namespace=push.namespace, now=now, after=asked
    )
    return push


def _signed(
    session: Session, series: SeriesName, manifest: Listing, request: PushRequest
) -> list[signatures.Accepted]:
    """The signatures that came with the push, verified; `SignatureRequired` before any byte is sent."""
    if not isinstance(manifest, Manifest) or manifest.kind != "adapter":
        if request.signatures:
            raise BadRequest(problems="signatures: versions of adapters are signed, and nothing else")
        return []
    found = signatures.accept(session, series.namespace, str(series), manifest, request.signatures)
    signatures.require_at_push(session, series.namespace, str(series), str(manifest.digest), found)
    return found


def _want(session: Session, caller: Caller, settings: Settings, push: Push, sizes: Mapping[str, int]) -> None:
    """A row for each blob (digest -> size): ``present`` when the caller may read it, else ``needed``."""
    here = blobs.held(session, caller, sizes)
    for digest, size in sorted(sizes.items()):
        multipart = size > settings.multipart_from
        session.add(
            PushBlob(
                push_id=push.id,
                digest=digest,
                size=size,
                state="present" if digest in here else "needed",
                part_size=_part_size(size, settings.part_size) if multipart else None,
            )
        )
    session.flush()


def _surely_new(
    session: Session, caller: Caller, settings: Settings, draft: Draft, promised: BaseModel
) -> list[LateFile]:
    """The large late files that cannot be here: no file of a base that the caller reads has their size and tensors.

    The others are to be hashed before they are sent, as they may be ``present``.
    """
    large = [late for late in draft.late if late.size > settings.multipart_from]
    row = session.exec(select(Base).where(Base.digest == draft.base)).first()
    if row is not None and row.weights == "parts":  # these very files may be here, and are not read yet
        return []
    query = (
        select(Base.id, Blob.size)
        .join(ManifestBlob, col(ManifestBlob.manifest) == Base.manifest)
        .join(Blob, col(Blob.digest) == ManifestBlob.blob)
        .where(col(Blob.size).in_({late.size for late in large}), Blob.verified == "full")
        .where(col(Base.manifest).in_(blobs.readable_manifests(caller)))
        .distinct()
    )
    alike = [(base_id, size) for base_id, size in session.exec(query) if base_id is not None]
    newest = sorted({base_id for base_id, _ in alike}, reverse=True)[:_ALIKE]
    models = {base_id: fits.model_of(session, base_id) for base_id in newest}
    return [
        late
        for late in large
        if all(
            _differs(late, promised, models[base_id])
            for base_id, size in alike
            if size == late.size and base_id in models
        )
    ]


def _differs(late: LateFile, promised: BaseModel, other: BaseModel) -> bool:
    """Whether a tensor in the file is another one than ``other`` has, so that no file of ``other`` is this one."""
    mine, theirs = promised.by_name, other.by_name
    return any(name in mine and mine[name] != theirs.get(name) for name in late.tensors)


def wishes_of_job(wishes: Wishes, kind: str, job: Job) -> Wishes:
    """What the job was planned with; a worker decides nothing about aliases, lines and trust."""
    output = job.output
    continued = kind == "base" and job.kind == "full-finetune"
    return Wishes(
        message=wishes.message,
        allow_zero=wishes.allow_zero,
        task=output.get("task"),
        aliases=output.get("aliases", []) if kind == "adapter" else [],
        line=output.get("line") if kind == "base" else None,
        parent=job.base if continued else None,
        parent_kind="continued" if continued else None,
    )


def base_series(wishes: Wishes) -> SeriesName:
    """Bases are pushed to their line, or to none."""
    return SeriesName(BASES, wishes.line or "")


def committed(session: Session, kind: str, series: SeriesName, manifest: Listing) -> Push | None:
    """The push that made exactly this version, if there is one: one query.

    A base is its content: once its weights were read completely, other files of the same base bring nothing.
    """
    query = select(Push).where(Push.kind == kind, Push.state == PushState.COMMITTED)
    digest = str(manifest.digest)
    if kind == "base":
        query = query.join(Base, col(Base.manifest) == Push.manifest_digest)
        query = query.where(Base.digest == manifest.base, or_(Base.manifest == digest, Base.weights == "full"))
    else:
        mine = (Push.namespace == series.namespace, Push.name == series.name)
        query = query.where(Push.manifest_digest == digest, *mine)
    return session.exec(query.order_by(col(Push.created_at).desc()).limit(1)).first()


def check_files(manifest: Listing, settings: Settings) -> None:
    """What the list of files alone shows to be wrong: pickles, sizes, one blob with two sizes."""
    weights = sum(entry.path.endswith(".safetensors") for entry in manifest.files)
    if manifest.kind == "adapter" and weights > MAX_ADAPTER_WEIGHTS:
        raise BadManifest(reason=f"{weights} .safetensors files; an adapter has at most {MAX_ADAPTER_WEIGHTS}")
    sizes: dict[str, int] = {}
    for entry in manifest.files:
        if entry.path.split("/", maxsplit=1)[0] in _OURS:
            raise BadPath(path=entry.path, rule=f"{' and '.join(_OURS)} are where a pull keeps its own")
        if entry.path.lower().endswith(_PICKLES):
            raise PickleRefused(path=entry.path)
        streamed = entry.path.lower().endswith((".safetensors", ".jsonl"))
        limit = settings.max_file_bytes if streamed else min(MAX_SMALL_FILE, settings.max_file_bytes)
        if entry.size > limit:
            raise FileTooLarge(path=entry.path, size=entry.size, limit=limit)
        if isinstance(entry, FileEntry) and sizes.setdefault(entry.digest, entry.size) != entry.size:
            raise BadManifest(reason=f"blob {entry.digest} is listed with two sizes")


def _allow(caller: Caller, kind: Kind, series: SeriesName) -> None:
    if kind != "base":
        SeriesName.parse(str(series), kind)
    caller.require("publish", series.namespace)


def _check_wishes(kind: Kind, wishes: Wishes) -> None:
    for alias in wishes.aliases:
        check_name(alias, "alias")
    if wishes.line is not None:
        check_name(wishes.line, "line")
    if wishes.revision is not None and wishes.line is None:
        raise BadRequest(problems="wishes.revision: a revision needs its line")
    if (wishes.parent is None) != (wishes.parent_kind is None):
        raise BadRequest(problems="wishes.parent: a derivation needs both parent and parent_kind")
    if len(wishes.names) > 20 or any(not name or len(name) > 200 for name in wishes.names):
        raise BadRequest(problems="wishes.names: at most 20 names of 1 to 200 characters")
    elsewhere = {
        "base": wishes.aliases or wishes.trust_base or wishes.allow_zero,
        "adapter": wishes.line or wishes.names or wishes.parent or wishes.unlike,
    }.get(kind, wishes.aliases or wishes.line or wishes.names or wishes.parent or wishes.unlike)
    if elsewhere:
        raise BadRequest(problems=f"wishes: some of them do not belong to a push of kind '{kind}'")


def read_table(text: str) -> BaseModel:
    """The base model in a base64 compressed table; `BadManifest` says what is wrong with it."""
    try:
        return BaseModel.from_compressed(base64.b64decode(text, validate=True))
    except ValueError as error:  # binascii's own, and one for what is not ASCII
        raise BadManifest(reason=f"the base table is not base64: {error}") from error


def _promised(request: PushRequest, manifest: Listing) -> BaseModel:
    if request.table is None:
        raise BadManifest(reason="a base is pushed with its tensor table")
    model = read_table(request.table)
    if str(model.digest) != manifest.base:
        raise BadManifest(reason=f"the table has the base digest {model.digest}, the manifest says {manifest.base}")
    return model


def _living(
    session: Session, caller: Caller, kind: str, series: SeriesName, manifest: Listing, job: Job | None, now: datetime
) -> Push | None:
    mine = [col(Push.job_id) == job.id] if job else [Push.created_by == caller.token_id, col(Push.job_id).is_(None)]
    query = select(Push).where(
        or_(Push.manifest_digest == str(manifest.digest), Push.draft == str(manifest.digest)),
        Push.kind == kind,
        Push.namespace == series.namespace,
        Push.name == series.name,
        col(Push.state).in_(UNFINISHED),
        Push.expires_at > now,
        *mine,
    )
    return session.exec(query.order_by(col(Push.created_at).desc()).limit(1)).first()


def _late(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """After verification only what verification did not rest on may change."""
    return new | {key: old[key] for key in ("trust_base", "allow_zero", "actor")}


def _part_size(size: int, wanted: int) -> int:
    least = -(-size // MAX_PARTS)
    return max(wanted, -(-least // (1 << 20)) << 20)


# ── sealing ──────────────────────────────────────────────────────────────────


def seal(
    session: Session, caller: Caller, settings: Settings, push_id: str, digests: Mapping[str, str], now: datetime
) -> Push:
    """Join the digests of its late files (path -> digest) to a push that was opened as a draft; again is fine.

    The push, or the committed one when the version that it makes is there by now.

    Raises:
        BadManifest: a late file without digest, or a digest of another file.
        DraftTaken: it was sealed with another digest before.
    """
    get(session, caller, push_id)
    push = _alive(locked(session, push_id), now)
    if push.draft is None:
        raise BadManifest(reason="the push was opened with all digests")
    manifest = Draft.parse(push.manifest).sealed(digests) if is_draft(push) else Manifest.parse(push.manifest)
    known = {entry.path: entry.digest for entry in manifest.files}
    if other := sorted(path for path, digest in digests.items() if known.get(path) != digest):
        raise DraftTaken(id=push.id, path=other[0][:100])
    check_files(manifest, settings)
    if found := committed(session, push.kind, SeriesName(push.namespace, push.name), manifest):
        if push.job_id is None:
            commits.wish_again(session, found, commits.wishes_of(push), caller.token_id, now)
        return found
    if is_draft(push):
        push.manifest, push.manifest_digest = manifest.canonical(), str(manifest.digest)
        session.add(push)
        audit.record(
            session, "push.sealed", push.id, actor=caller.token_id, namespace=push.namespace, now=now,
            before={"version": push.draft}, after={"version": push.manifest_digest},
        )  # fmt: skip
        _name_late(session, caller, settings, push, manifest)
        session.flush()
        quotas.require_room(session, push, now)  # late files counted nothing before
    return push


def is_draft(push: Push) -> bool:
    """Whether digests of the push have not been told."""
    return push.draft == push.manifest_digest


def _name_late(session: Session, caller: Caller, settings: Settings, push: Push, manifest: Manifest) -> None:
    """Give every late blob its digest. Of several with one digest one stays; the sweep forgets the others' uploads."""
    rows = session.exec(select(PushBlob.digest, PushBlob.path).where(PushBlob.push_id == push.id)).all()
    named, sent = {digest for digest, path in rows if path is None}, {path for _, path in rows if path is not None}
    here = blobs.held(session, caller, {entry.digest for entry in manifest.files if entry.path in sent})
    for entry in manifest.files:
        mine = (col(PushBlob.push_id) == push.id, col(PushBlob.path) == entry.path)
        if entry.path in sent and entry.digest in named:
            session.exec(delete(PushBlob).where(*mine))
        elif entry.path in sent:
            state = "present" if entry.digest in here else "needed"
            session.exec(update(PushBlob).where(*mine).values(digest=entry.digest, state=state))
            named.add(entry.digest)
    sizes = {entry.digest: entry.size for entry in manifest.files}
    _want(session, caller, settings, push, {digest: sizes[digest] for digest in sizes.keys() - named})


# ── looking ──────────────────────────────────────────────────────────────────


def get(session: Session, caller: Caller, push_id: str) -> Push:
    """The push, for who opened it, the worker whose job it belongs to, and admins; `PushNotFound` for others."""
    push = session.get(Push, push_id)
    if push is not None:
        if push.created_by == caller.token_id or caller.can("admin", push.namespace):
            return push
        job = session.get(Job, push.job_id) if push.job_id else None
        if job is not None and job.token_id == caller.token_id:
            return push
    raise PushNotFound(id=push_id[:64])


def describe(session: Session, store: BlobStore, settings: Settings, push: Push, now: datetime) -> PushInfo:
    """The push as its client sees it: the state of every blob, and fresh URLs for what is still needed.

    Before the seal, a late blob goes by the name that stands for its digest, and is ``needed`` whatever arrived: only
    its sender can tell whether that is the file.
    """
    state = str(push.state)
    info = PushInfo(
        id=push.id,
        kind=push.kind,
        state=PushState.EXPIRED if state in UNFINISHED and push.expires_at <= now else state,
        version_digest=push.manifest_digest,
        expires_at=push.expires_at,
        findings=push.findings or [],
        outcome=push.outcome,
        sealed=not is_draft(push),
    )
    if info.state not in (PushState.OPEN, PushState.UPLOADING):
        return info
    rows = session.exec(select(PushBlob).where(PushBlob.push_id == push.id).order_by(col(PushBlob.digest))).all()
    whole = _arrived(store, push.id, [row for row in rows if info.sealed or row.path is None])
    for row in rows:
        late = None if info.sealed else row.path
        blob = BlobState(digest=row.digest, size=row.size, state="needed", part_size=row.part_size, path=late)
        if row.state == "present":
            blob.state = "present"
        elif row.digest in whole:
            blob.state = "arrived"
        elif row.part_size is None:
            key, sha256 = blobs.staged_at(row), Digest.parse(row.digest)
            blob.put = signed(store.presign_put(key, size=row.size, sha256=sha256, expires_s=int(settings.url_ttl_s)))
        info.blobs.append(blob)
    return info


def describe_opened(
    session: Session, store: BlobStore, settings: Settings, push: Push, request: PushRequest, now: datetime
) -> PushInfo:
    """`describe`, and of a base that was there already what of ``request`` is not taken."""
    info = describe(session, store, settings, push, now)
    if push.kind == "base" and info.outcome is not None and request.table is not None:
        base = session.exec(select(Base).where(Base.digest == info.outcome["base"])).one()
        warnings = bases.not_taken(base, read_table(request.table))
        info.outcome = info.outcome | {"warnings": [*info.outcome.get("warnings", []), *warnings]}
    return info


def signed(request: Signed) -> SignedRequest:
    """A store's signed request as it travels."""
    return SignedRequest(
        method=request.method,
        url=request.url,
        headers=request.headers,
        expires_at=datetime.fromtimestamp(request.expires_at, UTC),
    )


def _arrived(store: BlobStore, push_id: str, rows: Sequence[PushBlob]) -> set[str]:
    """Digests whose bytes are all in staging, as one object or as all parts of an upload."""
    staged = {stat.key: stat.size for stat in store.walk(f"staging/{push_id}/")}
    whole = set()
    for row in rows:
        key = blobs.staged_at(row)
        if staged.get(key) == row.size or (row.upload_id and _all_parts(store, key, row)):
            whole.add(row.digest)
    return whole


def _all_parts(store: BlobStore, key: str, row: PushBlob) -> bool:
    assert row.upload_id is not None and row.part_size is not None
    try:
        arrived = {part.number: part.size for part in store.list_parts(key, row.upload_id)}
    except UploadNotFound:
        stat = store.head(key)  # completed since the listing
        return stat is not None and stat.size == row.size
    return [arrived.get(number) for number, _ in enumerate(arrived, 1)] == part_sizes(row.size, row.part_size)


# ── uploading ────────────────────────────────────────────────────────────────


def parts(
    database: Database,
    store: BlobStore,
    settings: Settings,
    caller: Caller,
    push_id: str,
    request: PartsRequest,
    now: datetime,
) -> PartsInfo:
    """Signed URLs for the wanted parts of one blob that have not arrived, and which parts have.

    `DraftTaken` when a part of a late file was signed for with other bytes: two files go by its name.
    """
    with database.read() as session:
        push = _alive(get(session, caller, push_id), now)
        # of two that send one push, the other may have been done first
        whole = push.state in (PushState.VERIFYING, PushState.VERIFIED, PushState.COMMITTED)
        if not whole:
            PUSH.after("upload", push.state, push.id)
        row = _row(session, push_id, request.digest)
    if row is None or row.part_size is None or (row.state == "present" and row.path is None):
        raise BlobNotFound(digest=f"{request.digest} in parts of push {push_id}")
    if whole or row.state == "present":  # sealed meanwhile, and here already
        return PartsInfo(digest=request.digest, part_size=row.part_size, arrived=_every(row), put={})
    key = blobs.staged_at(row)
    upload_id = row.upload_id or _begin(database, store, key, row, now)
    try:
        arrived = {part.number: part for part in store.list_parts(key, upload_id)}
    except UploadNotFound:
        if store.head(key) is None:
            raise
        arrived = {}  # completed already: nothing is wanted any more
        return PartsInfo(digest=request.digest, part_size=row.part_size, arrived=_every(row), put={})
    sizes = part_sizes(row.size, row.part_size)
    put: dict[int, SignedRequest] = {}
    promised: dict[str, str] = {}
    for part in request.parts:
        if part.number > len(sizes):
            raise BadRequest(problems=f"parts: number {part.number}; blob {row.digest} has {len(sizes)} parts")
        sha256 = Digest.parse(part.sha256)
        there = arrived.get(part.number)
        _check_same(row, {str(part.number): part.sha256})
        if there is None or there.size != sizes[part.number - 1] or there.sha256 not in (None, sha256):
            size = sizes[part.number - 1]
            expires_s = int(settings.url_ttl_s)
            put[part.number] = signed(
                store.presign_part(key, upload_id, part.number, size=size, sha256=sha256, expires_s=expires_s)
            )
            promised[str(part.number)] = part.sha256
    if any((row.parts or {}).get(number, "").split()[:1] != [sha256] for number, sha256 in promised.items()):
        _promise(database, row, promised)
    told = {number: str(part.sha256) if part.sha256 else None for number, part in sorted(arrived.items())}
    return PartsInfo(digest=request.digest, part_size=row.part_size, arrived=told, put=put)


def _row(session: Session, push_id: str, name: str) -> PushBlob | None:
    """The blob by its digest, or by what stood for it before the seal."""
    if row := session.get(PushBlob, (push_id, name)):
        return row
    late = session.exec(select(PushBlob).where(PushBlob.push_id == push_id, col(PushBlob.path).is_not(None)))
    return next((row for row in late if row.path and blobs.late_name(push_id, row.path) == name), None)


def _same(row: PushBlob) -> tuple[ColumnElement[bool], ...]:
    """The condition for this row, also when a seal gives it its digest meanwhile."""
    which = col(PushBlob.path) == row.path if row.path else col(PushBlob.digest) == row.digest
    return col(PushBlob.push_id) == row.push_id, which


def _check_same(row: PushBlob, wanted: Mapping[str, str]) -> None:
    """Whether parts of a late file are the bytes that were signed for before: its digest is not there to say so."""
    for number, sha256 in wanted.items():
        if row.path and (row.parts or {}).get(number, sha256) != sha256:
            raise DraftTaken(id=row.push_id, path=row.path[:100])


def _promise(database: Database, row: PushBlob, promised: dict[str, str]) -> None:
    """Keep what each part was signed for: completing names it again, and not every store lists it.

    Each of several contents may still arrive, so the newest few are kept, newest first.
    """
    with database.write() as session:
        found = session.exec(select(PushBlob).where(*_same(row)).with_for_update()).first()
        if found is None:
            raise BlobNotFound(digest=f"{row.digest} in parts of push {row.push_id}")
        _check_same(found, promised)
        known = found.parts or {}
        for number, sha256 in promised.items():
            others = [other for other in known.get(number, "").split() if other != sha256]
            known = known | {number: " ".join([sha256, *others[: MAX_CONTENTS - 1]])}
        found.parts = known
        session.add(found)


def _every(row: PushBlob) -> dict[int, str | None]:
    assert row.part_size is not None
    return dict.fromkeys(range(1, len(part_sizes(row.size, row.part_size)) + 1))


def _begin(database: Database, store: BlobStore, key: str, row: PushBlob, now: datetime) -> str:
    """Start the multipart upload; when two do at once, one upload wins and the other is aborted."""
    assert row.part_size is not None
    mine = store.start_multipart(key, size=row.size, part_size=row.part_size)
    with database.write() as session:
        session.exec(
            update(Push)
            .where(col(Push.id) == row.push_id, col(Push.state) == PushState.OPEN)
            .values(state=PushState.UPLOADING, changed_at=now)
        )
        fresh = (*_same(row), col(PushBlob.upload_id).is_(None))
        session.exec(update(PushBlob).where(*fresh).values(upload_id=mine))
        won = session.exec(select(PushBlob.upload_id).where(*_same(row))).first()
    if won != mine:
        store.abort_multipart(key, mine)
    if won is None:
        raise BlobNotFound(digest=f"{row.digest} in parts of push {row.push_id}")
    return won


def _alive(push: Push, now: datetime) -> Push:
    ended = push.state in (PushState.EXPIRED, PushState.ABORTED)
    if ended or (push.state in UNFINISHED and push.expires_at <= now):
        state = push.state if ended else PushState.EXPIRED
        since = push.changed_at if ended else push.expires_at
        raise PushExpired(id=push.id, state=str(state), since=f"{since:%Y-%m-%d %H:%M} UTC")
    return push


# ── the ends ─────────────────────────────────────────────────────────────────


def ask_commit(database: Database, store: BlobStore, caller: Caller, push_id: str, now: datetime) -> Push:
    """Ask for the commit, or how it stands: the push as ``verifying``, ``verified`` (of a job) or ``committed``.

    Raises:
        BlobsMissing: what has not arrived.
        NotSealed: digests of it have not been told.
        AliasMoved: a wished alias moved since the push was opened; repeat the push to take it as it is now.
        LoractlError: the one finding of a rejection; `PushRejected` with all of them where there are more.
    """
    with database.read() as session:
        push = _alive(get(session, caller, push_id), now)
        if push.state in (PushState.OPEN, PushState.UPLOADING):
            rows = session.exec(select(PushBlob).where(PushBlob.push_id == push_id, PushBlob.state != "present")).all()
    if is_draft(push):
        raise NotSealed(id=push_id, count=len(Draft.parse(push.manifest).late))
    if push.state in (PushState.OPEN, PushState.UPLOADING):
        whole = _arrived(store, push_id, rows)
        missing = [row.digest for row in rows if row.digest not in whole]
        if missing:
            named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise BlobsMissing(id=push_id, count=len(missing), digests=named)
    with database.write() as session:
        push = _alive(locked(session, push_id), now)
        if push.state == PushState.REJECTED:
            raise refusal(push)
        if push.state in (PushState.OPEN, PushState.UPLOADING):
            move(session, push, "verify", now, actor=caller.token_id)
            push.lease_until, push.expires_at = None, max(push.expires_at, now + VERIFIED_WITHIN)
        elif push.state == PushState.VERIFIED and push.job_id is None:
            commits.commit(session, push, now)
        session.add(push)
    return push


def refusal(push: Push) -> LoractlError:
    """What a rejected push is answered with."""
    findings = push.findings or []
    if len(findings) == 1:
        return LoractlError.from_problem(findings[0])
    told = "; ".join(str(finding.get("detail")) for finding in findings)
    return PushRejected(id=push.id, findings=told, problems=findings)


def abort(session: Session, caller: Caller, push_id: str, now: datetime) -> Push:
    """End the push; the garbage collector removes what was staged."""
    get(session, caller, push_id)
    push = locked(session, push_id)
    move(session, push, "abort", now, actor=caller.token_id)
    push.facts = None
    session.add(push)
    return push


def expire(session: Session, now: datetime, limit: int = 100) -> list[str]:
    """End pushes whose time is over, some at once; their ids. One that a verifier owns now is left to it."""
    query = select(Push).where(
        col(Push.state).in_(UNFINISHED),
        Push.expires_at <= now,
        col(Push.lease_until).is_(None) | (col(Push.lease_until) <= now),
    )
    ended = session.exec(query.limit(limit).with_for_update(skip_locked=True)).all()
    for push in ended:
        move(session, push, "expire", now)
        push.facts = None
        session.add(push)
    return [push.id for push in ended]


def sweep(database: Database, store: BlobStore, now: datetime, grace: timedelta) -> int:
    """Empty what ended pushes left in staging, and after ``grace`` what no push knows; how many went."""
    staged: dict[str, list[Stat]] = {}
    for stat in store.walk("staging/"):
        staged.setdefault(stat.key.split("/")[1], []).append(stat)
    with database.read() as session:
        states = dict(session.exec(select(Push.id, Push.state).where(col(Push.id).in_(staged))).all())
        uploads = session.exec(
            select(PushBlob)
            .join(Push)
            .where(col(PushBlob.upload_id).is_not(None), col(Push.state).not_in(UNFINISHED))
            .limit(1000)
        ).all()
    aborted = []
    for row in uploads:
        with suppress(PartBusy):  # somebody still sends, or seems to: it keeps nobody else's from being cleared
            store.abort_multipart(blobs.staged_at(row), str(row.upload_id))
            aborted.append(row)
    gone = len(aborted)
    if aborted:
        with database.write() as session:
            for row in aborted:
                session.merge(row).upload_id = None
    before = (now - grace).timestamp()
    with database.read() as session:
        living = select(PushBlob.upload_id).where(col(PushBlob.upload_id).is_not(None))
        keep = {upload_id for upload_id in session.exec(living) if upload_id}
    for prefix in ("staging/", "blobs/"):  # there a restore, or a copy by parts, may have died
        gone += store.sweep_multiparts(prefix, keep=keep, before=before)
    for push_id, stats in staged.items():
        state = states.get(push_id)
        for stat in stats:
            if state not in UNFINISHED if state is not None else stat.modified_at < before:
                store.delete(stat.key)
                gone += 1
    return gone


def locked(session: Session, push_id: str) -> Push:
    """The push as it is now, held until the end of the transaction."""
    query = select(Push).where(Push.id == push_id).with_for_update().execution_options(populate_existing=True)
    push = session.exec(query).first()
    if push is None:
        raise PushNotFound(id=push_id[:64])
    return push


def move(
    session: Session, push: Push, name: str, now: datetime, *, actor: str = audit.ITSELF, **after: object
) -> None:
    """Change the state as `lifecycle.PUSH` allows; ``after`` is what the audit says of it beside the state."""
    before, push.state = push.state, PUSH.after(name, push.state, push.id)
    push.changed_at = now
    audit.record(
        session,
        f"push.{push.state}",
        push.id,
        actor=actor,
        namespace=push.namespace,
        now=now,
        before={"state": before},
        after={"state": push.state, **after},
    )


def clear_staging(store: BlobStore, push_id: str, uploads: Iterable[tuple[str, str]]) -> int:
    """Remove what a push staged; ``uploads`` are (key, upload id). How many objects went."""
    for key, upload_id in uploads:
        store.abort_multipart(key, upload_id)
    removed = 0
    for stat in list(store.walk(f"staging/{push_id}/")):
        store.delete(stat.key)
        removed += 1
    return removed


def uploads_of(session: Session, push_id: str) -> list[tuple[str, str]]:
    """Multipart uploads that a push may have left open: (key, upload id)."""
    rows = session.exec(select(PushBlob).where(PushBlob.push_id == push_id, col(PushBlob.upload_id).is_not(None)))
    return [(blobs.staged_at(row), row.upload_id) for row in rows if row.upload_id]


