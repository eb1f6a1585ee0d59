"""Weights train as in a plain float64 loop; the result is a base like the one it came from, and can be extracted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from registry.core.errors import NotRunnable, TrainingFailed, Unchanged, UnknownTargets
from registry.core.recipes import Extract, FullFineTune
from tests.workers import factories
from workers.compute import full
from workers.compute.bank import attached
from workers.compute.course import learning_rate
from workers.compute.data import Packed, batches, tokenize
from workers.compute.extract import extract
from workers.compute.full import Tuned, tune, write_tuned
from workers.compute.loss import Loss
from workers.compute.model import Model, load

TOKENIZER = factories.tokenizer()


def recipe(**changes: Any) -> FullFineTune:
    values: dict[str, Any] = {
        "base": factories.BASE, "datasets": (factories.DATASET,), "learning_rate": 3e-3, "steps": 6,
        "batch_tokens": 96, "max_length": 64, "precision": "fp32", "seed": 3,
    }  # fmt: skip
    return FullFineTune(**(values | changes))


def train(base: Path, asked: FullFineTune, **options: Any) -> Tuned:
    return tune(base, asked, options.pop("rows", factories.rows()), **options)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return factories.saved(factories.llama(), tmp_path / "base")


def stop_after(steps: int) -> Callable[[dict[str, Any]], None]:
    def report(progress: dict[str, Any]) -> None:
        if progress["step"] == steps:
            raise KeyboardInterrupt

    return report


def plain_loop(model: Model, asked: FullFineTune) -> list[float]:
    """Full fine-tuning as one would write it, in float64: the model's own logits, one row at a time."""
    model = model.double().requires_grad_(True)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": asked.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    ahead = batches([tokenize(TOKENIZER, row, 64) for row in factories.rows()], asked.batch_tokens, asked.seed)
    losses = []
    for step in range(asked.steps):
        batch = next(ahead)
        found = []
        for example in batch:
            logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
            asked_for = torch.tensor(example.ids[len(example.prompt) :])
            found.append(F.cross_entropy(logits[len(example.prompt) - 1 : -1], asked_for, reduction="none"))
        loss = torch.cat(found).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), asked.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(asked, step)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "make",
    [factories.llama, lambda: factories.llama(tied=False), factories.gpt2],
    ids=["tied llama", "untied llama", "gpt2"],
)
def test_training_is_that_of_a_plain_loop_in_float64(make: Callable[[], Model], tmp_path: Path) -> None:
    folder, asked = factories.saved(make(), tmp_path / "base"), recipe(weight_decay=0.1, max_grad_norm=0.5)
    tuned, theirs = train(folder, asked), make()
    before = {name: value.clone() for name, value in theirs.named_parameters()}
    assert tuned.losses == pytest.approx(plain_loop(theirs, asked), rel=1e-4)
    for name, value in theirs.named_parameters():
        stored = name if name in tuned.weights else name.removeprefix("transformer.")
        moved = (value - before[name]).norm()
        assert moved > 0
        # Keys' biases have no gradient but rounding, of which AdamW makes steps.
        assert (tuned.weights[stored] - value).norm() < 0.03 * moved


def test_the_result_is_a_base_like_the_one_it_came_from_and_answers_as_trained(tmp_path: Path) -> None:
    folder = factories.saved(factories.llama(), tmp_path / "base", max_shard_size="60KB")
    tuned = train(folder, recipe())
    write_tuned(folder, tuned, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    index = "model.safetensors.index.json"
    maps = [json.loads((where / index).read_text())["weight_map"] for where in (folder, tmp_path / "out")]
    assert maps[0] == maps[1]
    assert "lm_head.weight" not in maps[1]
    model, _ = load(tmp_path / "out", "fp32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in tuned.weights.items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(factories.logits(theirs), factories.logits(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"held_out": 0.3, "look_every": 2, "patience": 2, "weight_decay": 0.1}])
def test_a_stopped_training_resumes_to_the_bytes_of_an_uninterrupted_one(
    options: dict[str, Any], precision: str, base: Path, tmp_path: Path
) -> None:
    asked = recipe(steps=7, warmup_steps=2, precision=precision, **options)
    whole = train(base, asked)
    for at in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            train(base, asked, report=stop_after(at), checkpoint_dir=tmp_path / "checkpoint")
    steps: list[int] = []
    resumed = train(
        base, asked, report=lambda now: steps.append(now["step"]), checkpoint_dir=tmp_path / "checkpoint"
    )
    assert steps == [7]
    assert (resumed.losses, resumed.tokens, resumed.held_out) == (whole.losses, whole.tokens, whole.held_out)
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())


def test_patience_ends_the_training_with_the_weights_of_the_best_look(base: Path) -> None:
    asked = recipe(steps=40, learning_rate=0.3, held_out=0.3, look_every=1, patience=2, schedule="constant")
    tuned = train(base, asked)
    losses = [loss for _, loss in tuned.held_out]
    assert len(tuned.losses) < 40
    assert tuned.kept == 1 + losses.index(min(losses))
    exactly = train(base, recipe(**(asked.model_dump() | {"steps": tuned.kept, "patience": 0})))
    assert all(torch.equal(value, exactly.weights[name]) for name, value in tuned.weights.items())


def test_only_what_is_named_is_trained_and_what_means_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    asked = recipe(parameters=("mlp", "layers.1.self_attn.q_proj", "lm_head"))
    tuned = train(base, asked)
    mlp = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    named = mlp | {"model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"}  # tied: the head is it
    assert tuned.weights.keys() == named
    write_tuned(base, tuned, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == named
    with pytest.raises(UnknownTargets, match=r"'mpl', 'nothing'.*Did you mean 'mlp'"):
        train(base, recipe(parameters=("mpl", "mlp", "nothing")))


def test_steps_far_below_a_weights_last_place_add_up_and_what_rounding_swallows_is_refused(tmp_path: Path) -> None:
    folder = factories.saved(factories.llama().bfloat16(), tmp_path / "base")
    asked = recipe(precision="bf16", learning_rate=1e-5, steps=3, schedule="constant", parameters=("q_proj",))
    tuned = train(folder, asked)
    stored = load_file(folder / "model.safetensors")
    for name, value in tuned.weights.items():
        step = (value - stored[name].float()).abs().max()
        assert 2e-5 < step < 4e-5
    with pytest.raises(Unchanged, match="After 3 steps no weight differs from the base's once it is written as BF16"):
        write_tuned(folder, Tuned({n: stored[n].float() * (1 + 1e-6) for n in tuned.weights}, (1.0,) * 3, 9, kept=3),
                    tmp_path / "none")  # fmt: skip
    write_tuned(folder, tuned, tmp_path / "exact", "fp32")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert all(torch.equal(exact[name], value) for name, value in tuned.weights.items())
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_the_rows(tmp_path: Path) -> None:
    model = factories.llama()
    model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"step 1: the loss is nan on rows sums.jsonl:\d+"):
        train(factories.saved(model, tmp_path / "base"), recipe())


def test_a_step_that_memory_does_not_take_is_made_in_more_passes_with_the_same_result(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(base, recipe())
    real = Loss.__call__

    def small(self: Loss, packed: Packed) -> tuple[Tensor, Tensor]:
        if len(packed.targets_N) > 12:
            raise torch.OutOfMemoryError
        return real(self, packed)

    monkeypatch.setattr(Loss, "__call__", small)
    told: list[dict[str, Any]] = []
    parts = train(base, recipe(), report=told.append)
    assert told[-1]["passes"] > 1
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    monkeypatch.setattr(Loss, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(TrainingFailed, match="out of memory with one row"):
        train(base, recipe())


def test_activations_that_are_computed_again_give_the_same_bits(base: Path) -> None:
    plain, again = (train(base, recipe(activation_checkpointing=on, steps=3)) for on in (False, True))
    assert plain.losses == again.losses
    assert all(torch.equal(value, plain.weights[name]) for name, value in again.weights.items())


def test_weights_that_cannot_be_written_are_refused_before_any_step(base: Path) -> None:
    model = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(model | {name: model[name].to(torch.float8_e4m3fn)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotRunnable, match=f"'{name}' is stored as F8_E4M3"):
        train(base, recipe())


def test_an_adapter_extracted_from_a_full_fine_tune_answers_as_it_does(base: Path, tmp_path: Path) -> None:
    asked = recipe(parameters=("self_attn", "mlp"), steps=20)  # linear layers alone: nothing is left over
    write_tuned(base, train(base, asked), tmp_path / "tuned")
    other = "b3:" + "7" * 64
    made = extract(base, tmp_path / "tuned", Extract(base=factories.BASE, tuned=other, energy=1.0))
    (model, _), (tuned, _) = load(base, "fp32"), load(tmp_path / "tuned", "fp32")
    assert (factories.logits(model) - factories.logits(tuned)).abs().max() > 0.1
    with attached(model, made.adapter):
        torch.testing.assert_close(factories.logits(model), factories.logits(tuned), atol=1e-3, rtol=1e-3)


def test_a_gradient_that_memory_ran_out_for_is_not_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = factories.saved(factories.llama(), tmp_path / "base"), recipe(precision="bf16", steps=1)
    hand_over, handed = full._hand_over, list[int]()

    def out_of_memory_once(parameter: Tensor, exact: Tensor) -> None:
        handed.append(0)
        if len(handed) == 3:
            raise torch.OutOfMemoryError
        hand_over(parameter, exact)

    of_all = full._Weights.norm

    def norm_of_a_step() -> float:
        seen = list[float]()

        def looked_at(weights: full._Weights) -> float:
            seen.append(of_all(weights))
            return seen[-1]

        monkeypatch.setattr(full._Weights, "norm", looked_at)
        train(base, asked)
        return seen[0]

    expected = norm_of_a_step()
    monkeypatch.setattr(full, "_hand_over", out_of_memory_once)
    assert norm_of_a_step() == pytest.approx(expected, rel=0.02)  # in two passes, in bfloat16
    assert len(handed) > 3
