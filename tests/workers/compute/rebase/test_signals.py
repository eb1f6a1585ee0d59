import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry.core.errors import NotABase
from tests.workers import factories
from workers.compute.lora import Adapter
from workers.compute.model import Model
from workers.compute.rebase import signals
from workers.compute.rebase.signals import compare, median_over


def test_a_base_has_not_drifted_from_itself_and_is_no_cast_of_itself(tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path)
    found = compare(base, base)
    assert set(found.drift.values()) == {0.0}
    assert (found.median, found.cast) == (0.0, None)


@pytest.mark.parametrize("blocks", [100, 1 << 18])
def test_a_conversion_and_nothing_else_is_a_cast(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "BLOCK_ELEMENTS", blocks)
    old = factories.saved(factories.llama(), tmp_path / "old")
    new = factories.saved(factories.llama().bfloat16(), tmp_path / "new", max_shard_size="60KB")
    found = compare(old, new)
    assert found.cast == "BF16"
    assert 0 < (found.median or 0) < 0.01
    path = min(new.glob("*.safetensors"))
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert compare(old, new).cast is None


@pytest.mark.parametrize("blocks", [100, 1 << 18])
def test_drift_is_the_relative_distance_of_each_tensor(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "BLOCK_ELEMENTS", blocks)
    old, new = (factories.saved(factories.llama(seed), tmp_path / str(seed)) for seed in (0, 1))
    found = compare(old, new)
    w1, w2 = (load_file(folder / "model.safetensors") for folder in (old, new))
    for name, value in found.drift.items():
        assert value == pytest.approx(float((w2[name] - w1[name]).norm() / w1[name].norm()), rel=1e-5)
    assert found.median == pytest.approx(math.sqrt(2), rel=0.05)


def test_tensors_without_a_partner_are_named(tmp_path: Path) -> None:
    old = factories.saved(factories.llama(), tmp_path / "old")
    new = factories.saved(factories.llama(tied=False, intermediate_size=48), tmp_path / "new")
    found = compare(old, new)
    assert (found.only_old, found.only_new) == ((), ("lm_head.weight",))
    assert len(found.reshaped) == 2 * 3
    assert not any("mlp" in name for name in found.drift)


def test_a_tensor_that_was_zero_has_no_relative_drift(tmp_path: Path) -> None:
    for name, value in (("old", 0.0), ("new", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((2, 2), value)}, tmp_path / name / "model.safetensors")
    assert compare(tmp_path / "old", tmp_path / "new").drift == {"w": None}
    assert compare(tmp_path / "old", tmp_path / "old").drift == {"w": 0.0}


def test_the_median_is_over_the_tensors_asked_for() -> None:
    drift = {"a": 1.0, "b": 3.0, "c": 100.0, "missing": None}
    assert median_over(drift, ["a", "b", "missing"]) == 2.0
    assert median_over(drift, ["missing"]) is None


def test_a_folder_without_weights_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(NotABase, match=r"no \.safetensors file"):
        compare(tmp_path, tmp_path)


# ── of adapters ──────────────────────────────────────────────────────────────


def untied(seed: int = 0) -> Model:
    return factories.llama(seed, tied=False)


@pytest.mark.parametrize("blocks", [100, 1 << 18])
@pytest.mark.parametrize("make", [untied, factories.gpt2], ids=["llama", "gpt2"])
def test_drift_inside_is_that_of_what_an_adapter_reads_and_writes(
    make: Callable[..., Model], blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "BLOCK_ELEMENTS", blocks)
    old, new = (factories.saved(make(seed), tmp_path / str(seed)) for seed in (0, 1))
    adapters = [factories.random_adapter(make(), seed, targets=("all-linear",), rank=2 + seed) for seed in (0, 1)]
    found = compare(old, new, adapters=adapters)
    for adapter, one in zip(adapters, found.adapters, strict=True):
        assert one.modules.keys() == adapter.patches.keys()
        for name, patch in adapter.patches.items():
            w1, w2 = (_dense(make(seed), name) for seed in (0, 1))
            reads, writes = torch.linalg.pinv(patch.a_RI) @ patch.a_RI, patch.b_OR @ torch.linalg.pinv(patch.b_OR)
            place = one.modules[name]
            assert place.drift == pytest.approx(float((w2 - w1).norm() / w1.norm()), rel=1e-4)
            assert place.reads == pytest.approx(float(((w2 - w1) @ reads).norm() / (w1 @ reads).norm()), rel=1e-3)
            assert place.writes == pytest.approx(float((writes @ (w2 - w1)).norm() / (writes @ w1).norm()), rel=1e-3)
        assert one.most == max(place.drift or 0 for place in one.modules.values())


def _dense(model: Model, name: str) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(name).weight
    return weight.T if model.config.model_type == "gpt2" else weight


def test_a_drift_beside_the_adapters_spaces_is_not_inside_them(tmp_path: Path) -> None:
    adapter, name = factories.random_adapter(untied()), "model.layers.0.self_attn.q_proj"
    patch, moved = adapter.patches[name], untied()
    apart = torch.eye(32) - torch.linalg.pinv(patch.a_RI) @ patch.a_RI
    with torch.no_grad():
        moved.get_submodule(name).weight += torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) @ apart
    old, new = factories.saved(untied(), tmp_path / "old"), factories.saved(moved, tmp_path / "new")
    place = compare(old, new, adapters=[adapter]).adapters[0].modules[name]
    assert (place.reads or 0) < 1e-5 < 0.5 < (place.drift or 0)


def test_an_embedding_reads_its_tokens(tmp_path: Path) -> None:
    moved = untied()
    with torch.no_grad():
        moved.model.embed_tokens.weight[7] += 1
    old, new = factories.saved(untied(), tmp_path / "old"), factories.saved(moved, tmp_path / "new")
    adapter = factories.random_adapter(untied(), targets=("embed_tokens",), rank=1)
    patch = adapter.patches["model.embed_tokens"]
    found = []
    for token in (7, 8):
        a_RI = torch.zeros_like(patch.a_RI)
        a_RI[0, token] = 1
        one = replace(adapter, patches={"model.embed_tokens": replace(patch, a_RI=a_RI)})
        found.append(compare(old, new, adapters=[one]).adapters[0].modules["model.embed_tokens"].reads)
    assert (found[0] or 0) > 0.1
    assert found[1] == 0.0


def with_text(new: Path, old: Path, adapter: Adapter) -> signals.Found:
    return compare(old, new, adapters=[adapter], inputs=factories.rows(40)).adapters[0]


def test_on_the_same_base_an_adapter_says_the_same(tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path)
    found = with_text(base, base, factories.random_adapter(untied()))
    assert found.cosine == pytest.approx(1.0, abs=1e-5)
    assert found.excess == pytest.approx(0.0, abs=1e-5)
    assert (found.alpha, found.drift, found.inside) == (1.0, 0.0, 0.0)


def test_on_an_unrelated_base_it_says_another_thing(tmp_path: Path) -> None:
    old, new = (factories.saved(untied(seed), tmp_path / str(seed)) for seed in (0, 1))
    assert abs(with_text(new, old, factories.random_adapter(untied())).cosine or 1.0) < 0.5


def test_of_a_base_that_holds_half_the_update_half_is_best(tmp_path: Path) -> None:
    adapter, moved = factories.random_adapter(untied()), untied()
    with torch.no_grad():
        for name, patch in adapter.patches.items():
            moved.get_submodule(name).weight += patch.update.dense() / 2
    old, new = factories.saved(untied(), tmp_path / "old"), factories.saved(moved, tmp_path / "new")
    found = with_text(new, old, adapter)
    assert found.alpha == 0.5
    assert (found.excess or 0.0) != 0.0


def test_without_text_no_model_is_run(tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path)
    (base / "tokenizer.json").unlink()
    found = compare(base, base, adapters=[factories.random_adapter(untied())]).adapters[0]
    assert (found.cosine, found.excess, found.alpha) == (None, None, None)


def test_what_is_reported_ends_the_work(tmp_path: Path) -> None:
    base = factories.saved(untied(), tmp_path)

    def stop(progress: dict[str, int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(base, base, stop)
