import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.digest import Digest
from registry.core.errors import BadConfig, BadDataset, ScoreNotANumber
from registry.core.manifest import canonical_json
from registry.core.records import Record, parse_records, split_of, summary, to_jsonl
from tests.workers import factories
from workers.compute import evaluate as module
from workers.compute import panel
from workers.compute.data import Row
from workers.compute.evaluate import Suite, evaluate, has_form
from workers.compute.finetune import finetune
from workers.compute.metrics import accuracy, exact_match, mean
from workers.compute.panel import BARE, Panel, Text

TOKENIZER = factories.tokenizer()


def score(row: dict[str, Any], *metrics: Any) -> Record:
    model = factories.llama()
    suite = Suite([Row(row, "x.jsonl", 1)], metrics or None, max_new_tokens=4)
    return evaluate(model, TOKENIZER, suite, {})[BARE][0]


def same(some: Sequence[Record], others: Sequence[Record]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.model_copy(update={"metrics": other.metrics}) == other
        assert one.metrics == pytest.approx(other.metrics, abs=1e-5)


def test_many_adapters_in_one_pass_score_as_in_passes_of_their_own() -> None:
    model = factories.llama()
    suite = Suite([*factories.choices(12), *factories.rows(12)])
    adapters = {str(seed): factories.random_adapter(model, seed, rank=2 + seed) for seed in range(3)}
    together = evaluate(model, TOKENIZER, suite, adapters)
    assert list(together) == [BARE, "0", "1", "2"]
    for name, adapter in adapters.items():
        same(together[name], evaluate(model, TOKENIZER, suite, {name: adapter}, bare=False)[name])
    same(together[BARE], evaluate(model, TOKENIZER, suite, {})[BARE])
    assert len({mean(records, "likelihood") for records in together.values()}) == 4


def test_a_row_scores_the_same_in_any_company() -> None:
    model, rows = factories.llama(), [*factories.choices(8), *factories.rows(8)]
    together = evaluate(model, TOKENIZER, Suite(rows), {})[BARE]
    for row, record in zip(rows, together, strict=True):
        alone = evaluate(model, TOKENIZER, Suite([row]), {})[BARE][0]
        assert alone.item == record.item
        assert alone.metrics == pytest.approx(record.metrics, abs=1e-5)


@pytest.mark.parametrize("rows", [factories.rows(2), factories.choices(4)], ids=["written", "choices"])
def test_a_score_that_is_no_number_is_refused_with_its_item(rows: list[Row]) -> None:
    model = factories.llama()
    adapter = factories.random_adapter(model)
    patches = {name: replace(patch, b_OR=patch.b_OR * float("nan")) for name, patch in adapter.patches.items()}
    with pytest.raises(ScoreNotANumber, match=r"the model gives (nan|-inf)"):
        evaluate(model, TOKENIZER, Suite(rows), {"0": replace(adapter, patches=patches)})


def test_likelihood_is_nat_per_utf8_byte_of_the_completion_without_its_end() -> None:
    found = score({"prompt": "ab", "completion": "çd"}).metrics
    ids = TOKENIZER("abçd")["input_ids"]
    log_p = factories.llama()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = sum(float(log_p[i - 1, ids[i]]) for i in range(3, 6)) / 3
    assert found == {"likelihood": pytest.approx(wanted, rel=1e-5)}


def test_single_token_choices_score_as_if_each_were_run() -> None:
    short = {"prompt": "x", "choices": ["a", "b", "c"], "answer": 1}
    found = score(short).metrics
    alone = [score({"prompt": "x", "completion": choice}).metrics["likelihood"] for choice in "abc"]
    assert found["likelihood"] == pytest.approx(alone[1], abs=1e-5)
    assert found["accuracy"] == int(max(alone) == alone[1])


def test_the_likeliest_choice_by_byte_is_the_answer() -> None:
    assert accuracy([-4.0, -3.0], ["four", "x"], 0) == 1
    assert accuracy([-4.0, -3.0], ["four", "x"], 1) == 0


def test_an_exact_match_ignores_spaces_at_the_ends_only() -> None:
    assert exact_match(" 4 2\n", ["5", "4 2"]) == 1
    assert exact_match("42", ["4 2"]) == 0


def test_a_learnt_completion_is_generated_exactly_and_ends_by_itself() -> None:
    model = factories.llama()
    rows = [Row({"prompt": f"{word}:", "completion": word[::-1]}, "x.jsonl", 1) for word in ("abc", "xyz")]
    recipe = factories.recipe(steps=80, targets=("all-linear",), batch_tokens=200, schedule="constant")
    adapter = finetune(model, TOKENIZER, recipe, rows).adapter
    suite = Suite(rows, ("exact-match", "likelihood"), max_new_tokens=8)
    found = evaluate(model, TOKENIZER, suite, {"trained": adapter})
    assert [(record.output, record.parsed, record.metrics["exact-match"]) for record in found["trained"]] == [
        ("cba", True, 1),
        ("zyx", True, 1),
    ]
    assert all(record.metrics["exact-match"] == 0 for record in found[BARE])


def test_records_survive_their_file_and_know_their_split() -> None:
    records = evaluate(factories.llama(), TOKENIZER, Suite(factories.choices(20)), {})[BARE]
    assert sorted(parse_records(to_jsonl(records)), key=str) == sorted(records, key=str)
    assert all(record.split == split_of(record.item) for record in records)
    assert sum(found["n"] for found in summary(records)["accuracy"].values()) == 20


def test_a_split_holds_its_own_items_only() -> None:
    suite = Suite(factories.choices(60))
    parts = [suite.only(split).rows for split in ("calibration", "gate", "report")]
    assert sum(map(len, parts)) == 60
    assert len(parts[1]) > len(parts[0]) > 0
    some = suite.only("gate", 5).rows
    assert len(some) == 5
    assert all(row in parts[1] for row in some)
    assert suite.only("gate", 99).rows == parts[1]
    turned = Suite(suite.rows[::-1]).only("gate", 5).rows
    assert turned == some[::-1], "which ones follows from their hashes"


def test_a_metric_that_no_row_can_have_is_refused_with_the_row() -> None:
    with pytest.raises(BadDataset, match=r"'x.jsonl', line 1: none of the suite's metrics accuracy applies"):
        score({"prompt": "a", "completion": "b"}, "accuracy")


def test_a_suite_is_read_with_its_spec(tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text(json.dumps(factories.choices(1)[0].value))
    assert Suite.read(tmp_path).metrics is None
    assert Suite.read(tmp_path).main_metric() == "accuracy"
    (tmp_path / "suite.json").write_text('{"metrics": ["likelihood"], "max_new_tokens": 7}')
    suite = Suite.read(tmp_path)
    assert (suite.metrics, suite.max_new_tokens, suite.main_metric()) == (("likelihood",), 7, "likelihood")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ('{"metrics": ["beauty"]}', "allowed are likelihood, accuracy, exact-match"),
        ('{"metrics": "likelihood"}', "allowed are likelihood, accuracy, exact-match"),
        ('{"metrics": [["f1"]]}', "allowed are likelihood, accuracy, exact-match"),
        ('{"metrics": ["custom:beauty"]}', "no package here has the metric custom:beauty, an entry point 'beauty'"),
        ('{"form": "xml"}', "allowed are 'json', and 'regex:'"),
        ('{"form": "regex:("}', "the expression does not compile: missing"),
        ('{"metrics": []}', "allowed are"),
        ('{"max_new_tokens": 0}', "a whole number above 0"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"metrics": ["lm-eval:acc"]}', "lm-eval:… is what its tasks measure"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(spec: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text(json.dumps(factories.choices(1)[0].value))
    (tmp_path / "suite.json").write_text(spec)
    with pytest.raises(BadConfig, match=reason):
        Suite.read(tmp_path)


def test_the_harness_digest_changes_with_what_changes_a_score() -> None:
    rows = factories.choices(2)
    suites = [
        Suite(rows), Suite(rows, ("likelihood",)), Suite(rows, None, max_new_tokens=3), Suite(rows, ("bleu",)),
        Suite(rows, ("bleu",), form="json"),
    ]  # fmt: skip
    digests = {str(suite.harness(precision)) for suite in suites for precision in ("fp32", "bf16")}
    assert len(digests) == 10
    assert Suite(rows).harness("fp32") == Suite(factories.choices(5)).harness("fp32")


def test_the_harness_of_what_generates_nothing_is_the_one_of_records_that_are_there() -> None:
    was = {"harness": 1, "metrics": None, "max_new_tokens": 64, "precision": "fp32", "max_length": 2048}
    assert Suite(factories.rows(1)).harness("fp32") == Digest.sha256(canonical_json(was))


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
def test_prompts_of_any_length_generate_together_what_each_generates_alone(make: Callable[[], Any]) -> None:
    model = make()
    rows = [Row({"prompt": "ab" * size, "completion": "x"}, "x.jsonl", size) for size in (1, 9, 2, 5, 14)]
    adapters = {str(seed): factories.random_adapter(model, seed, targets=("all-linear",)) for seed in range(2)}
    suite = Suite(rows, ("chrf",), max_new_tokens=12)
    together = evaluate(model, TOKENIZER, suite, adapters)
    for name, records in together.items():
        for row, record in zip(rows, records, strict=True):
            own = {name: adapters[name]} if name in adapters else {}
            alone = evaluate(model, TOKENIZER, replace(suite, rows=[row]), own, bare=not own)
            assert alone[name][0] == record
    assert len({record.output for records in together.values() for record in records}) > 5


def test_a_model_that_would_read_padding_is_asked_for_prompts_of_one_length_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = factories.llama()
    rows = [Row({"prompt": "a" * size, "completion": "x"}, "x.jsonl", size) for size in (2, 5, 2)]
    suite = Suite(rows, ("exact-match",), max_new_tokens=3)
    padded = evaluate(model, TOKENIZER, suite, {})[BARE]
    monkeypatch.setattr(panel, "takes_padding", lambda _: False)
    widths: set[int] = set()
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: widths.add(inputs[0].shape[1]))
    assert evaluate(model, TOKENIZER, suite, {})[BARE] == padded
    handle.remove()
    assert {3, 6} <= widths  # prompts with their first token


def test_as_many_rows_are_generated_at_once_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, until: Any, how: dict[str, Any]) -> list[Text]:
        asked.append((len(prompts), max(map(len, prompts)) + how["max_new_tokens"]))
        return [Text(str(len(prompt)), True) for prompt in prompts]

    monkeypatch.setattr(panel, "_generate", generate)
    monkeypatch.setattr(panel, "_GENERATED", 8)
    monkeypatch.setattr(panel, "_GENERATED_TOKENS", 100)
    model = factories.llama()
    adapters = {str(seed): factories.random_adapter(model, seed, targets=("all-linear",)) for seed in range(3)}
    jury = Panel(model, TOKENIZER, adapters)
    prompts = [[1] * size for size in [2, 3, 4] * 5 + [40, 60, 90, 95]]
    with jury.seated():
        texts = jury.continuations(prompts, 5)
    assert texts.keys() == {BARE, *adapters}
    assert all([text.text for text in own] == [str(len(prompt)) for prompt in prompts] for own in texts.values())
    assert max(rows for rows, _ in asked) == 8
    assert all(rows == 1 or rows * width <= 100 for rows, width in asked)


def test_a_long_prompt_is_read_for_fewer_adapters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = factories.llama()
    suite = Suite([Row({"prompt": "a" * 20, "completion": "x"}, "x.jsonl", 1)], ("f1",), max_new_tokens=3)
    adapters = {str(seed): factories.random_adapter(model, seed) for seed in range(3)}
    whole = evaluate(model, TOKENIZER, suite, adapters)
    monkeypatch.setattr(panel, "_GENERATED_TOKENS", 45)
    sizes: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    assert evaluate(model, TOKENIZER, suite, adapters) == whole
    handle.remove()
    assert max(sizes) <= 45


def test_a_prompt_that_leaves_no_room_is_cut_on_its_left() -> None:
    model = factories.gpt2()
    limit = model.config.max_position_embeddings
    long = Row({"prompt": "a" * limit + "b", "completion": "x"}, "x.jsonl", 1)
    short = Row({"prompt": "a" * (limit - 9) + "b", "completion": "x"}, "x.jsonl", 1)
    outputs = [
        evaluate(model, TOKENIZER, Suite([row], ("f1",), max_new_tokens=8), {})[BARE][0].output
        for row in (long, short)
    ]
    assert outputs[0] == outputs[1]


def test_an_output_is_compared_with_every_reference() -> None:
    row = {"prompt": "ab", "completion": "zzz"}
    output = score(row, "exact-match").output
    assert output is not None and score(row, "exact-match").metrics["exact-match"] == 0
    known = {**row, "references": ["zz", output]}
    found = score(known, "exact-match", "f1", "bleu", "chrf", "rouge-l", "likelihood").metrics
    assert found["exact-match"] == found["chrf"] == 1
    assert found["likelihood"] == pytest.approx(score(row).metrics["likelihood"])


def test_a_row_is_run_for_likelihood_only_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "_answers", None)  # whoever calls it, fails
    assert score({"prompt": "ab", "completion": "c"}, "chrf").metrics.keys() == {"chrf"}


@pytest.mark.parametrize(
    ("form", "output", "has"),
    [
        ("json", ' {"a": [1]}\n', True),
        ("json", '{"a": [1', False),
        ("json", "", False),
        (r"regex:\d{2,}|none", " 42 ", True),
        (r"regex:\d{2,}|none", "42 or so", False),
    ],
)
def test_an_output_has_the_form_as_a_whole_or_not_at_all(form: str, output: str, has: bool) -> None:
    assert has_form(output, form) is has


def test_parsed_says_whether_an_output_has_the_form_of_the_suite() -> None:
    rows = [Row({"prompt": "ab", "completion": "c"}, "x.jsonl", 1)]
    for form, parsed in ((r"regex:(?s).*", True), ("regex:never", False)):
        found = evaluate(factories.llama(), TOKENIZER, Suite(rows, ("f1",), 4, form), {})[BARE][0]
        assert found.parsed is parsed
    assert evaluate(factories.llama(), TOKENIZER, Suite(rows, ("likelihood",), 4, "json"), {})[BARE][0].parsed is None


def test_an_expression_that_does_not_end_is_refused_in_place_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.02)
    with pytest.raises(BadConfig, match="avoid repeats within repeats"):
        has_form("a" * 60, "regex:(a|aa)+[bc]")


def test_a_long_row_is_answered_for_fewer_adapters_at_once_with_the_same_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, suite = factories.llama(), Suite([*factories.rows(3), *factories.choices(3)])
    adapters = {str(seed): factories.random_adapter(model, seed=seed) for seed in range(4)}
    whole = evaluate(model, TOKENIZER, suite, adapters)
    monkeypatch.setattr(panel, "_BATCH_TOKENS", 24)
    sizes: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    narrow = evaluate(model, TOKENIZER, suite, adapters)
    handle.remove()
    assert max(sizes) <= 24
    for name, records in whole.items():
        for one, other in zip(records, narrow[name], strict=True):
            assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
