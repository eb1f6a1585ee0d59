"""From stored evaluations to a verdict: the records of candidate, serving version and bare base, judged.

Only evaluations made by a claimed job are stored, so only they count. The serving version's old records
are used as they are when suite and harness are the same; where something is missing the answer is a text
that names it with the command that supplies it, never a guess.
"""

from dataclasses import dataclass

from sqlmodel import Session

from registry.core import gate as gates
from registry.core.policy import Gate, Policy
from registry.core.records import Record, parse_records
from registry.db import queries
from registry.db.models import Base, DatasetVersion, Evaluation, Version
from registry.storage.base import BlobStore

from .blobs import blob_key
from .policies import suite_of


@dataclass(frozen=True, slots=True)
class Scored:
    """A version (None: nothing, the bare base) on a base."""

    base: Base
    version: Version | None

    def __str__(self) -> str:
        return f"v{self.version.number} on {self.base.digest[:15]}" if self.version else f"bare {self.base.digest[:15]}"


@dataclass(frozen=True, slots=True)
class Missing:
    """An evaluation that a verdict needs and nobody has made."""

    scored: Scored
    suite: DatasetVersion
    gate: Gate

    def __str__(self) -> str:
        return f"{self.scored} has no evaluation on {self.gate.suite}"


def missing(session: Session, wanted: list[Scored], policy: Policy) -> list[Missing]:
    """Which of ``wanted`` have no evaluation on which suite of the policy."""
    found = []
    for gate in (*policy.gates, *((policy.guard,) if policy.guard else ())):
        suite = suite_of(session, None, gate)
        found += [Missing(s, suite, gate) for s in wanted if _evaluation(session, s, suite) is None]
    return found


def verdict(
    session: Session,
    store: BlobStore,
    policy: Policy,
    *,
    candidate: Scored,
    serving: Scored | None,
    alpha: float | None = None,
) -> gates.Verdict | str | None:
    """The verdict on ``candidate``; a text when an evaluation is missing; None where the policy has no gates.

    ``serving`` may be on another base: what a rebase must not be worse than. ``alpha`` is what this
    decision may spend; the policy's without it.
    """
    if not policy.gates:
        return None
    wanted = [candidate, Scored(candidate.base, None)]
    if serving is not None:
        wanted.append(serving)
        if any(gate.margin.of_gain for gate in policy.gates):
            wanted.append(Scored(serving.base, None))
    lacking = missing(session, wanted, policy)
    if lacking:
        return "; ".join(sorted({str(item) for item in lacking})) + ". Run: loractl evaluate"
    verdicts = []
    for gate in policy.gates:
        suite = suite_of(session, None, gate)
        read = _Reader(session, store, suite)
        own = read(candidate)
        if serving is not None and read.harness(serving) != read.harness(candidate):
            return f"{serving} was evaluated by another harness. Run: loractl evaluate"
        of_gain = serving is not None and gate.margin.of_gain
        gain = gates.mean_gain(read(serving), read(Scored(serving.base, None)), gate) if serving and of_gain else None
        guard = None
        if policy.guard is not None:
            guarded = _Reader(session, store, suite_of(session, None, policy.guard))
            guard = (guarded(candidate), guarded(serving or Scored(candidate.base, None)))
        verdicts.append(
            gates.judge(
                own,
                read(serving) if serving else None,
                read(Scored(candidate.base, None)),
                gate=gate,
                policy=policy,
                alpha=policy.alpha if alpha is None else alpha,
                gain=gain,
                guard=guard,
            )
        )
    return gates.together(verdicts)


def _evaluation(session: Session, scored: Scored, suite: DatasetVersion) -> Evaluation | None:
    assert scored.base.id is not None and suite.id is not None
    return queries.newest_evaluation(
        session,
        base_id=scored.base.id,
        version_id=scored.version.id if scored.version else None,
        suite_id=suite.id,
    )


class _Reader:
    """Records of one suite, each blob read once."""

    def __init__(self, session: Session, store: BlobStore, suite: DatasetVersion) -> None:
        self.session, self.store, self.suite = session, store, suite
        self.known: dict[str, tuple[Record, ...]] = {}

    def __call__(self, scored: Scored) -> tuple[Record, ...]:
        digest = self._row(scored).records
        if digest not in self.known:
            with self.store.open(blob_key(digest)) as reader:
                self.known[digest] = parse_records(reader.read(0, reader.size))
        return self.known[digest]

    def harness(self, scored: Scored) -> str:
        return self._row(scored).harness

    def _row(self, scored: Scored) -> Evaluation:
        found = _evaluation(self.session, scored, self.suite)
        assert found is not None  # `missing` was asked before
        return found
