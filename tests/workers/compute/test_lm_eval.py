import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from registry.core.errors import BadConfig, ToolMissing
from registry.core.records import Record, item_id
from tests.workers import factories
from workers.compute import evaluate as module
from workers.compute import lm_eval, panel
from workers.compute.evaluate import Suite, evaluate
from workers.compute.model import Model
from workers.compute.panel import BARE

TOKENIZER = factories.tokenizer()
CHOICES: dict[str, Any] = {
    "task": "parity", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{number}} is",
    "doc_to_choice": ["even", "odd"], "doc_to_target": "{{number % 2}}", "description": "Even or odd?\n",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}],
    "fewshot_split": "shots", "num_fewshot": 2,
}  # fmt: skip
LETTERS: dict[str, Any] = CHOICES | {
    "task": "letters", "doc_to_choice": "letters", "doc_to_target": "right", "target_delimiter": "",
}  # fmt: skip
LIKELY: dict[str, Any] = {
    "task": "sums", "output_type": "loglikelihood", "test_split": "test", "doc_to_text": "{{number}}+1=",
    "doc_to_target": "{{number + 1}}",
}  # fmt: skip
ROLLING: dict[str, Any] = {
    "task": "texts", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
    "doc_to_target": "text",
}  # fmt: skip
WRITTEN: dict[str, Any] = {
    "task": "written", "output_type": "generate_until", "validation_split": "test", "doc_to_text": "{{number}}:",
    "doc_to_target": "{{number}}", "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 12},
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
        {"name": "all", "filter": [{"function": "take_first"}]},
    ],
}  # fmt: skip
EVERY = [CHOICES, LETTERS, LIKELY, ROLLING, WRITTEN]


def row(number: int, task: str) -> dict[str, Any]:
    found: dict[str, Any] = {"number": number, "of": task, "text": f"{task} " * number * 4 + "end"}
    return found | {"letters": ["e", "o", "x"], "right": number % 2}


def written(folder: Path, *tasks: dict[str, Any], count: int = 6, **spec: Any) -> Path:
    """A folder of tasks as lm-eval has them: YAML and JSONL side by side; ours reads it by its suite.json."""
    for said in tasks:
        name = said["task"]
        lines = [json.dumps(row(number, name)) for number in range(1, count + 1)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        files = {"test": f"{name}.jsonl"}
        if "fewshot_split" in said:
            (folder / f"{name}-shots.jsonl").write_text("\n".join(json.dumps(row(n, "shots")) for n in range(20, 26)))
            files |= {"shots": f"{name}-shots.jsonl"}
        config = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **said}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    tasks_spec = {"tasks": [f"{said['task']}.yaml" for said in tasks]}
    (folder / "suite.json").write_text(json.dumps({"lm_eval": tasks_spec, **spec}))
    return folder


def by_lm_eval(model: Model, folder: Path, name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The samples of lm-eval's own model on the same folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    theirs = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=1, max_length=limit)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    told = simple_evaluate(model=theirs, tasks=[name], task_manager=manager, bootstrap_iters=0)
    found: list[Any] = told["samples"][name]
    return found


def by_metric(samples: list[Any]) -> list[dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            value, behind = sample[name], "" if sample["filter"] == "none" else f",{sample['filter']}"
            if isinstance(value, tuple):
                value = value[0] / value[1] / (math.log(2) if name == "bits_per_byte" else 1)
            found.setdefault(sample["doc_id"], {})[f"lm-eval:{name}{behind}"] = float(value)
    return [found[i] for i in range(len(found))]


@pytest.mark.filterwarnings("ignore")  # of lm-eval's own model and of the datasets library
@pytest.mark.parametrize("task", EVERY, ids=lambda task: task["task"])
@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
def test_a_task_scores_what_it_scores_with_the_model_of_lm_eval(
    make: Any, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    ours = evaluate(model, TOKENIZER, Suite.read(written(tmp_path, task)), {})[BARE]
    samples = by_lm_eval(model, tmp_path, task["task"], 256, monkeypatch)
    theirs = by_metric(samples)
    assert [record.metrics for record in ours] == [pytest.approx(scores, abs=1e-4) for scores in theirs]
    assert [record.item for record in ours] == [item_id(row(n, task["task"])) for n in range(1, 7)]
    if task is WRITTEN:
        assert [record.output for record in ours] == [sample["resps"][0][0] for sample in samples[:6]]


@pytest.mark.filterwarnings("ignore")
def test_what_is_longer_than_the_context_is_cut_and_rolled_as_lm_eval_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factories.llama()
    monkeypatch.setattr(panel, "MAX_LENGTH", 32)
    tasks: list[dict[str, Any]] = [ROLLING, {**CHOICES, "num_fewshot": 4}, WRITTEN | {"doc_to_text": "text"}]
    for task in tasks:
        folder = tmp_path / task["task"]
        folder.mkdir()
        ours = evaluate(model, TOKENIZER, Suite.read(written(folder, task)), {})[BARE]
        theirs = by_metric(by_lm_eval(model, folder, task["task"], 32, monkeypatch))
        assert [record.metrics for record in ours] == [pytest.approx(scores, abs=1e-4) for scores in theirs]


def test_many_adapters_are_asked_in_one_pass_and_score_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factories.llama()
    suite = Suite.read(written(tmp_path, *EVERY))
    adapters = {str(seed): factories.random_adapter(model, seed, rank=2 + seed) for seed in range(3)}
    passes: list[int] = []
    real = panel._answers

    def spied(model: Model, rows: Any, many: int, *rest: Any) -> Any:
        passes.append(many)
        return real(model, rows, many, *rest)

    monkeypatch.setattr(panel, "_answers", spied)
    together = evaluate(model, TOKENIZER, suite, adapters)
    assert set(passes) == {4}, "a pass is for all members"
    for name, adapter in adapters.items():
        alone = evaluate(model, TOKENIZER, suite, {name: adapter}, bare=False)[name]
        for one, other in zip(together[name], alone, strict=True):
            assert one.model_copy(update={"metrics": other.metrics}) == other
            assert one.metrics == pytest.approx(other.metrics, abs=1e-4)
    assert len({_total(records) for records in together.values()}) == 4


def _total(records: list[Record]) -> float:
    return sum(record.metrics.get("lm-eval:byte_perplexity", 0.0) for record in records)


def test_choices_of_one_token_share_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = panel.Panel.log_probabilities

    def spied(self: panel.Panel, queries: Any, *, greedy: bool = False) -> Any:
        asked.append(len(queries))
        return real(self, queries, greedy=greedy)

    monkeypatch.setattr(panel.Panel, "log_probabilities", spied)
    task = {key: value for key, value in LETTERS.items() if key != "metric_list"}
    evaluate(factories.llama(), TOKENIZER, Suite.read(written(tmp_path, task)), {})
    assert asked == [6]


def test_a_split_and_the_metrics_asked_for_are_all_that_is_scored(tmp_path: Path) -> None:
    suite = Suite.read(written(tmp_path, CHOICES, LIKELY, count=12, metrics=["lm-eval:acc"]))
    assert suite.main_metric() == "lm-eval:acc"
    gate = suite.only("gate")
    records = evaluate(factories.llama(), TOKENIZER, gate, {})[BARE]
    assert 0 < len(records) == len(gate.rows) < len(suite.rows) == 24
    assert {name for record in records for name in record.metrics} == {"lm-eval:acc"}


def test_outputs_come_to_an_end_by_the_texts_of_the_task_and_have_the_form_of_the_suite(tmp_path: Path) -> None:
    def parsed(**spec: Any) -> list[bool | None]:
        suite = Suite.read(written(tmp_path, WRITTEN, **spec))
        return [record.parsed for record in evaluate(factories.llama(), TOKENIZER, suite, {})[BARE]]

    outputs = evaluate(factories.llama(), TOKENIZER, Suite.read(written(tmp_path, WRITTEN)), {})[BARE]
    assert all("a" not in str(record.output) for record in outputs)
    assert parsed() == [len(str(record.output).encode()) < 12 for record in outputs]
    assert parsed(form="regex:(?s).*") == [True] * 6
    assert parsed(form="regex:never") == [False] * 6


def test_the_harness_knows_the_version_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite.read(written(tmp_path, LIKELY))
    before = suite.harness("fp32")
    monkeypatch.setattr(module.lm_eval, "version", lambda: "lm-eval 0.0")
    assert suite.harness("fp32") != before


def test_without_lm_eval_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise lm_eval.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(lm_eval.metadata, "version", missing)
    with pytest.raises(ToolMissing, match="lm-eval"):
        Suite.read(written(tmp_path, LIKELY))


def test_a_template_reaches_nothing_but_its_row(tmp_path: Path) -> None:
    reaching = "{{ number.__class__.__mro__[-1].__subclasses__() }}"
    suite = Suite.read(written(tmp_path, LIKELY | {"doc_to_text": reaching}))
    with pytest.raises(BadConfig, match=r"task 'sums'.*SecurityError"):
        evaluate(factories.llama(), TOKENIZER, suite, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        ({"doc_to_text": "{{"}, "TemplateSyntaxError"),
        ({"doc_to_target": ""}, "a continuation gives 0 tokens"),
        ({"doc_to_target": "{{'x' * 300}}"}, "gives 300 tokens; 1 to 256 are allowed"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_by_its_name(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    suite = Suite.read(written(tmp_path, LIKELY | change))
    with pytest.raises(BadConfig, match=reason):
        evaluate(factories.llama(), TOKENIZER, suite, {})


def test_metrics_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="with lm_eval, all are lm-eval:…"):
        Suite.read(written(tmp_path, LIKELY, metrics=["likelihood"]))
