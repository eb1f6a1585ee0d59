import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from registry.core.errors import NotExtractable
from registry.core.recipes import Extract
from tests.workers import factories
from workers.compute.extract import extract
from workers.compute.lora import is_transposed
from workers.compute.lowrank import leading, nearest
from workers.compute.model import Model
from workers.compute.weights import write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
Change = Callable[[Model], object]


def recipe(**options: Any) -> Extract:
    return Extract.model_validate({"base": factories.BASE, "tuned": factories.OTHER_BASE} | options)


def bumped(model: Model, ends: tuple[str, ...], rank: int = 3, size: float = 0.3, seed: int = 4) -> dict[str, Any]:
    """Add a low-rank update to the modules with these ends; what was added, as outputs × inputs."""
    chance, added = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            rows, columns = module.weight.shape
            update = torch.randn(rows, rank, generator=chance) @ torch.randn(rank, columns, generator=chance) * size
            module.weight.add_(update)
            added[name] = update.T if is_transposed(module) else update
    return added


def folders(tmp_path: Path, change: Change, make: Callable[[], Model] = factories.llama, **options: Any) -> Any:
    base, tuned = make(), make()
    change(tuned)
    return factories.saved(base, tmp_path / "base"), factories.saved(tuned, tmp_path / "tuned", **options), tuned


def in_peft(made: Any, folder: Path, model: Model) -> torch.Tensor:
    write_adapter(made.adapter, folder, base=factories.BASE, recipe="sha256:" + "0" * 64)
    return factories.logits(PeftModel.from_pretrained(model, folder))


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2])
def test_extract_of_base_plus_low_rank_returns_it(make: Callable[[], Model], tmp_path: Path) -> None:
    added: dict[str, Any] = {}
    base, tuned, model = folders(tmp_path, lambda m: added.update(bumped(m, ("q_proj", "down_proj", "c_fc"))), make)
    made = extract(base, tuned, recipe(energy=1.0))
    assert made.adapter.patches.keys() == added.keys() == made.modules.keys()
    for name, patch in made.adapter.patches.items():
        assert patch.a_RI.shape[0] == made.modules[name].after == 3
        torch.testing.assert_close(patch.update.dense(), added[name], atol=1e-5, rtol=1e-5)
    assert made.energy == pytest.approx(1.0)
    torch.testing.assert_close(
        in_peft(made, tmp_path / "adapter", make()), factories.logits(model), atol=1e-3, rtol=1e-3
    )


def test_an_energy_or_a_rank_cuts_and_the_share_is_told(tmp_path: Path) -> None:
    base, tuned, _ = folders(tmp_path, lambda m: bumped(m, ("v_proj",), rank=8))
    half, two = extract(base, tuned, recipe(energy=0.5)), extract(base, tuned, recipe(rank=2))
    assert all(0.5 <= (kept.energy or 0) < 1 and kept.after < 8 for kept in half.modules.values())
    assert {kept.after for kept in two.modules.values()} == {2}
    assert 0.5 <= half.energy < 1
    assert two.adapter.config["target_modules"] == ["v_proj"]


def test_modules_that_are_alike_by_end_but_not_all_changed_are_named_in_full(tmp_path: Path) -> None:
    base, tuned, _ = folders(tmp_path, lambda m: bumped(m, ("layers.1.self_attn.q_proj",)))
    made = extract(base, tuned, recipe())
    assert made.adapter.config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_the_storage_type_is_no_update(dtype: torch.dtype, tmp_path: Path) -> None:
    """A module that was cast and cast back differs everywhere, by noise alone; a real update beside it is found."""

    def change(model: Model) -> None:
        bumped(model, ("o_proj",), rank=2)
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) - 0.5
            parameter.mul_(1 + noise * torch.finfo(dtype).eps * 0.3)  # as if trained a little, below the type's step
            parameter.copy_(parameter.to(dtype).float())
        model.to(dtype)

    base, tuned, _ = folders(tmp_path, change)
    made = extract(base, tuned, recipe(energy=0.999999))
    assert {name.rpartition(".")[2] for name in made.adapter.patches} == {"o_proj"}
    assert {patch.a_RI.shape[0] for patch in made.adapter.patches.values()} == {2}
    dropped = [kept for name, kept in made.modules.items() if name not in made.adapter.patches]
    assert len(dropped) == 12
    assert {kept.after for kept in dropped} == {0}


def test_a_cast_and_equal_weights_give_no_adapter(tmp_path: Path) -> None:
    base, tuned, _ = folders(tmp_path, lambda m: m.to(torch.bfloat16))
    for other in (tuned, base):
        with pytest.raises(NotExtractable, match="same weights"):
            extract(base, other, recipe())


# ── what is no linear layer ──────────────────────────────────────────────────


def everywhere(model: Model) -> None:
    bumped(model, ("q_proj",))
    model.model.embed_tokens.weight.add_(0.1)


def test_embeddings_that_differ_are_refused_with_their_size_replaced_or_dropped(tmp_path: Path) -> None:
    base, tuned, _ = folders(tmp_path, everywhere)
    with pytest.raises(NotExtractable, match=r"'model.embed_tokens.weight' \(33,152 bytes, drift 0.5"):
        extract(base, tuned, recipe())
    dropped = extract(base, tuned, recipe(rest="drop"))
    assert dropped.adapter.replaced == {}
    assert dropped.rest["model.embed_tokens.weight"].replaced is False
    made = extract(base, tuned, recipe(rest="replace", energy=1.0))
    assert made.adapter.replaced.keys() == {"model.embed_tokens.weight", "lm_head.weight"}  # tied: both move
    assert made.rest["model.embed_tokens.weight"].replaced


@pytest.mark.parametrize("tied", [True, False])
def test_peft_replaces_embeddings_and_head_to_the_tuned_models_logits(tied: bool, tmp_path: Path) -> None:
    def change(model: Model) -> None:
        everywhere(model)
        if not tied:
            model.lm_head.weight.mul_(1.5)

    base, tuned, model = folders(tmp_path, change, lambda: factories.llama(tied=tied))
    made = extract(base, tuned, recipe(rest="replace", energy=1.0))
    found = in_peft(made, tmp_path / "adapter", factories.llama(tied=tied))
    torch.testing.assert_close(found, factories.logits(model), atol=1e-3, rtol=1e-3)


def test_norms_cannot_be_replaced_and_are_named(tmp_path: Path) -> None:
    def change(model: Model) -> None:
        bumped(model, ("q_proj",))
        model.model.norm.weight.mul_(1.1)

    base, tuned, _ = folders(tmp_path, change)
    with pytest.raises(NotExtractable, match=r"'model.norm.weight' .*--rest drop"):
        extract(base, tuned, recipe(rest="replace"))
    rest = extract(base, tuned, recipe(rest="drop")).rest
    assert rest["model.norm.weight"].drift == pytest.approx(0.1, abs=1e-4)


def test_other_shapes_and_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    base = factories.saved(factories.llama(), tmp_path / "base")
    wide = factories.saved(factories.llama(intermediate_size=80), tmp_path / "wide")
    with pytest.raises(NotExtractable, match=r"64×32 in the base and 80×32 in the tuned model"):
        extract(base, wide, recipe())
    deep = factories.saved(factories.llama(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(NotExtractable, match=r"the base has not: .*layers\.2"):
        extract(base, deep, recipe())
    with pytest.raises(NotExtractable, match=r"the tuned model has no tensor 'model\.layers\.2"):
        extract(deep, base, recipe())


def test_the_base_prefix_may_be_there_or_not(tmp_path: Path) -> None:
    base, tuned, _ = folders(tmp_path, lambda m: bumped(m, ("q_proj",)))
    from safetensors.torch import load_file, save_file

    path = tuned / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert len(extract(base, tuned, recipe()).adapter.patches) == 2
    assert json.loads((tuned / "config.json").read_text())["model_type"] == "llama"


# ── dense matrices ───────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 1.0), st.integers(0, 999))
def test_nearest_keeps_the_energy_by_the_smallest_rank(outputs: int, inputs: int, energy: float, seed: int) -> None:
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, kept = nearest(w, energy=energy)
    assert kept == pytest.approx(1 - float((w - found.dense()).norm() / w.norm()) ** 2, abs=1e-9)
    assert kept >= energy - 1e-9
    s = torch.linalg.svdvals(w)
    assert energy == 1 or float((s[: found.rank - 1] ** 2).sum() / (s**2).sum()) < energy


def test_block_krylov_finds_the_leading_triplets_of_a_matrix_too_large_for_an_exact_svd() -> None:
    chance = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(900, 40, generator=chance, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(800, 40, generator=chance, dtype=torch.float64))
    s = torch.logspace(0, -3, 40, dtype=torch.float64)
    w = u * s @ v.T + torch.randn(900, 800, generator=chance, dtype=torch.float64) * 1e-7
    _, found, _ = leading(w, 12)
    torch.testing.assert_close(found, s[:12], atol=1e-6, rtol=1e-5)
    made, kept = nearest(w.float(), energy=0.999)
    exact = torch.cumsum(s**2, 0) / (s**2).sum()
    assert made.rank == int((exact < 0.999).sum()) + 1
    assert kept == pytest.approx(float(exact[made.rank - 1]), abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_many_triplets_of_a_large_matrix_are_those_of_its_svd(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.compute.lowrank._EXACT", 8)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, s, v = leading(w, 20)
    torch.testing.assert_close(s, torch.linalg.svdvals(w.double())[:20])
    torch.testing.assert_close(u.T @ u, torch.eye(20, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(u.T @ w.double() @ v.T, torch.diag(s), atol=1e-10, rtol=0)
    found, kept = nearest(w, energy=1.0)
    assert found.rank == 30
    assert kept == pytest.approx(1.0)


def test_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = folders(tmp_path, everywhere)
    whole = extract(base, tuned, recipe(rest="drop"))
    monkeypatch.setattr("workers.compute.extract._BLOCK", 100)
    parts = extract(base, tuned, recipe(rest="drop"))
    assert parts.modules == whole.modules
    assert parts.rest["model.embed_tokens.weight"].drift == pytest.approx(whole.rest["model.embed_tokens.weight"].drift)


def test_a_zero_matrix_is_of_rank_zero() -> None:
    found, kept = nearest(torch.zeros(3, 4), energy=0.9)
    assert (found.rank, found.shape, kept) == (0, (3, 4), 1.0)
