"""The registry as a Python object: one method a route, typed by `registry.schemas`.

A refusal comes back as the exception it was (`LoractlError.from_problem`), so a program catches
`GateNotPassed` and not a status code. Safe requests are tried again when a proxy, a restart or a broken
connection got in between, and every request when the registry turned it away at its door (asked too often,
overloaded), after the pause that it names; a registry that does not answer is `RegistryUnreachable`. The token
is sent to the registry and nowhere else: redirects are not followed, and signed URLs are used by another
connection (`registry.transfer`).
"""

import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from . import schemas as wire
from .core.errors import BadName, LoractlError, Overloaded, RegistryUnreachable, TokenRefused, UnknownProblem
from .core.lifecycle import JobState
from .core.manifest import Kind
from .core.names import Reference, SeriesName
from .core.policy import Policy

Answered = TypeVar("Answered", bound=BaseModel)
Item = TypeVar("Item", bound=BaseModel)

TRIES = 5
PAUSE_S = 0.1
"""Before the first repetition; doubled before each further one, and shortened by chance."""
ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
"""A job in one of these has nothing more to say."""
MOST_PATIENCE_S = 30.0
"""The longest pause that is made because the registry asks for it."""
_PASSING = {502, 503, 504}
_PLURAL = {"adapter": "adapters", "dataset": "datasets", "suite": "suites"}
_HEADER = re.compile("[!-~]+")
"""What a token can hold."""
_ALIASES = TypeAdapter(list[wire.AliasInfo])


def user_agent() -> str:
    """``loractl/<version>``."""
    return f"loractl/{metadata.version('loractl')}"


class RegistryClient:
    """A registry at ``url`` for whoever holds ``token``; safe to share between threads."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")) or not _host(url):
            raise BadName(value=url[:200], what="registry URL", rule="expected http://HOST:PORT or https://HOST")
        if token and not _HEADER.fullmatch(token := token.strip()):  # which an error of httpx would show
            raise TokenRefused(reason="it holds a blank, a line break or a letter that no token has")
        self.url = url.rstrip("/")
        self._sleep = sleep
        self._about: dict[str, str] = {}
        headers = {"user-agent": user_agent(), "accept": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(base_url=self.url, headers=headers, transport=transport, timeout=timeout_s)

    def on_behalf(self, about: Mapping[str, object]) -> Self:
        """This client, on the same connections, whose requests tell the registry's log what they are for.

        ``about``: ids under the names of `schemas.ABOUT`.
        """
        mine = copy.copy(self)
        mine._about = {"baggage": told} if (told := wire.baggage(about)) else {}
        return mine

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ── about the registry, access ───────────────────────────────────────────

    def health(self) -> wire.Health:
        """Whether the registry answers; needs no token."""
        return self._get("/health", wire.Health)

    def sign_in_offer(self) -> wire.SignInOffer:
        """How people may sign in; needs no token."""
        return self._get("/v1/sign-in", wire.SignInOffer)

    def whoami(self) -> wire.WhoAmI:
        """Whose token this is."""
        return self._get("/v1/whoami", wire.WhoAmI)

    def doctor(self) -> wire.DoctorReport:
        """What the registry finds when it looks at itself."""
        return self._get("/v1/doctor", wire.DoctorReport)

    def create_token(self, request: wire.TokenRequest) -> wire.NewToken:
        """A new token, shown this once."""
        return self._post("/v1/tokens", wire.NewToken, request)

    def tokens(self, *, prefix: str | None = None) -> wire.Page[wire.TokenInfo]:
        """Tokens that the caller may see; with ``prefix`` those whose text begins so."""
        return self._get("/v1/tokens", wire.Page[wire.TokenInfo], prefix=prefix)

    def rotate_token(self, token_id: str, request: wire.RotateRequest) -> wire.NewToken:
        """A new secret, shown this once; the old one stays good for a grace."""
        return self._post(_path("tokens", token_id, "rotate"), wire.NewToken, request)

    def revoke_token(self, token_id: str) -> None:
        """End a token's life."""
        self._send("DELETE", _path("tokens", token_id))

    # ── pushes and downloads ─────────────────────────────────────────────────

    def open_push(self, kind: Kind, name: str | None, request: wire.PushRequest) -> wire.PushInfo:
        """A new push, the caller's own open one of this manifest, or the version that exists already."""
        return self._post(
            "/v1/bases/pushes" if name is None else _series(kind, name, "pushes"), wire.PushInfo, request, again=True
        )

    def parts(self, push_id: str, request: wire.PartsRequest) -> wire.PartsInfo:
        """Signed URLs for parts, and which have arrived."""
        return self._post(_path("pushes", push_id, "parts"), wire.PartsInfo, request, again=True)

    def seal(self, push_id: str, request: wire.SealRequest) -> wire.PushInfo:
        """Tell the digests that the draft of a push lacked; the committed push when its version is there by now."""
        return self._post(_path("pushes", push_id, "seal"), wire.PushInfo, request, again=True)

    def push(self, push_id: str) -> wire.PushInfo:
        """State of a push, with fresh URLs."""
        return self._get(_path("pushes", push_id), wire.PushInfo)

    def commit(self, push_id: str) -> wire.PushInfo:
        """Verify and commit; state ``verifying`` means: ask again."""
        return self._post(_path("pushes", push_id, "commit"), wire.PushInfo, again=True)

    def abort_push(self, push_id: str) -> None:
        """Give up a push."""
        self._send("DELETE", _path("pushes", push_id))

    def downloads(self, manifests: Iterable[str]) -> wire.DownloadInfo:
        """Signed GETs of all files of versions, by manifest digest."""
        body = wire.DownloadRequest(manifests=list(manifests))
        return self._post("/v1/downloads", wire.DownloadInfo, body, again=True)

    # ── bases ────────────────────────────────────────────────────────────────

    def register_base(self, request: wire.BaseRegistration) -> wire.BaseInfo:
        """A base by its tensor table, without weights."""
        return self._post("/v1/bases", wire.BaseInfo, request, again=True)

    def repeat_revision(self, line: str, request: wire.RevisionRequest) -> wire.BaseInfo:
        """Make an earlier revision's base the newest of ``line`` again."""
        return self._post(_path("lines", line, "revisions"), wire.BaseInfo, request, again=True)

    def bases(self, *, line: str | None = None, cursor: str | None = None) -> wire.Page[wire.BaseInfo]:
        """Bases, newest first."""
        return self._get("/v1/bases", wire.Page[wire.BaseInfo], line=line, cursor=cursor)

    def base(self, ref: str) -> wire.BaseInfo:
        """A base by ``line``, ``line@rN`` or digest."""
        return self._get(_path("bases", ref), wire.BaseInfo)

    def base_table(self, ref: str) -> bytes:
        """Its compressed tensor table, for `registry.core.base_model.BaseModel.from_compressed`."""
        return self._send("GET", _path("bases", ref, "table")).content

    def diff_bases(self, a: str, b: str) -> wire.DiffInfo:
        """Difference of two bases by tensor."""
        return self._get(_path("bases", a, "diff", b), wire.DiffInfo)

    def compatible(self, base: str, **filters: Any) -> wire.Page[wire.CompatibleAdapter]:
        """Adapters that fit; filters: fit, engine, alias, max_rank, evidence, namespace, task, limit, cursor."""
        return self._get(_path("bases", base, "adapters"), wire.Page[wire.CompatibleAdapter], **filters)

    def declare_derivation(self, base: str, request: wire.DerivationRequest) -> wire.DerivationInfo:
        """Say how ``base`` came from another."""
        return self._post(_path("bases", base, "derivations"), wire.DerivationInfo, request)

    # ── adapters ─────────────────────────────────────────────────────────────

    def adapters(self, **filters: Any) -> wire.Page[wire.AdapterInfo]:
        """Adapters; filters: namespace, q, task, limit, cursor."""
        return self._get("/v1/adapters", wire.Page[wire.AdapterInfo], **filters)

    def adapter(self, name: str) -> wire.AdapterInfo:
        """One adapter with its newest version and aliases."""
        return self._get(_series("adapter", name), wire.AdapterInfo)

    def versions(self, name: str, **filters: Any) -> wire.Page[wire.VersionInfo]:
        """Versions, newest first; filters: limit, cursor."""
        return self._get(_series("adapter", name, "versions"), wire.Page[wire.VersionInfo], **filters)

    def version(self, name: str, version: str) -> wire.VersionInfo:
        """One version: ``v7`` or ``sha256:…``."""
        return self._get(_series("adapter", name, "versions", version), wire.VersionInfo)

    def change_standing(self, name: str, version: str, move: str, request: wire.StandingRequest) -> wire.StandingInfo:
        """``yank``, ``quarantine``, ``reinstate`` or ``delete`` a version."""
        return self._post(_series("adapter", name, "versions", version, move), wire.StandingInfo, request, again=True)

    def signatures(self, name: str, version: str) -> wire.SignaturesInfo:
        """Every signature of a version, those by revoked keys too."""
        return self._get(_series("adapter", name, "versions", version, "signatures"), wire.SignaturesInfo)

    def sign(self, name: str, version: str, request: wire.SignatureRequest) -> wire.SignatureInfo:
        """Add a signature to a version; one of each key is kept, the first."""
        path = _series("adapter", name, "versions", version, "signatures")
        return self._post(path, wire.SignatureInfo, request, again=True)

    def manifest(self, name: str, version: str) -> bytes:
        """The canonical bytes of a version's manifest."""
        return self._send("GET", _series("adapter", name, "versions", version, "manifest")).content

    def log(self, name: str, *, limit: int | None = None, cursor: str | None = None) -> wire.LogInfo:
        """What happened to an adapter, newest first; goes on behind ``cursor``."""
        return self._get(_series("adapter", name, "log"), wire.LogInfo, limit=limit, cursor=cursor)

    def lineage(self, name: str, version: str | None = None) -> wire.LineageInfo:
        """Where versions came from and what was made of them; of one version, or of the newest."""
        return self._get(_series("adapter", name, "lineage"), wire.LineageInfo, version=version)

    def evaluations(self, name: str, **filters: Any) -> wire.Page[wire.EvaluationInfo]:
        """Evaluations of an adapter's versions, oldest first; filters: limit, cursor."""
        return self._get(_series("adapter", name, "evaluations"), wire.Page[wire.EvaluationInfo], **filters)

    def aliases(self, name: str) -> list[wire.AliasInfo]:
        """The aliases of an adapter on every base."""
        return _ALIASES.validate_json(self._send("GET", _series("adapter", name, "aliases")).content)

    def move_alias(
        self, name: str, alias: str, request: wire.AliasRequest, *, generation: int | None = None
    ) -> wire.AliasInfo:
        """Point an alias at a version, if it still has ``generation`` (0: does not exist; None: whatever it is)."""
        headers = {} if generation is None else {"if-match": str(generation)}
        reply = self._send("PUT", _series("adapter", name, "aliases", alias), body=request, headers=headers)
        return wire.AliasInfo.model_validate_json(reply.content)

    def roll_back(self, name: str, alias: str, request: wire.RollbackRequest) -> wire.AliasInfo:
        """Point an alias at what it pointed at before."""
        return self._post(_series("adapter", name, "aliases", alias, "rollback"), wire.AliasInfo, request)

    def policy(self, name: str) -> wire.PolicyInfo:
        """The policy of an adapter ``team/bot``, or the default of a namespace ``team``."""
        return self._get(_policy_of(name), wire.PolicyInfo)

    def set_policy(self, name: str, policy: Policy) -> wire.PolicyInfo:
        """A new revision of a policy."""
        return wire.PolicyInfo.model_validate_json(self._send("PUT", _policy_of(name), body=policy).content)

    def resolve(
        self, ref: str, *, base: str | None = None, engine: str | None = None, fit: str | None = None
    ) -> wire.Resolution:
        """The one version that ``ref`` means for ``base``, with signed files."""
        return self._get("/v1/resolve", wire.Resolution, ref=ref, base=base, engine=engine, fit=fit)

    # ── datasets and suites ──────────────────────────────────────────────────

    def datasets(self, kind: Literal["dataset", "suite"], **filters: Any) -> wire.Page[wire.DatasetInfo]:
        """Datasets or suites, the newest version of each; filters: limit, cursor."""
        return self._get(f"/v1/{_PLURAL[kind]}", wire.Page[wire.DatasetInfo], **filters)

    def dataset(self, kind: Literal["dataset", "suite"], name: str) -> wire.DatasetInfo:
        """One version of a dataset or suite: ``team/reviews`` (its newest), or with ``@vN`` or a digest."""
        series, _, version = str(Reference.parse(name, kind)).partition("@")
        namespace, _, own = series.partition("/")
        return self._get(_path(_PLURAL[kind], namespace, f"{own}@{version}" if version else own), wire.DatasetInfo)

    # ── jobs ─────────────────────────────────────────────────────────────────

    def submit(self, request: wire.JobRequest) -> wire.JobInfo:
        """Ask for work; an equal job that exists already is given back."""
        return self._post("/v1/jobs", wire.JobInfo, request)

    def jobs(self, **filters: Any) -> wire.Page[wire.JobInfo]:
        """Jobs, newest first; filters: state, campaign, limit, cursor."""
        return self._get("/v1/jobs", wire.Page[wire.JobInfo], **filters)

    def job(self, job_id: str) -> wire.JobInfo:
        """One job."""
        return self._get(_path("jobs", job_id), wire.JobInfo)

    def cancel_job(self, job_id: str) -> wire.JobInfo:
        """End a job that has not ended."""
        return self._post(_path("jobs", job_id, "cancel"), wire.JobInfo)

    def retry_job(self, job_id: str) -> wire.JobInfo:
        """Queue a failed or cancelled job again."""
        return self._post(_path("jobs", job_id, "retry"), wire.JobInfo)

    def events(self, job_id: str, *, after: int = 0, follow: bool = True) -> Iterator[wire.EventInfo]:
        """Everything that happens to a job from event ``after`` on, as it happens, until it has ended.

        Without ``follow`` only what has happened so far.

        Server-sent events; a stream that breaks is taken up again behind the last event (Last-Event-ID).
        """
        quiet = 0
        while True:
            try:
                for event in self._stream(job_id, after, follow):
                    if event is None:
                        return
                    after, quiet = event.id, 0
                    yield event
            except httpx.TransportError:
                pass  # the next request says whether the registry is there at all
            self.job(job_id)
            self._sleep(PAUSE_S * 2**quiet)
            quiet = min(quiet + 1, 4)

    def _stream(self, job_id: str, after: int, follow: bool) -> Iterator[wire.EventInfo | None]:
        """Events of one connection; None as the last one when the job has ended."""
        headers = {"accept": "text/event-stream", "last-event-id": str(after), "x-request-id": uuid4().hex}
        params = {"follow": str(follow).lower()}
        with self._http.stream("GET", _path("jobs", job_id, "events"), headers=headers, params=params) as reply:
            if reply.is_error:
                reply.read()
                if reply.status_code in _PASSING:
                    return
                raise self._refusal(reply)
            for message in _messages(reply.iter_lines()):
                if message["event"] == "end":
                    yield None
                    return
                yield wire.EventInfo.model_validate({**json.loads(message["data"]), "id": int(message["id"])})

    # ── a worker's side of jobs ──────────────────────────────────────────────

    def claim(self, request: wire.ClaimRequest) -> wire.ClaimInfo:
        """A job of a queue, with a lease; or none."""
        return self._post("/v1/jobs/claim", wire.ClaimInfo, request)

    def heartbeat(self, job_id: str, request: wire.HeartbeatRequest) -> wire.HeartbeatInfo:
        """Keep the lease, report progress; says whether to cancel."""
        return self._post(_path("jobs", job_id, "heartbeat"), wire.HeartbeatInfo, request)

    def job_push(self, job_id: str, request: wire.JobPushRequest) -> wire.PushInfo:
        """Open a push of a job's output."""
        return self._post(_path("jobs", job_id, "pushes"), wire.PushInfo, request, again=True)

    def finish(self, job_id: str, request: wire.FinishRequest) -> wire.JobInfo:
        """End a job with its results, in one transaction; the same words again change nothing."""
        return self._post(_path("jobs", job_id, "finish"), wire.JobInfo, request, again=True)

    def fail(self, job_id: str, request: wire.FailRequest) -> wire.JobInfo:
        """End an attempt without results."""
        return self._post(_path("jobs", job_id, "fail"), wire.JobInfo, request)

    def job_inputs(self, job_id: str, attempt: int) -> wire.DownloadInfo:
        """Signed GETs of everything a claimed job needs, by manifest digest."""
        return self._get(_path("jobs", job_id, "inputs"), wire.DownloadInfo, attempt=attempt)

    def send_checkpoint(self, job_id: str, request: wire.CheckpointRequest) -> wire.CheckpointUploads:
        """Signed PUTs of a checkpoint's files that storage does not hold."""
        return self._post(_path("jobs", job_id, "checkpoint"), wire.CheckpointUploads, request, again=True)

    def record_checkpoints(self, request: wire.CheckpointsRequest) -> None:
        """Make what was sent the newest checkpoint of each job, all at once; the same words again change nothing."""
        self._send("POST", "/v1/jobs/checkpoints", body=request, again=True)

    def checkpoint(self, job_id: str, attempt: int) -> wire.CheckpointInfo:
        """The newest checkpoint of a claimed job in storage, with signed GETs."""
        return self._get(_path("jobs", job_id, "checkpoint"), wire.CheckpointInfo, attempt=attempt)

    # ── upgrades and schedules ───────────────────────────────────────────────

    def plan_upgrade(self, request: wire.UpgradeRequest) -> wire.CampaignInfo:
        """What an upgrade would do; nothing is changed."""
        return self._post("/v1/upgrades/plan", wire.CampaignInfo, request, again=True)

    def create_upgrade(self, request: wire.UpgradeRequest) -> wire.CampaignInfo:
        """A planned campaign."""
        return self._post("/v1/upgrades", wire.CampaignInfo, request)

    def upgrades(self, **filters: Any) -> wire.Page[wire.CampaignInfo]:
        """Campaigns, newest first; filters: line, limit."""
        return self._get("/v1/upgrades", wire.Page[wire.CampaignInfo], **filters)

    def upgrade(self, campaign_id: str) -> wire.CampaignInfo:
        """One campaign."""
        return self._get(_path("upgrades", campaign_id), wire.CampaignInfo)

    def start_upgrade(self, campaign_id: str) -> wire.CampaignInfo:
        """Let a planned campaign run."""
        return self._post(_path("upgrades", campaign_id, "start"), wire.CampaignInfo)

    def pause_upgrade(self, campaign_id: str, *, running: bool = False) -> wire.CampaignInfo:
        """Let nothing further begin; with ``running`` also stop the jobs that run."""
        request = wire.PauseRequest(running=running)
        return self._post(_path("upgrades", campaign_id, "pause"), wire.CampaignInfo, request)

    def resume_upgrade(self, campaign_id: str) -> wire.CampaignInfo:
        """Go on with a paused campaign."""
        return self._post(_path("upgrades", campaign_id, "resume"), wire.CampaignInfo)

    def roll_back_upgrade(self, campaign_id: str, request: wire.UndoRequest) -> wire.CampaignInfo:
        """Take promotions back: one adapter's, or all of the campaign."""
        return self._post(_path("upgrades", campaign_id, "rollback"), wire.CampaignInfo, request)

    def decisions(self, **filters: Any) -> wire.Page[wire.DecisionInfo]:
        """A page of the ledger; filters: campaign, line, adapter, limit, cursor."""
        return self._get("/v1/upgrades/ledger", wire.Page[wire.DecisionInfo], **filters)

    def abort_upgrade(self, campaign_id: str) -> wire.CampaignInfo:
        """End a campaign; what was promoted stays."""
        return self._post(_path("upgrades", campaign_id, "abort"), wire.CampaignInfo)

    def approve(self, campaign_id: str, request: wire.ApproveRequest) -> wire.CampaignInfo:
        """Promote an adapter whose policy asks first."""
        return self._post(_path("upgrades", campaign_id, "approve"), wire.CampaignInfo, request)

    def disagreements(self, campaign_id: str, adapter: str, alias: str = "prod") -> wire.DisagreementsInfo:
        """The pool's inputs on which an adapter's candidate and what serves differ, as a file to be labelled."""
        path = _path("upgrades", campaign_id, "disagreements")
        return self._get(path, wire.DisagreementsInfo, adapter=adapter, alias=alias)

    def label(self, campaign_id: str, request: wire.LabelsRequest) -> wire.CampaignInfo:
        """Give the labels of all these inputs; the same ones again change nothing."""
        return self._post(_path("upgrades", campaign_id, "labels"), wire.CampaignInfo, request, again=True)
    # ── webhooks ─────────────────────────────────────────────────────────────

    def add_webhook(self, request: wire.WebhookRequest) -> wire.NewWebhook:
        """A new webhook; its secret is shown this once."""
        return self._post("/v1/webhooks", wire.NewWebhook, request)

    def webhooks(self) -> wire.Page[wire.WebhookInfo]:
        """Webhooks that the caller administers."""
        return self._get("/v1/webhooks", wire.Page[wire.WebhookInfo])

    def remove_webhook(self, webhook_id: str) -> None:
        """Tell it nothing more."""
        self._send("DELETE", _path("webhooks", webhook_id))

    def test_webhook(self, webhook_id: str) -> wire.WebhookInfo:
        """Let it be told something now."""
        return self._post(_path("webhooks", webhook_id, "test"), wire.WebhookInfo, again=True)

    # ── upkeep ───────────────────────────────────────────────────────────────

    def quota(self, namespace: str) -> wire.QuotaInfo:
        """What a namespace holds and may hold."""
        return self._get(_path("namespaces", namespace, "quota"), wire.QuotaInfo)

    def set_quota(self, namespace: str, request: wire.QuotaRequest) -> wire.QuotaInfo:
        """Set both bounds of a namespace."""
        return _parsed(wire.QuotaInfo, self._send("PUT", _path("namespaces", namespace, "quota"), body=request))

    def keys(self, namespace: str) -> wire.Page[wire.KeyInfo]:
        """Keys whose signatures count in a namespace, and those that were revoked."""
        return self._get(_path("namespaces", namespace, "keys"), wire.Page[wire.KeyInfo])

    def add_key(self, namespace: str, request: wire.KeyRequest) -> wire.KeyInfo:
        """Let signatures by a public key count in a namespace."""
        return self._post(_path("namespaces", namespace, "keys"), wire.KeyInfo, request, again=True)

    def revoke_key(self, namespace: str, fingerprint: str, request: wire.RevokeRequest) -> wire.KeyInfo:
        """Let nothing count that a key signed, for good."""
        path = _path("namespaces", namespace, "keys", fingerprint, "revoke")
        return self._post(path, wire.KeyInfo, request, again=True)

    def signing(self, namespace: str) -> wire.SigningInfo:
        """Whether a namespace requires signatures."""
        return self._get(_path("namespaces", namespace, "signing"), wire.SigningInfo)

    def set_signing(self, namespace: str, request: wire.SigningRequest) -> wire.SigningInfo:
        """Require signatures in a namespace, or no more."""
        return _parsed(wire.SigningInfo, self._send("PUT", _path("namespaces", namespace, "signing"), body=request))

    def fsck(self, request: wire.FsckRequest) -> Iterator[wire.FsckLine]:
        """Compare bucket and rows: lines as they are found. The refusal that ended it is raised."""
        wait = httpx.Timeout(60, read=None)
        body = request.model_dump()
        try:
            with self._http.stream("POST", "/v1/fsck", json=body, timeout=wait) as reply:
                if not reply.is_success:
                    reply.read()
                    raise self._refusal(reply)
                for text in reply.iter_lines():
                    line = wire.FsckLine.model_validate_json(text)
                    if line.error is not None:
                        raise LoractlError.from_problem(line.error)
                    yield line
        except httpx.TransportError as error:
            raise RegistryUnreachable(url=self.url, reason=_why(error)) from error

    # ── audit ────────────────────────────────────────────────────────────────

    def audit(self, **filters: Any) -> wire.Page[wire.AuditInfo]:
        """Changes of state, newest first."""
        return self._get("/v1/audit", wire.Page[wire.AuditInfo], **filters)

    def audit_chain(self, after: int) -> wire.ChainInfo:
        """Links of the audit's chain behind place ``after``, as they are stored, and where it ends."""
        return self._get("/v1/audit/chain", wire.ChainInfo, after=after)

    # ── schedules ────────────────────────────────────────────────────────────

    def create_schedule(self, request: wire.ScheduleRequest) -> wire.ScheduleInfo:
        """A new schedule."""
        return self._post("/v1/schedules", wire.ScheduleInfo, request)

    def schedules(self) -> wire.Page[wire.ScheduleInfo]:
        """Schedules that the caller may see."""
        return self._get("/v1/schedules", wire.Page[wire.ScheduleInfo])

    def delete_schedule(self, schedule_id: str) -> None:
        """Remove a schedule."""
        self._send("DELETE", _path("schedules", schedule_id))

    # ── requests ─────────────────────────────────────────────────────────────

    def _get(self, path: str, answer: type[Answered], **params: Any) -> Answered:
        return _parsed(answer, self._send("GET", path, params=params))

    def _post(
        self, path: str, answer: type[Answered], body: BaseModel | None = None, *, again: bool = False
    ) -> Answered:
        return _parsed(answer, self._send("POST", path, body=body, again=again))

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        again: bool = False,
    ) -> httpx.Response:
        """One request, repeated while that is safe (``again``, or a GET) and might help."""
        sent = {"x-request-id": uuid4().hex, **self._about, **(headers or {})}
        content = None
        if body is not None:
            sent["content-type"] = "application/json"
            content = body.model_dump_json(by_alias=True)
        query = {
            key: ",".join(value) if isinstance(value, list | tuple) else value
            for key, value in (params or {}).items()
            if value is not None
        }
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                reply = self._http.request(method, path, content=content, params=query, headers=sent)
            except httpx.TransportError as error:
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
                if last or not (unsent or again or method == "GET"):
                    raise RegistryUnreachable(url=self.url, reason=_why(error)) from error
            else:
                if reply.is_success:
                    return reply
                turned_away = reply.status_code == 429 or isinstance(self._refusal(reply), Overloaded)
                passing = reply.status_code in _PASSING and (again or method == "GET")
                if last or not (turned_away or passing):
                    raise self._refusal(reply)
                asked = reply.headers.get("retry-after", "") if turned_away else ""
                if asked.isdigit():
                    if int(asked) > MOST_PATIENCE_S:
                        raise self._refusal(reply)
                    self._sleep(int(asked) + random.random() / 2)
                    continue
            self._sleep(PAUSE_S * 2**attempt * (0.5 + random.random() / 2))
        raise AssertionError("the last attempt returns or raises")

    def _refusal(self, reply: httpx.Response) -> LoractlError:
        try:
            problem = json.loads(reply.content)
        except ValueError:
            problem = None
        if isinstance(problem, dict) and "code" in problem:
            return LoractlError.from_problem(problem)
        if reply.status_code in _PASSING:
            return RegistryUnreachable(url=self.url, reason=f"HTTP {reply.status_code} {reply.reason_phrase}")
        return _not_ours(reply)


def every(page_after: Callable[[str | None], wire.Page[Item]]) -> Iterator[Item]:
    """All items of all pages: ``every(lambda cursor: client.adapters(cursor=cursor))``."""
    cursor = None
    while True:
        page = page_after(cursor)
        yield from page.items
        cursor = page.cursor
        if cursor is None:
            return


def _parsed(answer: type[Answered], reply: httpx.Response) -> Answered:
    try:
        return answer.model_validate_json(reply.content)
    except ValidationError as error:
        raise _not_ours(reply) from error


def _not_ours(reply: httpx.Response) -> UnknownProblem:
    return UnknownProblem(
        problem=f"HTTP {reply.status_code}",
        detail=f"{reply.reason_phrase or 'no reason given'}, and not as a loractl registry says it",
        advice=f"Is {reply.request.url.copy_with(raw_path=b'/')} the address of a registry? loractl login URL",
    )


def _messages(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Each server-sent event as its fields ``id``, ``event`` and ``data``; comments (keep-alives) are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "data" in fields:
            yield {"id": "0", "event": "message", **fields}
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def _host(url: str) -> str:
    """The host of a URL; nothing where it is none."""
    try:
        return httpx.URL(url).host
    except httpx.InvalidURL:
        return ""


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="@:") for part in parts)


def _series(kind: Kind, name: str, *rest: str) -> str:
    series = SeriesName.parse(name, kind)
    return _path(_PLURAL[kind], series.namespace, series.name, *rest)


def _policy_of(name: str) -> str:
    return _series("adapter", name, "policy") if "/" in name else _path("namespaces", name, "policy")


def _why(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
