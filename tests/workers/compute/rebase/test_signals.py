import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry.core.errors import NotABase
from tests.workers import factories
from workers.compute import shards
from workers.compute.rebase.signals import compare, median_over


def test_a_base_has_not_drifted_from_itself_and_is_no_cast_of_itself(tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path)
    found = compare(base, base)
    assert set(found.drift.values()) == {0.0}
    assert (found.median, found.cast) == (0.0, None)


@pytest.mark.parametrize("blocks", [100, 8 << 20])
def test_a_conversion_and_nothing_else_is_a_cast(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", blocks)
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


@pytest.mark.parametrize("blocks", [100, 8 << 20])
def test_drift_is_the_relative_distance_of_each_tensor(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", blocks)
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
