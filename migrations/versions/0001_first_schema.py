"""first schema

A migration may only do what the code of the release before it survives: add tables, nullable columns,
indexes. It may not drop or rename what that code reads, rewrite large tables in one statement, or import
models. Contract in a later release.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""

    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False, comment="UPDATE … RETURNING gives numbers"),
        sa.Column("task", sa.String(length=200), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when its first version came"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("namespace", "name", name=op.f("uq_adapters_namespace_name")),
    )
    op.create_index(op.f("ix_adapters_name"), "adapters", ["name"], unique=False)
    op.create_table(
        "bases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="base digest"),
        sa.Column("weights_digest", sa.String(length=71), nullable=False, comment="digest of the tensors alone"),
        sa.Column("arch_digest", sa.String(length=71), nullable=False, comment="digest of the canonical architecture"),
        sa.Column("arch_kind", sa.String(length=10), nullable=False, comment="canonical, raw or none"),
        sa.Column("model_type", sa.String(length=64), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column(
            "vocabulary_digest", sa.String(length=71), nullable=True, comment="tokenizer vocabulary and special tokens"
        ),
        sa.Column("template_digest", sa.String(length=71), nullable=True, comment="chat template"),
        sa.Column(
            "weights", sa.String(length=8), nullable=False, comment="absent, parts (store checked) or full (we read it)"
        ),
        sa.Column("manifest", sa.String(length=71), nullable=True, comment="manifest of its files"),
        sa.Column("location", sa.String(length=500), nullable=True, comment="pinned external place"),
        sa.Column(
            "names",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="names that declared bases are known by, such as org/model",
        ),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was first seen"),
        sa.CheckConstraint("weights IN ('absent', 'parts', 'full')", name=op.f("ck_bases_weights")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bases")),
        sa.UniqueConstraint("digest", name=op.f("uq_bases_digest")),
    )
    op.create_index(op.f("ix_bases_weights_digest"), "bases", ["weights_digest"], unique=False)
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(length=71), nullable=False, comment="sha256 of the bytes"),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "verified", sa.String(length=8), nullable=False, comment="parts: by the store's checksums; full: read"
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was put into place"),
        sa.CheckConstraint("verified IN ('parts', 'full')", name=op.f("ck_blobs_verified")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_blobs_size")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_blobs")),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when its first version came"),
        sa.CheckConstraint("kind IN ('dataset', 'suite')", name=op.f("ck_datasets_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("kind", "namespace", "name", name=op.f("uq_datasets_kind_namespace_name")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("queue", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column(
            "recipe",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="registry.core.recipes",
        ),
        sa.Column("recipe_digest", sa.String(length=71), nullable=False, comment="digest of the recipe"),
        sa.Column("key", sa.String(length=71), nullable=False, comment="equal work has one key"),
        sa.Column(
            "output",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="where results go: adapter, aliases, line, message",
        ),
        sa.Column(
            "base",
            sa.String(length=71),
            nullable=False,
            comment="base that the work loads: jobs on one base are claimed together",
        ),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True, comment="until when the attempt owns it"),
        sa.Column("token_id", sa.String(length=16), nullable=True, comment="who claimed it"),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column(
            "progress",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="last progress of the attempt",
        ),
        sa.Column(
            "result",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="what the worker reported, and what was made of it",
        ),
        sa.Column(
            "error",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="problem of the last attempt",
        ),
        sa.Column("campaign_id", sa.String(length=32), nullable=True),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was asked for"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True, comment="when the last attempt began"),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True, comment="when it came to its end"),
        sa.CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name=op.f("ck_jobs_lease")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_jobs_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_campaign_id", "jobs", ["campaign_id"], unique=False)
    op.create_index("ix_jobs_key", "jobs", ["key"], unique=False)
    op.create_index("ix_jobs_queue_state_priority", "jobs", ["queue", "state", "priority", "created_at"], unique=False)
    op.create_index("ix_jobs_state_lease_until", "jobs", ["state", "lease_until"], unique=False)
    op.create_index(
        "uq_jobs_key_active",
        "jobs",
        ["key"],
        unique=True,
        sqlite_where=sa.text("state IN ('queued', 'running')"),
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_table(
        "lines",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("next_revision", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when its first revision came"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lines")),
        sa.UniqueConstraint("name", name=op.f("uq_lines_name")),
    )
    op.create_table(
        "manifest_blobs",
        sa.Column("manifest", sa.String(length=71), nullable=False, comment="the manifest"),
        sa.Column("blob", sa.String(length=71), nullable=False, comment="the blob"),
        sa.PrimaryKeyConstraint("manifest", "blob", name=op.f("pk_manifest_blobs")),
    )
    op.create_index("ix_manifest_blobs_blob", "manifest_blobs", ["blob"], unique=False)
    op.create_table(
        "manifests",
        sa.Column("digest", sa.String(length=71), nullable=False, comment="sha256 of the body"),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False, comment="bytes of all files"),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_manifests")),
    )
    op.create_table(
        "policies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False, comment="empty: the namespace's default"),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column(
            "body",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="registry.core.policy.Policy",
        ),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was set"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_policies")),
        sa.UniqueConstraint("namespace", "name", "revision", name=op.f("uq_policies_namespace_name_revision")),
    )
    op.create_table(
        "pushes",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column(
            "manifest_digest", sa.String(length=71), nullable=False, comment="digest of the version it would make"
        ),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.Column(
            "wishes",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="aliases, message, overrides and line as asked for",
        ),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column(
            "findings",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="problems that led to the rejection",
        ),
        sa.Column(
            "outcome",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="what the commit made, for whoever asks again",
        ),
        sa.Column(
            "facts",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="what the verifier read in the files; the commit is made of it",
        ),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True, comment="until when one verifier owns it"),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was opened"),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False, comment="when its state last changed"),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False, comment="until when it may be committed"),
        sa.CheckConstraint(
            "state IN ('open', 'uploading', 'verifying', 'verified', 'committed', 'rejected', 'expired', 'aborted')",
            name=op.f("ck_pushes_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pushes")),
    )
    op.create_index("ix_pushes_manifest_digest", "pushes", ["manifest_digest"], unique=False)
    op.create_index("ix_pushes_state_expires_at", "pushes", ["state", "expires_at"], unique=False)
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("namespace", sa.String(length=64), nullable=False),
        sa.Column("trigger", sa.String(length=12), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False, comment="cron expression, line, or dataset"),
        sa.Column(
            "action",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="what to start: an upgrade, or a job request",
        ),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True, comment="cron: next firing"),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was added"),
        sa.CheckConstraint("trigger IN ('cron', 'base-upgrade', 'new-data')", name=op.f("ck_schedules_trigger")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    op.create_index(op.f("ix_schedules_next_at"), "schedules", ["next_at"], unique=False)
    op.create_table(
        "target_sets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="sha256 of the canonical list"),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_target_sets")),
        sa.UniqueConstraint("digest", name=op.f("uq_target_sets_digest")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=16), nullable=False, comment="public part of the token"),
        sa.Column("hash", sa.String(length=64), nullable=False, comment="SHA-256 of the secret, hex"),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False, comment="who or what holds it, for people"),
        sa.Column(
            "scopes",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment='namespace (or "*") -> scopes; of a worker: queue names under "queues"',
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was made"),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True, comment="from when on it is refused"),
        sa.Column(
            "revoked_at", sa.DateTime(timezone=True), nullable=True, comment="from when on it is refused for good"
        ),
        sa.CheckConstraint("kind IN ('user', 'worker')", name=op.f("ck_tokens_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_tokens_hash")),
    )
    op.create_table(
        "base_tables",
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_base_tables_base_id_bases")),
        sa.PrimaryKeyConstraint("base_id", name=op.f("pk_base_tables")),
    )
    op.create_table(
        "campaigns",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("line_id", sa.Integer(), nullable=False),
        sa.Column("old_id", sa.Integer(), nullable=False),
        sa.Column("new_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("reason", sa.String(length=2000), nullable=False),
        sa.Column("queue", sa.String(length=32), nullable=False),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was planned"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True, comment="when it was started"),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True, comment="when every adapter was final"),
        sa.CheckConstraint("state IN ('planned', 'running', 'finished', 'aborted')", name=op.f("ck_campaigns_state")),
        sa.CheckConstraint("old_id <> new_id", name=op.f("ck_campaigns_an_upgrade")),
        sa.ForeignKeyConstraint(["line_id"], ["lines.id"], name=op.f("fk_campaigns_line_id_lines")),
        sa.ForeignKeyConstraint(["new_id"], ["bases.id"], name=op.f("fk_campaigns_new_id_bases")),
        sa.ForeignKeyConstraint(["old_id"], ["bases.id"], name=op.f("fk_campaigns_old_id_bases")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaigns")),
    )
    op.create_index(
        "uq_campaigns_line_active",
        "campaigns",
        ["line_id"],
        unique=True,
        sqlite_where=sa.text("state IN ('planned', 'running')"),
        postgresql_where=sa.text("state IN ('planned', 'running')"),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="digest of its manifest"),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("gate_rows", sa.Integer(), nullable=False, comment="suites: items in the gate split"),
        sa.Column(
            "spec",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="metrics and settings of a suite",
        ),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was committed"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_dataset_versions_dataset_id_datasets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_versions")),
        sa.UniqueConstraint("dataset_id", "digest", name=op.f("uq_dataset_versions_dataset_id_digest")),
        sa.UniqueConstraint("dataset_id", "number", name=op.f("uq_dataset_versions_dataset_id_number")),
    )
    op.create_index("ix_dataset_versions_digest", "dataset_versions", ["digest"], unique=False)
    op.create_table(
        "derivations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("evidence", sa.String(length=10), nullable=False),
        sa.Column(
            "detail",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="dtype, method, error, drift per tensor, job",
        ),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was recorded"),
        sa.CheckConstraint("evidence IN ('measured', 'declared')", name=op.f("ck_derivations_evidence")),
        sa.CheckConstraint("kind IN ('cast', 'quantised', 'merged', 'continued')", name=op.f("ck_derivations_kind")),
        sa.CheckConstraint("child_id <> parent_id", name=op.f("ck_derivations_not_itself")),
        sa.ForeignKeyConstraint(["child_id"], ["bases.id"], name=op.f("fk_derivations_child_id_bases")),
        sa.ForeignKeyConstraint(["parent_id"], ["bases.id"], name=op.f("fk_derivations_parent_id_bases")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_derivations")),
        sa.UniqueConstraint("child_id", "parent_id", "kind", name=op.f("uq_derivations_child_id_parent_id_kind")),
    )
    op.create_table(
        "firings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("schedule_id", sa.String(length=32), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False, comment="due time, revision or dataset version"),
        sa.Column(
            "outcome",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="campaign or job it started, or why not",
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="when it fired"),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name=op.f("fk_firings_schedule_id_schedules")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_firings")),
        sa.UniqueConstraint("schedule_id", "key", name=op.f("uq_firings_schedule_id_key")),
    )
    op.create_table(
        "job_events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column(
            "data",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="facts of the event",
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="when the registry heard of it"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job_id", "id"], unique=False)
    op.create_table(
        "push_blobs",
        sa.Column("push_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="sha256 promised by the manifest"),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=8), nullable=False),
        sa.Column("upload_id", sa.Text(), nullable=True, comment="of a multipart"),
        sa.Column("part_size", sa.Integer(), nullable=True, comment="bytes of every part but the last"),
        sa.Column(
            "parts",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="part number -> SHA-256 it was signed for; not every store lists it",
        ),
        sa.CheckConstraint(
            "state IN ('present', 'needed', 'arrived', 'verified', 'placed')", name=op.f("ck_push_blobs_state")
        ),
        sa.ForeignKeyConstraint(["push_id"], ["pushes.id"], name=op.f("fk_push_blobs_push_id_pushes")),
        sa.PrimaryKeyConstraint("push_id", "digest", name=op.f("pk_push_blobs")),
    )
    op.create_table(
        "revisions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("line_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), nullable=False, comment="when it became the newest of its line"
        ),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_revisions_base_id_bases")),
        sa.ForeignKeyConstraint(["line_id"], ["lines.id"], name=op.f("fk_revisions_line_id_lines")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_revisions")),
        sa.UniqueConstraint("line_id", "number", name=op.f("uq_revisions_line_id_number")),
    )
    op.create_index("ix_revisions_base_id", "revisions", ["base_id"], unique=False)
    op.create_table(
        "target_fits",
        sa.Column("old_id", sa.Integer(), nullable=False),
        sa.Column("new_id", sa.Integer(), nullable=False),
        sa.Column("target_set_id", sa.Integer(), nullable=False),
        sa.Column("fit", sa.String(length=16), nullable=False),
        sa.Column(
            "reasons",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="why, module by module, shortened",
        ),
        sa.Column("vocabulary_changed", sa.Boolean(), nullable=False),
        sa.Column("drift", sa.Float(), nullable=True, comment="median relative drift, None: not measured"),
        sa.ForeignKeyConstraint(["new_id"], ["bases.id"], name=op.f("fk_target_fits_new_id_bases")),
        sa.ForeignKeyConstraint(["old_id"], ["bases.id"], name=op.f("fk_target_fits_old_id_bases")),
        sa.ForeignKeyConstraint(
            ["target_set_id"], ["target_sets.id"], name=op.f("fk_target_fits_target_set_id_target_sets")
        ),
        sa.PrimaryKeyConstraint("old_id", "new_id", "target_set_id", name=op.f("pk_target_fits")),
    )
    op.create_index("ix_target_fits_new_id_fit", "target_fits", ["new_id", "fit"], unique=False)
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="digest of its manifest"),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("target_set_id", sa.Integer(), nullable=True),
        sa.Column("latest", sa.Boolean(), nullable=False, comment="the newest of this adapter on this base"),
        sa.Column("evidence", sa.String(length=12), nullable=False),
        sa.Column(
            "binding",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="what the evidence rests on, and overrides by whom",
        ),
        sa.Column("peft_type", sa.String(length=64), nullable=False),
        sa.Column("runnable", sa.Boolean(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column(
            "engines",
            sa.Integer(),
            nullable=False,
            comment="bit set of engines that can load it, registry.core.engines",
        ),
        sa.Column(
            "spec",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="modules, ranks and scales, and the verdict per engine",
        ),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.String(length=2000), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=True),
        sa.Column("created_by", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when it was committed"),
        sa.CheckConstraint(
            "evidence IN ('recorded', 'resolved', 'behavioural', 'declared')", name=op.f("ck_versions_evidence")
        ),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_versions_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_versions_base_id_bases")),
        sa.ForeignKeyConstraint(
            ["target_set_id"], ["target_sets.id"], name=op.f("fk_versions_target_set_id_target_sets")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
        sa.UniqueConstraint("adapter_id", "digest", name=op.f("uq_versions_adapter_id_digest")),
        sa.UniqueConstraint("adapter_id", "number", name=op.f("uq_versions_adapter_id_number")),
    )
    op.create_index(
        "ix_versions_base_target_set_latest", "versions", ["base_id", "target_set_id", "latest", "id"], unique=False
    )
    op.create_index("ix_versions_digest", "versions", ["digest"], unique=False)
    op.create_index(op.f("ix_versions_job_id"), "versions", ["job_id"], unique=False)
    op.create_index(
        "uq_versions_latest",
        "versions",
        ["adapter_id", "base_id"],
        unique=True,
        sqlite_where=sa.text("latest"),
        postgresql_where=sa.text("latest"),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("from_version_id", sa.Integer(), nullable=True),
        sa.Column("to_version_id", sa.Integer(), nullable=False),
        sa.Column("actor", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=2000), nullable=False),
        sa.Column(
            "verdict",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="the gate's verdict, when it was gated",
        ),
        sa.Column("campaign_id", sa.String(length=32), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, comment="when it moved"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_alias_moves_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_alias_moves_base_id_bases")),
        sa.ForeignKeyConstraint(
            ["from_version_id"], ["versions.id"], name=op.f("fk_alias_moves_from_version_id_versions")
        ),
        sa.ForeignKeyConstraint(["to_version_id"], ["versions.id"], name=op.f("fk_alias_moves_to_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_moves")),
        sa.UniqueConstraint(
            "adapter_id",
            "base_id",
            "name",
            "generation",
            name=op.f("uq_alias_moves_adapter_id_base_id_name_generation"),
        ),
    )
    op.create_table(
        "aliases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column(
            "generation", sa.Integer(), nullable=False, comment="grows by one a move; what compare-and-set compares"
        ),
        sa.CheckConstraint("generation >= 1", name=op.f("ck_aliases_generation")),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_aliases_adapter_id_adapters")),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_aliases_base_id_bases")),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_aliases_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
        sa.UniqueConstraint("adapter_id", "base_id", "name", name=op.f("uq_aliases_adapter_id_base_id_name")),
    )
    op.create_index("ix_aliases_base_id_name", "aliases", ["base_id", "name"], unique=False)
    op.create_index("ix_aliases_version_id", "aliases", ["version_id"], unique=False)
    op.create_table(
        "campaign_items",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("campaign_id", sa.String(length=32), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=64), nullable=False),
        sa.Column("serving_id", sa.Integer(), nullable=False, comment="what serves on the old base"),
        sa.Column("state", sa.String(length=12), nullable=False, comment="registry.core.campaign"),
        sa.Column(
            "facts",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="registry.core.campaign: state and outcomes so far",
        ),
        sa.Column("revision", sa.Integer(), nullable=False, comment="compare-and-set of every step"),
        sa.Column("final_id", sa.Integer(), nullable=True, comment="what was promoted"),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False, comment="when it last changed"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_campaign_items_adapter_id_adapters")),
        sa.ForeignKeyConstraint(
            ["campaign_id"], ["campaigns.id"], name=op.f("fk_campaign_items_campaign_id_campaigns")
        ),
        sa.ForeignKeyConstraint(["final_id"], ["versions.id"], name=op.f("fk_campaign_items_final_id_versions")),
        sa.ForeignKeyConstraint(["serving_id"], ["versions.id"], name=op.f("fk_campaign_items_serving_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_items")),
        sa.UniqueConstraint(
            "campaign_id", "adapter_id", "alias", name=op.f("uq_campaign_items_campaign_id_adapter_id_alias")
        ),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("base_id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True, comment="None: the bare base"),
        sa.Column("suite_id", sa.Integer(), nullable=False),
        sa.Column("harness", sa.String(length=71), nullable=False, comment="digest of harness, decoding and precision"),
        sa.Column(
            "summary",
            sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"),
            nullable=False,
            comment="metric -> split -> mean and n",
        ),
        sa.Column("records", sa.String(length=71), nullable=False, comment="blob of the records per item"),
        sa.Column(
            "job_id", sa.String(length=32), nullable=False, comment="only a claimed job's results count for a gate"
        ),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, comment="when the job succeeded"),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name=op.f("fk_evaluations_base_id_bases")),
        sa.ForeignKeyConstraint(
            ["suite_id"], ["dataset_versions.id"], name=op.f("fk_evaluations_suite_id_dataset_versions")
        ),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_evaluations_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint("job_id", "base_id", "version_id", name=op.f("uq_evaluations_job_id_base_id_version_id")),
    )
    op.create_index("ix_evaluations_base_id_suite_id", "evaluations", ["base_id", "suite_id"], unique=False)
    op.create_index("ix_evaluations_version_id_suite_id", "evaluations", ["version_id", "suite_id"], unique=False)
    op.create_table(
        "version_parents",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column(
            "parent", sa.String(length=71), nullable=False, comment="digest of an adapter version or a dataset version"
        ),
        sa.Column("relation", sa.String(length=12), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_version_parents_version_id_versions")),
        sa.PrimaryKeyConstraint("version_id", "parent", "relation", name=op.f("pk_version_parents")),
    )
    op.create_index("ix_version_parents_parent", "version_parents", ["parent"], unique=False)


def downgrade() -> None:
    """Take back."""

    op.drop_index("ix_version_parents_parent", table_name="version_parents")
    op.drop_table("version_parents")
    op.drop_index("ix_evaluations_version_id_suite_id", table_name="evaluations")
    op.drop_index("ix_evaluations_base_id_suite_id", table_name="evaluations")
    op.drop_table("evaluations")
    op.drop_table("campaign_items")
    op.drop_index("ix_aliases_version_id", table_name="aliases")
    op.drop_index("ix_aliases_base_id_name", table_name="aliases")
    op.drop_table("aliases")
    op.drop_table("alias_moves")
    op.drop_index(
        "uq_versions_latest", table_name="versions", sqlite_where=sa.text("latest"), postgresql_where=sa.text("latest")
    )
    op.drop_index(op.f("ix_versions_job_id"), table_name="versions")
    op.drop_index("ix_versions_digest", table_name="versions")
    op.drop_index("ix_versions_base_target_set_latest", table_name="versions")
    op.drop_table("versions")
    op.drop_index("ix_target_fits_new_id_fit", table_name="target_fits")
    op.drop_table("target_fits")
    op.drop_index("ix_revisions_base_id", table_name="revisions")
    op.drop_table("revisions")
    op.drop_table("push_blobs")
    op.drop_index("ix_job_events_job_id", table_name="job_events")
    op.drop_table("job_events")
    op.drop_table("firings")
    op.drop_table("derivations")
    op.drop_index("ix_dataset_versions_digest", table_name="dataset_versions")
    op.drop_table("dataset_versions")
    op.drop_index(
        "uq_campaigns_line_active",
        table_name="campaigns",
        sqlite_where=sa.text("state IN ('planned', 'running')"),
        postgresql_where=sa.text("state IN ('planned', 'running')"),
    )
    op.drop_table("campaigns")
    op.drop_table("base_tables")
    op.drop_table("tokens")
    op.drop_table("target_sets")
    op.drop_index(op.f("ix_schedules_next_at"), table_name="schedules")
    op.drop_table("schedules")
    op.drop_index("ix_pushes_state_expires_at", table_name="pushes")
    op.drop_index("ix_pushes_manifest_digest", table_name="pushes")
    op.drop_table("pushes")
    op.drop_table("policies")
    op.drop_table("manifests")
    op.drop_index("ix_manifest_blobs_blob", table_name="manifest_blobs")
    op.drop_table("manifest_blobs")
    op.drop_table("lines")
    op.drop_index(
        "uq_jobs_key_active",
        table_name="jobs",
        sqlite_where=sa.text("state IN ('queued', 'running')"),
        postgresql_where=sa.text("state IN ('queued', 'running')"),
    )
    op.drop_index("ix_jobs_state_lease_until", table_name="jobs")
    op.drop_index("ix_jobs_queue_state_priority", table_name="jobs")
    op.drop_index("ix_jobs_key", table_name="jobs")
    op.drop_index("ix_jobs_campaign_id", table_name="jobs")
    op.drop_table("jobs")
    op.drop_table("datasets")
    op.drop_table("blobs")
    op.drop_index(op.f("ix_bases_weights_digest"), table_name="bases")
    op.drop_table("bases")
    op.drop_index(op.f("ix_adapters_name"), table_name="adapters")
    op.drop_table("adapters")
