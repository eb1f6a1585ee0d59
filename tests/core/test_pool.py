"""The pool: equal answers count for nothing, labels for what differs, and one look more opens no more often falsely."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rebase import pool as simulated
from registry.core.errors import BadLabel, BadRecords, LabelsContradict, LabelsForeign, LabelsMissing
from registry.core.gate import Criterion, Name, Verdict, Zone, paired_interval, shares
from registry.core.policy import Gate, Margin, Policy
from registry.core.pool import (
    POOL,
    VALUED,
    Answered,
    asks_bare,
    gate_of,
    input_id,
    parse_answers,
    parse_labels,
    parse_paper,
    problem,
    questions,
    settles,
    to_jsonl,
    to_paper,
    verdict,
    without_labels,
)
from registry.core.rows import input_of, parse_input, parse_row

GATE = Gate(suite="team/suite", metric="exact-match", margin=Margin(value=0.02))
POLICY = Policy(gates=(GATE,), pool="team/inputs")
LABELS = {"campaign": "c1", "adapter": "team/bot"}


def answers(texts: list[str]) -> dict[str, Answered]:
    rows = [({"prompt": f"question {n}"}, text) for n, text in enumerate(texts)]
    made = [Answered(item=input_id(row), input=row, answer=text, parsed=True) for row, text in rows]
    return {one.item: one for one in sorted(made, key=lambda one: one.item)}


def told(name: Name, zone: Zone, **changes: Any) -> Criterion:
    known: dict[str, Any] = {
        "name": name, "suite": "team/suite", "metric": "exact-match", "estimate": 0.0, "lower": -0.1, "upper": 0.1,
        "bound": -0.02, "zone": zone, "n": 100,
    }  # fmt: skip
    return Criterion.model_validate(known | changes)


def suite(*open_: Name, also: tuple[Criterion, ...] = ()) -> Verdict:
    """An unresolved verdict of the suite, in which all but the named criteria passed."""
    names: tuple[Name, ...] = ("not-worse", "adds-value", "negative-flips")
    criteria = [told(name, Zone.UNRESOLVED if name in open_ else Zone.PASS) for name in names]
    return Verdict(zone=Zone.UNRESOLVED, criteria=(*criteria, *also), reason="it cannot tell", alpha=0.01)


def asked(serving: list[str], candidate: list[str], right: list[str], **more: Any) -> Verdict:
    """The verdict where a person knows what is right."""
    one, two = answers(serving), answers(candidate)
    truth = {item: answer.answer for item, answer in answers(right).items()}
    labels = {
        question.item: "".join(k for k, text in question.answers.items() if text == truth[question.item])
        for question in questions(one, two)
    }
    given: dict[str, Any] = {"suite": suite("not-worse"), "policy": POLICY, "alpha": 0.005}
    return verdict(one, two, None, labels, **(given | more))


# ── what is asked ────────────────────────────────────────────────────────────


def test_only_answers_that_differ_are_asked_about() -> None:
    found = questions(answers(["yes", "no", " same\n"]), answers(["yes", "maybe", "same"]))
    assert [set(one.answers.values()) for one in found] == [{"no", "maybe"}]


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=30), st.lists(st.sampled_from("xyz"), min_size=30))
def test_the_file_is_the_same_whoever_said_which(one: list[str], other: list[str]) -> None:
    ours, theirs = answers(one), answers(other[: len(one)])
    assert to_paper(questions(ours, theirs)) == to_paper(questions(theirs, ours))


def test_the_bare_base_is_asked_about_on_the_first_inputs_alone() -> None:
    many = VALUED + 200
    same, bare = answers(["a"] * many), answers(["b"] * many)
    found = questions(same, same, bare)
    assert [one.item for one in found] == list(same)[:VALUED]
    assert not questions(same, same)


def test_a_third_answer_is_a_third_letter() -> None:
    [found] = questions(answers(["one"]), answers(["two"]), answers(["three"]))
    assert sorted(found.answers) == ["a", "b", "c"]
    assert set(found.answers.values()) == {"one", "two", "three"}


# ── labels ───────────────────────────────────────────────────────────────────


def paper() -> dict[str, dict[str, str]]:
    return parse_paper(to_paper(questions(answers(["x", "x", "s"]), answers(["y", "y", "s"]))))


def labelled(rows: list[dict[str, Any]]) -> dict[str, str]:
    body = "\n\n".join(json.dumps(row) for row in rows)
    return parse_labels(body.encode(), paper(), **LABELS)


@pytest.mark.parametrize(
    ("right", "letters"),
    [("a", "a"), ("b a", "ab"), ("a,b", "ab"), (["b"], "b"), ("none", ""), ([], ""), ("all", "ab"), ("both", "ab")],
)
def test_labels_may_be_written_in_several_ways(right: object, letters: str) -> None:
    rows: list[dict[str, Any]] = [{"item": item, "right": right} for item in paper()]
    assert set(labelled(rows).values()) == {letters}


@pytest.mark.parametrize("right", ["c", "x", 1, True, {"a": 1}, ["a", 1], "a none"])
def test_what_is_no_letter_of_an_answer_is_refused_with_what_is_allowed(right: object) -> None:
    with pytest.raises(BadLabel, match=r'Line 1 of the labels is wrong: .*"a", "b", several of them'):
        labelled([{"item": item, "right": right} for item in paper()])


def test_labels_must_be_complete_of_this_file_and_of_one_mind() -> None:
    first, second = paper()
    with pytest.raises(LabelsMissing, match=f"1 of the 2 .*{second}"):
        labelled([{"item": first, "right": "a"}, {"item": second, "right": None}])
    with pytest.raises(LabelsForeign, match="Line 1"):
        labelled([{"item": "0" * 16, "right": "a"}])
    swapped = {"a": paper()[first]["b"], "b": paper()[first]["a"]}
    with pytest.raises(LabelsForeign):
        labelled([{"item": first, "right": "a", "answers": swapped}])
    with pytest.raises(LabelsContradict, match="'a' and 'b'"):
        labelled([{"item": first, "right": "a"}, {"item": second, "right": "a"}, {"item": first, "right": "b"}])
    for line in (b"{", b"[]", b'{"right": "a"}'):
        with pytest.raises(BadLabel):
            parse_labels(line, paper(), **LABELS)


def test_a_line_that_is_there_twice_alike_is_one_label() -> None:
    first, second = paper()
    said: list[tuple[str, object]] = [(first, "a"), (first, ["a"]), (second, "none")]
    rows = [{"item": item, "right": right} for item, right in said]
    assert labelled(rows) == {first: "a", second: ""}


# ── answers as they travel ───────────────────────────────────────────────────


def test_answers_survive_their_file_and_what_is_none_is_refused() -> None:
    made = answers(["x", "y", "ü\n"])
    assert parse_answers(to_jsonl(list(made.values()))) == made
    line = to_jsonl([next(iter(made.values()))])
    for bad in (b"", b"{}\n", line + line, line.replace(b"question", b"another")):
        with pytest.raises(BadRecords):
            parse_answers(bad)


def test_answers_to_chats_survive_their_file_too() -> None:
    row = parse_row(
        b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}', "f", 1
    )
    one = Answered(item=input_id(row), input=input_of(row), answer="4")
    assert parse_answers(to_jsonl([one])) == {one.item: one}
    with pytest.raises(BadRecords):
        parse_answers(to_jsonl([one]).replace(b"2+2", b"2+3"))


def test_an_input_is_what_a_row_asks_whatever_its_answer() -> None:
    one = parse_row(b'{"prompt": "2+2=", "completion": "4", "references": ["four"]}', "f", 1)
    other = parse_input(b'{"prompt": "2+2="}', "f", 1)
    assert input_id(one) == input_id(other)
    chat = parse_row(
        b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}', "f", 1
    )
    assert input_id(chat) == input_id(chat | {"messages": [chat["messages"][0], {"role": "assistant", "content": "5"}]})
    assert input_id(parse_input(b'{"prompt": "2+2=", "choices": ["3", "4"]}', "f", 1)) != input_id(other)


# ── the verdict ──────────────────────────────────────────────────────────────


def test_the_difference_is_that_on_all_inputs_and_its_interval_the_gates_own() -> None:
    right = ["yes"] * 500
    serving, candidate = ["no"] * 3 + right[3:], right[:492] + ["no"] * 8
    found = asked(serving, candidate, right)
    judged = found.criteria[0]
    assert (judged.name, judged.n, judged.suite) == ("not-worse", 500, "team/inputs")
    assert judged.estimate == pytest.approx((3 - 8) / 500)
    assert (judged.lower, judged.upper) == paired_interval(3, 8, 500, 0.005)
    assert found.criteria[2].name == "negative-flips"
    assert found.criteria[2].estimate == pytest.approx(8 / 500)


def test_what_the_suite_passed_stands_and_what_it_did_not_is_decided_anew() -> None:
    other = told("not-worse", Zone.PASS, suite="team/other")
    found = asked(["x"] * 900, ["x"] * 900, ["x"] * 900, suite=suite("not-worse", also=(other,)))
    assert found.zone is Zone.PASS
    assert [(one.name, one.suite) for one in found.criteria] == [
        ("not-worse", "team/inputs"), ("adds-value", "team/suite"), ("negative-flips", "team/inputs"),
        ("not-worse", "team/other"),
    ]  # fmt: skip


def test_the_value_over_the_bare_base_is_decided_on_its_part_of_the_inputs() -> None:
    same, bare = answers(["x"] * 900), answers(["x"] * 450 + ["y"] * 450)
    asked_ = questions(same, same, bare)
    opened = suite("not-worse", "adds-value")
    for right, zone in (("x", Zone.PASS), ("y", Zone.FAIL)):
        labels = {one.item: "".join(k for k, text in one.answers.items() if text == right) for one in asked_}
        found = verdict(same, same, bare, labels, suite=opened, policy=POLICY, alpha=0.005)
        added = next(one for one in found.criteria if one.name == "adds-value")
        assert (added.n, added.suite, added.zone) == (VALUED, "team/inputs", zone)
        assert found.zone is zone


def test_nobody_is_asked_what_changes_nothing() -> None:
    def settled(differ: int, n: int = 900) -> Zone | None:
        one, two = answers(["x"] * n), answers(["y"] * differ + ["x"] * (n - differ))
        found = without_labels(one, two, None, suite=suite("not-worse"), policy=POLICY, alpha=0.005)
        return found.zone if found else None

    assert settled(0) is Zone.PASS
    assert settled(2) is Zone.PASS  # both lost are less than the margin
    assert settled(60) is None
    assert settled(0, n=100) is Zone.UNRESOLVED  # too few inputs, whatever is right


def test_a_pool_helps_where_nothing_else_stands_in_the_way() -> None:
    assert settles(suite("not-worse"), GATE)
    assert settles(suite("adds-value", "negative-flips"), GATE)
    assert not settles(suite("not-worse", also=(told("guard", Zone.UNRESOLVED, suite="team/general"),)), GATE)
    assert not settles(suite("not-worse", also=(told("not-worse", Zone.UNRESOLVED, suite="team/other"),)), GATE)
    assert not settles(suite().model_copy(update={"zone": Zone.FAIL}), GATE)
    assert asks_bare(suite("adds-value"), GATE)
    assert not asks_bare(suite("not-worse"), GATE)


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (("likelihood",), "equal texts prove nothing"),
        (("rouge-l", "custom:mine"), "equal texts prove nothing"),
        (("lm-eval:exact_match",), "lm-eval makes its questions"),
        (("exact-match", "accuracy"), "exactly one"),
        ((), "no suite gates it"),
        (("exact-match",), None),
        (("custom-binary:mine", "likelihood"), None),
    ],
)
def test_a_pool_decides_for_one_metric_by_which_an_answer_is_right_or_wrong(
    metrics: tuple[str, ...], says: str | None
) -> None:
    gates = tuple(GATE.model_copy(update={"metric": metric}) for metric in metrics)
    policy = POLICY.model_copy(update={"gates": gates})
    reason = problem(policy)
    assert (reason is None) == (says is None) == (gate_of(policy) is not None)
    assert says is None or (reason is not None and says in reason)


# ── the error ────────────────────────────────────────────────────────────────


def test_a_pool_is_one_look_more_and_all_looks_share_alpha() -> None:
    looks = shares(0.02, (*Policy().tiers, POOL))
    assert looks == {"carry": 0.01, "warm-start": 0.02 / 6, "retrain": 0.02 / 6, "pool": 0.02 / 6}
    assert sum(looks.values()) == pytest.approx(0.02)


def test_a_candidate_one_margin_worse_passes_suite_and_pool_no_more_often_than_allowed() -> None:
    """Fewer campaigns than `benchmarks.rebase.pool` has; with its labels as they are in truth."""
    found = simulated.simulate(simulated.Cell(600, 0.02, -simulated.MARGIN), campaigns=400)
    assert found.met
    assert found.asked > 0.9


def test_a_candidate_as_good_passes_far_more_often_with_a_pool() -> None:
    found = simulated.simulate(simulated.Cell(2000, 0.01, 0.0), campaigns=100)
    assert found.opened > found.without + 0.3
    assert 10 < found.labels < 30
