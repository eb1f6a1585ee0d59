"""A base held in 8 or 4 bits is the model of its dequantised weights, and adapters train on it as on that model."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from registry.core.errors import NotRunnable, StoredInBits, ToolMissing
from registry.core.recipes import FullFineTune, Quantisation
from tests.workers import factories
from workers.compute import stream
from workers.compute.bank import Bank, attached
from workers.compute.evaluate import Suite
from workers.compute.finetune import Task, Trained, finetune, finetune_many
from workers.compute.full import tune
from workers.compute.lora import Adapter, dense, fresh, is_transposed, sizes
from workers.compute.merge import Form, merge
from workers.compute.model import Model, load
from workers.compute.quantised import Held, bytes_of, form_of, loaded, loading
from workers.compute.shards import stored_tensors

FORMS: tuple[Quantisation, ...] = ("int8", "nf4")
TOKENIZER = factories.tokenizer()
MAKERS = {"llama": factories.llama, "gpt2": factories.gpt2}


@pytest.fixture(params=["llama", "gpt2"])
def make(request: pytest.FixtureRequest) -> Callable[[], Model]:
    return MAKERS[request.param]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Quantisation:
    asked: Quantisation = request.param
    return asked


def held(model: Model) -> dict[str, Held]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Held)}


def dequantised(model: Model, like: Model) -> Model:
    """``like`` with the weights that ``model`` holds, in float64."""
    for name, module in held(model).items():
        own = like.get_submodule(name)
        weight_OI = module.dense(torch.float32)
        own.weight = nn.Parameter(weight_OI.T if is_transposed(own) else weight_OI, requires_grad=False)
    return like.double()


def magnitudes(adapter: Adapter) -> Adapter:
    """The adapter with DoRA's magnitudes."""
    patches = {
        name: replace(patch, magnitude_O=torch.linspace(0.5, 2, len(patch.b_OR)))
        for name, patch in adapter.patches.items()
    }
    return Adapter(patches, adapter.config)


# ── the model ────────────────────────────────────────────────────────────────


def test_it_answers_as_its_dequantised_weights_do_in_float64(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    model, _ = load(factories.saved(make(), tmp_path), "fp32", form)
    assert held(model).keys() == {name for name, own in make().named_modules() if is_held_in_bits(own, name)}
    expected = factories.logits(dequantised(model, make()))
    torch.testing.assert_close(factories.logits(model).double(), expected, atol=2e-4, rtol=2e-4)


def is_held_in_bits(module: nn.Module, name: str) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"


def test_in_bfloat16_it_is_as_near_to_float64_as_a_base_that_is_not_quantised(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    factories.saved(make(), tmp_path)
    model, plain = (load(tmp_path, "bf16", asked)[0] for asked in (form, None))
    assert factories.logits(model).dtype == torch.bfloat16

    def error(found: Model, reference: Model) -> float:
        expected = factories.logits(reference)
        return float((factories.logits(found).double() - expected).norm() / expected.norm())

    assert error(model, dequantised(model, make())) < 1.5 * error(plain, make().double())


def test_no_weight_moves_farther_than_half_a_step_of_its_form(form: Quantisation, tmp_path: Path) -> None:
    original = factories.llama(hidden_size=64, intermediate_size=128)
    model, _ = load(factories.saved(original, tmp_path), "fp32", form)
    for name, module in held(model).items():
        weight_OI = original.get_submodule(name).weight
        if form == "int8":  # 127 steps to a row's largest; the library reads weights in float16
            step = weight_OI.abs().amax(dim=1, keepdim=True) / 127 + weight_OI.abs() * 2**-10
        else:  # the widest gap of NF4's code is 0.304 of a block's largest, which is kept in 8 bits
            largest = weight_OI.reshape(-1, 64).abs().amax(dim=1, keepdim=True).expand(-1, 64)
            step = 0.304 * 1.05 * largest.reshape(weight_OI.shape) + 0.01 * weight_OI.abs().max()
        assert ((module.dense(torch.float32) - weight_OI).abs() <= step / 2).all()


@pytest.mark.parametrize(("asked", "share"), [("int8", 0.56), ("nf4", 0.30)])
def test_weights_take_a_fraction_of_their_bytes_in_bfloat16(asked: Quantisation, share: float, tmp_path: Path) -> None:
    original = factories.llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    model, _ = load(factories.saved(original, tmp_path), "bf16", asked)
    found = sum(bytes_of(module) for module in held(model).values())
    in_full = sum(2 * module.out_features * module.in_features for module in held(model).values())
    assert found <= share * in_full
    rest = bytes_of(original) // 2 - in_full
    assert loaded(model) == {"quantised": asked, "bytes": pytest.approx(found + rest, rel=0.02)}


def test_embeddings_head_and_norms_stay_as_they_are(form: Quantisation, tmp_path: Path) -> None:
    original = factories.llama(tied=False)
    model, _ = load(factories.saved(original, tmp_path), "fp32", form)
    kept = {name: value for name, value in original.named_parameters() if "_proj" not in name}
    assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} <= kept.keys()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ── adapters on it ───────────────────────────────────────────────────────────


def test_sizes_and_dense_weights_are_read_the_same_from_every_form(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    model, _ = load(factories.saved(make(), tmp_path), "fp32", form)
    for name, module in held(model).items():
        own = make().get_submodule(name)
        assert sizes(module) == sizes(own) == tuple(dense(module).shape)
        assert is_transposed(module) == is_transposed(own)
    recipe = factories.recipe(targets=("all-linear",))
    quantised, full = fresh(model, recipe), fresh(make(), recipe)
    assert quantised.config == full.config
    assert all(torch.equal(quantised.patches[name].a_RI, patch.a_RI) for name, patch in full.patches.items())


@pytest.mark.parametrize("change", [lambda adapter: adapter, magnitudes], ids=["plain", "dora"])
def test_an_adapter_answers_as_on_the_dequantised_weights(
    make: Callable[[], Model], form: Quantisation, change: Callable[[Adapter], Adapter], tmp_path: Path
) -> None:
    model, _ = load(factories.saved(make(), tmp_path), "fp32", form)
    adapter = change(factories.random_adapter(make(), targets=("all-linear",)))
    reference = dequantised(model, make())
    with attached(model, adapter), attached(reference, adapter):
        torch.testing.assert_close(
            factories.logits(model).double(), factories.logits(reference), atol=2e-3, rtol=2e-3
        )


def test_a_whole_weight_takes_the_place_of_one_in_bits(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    model, _ = load(factories.saved(make(), tmp_path), "fp32", form)
    name = next(iter(held(model)))
    own = make().get_submodule(name)
    other = torch.randn(own.weight.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    adapter = Adapter({}, {}, {f"{name}.weight": other})
    reference = dequantised(model, make()).float()
    reference.get_submodule(name).weight = nn.Parameter(other, requires_grad=False)
    with attached(model, adapter):
        torch.testing.assert_close(factories.logits(model), factories.logits(reference), atol=1e-4, rtol=1e-4)


def test_gradients_of_factors_are_those_on_the_dequantised_weights(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    model, _ = load(factories.saved(make(), tmp_path), "fp32", form)
    adapters = [factories.random_adapter(make(), seed=seed, targets=("all-linear",)) for seed in (1, 2)]
    ids_BT = torch.randint(3, 259, (4, 10), generator=torch.Generator().manual_seed(1))

    def gradient(on: Model) -> Tensor:
        bank = Bank(on, adapters, train=True)
        bank.assign([(0, 3), (1, 1)])
        with bank.attached(), bank.gradients() as grad_KP:
            on(input_ids=ids_BT).logits.square().mean().backward()
        return grad_KP

    expected = gradient(dequantised(model, make()))
    found = gradient(model)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


# ── training ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_leaves_what_is_held_alone(
    form: Quantisation, precision: Any, tmp_path: Path
) -> None:
    model, tokenizer = load(factories.saved(factories.llama(), tmp_path), precision, form)
    before = {name: module.get_buffer("packed").clone() for name, module in held(model).items()}
    recipe = factories.recipe(steps=60, targets=("all-linear",), batch_tokens=200, precision=precision)
    losses = finetune(model, tokenizer, recipe, factories.rows()).losses
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert all(torch.equal(module.get_buffer("packed"), before[name]) for name, module in held(model).items())


def test_a_stopped_training_resumes_to_the_same_bytes(form: Quantisation, tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")
    recipe = factories.recipe(steps=6, quantised=form, activation_checkpointing=True)

    def train(**options: Any) -> Trained:
        return finetune(*load(base, "fp32", form), recipe, factories.rows(), **options)

    def stop(progress: dict[str, Any]) -> None:
        if progress["step"] == 3:
            raise KeyboardInterrupt

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(report=stop, checkpoint_dir=tmp_path)
    resumed = train(checkpoint_dir=tmp_path)
    assert resumed.losses == whole.losses
    for name, patch in whole.adapter.patches.items():
        assert torch.equal(resumed.adapter.patches[name].a_RI, patch.a_RI)
        assert torch.equal(resumed.adapter.patches[name].b_OR, patch.b_OR)


def test_several_adapters_train_at_once_as_each_would_alone(form: Quantisation, tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")
    tasks = [
        Task(factories.recipe(steps=6), factories.rows()),
        Task(factories.recipe(steps=4, rank=2, seed=4, targets=("all-linear",)), factories.rows(5)),
    ]
    together = finetune_many(*load(base, "fp32", form), tasks)
    for task, found in zip(tasks, together, strict=True):
        alone = finetune(*load(base, "fp32", form), task.recipe, task.rows)
        assert alone.losses == pytest.approx(found.losses, rel=2e-3)


# ── checkpoints that are quantised already, and what is refused ──────────────


def stored(original: Model, folder: Path, form: str, *, twice: bool = True, **shards: Any) -> Path:
    """A base folder whose weights are stored in this form, as transformers writes it; ``twice``: scales, too."""
    from transformers import BitsAndBytesConfig

    factories.saved(original, folder / "full")
    options: dict[str, Any] = (
        {"load_in_8bit": True} if form == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": twice}
    )  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "full", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    return factories.saved(quantised, folder / form, **shards)


def test_a_checkpoint_in_bits_is_loaded_as_it_is_stored(
    make: Callable[[], Model], form: Quantisation, tmp_path: Path
) -> None:
    folder = stored(make(), tmp_path, form)
    assert form_of(json.loads((folder / "config.json").read_text())) == form
    expected, _ = load(tmp_path / "full", "fp32", form)
    for asked in (None, form):
        model, tokenizer = load(folder, "fp32", asked)
        assert loaded(model) == loaded(expected)
        assert torch.equal(factories.logits(model), factories.logits(expected))
    losses = finetune(model, tokenizer, factories.recipe(targets=("all-linear",)), factories.rows()).losses
    assert losses[-1] < losses[0]


def test_what_is_stored_in_one_form_is_not_held_in_another(tmp_path: Path) -> None:
    folder = stored(factories.llama(), tmp_path, "nf4")
    with pytest.raises(NotRunnable, match=r"in int8 .*stored in nf4 already; leave 'quantised' out"):
        load(folder, "fp32", "int8")
    recipe = FullFineTune(base=factories.BASE, datasets=(factories.DATASET,), precision="fp32")
    with pytest.raises(NotRunnable, match="train its unquantised weights"):
        tune(folder, recipe, factories.rows())


def test_a_form_that_is_not_read_is_refused_by_its_name() -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(NotRunnable, match=r"stored as gptq; read are full weights, and bitsandbytes' nf4"):
        loading(config, None, torch.float32)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, form: Quantisation) -> None:
    def absent(name: str) -> None: ...

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(ToolMissing, match="needs the extra 'quantised'"):
        loading({}, form, torch.float32)
    assert loading({}, None, torch.float32) == {}


def test_records_of_a_quantised_base_pair_with_their_own_only() -> None:
    suite = Suite(factories.choices())
    assert len({suite.harness("fp32", asked) for asked in (None, *FORMS)}) == 3
    assert suite.harness("fp32", None) == suite.harness("fp32")


# ── merging into the numbers that bits stand for ─────────────────────────────


@pytest.mark.parametrize(("stored_as", "twice"), [("int8", True), ("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("blocks", [96, 1 << 18])
def test_a_merge_that_dequantises_adds_the_update_to_the_numbers_and_rounds_once(
    stored_as: str, twice: bool, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", blocks)
    original = factories.llama(hidden_size=72, intermediate_size=88, num_attention_heads=4, num_key_value_heads=2)
    folder = stored(original, tmp_path, stored_as, twice=twice, max_shard_size="40KB")
    adapter = factories.random_adapter(original, targets=("all-linear",))
    merged = merge(folder, adapter, tmp_path / "out", form=Form("bf16", dequantise=True))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert merged.tensors.keys() == stored_tensors(tmp_path / "out").keys() == stored_tensors(tmp_path / "full").keys()
    model, _ = load(folder, "fp32")
    written = {name: tensor.read() for name, tensor in stored_tensors(tmp_path / "out").items()}
    for name, module in held(model).items():
        patch = adapter.patches[name]
        exact = module.dense(torch.float32).double() + patch.b_OR.double() @ patch.a_RI.double() * patch.scale
        off = written[f"{name}.weight"].view(torch.int16).int() - exact.bfloat16().view(torch.int16).int()
        assert int(off.abs().max()) <= 1
        assert float((off != 0).double().mean()) < 2e-3


def test_modules_without_factors_are_dequantised_too_and_the_type_is_the_one_that_config_says(tmp_path: Path) -> None:
    original = factories.llama()
    folder = stored(original, tmp_path, "nf4")
    adapter = factories.random_adapter(original, targets=("q_proj",))
    merge(folder, adapter, tmp_path / "out", form=Form(dequantise=True))
    model, _ = load(folder, "fp32")
    merged, _ = load(tmp_path / "out", "fp32")
    assert form_of(json.loads((tmp_path / "out" / "config.json").read_text())) is None
    for name, module in held(model).items():
        if name not in adapter.patches:
            assert torch.equal(merged.get_submodule(name).weight, module.dense(torch.float32))
    with attached(model, adapter):
        torch.testing.assert_close(factories.logits(merged), factories.logits(model), atol=1e-4, rtol=1e-4)


def test_a_base_in_bits_is_not_merged_into_unless_one_says_so(tmp_path: Path) -> None:
    folder = stored(factories.llama(), tmp_path, "nf4")
    with pytest.raises(StoredInBits, match=r"stored in nf4\.") as refused:
        merge(folder, factories.random_adapter(factories.llama()), tmp_path / "out")
    assert "--dequantise" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_a_transposed_module_in_bits_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = stored(factories.gpt2(), tmp_path, "nf4")
    adapter = factories.random_adapter(factories.gpt2(), targets=("c_attn",))
    with pytest.raises(NotRunnable, match=r"'transformer\.h\.0\..*\.weight' is stored in nf4 as outputs × inputs"):
        merge(folder, adapter, tmp_path / "out", form=Form(dequantise=True))
