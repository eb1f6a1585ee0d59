import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from registry.core.errors import BadHeader, BadTensor, NotAnAdapter, NotRunnable
from tests.workers import factories
from workers.compute.bank import attached
from workers.compute.lora import Adapter
from workers.compute.model import Model
from workers.compute.weights import read_adapter, read_metadata, write_adapter

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft sets it by itself, and says so
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor"),  # peft takes a bias of B for a broken shard
]


def write(adapter: Adapter, folder: Path) -> Path:
    write_adapter(adapter, folder, base=factories.BASE, recipe="sha256:" + "0" * 64)
    return folder


def peft_adapter(model: Model, folder: Path, **options: Any) -> torch.Tensor:
    """An adapter made and written by PEFT, every part of it random; its logits."""
    wrapped = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = factories.logits(wrapped)
    wrapped.save_pretrained(str(folder))
    return found


def here(model: Model, folder: Path) -> torch.Tensor:
    with attached(model, read_adapter(folder)):
        return factories.logits(model)


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_what_is_made_here_loads_in_peft_with_the_same_logits(
    make: Callable[[], Model], rank_stabilised: bool, tmp_path: Path
) -> None:
    model = make()
    adapter = factories.random_adapter(model, targets=("all-linear",), rank_stabilised=rank_stabilised)
    with attached(model, adapter):
        expected = factories.logits(model)
    wrapped = PeftModel.from_pretrained(make(), write(adapter, tmp_path))
    torch.testing.assert_close(factories.logits(wrapped), expected, atol=1e-4, rtol=1e-4)


LLAMA = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "rank-stabilised": {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*\.mlp\.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.self_attn.q_proj": 5},
    },
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_dora": True},
    "a saved head": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"], "r": 4},
    "a head": {"target_modules": ["lm_head"], "r": 4},
}


@pytest.mark.parametrize("options", [pytest.param(value, id=key) for key, value in LLAMA.items()])
def test_what_peft_made_runs_here_with_the_same_logits(options: dict[str, Any], tmp_path: Path) -> None:
    expected = peft_adapter(factories.llama(tied=False), tmp_path, **options)
    torch.testing.assert_close(here(factories.llama(tied=False), tmp_path), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"use_dora": True}],
    ids=["plain", "all biases", "biases of targets", "a bias of B", "DoRA"],
)
def test_what_peft_made_on_conv1d_runs_here_with_the_same_logits(options: dict[str, Any], tmp_path: Path) -> None:
    expected = peft_adapter(factories.gpt2(), tmp_path, target_modules=["c_attn", "c_proj"], r=4, **options)
    torch.testing.assert_close(here(factories.gpt2(), tmp_path), expected, atol=1e-4, rtol=1e-4)


def test_reading_and_writing_is_the_identity(tmp_path: Path) -> None:
    peft_adapter(
        factories.gpt2(), tmp_path / "peft", target_modules=["c_attn"], r=4, lora_bias=True, bias="all",
        modules_to_save=["lm_head"],
    )  # fmt: skip
    write(read_adapter(tmp_path / "peft"), tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_equal_adapters_are_equal_bytes_with_the_base_and_recipe_inside(tmp_path: Path) -> None:
    adapter = factories.random_adapter(factories.llama())
    turned = Adapter(dict(reversed(adapter.patches.items())), dict(reversed(adapter.config.items())))
    one, two = write(adapter, tmp_path / "one"), write(turned, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    metadata = read_metadata(one / "adapter_model.safetensors")
    code = metadata.pop("loractl.code")
    assert code == f"loractl {version('loractl')}, torch {torch.__version__.split('+')[0]}"
    assert metadata == {"format": "pt", "loractl.base": factories.BASE, "loractl.recipe": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "type IA3 cannot be run here"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "invocation tokens"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write(factories.random_adapter(factories.llama()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(NotRunnable, match=reason):
        read_adapter(tmp_path)


def test_a_factor_without_its_partner_is_refused(tmp_path: Path) -> None:
    write(factories.random_adapter(factories.llama()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(BadTensor, match=r"missing beside its lora_A.weight"):
        read_adapter(tmp_path)


def test_factors_of_two_ranks_are_refused(tmp_path: Path) -> None:
    write(factories.random_adapter(factories.llama()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name][:, :2].contiguous()}, path)
    with pytest.raises(BadTensor, match="rank 2, but A of the same module has rank 4"):
        read_adapter(tmp_path)


def test_a_folder_without_weights_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(NotAnAdapter, match=r"no adapter_config.json"):
        read_adapter(tmp_path)
    write(factories.random_adapter(factories.llama()), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(BadHeader):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(NotAnAdapter, match=r"no adapter_model.safetensors"):
        read_adapter(tmp_path)
