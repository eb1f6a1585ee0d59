"""combine, compress and extract by hand: `python -m workers.run` on local folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import LoractlError
from registry.core.recipes import AnyRecipe, Combine, Compress, Extract, recipe_digest
from tests.workers import factories
from workers.compute.weights import read_adapter, read_metadata, write_adapter
from workers.run import main

SECOND = "sha256:" + "6" * 64


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two adapters, a base, and the base with a low-rank update in one module."""
    model = factories.llama()
    made = {"base": factories.saved(model, tmp_path / "base")}
    for role, seed, rank in (("adapter", 1, 4), ("adapter.0", 1, 4), ("adapter.1", 2, 3)):
        adapter = factories.random_adapter(model, seed, rank=rank)
        write_adapter(adapter, tmp_path / role, base=factories.BASE, recipe="sha256:" + "0" * 64)
        made[role] = tmp_path / role
    model.model.layers[1].mlp.up_proj.weight.add_(torch.ones(64, 1) @ torch.ones(1, 32))
    return made | {"tuned": factories.saved(model, tmp_path / "tuned")}


def run(recipe: AnyRecipe, folders: dict[str, Path], out: Path, *roles: str, code: int = 0) -> dict[str, Any]:
    (path := out.with_suffix(".json")).write_text(recipe.model_dump_json())
    given = [part for role in roles for part in ("--in", f"{role}={folders[role]}")]
    assert main([str(path), *given, "--out", str(out)]) == code
    found: dict[str, Any] = json.loads((out / ("error.json" if code else "result.json")).read_text())
    if not code:
        metadata = read_metadata(out / "adapter" / "adapter_model.safetensors")
        assert metadata["loractl.base"] == factories.BASE
        assert metadata["loractl.recipe"] == found["recipe"] == str(recipe_digest(recipe))
    return found


def test_combine_leaves_one_adapter_of_two(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Combine(base=factories.BASE, adapters=(factories.ADAPTER, SECOND))
    found = run(recipe, folders, tmp_path / "out", "adapter.0", "adapter.1")
    assert found["method"] == "concat"
    assert {(m["before"], m["after"], m["energy"]) for m in found["modules"].values()} == {(7, 7, 1.0)}
    one, two, both = (read_adapter(f) for f in (folders["adapter.0"], folders["adapter.1"], tmp_path / "out/adapter"))
    for name, patch in both.patches.items():
        expected = one.patches[name].update.dense() + two.patches[name].update.dense()
        torch.testing.assert_close(patch.update.dense(), expected, atol=1e-5, rtol=1e-5)


def test_compress_leaves_a_smaller_adapter_and_its_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    found = run(Compress(base=factories.BASE, adapter=factories.ADAPTER, rank=1), folders, tmp_path / "out", "adapter")
    assert found["bytes"]["after"] * 4 == found["bytes"]["before"]
    assert 0 < found["energy"] < 1
    assert {patch.a_RI.shape[0] for patch in read_adapter(tmp_path / "out" / "adapter").patches.values()} == {1}


def test_extract_leaves_what_the_fine_tune_changed(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Extract(base=factories.BASE, tuned=factories.OTHER_BASE)
    found = run(recipe, folders, tmp_path / "out", "base", "tuned")
    assert found["modules"].keys() == {"model.layers.1.mlp.up_proj"}
    assert found["rest"] == {}
    [patch] = read_adapter(tmp_path / "out" / "adapter").patches.values()
    torch.testing.assert_close(patch.update.dense(), torch.ones(64, 32), atol=1e-5, rtol=1e-5)


def test_a_sum_that_has_no_meaning_is_left_as_a_problem(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = Combine(base=factories.BASE, adapters=(factories.ADAPTER, SECOND), method="linear")
    problem = run(recipe, folders, tmp_path / "out", "adapter.0", "adapter.1", code=1)
    assert LoractlError.from_problem(problem).code == "not-combinable"
