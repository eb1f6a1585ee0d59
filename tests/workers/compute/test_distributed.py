"""Two processes that share a training give what one gives, stop together, and do not outlive one another."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from registry.core.errors import BadRequest
from registry.core.recipes import Evaluate, FineTune, FullFineTune
from tests.workers import factories
from workers.compute.distributed import ALONE, Ranks
from workers.compute.model import load
from workers.compute.weights import read_tensors
from workers.run import main, run

COMMON: dict[str, Any] = {
    "base": factories.BASE, "datasets": (factories.DATASET,), "steps": 6, "max_length": 64, "precision": "fp32",
    "seed": 3, "held_out": 0.3, "look_every": 2,
}  # fmt: skip
RECIPES: dict[str, FineTune | FullFineTune] = {  # 24 tokens are two rows or one, which leaves a rank with none
    "lora": FineTune(
        **COMMON, targets=("q_proj", "down_proj", "lm_head"), rank=4, alpha=8.0, learning_rate=1e-2, batch_tokens=24
    ),
    "dora": FineTune(
        **COMMON, targets=("q_proj",), variant="dora", whole=("lm_head", "down_proj"), learning_rate=1e-2,
        batch_tokens=24,
    ),
    "three-factor": FineTune(
        **COMMON, targets=("q_proj", "embed_tokens"), variant="three-factor", learning_rate=1e-2, batch_tokens=96
    ),
    "full": FullFineTune(**COMMON, learning_rate=3e-3, batch_tokens=24, patience=9),
    "sparing": FineTune(
        **COMMON, targets=("q_proj", "down_proj"), learning_rate=1e-2, batch_tokens=96, activation_checkpointing=True
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shared")
    factories.saved(factories.llama(), folder / "base", max_shard_size="60KB")
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row.value) + "\n" for row in factories.rows()))
    return {"base": folder / "base", "dataset.0": folder / "data"}


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path]) -> Path:
    """What two processes left: every recipe whole and resumed."""
    folder = inputs["base"].parent
    for name, recipe in RECIPES.items():
        (folder / f"{name}.recipe.json").write_text(recipe.model_dump_json())
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.workers.compute.two_ranks", str(folder)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def started(inputs: dict[str, Path], out: Path, recipe: FineTune) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """`python -m workers.run` in two processes, and the lines of its progress."""
    path = out.with_suffix(".json")
    path.write_text(recipe.model_dump_json())
    reading, writing = os.pipe()
    given = [part for role, folder in inputs.items() for part in ("--in", f"{role}={folder}")]
    options = ["--checkpoint", str(out / "checkpoint"), "--processes", "2", "--progress-fd", str(writing)]
    child = subprocess.Popen(
        [sys.executable, "-m", "workers.run", str(path), *given, "--out", str(out), *options],
        pass_fds=(writing,), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    try:
        with os.fdopen(reading) as progress:
            yield child, progress
    finally:
        child.kill()
        child.communicate()


def ranks_below(parent: int) -> dict[int, int]:
    """Process ids of the ranks that torchrun started, by rank."""
    found = {}
    for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        told = dict(part.partition("=")[::2] for part in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        if "RANK" in told:
            found[int(told["RANK"])] = pid
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_what_one_trains(
    name: str, inputs: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    run(RECIPES[name], inputs, tmp_path / "alone", lambda _: None)
    alone, together = (
        json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "alone", trained / f"{name}.whole")
    )
    assert (alone["processes"], together["processes"]) == (1, 2)
    for facts in ("loss", "held_out"):
        assert [step for step, _ in together[facts]] == [step for step, _ in alone[facts]]
        assert [loss for _, loss in together[facts]] == pytest.approx([loss for _, loss in alone[facts]], rel=1e-5)
    assert (together["rows"], together["kept"]) == (alone["rows"], alone["kept"])
    shards = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.safetensors"))
    for shard in shards:
        ours, theirs = read_tensors(tmp_path / "alone" / shard), read_tensors(trained / f"{name}.whole" / shard)
        for tensor, value in ours.items():
            torch.testing.assert_close(theirs[tensor], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_they_stop_together_when_one_is_told_to_and_resume_to_the_same_bytes(name: str, trained: Path) -> None:
    whole, resumed = trained / f"{name}.whole", trained / f"{name}.resumed"
    shards = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert shards
    assert all((whole / shard).read_bytes() == (resumed / shard).read_bytes() for shard in shards)


def test_each_keeps_its_part_of_the_weights_and_answers_as_the_whole_model(trained: Path) -> None:
    found = [json.loads((trained / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    model, _ = load(trained / "base", "bf16")
    everything = sum(2 * parameter.numel() for parameter in model.parameters())
    assert sum(facts["bytes"] for facts in found) == pytest.approx(everything, rel=0.01)  # 259 rows fill up to 260
    assert found[0]["bytes"] == pytest.approx(everything / 2, rel=0.01)
    assert found[0]["logits"] == found[1]["logits"] == factories.logits(model).tolist()


def test_a_termination_signal_to_the_command_leaves_a_checkpoint(inputs: dict[str, Path], tmp_path: Path) -> None:
    recipe = factories.recipe(steps=100_000, sharded=True)
    with started(inputs, tmp_path / "out", recipe) as (child, progress):
        assert json.loads(progress.readline())["steps"] == 100_000
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) != 0
    assert (tmp_path / "out" / "checkpoint" / "checkpoint.json").is_file()
    assert not (tmp_path / "out" / "error.json").exists()


def test_a_process_that_is_killed_ends_the_others_with_a_reason(inputs: dict[str, Path], tmp_path: Path) -> None:
    with started(inputs, tmp_path / "out", factories.recipe(steps=100_000, sharded=True)) as (child, progress):
        progress.readline()
        ranks = ranks_below(child.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], signal.SIGKILL)
        _, said = child.communicate(timeout=60)
        assert child.returncode != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    refusal = json.loads((tmp_path / "out" / "error.json").read_text())
    assert refusal["code"] == "process-failed"
    assert refusal["detail"].startswith("Process 0 of 2 stopped: ")
    assert "SIGKILL" in said


def test_one_process_alone_runs_a_sharded_recipe_as_any_other(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for sharded in (False, True):
        (tmp_path / "recipe.json").write_text(factories.recipe(steps=2, sharded=sharded).model_dump_json())
        given = [part for role, folder in inputs.items() for part in ("--in", f"{role}={folder}")]
        out = tmp_path / f"out-{sharded}"
        assert main([str(tmp_path / "recipe.json"), *given, "--out", str(out), "--processes", "1"]) == 0
        found.append(read_tensors(out / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_rows_of_a_batch_are_divided_and_none_is_lost() -> None:
    batch = list(range(7))
    for many in (1, 2, 3):
        for parts in (1, 2, 4):
            ranks = [Ranks(rank, many) for rank in range(many)]
            passes = ranks[0].passes(len(batch), parts)
            shares = [rank.share(batch, part, parts) for rank in ranks for part in range(passes)]
            assert sorted(row for share in shares for row in share) == batch
    assert ALONE.share(batch, 1, 2) == [1, 3, 5]


def test_work_that_is_not_a_training_is_refused_in_several_processes(inputs: dict[str, Path], tmp_path: Path) -> None:
    mesh: Any = object()
    recipe = Evaluate(base=factories.BASE, suite=factories.SUITE)
    with pytest.raises(BadRequest, match="kind 'evaluate' runs in one process: leave torchrun out"):
        run(recipe, inputs | {"suite": tmp_path}, tmp_path / "out", lambda _: None, None, Ranks(0, 2, mesh))
    quantised = factories.recipe(quantised="nf4")
    with pytest.raises(BadRequest, match="8 or 4 bits is trained on in one process: leave torchrun or quantised out"):
        run(quantised, inputs, tmp_path / "out", lambda _: None, None, Ranks(0, 2, mesh))
