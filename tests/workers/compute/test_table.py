"""Laws of bases of an unknown model type: merged and extracted as if it were known, or refused where nothing tells."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry.core.errors import NotExtractable, NotRunnable
from registry.core.recipes import Combine, Compress, Extract, Merge
from tests.workers import factories
from workers.compute.extract import extract
from workers.compute.lora import Adapter, Patch
from workers.compute.merge import merge
from workers.compute.model import Model
from workers.compute.weights import read_adapter, write_adapter
from workers.run import run

RECIPE = "sha256:" + "0" * 64


def unheard_of(model: Model, folder: Path, **config: Any) -> Path:
    """The model as a base of a type that nobody knows."""
    factories.saved(model, folder)
    said = json.loads((folder / "config.json").read_text())
    said |= {"model_type": "unheard_of", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def with_embedding(adapter: Adapter) -> Adapter:
    """The factors of the embedding are drawn, and said to be its."""
    name = "model.embed_tokens"
    patch = adapter.patches[name]
    drawn = replace(patch, a_RI=torch.rand(patch.a_RI.shape), embedding=True)
    return replace(adapter, patches={**adapter.patches, name: drawn})


def untied() -> Model:
    return factories.llama(tied=False)


def with_everything(model: Model) -> Adapter:
    """Factors on every linear module, one of them with DoRA, and a norm's neighbour that is replaced."""
    made = factories.random_adapter(model, targets=("all-linear",))
    name, patch = next(iter(made.patches.items()))
    long = replace(patch, magnitude_O=torch.rand(patch.b_OR.shape[0]) + 0.5)
    return replace(made, patches={**made.patches, name: long})


@pytest.mark.parametrize("make", [untied, factories.llama, factories.gpt2], ids=["llama", "tied", "gpt2"])
def test_a_merge_is_to_the_byte_that_into_a_known_type(make: Callable[[], Model], tmp_path: Path) -> None:
    model = make()
    adapter = with_everything(model)
    known, other = factories.saved(model, tmp_path / "known"), unheard_of(model, tmp_path / "other")
    merges = [merge(base, adapter, tmp_path / f"{base.name}-out") for base in (known, other)]
    assert merges[0] == merges[1]
    assert merges[0].changed
    contents = [(tmp_path / f"{name}-out" / "model.safetensors").read_bytes() for name in ("known", "other")]
    assert contents[0] == contents[1]


def test_names_may_lack_the_prefix_or_have_it(tmp_path: Path) -> None:
    model = factories.gpt2()
    adapter = factories.random_adapter(model, targets=("c_attn",))
    bare = replace(adapter, patches={key.removeprefix("transformer."): patch for key, patch in adapter.patches.items()})
    assert bare.patches.keys() != adapter.patches.keys()
    base = unheard_of(model, tmp_path / "base")
    assert merge(base, bare, tmp_path / "bare").tensors == merge(base, adapter, tmp_path / "whole").tensors


def test_embeddings_and_heads_are_merged_where_the_config_says_that_they_are_apart(tmp_path: Path) -> None:
    model = untied()
    adapter = with_embedding(factories.random_adapter(model, targets=("embed_tokens", "lm_head")))
    whole = {"model.embed_tokens.weight": torch.ones(259, 32)}
    known = factories.saved(model, tmp_path / "known")
    for name, made in (("factors", adapter), ("whole", Adapter({}, adapter.config, whole))):
        found = merge(unheard_of(model, tmp_path / name), made, tmp_path / f"{name}-out")
        assert found.tensors == merge(known, made, tmp_path / f"{name}-known").tensors
        unsure = unheard_of(model, tmp_path / f"{name}-unsure", tie_word_embeddings=None)
        with pytest.raises(NotRunnable, match='no "tie_word_embeddings": false'):
            merge(unsure, made, tmp_path / "no")


def test_what_the_table_does_not_have_or_has_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    model = factories.llama()
    base, adapter = unheard_of(model, tmp_path / "base"), factories.random_adapter(model, targets=("up_proj",))
    patches = {name: replace(patch, a_RI=patch.b_OR.T, b_OR=patch.a_RI.T) for name, patch in adapter.patches.items()}
    turned = replace(adapter, patches=patches)
    square = with_embedding(factories.random_adapter(model, targets=("q_proj", "embed_tokens")))
    unsure = replace(square, config=square.config | {"fan_in_fan_out": True})
    elsewhere = replace(adapter, patches={"model.layers.9.mlp.up_proj": next(iter(adapter.patches.values()))})
    norm = replace(adapter, patches={"model.norm": Patch(torch.ones(1, 32), torch.ones(32, 1), 1.0)})
    for wrong, why in (
        (turned, "B·A for 'model.layers.0.mlp.up_proj' is 32×64, its weight 64×32"),
        (unsure, r"nothing tells whether 'model\.layers\.0\.self_attn\.q_proj' is stored as inputs × outputs"),
        (elsewhere, "no module 'model.layers.9.mlp.up_proj'"),
        (norm, "'model.norm' is a Module"),
    ):
        with pytest.raises(NotRunnable, match=why):
            merge(base, wrong, tmp_path / "out")
    bits = unheard_of(model, tmp_path / "bits", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(NotRunnable, match="stored in gptq, and its model type 'unheard_of' is not known"):
        merge(bits, adapter, tmp_path / "out")
    (tmp_path / "odd").mkdir()
    save_file({"layers.0.forward.weight": torch.ones(2, 2)}, tmp_path / "odd" / "model.safetensors")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(NotRunnable, match=r"below 'layers\.0\.forward' are no names of modules"):
        merge(tmp_path / "odd", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_extracted_is_what_it_is_of_a_known_type_and_merged_again_the_tuned_model(tmp_path: Path) -> None:
    model, recipe = factories.llama(), Extract(base=factories.BASE, tuned=factories.OTHER_BASE, energy=1.0)
    adapter = factories.random_adapter(model, targets=("all-linear",))
    bases = [factories.saved(model, tmp_path / "known"), unheard_of(model, tmp_path / "other")]
    for base in bases:
        merge(base, adapter, tmp_path / f"{base.name}-tuned")
    known, other = (extract(base, tmp_path / f"{base.name}-tuned", recipe) for base in bases)
    assert other.modules == known.modules
    assert other.adapter.config == known.adapter.config
    again = merge(bases[1], other.adapter, tmp_path / "again")
    tuned = load_file(tmp_path / "other-tuned" / "model.safetensors")
    for name, value in load_file(tmp_path / "again" / "model.safetensors").items():
        torch.testing.assert_close(value, tuned[name], rtol=1e-4, atol=1e-4)
    assert len(again.changed) == 14


def test_an_embedding_that_differs_is_no_linear_layer(tmp_path: Path) -> None:
    model, recipe = untied(), Extract(base=factories.BASE, tuned=factories.OTHER_BASE, energy=1.0, rest="replace")
    base, tuned = unheard_of(model, tmp_path / "base"), unheard_of(model, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(NotExtractable, match=r"'model\.embed_tokens\.weight' .*--rest drop"):
        extract(base, tuned, recipe)


def test_jobs_merge_combine_and_compress_and_verify_says_that_it_cannot(tmp_path: Path) -> None:
    model = factories.llama()
    folders = {"base": unheard_of(model, tmp_path / "base")}
    for role in ("adapter", "adapter.0", "adapter.1"):
        folders[role] = tmp_path / role
        write_adapter(factories.random_adapter(model), folders[role], base=factories.BASE, recipe=RECIPE)
    plan: dict[str, Any] = {"base": factories.BASE, "adapter": factories.ADAPTER}
    two = Combine(base=factories.BASE, adapters=(factories.ADAPTER, factories.SUITE), method="concat")
    for recipe in (Merge(**plan), two, Compress(**plan, energy=0.9)):
        run(recipe, folders, tmp_path / recipe.kind, lambda _: None)
    assert read_adapter(tmp_path / "combine" / "adapter").patches
    with pytest.raises(NotRunnable, match="--verify cannot be run here: a model of type 'unheard_of' is not known"):
        run(Merge(**plan, verify=True), folders, tmp_path / "verified", lambda _: None)
    assert not (tmp_path / "verified" / "base").exists()
