"""Every refusal loractl can make: one class = one code.

    LoractlError
    ├── Invalid           the request or the file is wrong           (HTTP 400/422, exit 1)
    │   ├── Usage         what was typed cannot be parsed            (exit 2)
    │   ├── BadFile       an artefact's bytes are not acceptable
    │   └── DoesNotFit    the adapter does not belong to that base
    ├── Unauthenticated   no token, or not a living one              (401)
    ├── Forbidden         the token's scopes do not cover it         (403)
    ├── NotFound          nothing there that the caller may see      (404)
    ├── Conflict          somebody, or an earlier call, was first    (409/412)
    │   └── GateNotPassed                                            (422, exit 4)
    ├── Gone              it was there, and has ended                (410)
    ├── TooLarge          over a stated bound                        (413)
    ├── Unavailable       a part we need is down or full             (503/507, exit 3)
    │   └── Limited       somebody asked too often                   (429)
    └── LocalFailure      this machine's own disk, process or files  (exit 1)

A class states its sentence once: ``says`` (what happened, with which value, what is allowed) and
``help`` (the command that helps) are format strings over its facts. Facts are keyword arguments,
become attributes, and travel as JSON, so that a client can rebuild the same exception
(`LoractlError.from_problem`). The status of each branch is decided in one table,
`registry/api/problems.py`; the exit status in `cli/main.py`.
"""

import errno
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any, ClassVar

Fact = Any  # a JSON value


class LoractlError(Exception):
    """A refusal with a code, its facts, a sentence and the command that helps."""

    code: ClassVar[str] = ""
    says: ClassVar[str] = ""
    help: ClassVar[str] = ""
    by_code: ClassVar[dict[str, type["LoractlError"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in cls.__dict__:
            return  # a branch, not a refusal
        if cls.code in LoractlError.by_code:
            raise TypeError(f"two refusals share the code {cls.code!r}")
        LoractlError.by_code[cls.code] = cls

    def __init__(self, **facts: Fact) -> None:
        missing = self.fact_names() - facts.keys()
        if missing:
            raise TypeError(f"{type(self).__name__} needs the facts {sorted(missing)}")
        self.facts: dict[str, Fact] = facts
        self.message = self.says.format(**facts)
        self.hint = self.help.format(**facts)
        super().__init__(self.message)

    def __getattr__(self, name: str) -> Fact:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.facts))

    @classmethod
    def fact_names(cls) -> set[str]:
        """Names the sentence and its hint need; more may be given."""
        fields = (field for text in (cls.says, cls.help) for _, field, _, _ in Formatter().parse(text))
        return {field.split(".")[0].split("[")[0] for field in fields if field}

    def problem(self) -> dict[str, Fact]:
        """The body of an ``application/problem+json`` answer, without its status."""
        return {"code": self.code, "detail": self.message, "hint": self.hint, "facts": self.facts}

    @staticmethod
    def from_problem(problem: dict[str, Fact]) -> "LoractlError":
        """The exception that ``problem`` was made from; `UnknownProblem` for a code of a newer registry."""
        found = LoractlError.by_code.get(str(problem.get("code")))
        facts = problem.get("facts") or {}
        if found is None or not isinstance(facts, dict) or found.fact_names() - facts.keys():
            return UnknownProblem(
                problem=str(problem.get("code")), detail=str(problem.get("detail")), advice=str(problem.get("hint", ""))
            )
        return found(**facts)


def _rebuild(cls: type[LoractlError], facts: dict[str, Fact]) -> LoractlError:
    return cls(**facts)


class Invalid(LoractlError): ...


class Usage(Invalid): ...


class BadFile(Invalid): ...


class DoesNotFit(Invalid): ...


class Unauthenticated(LoractlError): ...


class Forbidden(LoractlError): ...


class NotFound(LoractlError): ...


class Conflict(LoractlError): ...


class GateNotPassed(Conflict):
    code = "gate-not-passed"
    says = "Alias '{alias}' of {name} did not move to {version}: {reason}"
    help = "See the evaluations: loractl show {name}@{version}; the policy: loractl policy show {name}"


class Gone(LoractlError): ...


class TooLarge(LoractlError): ...


class Unavailable(LoractlError): ...


class Limited(Unavailable): ...


class LocalFailure(LoractlError):
    @staticmethod
    def of(error: OSError, path: object) -> "LocalFailure":
        """What the operating system refused at ``path``: no room, or its own words."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFull(path=str(path))
        return PathUnusable(path=str(path), reason=error.strerror or str(error))


class UnknownProblem(LoractlError):
    code = "unknown-problem"
    says = "The registry answered '{problem}': {detail}"
    help = "{advice}"


class InternalError(LoractlError):
    code = "internal-error"
    says = "The registry failed on this request; its log names it {request}."
    help = "Try again; if it stays, give the request id to the operator of the registry."


# ── names and references ─────────────────────────────────────────────────────


class BadName(Usage):
    code = "bad-name"
    says = "'{value}' is no {what}: {rule}"


class BadReference(Usage):
    code = "bad-reference"
    says = "'{value}' is not a reference to {what}: {rule}"
    help = "References look like this: {examples}"


class BadDigest(Usage):
    code = "bad-digest"
    says = "'{value}' is not a digest: expected 'sha256:' or 'b3:' and 64 lower-case hexadecimal digits, in a reference at least the first 8."


class BadRequest(Usage):
    code = "bad-request"
    says = "The request is not valid: {problems}"

    @classmethod
    def of(cls, found: Iterable[Mapping[str, Any]]) -> "BadRequest":
        """Of what pydantic found: where, and what."""
        return cls(problems="; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found))


# ── files ────────────────────────────────────────────────────────────────────


class PickleRefused(BadFile):
    code = "pickle-refused"
    says = "'{path}' is a pickle; loading one runs its author's code, so loractl never stores or opens it."
    help = (
        "Convert it where you trust it: python -c \"import torch, safetensors.torch as s; "
        "s.save_file(torch.load('{path}', weights_only=True), 'adapter_model.safetensors')\""
    )


class LfsPointer(BadFile):
    code = "lfs-pointer"
    says = "'{path}' is a Git-LFS pointer of {size} bytes, not the file it stands for."
    help = "Fetch the real file: git lfs pull"


class BadHeader(BadFile):
    code = "bad-header"
    says = "'{path}' is not a valid safetensors file: {reason}"


class BadTensor(BadFile):
    code = "bad-tensor"
    says = "Tensor '{tensor}' in '{path}': {reason}"


class NonFinite(BadFile):
    code = "non-finite"
    says = "Tensor '{tensor}' in '{path}' holds {nans} NaN and {infs} Inf values; the first is at element {index}."
    help = "Nothing trained from here can be trusted; find the step at which the loss diverged."


class ZeroUpdate(BadFile):
    code = "zero-update"
    says = "The adapter changes nothing: its update is zero in all {modules} modules."
    help = "If a fresh adapter is meant, push it with --allow-zero."


class DuplicateTensor(BadFile):
    code = "duplicate-tensor"
    says = "Tensor '{tensor}' is in '{first}' and again in '{second}'."


class BadPath(BadFile):
    code = "bad-path"
    says = "'{path}' cannot be the path of a file in a version: {rule}"


class BadManifest(BadFile):
    code = "bad-manifest"
    says = "The manifest is not valid: {reason}"


class BadConfig(BadFile):
    code = "bad-config"
    says = "'{path}': {reason}"


class NotAnAdapter(BadFile):
    code = "not-an-adapter"
    says = "'{path}' is not an adapter folder: {reason}"
    help = "An adapter folder holds adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes them."


class NotABase(BadFile):
    code = "not-a-base"
    says = "'{path}' is not a base model folder: {reason}"
    help = "A base folder holds config.json and one or more .safetensors files, as transformers' save_pretrained writes them."


class BadDataset(BadFile):
    code = "bad-dataset"
    says = "'{path}', line {line}: {reason}"


class UnusableDataset(BadFile):
    code = "unusable-dataset"
    says = "'{path}': {reason}"


class BadRecords(BadFile):
    code = "bad-records"
    says = "The evaluation records are not valid; line {line}: {reason}"


class DigestMismatch(BadFile):
    code = "digest-mismatch"
    says = "'{path}' has the digest {actual}, but {expected} was promised ({size} bytes read)."
    help = "Try again; if it stays, the copy on the other side is damaged: loractl doctor"


class FileTooLarge(TooLarge):
    code = "file-too-large"
    says = "'{path}' is {size} bytes; at most {limit} are allowed here."


class QuotaExceeded(TooLarge):
    code = "quota-exceeded"
    says = "Namespace '{namespace}' may hold {allowed} bytes; with this push it would hold {used}."
    help = "See what it holds: loractl quota show {namespace}; delete versions, or ask an administrator for more."


class BodyTooLarge(TooLarge):
    code = "body-too-large"
    says = "The body of {method} {path} is over {limit} bytes, the most that is taken here."
    help = "Weights and data do not travel in requests: push them with loractl push."


# ── fit and binding ──────────────────────────────────────────────────────────


class AdapterDoesNotFit(DoesNotFit):
    code = "does-not-fit"
    says = "The adapter does not fit base {base}: {reasons}{suggestion}"
    help = "Push against the base it was made for: loractl push {path} {name} --base BASE"


class LeftOverTensors(DoesNotFit):
    code = "left-over-tensors"
    says = "{count} tensors belong to nothing in the adapter or its base: {tensors}"
    help = "Remove them, or fix target_modules and modules_to_save in adapter_config.json."


class AmbiguousModule(DoesNotFit):
    code = "ambiguous-module"
    says = "Adapter module '{module}' could mean {candidates} of the base."


class EvidenceContradicts(DoesNotFit):
    code = "evidence-contradicts"
    says = "The adapter says it belongs to {claimed} ({evidence}), but it is pushed against {base}.{suggestion}"
    help = "Push it against its own base, or override on record: loractl push {path} {name} --base BASE --trust-base"


class TrainedOnAnother(DoesNotFit):
    code = "trained-on-another"
    says = "'{path}' is for {recorded}, as it records itself or the pull that brought it; the base given is {base}."
    help = "Give its own base; carry it over: loractl rebase; or take this one all the same: --trust-base"


class EvidenceTooWeak(DoesNotFit):
    code = "evidence-too-weak"
    says = "Alias '{alias}' of {name} needs evidence '{required}' for the binding; {version} has '{actual}'."
    help = "Evaluate it on the policy's suite: loractl evaluate {name}@{version}"


class NoCompatibleVersion(Conflict):
    code = "no-compatible-version"
    says = "No version of '{ref}' is bound to base {base} with fit {wanted}.{nearest}"
    help = "Carry it over: loractl rebase {ref} --to {base}"


class WeightsAbsent(Conflict):
    code = "weights-absent"
    says = "Base {base} is registered without its weights, which {work} needs."
    help = "Upload them: loractl base push DIR --line LINE"


class NotRunnable(Conflict):
    code = "not-runnable"
    says = "{what} cannot be run here: {reason}"
    help = "It is stored, versioned and bound like any other; only training, evaluation and merging need more."


class StoredInBits(Conflict):
    code = "stored-in-bits"
    says = "Merging cannot add to a base that is stored in {bits}."
    help = "Merge into its full weights, or write it in full: loractl merge REF --line LINE --dequantise"


class UnknownModel(Conflict):
    code = "unknown-model"
    says = "The base in '{path}' is of model type '{kind}', which the installed transformers {version} does not know."
    help = "What works with these weights: push, pull, fit, merge, combine, compress, extract and compare. Training, evaluating, exporting and rebasing need the model's definition: install a transformers that has it."


class NotCombinable(Conflict):
    code = "not-combinable"
    says = "These adapters cannot be combined by '{method}': {reason}"
    help = "'concat' takes plain LoRA adapters of any ranks and scales: loractl combine REF… --into NAME"


class NotExportable(Conflict):
    code = "not-exportable"
    says = "{what} cannot be written as GGUF: {reason}"
    help = "See what can: docs/concepts.md, GGUF; an adapter can also be merged first: loractl export REF --for BASE --merge"


class NotExtractable(Conflict):
    code = "not-extractable"
    says = "No adapter can be extracted: {reason}"
    help = "Both must be one model, trained and untrained; see: loractl base diff A B"


# ── things that are not there ────────────────────────────────────────────────


class AdapterNotFound(NotFound):
    code = "adapter-not-found"
    says = "No adapter '{name}'.{nearest}"
    help = "List them: loractl list"


class VersionDeleted(Gone):
    code = "version-deleted"
    says = "{ref} was deleted by {by} at {at}: {reason}"
    help = "Its number is not given again, and its content not taken again in this series. Change the adapter and push it."


class VersionQuarantined(Conflict):
    code = "version-quarantined"
    says = "{ref} is quarantined by {by} since {at}, its bytes are given to nobody: {reason}"
    help = "Take another version; an admin ends the quarantine: loractl reinstate {ref}"


class VersionYanked(Conflict):
    code = "version-yanked"
    says = "{ref} is yanked: {reason}"
    help = "Move the alias to another version, or ask for just this one: loractl pull {ref}"


class VersionInUse(Conflict):
    code = "version-in-use"
    says = "Nothing was done: to {move} {ref} has consequences: {holders}."
    help = "If that is meant, {helps}"


class NotEmpty(Conflict):
    code = "not-empty"
    says = "A backup is restored into an empty installation; table '{table}' holds {count} rows."
    help = "Give an empty database and bucket, or another folder: loractl restore DIR --dir NEW"


class BackupUnusable(Invalid):
    code = "backup-unusable"
    says = "The backup at '{path}' cannot be used: {reason}"
    help = "Another snapshot may do: loractl restore DIR --snapshot NAME"


class WebhookNotFound(NotFound):
    code = "webhook-not-found"
    says = "No webhook '{id}'."
    help = "List them: loractl webhook list"


class AddressRefused(Forbidden):
    code = "address-refused"
    says = "'{host}' means {address}, which is not an address on the internet."
    help = "Operators allow private addresses of webhooks by LORACTL_WEBHOOK_PRIVATE=yes."


class VersionNotFound(NotFound):
    code = "version-not-found"
    says = "No version '{ref}'.{nearest}"
    help = "Show what there is: loractl show {name}"


class AliasNotFound(NotFound):
    code = "alias-not-found"
    says = "'{name}' has no alias '{alias}' for base {base}.{nearest}"
    help = "List its aliases: loractl alias list {name}"


class OtherBase(Conflict):
    code = "other-base"
    says = "'{adapter}' belongs to base {actual}; a job of kind '{kind}' was asked to take it from {asked}."
    help = "Leave the base out: the adapter's own is taken. To carry it to another one: loractl rebase"


class BaseNotFound(NotFound):
    code = "base-not-found"
    says = "No base model '{ref}'.{nearest}"
    help = "List them: loractl base list; register one: loractl base push DIR --line LINE"


class DatasetNotFound(NotFound):
    code = "dataset-not-found"
    says = "No {kind} '{ref}'.{nearest}"
    help = "Push it: loractl {kind} push FILE {ref}"


class JobNotFound(NotFound):
    code = "job-not-found"
    says = "No job '{id}'."
    help = "List them: loractl jobs list"


class CampaignNotFound(NotFound):
    code = "campaign-not-found"
    says = "No upgrade campaign '{id}'."
    help = "Show them: loractl upgrade status"


class NoCampaigns(NotFound):
    code = "no-campaigns"
    says = "There is no upgrade yet."
    help = "Plan one: loractl upgrade plan LINE --to BASE"


class PushNotFound(NotFound):
    code = "push-not-found"
    says = "No push '{id}'."
    help = "Start again: loractl push"


class ScheduleNotFound(NotFound):
    code = "schedule-not-found"
    says = "No schedule '{id}'."
    help = "List them: loractl schedule list"


class TokenNotFound(NotFound):
    code = "token-not-found"
    says = "No token '{id}'."
    help = "List them: loractl token list"


class PolicyNotFound(NotFound):
    code = "policy-not-found"
    says = "Neither '{name}' nor its namespace has a policy."
    help = "Set one: loractl policy set {name} --suite SUITE --metric METRIC --margin MARGIN"


class BlobNotFound(NotFound):
    code = "blob-not-found"
    says = "Blob {digest} is not there."


class RouteNotFound(NotFound):
    code = "route-not-found"
    says = "No route {method} {path}."
    help = "The routes are listed at /openapi.json"


# ── access ───────────────────────────────────────────────────────────────────


class TokenMissing(Unauthenticated):
    code = "token-missing"
    says = "This needs a token, and none was sent."
    help = "Log in: loractl login URL --token TOKEN"


class TokenRefused(Unauthenticated):
    code = "token-refused"
    says = "The token is not valid: {reason}."
    help = "Ask for a new one (loractl token create), then: loractl login URL --token TOKEN"


class SignInFailed(Unauthenticated):
    code = "sign-in-failed"
    says = "Signing in at {issuer} failed: {reason}"
    help = "Try again: loractl login URL; or use a token: loractl login URL --token TOKEN"


class ScopeMissing(Forbidden):
    code = "scope-missing"
    says = "This needs the scope '{scope}' on '{namespace}'; the token has {granted}."
    help = "Ask an admin of the namespace: loractl token create --scope {scope} --namespace {namespace}"


class RateExceeded(Limited):
    code = "rate-exceeded"
    says = "Token {id} asks more often than {per_s} times a second; nothing was done. Ask again in {retry_after} s."
    help = "Ask for several things in one request, or operators: LORACTL_RATE"


class SignInsLimited(Limited):
    code = "sign-ins-limited"
    says = "Too many tokens from {address} were refused; none is looked at for {retry_after} s."
    help = "Look which token is sent: loractl whoami; a new one: loractl login URL --token TOKEN"


class GateLoosened(Forbidden):
    code = "gate-loosened"
    says = "This policy asks less of {name} than the one in force: {what}. That needs 'admin' on '{namespace}'."
    help = "Keep what the policy in force asks (loractl policy show {name}), or ask an admin of '{namespace}'"


class NotYourJob(Forbidden):
    code = "not-your-job"
    says = "A worker token may only touch jobs it has claimed; '{id}' is not one of them."


class SignatureRefused(Forbidden):
    code = "signature-refused"
    says = "The signed URL is not valid: {reason}."
    help = "Ask for a fresh one: repeat the command."


# ── signatures ───────────────────────────────────────────────────────────────


class BadSigningKey(BadFile):
    code = "bad-signing-key"
    says = "'{path}' is no key to sign or verify with: {reason}"
    help = "Make a pair: loractl key create; the public one of a private key: loractl key public FILE"


class PassphraseNeeded(Invalid):
    code = "passphrase-needed"
    says = "The key '{path}' is locked by a passphrase."
    help = "Type it when asked, or give it in LORACTL_KEY_PASSPHRASE"


class BadSignature(BadFile):
    code = "bad-signature"
    says = "A signature of {ref} does not hold: {reason}"
    help = "Sign it anew: loractl sign REF --key KEY; who signed what: loractl verify REF"


class SigningKeyNotFound(NotFound):
    code = "key-not-found"
    says = "No key {id} signs for '{namespace}'."
    help = "List those that do: loractl key list {namespace}; an admin adds one: loractl key add {namespace} PUBLIC.pem"


class SigningKeyRevoked(Conflict):
    code = "key-revoked"
    says = "Key {id} of '{namespace}' was revoked by {by} at {at}: {reason}"
    help = "It is not taken again; sign with a key of: loractl key list {namespace}"


class NoSigningKey(Conflict):
    code = "no-signing-key"
    says = "'{namespace}' has no living key, so no version there could have a signature that counts."
    help = "Add one first: loractl key add {namespace} PUBLIC.pem"


class SignatureRequired(Conflict):
    code = "signature-required"
    says = "{ref} has no signature by a living key of '{namespace}', which requires one."
    help = "When pushing: loractl push DIR REF --base BASE --sign KEY; afterwards: loractl sign REF --key KEY; keys: loractl key list {namespace}"


class NotVerified(Invalid):
    code = "not-verified"
    says = "{ref} is not verified, and nothing of it was loaded: {reason}"
    help = "What there is: loractl verify REF; without verification, at your own risk: loractl pull REF --unverified"


# ── pushes, aliases, jobs, campaigns ─────────────────────────────────────────


class MoveNotAllowed(Conflict):
    code = "move-not-allowed"
    says = "The {noun} {id} is {state}; '{move}' is allowed from {allowed}."


class PushExpired(Gone):
    code = "push-expired"
    says = "Push {id} is {state} since {since}."
    help = "Push again; finished files are not sent twice: loractl push"


class BlobsMissing(Conflict):
    code = "blobs-missing"
    says = "Push {id} cannot be committed: {count} blobs have not arrived: {digests}"
    help = "Repeat the push; it resumes where it stopped."


class PushRejected(BadFile):
    code = "push-rejected"
    says = "Push {id} was verified and rejected: {findings}"


class GivenUp(BadFile):
    code = "given-up"
    says = "Push {id} was given up: {count} times its verification came to no end, as when it takes all memory."
    help = "The log of the daemons says how they ended. Push it again; if that helps not, in smaller files."


class NotSealed(Conflict):
    code = "not-sealed"
    says = "Push {id} cannot be committed: the digests of {count} of its files have not been told."
    help = "Repeat the push; it resumes where it stopped."


class DraftTaken(Conflict):
    code = "draft-taken"
    says = "Push {id} is of other files with the same names and sizes: '{path}' has other bytes there."
    help = "Push with all digests, as clients do when they hear this."


class AliasMoved(Conflict):
    code = "alias-moved"
    says = "Alias '{alias}' of {name} moved in between: it is now {current} (generation {generation})."
    help = "Look first, then repeat: loractl alias list {name}"


class RevisionTaken(Conflict):
    code = "revision-taken"
    says = "The next revision of line '{line}' is r{next}; r{wanted} was asked for."
    help = "Look first, then repeat: loractl base list"


class UnlikeLine(Conflict):
    code = "unlike-line"
    says = "Line '{line}' goes on from {newest}, and no tensor of base {base} has a name of one there: it is another model."
    help = "Name another line (--line); if this one goes on with another model, say so: --unlike"


class LeaseLost(Conflict):
    code = "lease-lost"
    says = "Job {id}, attempt {attempt}: the lease was lost; the job is now {state}."


class CheckpointIncomplete(Conflict):
    code = "checkpoint-incomplete"
    says = "The checkpoint of job {id} at step {step} is not recorded: of {count} files storage lacks {digests}"
    help = "The worker sends them again; the newest recorded checkpoint stays."


class CampaignExists(Conflict):
    code = "campaign-exists"
    says = "Line '{line}' already has an unfinished campaign {id} to {base}."
    help = "Watch it: loractl upgrade status {id}; or end it: loractl upgrade abort {id}"


class NotASuccessor(Conflict):
    code = "not-a-successor"
    says = "Base {base} is no successor of {old} in line '{line}': {why}."
    help = "See the line: loractl base list --line {line}; add a revision to it: loractl base push DIR --line {line}"


class ItemsDiffer(Invalid):
    code = "items-differ"
    says = "Cannot pair the records of {left} and {right}: {reason}"
    help = "Evaluate both on the same version of the suite: loractl evaluate REF… --suite SUITE"


class GateIncomplete(Invalid):
    code = "gate-incomplete"
    says = "The gate on {suite} cannot be judged: {missing}."
    help = "Evaluate on the policy's suite, which must measure its metric: loractl evaluate REF… --suite {suite}"


class GateImpossible(Invalid):
    code = "gate-impossible"
    says = "Suite {suite} has {n} items in its gate split; with margin {margin} nothing can pass below {needed}."
    help = (
        "Push a larger suite, three fifths of which are its gate split, or allow more: "
        "loractl policy set {name} --suite {suite} --metric METRIC --margin MARGIN"
    )


class PoolUnusable(Invalid):
    code = "pool-unusable"
    says = "Dataset {pool} cannot be the pool of {name}: {reason}."
    help = "Name another dataset of inputs: loractl policy set {name} --pool DATASET; see: loractl policy show {name}"


class BadLabel(Invalid):
    code = "bad-label"
    says = "Line {line} of the labels is wrong: {reason}."
    help = "Write the letters of the right answers in 'right', such as \"a\", \"a b\", or \"none\", and nothing else."


class LabelsMissing(Invalid):
    code = "labels-missing"
    says = "{missing} of the {count} answers that differ are not labelled, such as {item}."
    help = "Fill in 'right' in every line, and push the whole file: loractl upgrade label CAMPAIGN ADAPTER FILE"


class LabelsForeign(Invalid):
    code = "labels-foreign"
    says = "Line {line} of the labels is about {item}, which is not in question for {adapter}."
    help = "Fetch the file that is: loractl upgrade disagreements {campaign} {adapter} -o FILE"


class LabelsContradict(Conflict):
    code = "labels-contradict"
    says = "The labels contradict each other: {item} is {one} and {other}."
    help = "One look is what the gate's error allows, so labels that were taken stay: loractl upgrade status"


class NoLabelsWanted(Conflict):
    code = "no-labels-wanted"
    says = "Upgrade {campaign} has no differing answers of {adapter} to label: {reason}."
    help = "See where it stands: loractl upgrade status {campaign}"


class NothingToRollBack(Conflict):
    code = "nothing-to-roll-back"
    says = "Alias '{alias}' of {name} has no earlier target on base {base}."
    help = "See its history: loractl log {name}"


class TrainingFailed(BadFile):
    code = "training-failed"
    says = "Training stopped at step {step}: {reason}"
    help = "Lower the learning rate or look at the batch named above."


class ScoreNotANumber(BadFile):
    code = "score-not-a-number"
    says = "'{path}', line {line}: it has no score by {metric}, the model gives {value} for it."
    help = "Its weights overflow, alone or with the adapter: try precision fp32, or train at a lower rate."


class ProcessFailed(LocalFailure):
    code = "process-failed"
    says = "Process {rank} of {many} stopped: {reason}"
    help = "A closed connection means that another one ended first: torchrun's output above says which, and how."


class Unchanged(Conflict):
    code = "unchanged"
    says = "After {steps} steps no weight differs from the base's once it is written as {dtype}."
    help = 'Raise the learning rate or train for longer; dtype = "fp32" writes weights as they were trained.'


class UnknownTargets(Invalid):
    code = "unknown-targets"
    says = "Targets {targets} match no module of the base.{nearest}"
    help = "Name linear modules or embeddings by their last part, such as q_proj, down_proj or lm_head."


class SuiteTooSmall(Invalid):
    code = "suite-too-small"
    says = "The suite's calibration split has {n} items scored by {metric}; at least {needed} are needed to choose by."
    help = "Push a larger suite, of which a fifth is its calibration split: loractl suite push FILE NAME"


class RankTooHigh(Invalid):
    code = "rank-too-high"
    says = "Rank {rank} is above the smaller side of '{module}', which is {outputs}×{inputs}; at most {most} fits here"
    help = "A product of a higher rank than the update itself says nothing more: lower the recipe's rank."


class ForeignTokenizer(Conflict):
    code = "foreign-tokenizer"
    says = "The tokenizer gives token {token}, the base's embedding has {rows} rows: it does not belong to this base"
    help = "Push the base with the tokenizer that it was trained with: loractl base push DIR --line NAME"


# ── parts that are down ──────────────────────────────────────────────────────


class RegistryUnreachable(Unavailable):
    code = "registry-unreachable"
    says = "The registry at {url} does not answer: {reason}"
    help = "Is it running? Start one here: loractl up; or log in to another: loractl login URL"


class DatabaseDown(Unavailable):
    code = "database-down"
    says = "The registry's database does not answer: {reason}"
    help = "Nothing was changed; try again. Operators: loractl doctor"


class SchemaMissing(Unavailable):
    code = "schema-missing"
    says = "The registry's database lacks migrations: {missing}"
    help = "Operators: python -m registry.db.migrate"


class WriteConflict(Unavailable):
    code = "write-conflict"
    says = "Somebody else changed the same thing at the same moment: {reason}"
    help = "Nothing was changed; try again."


class Overloaded(Unavailable):
    code = "overloaded"
    says = "The registry is at work on {limit} requests, the most it takes; nothing was done. Ask again in {retry_after} s."
    help = "Try again; if it stays, operators start more API processes: docs/deploy.md"


class ProviderDown(Unavailable):
    code = "provider-down"
    says = "The identity provider {issuer} cannot be asked: {reason}"
    help = "Tokens of the registry work all the same: loractl login URL --token TOKEN"


class StorageDown(Unavailable):
    code = "storage-down"
    says = "The blob store does not answer: {reason}"
    help = "Nothing was changed; try again. Operators: loractl doctor"


class StorageFull(Unavailable):
    code = "storage-full"
    says = "The blob store has no room for {size} bytes: {reason}"
    help = "Free space or enlarge the store, then repeat; the push resumes."


class ChecksumRefused(BadFile):
    code = "checksum-refused"
    says = "The store refused '{key}': the bytes have checksum {actual}, the URL was signed for {expected}."
    help = "The file changed while it was sent, or was damaged on the way; push again."


class BadKey(Invalid):
    code = "bad-key"
    says = "'{key}' cannot be the key of a blob: {rule}"


class UploadNotFound(NotFound):
    code = "upload-not-found"
    says = "No open multipart upload '{upload_id}' of '{key}'; it was completed, aborted, or never started."
    help = "Repeat the push; it resumes where it stopped."


class PartsMissing(Conflict):
    code = "parts-missing"
    says = "The upload of '{key}' cannot be completed: parts {numbers} have not arrived whole."
    help = "Repeat the push; it resumes where it stopped."


class PartBusy(Unavailable):
    code = "part-busy"
    says = "Another request is still writing to the upload of '{key}' ({what})."
    help = "Try again in a moment."


class NotLoggedIn(Usage):
    code = "not-logged-in"
    says = "No registry is configured."
    help = "Start one here: loractl up; then: loractl login URL --token TOKEN"


class DiskFull(LocalFailure):
    code = "disk-full"
    says = "No room left on this machine while writing '{path}'."
    help = "Free some, then repeat the command; what it says to have kept is not fetched again."


class PathUnusable(LocalFailure):
    code = "path-unusable"
    says = "'{path}' cannot be used: {reason}"


class WorkFailed(LocalFailure):
    code = "work-failed"
    says = "Job {id} failed: {reason}"
    help = "See its log: loractl jobs logs {id}; try again: loractl jobs retry {id}"


class ChildFailed(LocalFailure):
    code = "child-failed"
    says = "The {name} process {how}: {tail}"
    help = "Its log: {log}"


class ToolMissing(LocalFailure):
    code = "tool-missing"
    says = "{what} needs the extra '{extra}', which is not installed."
    help = "Install it: pip install 'loractl[{extra}]'"


def refusals() -> list[type[LoractlError]]:
    """Every refusal, in order of code: the source of docs/errors.md."""
    return [LoractlError.by_code[code] for code in sorted(LoractlError.by_code)]



