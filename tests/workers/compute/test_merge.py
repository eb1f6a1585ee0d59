import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from registry.core.errors import BadTensor, NotRunnable, PathUnusable
from tests.workers import factories
from workers.compute import shards
from workers.compute.lora import Adapter, Patch, attached, layers_of
from workers.compute.merge import merge
from workers.compute.model import Model


def adapted(model: Model, adapter: Adapter) -> torch.Tensor:
    with attached(layers_of(model, adapter)):
        return factories.logits(model)


def assert_answers(folder: Path, logits: torch.Tensor) -> None:
    """The model of ``folder`` loads in transformers and gives ``logits``."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(factories.logits(model), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("blocks", [256, 8 << 20])
def test_merged_is_adapted(
    make: Callable[[], Model], blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", blocks)
    model = make()
    adapter = factories.random_adapter(model, targets=("all-linear",))
    merge(factories.saved(model, tmp_path / "base"), adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_untouched_tensors_and_files_are_the_same_bytes(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    merged = merge(base, factories.random_adapter(model), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(merged.changed) == {name for name in before if "q_proj" in name or "v_proj" in name}
    for name in ("config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_every_tensors_digest_is_taken_on_the_way(tmp_path: Path) -> None:
    model = factories.llama()
    merged = merge(factories.saved(model, tmp_path / "base"), factories.random_adapter(model), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.tensors == {name: blake3(value.numpy().tobytes()).hexdigest() for name, value in written.items()}


def test_shards_and_their_index_stay_as_they_were(tmp_path: Path) -> None:
    model = factories.llama(tied=False)
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    adapter = factories.random_adapter(model)
    merge(base, adapter, tmp_path / "out")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "out")
    )
    assert len(set(before["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_the_update_is_rounded_once_to_the_bases_own_type(tmp_path: Path) -> None:
    model = factories.llama().bfloat16()
    adapter = factories.random_adapter(model)
    base = factories.saved(model, tmp_path / "base")
    merge(base, adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name, patch in adapter.patches.items():
        exact = before[f"{name}.weight"].double() + patch.update.dense().double()
        assert after[f"{name}.weight"].dtype == torch.bfloat16
        error = (after[f"{name}.weight"].double() - exact).abs()
        assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize("stored", ["one shard", "many shards"])
@pytest.mark.parametrize("target", ["head", "embedding", "saved head"])
def test_a_tied_head_that_diverges_is_untied(target: str, stored: str, tmp_path: Path) -> None:
    model = factories.llama(tied=True)
    options = {"max_shard_size": "60KB"} if stored == "many shards" else {}
    base = factories.saved(model, tmp_path / "base", **options)
    torch.manual_seed(1)
    if target == "head":
        adapter = factories.random_adapter(model, targets=("lm_head",))
    elif target == "embedding":
        patch = Patch(torch.randn(2, 259) * 0.1, torch.randn(32, 2), 1.0, embedding=True)
        adapter = Adapter({"model.embed_tokens": patch}, {})
    else:
        adapter = replace(factories.random_adapter(model), replaced={"lm_head.weight": torch.randn(259, 32)})
    merged = merge(base, adapter, tmp_path / "out")
    assert merged.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_magnitudes_and_biases_are_merged(tmp_path: Path) -> None:
    model = factories.llama(attention_bias=True)
    torch.manual_seed(1)
    adapter = factories.random_adapter(model)
    patches = {
        name: replace(patch, magnitude_O=torch.rand(len(patch.b_OR)) + 1)
        if "q_proj" in name
        else replace(patch, bias_O=torch.randn(len(patch.b_OR)))
        for name, patch in adapter.patches.items()
    }
    adapter = replace(adapter, patches=patches, replaced={"model.layers.0.self_attn.k_proj.bias": torch.randn(16)})
    merge(factories.saved(model, tmp_path / "base"), adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_files_without_the_base_prefix_are_merged_too(tmp_path: Path) -> None:
    model = factories.gpt2()
    base = factories.saved(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = factories.random_adapter(model, targets=("c_attn",))
    merge(base, adapter, tmp_path / "out")
    assert_answers(tmp_path / "out", adapted(model, adapter))


def test_a_merge_never_writes_over_a_folder_that_holds_something(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    with pytest.raises(PathUnusable, match="new or empty folder"):
        merge(base, factories.random_adapter(model), base)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    model = factories.llama()
    base = factories.saved(model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(NotRunnable, match="the base is quantised"):
        merge(base, factories.random_adapter(model), tmp_path / "out")


def test_a_sum_that_overflows_the_bases_type_is_refused(tmp_path: Path) -> None:
    model = factories.llama().half()
    adapter = factories.random_adapter(model)
    patches = {name: replace(patch, scale=1e6) for name, patch in adapter.patches.items()}
    with pytest.raises(BadTensor, match="row 0 is off its float64 value"):
        merge(factories.saved(model, tmp_path / "base"), replace(adapter, patches=patches), tmp_path / "out")


def test_progress_counts_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    model, seen = factories.llama(tied=False), list[dict[str, Any]]()
    base = factories.saved(model, tmp_path / "base", max_shard_size="60KB")
    merge(base, factories.random_adapter(model), tmp_path / "out", seen.append)
    assert [progress["step"] for progress in seen] == sorted(progress["step"] for progress in seen)
    assert seen[-1]["step"] == seen[-1]["steps"]
