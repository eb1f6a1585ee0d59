from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from registry.core.adapter import AdapterSpec
from registry.core.errors import BadRequest, NotRunnable
from registry.core.recipes import Compress
from registry.files import read_header
from tests.workers import factories
from workers.compute.compress import compress
from workers.compute.lora import Adapter, Patch
from workers.compute.weights import read_adapter, write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
RECIPE = "sha256:" + "0" * 64


def recipe(**options: Any) -> Compress:
    return Compress.model_validate({"base": factories.BASE, "adapter": factories.ADAPTER} | options)


def patch(outputs: int, inputs: int, rank: int, seed: int, scale: float = 1.0) -> Patch:
    chance = torch.Generator().manual_seed(seed)
    return Patch(torch.randn(rank, inputs, generator=chance), torch.randn(outputs, rank, generator=chance), scale)


def adapter(*patches: Patch) -> Adapter:
    named = {f"layers.{index}.proj": found for index, found in enumerate(patches)}
    return Adapter(named, {"peft_type": "LORA", "target_modules": ["proj"], "use_rslora": True})


def dense(found: Patch) -> torch.Tensor:
    return found.scale * found.b_OR.double() @ found.a_RI.double()


sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.floats(0.1, 5), st.integers(0, 999))
def test_at_energy_1_the_update_stays(outputs: int, inputs: int, rank: int, scale: float, seed: int) -> None:
    before = patch(outputs, inputs, rank, seed, scale)
    made = compress(adapter(before), recipe(energy=1.0))
    after = made.adapter.patches["layers.0.proj"]
    torch.testing.assert_close(dense(after), dense(before), atol=1e-5, rtol=1e-5)
    assert after.a_RI.shape[0] <= min(rank, outputs, inputs)
    assert made.energy == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 8), st.floats(0.05, 0.999), st.integers(0, 999))
def test_the_energy_asked_for_is_kept_by_the_smallest_rank_that_keeps_it(
    outputs: int, inputs: int, rank: int, energy: float, seed: int
) -> None:
    before = patch(outputs, inputs, rank, seed)
    made = compress(adapter(before), recipe(energy=energy))
    kept = made.modules["layers.0.proj"]
    missing = float((dense(before) - dense(made.adapter.patches["layers.0.proj"])).norm() / dense(before).norm()) ** 2
    assert kept.energy == pytest.approx(1 - missing, abs=1e-5)
    assert kept.energy is not None
    assert kept.energy >= energy - 1e-5
    s = torch.linalg.svdvals(dense(before))
    assert float((s[: kept.after - 1] ** 2).sum() / (s**2).sum()) < energy
    assert kept.before == rank


def test_without_a_measure_it_keeps_95_percent() -> None:
    assert recipe() == recipe(energy=0.95)


def test_a_rank_is_that_of_every_module_at_most() -> None:
    made = compress(adapter(patch(9, 9, 6, 1), patch(9, 9, 2, 2)), recipe(rank=4))
    assert {name: kept.after for name, kept in made.modules.items()} == {"layers.0.proj": 4, "layers.1.proj": 2}
    config = made.adapter.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"layers.1.proj": 2}


@settings(deadline=None, max_examples=25)
@given(st.integers(80, 2000), st.integers(0, 999))
def test_a_budget_holds_and_no_rank_fits_any_more_or_none_is_left(budget: int, seed: int) -> None:
    before = adapter(patch(12, 8, 5, seed), patch(6, 4, 3, seed + 1, 3.0), patch(12, 20, 4, seed + 2, 0.1))
    made = compress(before, recipe(bytes=budget))
    assert made.bytes_after <= budget
    cheapest = min(
        4 * (patch.a_RI.shape[1] + patch.b_OR.shape[0])
        for name, patch in before.patches.items() if made.modules[name].after < made.modules[name].before
    ) if made.bytes_after < made.bytes_before else budget  # fmt: skip
    assert made.bytes_after == made.bytes_before or budget - made.bytes_after < cheapest
    assert sum(1 for kept in made.modules.values() if kept.after) == len(made.adapter.patches)


def test_a_budget_keeps_more_energy_than_one_rank_for_all_of_as_many_bytes() -> None:
    before = adapter(patch(16, 16, 8, 1, 5.0), patch(16, 16, 8, 2, 0.2), patch(16, 16, 8, 3))
    even = compress(before, recipe(rank=3))
    greedy = compress(before, recipe(bytes=even.bytes_after))
    assert greedy.bytes_after <= even.bytes_after
    assert greedy.energy > even.energy


def test_a_budget_below_the_smallest_rank_is_refused_with_what_it_takes() -> None:
    with pytest.raises(BadRequest, match="48, the least"):
        compress(adapter(patch(6, 6, 2, 1)), recipe(bytes=47))
    biased = replace(patch(6, 6, 2, 1), bias_O=torch.ones(6))
    with pytest.raises(BadRequest, match="96, the least"):
        compress(adapter(biased, replace(biased)), recipe(bytes=90))


def test_a_module_without_an_update_is_left_out_and_an_adapter_without_one_refused() -> None:
    nothing = replace(patch(5, 5, 2, 1), b_OR=torch.zeros(5, 2))
    made = compress(adapter(patch(5, 5, 2, 2), nothing), recipe())
    assert list(made.adapter.patches) == ["layers.0.proj"]
    assert made.adapter.config["target_modules"] == ["layers.0.proj"]
    assert made.modules["layers.1.proj"].after == 0
    with pytest.raises(NotRunnable, match="zero in all"):
        compress(adapter(nothing), recipe())


def test_factors_keep_their_type_and_the_energy_counts_their_rounding() -> None:
    exact = patch(20, 20, 6, 1)
    before = replace(exact, a_RI=exact.a_RI.bfloat16(), b_OR=exact.b_OR.bfloat16())
    made = compress(adapter(before), recipe(energy=1.0))
    after = made.adapter.patches["layers.0.proj"]
    assert after.a_RI.dtype == after.b_OR.dtype == torch.bfloat16
    assert 0.999 < made.energy < 1.0


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"rank": 2}, {"bytes": 9000}], ids=lambda o: next(iter(o)))
def test_peft_and_the_registry_read_the_mixed_ranks_and_peft_gives_the_same_logits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = factories.llama()
    before = factories.random_adapter(model, targets=("all-linear",), rank=6)
    made = compress(before, recipe(**options))
    write_adapter(made.adapter, tmp_path, base=factories.BASE, recipe=RECIPE)
    spec = AdapterSpec.parse(made.adapter.config, {"a": read_header(tmp_path / "adapter_model.safetensors")})
    assert {m.name: m.rank for m in spec.modules} == {n: k.after for n, k in made.modules.items() if k.after}
    assert {m.scale for m in spec.modules} == {1.0}
    theirs = PeftModel.from_pretrained(factories.llama(), tmp_path)
    with torch.no_grad():
        for name, kept in made.modules.items():
            weight = model.get_submodule(name).weight
            if kept.after:
                weight += dense(read_adapter(tmp_path).patches[name]).float()
    torch.testing.assert_close(factories.logits(theirs), factories.logits(model), atol=1e-4, rtol=1e-4)
