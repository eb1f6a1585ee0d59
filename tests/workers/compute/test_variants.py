"""DoRA, three factors and modules trained whole: alone and in company, as the dense formula and PEFT have them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from registry.core.errors import BadRequest, NotRunnable, UnknownTargets
from registry.core.recipes import FineTune, parse_recipe
from tests.workers import factories
from workers.compute.bank import Bank, attached, parts_of
from workers.compute.finetune import Task, Trained, finetune, finetune_many
from workers.compute.lora import Adapter, core_of, fresh, is_transposed
from workers.compute.model import Model
from workers.compute.variants import varied
from workers.compute.weights import read_adapter, read_metadata, write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # peft sets it by itself, module by module
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]
TOKENIZER = factories.tokenizer()
IDS = torch.randint(3, 259, (7, 10), generator=torch.Generator().manual_seed(1))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 3},
    "dora": {"variant": "dora"},
    "three-factor": {"variant": "three-factor", "rank": 5},
    "three-factor embedding": {"variant": "three-factor", "targets": ("q_proj", "embed_tokens", "lm_head")},
    "embedding": {"targets": ("q_proj", "embed_tokens", "lm_head"), "rank": 2},
    "whole": {"whole": ("embed_tokens", "lm_head", "0.mlp.up_proj"), "targets": ("all-linear",)},
    "whole beside dora": {"whole": ("lm_head",), "variant": "dora"},
}


def made(model: Model, **changes: Any) -> Adapter:
    """A new adapter of a kind, for any of the tiny models."""
    recipe = asked(model, **changes)
    return varied(model, recipe, fresh(model, recipe))


def asked(model: Model, **changes: Any) -> FineTune:
    if model.config.model_type == "gpt2":
        called = {"q_proj": "c_attn", "v_proj": "c_proj", "embed_tokens": "wte", "0.mlp.up_proj": "h.0.mlp.c_fc"}
        changes = {"targets": ("q_proj", "v_proj")} | changes
        for key in ("targets", "whole"):
            changes[key] = tuple(called.get(name, name) for name in changes.get(key, ()))
    return factories.recipe(**changes)


def stirred(adapter: Adapter, seed: int = 0) -> Adapter:
    """Everything of it moved a little from where it starts."""
    chance = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        return value + torch.randn(value.shape, generator=chance) * 0.1

    patches = {}
    for name, patch in adapter.patches.items():
        b_OR = moved(patch.b_OR) if patch.basis_OR is None else patch.basis_OR @ moved(core_of(patch))
        magnitude_O = None if patch.magnitude_O is None else moved(patch.magnitude_O)
        patches[name] = replace(patch, b_OR=b_OR, magnitude_O=magnitude_O)
    return replace(adapter, patches=patches, replaced={name: moved(value) for name, value in adapter.replaced.items()})


def written(adapter: Adapter, folder: Path) -> Path:
    write_adapter(adapter, folder, base=factories.BASE, recipe="sha256:" + "0" * 64)
    return folder


def bytes_of(adapter: Adapter, folder: Path) -> bytes:
    return (written(adapter, folder) / "adapter_model.safetensors").read_bytes()


def answers(model: Model, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_BT).logits
    return found


kinds = pytest.mark.parametrize("kind", KINDS)
models = pytest.mark.parametrize("make", [lambda: factories.llama(tied=False), factories.gpt2], ids=["llama", "gpt2"])


@kinds
@models
def test_a_new_adapter_of_any_kind_changes_nothing(kind: str, make: Callable[[], Model]) -> None:
    model = make()
    with attached(model, made(model, **KINDS[kind])):
        adapted = factories.logits(model)
    assert torch.equal(adapted, factories.logits(model))


@kinds
@models
def test_peft_answers_as_we_do_for_every_kind(kind: str, make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    adapter = stirred(made(model, **KINDS[kind]))
    with attached(model, adapter):
        expected = factories.logits(model)
    assert not torch.allclose(expected, factories.logits(model), atol=1e-2)
    wrapped = PeftModel.from_pretrained(make(), written(adapter, tmp_path))
    torch.testing.assert_close(factories.logits(wrapped), expected, atol=2e-4, rtol=1e-3)
    with attached(model, read_adapter(tmp_path)):
        torch.testing.assert_close(factories.logits(model), expected, atol=1e-5, rtol=1e-4)


@models
def test_a_tied_head_is_changed_alone_as_in_peft(make: Callable[[], Model], tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{"targets": ("q_proj", "lm_head")}, {"whole": ("embed_tokens",)}]
    for place, changes in enumerate(kinds):
        model = factories.llama() if make is not factories.gpt2 else make()
        adapter = stirred(made(model, **changes))
        with attached(model, adapter):
            expected = factories.logits(model)
        base = factories.llama() if make is not factories.gpt2 else make()
        wrapped = PeftModel.from_pretrained(base, written(adapter, tmp_path / str(place)))
        torch.testing.assert_close(factories.logits(wrapped), expected, atol=2e-4, rtol=1e-3)


def dense(model: Model, adapter: Adapter, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits by weights that were put together in float64, and what they were put together from."""
    leaves = {name: part.double().requires_grad_() for name, part in parts_of(adapter).items()}
    adapted: dict[str, Any] = {name: leaves[name] for name in adapter.replaced}
    for name, patch in adapter.patches.items():
        module = model.get_submodule(name)
        if patch.basis_OR is None:
            update_OI = patch.scale * leaves[f"{name}.B"] @ leaves[f"{name}.A"]
        else:
            update_OI = patch.scale * patch.basis_OR.double() @ leaves[f"{name}.R"] @ patch.a_RI.double()
        weight_OI = (module.weight.T if is_transposed(module) else module.weight) + update_OI
        if patch.magnitude_O is not None:
            weight_OI = leaves[f"{name}.magnitude"][:, None] * weight_OI / weight_OI.detach().norm(dim=1)[:, None]
        adapted[f"{name}.weight"] = weight_OI.T if is_transposed(module) else weight_OI
    logits: Tensor = torch.func.functional_call(model, adapted, kwargs={"input_ids": ids_BT}, tie_weights=False).logits
    return logits, leaves


@models
def test_gradients_of_every_kind_in_one_batch_are_those_of_the_dense_weights_in_float64(
    make: Callable[[], Model],
) -> None:
    model = make().double()
    adapters = [stirred(made(model, **changes), seed) for seed, changes in enumerate(KINDS.values())]
    bank = Bank(model, adapters, train=True)
    for layer in bank.layers.values():
        layer.scale_K11 = layer.scale_K11.double()
    ids_BT = IDS.repeat(2, 1)[: 2 * len(adapters)]
    bank.assign([(which, 2) for which in range(len(adapters))])
    with bank.attached(), bank.gradients() as grad_KP:
        model(input_ids=ids_BT).logits.square().sum(-1).mean().backward()
    bank.to_cores()
    for which, adapter in enumerate(adapters):
        logits, leaves = dense(model, adapter, ids_BT[2 * which : 2 * which + 2])
        (logits.square().sum(-1).mean() / len(adapters)).backward()
        for name, part in bank.parts(which, grad_KP).items():
            grad = leaves[name].grad
            assert grad is not None
            torch.testing.assert_close(part.double(), grad, atol=2e-5 * float(grad.abs().max()) + 1e-9, rtol=1e-4)


@models
def test_gradients_of_lengths_are_those_of_peft(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    adapter = stirred(made(model, variant="dora"))
    wrapped = PeftModel.from_pretrained(make(), written(adapter, tmp_path), is_trainable=True)
    wrapped(input_ids=IDS).logits.square().mean().backward()
    theirs = {name: value.grad for name, value in wrapped.named_parameters() if value.requires_grad}
    bank = Bank(model, [adapter], train=True)
    with bank.attached(), bank.gradients() as grad_KP:
        model(input_ids=IDS).logits.square().mean().backward()
    ours = bank.parts(0, grad_KP)
    assert len(theirs) == len(ours) == 3 * len(adapter.patches)
    ends = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
    for name, mine in ours.items():
        module, _, part = name.rpartition(".")
        grad = theirs[f"base_model.model.{module}.{ends[part]}.default.weight"]
        assert grad is not None
        torch.testing.assert_close(mine, grad, atol=1e-5, rtol=1e-3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@models
def test_every_kind_trains_and_leaves_the_base_alone(kind: str, dtype: torch.dtype, make: Callable[[], Model]) -> None:
    model = make().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = asked(model, **KINDS[kind], steps=20, batch_tokens=100, learning_rate=4e-2)
    trained = finetune(model, TOKENIZER, recipe, factories.rows())
    assert sum(trained.losses[-5:]) < 0.95 * sum(trained.losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {part.dtype for part in parts_of(trained.adapter).values()} == {torch.float32}


def together(options: dict[str, Any], model: Model, changes: dict[str, Any]) -> list[Trained]:
    tasks = [Task(asked(model, **kind, **changes), factories.rows()) for kind in KINDS.values()]
    return finetune_many(model, TOKENIZER, tasks, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kinds_in_one_run_train_as_each_would_alone(dtype: torch.dtype) -> None:
    model = factories.llama(tied=False).to(dtype)
    many = together({}, model, {"steps": 4})
    for kind, one in zip(KINDS.values(), many, strict=True):
        alone = finetune(model, TOKENIZER, asked(model, **kind, steps=4), factories.rows())
        assert one.losses == pytest.approx(alone.losses, rel=1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"activation_checkpointing": True, "dropout": 0.2}])
def test_kinds_in_one_run_that_was_stopped_end_in_the_bytes_of_one_that_was_not(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = factories.llama(tied=False)
    changes = {"steps": 5, "held_out": 0.2, "look_every": 1, "patience": 4, **changes}
    whole = together({}, model, changes)

    def stop(progress: dict[str, Any]) -> None:
        if progress["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together({"report": stop, "checkpoint_dir": tmp_path / "checkpoint"}, model, changes)
    resumed = together({"checkpoint_dir": tmp_path / "checkpoint"}, model, changes)
    for place, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert one.losses == other.losses
        assert bytes_of(one.adapter, tmp_path / f"{place}") == bytes_of(other.adapter, tmp_path / f"{place} again")


@kinds
def test_training_goes_on_from_every_kind_where_it_was(kind: str, tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    recipe = asked(model, **KINDS[kind], steps=15, batch_tokens=400)
    first = finetune(model, TOKENIZER, recipe, factories.rows())
    start = read_adapter(written(first.adapter, tmp_path))
    again = finetune(model, TOKENIZER, recipe.model_copy(update={"steps": 1}), factories.rows(), start=start)
    assert again.losses[0] < first.losses[5]
    assert parts_of(again.adapter).keys() == parts_of(first.adapter).keys()


def test_lengths_are_added_to_a_plain_start_so_that_nothing_changes() -> None:
    model = factories.llama()
    plain = factories.random_adapter(model)
    with attached(model, plain):
        expected = factories.logits(model)
    with attached(model, varied(model, factories.recipe(variant="dora"), plain)):
        torch.testing.assert_close(factories.logits(model), expected, atol=1e-5, rtol=1e-5)


def test_what_a_start_holds_beside_its_factors_is_trained_on(tmp_path: Path) -> None:
    model = factories.gpt2()
    config = LoraConfig(target_modules=["c_attn"], r=4, lora_bias=True, bias="all", modules_to_save=["lm_head"])
    get_peft_model(factories.gpt2(), config).save_pretrained(str(tmp_path))
    start = read_adapter(tmp_path)
    recipe = factories.recipe(targets=("c_attn",), steps=3, max_grad_norm=1e9)
    trained = parts_of(finetune(model, TOKENIZER, recipe, factories.rows(), start=start).adapter)
    for name, part in parts_of(start).items():
        assert not torch.equal(trained[name], part), name


def test_three_factors_are_stored_as_plain_lora_with_a_mark(tmp_path: Path) -> None:
    adapter = made(factories.llama(), variant="three-factor")
    path = written(adapter, tmp_path) / "adapter_model.safetensors"
    assert read_metadata(path)["loractl.variant"] == "three-factor"
    assert {name.rpartition(".lora_")[2] for name in load_file(path)} == {"A.weight", "B.weight"}


def test_of_three_factors_only_the_middle_one_is_trained() -> None:
    model = factories.llama()
    recipe = factories.recipe(variant="three-factor", steps=10)
    start = varied(model, recipe, fresh(model, recipe))
    trained = finetune(model, TOKENIZER, recipe, factories.rows()).adapter
    for name, patch in trained.patches.items():
        u, _, v = torch.linalg.svd(model.get_submodule(name).weight)
        assert torch.equal(patch.a_RI, start.patches[name].a_RI)
        torch.testing.assert_close((patch.a_RI @ v[:4].T).abs(), torch.eye(4), atol=1e-4, rtol=0)
        outside = patch.b_OR - u[:, :4] @ (u[:, :4].T @ patch.b_OR)
        assert float(outside.norm()) < 1e-4 * float(patch.b_OR.norm())


def test_weight_decay_does_not_reach_the_fixed_factors_nor_lengths() -> None:
    model = factories.llama()
    for variant, part in (("three-factor", "a_RI"), ("dora", "magnitude_O")):
        recipe = factories.recipe(variant=variant, weight_decay=50.0, steps=1, learning_rate=1e-3)
        start = varied(model, recipe, fresh(model, recipe))
        trained = finetune(model, TOKENIZER, recipe, factories.rows()).adapter
        for name, patch in trained.patches.items():
            torch.testing.assert_close(getattr(patch, part), getattr(start.patches[name], part), atol=2e-3, rtol=0)


def test_three_factors_do_not_start_from_what_lies_elsewhere() -> None:
    model = factories.llama()
    recipe = factories.recipe(variant="three-factor")
    with pytest.raises(NotRunnable, match="does not lie in"):
        varied(model, recipe, factories.random_adapter(model))
    with pytest.raises(NotRunnable, match="DoRA magnitudes"):
        varied(model, recipe, made(model, variant="dora"))


def test_what_has_no_meaning_is_refused_with_the_modules_name() -> None:
    model = factories.llama()
    with pytest.raises(NotRunnable, match=r"'model.embed_tokens' is an embedding"):
        made(model, targets=("q_proj", "embed_tokens"), variant="dora")
    with pytest.raises(UnknownTargets, match=r"'lm_haed' match no module.*'lm_head'"):
        made(model, whole=("lm_haed",))
    with pytest.raises(UnknownTargets, match="'norm'"):
        made(model, whole=("norm",))
    with pytest.raises(NotRunnable, match=r"q_proj' has factors"):
        varied(model, factories.recipe(whole=("q_proj",), targets=("v_proj",)), factories.random_adapter(model))
    with pytest.raises(BadRequest, match="'q_proj' cannot have factors"):
        parse_recipe(factories.recipe().model_dump() | {"whole": ("q_proj",)})


def test_peft_trains_on_what_was_trained_here(tmp_path: Path) -> None:
    adapter = finetune(
        factories.llama(tied=False), TOKENIZER, factories.recipe(**KINDS["whole beside dora"]), factories.rows()
    ).adapter
    base = factories.llama(tied=False)
    wrapped = PeftModel.from_pretrained(base, written(adapter, tmp_path / "a"), is_trainable=True)
    wrapped.save_pretrained(str(tmp_path / "b"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
