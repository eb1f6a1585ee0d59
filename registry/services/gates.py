"""From stored evaluations to a verdict: the records of candidate, serving version and bare base, judged.

Only evaluations made by a claimed job are stored, so only they count. An evaluation belongs to content (a
version's digest, a base, a suite), whoever asked for it; old records are used as they are when suite and
harness are those of the candidate's. Where something is missing the answer names it with the command that
supplies it, never a guess.
"""

from dataclasses import dataclass

from sqlmodel import Session

from registry.core import gate as gates
from registry.core.digest import Digest
from registry.core.errors import DatasetNotFound, GateIncomplete, ItemsDiffer
from registry.core.policy import Gate, Policy
from registry.core.records import Record, parse_records
from registry.db import queries
from registry.db.models import Adapter, Base, DatasetVersion, Evaluation, Version
from registry.storage.base import BlobStore

from . import standing
from .blobs import blob_key
from .references import find_dataset


@dataclass(frozen=True, slots=True)
class Scored:
    """A version (None: nothing, the bare base) on a base."""

    base: Base
    version: Version | None

    @property
    def digest(self) -> str | None:
        """The version's digest; None of the bare base."""
        return self.version.digest if self.version else None

    def __str__(self) -> str:
        base = Digest.parse(self.base.digest).short
        return f"v{self.version.number} on {base}" if self.version else f"the bare base {base}"


@dataclass(frozen=True, slots=True)
class Lacking:
    """Why there can be no verdict, and the evaluations that would give one."""

    reason: str
    evaluations: tuple[tuple[Scored, DatasetVersion], ...] = ()


def every_gate(policy: Policy) -> tuple[Gate, ...]:
    """The policy's gates, and its guard."""
    return (*policy.gates, *((policy.guard,) if policy.guard else ()))


def suite_of(session: Session, gate: Gate) -> DatasetVersion:
    """The suite version that a gate means: the newest where its reference names none; `DatasetNotFound`."""
    return find_dataset(session, None, "suite", gate.suite)


def verdict(
    session: Session,
    store: BlobStore,
    policy: Policy,
    *,
    candidate: Scored,
    serving: Scored | None,
    alpha: float | None = None,
) -> gates.Verdict | Lacking | None:
    """The verdict on ``candidate``, or what it lacks; None where the policy has no gates.

    ``serving`` may be on another base: what a rebase must not be worse than. ``alpha`` is what this
    decision may spend; the policy's without it.
    """
    if not policy.gates:
        return None
    bare = Scored(candidate.base, None)
    needed = [candidate, bare, *([serving] if serving else [])]
    if serving is not None and any(gate.margin.of_gain for gate in policy.gates):
        needed.append(Scored(serving.base, None))
    try:
        suites = {gate.suite: suite_of(session, gate) for gate in every_gate(policy)}
        ledger = _Ledger(session, store, candidate)
        pairs = [(scored, suite) for suite in suites.values() for scored in needed]
        if absent := [pair for pair in pairs if not ledger.has(*pair)]:
            return _lacking(session, absent, suites)
        verdicts = []
        for gate in policy.gates:
            suite = suites[gate.suite]
            gain = guard = None
            if serving is not None and gate.margin.of_gain:
                gain = gates.mean_gain(ledger.read(serving, suite), ledger.read(needed[-1], suite), gate)
            first = gate is policy.gates[0]  # the guard is judged once
            if first and policy.guard is not None:
                guarded = suites[policy.guard.suite]
                guard = (ledger.read(candidate, guarded), ledger.read(serving or bare, guarded))
            verdicts.append(
                gates.judge(
                    ledger.read(candidate, suite),
                    ledger.read(serving, suite) if serving else None,
                    ledger.read(bare, suite),
                    gate=gate,
                    policy=policy if first else policy.model_copy(update={"guard": None}),
                    alpha=policy.alpha if alpha is None else alpha,
                    gain=gain,
                    guard=guard,
                )
            )
    except (DatasetNotFound, GateIncomplete, ItemsDiffer) as error:
        return Lacking(error.message)
    return gates.together(verdicts)


def quoted(
    session: Session, store: BlobStore, policy: Policy, *, candidate: Scored, serving: Scored
) -> tuple[gates.Quoted, ...]:
    """Per gate, what the report split says of a candidate whose verdict is given: its records are there."""
    ledger, bare = _Ledger(session, store, candidate), Scored(candidate.base, None)
    found = []
    for gate in policy.gates:
        suite = suite_of(session, gate)
        if all(ledger.has(scored, suite) for scored in (candidate, serving, bare)):
            sides = [ledger.read(scored, suite) for scored in (candidate, serving, bare)]
            found.append(gates.quote(sides[0], sides[1], sides[2], gate=gate, alpha=policy.alpha))
    return tuple(one for one in found if one)


def _lacking(
    session: Session, absent: list[tuple[Scored, DatasetVersion]], suites: dict[str, DatasetVersion]
) -> Lacking:
    called = {suite.id: name for name, suite in suites.items()}
    told = "; ".join(f"{scored} has no evaluation on {called[suite.id]} in one harness" for scored, suite in absent)
    work: dict[tuple[str, str], list[str]] = {}
    for scored, suite in absent:  # the bare base is scored beside whatever is
        refs = work.setdefault((Digest.parse(scored.base.digest).short, called[suite.id]), [])
        if scored.version is not None:
            refs.append(standing.ref(session.get_one(Adapter, scored.version.adapter_id), scored.version))
    run = (
        " ".join(["loractl evaluate", *refs, "--for", base, "--suite", suite]) for (base, suite), refs in work.items()
    )
    return Lacking(f"{told}. Run: {'; '.join(run)}", tuple(absent))


class _Ledger:
    """Evaluations in the harness that scored the candidate last; each blob of records is read once."""

    def __init__(self, session: Session, store: BlobStore, candidate: Scored) -> None:
        self.session, self.store, self.candidate = session, store, candidate
        self.rows: dict[tuple[int | None, str | None, int | None], Evaluation | None] = {}
        self.known: dict[str, tuple[Record, ...]] = {}

    def has(self, scored: Scored, suite: DatasetVersion) -> bool:
        return self._row(scored, suite) is not None

    def read(self, scored: Scored, suite: DatasetVersion) -> tuple[Record, ...]:
        row = self._row(scored, suite)
        assert row is not None  # `has` was asked before
        if row.records not in self.known:
            with self.store.open(blob_key(row.records)) as reader:
                self.known[row.records] = parse_records(reader.read(0, reader.size))
        return self.known[row.records]

    def _row(self, scored: Scored, suite: DatasetVersion) -> Evaluation | None:
        key = (scored.base.id, scored.digest, suite.id)
        if key not in self.rows:
            own = None if scored is self.candidate else self._row(self.candidate, suite)
            assert scored.base.id is not None
            self.rows[key] = queries.newest_evaluation(
                self.session,
                base_id=scored.base.id,
                digest=scored.digest,
                suite=suite.digest,
                harness=own.harness if own else None,
            )
        return self.rows[key]
