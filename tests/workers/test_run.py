import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import BadRequest, LoractlError
from registry.core.recipes import (
    LEAST_ITEMS,
    TIERS,
    Answers,
    Compare,
    Evaluate,
    FineTune,
    FullFineTune,
    Merge,
    Rebase,
    inputs_of,
    recipe_digest,
)
from registry.core.records import item_id, parse_records, split_of
from registry.core.route import Signals, route
from tests.workers import factories
from workers.compute import snapshot
from workers.compute.bank import attached
from workers.compute.data import Row
from workers.compute.model import load
from workers.compute.rebase import starts
from workers.compute.weights import read_adapter, read_metadata, write_adapter
from workers.run import main, run


def silent(_: dict[str, Any]) -> None: ...


def dataset(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.value) + "\n" for row in rows))
    return folder


def adapter(folder: Path) -> Path:
    write_adapter(factories.random_adapter(factories.llama()), folder, base=factories.BASE, recipe="sha256:" + "0" * 64)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "base": factories.saved(factories.llama(), tmp_path / "base"),
        "old": factories.saved(factories.llama(), tmp_path / "old"),
        "adapter": adapter(tmp_path / "adapter"),
        "adapter.0": adapter(tmp_path / "adapter0"),
        "dataset.0": dataset(tmp_path / "dataset", factories.rows()),
        "suite": dataset(tmp_path / "suite", factories.choices(40)),
    }


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def command(out: Path, recipe: Any, folders: dict[str, Path], *options: str) -> list[str]:
    path = out.with_suffix(".json")
    path.write_text(recipe.model_dump_json())
    given = [part for role, folder in folders.items() for part in ("--in", f"{role}={folder}")]
    return [str(path), *given, "--out", str(out), *options]


def test_finetune_leaves_a_bound_adapter_and_its_loss_curve(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = factories.recipe(steps=5)
    seen: list[dict[str, Any]] = []
    returned = run(recipe, folders, tmp_path / "out", seen.append)
    found = result(tmp_path / "out")
    assert returned.dump() == found
    assert [point[0] for point in found["loss"]] == [progress["step"] for progress in seen] == [1, 2, 3, 4, 5]
    assert (found["kind"], found["steps"], found["precision"]) == ("finetune", 5, "fp32")
    assert found["learning_rate"] == recipe.learning_rate
    assert found["rows"] == {"trained": 24, "held_out": 0, "cut": 0, "dropped": 0, "max_length": 64}
    metadata = read_metadata(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert metadata["loractl.base"] == factories.BASE
    assert metadata["loractl.recipe"] == found["recipe"] == str(recipe_digest(recipe))


def test_a_long_loss_curve_is_thinned(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.run.CURVE_POINTS", 4)
    run(factories.recipe(steps=9), folders, tmp_path / "out", silent)
    assert [point[0] for point in result(tmp_path / "out")["loss"]] == [3, 6, 9]


def test_finetune_goes_on_from_a_version(folders: dict[str, Path], tmp_path: Path) -> None:
    inputs = folders | {"start": folders["adapter"]}
    run(factories.recipe(start=factories.ADAPTER), inputs, tmp_path / "out", silent)
    started, ended = (read_adapter(folder) for folder in (folders["adapter"], tmp_path / "out" / "adapter"))
    assert started.patches.keys() == ended.patches.keys()
    with pytest.raises(BadRequest, match=r"rank is 2, but the version to start from has ranks \[4\]"):
        run(factories.recipe(start=factories.ADAPTER, rank=2), inputs, tmp_path / "other", silent)


def test_full_finetune_leaves_a_base_and_its_loss_curve(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = FullFineTune(
        base=factories.BASE, datasets=(factories.DATASET,), steps=4, batch_tokens=96, max_length=64,
        learning_rate=1e-2, precision="fp32", parameters=("q_proj",),
    )  # fmt: skip
    run(recipe, folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert (found["kind"], found["steps"], found["changed"], found["trained"]) == ("full-finetune", 4, 2, 2 * 32 * 32)
    assert [point[0] for point in found["loss"]] == [1, 2, 3, 4]
    (before, _), (after, tokenizer) = load(folders["base"], "fp32"), load(tmp_path / "out" / "base", "fp32")
    assert not torch.allclose(factories.logits(before), factories.logits(after), atol=1e-3)
    assert tokenizer.chat_template == factories.CHAT


def test_evaluate_leaves_records_and_their_summary(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Evaluate(base=factories.BASE, suite=factories.SUITE, adapters=(factories.ADAPTER,), precision="fp32")
    run(recipe, folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    for name in ("bare", "0"):
        records = parse_records((tmp_path / "out" / f"records-{name}.jsonl").read_bytes())
        assert len(records) == 40
        assert sum(split["n"] for split in found["metrics"][name]["accuracy"].values()) == 40
    assert found["harness"].startswith("sha256:")


def test_a_result_says_in_which_form_the_base_was_held_and_its_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    def found(kind: str, **changes: Any) -> dict[str, Any]:
        recipe: Any = (
            factories.recipe(steps=2, **changes) if kind == "finetune"
            else Evaluate(base=factories.BASE, suite=factories.SUITE, precision="fp32", **changes)
        )  # fmt: skip
        run(recipe, folders, tmp_path / kind, silent)
        return result(tmp_path / kind)

    full = sum(4 * parameter.numel() for parameter in factories.llama().parameters())
    for kind in ("finetune", "evaluate"):
        plain, held = found(kind), found(kind, quantised="nf4")
        assert plain["base"]["quantised"] is None
        assert plain["base"]["bytes"] == pytest.approx(full, rel=0.01)
        assert held["base"]["quantised"] == "nf4"
        assert held["base"]["bytes"] < 0.7 * full
        assert plain["recipe"] != held["recipe"]
    assert plain["harness"] != held["harness"]


def test_merge_leaves_a_model_that_answers_as_adapted(folders: dict[str, Path], tmp_path: Path) -> None:
    run(Merge(base=factories.BASE, adapter=factories.ADAPTER), folders, tmp_path / "out", silent)
    merged, _ = load(tmp_path / "out" / "base", "fp32")
    model, _ = load(folders["base"], "fp32")
    with attached(model, read_adapter(folders["adapter"])):
        torch.testing.assert_close(factories.logits(merged), factories.logits(model), atol=1e-4, rtol=1e-4)


def test_merge_writes_the_type_and_reports_the_deviation_that_are_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = Merge(base=factories.BASE, adapter=factories.ADAPTER, dtype="bf16", max_shard_bytes=10**6, verify=True)
    run(asked, folders, tmp_path / "out", silent)
    deviation = result(tmp_path / "out")["deviation"]
    assert 0 < deviation["relative"] < 0.1
    assert deviation["agreement"] > 0.8
    header = (tmp_path / "out" / "base" / "model.safetensors").read_bytes()[:200]
    assert b"BF16" in header


def test_compare_leaves_the_drift_by_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    run(Compare(old=factories.OTHER_BASE, base=factories.BASE), folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert found["median"] == 0.0
    assert found["cast"] is None
    assert set(found["drift"].values()) == {0.0}


def test_a_comparison_tells_the_signals_of_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Compare(
        old=factories.OTHER_BASE, base=factories.BASE, adapters=(factories.ADAPTER,), inputs=factories.DATASET
    )
    run(recipe, folders | {"inputs": folders["dataset.0"]}, tmp_path / "out", silent)
    [found] = result(tmp_path / "out")["adapters"]
    assert len(found.pop("modules")) == 4
    signals = Signals.model_validate(found)
    assert (signals.drift, signals.most, signals.inside, signals.alpha) == (0.0, 0.0, 0.0, 1.0)
    assert route(signals, TIERS).start == "carry"


def rebase(tier: str, **options: Any) -> Rebase:
    common = {"adapter": factories.ADAPTER, "old": factories.OTHER_BASE, "base": factories.BASE}
    return Rebase.model_validate({"tier": tier} | common | options)


def test_an_aligned_adapter_comes_with_what_was_found_of_either_base(folders: dict[str, Path], tmp_path: Path) -> None:
    run(rebase("align"), folders, tmp_path / "out", silent)
    matches = result(tmp_path / "out")["matches"]
    assert {"residual", "layers.0.heads", "layers.0.neurons"} <= matches.keys()
    assert not any(match["moved"] for match in matches.values())
    made, given = (read_adapter(folder) for folder in (tmp_path / "out" / "adapter", folders["adapter"]))
    assert all(torch.equal(made.patches[name].b_OR, patch.b_OR) for name, patch in given.patches.items())


@pytest.mark.parametrize("inputs", [factories.DATASET, None], ids=["with text", "without"])
def test_a_transported_adapter_comes_with_how_each_module_got_there(
    inputs: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    folders["base"] = factories.saved(factories.llama(3, hidden_size=48, num_hidden_layers=3), tmp_path / "wide")
    folders["inputs"] = folders["dataset.0"]
    run(rebase("transport", inputs=inputs), folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert len(found["layers"]) == 3
    assert found["tokens"] == {"shared": 259, "old": 259, "new": 259}
    assert {module["by"] for module in found["modules"].values()} == {"text" if inputs else "weights", "new"}
    assert len(found["read"]) == (6 if inputs else 0)
    made = read_adapter(tmp_path / "out" / "adapter")
    assert made.patches.keys() == found["modules"].keys()
    with attached(load(folders["base"], "fp32")[0], made):
        pass


def test_a_carried_adapter_does_not_keep_the_name_of_the_base_it_came_from(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = folders["adapter"] / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "org/old-base", "revision": "v1"}
    config.write_text(json.dumps(named))
    run(rebase("carry"), folders, tmp_path / "out", silent)
    made = read_adapter(tmp_path / "out" / "adapter").config
    assert (made["base_model_name_or_path"], made["revision"]) == (None, None)


def test_carry_leaves_the_same_factors_bound_to_the_new_base(folders: dict[str, Path], tmp_path: Path) -> None:
    run(rebase("carry"), folders, tmp_path / "out", silent)
    path = tmp_path / "out" / "adapter"
    before, after = (read_adapter(folder) for folder in (folders["adapter"], path))
    assert all(torch.equal(patch.b_OR, after.patches[name].b_OR) for name, patch in before.patches.items())
    assert before.config == after.config
    assert read_metadata(path / "adapter_model.safetensors")["loractl.base"] == factories.BASE


def test_a_carry_with_something_to_choose_by_says_what_it_tried(folders: dict[str, Path], tmp_path: Path) -> None:
    folders["inputs"] = folders["dataset.0"]
    run(rebase("carry", suite=factories.SUITE, inputs=factories.DATASET), folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert {"chosen", "reason", "candidates", "steps"} <= found.keys()
    assert found["chosen"] in found["candidates"]
    assert read_adapter(tmp_path / "out" / "adapter").patches


@pytest.mark.parametrize("tier", ["carry", "warm-start", "retrain"])
def test_nothing_but_the_calibration_split_is_looked_at_before_the_verdict(
    folders: dict[str, Path], tmp_path: Path, tier: str
) -> None:
    """Suites that agree in their calibration split alone make the same bytes; where that differs, others come out."""
    trained = {"training": factories.recipe(steps=2)} if tier != "carry" else {}
    asked, found = rebase(tier, suite=factories.SUITE, **trained), []
    rows = factories.choices(400)
    chosen = [row for row in rows if split_of(item_id(row.value)) == "calibration"]
    others = [row for row in rows if row not in chosen]
    assert len(chosen) >= LEAST_ITEMS + 10
    for n, some in enumerate([[*chosen, *others[:200]], [*chosen, *others[200:]], [*chosen[10:], *others[:200]]]):
        folders["suite"] = dataset(tmp_path / f"suite{n}", some)
        run(asked, folders, tmp_path / str(n), silent)
        told = {k: v for k, v in result(tmp_path / str(n)).items() if k in ("candidates", "chosen", "starts", "start")}
        found.append((told, (tmp_path / str(n) / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


@pytest.mark.parametrize("tier", ["warm-start", "retrain"])
@pytest.mark.parametrize("suite", [factories.SUITE, None], ids=["with a suite", "without"])
def test_the_trained_tiers_say_what_they_tried(
    tier: str, suite: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    run(rebase(tier, training=factories.recipe(steps=3), suite=suite), folders, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert found["start"] in {"carry", "scratch"}
    assert found["candidate"] in found["candidates"]
    assert found["steps"] == 3 * len(found["candidates"])
    if suite or tier == "warm-start":
        assert {"carry", "bare"} == found["starts"].keys()
    assert read_adapter(tmp_path / "out" / "adapter").patches


@pytest.mark.parametrize("tier", ["warm-start", "distil"])
def test_what_a_tier_made_already_is_where_others_begin_and_is_not_made_again(
    tier: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"training": factories.recipe(steps=3)} if tier == "warm-start" else {"distil": DISTIL}
    run(rebase("carry"), folders, tmp_path / "carry", silent)
    anew = run(rebase(tier, **how), folders, tmp_path / "anew", silent).facts

    def never(*_: object) -> None:
        raise AssertionError("it was made again")

    monkeypatch.setattr(starts, "carry", never)
    given = folders | {"made.carry": tmp_path / "carry" / "adapter"}
    onward = run(rebase(tier, **how, made={"carry": factories.ADAPTER}), given, tmp_path / "onward", silent).facts
    assert (onward["starts"], onward["candidates"]) == (anew["starts"], anew["candidates"])
    one, other = (read_adapter(tmp_path / name / "adapter") for name in ("anew", "onward"))
    assert starts.equal(one, other)


def test_a_transport_is_read_where_it_was_made_already(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders["base"] = factories.saved(factories.llama(3, hidden_size=48, num_hidden_layers=3), tmp_path / "wide")
    run(rebase("transport"), folders, tmp_path / "moved", silent)
    monkeypatch.setattr(starts, "transport", lambda *_: pytest.fail("it was made again"))
    given = folders | {"made.transport": tmp_path / "moved" / "adapter"}
    asked = rebase("warm-start", training=factories.recipe(steps=2), made={"transport": factories.ADAPTER})
    found = run(asked, given, tmp_path / "out", silent).facts["starts"]
    assert "score" in found["transport"]
    assert "refused" in found["align"]


DISTIL = {"texts": 24, "max_new_tokens": 4, "steps": 6, "precision": "fp32", "max_length": 64, "checkpoint_every": 2}


@pytest.mark.parametrize("inputs", [factories.DATASET, None], ids=["inputs", "texts of its own"])
def test_a_distillation_says_what_was_taught_and_how_near_the_student_came(
    inputs: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = {**folders, "inputs": folders["dataset.0"]} if inputs else folders
    run(rebase("distil", distil=DISTIL, inputs=inputs), given, tmp_path / "out", silent)
    found = result(tmp_path / "out")
    assert found["lesson"]["source"] == ("inputs" if inputs else "texts of the teacher's own")
    assert found["lesson"]["texts"] == 24
    assert found["lesson"]["through"] == "likeliest tokens"
    assert {"divergence", "agreement"} <= found["starts"]["carry"].keys()
    assert found["steps"] == 6 * len(found["candidates"])
    assert read_adapter(tmp_path / "out" / "adapter").patches


@pytest.mark.parametrize("stop", [1, 3, 6], ids=["while the teacher writes", "while students learn", "near the end"])
def test_a_distillation_that_was_stopped_ends_in_the_same_bytes(
    stop: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    told: list[dict[str, Any]] = []

    def report(now: dict[str, Any]) -> None:
        told.append(now)
        if len(told) == stop:
            raise KeyboardInterrupt

    factories.saved(factories.llama(seed=1), folders["old"])
    recipe = rebase("distil", distil=DISTIL)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folders, tmp_path / "out", report, tmp_path / "checkpoint")
    run(recipe, folders, tmp_path / "out", silent, tmp_path / "checkpoint")
    run(recipe, folders, tmp_path / "whole", silent)
    resumed, whole = (tmp_path / out / "adapter" / "adapter_model.safetensors" for out in ("out", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_missing_input_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    del folders["dataset.0"]
    with pytest.raises(BadRequest, match=r"needs --in dataset\.0"):
        run(factories.recipe(), folders, tmp_path / "out", silent)


def test_a_refusal_is_left_as_a_problem_and_exit_status_1(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(out, factories.recipe(targets=("q_porj",)), folders)) == 1
    refusal = LoractlError.from_problem(json.loads((out / "error.json").read_text()))
    assert refusal.code == "unknown-targets"
    assert not (out / "result.json").exists()


@pytest.mark.parametrize("role", ["dataset.0", "dataset.1", "suite", "inputs", "apart"])
def test_a_row_is_refused_by_what_people_call_its_data(role: str, folders: dict[str, Path], tmp_path: Path) -> None:
    given = folders | {name: dataset(tmp_path / name, factories.rows(3)) for name in ("dataset.1", "inputs")}
    kinds: dict[str, Any] = {
        "dataset.0": factories.recipe(datasets=(factories.DATASET, factories.SUITE)),
        "suite": Evaluate(base=factories.BASE, suite=factories.SUITE, precision="fp32"),
        "inputs": Compare(base=factories.BASE, old=factories.OTHER_BASE, inputs=factories.DATASET, adapters=()),
        "apart": Answers(
            base=factories.BASE, suite=factories.SUITE, metric="likelihood", inputs=factories.DATASET,
            apart=(factories.ADAPTER,), bare=True, precision="fp32",
        ),
    }  # fmt: skip
    kinds["dataset.1"] = kinds["dataset.0"]
    at = "dataset.0" if role == "apart" else role
    (given[at] / "rows.jsonl").rename(given[at] / "data.jsonl")
    with (given[at] / "data.jsonl").open("a") as file:
        file.write('\n{"prompt": 1}\n')
    line = (given[at] / "data.jsonl").read_text().count("\n")
    out = tmp_path / "out"
    assert main([*command(out, kinds[role], given), "--called", f"{at}=team/reviews@v3"]) == 1
    found = json.loads((out / "error.json").read_text())
    assert found["code"] == "bad-dataset"
    assert (found["facts"]["path"], found["facts"]["line"]) == ("team/reviews@v3", line)


def test_files_of_a_folder_keep_their_names_and_a_suites_settings_are_said_to_be_its(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = Evaluate(base=factories.BASE, suite=factories.SUITE, bare=True, precision="fp32")
    rows, out = folders["suite"] / "rows.jsonl", tmp_path / "out"
    line = [*command(out, recipe, folders), "--called", "suite=team/parity@v1"]
    rows.write_text(json.dumps({"messages": [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"},
    ]}) + "\n" + json.dumps({"prompt": "?", "completion": ""}))  # fmt: skip
    assert main(line) == 1
    assert "'team/parity@v1/rows.jsonl', line 2: the completion is empty" in (out / "error.json").read_text()
    (folders["suite"] / "suite.json").write_text('{"metrics": ["custom:nobody"]}')
    assert main(line) == 1
    assert "'team/parity@v1/suite.json'" in (out / "error.json").read_text()


def test_the_command_writes_progress_as_lines_of_json(folders: dict[str, Path], tmp_path: Path) -> None:
    reads, writes = os.pipe()
    with os.fdopen(reads) as lines:
        assert main(command(tmp_path / "out", factories.recipe(steps=3), folders, "--progress-fd", str(writes))) == 0
        os.close(writes)
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_terminated_command_leaves_a_checkpoint_and_its_repetition_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = factories.recipe(steps=100)
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    argv = command(out, recipe, folders, "--checkpoint", str(checkpoint))
    start = [sys.executable, "-m", "workers.run", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("step 5 "):
                child.send_signal(signal.SIGTERM)
                break
        child.stderr.read()
    assert child.returncode == 130
    assert not (out / "result.json").exists()
    assert main(argv) == 0
    run(recipe, folders, tmp_path / "whole", silent)
    resumed, whole = (folder / "adapter" / "adapter_model.safetensors" for folder in (out, tmp_path / "whole"))
    assert resumed.read_bytes() == whole.read_bytes()


# ── together ─────────────────────────────────────────────────────────────────


def together(
    folder: Path, recipes: Sequence[FineTune | Rebase], folders: dict[str, Path], *options: str
) -> tuple[int, list[Path]]:
    """Run recipes in one process, each into a folder of its own."""
    outs = [folder / f"out-{place}" for place in range(len(recipes))]
    line: list[str] = []
    for recipe, out in zip(recipes, outs, strict=True):
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(recipe.model_dump_json())
        line += [str(out / "recipe.json")]
    for place, out in enumerate(outs):
        line += ["--out", str(out)]
        line += [part for role in inputs_of(recipes[place]) for part in ("--in", f"{place}:{role}={folders[role]}")]
    return main([*line, *options]), outs


def test_adapters_trained_together_are_as_trained_alone_and_one_that_is_refused_stops_no_other(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    recipes = [
        factories.recipe(steps=4), factories.recipe(targets=("nothing",), steps=4), factories.recipe(steps=6, rank=2),
    ]  # fmt: skip
    began = time.monotonic()
    status, outs = together(tmp_path, recipes, folders)
    took = time.monotonic() - began
    assert status == 1
    assert sum(result(outs[place])["seconds"] for place in (0, 2)) <= took  # what passed is shared, not told twice
    assert json.loads((outs[1] / "error.json").read_text())["code"] == "unknown-targets"
    for place in (0, 2):
        alone = run(recipes[place], folders, tmp_path / f"alone-{place}", silent).facts
        found = result(outs[place])
        assert found["recipe"] == str(recipe_digest(recipes[place]))
        torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(alone["loss"]), rtol=1e-4, atol=1e-5)
        assert (outs[place] / "adapter" / "adapter_model.safetensors").exists()


def test_rebases_that_train_go_together_as_each_would_alone_and_go_on_alone(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    kept = {"suite": factories.SUITE}
    recipes = [
        rebase("warm-start", training=factories.recipe(steps=3, checkpoint_every=1), **kept),
        rebase("retrain", training=factories.recipe(steps=3, targets=("nothing",))),
        rebase("retrain", training=factories.recipe(steps=4, checkpoint_every=1, seed=1), **kept),
        rebase("distil", distil=DISTIL | {"checkpoint_every": 1}),
    ]
    common = tmp_path / "common"
    status, outs = together(tmp_path, recipes, folders, "--checkpoint", str(common))
    assert status == 1
    assert json.loads((outs[1] / "error.json").read_text())["code"] == "unknown-targets"
    owners = {identity.partition(" ")[0] for identity in snapshot.files_of(common)}
    assert owners == {str(recipe_digest(recipes[place])) for place in (0, 2, 3)}
    for place in (0, 2, 3):
        alone, onward = (tmp_path / f"{name}-{place}" for name in ("alone", "onward"))
        whole = run(recipes[place], folders, alone, silent).facts
        found = result(outs[place])
        assert (found["tier"], found["recipe"]) == (recipes[place].tier, whole["recipe"])
        assert found["candidates"].keys() == whole["candidates"].keys()
        torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(whole["loss"]), rtol=1e-4, atol=1e-5)
        reading, writing = os.pipe()
        line = command(onward, recipes[place], folders, "--from", str(common), "--checkpoint", str(onward / "own"))
        assert main([*line, "--progress-fd", str(writing)]) == 0
        os.close(writing)
        with os.fdopen(reading) as told:
            assert "loss" not in told.read()  # all of its steps were made in the company
        assert result(onward)["loss"] == found["loss"]


def test_who_is_not_wanted_any_more_ends_without_an_outcome(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "out-0").mkdir()
    (tmp_path / "out-0" / "unwanted").touch()
    status, outs = together(tmp_path, [factories.recipe(steps=100_000), factories.recipe(steps=3, seed=1)], folders)
    assert (status, (outs[0] / "result.json").exists(), result(outs[1])["steps"]) == (0, False, 3)


def test_a_training_goes_on_in_other_company_from_where_it_was(tmp_path: Path, folders: dict[str, Path]) -> None:
    recipes = [factories.recipe(steps=4, checkpoint_every=1), factories.recipe(steps=8, seed=1, checkpoint_every=1)]
    status, whole = together(tmp_path / "whole", recipes, folders)
    assert status == 0
    reading, writing = os.pipe()
    common = tmp_path / "common"
    assert together(tmp_path / "a", recipes, folders, "--checkpoint", str(common))[0] == 0
    (out := tmp_path / "b").mkdir()
    line = command(out / "alone", recipes[1], {role: folders[role] for role in ("base", "dataset.0")})
    assert main([*line, "--from", str(common), "--checkpoint", str(out / "own"), "--progress-fd", str(writing)]) == 0
    os.close(writing)
    with os.fdopen(reading) as told:
        assert told.read() == ""  # all of its steps were made in the company
    torch.testing.assert_close(
        torch.tensor(result(out / "alone")["loss"]), torch.tensor(result(whole[1])["loss"]), rtol=1e-4, atol=1e-5
    )


def test_several_recipes_need_as_many_folders_and_one_base(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["a.json", "b.json", "--out", str(tmp_path)])
    assert "2 recipes need as many --out" in capsys.readouterr().err
    recipes = [factories.recipe(precision="fp32"), factories.recipe(precision="bf16")]
    status, outs = together(tmp_path, recipes, folders)
    assert status == 1
    assert "in one precision" in json.loads((outs[0] / "error.json").read_text())["detail"]
