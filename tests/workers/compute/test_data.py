import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.core.errors import BadDataset, UnusableDataset
from tests.workers import factories
from workers.compute import data
from workers.compute.data import Example, Row, batches, encoded, pack, parse_rows, read_rows, tokenize

TOKENIZER = factories.tokenizer()


def example(prompt: str, completion: str, max_length: int = 64) -> Example:
    return tokenize(TOKENIZER, Row({"prompt": prompt, "completion": completion}, "x.jsonl", 1), max_length)


texts = st.text(min_size=1, max_size=20)


@settings(deadline=None)
@given(texts, texts)
def test_only_the_completion_and_its_end_are_learnt(prompt: str, completion: str) -> None:
    made = example(prompt, completion, max_length=256)
    packed = pack([[made]])
    assert TOKENIZER.decode(packed.targets_N.tolist()) == completion + "</s>"
    assert packed.ids_BT[0, 0] == TOKENIZER.bos_token_id
    assert packed.asked_BT.sum() == len(completion.encode()) + 1


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_a_batch_asks_for_the_same_tokens_as_its_rows_alone(pairs: list[tuple[str, str]]) -> None:
    made = [example(prompt, completion, max_length=256) for prompt, completion in pairs]
    packed = pack([made])
    apart = [token for one in made for token in pack([[one]]).targets_N.tolist()]
    assert sorted(packed.targets_N.tolist()) == sorted(apart)
    assert packed.weights_N.sum().item() == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), min_size=1, max_size=3))
def test_batches_that_are_packed_together_keep_their_own_rows_and_tokens(
    many: list[list[tuple[str, str]]],
) -> None:
    made = [[example(prompt, completion, max_length=256) for prompt, completion in batch] for batch in many]
    packed = pack(made)
    assert sum(packed.rows) == len(packed.ids_BT)
    for owner, batch in enumerate(made):
        mine = packed.owner_N == owner
        assert sorted(packed.targets_N[mine].tolist()) == sorted(pack([batch]).targets_N.tolist())
        assert packed.weights_N[mine].sum().item() == pytest.approx(1)


def test_no_packed_sequence_looks_into_another() -> None:
    model = factories.llama()
    made = [example("a" * size, "b" * (9 - size)) for size in (1, 3, 5, 8)]
    packed = pack([made])
    assert packed.ids_BT.shape == (1, sum(len(one.ids) for one in made))
    together = model(input_ids=packed.ids_BT, position_ids=packed.positions_BT, use_cache=False).logits[0]
    ordered = sorted(made, key=lambda one: -len(one.ids))
    alone = torch.cat([model(input_ids=torch.tensor([one.ids])).logits[0] for one in ordered])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_without_packing_every_sequence_has_a_row_of_its_own() -> None:
    made = [example("a" * size, "b" * (9 - size)) for size in (1, 3, 8)]
    apart = pack([made], together=False)
    assert apart.rows == (3,)
    assert torch.equal(apart.ids_BT[2, : len(made[2].ids)], torch.tensor(made[2].ids))


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_bytes_are_rows_or_a_refusal_that_names_a_line(data: bytes) -> None:
    lines: list[int] = []
    try:
        rows = parse_rows(data, "x.jsonl")
    except BadDataset as refusal:
        lines, rows = [refusal.line], []
    assert all(isinstance(row.value, dict) for row in rows)
    assert all(1 <= line <= data.count(b"\n") + 1 for line in lines)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "a"}', "expected the texts 'prompt' and 'completion'"),
        ('{"prompt": 1, "completion": "a"}', "expected the texts"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "two or more"),
        ('{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}', "by 'user'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "is empty"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two or more"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "none of them empty"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "'answer' is 2; allowed are 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "'answer' is true"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_number(line: str, reason: str) -> None:
    good = '{"prompt": "a", "completion": "b"}\n\n'
    with pytest.raises(BadDataset, match=r"'x.jsonl', line 3: ") as refusal:
        parse_rows((good + line).encode(), "x.jsonl")
    assert reason in refusal.value.reason


def test_a_completion_that_does_not_fit_is_refused_and_a_long_prompt_is_cut_on_its_left() -> None:
    with pytest.raises(BadDataset, match="the completion has 11 tokens; at most 10 fit"):
        example("p", "0123456789", max_length=11)
    made = example("abcdef", "0123456789", max_length=14)
    assert TOKENIZER.decode(made.ids) == "def0123456789</s>"


def test_an_empty_prompt_begins_with_the_first_token() -> None:
    assert example("", "a").prompt == (TOKENIZER.bos_token_id,)


def test_only_the_assistants_last_turn_of_a_conversation_is_learnt() -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = tokenize(TOKENIZER, Row({"messages": messages}, "x.jsonl", 1), 128)
    assert TOKENIZER.decode(made.prompt).endswith("hello</s>\n<|user|>2+2?</s>\n<|assistant|>")
    assert TOKENIZER.decode(made.ids[len(made.prompt) :]) == "4</s>"
    assert made.texts == ("4",)


def test_rows_of_every_form_are_the_same_together_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_AT_ONCE", 4)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    values: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b"}, {"messages": turns}, {"prompt": "", "completion": "c"},
        {"prompt": "which", "choices": ["one", "three"], "answer": 1}, {"messages": [*turns, *turns]},
        {"prompt": "d", "completion": "e"},
    ]  # fmt: skip
    rows = [Row(value, "x.jsonl", line) for line, value in enumerate(values, start=1)]
    together = encoded(TOKENIZER, rows)
    assert together == [one for row in rows for one in encoded(TOKENIZER, [row])]
    assert [one.row for one in together] == rows
    assert encoded(TOKENIZER, together) == together


def test_messages_without_a_chat_template_are_refused() -> None:
    tokenizer = factories.tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadDataset, match="no chat template"):
        tokenize(tokenizer, Row({"messages": messages}, "x.jsonl", 7), 64)


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    made = [example("p", str(i)) for i in range(10)]
    drawn = [one for batch in itertools.islice(batches(made, 4, seed=1), 20) for one in batch]
    first, second = drawn[:10], drawn[10:20]
    assert {one.texts for one in first} == {one.texts for one in second} == {one.texts for one in made}
    assert first != second


def test_a_batch_stays_within_its_tokens_and_holds_a_row_at_least() -> None:
    made = [example("p", "x" * length) for length in (1, 2, 3, 30)]
    for batch in itertools.islice(batches(made, 12, seed=0), 30):
        assert sum(len(one.ids) for one in batch) <= 12 or len(batch) == 1


def test_a_folder_gives_the_rows_of_all_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    assert [row.value["prompt"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableDataset, match=r"there is no .jsonl file"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UnusableDataset, match="there are no rows"):
        read_rows(tmp_path)
