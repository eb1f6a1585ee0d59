"""The tables. The database itself refuses nonsense: checks, partial unique indexes, foreign keys.

Digests are stored as they are printed (``b3:…``, ``sha256:…``). Times are UTC. Ids that people see
(pushes, jobs, campaigns, schedules, tokens) are random text made by the services; the rest are integers.
Migrations build this schema (`migrations/`), and a test says that the two do not drift.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from registry.core.lifecycle import CampaignState, JobState, PushState

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

Long = BigInteger().with_variant(Integer(), "sqlite")
"""A 64-bit integer; SQLite's only primary key that counts by itself is spelled INTEGER, and holds as much."""

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
SQLModel.metadata.naming_convention = NAMING


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC; a naive time is a programming error."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _digest(comment: str, *, nullable: bool = False, **kwargs: Any) -> Any:
    return Field(sa_column=Column(String(71), nullable=nullable, comment=comment, **kwargs))


def _time(comment: str, *, nullable: bool = False, **kwargs: Any) -> Any:
    return Field(default=None, sa_column=Column(UtcDateTime(), nullable=nullable, comment=comment, **kwargs))


def _json(comment: str, *, nullable: bool = False) -> Any:
    return Field(default=None, sa_column=Column(Json, nullable=nullable, comment=comment))


def _to(target: str, comment: str, *, nullable: bool = False, **kwargs: Any) -> Any:
    return Field(default=None, sa_column=Column(ForeignKey(target), nullable=nullable, comment=comment, **kwargs))


def _origin() -> Any:
    return Field(
        default=None, max_length=64, sa_column_kwargs={"comment": "id of the request, or of the schedule, that asked for it"}
    )


def _traceparent() -> Any:
    return Field(default=None, max_length=55, sa_column_kwargs={"comment": "where that was in a trace (W3C)"})


def _one_of(column: str, values: Any) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


# ── access ───────────────────────────────────────────────────────────────────


class Token(SQLModel, table=True):
    """A bearer token; only its hash is kept."""

    __tablename__ = "tokens"
    __table_args__ = (_one_of("kind", ["user", "worker"]),)
    id: str = Field(primary_key=True, max_length=16, sa_column_kwargs={"comment": "public part of the token"})
    hash: str = Field(max_length=64, unique=True, sa_column_kwargs={"comment": "SHA-256 of the secret, hex"})
    kind: str = Field(max_length=8)
    name: str = Field(max_length=200, sa_column_kwargs={"comment": "who or what holds it, for people"})
    scopes: dict[str, list[str]] = _json('namespace (or "*") -> scopes; of a worker: queue names under "queues"')
    created_at: datetime = _time("when it was made")
    expires_at: datetime | None = _time("from when on it is refused", nullable=True)
    revoked_at: datetime | None = _time("from when on it is refused for good", nullable=True)
    previous_hash: str | None = Field(default=None, max_length=64, sa_column_kwargs={"comment": "of the secret before the rotation"})
    previous_until: datetime | None = _time("until when the secret before the rotation is good", nullable=True)
    last_used_at: datetime | None = _time("to about a minute", nullable=True)


class AuditRow(SQLModel, table=True):
    """One change of state, written in its own transaction; never changed or removed (triggers refuse it)."""

    __tablename__ = "audit"
    __table_args__ = (
        Index("uq_audit_seq", "seq", unique=True),
        Index(
            "ix_audit_waiting", "id", sqlite_where=text("seq IS NULL"), postgresql_where=text("seq IS NULL"),
        ),
        Index("ix_audit_namespace", "namespace", "id"),
        Index("ix_audit_subject", "subject", "id"),
        CheckConstraint("(seq IS NULL) = (link IS NULL)", name="link"),
    )
    id: int | None = Field(default=None, sa_column=Column(Long, primary_key=True))
    at: datetime = _time("when it was done")
    actor: str = Field(max_length=16, sa_column_kwargs={"comment": "the token's id; registry: by itself"})
    namespace: str | None = Field(default=None, max_length=64, sa_column_kwargs={"comment": "whose admins may read it"})
    event: str = Field(max_length=40)
    subject: str = Field(max_length=300)
    reason: str = Field(default="", max_length=2000)
    before: str | None = Field(default=None, sa_column=Column(Text, nullable=True, comment="canonical JSON"))
    after: str | None = Field(default=None, sa_column=Column(Text, nullable=True, comment="canonical JSON"))
    seq: int | None = Field(default=None, sa_column=Column(Long, nullable=True, comment="place in the chain, given later"))
    link: str | None = _digest("registry.core.audit: ties it to all before it", nullable=True)


class AuditHead(SQLModel, table=True):
    """The end of the audit's chain: one row, whose lock lets one sequencer write at a time."""

    __tablename__ = "audit_head"
    __table_args__ = (CheckConstraint("id = 1", name="one"),)
    id: int = Field(default=1, primary_key=True)
    seq: int = Field(sa_type=BigInteger)
    link: str = _digest("of the last row that has its place")


class Webhook(SQLModel, table=True):
    """An address that is told what changes: the audit's rows, in the order of their places."""

    __tablename__ = "webhooks"
    id: str = Field(primary_key=True, max_length=32)
    namespace: str | None = Field(default=None, max_length=64, sa_column_kwargs={"comment": "None: everything"})
    url: str = Field(max_length=2000)
    events: list[str] = _json("beginnings of what it is told; none: all")
    secret: str = Field(
        max_length=64, sa_column_kwargs={"comment": "signs; must be at hand, so it is kept as it is"}
    )
    sealed: str | None = Field(
        default=None, sa_column=Column(Text, nullable=True, comment="the secret, encrypted; then `secret` is empty")
    )
    cursor: int = Field(
        sa_type=BigInteger, sa_column_kwargs={"comment": "place in the audit up to which it was told"}
    )
    attempts: int = Field(default=0, sa_column_kwargs={"comment": "failures of what is to be told next"})
    due_at: datetime = _time("when it is tried again")
    lease_until: datetime | None = _time("until when one deliverer owns it", nullable=True)
    last_error: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was added")
    removed_at: datetime | None = _time("from when on it is told nothing", nullable=True)


# ── bytes ────────────────────────────────────────────────────────────────────


class Blob(SQLModel, table=True):
    """Bytes in the store under ``blobs/<hex>``; the row's lock serialises copies into place."""

    __tablename__ = "blobs"
    __table_args__ = (
        CheckConstraint("size >= 0", name="size"),
        _one_of("verified", ["parts", "full"]),
        Index(
            "ix_blobs_unnamed_since", "unnamed_since",
            sqlite_where=text("unnamed_since IS NOT NULL"), postgresql_where=text("unnamed_since IS NOT NULL"),
        ),
        Index(
            "ix_blobs_missing_since", "missing_since",
            sqlite_where=text("missing_since IS NOT NULL"), postgresql_where=text("missing_since IS NOT NULL"),
        ),
    )
    digest: str = _digest("sha256 of the bytes", primary_key=True)
    size: int = Field(sa_type=BigInteger)
    verified: str = Field(max_length=8, sa_column_kwargs={"comment": "parts: by the store's checksums; full: read"})
    created_at: datetime = _time("when it was put into place")
    unnamed_since: datetime | None = _time("since when nothing names it, as far as the collector saw", nullable=True)
    missing_since: datetime | None = _time("since when its bytes are known to be lost; a push brings them", nullable=True)


class Hold(SQLModel, table=True):
    """Somebody who needs every blob to stay for a while: a backup that copies."""

    __tablename__ = "holds"
    id: str = Field(primary_key=True, max_length=32)
    reason: str = Field(max_length=200)
    until: datetime = _time("when it ends by itself")


class Namespace(SQLModel, table=True):
    """What bounds a namespace; one without a row has no bounds."""

    __tablename__ = "namespaces"
    __table_args__ = (
        CheckConstraint("quota_bytes >= 0", name="quota_bytes"),
        CheckConstraint("keep_days >= 1", name="keep_days"),
    )
    name: str = Field(primary_key=True, max_length=64)
    quota_bytes: int | None = Field(default=None, sa_type=BigInteger, sa_column_kwargs={"comment": "None: no bound"})
    keep_days: int | None = Field(
        default=None, sa_column_kwargs={"comment": "days that unreferenced versions are kept; None: for ever"}
    )
    require_signature: bool = Field(
        default=False,
        sa_column_kwargs={"comment": "whether only signed versions are given by alias", "server_default": false()},
    )


class StoredManifest(SQLModel, table=True):
    """The canonical bytes of a manifest, once for every version that has it."""

    __tablename__ = "manifests"
    digest: str = _digest("sha256 of the body", primary_key=True)
    kind: str = Field(max_length=8)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    size: int = Field(sa_type=BigInteger, sa_column_kwargs={"comment": "bytes of all files"})


class ManifestBlob(SQLModel, table=True):
    """Which manifest names which blob: who may read it, and what may never be collected."""

    __tablename__ = "manifest_blobs"
    __table_args__ = (Index("ix_manifest_blobs_blob", "blob"),)
    manifest: str = _digest("the manifest", primary_key=True)
    blob: str = _digest("the blob", primary_key=True)


class Push(SQLModel, table=True):
    """One push from its manifest to its commit; nothing of it is visible before."""

    __tablename__ = "pushes"
    __table_args__ = (
        _one_of("state", PushState),
        Index("ix_pushes_state_expires_at", "state", "expires_at"),
        Index("ix_pushes_manifest_digest", "manifest_digest"),
        Index("ix_pushes_draft", "draft"),
    )
    id: str = Field(primary_key=True, max_length=32)
    kind: str = Field(max_length=8)
    namespace: str = Field(max_length=64)
    name: str = Field(max_length=64)
    manifest_digest: str = _digest("digest of the version it would make")
    manifest: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    draft: str | None = _digest("digest of the draft it was opened with; it is the manifest's until the seal", nullable=True)
    wishes: dict[str, Any] = _json("aliases, message, overrides and line as asked for")
    state: str = Field(max_length=12)
    findings: list[Any] | None = _json("problems that led to the rejection", nullable=True)
    outcome: dict[str, Any] | None = _json("what the commit made, for whoever asks again", nullable=True)
    facts: dict[str, Any] | None = _json("what the verifier read in the files; the commit is made of it", nullable=True)
    lease_until: datetime | None = _time("until when one verifier owns it", nullable=True)
    looks: int = Field(
        default=0,
        sa_column_kwargs={"server_default": "0", "comment": "times that a verifier took it and came to no end"},
    )
    created_by: str = Field(max_length=16)
    job_id: str | None = Field(default=None, max_length=32)
    created_at: datetime = _time("when it was opened")
    changed_at: datetime = _time("when its state last changed")
    expires_at: datetime = _time("until when it may be committed")


class PushBlob(SQLModel, table=True):
    """A blob that a push must send; ``present`` ones were readable by the caller before."""

    __tablename__ = "push_blobs"
    __table_args__ = (
        _one_of("state", ["present", "needed", "arrived", "verified", "placed"]),
        Index("ix_push_blobs_digest", "digest"),
        Index(  # what a sweep looks for among all that was ever pushed
            "ix_push_blobs_upload_id",
            "upload_id",
            postgresql_where=text("upload_id IS NOT NULL"),
            sqlite_where=text("upload_id IS NOT NULL"),
        ),
    )
    push_id: str = Field(foreign_key="pushes.id", primary_key=True, max_length=32)
    digest: str = _digest("sha256 promised by the manifest", primary_key=True)
    path: str | None = Field(
        default=None, sa_column=Column(Text, nullable=True, comment="of a file that was opened without digest")
    )
    size: int = Field(sa_type=BigInteger)
    state: str = Field(max_length=8)
    upload_id: str | None = Field(default=None, sa_column=Column(Text, nullable=True, comment="of a multipart"))
    part_size: int | None = Field(default=None, sa_column_kwargs={"comment": "bytes of every part but the last"})
    parts: dict[str, Any] | None = _json("part number -> SHA-256 it was signed for; not every store lists it", nullable=True)


# ── base models ──────────────────────────────────────────────────────────────


class Base(SQLModel, table=True):
    """A base model by content; its weights may be absent."""

    __tablename__ = "bases"
    __table_args__ = (_one_of("weights", ["absent", "parts", "full"]),)
    id: int | None = Field(default=None, primary_key=True)
    digest: str = _digest("base digest", unique=True)
    weights_digest: str = _digest("digest of the tensors alone", index=True)
    arch_digest: str = _digest("digest of the canonical architecture")
    arch_kind: str = Field(max_length=10, sa_column_kwargs={"comment": "canonical, raw or none"})
    model_type: str = Field(max_length=64)
    parameters: int = Field(sa_type=BigInteger)
    vocabulary_digest: str | None = _digest("tokenizer vocabulary and special tokens", nullable=True)
    template_digest: str | None = _digest("chat template", nullable=True)
    weights: str = Field(max_length=8, sa_column_kwargs={"comment": "absent, parts (store checked) or full (we read it)"})
    manifest: str | None = _digest("manifest of its files", nullable=True)
    location: str | None = Field(default=None, max_length=500, sa_column_kwargs={"comment": "pinned external place"})
    names: list[str] = _json("names that declared bases are known by, such as org/model")
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was first seen")


class BaseTable(SQLModel, table=True):
    """The tensor table of a base model, compressed, apart so that rows of `Base` stay small."""

    __tablename__ = "base_tables"
    base_id: int = Field(foreign_key="bases.id", primary_key=True)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class Line(SQLModel, table=True):
    """A named series of base models."""

    __tablename__ = "lines"
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=64, unique=True)
    next_revision: int = Field(default=1)
    created_at: datetime = _time("when its first revision came")


class Revision(SQLModel, table=True):
    """One member of a line: ``llama@r2``."""

    __tablename__ = "revisions"
    __table_args__ = (UniqueConstraint("line_id", "number"), Index("ix_revisions_base_id", "base_id"))
    id: int | None = Field(default=None, primary_key=True)
    line_id: int = Field(foreign_key="lines.id")
    number: int
    base_id: int = Field(foreign_key="bases.id")
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it became the newest of its line")


class Derivation(SQLModel, table=True):
    """How one base came from another; measured by a worker or declared by a person."""

    __tablename__ = "derivations"
    __table_args__ = (
        UniqueConstraint("child_id", "parent_id", "kind"),
        _one_of("kind", ["cast", "quantised", "merged", "continued"]),
        _one_of("evidence", ["measured", "declared"]),
        CheckConstraint("child_id <> parent_id", name="not_itself"),
    )
    id: int | None = Field(default=None, primary_key=True)
    child_id: int = Field(foreign_key="bases.id")
    parent_id: int = Field(foreign_key="bases.id")
    kind: str = Field(max_length=10)
    evidence: str = Field(max_length=10)
    detail: dict[str, Any] = _json("dtype, method, error, drift per tensor, job")
    created_at: datetime = _time("when it was recorded")


# ── adapters ─────────────────────────────────────────────────────────────────


class TargetSet(SQLModel, table=True):
    """The sorted list of base tensors that adapters patch; many adapters share one."""

    __tablename__ = "target_sets"
    id: int | None = Field(default=None, primary_key=True)
    digest: str = _digest("sha256 of the canonical list", unique=True)
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class TargetFit(SQLModel, table=True):
    """How adapters of one target set, bound to ``old``, stand to ``new``: computed once, then joined."""

    __tablename__ = "target_fits"
    __table_args__ = (Index("ix_target_fits_new_id_fit", "new_id", "fit"),)
    old_id: int = Field(foreign_key="bases.id", primary_key=True)
    new_id: int = Field(foreign_key="bases.id", primary_key=True)
    target_set_id: int = Field(foreign_key="target_sets.id", primary_key=True)
    fit: str = Field(max_length=16)
    reasons: list[Any] = _json("why, module by module, shortened")
    vocabulary_changed: bool
    drift: float | None = Field(default=None, sa_column_kwargs={"comment": "median relative drift, None: not measured"})


class Adapter(SQLModel, table=True):
    """A named series ``namespace/name``."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("namespace", "name"),)
    id: int | None = Field(default=None, primary_key=True)
    namespace: str = Field(max_length=64)
    name: str = Field(max_length=64, index=True)
    next_version: int = Field(default=1, sa_column_kwargs={"comment": "UPDATE … RETURNING gives numbers"})
    task: str | None = Field(default=None, max_length=200)
    created_at: datetime = _time("when its first version came")


class Version(SQLModel, table=True):
    """One immutable member of an adapter's series, bound to a base."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("adapter_id", "digest"),
        Index("ix_versions_digest", "digest"),
        Index("ix_versions_base_target_set_latest", "base_id", "target_set_id", "latest", "id"),
        Index("ix_versions_base_latest", "base_id", "latest", "id"),
        Index(
            "uq_versions_latest", "adapter_id", "base_id", unique=True,
            sqlite_where=text("latest"), postgresql_where=text("latest"),
        ),
        Index(  # nothing asks by it any more; a release that still does may run beside this one
            "ix_versions_fallen", "id",
            sqlite_where=text("status <> 'live'"), postgresql_where=text("status <> 'live'"),
        ),
        _one_of("evidence", ["recorded", "resolved", "behavioural", "declared"]),
    )
    id: int | None = Field(default=None, primary_key=True)
    adapter_id: int = Field(foreign_key="adapters.id")
    number: int
    digest: str = _digest("digest of its manifest")
    base_id: int = Field(foreign_key="bases.id")
    target_set_id: int | None = Field(default=None, foreign_key="target_sets.id")
    latest: bool = Field(sa_column_kwargs={"comment": "the newest of this adapter on this base"})
    evidence: str = Field(max_length=12)
    binding: dict[str, Any] = _json("what the evidence rests on, and overrides by whom")
    peft_type: str = Field(max_length=64)
    runnable: bool
    rank: int
    engines: int = Field(sa_column_kwargs={"comment": "bit set of engines that can load it, registry.core.engines"})
    spec: dict[str, Any] = _json("modules, ranks and scales, and the verdict per engine")
    size: int = Field(sa_type=BigInteger)
    message: str = Field(default="", max_length=2000)
    job_id: str | None = Field(default=None, max_length=32, index=True)
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was committed")
    status: str = Field(
        default="live", max_length=12, sa_column_kwargs={"comment": "registry.core.lifecycle", "server_default": "live"}
    )
    status_reason: str | None = Field(
        default=None, sa_column=Column(Text, nullable=True, comment="why it was changed last")
    )
    status_by: str | None = Field(
        default=None, max_length=16, sa_column_kwargs={"comment": "whose token changed it last"}
    )
    status_at: datetime | None = _time("when it was changed last", nullable=True)


class SigningKey(SQLModel, table=True):
    """A public key whose signatures count in a namespace, until it is revoked, for good."""

    __tablename__ = "signing_keys"
    __table_args__ = (UniqueConstraint("namespace", "fingerprint"),)
    id: int | None = Field(default=None, primary_key=True)
    namespace: str = Field(max_length=64)
    fingerprint: str = _digest("sha256 of the public key's PEM")
    name: str = Field(max_length=200, sa_column_kwargs={"comment": "whose it is, for people"})
    public: str = Field(sa_column=Column(Text, nullable=False, comment="PEM"))
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was added")
    revoked_at: datetime | None = _time("from when on nothing that it signed counts", nullable=True)
    revoked_by: str | None = Field(default=None, max_length=16)
    revoked_reason: str | None = Field(default=None, sa_column=Column(Text, nullable=True))


class Signature(SQLModel, table=True):
    """What a key signed of a version; verified when it came, one a key."""

    __tablename__ = "signatures"
    __table_args__ = (UniqueConstraint("version_id", "key_id"), Index("ix_signatures_key_id", "key_id"))
    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="versions.id")
    key_id: int = Field(foreign_key="signing_keys.id")
    bundle: bytes = Field(
        sa_column=Column(LargeBinary, nullable=False, comment="registry.core.signatures, as JSON")
    )
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it came")


class VersionParent(SQLModel, table=True):
    """Lineage: a version and what it was made from."""

    __tablename__ = "version_parents"
    __table_args__ = (Index("ix_version_parents_parent", "parent"),)
    version_id: int = Field(foreign_key="versions.id", primary_key=True)
    parent: str = _digest("digest of an adapter version or a dataset version", primary_key=True)
    relation: str = Field(max_length=12, primary_key=True)


class Alias(SQLModel, table=True):
    """A movable pointer, kept per base."""

    __tablename__ = "aliases"
    __table_args__ = (
        UniqueConstraint("adapter_id", "base_id", "name"),
        Index("ix_aliases_base_id_name_version_id", "base_id", "name", "version_id"),
        Index("ix_aliases_base_name_target_set_version", "base_id", "name", "target_set_id", "version_id"),
        Index("ix_aliases_version_id", "version_id"),
        CheckConstraint("generation >= 1", name="generation"),
    )
    id: int | None = Field(default=None, primary_key=True)
    adapter_id: int = Field(foreign_key="adapters.id")
    base_id: int = Field(foreign_key="bases.id")
    name: str = Field(max_length=64)
    version_id: int = Field(foreign_key="versions.id")
    target_set_id: int | None = _to("target_sets.id", "the version's, so that compatible ones are one index range", nullable=True)
    generation: int = Field(sa_column_kwargs={"comment": "grows by one a move; what compare-and-set compares"})


class AliasMove(SQLModel, table=True):
    """History of an alias; written in the move's own transaction."""

    __tablename__ = "alias_moves"
    __table_args__ = (UniqueConstraint("adapter_id", "base_id", "name", "generation"),)
    id: int | None = Field(default=None, primary_key=True)
    adapter_id: int = Field(foreign_key="adapters.id")
    base_id: int = Field(foreign_key="bases.id")
    name: str = Field(max_length=64)
    generation: int
    from_version_id: int | None = Field(default=None, foreign_key="versions.id")
    to_version_id: int | None = _to("versions.id", "NULL: the alias was taken away", nullable=True)
    actor: str = Field(max_length=16)
    reason: str = Field(max_length=2000)
    verdict: dict[str, Any] | None = _json("the gate's verdict, when it was gated", nullable=True)
    campaign_id: str | None = Field(default=None, max_length=32)
    at: datetime = _time("when it moved")


# ── data ─────────────────────────────────────────────────────────────────────


class Dataset(SQLModel, table=True):
    """A named series of datasets or evaluation suites."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("kind", "namespace", "name"), _one_of("kind", ["dataset", "suite"]))
    id: int | None = Field(default=None, primary_key=True)
    kind: str = Field(max_length=8)
    namespace: str = Field(max_length=64)
    name: str = Field(max_length=64)
    next_version: int = Field(default=1)
    created_at: datetime = _time("when its first version came")


class DatasetVersion(SQLModel, table=True):
    """One immutable version of a dataset or suite."""

    __tablename__ = "dataset_versions"
    __table_args__ = (
        UniqueConstraint("dataset_id", "number"),
        UniqueConstraint("dataset_id", "digest"),
        Index("ix_dataset_versions_digest", "digest"),
    )
    id: int | None = Field(default=None, primary_key=True)
    dataset_id: int = Field(foreign_key="datasets.id")
    number: int
    digest: str = _digest("digest of its manifest")
    rows: int
    gate_rows: int = Field(default=0, sa_column_kwargs={"comment": "suites: items in the gate split"})
    calibration_rows: int | None = Field(
        default=None, sa_column_kwargs={"comment": "suites: items in the calibration split, None: not counted yet then"}
    )
    spec: dict[str, Any] = _json("metrics and settings of a suite")
    size: int = Field(sa_type=BigInteger)
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was committed")


class Evaluation(SQLModel, table=True):
    """Summary of one scoring; the records per item are a blob."""

    __tablename__ = "evaluations"
    __table_args__ = (
        UniqueConstraint("job_id", "base_id", "version_id"),
        Index("ix_evaluations_version_id_suite_id", "version_id", "suite_id"),
        Index("ix_evaluations_base_id_suite_id", "base_id", "suite_id"),
        Index("ix_evaluations_records", "records"),
    )
    id: int | None = Field(default=None, primary_key=True)
    base_id: int = Field(foreign_key="bases.id")
    version_id: int | None = _to("versions.id", "None: the bare base", nullable=True)
    suite_id: int = Field(foreign_key="dataset_versions.id")
    harness: str = Field(max_length=71, sa_column_kwargs={"comment": "digest of harness, decoding and precision"})
    summary: dict[str, Any] = _json("metric -> split -> mean and n")
    records: str = _digest("blob of the records per item")
    job_id: str = Field(max_length=32, sa_column_kwargs={"comment": "only a claimed job's results count for a gate"})
    seconds: float
    created_at: datetime = _time("when the job succeeded")


class StoredPolicy(SQLModel, table=True):
    """A revision of the policy of an adapter, or of its namespace when ``name`` is empty."""

    __tablename__ = "policies"
    __table_args__ = (UniqueConstraint("namespace", "name", "revision"),)
    id: int | None = Field(default=None, primary_key=True)
    namespace: str = Field(max_length=64)
    name: str = Field(max_length=64, sa_column_kwargs={"comment": "empty: the namespace's default"})
    revision: int
    body: dict[str, Any] = _json("registry.core.policy.Policy")
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was set")


# ── work ─────────────────────────────────────────────────────────────────────


class Job(SQLModel, table=True):
    """A unit of work; the row is the truth, the broker only wakes workers."""

    __tablename__ = "jobs"
    __table_args__ = (
        _one_of("state", JobState),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease"),
        Index(
            "uq_jobs_key_active", "key", unique=True,
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        Index("ix_jobs_key", "key"),
        Index("ix_jobs_queue_state_priority", "queue", "state", "priority", "created_at"),
        Index("ix_jobs_state_lease_until", "state", "lease_until"),
        Index("ix_jobs_campaign_id", "campaign_id"),
    )
    id: str = Field(primary_key=True, max_length=32)
    kind: str = Field(max_length=12)
    queue: str = Field(max_length=32)
    state: str = Field(max_length=10)
    namespace: str = Field(max_length=64)
    recipe: dict[str, Any] = _json("registry.core.recipes")
    recipe_digest: str = _digest("digest of the recipe")
    key: str = Field(max_length=71, sa_column_kwargs={"comment": "equal work has one key"})
    output: dict[str, Any] = _json("where results go: adapter, aliases, line, message")
    base: str = _digest("base that the work loads: jobs on one base are claimed together")
    priority: int = Field(default=0)
    attempt: int = Field(default=0)
    max_attempts: int = Field(default=3)
    lease_until: datetime | None = _time("until when the attempt owns it", nullable=True)
    token_id: str | None = Field(default=None, max_length=16, sa_column_kwargs={"comment": "who claimed it"})
    worker: str | None = Field(default=None, max_length=200)
    cancel_requested: bool = Field(default=False)
    progress: dict[str, Any] | None = _json("last progress of the attempt", nullable=True)
    result: dict[str, Any] | None = _json("what the worker reported, and what was made of it", nullable=True)
    error: dict[str, Any] | None = _json("problem of the last attempt", nullable=True)
    campaign_id: str | None = Field(default=None, max_length=32)
    held_by: str | None = Field(
        default=None, max_length=32, sa_column_kwargs={"comment": "the paused campaign that keeps it from being claimed"}
    )
    origin: str | None = _origin()
    traceparent: str | None = _traceparent()
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was asked for")
    started_at: datetime | None = _time("when the last attempt began", nullable=True)
    company: int = Field(
        default=1, sa_column_kwargs={"comment": "jobs that the last attempt is made with, itself too", "server_default": "1"}
    )
    lost_seconds: float = Field(
        default=0.0, sa_column_kwargs={"comment": "device seconds of attempts without a result", "server_default": "0"}
    )
    finished_at: datetime | None = _time("when it came to its end", nullable=True)


class JobEvent(SQLModel, table=True):
    """Progress, log lines and moves of a job, in order."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id", "job_id", "id"),)
    id: int | None = Field(default=None, primary_key=True)
    job_id: str = Field(foreign_key="jobs.id", max_length=32)
    attempt: int
    kind: str = Field(max_length=12)
    data: dict[str, Any] = _json("facts of the event")
    at: datetime = _time("when the registry heard of it")


class Checkpoint(SQLModel, table=True):
    """The newest checkpoint of a job that storage holds, verified; files lie under the attempt that sent them."""

    __tablename__ = "checkpoints"
    __table_args__ = (CheckConstraint("size >= 0", name="size"), CheckConstraint("step >= 1", name="step"))
    job_id: str = Field(foreign_key="jobs.id", primary_key=True, max_length=32)
    attempt: int = Field(sa_column_kwargs={"comment": "that sent it, holding the lease"})
    step: int = Field(sa_type=BigInteger, sa_column_kwargs={"comment": "steps that its runs have made together"})
    digest: str = _digest("sha256 of the canonical list of its files")
    size: int = Field(sa_type=BigInteger, sa_column_kwargs={"comment": "bytes of all files"})
    files: list[dict[str, Any]] = _json("path, size and sha256 of each file")
    created_at: datetime = _time("when it was recorded")


class Campaign(SQLModel, table=True):
    """One base upgrade over many adapters."""

    __tablename__ = "campaigns"
    __table_args__ = (
        _one_of("state", CampaignState),
        CheckConstraint("old_id <> new_id", name="an_upgrade"),
        Index(
            "uq_campaigns_line_active", "line_id", unique=True,
            sqlite_where=text("state IN ('planned', 'running')"),
            postgresql_where=text("state IN ('planned', 'running')"),
        ),
    )
    id: str = Field(primary_key=True, max_length=32)
    line_id: int = Field(foreign_key="lines.id")
    old_id: int = Field(foreign_key="bases.id")
    new_id: int = Field(foreign_key="bases.id")
    state: str = Field(max_length=10)
    reason: str = Field(default="", max_length=2000)
    queue: str = Field(max_length=32)
    parallel: int | None = Field(default=None, sa_column_kwargs={"comment": "adapters worked on at once; NULL: all"})
    budget_seconds: float | None = Field(default=None, sa_column_kwargs={"comment": "device seconds of all its jobs"})
    deadline: datetime | None = _time("what is not final by then is frozen", nullable=True)
    paused_at: datetime | None = _time("since when it is paused", nullable=True)
    origin: str | None = _origin()
    traceparent: str | None = _traceparent()
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was planned")
    started_at: datetime | None = _time("when it was started", nullable=True)
    finished_at: datetime | None = _time("when every adapter was final", nullable=True)


class CampaignItem(SQLModel, table=True):
    """One adapter of a campaign; ends in exactly one final state."""

    __tablename__ = "campaign_items"
    __table_args__ = (UniqueConstraint("campaign_id", "adapter_id", "alias"),)
    id: int | None = Field(default=None, primary_key=True)
    campaign_id: str = Field(foreign_key="campaigns.id", max_length=32)
    adapter_id: int = Field(foreign_key="adapters.id")
    alias: str = Field(max_length=64)
    serving_id: int = Field(foreign_key="versions.id", sa_column_kwargs={"comment": "what serves on the old base"})
    state: str = Field(max_length=12, sa_column_kwargs={"comment": "registry.core.campaign"})
    facts: dict[str, Any] = _json("registry.core.campaign: state and outcomes so far")
    revision: int = Field(default=1, sa_column_kwargs={"comment": "compare-and-set of every step"})
    final_id: int | None = _to("versions.id", "what was promoted", nullable=True)
    reason: str = Field(default="", sa_column=Column(Text, nullable=False))
    changed_at: datetime = _time("when it last changed")


class PoolAnswers(SQLModel, table=True):
    """What a version, or a bare base, answered to unlabelled inputs; the answers are a blob."""

    __tablename__ = "pool_answers"
    __table_args__ = (Index("ix_pool_answers_job_id", "job_id"), Index("ix_pool_answers_answers", "answers"))
    id: int | None = Field(default=None, primary_key=True)
    job_id: str = Field(foreign_key="jobs.id", max_length=32)
    version: str | None = Field(
        default=None, max_length=71, sa_column_kwargs={"comment": "digest of the version; NULL: the bare base"}
    )
    harness: str = Field(max_length=71, sa_column_kwargs={"comment": "digest of harness, decoding and precision"})
    answers: str = _digest("blob of the answers per input")
    created_at: datetime = _time("when the job succeeded")


class PoolPaper(SQLModel, table=True):
    """Inputs on which a candidate and what serves differ, to be labelled; and what people said of them."""

    __tablename__ = "pool_papers"
    __table_args__ = (
        UniqueConstraint("item_id", "paper"),
        Index("ix_pool_papers_paper", "paper"),
        Index("ix_pool_papers_labels", "labels"),
    )
    id: int | None = Field(default=None, primary_key=True)
    item_id: int = Field(foreign_key="campaign_items.id")
    version: str = _digest("digest of the candidate")
    paper: str = _digest("blob of the file to be labelled")
    labels: str | None = Field(
        default=None, max_length=71, sa_column_kwargs={"comment": "blob of the labels; NULL: none came yet"}
    )
    actor: str | None = Field(default=None, max_length=16, sa_column_kwargs={"comment": "the token that labelled it"})
    created_at: datetime = _time("when the answers were compared")
    labelled_at: datetime | None = _time("when the labels came", nullable=True)


class Decision(SQLModel, table=True):
    """The ledger of campaigns: written once, with the decision itself; never changed."""

    __tablename__ = "decisions"
    __table_args__ = (
        Index("ix_decisions_campaign_id", "campaign_id", "id"),
        Index("ix_decisions_adapter_id", "adapter_id", "id"),
        Index("ix_decisions_tier", "tier", "id"),
    )
    id: int | None = Field(default=None, primary_key=True)
    campaign_id: str = Field(foreign_key="campaigns.id", max_length=32)
    adapter_id: int | None = Field(default=None, foreign_key="adapters.id")
    alias: str | None = Field(default=None, max_length=64)
    kind: str = Field(max_length=12, sa_column_kwargs={"comment": "registry.core.ledger"})
    tier: str | None = Field(default=None, max_length=12)
    data: dict[str, Any] = _json("what the decision rested on")
    actor: str | None = Field(default=None, max_length=16, sa_column_kwargs={"comment": "the token; NULL: by itself"})
    at: datetime = _time("when it was made")


class Schedule(SQLModel, table=True):
    """What starts work by itself: a cron expression, a base upgrade, new data."""

    __tablename__ = "schedules"
    __table_args__ = (_one_of("trigger", ["cron", "base-upgrade", "new-data"]),)
    id: str = Field(primary_key=True, max_length=32)
    namespace: str = Field(max_length=64)
    trigger: str = Field(max_length=12)
    subject: str = Field(max_length=200, sa_column_kwargs={"comment": "cron expression, line, or dataset"})
    action: dict[str, Any] = _json("what to start: an upgrade, or a job request")
    enabled: bool = Field(default=True)
    next_at: datetime | None = _time("cron: next firing", nullable=True, index=True)
    created_by: str = Field(max_length=16)
    created_at: datetime = _time("when it was added")


class Firing(SQLModel, table=True):
    """One firing of a schedule; the key makes it happen once, however many schedulers run."""

    __tablename__ = "firings"
    __table_args__ = (UniqueConstraint("schedule_id", "key"),)
    id: int | None = Field(default=None, primary_key=True)
    schedule_id: str = Field(foreign_key="schedules.id", max_length=32)
    key: str = Field(max_length=200, sa_column_kwargs={"comment": "due time, revision or dataset version"})
    outcome: dict[str, Any] = _json("campaign or job it started, or why not")
    at: datetime = _time("when it fired")
