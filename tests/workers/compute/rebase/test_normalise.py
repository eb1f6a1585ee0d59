"""Every kind of adapter that PEFT makes, as an update of its own base with PEFT's own logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from registry.core.adapter import AdapterSpec
from registry.core.errors import BadTensor, NotRunnable
from registry.files import read_adapter as described
from tests.workers import factories
from workers.compute.bank import attached
from workers.compute.lora import Adapter
from workers.compute.model import Model
from workers.compute.rebase.normalise import normalised
from workers.compute.weights import read_adapter, read_unconverted, write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
]


def untied() -> Model:
    return factories.llama(tied=False)


def trained(wrapped: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Every trained part moved, saved by PEFT; the logits."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = factories.logits(wrapped)
    wrapped.save_pretrained(str(folder), **options)
    return found


def on(model: Model, adapter: Adapter) -> torch.Tensor:
    with attached(model, adapter):
        return factories.logits(model)


STARTS: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "pissa": (untied, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "pissa, tied": (factories.llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "pissa with patterns": (
        untied, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}, "use_rslora": True},
    ),
    "pissa, DoRA": (untied, {"target_modules": ["q_proj"], "use_dora": True}),
    "pissa, Conv1D": (factories.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "olora": (untied, {"target_modules": ["q_proj", "down_proj"]}),
    "olora, DoRA": (untied, {"target_modules": ["q_proj"], "use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STARTS)
def test_what_was_trained_on_a_changed_base_is_an_update_of_the_base_as_it_was(kind: str, tmp_path: Path) -> None:
    make, options = STARTS[kind]
    base = factories.saved(make(), tmp_path / "base")
    options = options | {"init_lora_weights": kind.partition(",")[0].partition(" ")[0]}
    config = LoraConfig(r=4, lora_alpha=6, **options)
    expected = trained(get_peft_model(make(), config), tmp_path / "adapter")
    with pytest.raises(NotRunnable, match="changed the base"):
        read_adapter(tmp_path / "adapter")
    adapter = normalised(tmp_path / "adapter", base)
    torch.testing.assert_close(on(make(), adapter), expected, atol=2e-4, rtol=1e-3)
    write_adapter(adapter, tmp_path / "plain", base=factories.BASE, recipe="sha256:" + "0" * 64)
    torch.testing.assert_close(on(make(), read_adapter(tmp_path / "plain")), expected, atol=2e-4, rtol=1e-3)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "plain"))
    torch.testing.assert_close(factories.logits(theirs), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_was_not_trained_changes_nothing(start: str, tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path / "base")
    options: dict[str, Any] = {"init_lora_weights": start, "target_modules": ["q_proj"]}
    get_peft_model(untied(), LoraConfig(r=4, **options)).save_pretrained(str(tmp_path / "adapter"))
    model = untied()
    adapter = normalised(tmp_path / "adapter", base)
    torch.testing.assert_close(on(model, adapter), factories.logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_the_adapter_from_before_the_training_says_what_was_taken(start: str, tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path / "base")
    options: dict[str, Any] = {"init_lora_weights": start, "target_modules": ["q_proj", "down_proj"]}
    wrapped = get_peft_model(untied(), LoraConfig(r=4, **options))
    wrapped.save_pretrained(str(tmp_path / "initial"))
    expected = trained(wrapped, tmp_path / "adapter")
    adapter = normalised(tmp_path / "adapter", base, tmp_path / "initial")
    torch.testing.assert_close(on(untied(), adapter), expected, atol=2e-4, rtol=1e-3)


def test_what_peft_converted_itself_is_read_without_the_base(tmp_path: Path) -> None:
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    wrapped = get_peft_model(untied(), config)
    config.init_lora_weights = True  # as PEFT's documentation has it
    wrapped.save_pretrained(str(tmp_path / "initial"))
    config.init_lora_weights = "pissa"
    expected = trained(
        wrapped, tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    torch.testing.assert_close(on(untied(), read_adapter(tmp_path / "adapter")), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_what_cannot_be_told_from_the_base_is_refused(start: str, tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path / "base")
    write_adapter(factories.random_adapter(untied()), tmp_path / "a", base=factories.BASE, recipe="sha256:" + "0" * 64)
    changed(tmp_path / "a", init_lora_weights=start)
    with pytest.raises(NotRunnable, match=f"'{start}' changed the base"):
        normalised(tmp_path / "a", base)
    assert f"'{start}' changed the base" in str(described(tmp_path / "a").why_not_runnable)


def test_a_tied_head_and_an_initial_adapter_of_another_shape_are_refused(tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")
    head = factories.random_adapter(factories.llama(), targets=("lm_head",))
    write_adapter(head, tmp_path / "a", base=factories.BASE, recipe="sha256:" + "0" * 64)
    changed(tmp_path / "a", init_lora_weights="pissa")
    with pytest.raises(NotRunnable, match="the embedding that is tied to it"):
        normalised(tmp_path / "a", base)
    other = factories.random_adapter(factories.llama())
    write_adapter(other, tmp_path / "b", base=factories.BASE, recipe="sha256:" + "0" * 64)
    with pytest.raises(NotRunnable, match=r"does not fit it at 'lm_head'"):
        normalised(tmp_path / "a", base, tmp_path / "b")


def test_a_plain_adapter_is_read_as_it_is(tmp_path: Path) -> None:
    adapter = factories.random_adapter(untied())
    write_adapter(adapter, tmp_path / "a", base=factories.BASE, recipe="sha256:" + "0" * 64)
    found = normalised(tmp_path / "a", tmp_path / "no base is read")
    assert all(torch.equal(found.patches[name].b_OR, patch.b_OR) for name, patch in adapter.patches.items())


def changed(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ── AdaLoRA ──────────────────────────────────────────────────────────────────


def adalora(folder: Path, make: Callable[[], Model] = untied, **options: Any) -> torch.Tensor:
    targets = ["c_attn", "c_proj"] if make is factories.gpt2 else ["q_proj", "down_proj"]
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=9, target_modules=targets, **options)
    return trained(get_peft_model(make(), config), folder)


@pytest.mark.parametrize("make", [untied, factories.gpt2])
def test_adalora_is_the_plain_adapter_with_its_values_in_a(make: Callable[[], Model], tmp_path: Path) -> None:
    expected = adalora(tmp_path / "a", make)
    adapter = read_adapter(tmp_path / "a")
    torch.testing.assert_close(on(make(), adapter), expected, atol=2e-4, rtol=1e-3)
    write_adapter(adapter, tmp_path / "plain", base=factories.BASE, recipe="sha256:" + "0" * 64)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "plain"))
    torch.testing.assert_close(factories.logits(theirs), expected, atol=2e-4, rtol=1e-3)


def test_ranks_that_adalora_masked_are_gone_and_its_scale_is_that_of_the_first_rank(tmp_path: Path) -> None:
    model = untied()
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=10, lora_alpha=9, target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(model, config)
    trained(wrapped, tmp_path / "whole")
    masks = [[True, False, True, True, False, True], [False, True, False, False, False, False], [True] * 6, [True] * 6]
    names = [name for name, _ in wrapped.model.named_parameters() if "lora_E" in name]
    pattern = dict(zip(names, masks, strict=True))
    with torch.no_grad():
        for name, mask in pattern.items():
            wrapped.model.get_parameter(name)[~torch.tensor(mask)] = 0.0
    expected = factories.logits(wrapped)
    config.rank_pattern = pattern
    wrapped.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    assert sorted(patch.a_RI.shape[0] for patch in adapter.patches.values()) == [1, 4, 6, 6]
    torch.testing.assert_close(on(untied(), adapter), expected, atol=2e-4, rtol=1e-3)


def test_the_registry_knows_what_can_be_run(tmp_path: Path) -> None:
    adalora(tmp_path / "ada")
    found: AdapterSpec = described(tmp_path / "ada")
    assert (found.runnable, found.opaque, found.max_rank, found.features) == (True, False, 6, ("adalora",))
    assert {module.scale for module in found.modules} == {9 / (6 + 1e-5)}
    wrapped = get_peft_model(untied(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]))
    trained(wrapped, tmp_path / "pissa")
    found = described(tmp_path / "pissa")
    assert (found.runnable, found.features) == (True, ("changed-base",))


def test_three_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    adalora(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if name.endswith("lora_E"))
    save_file({key: value for key, value in whole.items() if key != name}, path)
    for read in (read_unconverted, described):
        with pytest.raises(BadTensor, match="lora_E"):
            read(tmp_path)
    save_file(whole | {name: whole[name][:2].contiguous()}, path)
    for read in (read_unconverted, described):
        with pytest.raises(BadTensor, match="rank 6"):
            read(tmp_path)
