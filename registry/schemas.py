"""The wire: what the API takes and answers, shared by `registry.api` and `registry.client`.

Requests refuse unknown fields; answers ignore them, so that an older client can talk to a newer
registry. Digests, references and recipes travel as the text and JSON that `registry.core` defines. The
body of every refusal is `Problem` (``application/problem+json``).

| route | takes → gives |
|---|---|
| ``GET /health`` · ``GET /v1/sign-in`` | → `Health` · `SignInOffer` (the only routes without a token) |
| ``GET /v1/whoami`` · ``GET /v1/doctor`` | → `WhoAmI` · `DoctorReport` |
| ``POST/GET /v1/tokens``, ``POST /v1/tokens/{id}/rotate``, ``DELETE /v1/tokens/{id}`` | `TokenRequest`, `RotateRequest` → `NewToken`; → `Page[TokenInfo]` |
| ``POST /v1/{adapters|datasets|suites}/{ns}/{name}/pushes``, ``POST /v1/bases/pushes`` | `PushRequest` → `PushInfo` (201; 200 and state ``committed`` when this exact version exists) |
| ``POST /v1/pushes/{id}/parts`` | `PartsRequest` → `PartsInfo` |
| ``POST /v1/pushes/{id}/seal`` | `SealRequest` → `PushInfo`: the digests that a draft lacked |
| ``GET /v1/pushes/{id}`` · ``POST …/commit`` · ``DELETE`` | → `PushInfo` (202 while verifying, 201 when committed) |
| ``POST /v1/bases`` | `BaseRegistration` → `BaseInfo`: by its table, without weights |
| ``GET /v1/bases`` · ``/v1/bases/{ref}`` · ``/v1/bases/{ref}/table`` | → `Page[BaseInfo]` · `BaseInfo` · compressed table |
| ``GET /v1/bases/{a}/diff/{b}`` | → `DiffInfo` |
| ``GET /v1/bases/{ref}/adapters`` | → `Page[CompatibleAdapter]` |
| ``POST /v1/bases/{ref}/derivations`` | `DerivationRequest` → `DerivationInfo` |
| ``GET /v1/adapters`` · ``/v1/adapters/{ns}/{name}`` | → `Page[AdapterInfo]` · `AdapterInfo` |
| ``GET/POST …/versions/{v}/signatures`` | → `SignaturesInfo` · `SignatureRequest` → `SignatureInfo` |
| ``GET …/versions`` · ``…/versions/{v}`` · ``…/versions/{v}/manifest`` | → `Page[VersionInfo]` · `VersionInfo` · the manifest's bytes with ETag |
| ``POST …/versions/{v}/yank`` · ``/quarantine`` · ``/reinstate`` · ``/delete`` | `StandingRequest` → `StandingInfo` |
| ``GET …/log`` · ``…/lineage`` · ``…/evaluations`` · ``…/aliases`` | → `LogInfo` · `LineageInfo` · `Page[EvaluationInfo]` · `list[AliasInfo]` |
| ``PUT …/aliases/{alias}`` (``If-Match: <generation>``) · ``POST …/aliases/{alias}/rollback`` | `AliasRequest` · `RollbackRequest` → `AliasInfo` |
| ``GET/PUT …/policy`` · ``GET/PUT /v1/namespaces/{ns}/policy`` | `Policy` → `PolicyInfo` |
| ``GET /v1/resolve?ref=&base=&engine=&fit=`` · ``POST /v1/downloads`` | → `Resolution` · `DownloadRequest` → `DownloadInfo` |
| ``GET /v1/{datasets|suites}`` · ``/v1/{datasets|suites}/{ns}/{name}`` | → `Page[DatasetInfo]` · `DatasetInfo` |
| ``POST/GET /v1/jobs`` · ``GET /v1/jobs/{id}`` · ``/events`` (SSE) · ``POST …/cancel`` · ``…/retry`` | `JobRequest` → `JobInfo` |
| ``POST /v1/jobs/claim`` · ``/{id}/heartbeat`` · ``/{id}/pushes`` · ``/{id}/finish`` · ``/{id}/fail`` · ``/{id}/inputs`` | a worker's side: `ClaimRequest` → `ClaimInfo` … |
| ``POST/GET /v1/jobs/{id}/checkpoint`` · ``POST /v1/jobs/checkpoints`` | `CheckpointRequest` → `CheckpointUploads`; → `CheckpointInfo` · `CheckpointsRequest` |
| ``POST /v1/upgrades/plan`` · ``POST/GET /v1/upgrades`` · ``GET /v1/upgrades/{id}`` · ``/start`` · ``/pause`` · ``/resume`` · ``/abort`` · ``/approve`` · ``/rollback`` | `UpgradeRequest` … → `CampaignInfo` |
| ``GET /v1/upgrades/{id}/disagreements?adapter=&alias=`` · ``POST …/labels`` | → `DisagreementsInfo` · `LabelsRequest` → `CampaignInfo` |
| ``GET /v1/upgrades/ledger`` | → `Page[DecisionInfo]` |
| ``GET/POST /v1/namespaces/{ns}/keys`` · ``POST …/keys/{fingerprint}/revoke`` | `KeyRequest` → `KeyInfo` · → `Page[KeyInfo]` · `RevokeRequest` → `KeyInfo` |
| ``GET/PUT /v1/namespaces/{ns}/signing`` | `SigningRequest` → `SigningInfo` |
| ``GET/PUT /v1/namespaces/{ns}/quota`` · ``POST /v1/fsck`` | `QuotaRequest` → `QuotaInfo` · `FsckRequest` → lines of `FsckLine` |
| ``POST/GET /v1/webhooks`` · ``DELETE /v1/webhooks/{id}`` · ``POST …/test`` | `WebhookRequest` → `NewWebhook`; → `Page[WebhookInfo]` |
| ``GET /v1/audit`` · ``GET /v1/audit/chain?after=`` | → `Page[AuditInfo]` · `ChainInfo` |
| ``POST/GET /v1/schedules`` · ``DELETE /v1/schedules/{id}`` | `ScheduleRequest` → `ScheduleInfo` |
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from .core.manifest import MAX_FILES, BaseDigest, FileEntry, Sha256
from .core.policy import Policy
from .core.signatures import MAX_SIGNATURES

ABOUT = ("job", "campaign", "origin")
"""What a worker's requests say they are for, in the header ``baggage``: ``loractl.job=j…,loractl.origin=…`` (W3C)."""
Scope = Literal["read", "publish", "promote", "run", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "publish", "promote", "run", "admin")


def baggage(about: Mapping[str, object]) -> str:
    """The header that says what a request is for; empty when there is nothing to say."""
    return ",".join(f"loractl.{name}={about[name]}" for name in ABOUT if about.get(name))


def named(header: str) -> dict[str, str]:
    """What `baggage` said; what is not an id of ours is left out."""
    members = (part.partition(";")[0].strip().partition("=") for part in header.split(","))
    said = {name.removeprefix("loractl."): value for name, _, value in members if name.startswith("loractl.")}
    return {name: said[name] for name in ABOUT if name in said and is_id(said[name])}


def is_id(text: str) -> bool:
    """Whether a client may call a request so: 1 to 64 letters and digits of ASCII."""
    return text.isascii() and text.isalnum() and len(text) <= 64


class Request(BaseModel):
    """A body that the registry takes."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Answer(BaseModel):
    """A body that the registry gives."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)


Item = TypeVar("Item")


class Page(Answer, Generic[Item]):
    """Some items in a stable order, and the cursor of the next page, None at the end."""

    items: list[Item]
    cursor: str | None = None


class Problem(Answer):
    """RFC 9457, with our code, facts and the command that helps."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    request: str | None = None


class Health(Answer):
    status: Literal["ok"] = "ok"
    version: str


class Finding(Answer):
    """One line of ``loractl doctor``."""

    check: str
    ok: bool
    detail: str
    help: str = ""


class DoctorReport(Answer):
    findings: list[Finding]


# ── access ───────────────────────────────────────────────────────────────────


class SignIn(Answer):
    """An identity provider, and as which client people sign in there."""

    issuer: str
    client_id: str
    scope: str


class SignInOffer(Answer):
    """How people may sign in, besides by a token of the registry."""

    oidc: SignIn | None


class WhoAmI(Answer):
    id: str
    name: str
    kind: Literal["user", "worker"]
    scopes: dict[str, list[str]]
    expires_at: datetime | None


class TokenRequest(Request):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Literal["user", "worker"] = "user"
    scopes: dict[str, list[Scope]] = Field(default_factory=dict)
    """namespace or ``*`` -> scopes; a user token cannot give more than it has."""
    queues: list[str] = Field(default_factory=list)
    """A worker token: the queues it may claim from."""
    expires_in: Annotated[float, Field(gt=0, le=3_200_000_000)] | None = None
    """Seconds, a century at most; None for no expiry."""


class RotateRequest(Request):
    grace_s: Annotated[float, Field(ge=0, le=30 * 86400)] = 3600.0
    """For how many seconds the old secret stays good."""


class TokenInfo(WhoAmI):
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None = None
    """To about a minute."""
    previous_until: datetime | None = None
    """Until when the secret before the last rotation is good."""


class NewToken(TokenInfo):
    token: str
    """Shown this once."""


# ── push ─────────────────────────────────────────────────────────────────────


class Wishes(Request):
    """What should happen at the commit; not part of the version's identity."""

    aliases: list[str] = Field(default_factory=list)
    message: Annotated[str, Field(max_length=2000)] = ""
    task: Annotated[str, Field(max_length=200)] | None = None
    trust_base: bool = False
    allow_zero: bool = False
    line: str | None = None
    """Bases: the line it becomes the newest revision of."""
    revision: Annotated[int, Field(ge=1)] | None = None
    """Bases: the number it must get, for pushes that must not race."""
    names: list[str] = Field(default_factory=list)
    """Bases: names it is known by elsewhere, such as ``org/model``: what ``resolved`` evidence rests on."""
    parent: BaseDigest | None = None
    parent_kind: Literal["cast", "quantised", "merged", "continued"] | None = None
    """Bases: a declared derivation."""
    unlike: Annotated[bool, Field(exclude_if=lambda it: not it)] = False
    """Bases: the line goes on with a model that shares no tensor's name with its newest. Sent where it is so."""


class PushRequest(Request):
    manifest: dict[str, Any]
    """Of a base it may be a draft, in which files have no digest yet (`registry.core.manifest.Draft`)."""
    wishes: Wishes = Wishes()
    table: str | None = None
    """Bases: the tensor table, base64 of its compressed form (`BaseModel.to_bytes`)."""
    signatures: Annotated[list[dict[str, Any]], Field(max_length=MAX_SIGNATURES, exclude_if=lambda them: not them)] = (
        Field(default_factory=list)
    )
    """Adapters: bundles that sign the version (`registry.core.signatures`). Sent where there are some: a registry of the
    release before knows none."""


class SignedRequest(Answer):
    """A request that the store accepts without our token; every header must be sent as given."""

    method: str
    url: str
    headers: dict[str, str] = Field(default_factory=dict)
    expires_at: datetime


class BlobState(Answer):
    digest: Sha256
    size: int
    state: Literal["present", "needed", "arrived"]
    put: SignedRequest | None = None
    """A needed blob below the multipart threshold."""
    part_size: int | None = None
    """A needed blob above it: ask for its parts."""
    path: str | None = None
    """A file of a draft that is new here for certain: send its parts at once, by ``digest``, which stands for its own."""


class PushInfo(Answer):
    id: str
    kind: str
    state: str
    version_digest: Sha256
    expires_at: datetime
    blobs: list[BlobState] = Field(default_factory=list)
    findings: list[dict[str, Any]] = Field(default_factory=list)
    """Problems (code, detail, hint, facts) that led to a rejection."""
    outcome: dict[str, Any] | None = None
    """After the commit: ``ref``, ``version``, ``digest``, ``base``, ``evidence``, ``aliases``, ``signed``, ``warnings``."""
    sealed: bool = True
    """Whether all digests are known; before, ``version_digest`` is the draft's."""


class SealRequest(Request):
    digests: Annotated[dict[str, Sha256], Field(max_length=MAX_FILES)]
    """Path -> digest, of every file of the draft that had none."""


class PartWanted(Request):
    number: Annotated[int, Field(ge=1, le=10_000)]
    sha256: Sha256


class PartsRequest(Request):
    digest: Sha256
    parts: Annotated[list[PartWanted], Field(max_length=1000)] = Field(default_factory=list)


class PartsInfo(Answer):
    """Signed URLs for the wanted parts that have not arrived, and which have."""

    digest: Sha256
    part_size: int
    arrived: dict[int, Sha256 | None]
    """Part number -> its checksum, None where the store keeps none."""
    put: dict[int, SignedRequest]


# ── bases ────────────────────────────────────────────────────────────────────


class BaseRegistration(Request):
    table: str
    """base64 of the compressed tensor table."""
    wishes: Wishes = Wishes()
    location: Annotated[str, Field(max_length=500)] | None = None
    """``hf://org/name@<commit>``, or ``file://…`` under a configured root (embedded mode)."""


class BaseInfo(Answer):
    digest: BaseDigest
    weights_digest: str
    arch_digest: str
    arch_kind: str
    model_type: str
    parameters: int
    weights: Literal["absent", "parts", "full"]
    revisions: list[str]
    """``llama@r2`` …, oldest first."""
    names: list[str]
    location: str | None
    vocabulary_digest: str | None
    template_digest: str | None
    manifest: Sha256 | None
    size: int | None
    created_at: datetime


class DiffInfo(Answer):
    """Difference of two bases by tensor."""

    a: BaseDigest
    b: BaseDigest
    equal: int
    changed: list[str]
    added: list[str]
    removed: list[str]
    reshaped: list[str]
    arch: dict[str, list[Any]]
    """field -> [in a, in b]"""
    vocabulary_changed: bool
    template_changed: bool
    derivation: dict[str, Any] | None
    drift: float | None
    """Median relative drift of changed tensors, None: not measured."""


class RevisionRequest(Request):
    revision: Annotated[int, Field(ge=1, le=999_999_999)]
    """The earlier one whose base the line goes back to."""


class DerivationRequest(Request):
    parent: str
    kind: Literal["cast", "quantised", "merged", "continued"]
    detail: dict[str, Any] = Field(default_factory=dict)


class DerivationInfo(Answer):
    child: BaseDigest
    parent: BaseDigest
    kind: str
    evidence: str
    detail: dict[str, Any]


# ── adapters ─────────────────────────────────────────────────────────────────


class FitInfo(Answer):
    fit: str
    reasons: list[dict[str, Any]]
    vocabulary_changed: bool = False
    drift: float | None = None


class EvaluationInfo(Answer):
    base: BaseDigest
    version: str | None
    """``team/bot@v7``, None: the bare base."""
    suite: str
    summary: dict[str, dict[str, dict[str, float]]]
    """metric -> split -> {mean, n}"""
    records: Sha256
    job: str
    created_at: datetime


class AliasInfo(Answer):
    alias: str
    base: BaseDigest
    base_ref: str
    version: int
    digest: Sha256
    generation: int
    moved_at: datetime
    actor: str
    reason: str


class VersionInfo(Answer):
    ref: str
    version: int
    digest: Sha256
    base: BaseDigest
    base_ref: str
    """The newest ``line@rN`` of that base, else its short digest."""
    evidence: str
    binding: dict[str, Any]
    peft_type: str
    runnable: bool
    rank: int
    targets: list[str]
    engines: dict[str, str]
    """engine -> ``yes`` or the reason why not"""
    size: int
    message: str
    job: str | None
    created_by: str
    created_at: datetime
    status: str = "live"
    """live, yanked, quarantined or deleted (`registry.core.lifecycle.VersionState`)"""
    status_reason: str | None = None
    aliases: list[str] = Field(default_factory=list)
    evaluations: list[EvaluationInfo] = Field(default_factory=list)
    signed_by: list[str] = Field(default_factory=list)
    """Names of the living keys that signed it."""


class SignatureRequest(Request):
    bundle: dict[str, Any]
    """`registry.core.signatures`"""


class SignatureInfo(Answer):
    """A signature of a version; whether it counts follows from ``revoked_at``, and from whom one trusts."""

    key: Sha256
    """Fingerprint of the public key."""
    name: str
    """Whose key that is, as an admin of the namespace said."""
    public: str
    """PEM."""
    revoked_at: datetime | None
    bundle: dict[str, Any]
    created_by: str
    created_at: datetime


class SignaturesInfo(Answer):
    ref: str
    digest: Sha256
    required: bool
    """Whether the namespace gives only signed versions by alias."""
    signatures: list[SignatureInfo]


class KeyRequest(Request):
    public: Annotated[str, Field(max_length=4000)]
    """PEM of a public elliptic curve key: P-256, P-384 or P-521."""
    name: Annotated[str, Field(min_length=1, max_length=200)]


class RevokeRequest(Request):
    reason: Annotated[str, Field(max_length=2000)] = ""


class KeyInfo(Answer):
    """A public key whose signatures count in a namespace until it is revoked."""

    namespace: str
    fingerprint: Sha256
    name: str
    public: str
    created_by: str
    created_at: datetime
    revoked_at: datetime | None
    revoked_by: str | None
    revoked_reason: str | None
    follows: list[str] = Field(default_factory=list)
    """What follows from the revocation just made, in words."""


class SigningRequest(Request):
    required: bool


class SigningInfo(Answer):
    """Whether a namespace gives only signed versions by alias."""

    namespace: str
    required: bool
    follows: list[str] = Field(default_factory=list)
    """What follows from the change just made, in words."""


class StandingRequest(Request):
    reason: Annotated[str, Field(max_length=2000)] = ""
    force: bool = False
    """Go on although something refers to it; needs admin."""


class StandingInfo(Answer):
    """A version after its standing was changed, and what follows from that, in words."""

    version: VersionInfo
    follows: list[str]


class AdapterInfo(Answer):
    name: str
    task: str | None
    latest: VersionInfo | None
    aliases: list[AliasInfo]
    created_at: datetime


class CompatibleAdapter(Answer):
    version: VersionInfo
    fit: FitInfo


class AliasRequest(Request):
    version: str
    """``vN`` or a digest"""
    reason: Annotated[str, Field(max_length=2000)] = ""
    force: bool = False
    """Move a gated alias without a passing gate: needs the scope admin, and is on record."""


class RollbackRequest(Request):
    base: str | None = None
    """None: the current revision's base of the adapter's line."""
    reason: Annotated[str, Field(max_length=2000)] = ""


class PolicyInfo(Answer):
    name: str
    revision: int
    inherited: bool
    """True when it is the namespace's default."""
    policy: Policy
    created_by: str
    created_at: datetime
    notes: list[str] = Field(default_factory=list)
    """Such as the smallest suite that can pass."""


class LogEntry(Answer):
    at: datetime
    actor: str
    event: str
    detail: str
    facts: dict[str, Any]


class LogInfo(Answer):
    name: str
    entries: list[LogEntry]
    cursor: str | None = None


class Provenance(Answer):
    """How a version came to be, as far as it is known: what is not, is left out."""

    by: str
    """Who pushed it, or asked for the job: the name of the token."""
    job: str | None = None
    """The job whose worker made it; None: a person pushed it, and what its manifest says is their word."""
    kind: str | None = None
    """Of that job."""
    worker: str | None = None
    attempt: int | None = None
    recipe: Sha256 | None = None
    """Digest of the job's recipe."""
    device: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    """What the worker computed with: loractl, torch, transformers."""
    recorded: dict[str, str] = Field(default_factory=dict)
    """What training wrote into the file's own metadata, which a signature of the version covers."""
    datasets: list[Sha256] = Field(default_factory=list)
    """Of the manifest's lineage."""
    at: datetime


class LineageNode(Answer):
    digest: Sha256
    ref: str | None
    kind: str
    base: BaseDigest | None
    recipe: dict[str, Any] | None
    provenance: Provenance | None = None
    """Of versions of adapters."""


class LineageInfo(Answer):
    root: Sha256
    nodes: list[LineageNode]
    edges: list[tuple[Sha256, Sha256, str]]
    """(child, parent, relation)"""


class Download(Answer):
    path: str
    size: int
    digest: Sha256
    get: SignedRequest


class Resolution(Answer):
    """The one version for that base, with its files."""

    version: VersionInfo
    fit: FitInfo
    base: BaseDigest
    base_assumed: bool
    """True when no base was given and the current revision of the adapter's line was meant."""
    manifest: Sha256
    files: list[Download]
    signature_required: bool = False
    """Whether the namespace gives only signed versions by alias; who named this very version gets it all the same."""


class DownloadRequest(Request):
    """Files of versions by manifest digest: an adapter's, a base's, a dataset's."""

    manifests: Annotated[list[Sha256], Field(min_length=1, max_length=100)]


class DownloadInfo(Answer):
    files: dict[Sha256, list[Download]]


class DatasetInfo(Answer):
    name: str
    kind: Literal["dataset", "suite"]
    version: int
    digest: Sha256
    rows: int
    gate_rows: int
    spec: dict[str, Any]
    size: int
    created_by: str
    created_at: datetime


# ── jobs ─────────────────────────────────────────────────────────────────────


class Output(Request):
    """Where results of a job go."""

    adapter: str | None = None
    aliases: list[str] = Field(default_factory=list)
    line: str | None = None
    message: str = ""
    task: str | None = None


class JobRequest(Request):
    """Work asked for in people's words: references are resolved to digests when it is planned."""

    recipe: dict[str, Any]
    """A recipe of `registry.core.recipes` in which references may stand for digests."""
    output: Output = Output()
    queue: str = "cpu"
    fresh: bool = False
    """Do not reuse an equal succeeded job."""
    namespace: str | None = None
    """Who the work belongs to; None: the output adapter's or first input's."""


class JobInfo(Answer):
    id: str
    kind: str
    queue: str
    state: str
    namespace: str
    recipe: dict[str, Any]
    output: dict[str, Any]
    attempt: int
    max_attempts: int
    worker: str | None
    lease_until: datetime | None
    cancel_requested: bool
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    campaign: str | None
    origin: str | None = None
    """The request, or the schedule, that asked for it: as the registry's log has it."""
    held_by: str | None = None
    """A paused campaign, until which is resumed nobody claims it."""
    names: dict[str, str] = Field(default_factory=dict)
    """Of one job that is asked for: what people call the digests in its recipe, as far as the caller may read them."""
    reused: bool = False
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class EventInfo(Answer):
    id: int
    attempt: int
    kind: str
    data: dict[str, Any]
    at: datetime


class ClaimRequest(Request):
    queue: str
    worker: Annotated[str, Field(min_length=1, max_length=200)]
    capabilities: dict[str, Any] = Field(default_factory=dict)
    """device, memory, version of loractl"""
    cached: Annotated[list[Sha256], Field(max_length=1000)] = Field(default_factory=list)
    """Manifests that the worker has on its disk: jobs on bases among them are preferred."""
    group: Annotated[int, Field(ge=1, le=64)] = 1
    """How many jobs at most: beside the first come trainings of its kind that can share its base once it is loaded."""


class ClaimInfo(Answer):
    """A claimed job, or nothing."""

    job: JobInfo | None
    lease_s: float = 0
    inputs: dict[str, Sha256] = Field(default_factory=dict)
    """role -> manifest digest of what must be fetched, as `recipes.inputs_of` names the roles"""
    traceparent: str | None = None
    """Where the job was asked for in a trace (W3C)."""
    specs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """role -> the spec of a suite, which belongs beside its rows"""
    called: dict[str, str] = Field(default_factory=dict)
    """role -> what people call a dataset or suite, `team/reviews@v3`, where who asked for the job may read it"""
    others: list["ClaimInfo"] = Field(default_factory=list)
    """Jobs that share the first one's base, each with an attempt and a lease of its own."""


class HeartbeatRequest(Request):
    attempt: int
    progress: dict[str, Any] | None = None
    events: Annotated[list[dict[str, Any]], Field(max_length=1000)] = Field(default_factory=list)


class HeartbeatInfo(Answer):
    cancel: bool
    lease_until: datetime


class JobPushRequest(Request):
    """A worker's output: an adapter or a base."""

    attempt: int
    push: PushRequest


class CheckpointRequest(Request):
    """A checkpoint of an attempt, as the files of a folder."""

    attempt: int
    step: Annotated[int, Field(ge=1, lt=1 << 62)]
    """Steps that its runs have made together: how far the job is."""
    files: Annotated[list[FileEntry], Field(min_length=1, max_length=1000)]


class CheckpointUploads(Answer):
    put: dict[Sha256, SignedRequest]
    """By digest, for what storage does not hold yet of this attempt."""


class CheckpointsRequest(Request):
    """Checkpoints of one moment, of jobs that are trained together."""

    checkpoints: Annotated[dict[str, CheckpointRequest], Field(min_length=1, max_length=64)]
    """By job."""


class CheckpointInfo(Answer):
    """The newest checkpoint of a job in storage; without files there is none."""

    attempt: int = 0
    step: int = 0
    files: list[Download] = Field(default_factory=list)


class ScoredInfo(Request):
    """What an evaluation found about one adapter, or about the bare base."""

    adapter: Sha256 | None
    records: str
    """The records' JSONL."""
    harness: Sha256
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class AnsweredInfo(Request):
    """What one version, or the bare base, answered to a pool's inputs."""

    adapter: Sha256 | None
    answers: str
    """The answers' JSONL (`registry.core.pool.Answered`)."""
    harness: Sha256


class FinishRequest(Request):
    attempt: int
    result: dict[str, Any]
    pushes: list[str] = Field(default_factory=list)
    """Verified pushes to commit in the transaction that ends the job."""
    evaluations: list[ScoredInfo] = Field(default_factory=list)
    answers: list[AnsweredInfo] = Field(default_factory=list)


class FailRequest(Request):
    attempt: int
    problem: dict[str, Any]
    retryable: bool
    cancelled: bool = False


# ── upgrades and schedules ───────────────────────────────────────────────────


class UpgradeRequest(Request):
    line: str
    to: str
    """A base reference: the new weights."""
    old: str | None = None
    """None: the revision before it in the line."""
    namespaces: list[str] | None = None
    queue: str = "cpu"
    parallel: Annotated[int, Field(ge=1)] | None = None
    """How many adapters are worked on at once; None: all."""
    budget_seconds: Annotated[float, Field(gt=0)] | None = None
    """Device seconds of all its jobs together, after which no further tier is begun."""
    deadline: AwareDatetime | None = None
    """What is not final by then is frozen."""


class PoolInfo(Answer):
    """The pool of an adapter in an upgrade: whether it is asked, and what of it is labelled."""

    name: str
    missing: str
    """Why it cannot be asked."""
    tier: str | None
    """Whose candidate it decides on; None: none yet."""
    n: int | None
    """Inputs that were answered."""
    differ: int | None
    """Those of them that need a label."""
    waits: bool
    """Whether labels are what is waited for."""
    labelled_by: str
    verdict: dict[str, Any] | None


class CampaignItemInfo(Answer):
    adapter: str
    alias: str
    serving: str
    state: str
    tier: str | None
    fit: str
    final: str | None
    reason: str
    plan: dict[str, Any]
    """route, what is missing with the command that supplies it, smallest n"""
    scores: dict[str, Any]
    """metric, and mean per: serving_old, bare_old, bare_new, each tier that was tried, final"""
    cost: dict[str, Any]
    """tier -> {steps, seconds}; and of the retraining, measured or estimated"""
    verdicts: dict[str, Any]
    report: list[dict[str, Any]]
    """Once promoted, per gate: before, after and bare on the report split, the difference's bounds, n"""
    pool: PoolInfo | None = None
    """None: the policy names none."""


class CampaignInfo(Answer):
    id: str
    line: str
    old: BaseDigest
    new: BaseDigest
    old_ref: str
    new_ref: str
    state: str
    """planned, running, paused, finished or aborted"""
    reason: str
    parallel: int | None
    budget_seconds: float | None
    spent_seconds: float
    """Device seconds of its jobs so far."""
    deadline: datetime | None
    items: list[CampaignItemInfo]
    created_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class ApproveRequest(Request):
    adapter: str
    alias: str = "prod"
    approved: bool = True
    """False: the old base keeps serving."""


class DisagreementsInfo(Answer):
    """Inputs on which the candidate and what serves differ, as a file to be labelled."""

    adapter: str
    alias: str
    n: int
    differ: int
    paper: Sha256
    lines: str
    """JSONL: item, the input, the answers by letter, and ``right`` to be filled in."""


class LabelsRequest(Request):
    adapter: str
    alias: str = "prod"
    lines: Annotated[str, Field(max_length=32 << 20)]
    """The file of `DisagreementsInfo` with ``right`` filled in."""


class PauseRequest(Request):
    running: bool = False
    """Whether jobs that run are stopped too, to go on from their checkpoints."""


class UndoRequest(Request):
    adapter: str | None = None
    """None: everything that the campaign promoted; one that still runs is ended first."""
    alias: str = "prod"
    reason: Annotated[str, Field(max_length=2000)] = ""


class DecisionInfo(Answer):
    """A row of the ledger (`registry.core.ledger`)."""

    id: int
    campaign: str
    adapter: str | None
    alias: str | None
    kind: str
    tier: str | None
    data: dict[str, Any]
    actor: str | None
    at: datetime


class QuotaRequest(Request):
    """Both bounds of a namespace; None takes one away."""

    quota_bytes: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    keep_days: Annotated[int, Field(ge=1, le=36_500)] | None = None
    """Versions that nothing refers to are deleted when they are older, but for the newest on each base."""


class QuotaInfo(Answer):
    namespace: str
    used: int
    """Bytes, each blob counted once, open pushes included."""
    quota_bytes: int | None
    keep_days: int | None


class FsckRequest(Request):
    deep: bool = False
    """Read every byte."""
    repair: bool = False


class FsckLine(Answer):
    """A line of the answer of fsck (NDJSON): progress, a finding, or the refusal that ended it."""

    kind: Literal["progress", "finding", "error"] = "progress"
    what: str = ""
    done: int = 0
    total: int = 0
    """0: not known."""
    bytes: int = 0
    """Read so far of the blob at hand."""
    blob: str | None = None
    problem: str | None = None
    """missing, wrong-size, corrupt, orphan, unknown, or bad-signature, whose ``blob`` is the version's digest"""
    detail: str = ""
    named_by: list[str] = Field(default_factory=list)
    repaired: bool = False
    replica: str | None = None
    """What the replica had of it, where one was asked: healed, missing, damaged or down"""
    error: dict[str, Any] | None = None


class WebhookRequest(Request):
    url: Annotated[str, Field(min_length=1, max_length=2000)]
    namespace: str | None = None
    """None: everything; needs admin everywhere."""
    events: Annotated[list[Annotated[str, Field(min_length=1, max_length=40)]], Field(max_length=50)] = Field(
        default_factory=list
    )
    """Kinds of changes, or their beginnings: ``alias.``; none: all."""


class WebhookInfo(Answer):
    id: str
    namespace: str | None
    url: str
    events: list[str]
    cursor: int
    """The place in the audit up to which it was told."""
    attempts: int
    due_at: datetime
    last_error: str | None
    created_by: str
    created_at: datetime


class NewWebhook(WebhookInfo):
    secret: str
    """Shown this once."""


class AuditInfo(Answer):
    """One change of state: who did what to what, when, why, and how it was before and after."""

    id: int
    at: datetime
    actor: str
    name: str | None
    """What the actor's token is called."""
    namespace: str | None
    event: str
    subject: str
    reason: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    seq: int | None
    """Its place in the chain; None until the sequencer was there."""


class LinkedInfo(Answer):
    """A row of the audit as it is chained (`registry.core.audit`); ``before`` and ``after`` are canonical JSON."""

    seq: int
    link: str
    id: int
    at: datetime
    actor: str
    namespace: str | None
    event: str
    subject: str
    reason: str
    before: str | None
    after: str | None


class ChainInfo(Answer):
    """A stretch of the chain, and where the whole of it ends."""

    seq: int
    link: str
    waiting: int
    """Rows that have no place yet."""
    rows: list[LinkedInfo]


class ScheduleRequest(Request):
    namespace: str
    trigger: Literal["cron", "base-upgrade", "new-data"]
    subject: Annotated[str, Field(min_length=1, max_length=200)]
    """A cron expression (UTC), a line, or a dataset ``namespace/name``."""
    action: dict[str, Any]
    """``{"upgrade": {}}``, or ``{"job": JobRequest}`` (new-data: the datasets become the new version)."""


class ScheduleInfo(Answer):
    id: str
    namespace: str
    trigger: str
    subject: str
    action: dict[str, Any]
    enabled: bool
    next_at: datetime | None
    last: dict[str, Any] | None
    created_by: str
    created_at: datetime
