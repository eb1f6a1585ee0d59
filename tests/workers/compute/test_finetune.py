from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import BadDataset, NotRunnable, TrainingFailed
from registry.core.recipes import FineTune
from tests.workers import factories
from workers.compute import data
from workers.compute.bank import attached
from workers.compute.data import Packed, Row
from workers.compute.finetune import Task, Trained, finetune, finetune_many, learning_rate
from workers.compute.lora import Adapter, fresh
from workers.compute.loss import Loss
from workers.compute.weights import write_adapter

TOKENIZER = factories.tokenizer()


def train(recipe: FineTune, **options: Any) -> Trained:
    return finetune(factories.llama(), TOKENIZER, recipe, options.pop("rows", factories.rows()), **options)


def written(adapter: Adapter, folder: Path) -> bytes:
    write_adapter(adapter, folder, base=factories.BASE, recipe="sha256:" + "0" * 64)
    return (folder / "adapter_model.safetensors").read_bytes()


def distance(one: Adapter, other: Adapter) -> float:
    pairs = ((patch, other.patches[name]) for name, patch in one.patches.items())
    return sum(float((a.a_RI - b.a_RI).norm() + (a.b_OR - b.b_OR).norm()) for a, b in pairs)


def stop_after(steps: int) -> Callable[[dict[str, Any]], None]:
    def report(progress: dict[str, Any]) -> None:
        if progress["step"] == steps:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(make: Callable[[], Any]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = factories.recipe(steps=60, targets=("all-linear",), batch_tokens=200)
    losses = finetune(model, TOKENIZER, recipe, factories.rows()).losses
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_equal_recipes_train_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    one, same, other = (
        written(train(factories.recipe(seed=seed, dropout=0.1)).adapter, tmp_path / str(i))
        for i, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"learning_rate_b_ratio": 4.0, "schedule": "cosine"}])
def test_a_stopped_training_resumes_to_the_bytes_of_an_uninterrupted_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = factories.recipe(steps=9, warmup_steps=2, **options)
    whole = train(recipe)
    for at in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, report=stop_after(at), checkpoint_dir=tmp_path)
    steps: list[int] = []
    resumed = train(recipe, report=lambda progress: steps.append(progress["step"]), checkpoint_dir=tmp_path)
    assert steps == [8, 9]
    assert resumed.losses == whole.losses
    assert resumed.tokens == whole.tokens
    assert written(resumed.adapter, tmp_path / "resumed") == written(whole.adapter, tmp_path / "whole")


def test_a_checkpoint_is_left_every_so_many_steps_and_read_by_its_own_run_only(tmp_path: Path) -> None:
    train(factories.recipe(steps=5, checkpoint_every=2), checkpoint_dir=tmp_path)
    steps: list[int] = []
    train(factories.recipe(steps=5), report=lambda p: steps.append(p["step"]), checkpoint_dir=tmp_path)
    assert steps == [5]
    steps.clear()
    train(factories.recipe(steps=5, seed=9), report=lambda p: steps.append(p["step"]), checkpoint_dir=tmp_path)
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_without_a_pull_to_its_start_ends_farther_from_it() -> None:
    start = factories.random_adapter(factories.llama())
    free, pulled = (
        train(factories.recipe(steps=20, pull=pull, max_grad_norm=1e9), start=start).adapter for pull in (0.0, 100.0)
    )
    assert distance(pulled, start) < 0.5 * distance(free, start)


def test_training_from_a_start_begins_with_the_starts_loss() -> None:
    long = factories.recipe(steps=30, batch_tokens=300)
    first = train(long)
    again = train(long.model_copy(update={"steps": 1}), start=first.adapter)
    assert again.losses[0] < first.losses[3]


def test_the_factors_of_a_start_are_not_changed_in_place() -> None:
    start = factories.random_adapter(factories.llama())
    before = {name: (patch.a_RI.clone(), patch.b_OR.clone()) for name, patch in start.patches.items()}
    train(factories.recipe(), start=start)
    for name, (a_RI, b_OR) in before.items():
        assert torch.equal(start.patches[name].a_RI, a_RI)
        assert torch.equal(start.patches[name].b_OR, b_OR)


def test_a_higher_rate_for_b_moves_b_farther() -> None:
    plain, plus = (train(factories.recipe(steps=1, learning_rate_b_ratio=ratio)).adapter for ratio in (1.0, 8.0))
    name = next(iter(plain.patches))
    assert plus.patches[name].b_OR.norm() > 4 * plain.patches[name].b_OR.norm()


def test_the_loss_of_a_step_is_the_mean_over_completion_tokens() -> None:
    model, row = factories.llama(), Row({"prompt": "ab", "completion": "cd"}, "x.jsonl", 1)
    loss = finetune(model, TOKENIZER, factories.recipe(steps=1), [row]).losses[0]
    ids = TOKENIZER("abcd")["input_ids"] + [TOKENIZER.eos_token_id]
    log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = -sum(float(log_p[i - 1, ids[i]]) for i in range(3, 6)) / 3
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_weights_train_float32_factors() -> None:
    model = factories.llama().bfloat16()
    trained = finetune(model, TOKENIZER, factories.recipe(steps=20, batch_tokens=300), factories.rows())
    assert {patch.b_OR.dtype for patch in trained.adapter.patches.values()} == {torch.float32}
    assert trained.losses[-1] < trained.losses[0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_over_the_warm_up_and_never_after_it(schedule: str) -> None:
    recipe = factories.recipe(schedule=schedule, steps=20, warmup_steps=5)
    rates = [learning_rate(recipe, step) for step in range(20)]
    assert all(a < b for a, b in pairwise(rates[:5]))
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert max(rates) == recipe.learning_rate
    assert min(rates) > 0


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_the_rows() -> None:
    model = factories.llama()
    model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"step 1: the loss is nan on rows sums.jsonl:\d+"):
        finetune(model, TOKENIZER, factories.recipe(), factories.rows())


def test_rows_with_choices_are_refused_for_training() -> None:
    with pytest.raises(BadDataset, match=r"'parity.jsonl', line 1: rows with 'choices' are for suites"):
        train(factories.recipe(), rows=factories.choices())


def test_training_from_magnitudes_is_refused() -> None:
    from dataclasses import replace

    adapter = fresh(factories.llama(), factories.recipe())
    patches = {name: replace(patch, magnitude_O=torch.ones(len(patch.b_OR))) for name, patch in adapter.patches.items()}
    with pytest.raises(NotRunnable, match="DoRA"):
        train(factories.recipe(), start=replace(adapter, patches=patches))


def test_the_trained_adapter_answers_as_it_did_in_training() -> None:
    model = factories.llama()
    trained = finetune(model, TOKENIZER, factories.recipe(steps=30), factories.rows(4))
    row = Row({"prompt": "0+0=", "completion": " 0"}, "x.jsonl", 1)
    bare = finetune(model, TOKENIZER, factories.recipe(steps=1), [row]).losses[0]
    with attached(model, trained.adapter):
        adapted = finetune(model, TOKENIZER, factories.recipe(steps=1), [row]).losses[0]
    assert adapted < bare


def tasks() -> list[Task]:
    """Adapters with ranks, targets, rows, rates, lengths and starts of their own."""
    start = factories.random_adapter(factories.llama(), seed=5)
    return [
        Task(factories.recipe(steps=7), factories.rows()),
        Task(factories.recipe(steps=4, rank=2, seed=4, targets=("all-linear",), schedule="cosine"), factories.rows(5)),
        Task(factories.recipe(steps=9, pull=0.5, learning_rate=3e-3, batch_tokens=40), factories.rows(11), start),
    ]


def test_many_adapters_train_at_once_as_each_would_alone() -> None:
    alone = [train(task.recipe, rows=task.rows, start=task.start) for task in tasks()]
    together = finetune_many(factories.llama(), TOKENIZER, tasks())
    for one, other in zip(alone, together, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=2e-3)
        size = sum(float(patch.b_OR.norm()) for patch in one.adapter.patches.values())
        assert distance(one.adapter, other.adapter) < 0.02 * size


@pytest.mark.parametrize("at", [2, 5, 8])
def test_many_that_were_stopped_resume_to_the_bytes_of_an_uninterrupted_run(at: int, tmp_path: Path) -> None:
    whole = finetune_many(factories.llama(), TOKENIZER, tasks())
    with pytest.raises(KeyboardInterrupt):
        finetune_many(
            factories.llama(), TOKENIZER, tasks(), report=stop_after(at), checkpoint_dir=tmp_path
        )
    resumed = finetune_many(factories.llama(), TOKENIZER, tasks(), checkpoint_dir=tmp_path)
    for place, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert one.losses == other.losses
        assert written(one.adapter, tmp_path / f"{place}a") == written(other.adapter, tmp_path / f"{place}b")


def test_who_has_finished_is_not_trained_on_while_others_go_on() -> None:
    told: list[tuple[int, int]] = []
    finetune_many(
        factories.llama(), TOKENIZER, tasks(), report=lambda now: told.append((now["task"], now["step"]))
    )
    assert [sum(task == place for task, _ in told) for place in range(3)] == [7, 4, 9]
    assert told[:3] == [(0, 1), (1, 1), (2, 1)]
    assert told[-2:] == [(2, 8), (2, 9)]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_that_memory_does_not_take_is_made_in_more_passes_with_the_same_result(
    kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_ROW", 32)
    whole = finetune_many(factories.llama(), TOKENIZER, tasks())
    real = Loss.__call__

    def small(self: Loss, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        if packed.ids_BT.numel() > 96:
            raise kind("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return real(self, packed)

    monkeypatch.setattr(Loss, "__call__", small)
    told: list[dict[str, Any]] = []
    parts = finetune_many(factories.llama(), TOKENIZER, tasks(), report=told.append)
    assert {now.get("passes") for now in told} >= {4}
    for one, other in zip(whole, parts, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=2e-3)


def test_no_memory_for_a_single_row_stops_the_training_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Loss, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Loss, "__call__", never)
    with pytest.raises(TrainingFailed, match="step 1: out of memory with one row"):
        train(factories.recipe())


def test_another_error_of_the_run_is_not_taken_for_one_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Loss, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Loss, "__call__", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(factories.recipe())
