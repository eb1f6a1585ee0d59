from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import BadDataset, LoractlError, TrainingFailed, UnusableDataset
from registry.core.recipes import FineTune
from tests.workers import factories
from workers.compute import data
from workers.compute.bank import attached
from workers.compute.course import Counted, learning_rate
from workers.compute.data import Packed, Row, hold_out
from workers.compute.finetune import Task, Trained, as_trained, finetune, finetune_many
from workers.compute.lora import Adapter
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


def test_dropout_is_drawn_by_the_seed() -> None:
    model = factories.llama()
    start, one_row = factories.random_adapter(model), factories.rows(1)
    losses = [
        finetune(model, TOKENIZER, factories.recipe(steps=1, dropout=0.5, seed=seed), one_row, start=start).losses
        for seed in (1, 2, 1)
    ]
    assert losses[0] == losses[2] != losses[1]


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


# ── who waits, who fails, who is not wanted any more ─────────────────────────


def steps_of(told: list[tuple[int, int]]) -> list[set[int]]:
    """Who trained in each step of all."""
    found: list[set[int]] = []
    for task, _ in told:
        if not found or task in found[-1] or task < max(found[-1]):
            found.append(set())
        found[-1].add(task)
    return found


def test_whoever_does_not_fit_waits_until_another_has_ended() -> None:
    told: list[tuple[int, int]] = []
    whole = finetune_many(
        factories.llama(), TOKENIZER, tasks(), report=lambda now: told.append((now["task"], now["step"])),
        tokens_at_once=140,
    )  # fmt: skip
    assert steps_of(told) == [{0, 2}] * 7 + [{1, 2}] * 2 + [{1}] * 2
    for task, one in zip(tasks(), whole, strict=True):
        alone = train(task.recipe, rows=task.rows, start=task.start)
        assert alone.losses == pytest.approx(one.losses, rel=2e-3)


@pytest.mark.parametrize("at", [1, 6])
def test_those_that_waited_resume_to_the_same_bytes(at: int, tmp_path: Path) -> None:
    whole = finetune_many(factories.llama(), TOKENIZER, tasks(), tokens_at_once=140)
    with pytest.raises(KeyboardInterrupt):
        finetune_many(factories.llama(), TOKENIZER, tasks(), tokens_at_once=140, report=stop_after(at),
                      checkpoint_dir=tmp_path)  # fmt: skip
    resumed = finetune_many(factories.llama(), TOKENIZER, tasks(), tokens_at_once=140, checkpoint_dir=tmp_path)
    for place, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert written(one.adapter, tmp_path / f"{place}a") == written(other.adapter, tmp_path / f"{place}b")


def test_each_is_given_when_it_ends() -> None:
    told: list[tuple[int, int]] = []
    ends = [
        (place, len(told))
        for place, _ in as_trained(
            factories.llama(), TOKENIZER, tasks(), report=lambda now: told.append((now["task"], now["step"]))
        )
    ]
    assert ends == [(1, 12), (0, 18), (2, 20)]


def test_what_one_fails_by_is_nobody_elses(tmp_path: Path) -> None:
    wild = factories.recipe(steps=20, learning_rate=1e30, max_grad_norm=1e30, seed=8)
    nonsense = [Row({"prompt": "a", "completion": "b" * 80}, "long.jsonl", 1)]
    others = [*tasks(), Task(wild, factories.rows()), Task(factories.recipe(), nonsense)]
    outcomes = dict(as_trained(factories.llama(), TOKENIZER, others, checkpoint_dir=tmp_path))
    assert isinstance(outcomes[3], TrainingFailed)
    assert isinstance(outcomes[4], BadDataset)
    for place, task in enumerate(tasks()):
        alone, one = train(task.recipe, rows=task.rows, start=task.start), outcomes[place]
        assert isinstance(one, Trained)
        assert alone.losses == pytest.approx(one.losses, rel=2e-3)
    with pytest.raises(LoractlError):
        finetune_many(factories.llama(), TOKENIZER, others)


def test_the_checkpoint_of_one_that_failed_is_its_last_good_one(tmp_path: Path) -> None:
    wild = factories.recipe(steps=60, learning_rate=1e30, max_grad_norm=1e30, checkpoint_every=1)
    with pytest.raises(TrainingFailed) as failed:
        train(wild, checkpoint_dir=tmp_path)
    told: list[int] = []
    with pytest.raises(TrainingFailed, match=f"step {failed.value.step}"):
        train(wild, checkpoint_dir=tmp_path, report=lambda now: told.append(now["step"]))
    assert told == []


def test_a_training_that_paused_goes_on_to_the_bytes_of_one_that_did_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoint"}
    whole = finetune_many(factories.llama(), TOKENIZER, tasks())
    for until, steps in ((3, [3, 3, 3]), (6, [6, 4, 6]), (None, [7, 4, 9])):
        paused = dict(as_trained(factories.llama(), TOKENIZER, tasks(), until=until, **options))
        assert [len(found.losses) for _, found in sorted(paused.items()) if isinstance(found, Trained)] == steps
    for place, found in paused.items():
        assert isinstance(found, Trained)
        assert found.losses == whole[place].losses
        assert written(found.adapter, tmp_path / f"{place}a") == written(whole[place].adapter, tmp_path / f"{place}b")


def test_who_is_not_wanted_any_more_ends_without_an_outcome() -> None:
    unwanted: set[int] = set()

    def report(progress: dict[str, Any]) -> None:
        if (progress["task"], progress["step"]) == (0, 2):
            unwanted.add(0)

    ends = dict(as_trained(factories.llama(), TOKENIZER, tasks(), report=report, unwanted=unwanted))
    assert ends.keys() == {1, 2}
    assert all(isinstance(outcome, Trained) for outcome in ends.values())


# ── rows held out ────────────────────────────────────────────────────────────


def test_rows_held_out_are_not_trained_on() -> None:
    kept, held = hold_out(factories.rows(), 0.3)
    assert kept and held
    one = train(factories.recipe(held_out=0.3))
    other = train(factories.recipe(), rows=kept)
    assert one.losses == other.losses


def test_the_loss_held_out_is_the_mean_over_their_tokens() -> None:
    _, held = hold_out(factories.rows(), 0.3)
    trained = train(factories.recipe(steps=3, held_out=0.3, look_every=2, batch_tokens=40, dropout=0.3))
    assert [step for step, _ in trained.held_out] == [2, 3]
    model, total, count = factories.llama(), 0.0, 0
    with attached(model, trained.adapter):
        for row in held:
            ids = TOKENIZER(row.value["prompt"])["input_ids"]
            after = TOKENIZER(row.value["completion"], add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id]
            log_p = model(input_ids=torch.tensor([ids + after])).logits[0].log_softmax(-1)
            total -= sum(float(log_p[len(ids) + i - 1, token]) for i, token in enumerate(after))
            count += len(after)
    assert trained.held_out[-1][1] == pytest.approx(total / count, rel=1e-4)


def test_training_ends_when_patience_does_with_the_best_factors(tmp_path: Path) -> None:
    options: dict[str, Any] = {"held_out": 0.3, "look_every": 2, "learning_rate": 0.1, "schedule": "constant"}
    recipe = factories.recipe(steps=200, patience=3, **options)
    trained = train(recipe)
    steps = [step for step, _ in trained.held_out]
    best = min(trained.held_out, key=lambda look: look[1])[0]
    assert len(trained.losses) == steps[-1] == best + 6 < 200
    assert trained.kept == best
    until = train(factories.recipe(steps=best, **options))
    assert written(trained.adapter, tmp_path / "a") == written(until.adapter, tmp_path / "b")


def test_a_run_stopped_between_looks_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = factories.recipe(steps=40, patience=3, held_out=0.3, look_every=2, learning_rate=0.1)
    whole = train(recipe)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, report=stop_after(whole.kept + 3), checkpoint_dir=tmp_path)
    resumed = train(recipe, checkpoint_dir=tmp_path)
    assert resumed.held_out == whole.held_out
    assert written(resumed.adapter, tmp_path / "a") == written(whole.adapter, tmp_path / "b")


def test_a_share_that_leaves_nothing_on_one_side_is_refused() -> None:
    with pytest.raises(UnusableDataset, match=r"held_out = 0\.01 keeps none of its 3 rows aside"):
        train(factories.recipe(held_out=0.01), rows=factories.rows(3))


# ── rows that are too long, or not there ─────────────────────────────────────


def long_rows() -> list[Row]:
    """Of 24 rows every fourth has a prompt of forty letters more."""
    return [
        Row(row.value | {"prompt": "x" * 40 * (i % 4 == 0) + row.value["prompt"]}, row.path, row.line)
        for i, row in enumerate(factories.rows())
    ]


def test_long_rows_are_cut_and_counted() -> None:
    trained = train(factories.recipe(steps=2, max_length=30), rows=long_rows())
    assert trained.counted == Counted(trained=24, held_out=0, cut=6, dropped=0, max_length=30)
    assert train(factories.recipe(steps=2), rows=long_rows()).counted.cut == 0


def test_long_rows_are_dropped_on_request_as_if_they_had_not_been_there() -> None:
    recipe = factories.recipe(steps=3, max_length=30, long_rows="drop")
    dropped = train(recipe, rows=long_rows())
    assert dropped.counted == Counted(trained=18, held_out=0, cut=0, dropped=6, max_length=30)
    short = [row for i, row in enumerate(long_rows()) if i % 4]
    assert dropped.losses == train(recipe, rows=short).losses


def test_long_rows_are_refused_on_request_by_file_and_line() -> None:
    with pytest.raises(BadDataset, match=r"'sums.jsonl', line 1: 48 tokens; at most 30 are allowed.*'cut' or 'drop'"):
        train(factories.recipe(max_length=30, long_rows="refuse"), rows=long_rows())


def test_dropping_all_rows_is_refused() -> None:
    with pytest.raises(UnusableDataset, match="none of 6 is left to train on"):
        train(factories.recipe(max_length=30, long_rows="drop"), rows=long_rows()[::4])


def test_no_row_is_longer_than_the_base_was_made_for() -> None:
    short = factories.llama(max_position_embeddings=30)
    trained = finetune(short, TOKENIZER, factories.recipe(steps=1), long_rows())
    assert (trained.counted.max_length, trained.counted.cut) == (30, 6)


def test_a_training_without_rows_is_refused() -> None:
    with pytest.raises(UnusableDataset, match="there are no rows"):
        train(factories.recipe(), rows=[])
