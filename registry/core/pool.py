"""The pool of a gate: unlabelled inputs that decide what a suite could not tell, with few labels.

Answers of one text are right or wrong together, so of N inputs only the d count on which two versions differ: with
these labelled, the paired difference on all N is known,

    S(x) − S(y) = (gains − losses) ⁄ N,    gains + losses ≤ d

and goes through the intervals of `registry.core.gate`. Whoever labels sees the input and the answers in an order that
says nothing of whose they are. Inputs are those of a dataset without the suite's own rows and without what the
compared versions were trained on; N, the order and who is asked are settled before anybody sees an answer.

The value over the bare base is a matter of the suite, where a candidate shows it on few items, or of nobody: only where
the suite could not tell, those of the first `VALUED` inputs (by hash) are labelled too on which candidate and bare
base differ. On all N these are nearly all of them, and a thousand labels would say what three hundred say.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from .errors import BadLabel, BadRecords, LabelsContradict, LabelsForeign, LabelsMissing
from .gate import Verdict, Zone, judge_pool, shares, smallest_n
from .manifest import Frozen, Json, canonical_json
from .metrics import LM_EVAL, is_binary
from .policy import Gate, Policy
from .records import Record
from .rows import input_of

POOL: Literal["pool"] = "pool"
"""Its name among the looks that share a policy's α."""
VALUED = 300
"""Inputs on which the value over the bare base is decided: a gain of 5 points on a tenth of them shows (z = 2.9)."""
MOST_INPUTS = 50_000
"""Rows of a dataset that is a pool: answers to all of them lie in memory at once."""
MOST_BYTES = 64 << 20
_LETTERS = "abc"


class Answered(Frozen):
    """What one version answered to one input."""

    item: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    input: Json
    answer: str
    parsed: bool | None = None


class Question(Frozen):
    """One input on which answers differ, as a person sees it."""

    item: str
    input: dict[str, Any]
    answers: dict[str, str]
    """By letter; an order that their texts alone decide."""

    def line(self) -> dict[str, Any]:
        """The line of the file to be labelled."""
        return {"item": self.item, **self.input, "answers": self.answers, "right": None}


def input_id(row: Mapping[str, Any]) -> str:
    """The name of what a row asks: 16 hex digits of the SHA-256 of its canonical JSON."""
    return _called(input_of(dict(row)))


def _called(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(asked))).hexdigest()[:16]


def to_jsonl(answers: Sequence[Answered]) -> bytes:
    """Lines in order of item: equal answers are equal bytes."""
    lines = (canonical_json(one.model_dump(mode="json")) for one in sorted(answers, key=lambda one: one.item))
    return b"".join(line + b"\n" for line in lines)


def parse_answers(data: bytes) -> dict[str, Answered]:
    """item -> answer, from JSONL in order of item; `BadRecords` names the line."""
    found: dict[str, Answered] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            one = Answered.model_validate_json(line)
        except ValidationError as error:
            raise BadRecords(line=number, reason=str(error.errors()[0]["msg"])) from error
        if one.item in found or one.item != _called(one.input):
            twice = "occurs twice" if one.item in found else "is not what its input is called"
            raise BadRecords(line=number, reason=f"item {one.item} {twice}")
        found[one.item] = one
    if not found:
        raise BadRecords(line=1, reason="there is no answer")
    return dict(sorted(found.items()))


# ── which gate ───────────────────────────────────────────────────────────────


def gate_of(policy: Policy) -> Gate | None:
    """The one gate that a pool decides for; None where `problem` says why there is none."""
    gates = [gate for gate in policy.gates if is_binary(gate.metric) and not gate.metric.startswith(LM_EVAL)]
    return gates[0] if len(gates) == 1 else None


def problem(policy: Policy) -> str | None:
    """Why no pool can decide anything for this policy, or why not the one that it names."""
    if not policy.gates:
        return "no suite gates it, so there is nothing to decide"
    if gate_of(policy) is None:
        metrics = ", ".join(gate.metric for gate in policy.gates)
        if all(gate.metric.startswith(LM_EVAL) for gate in policy.gates):
            return f"its gates are on {metrics}: lm-eval makes its questions of a suite's own fields"
        if not any(is_binary(gate.metric) for gate in policy.gates):
            return (
                f"its gates are on {metrics}, and equal texts prove nothing there: a pool needs a metric by which an "
                f"answer is right or wrong, such as exact-match, accuracy or custom-binary:NAME"
            )
        return f"its gates are on {metrics}: a pool decides for exactly one that is right or wrong"
    if policy.pool is not None and policy.pool == policy.retained:
        return "it is what the policy retains, so that candidates are made with it: none of it would be left"
    return None


def settles(verdict: Verdict, gate: Gate) -> bool:
    """Whether labels on a pool could turn an unresolved verdict into a pass: all else has passed."""
    own = {"not-worse", "negative-flips", "adds-value", "parse-rate"}
    return verdict.zone is Zone.UNRESOLVED and all(
        told.zone is Zone.PASS or (told.suite == gate.suite and told.metric == gate.metric and told.name in own)
        for told in verdict.criteria
    )


def asks_bare(verdict: Verdict, gate: Gate) -> bool:
    """Whether the value over the bare base is still open."""
    return any(
        told.name == "adds-value" and told.suite == gate.suite and told.metric == gate.metric
        for told in verdict.criteria
        if told.zone is not Zone.PASS
    )


def smallest_pool(policy: Policy, alpha: float | None = None) -> int | None:
    """Inputs below which nothing passes, whatever the labels; None: no number is enough."""
    gate = gate_of(policy)
    if gate is None:
        return None
    return smallest_n(gate, policy, alpha=shares(policy.alpha, (*policy.tiers, POOL))[POOL] if alpha is None else alpha)


# ── what is asked of people ──────────────────────────────────────────────────


def questions(
    serving: Mapping[str, Answered], candidate: Mapping[str, Answered], bare: Mapping[str, Answered] | None = None
) -> list[Question]:
    """The inputs on which candidate and serving version differ; of the first `VALUED` also where the bare base does.

    All three answer the same items, in order of item.
    """
    valued = set(islice(candidate, VALUED)) if bare is not None else set()
    found = []
    for item, one in candidate.items():
        texts = {_text(one), _text(serving[item])}
        if item in valued and bare is not None:
            texts.add(_text(bare[item]))
        if len(texts) > 1:
            ordered = sorted(texts, key=lambda text: hashlib.sha256(f"{item}\0{text}".encode()).digest())
            found.append(Question(item=item, input=one.input, answers=dict(zip(_LETTERS, ordered, strict=False))))
    return found


def to_paper(asked: Sequence[Question]) -> bytes:
    """The file that is to be labelled: one JSON object a line, for people to read."""
    return "".join(json.dumps(one.line(), ensure_ascii=False) + "\n" for one in asked).encode()


def parse_paper(data: bytes) -> dict[str, dict[str, str]]:
    """item -> letter -> answer, of a file that `to_paper` wrote."""
    lines = [json.loads(line) for line in data.split(b"\n") if line]
    return {line["item"]: line["answers"] for line in lines}


def parse_labels(data: bytes, paper: Mapping[str, Mapping[str, str]], *, campaign: str, adapter: str) -> dict[str, str]:
    """item -> letters of the right answers, in alphabetical order; for all of ``paper`` and nothing else.

    Refused: `BadLabel`, `LabelsForeign`, `LabelsMissing`, and `LabelsContradict` where two lines do not agree.
    """
    found: dict[str, str] = {}
    empty = set()
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadLabel(line=number, reason=f"not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("item"), str):
            raise BadLabel(line=number, reason="it must be an object with an 'item'")
        item = row["item"][:64]
        if item not in paper or row.get("answers", paper[item]) != paper[item]:
            raise LabelsForeign(line=number, item=item, adapter=adapter, campaign=campaign)
        if row.get("right") is None or row["right"] == "":
            empty.add(item)
            continue
        right = _right(row["right"], paper[item], number)
        if found.setdefault(item, right) != right:
            raise LabelsContradict(item=item, one=_said(found[item]), other=_said(right))
    if lacking := sorted((paper.keys() - found.keys()) | (empty - found.keys())):
        raise LabelsMissing(missing=len(lacking), count=len(paper), item=lacking[0])
    return dict(sorted(found.items()))


def _right(value: object, answers: Mapping[str, str], number: int) -> str:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    words = words if isinstance(words, list) else None
    if words == ["none"] or words == []:
        return ""
    if words == ["all"] or (words == ["both"] and len(answers) == 2):
        return "".join(answers)
    if words is None or not all(isinstance(word, str) and word in answers for word in words):
        allowed = ", ".join(f'"{letter}"' for letter in answers)
        told = f"""'right' is {json.dumps(value)[:60]}; allowed are {allowed}, several of them, "all" and "none\""""
        raise BadLabel(line=number, reason=told)
    return "".join(sorted(set(words)))


def _said(letters: str) -> str:
    return f"'{' '.join(letters)}'" if letters else "'none'"


def require_equal(before: Mapping[str, str], labels: Mapping[str, str]) -> None:
    """`LabelsContradict` where labels say otherwise than those that were taken."""
    for item, right in labels.items():
        if before[item] != right:
            raise LabelsContradict(item=item, one=_said(before[item]), other=_said(right))


def to_labels(labels: Mapping[str, str]) -> bytes:
    """Labels as they are kept: equal ones are equal bytes, however they were written."""
    return canonical_json(dict(labels))


def stored_labels(data: bytes) -> dict[str, str]:
    """What `to_labels` wrote."""
    found: dict[str, str] = json.loads(data)
    return found


# ── the verdict ──────────────────────────────────────────────────────────────


def verdict(
    serving: Mapping[str, Answered],
    candidate: Mapping[str, Answered],
    bare: Mapping[str, Answered] | None,
    labels: Mapping[str, str],
    *,
    suite: Verdict,
    policy: Policy,
    alpha: float,
) -> Verdict:
    """What the gate says of the candidate on the pool; ``labels`` are to all of `questions`."""
    gate = gate_of(policy)
    assert gate is not None and policy.pool is not None
    asked = questions(serving, candidate, bare)
    right = {one.item: {text for letter, text in one.answers.items() if letter in labels[one.item]} for one in asked}

    def records(answers: Mapping[str, Answered], items: Sequence[str]) -> list[Record]:
        return [_record(gate, answers[item], right.get(item)) for item in items]

    items = list(candidate)
    return judge_pool(
        records(candidate, items),
        records(serving, items),
        records(bare, items[:VALUED]) if bare is not None else (),
        suite=suite,
        gate=gate,
        pool=policy.pool,
        policy=policy,
        alpha=alpha,
    )


def without_labels(
    serving: Mapping[str, Answered],
    candidate: Mapping[str, Answered],
    bare: Mapping[str, Answered] | None,
    *,
    suite: Verdict,
    policy: Policy,
    alpha: float,
) -> Verdict | None:
    """The verdict where no label can change whether it passes: with the worst it does, or with the best it does not."""
    asked = questions(serving, candidate, bare)

    def with_right(*, own: bool) -> Verdict:
        """Of every question the candidate's answer is right, or all others are."""
        labels = {
            one.item: "".join(x for x, text in one.answers.items() if (text == _text(candidate[one.item])) is own)
            for one in asked
        }
        return verdict(serving, candidate, bare, labels, suite=suite, policy=policy, alpha=alpha)

    worst, best = with_right(own=False), with_right(own=True)
    if worst.zone is Zone.PASS:
        return worst
    return best if best.zone is not Zone.PASS else None


def _record(gate: Gate, one: Answered, right: set[str] | None) -> Record:
    """Where nobody was asked, answers are the same, and count as right: only differences do."""
    value = int(right is None or _text(one) in right)
    return Record(item=one.item, split="gate", metrics={gate.metric: value}, parsed=one.parsed)


def _text(one: Answered) -> str:
    return one.answer.strip()
