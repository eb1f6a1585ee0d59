from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

from registry.core.errors import NotCombinable
from registry.core.recipes import Combine
from tests.workers import factories
from workers.compute.combine import combine, dare, ties
from workers.compute.lora import Adapter, Patch
from workers.compute.lowrank import LowRank
from workers.compute.weights import read_adapter, write_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor"),  # peft takes a bias of B for a broken shard
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
DIGESTS = ("sha256:" + "5" * 64, "sha256:" + "6" * 64, "sha256:" + "7" * 64)
numbers = st.integers(1, 6)


def recipe(method: str, count: int = 2, **options: Any) -> Combine:
    values = {"base": factories.BASE, "adapters": DIGESTS[:count], "method": method}
    return Combine.model_validate(values | options)


def patch(outputs: int, inputs: int, rank: int, seed: int, scale: float = 1.0, **more: Any) -> Patch:
    chance = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=chance, dtype=torch.float64) for s in ((rank, inputs), (outputs, rank)))
    return Patch(a, b, scale, **more)


def adapter(*patches: Patch, **replaced: torch.Tensor) -> Adapter:
    named = {f"layers.{index}.proj": found for index, found in enumerate(patches)}
    return Adapter(named, {"peft_type": "LORA", "target_modules": ["proj"]}, replaced)


def dense(found: Patch) -> torch.Tensor:
    return found.scale * found.b_OR.double() @ found.a_RI.double()


def first(found: Adapter) -> Patch:
    return found.patches["layers.0.proj"]


# ── laws ─────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=40)
@given(numbers, numbers, numbers, numbers, st.floats(0.1, 4), st.floats(-3, 3).filter(bool), st.integers(0, 999))
def test_concat_is_the_weighted_sum_of_updates_to_float64_rounding(
    outputs: int, inputs: int, r1: int, r2: int, scale: float, weight: float, seed: int
) -> None:
    one, two = patch(outputs, inputs, r1, seed, scale), patch(outputs, inputs, r2, seed + 1, 0.5)
    made = combine([adapter(one), adapter(two)], recipe("concat", weights=(weight, 2.0)))
    torch.testing.assert_close(
        dense(first(made.adapter)), weight * dense(one) + 2 * dense(two), atol=1e-13, rtol=1e-13
    )
    assert made.modules["layers.0.proj"].after == first(made.adapter).a_RI.shape[0] == r1 + r2


@settings(deadline=None, max_examples=40)
@given(numbers, numbers, numbers, numbers, st.integers(0, 999))
def test_svd_at_full_rank_is_concat(outputs: int, inputs: int, r1: int, r2: int, seed: int) -> None:
    parts = [adapter(patch(outputs, inputs, rank, seed + rank, 1.5)) for rank in (r1, r2)]
    whole = combine(parts, recipe("concat"))
    for options in ({"rank": 12}, {"energy": 1.0}):
        cut = combine(parts, recipe("svd", **options))
        torch.testing.assert_close(dense(first(cut.adapter)), dense(first(whole.adapter)), atol=1e-11, rtol=1e-9)
        assert cut.modules["layers.0.proj"].energy == pytest.approx(1.0)


def test_svd_keeps_the_energy_it_says_and_the_rank_it_was_told() -> None:
    parts = [adapter(patch(20, 30, 6, seed)) for seed in (1, 2)]
    whole = dense(first(combine(parts, recipe("concat")).adapter))
    for options in ({"energy": 0.8}, {"rank": 3}, {}):
        made = combine(parts, recipe("svd", **options))
        kept = made.modules["layers.0.proj"]
        missing = (whole - dense(first(made.adapter))).norm() ** 2 / whole.norm() ** 2
        assert kept.energy == pytest.approx(1 - float(missing))
        assert kept.before == 12
        assert kept.after == {"energy": kept.after, "rank": 3}.get(next(iter(options), ""), 6)
        assert kept.energy is not None
        assert kept.energy >= options.get("energy", 0)


@settings(deadline=None, max_examples=30)
@given(numbers, numbers, numbers, st.floats(0.1, 3), st.integers(0, 999))
def test_linear_of_an_adapter_with_itself_at_half_weight_is_the_adapter(
    outputs: int, inputs: int, rank: int, scale: float, seed: int
) -> None:
    """The cross terms are the adapter, too."""
    one = patch(outputs, inputs, rank, seed, scale)
    made = combine([adapter(one), adapter(one)], recipe("linear", weights=(0.5, 0.5)))
    torch.testing.assert_close(dense(first(made.adapter)), 2 * dense(one), atol=1e-12, rtol=1e-12)
    assert first(made.adapter).a_RI.shape[0] == rank


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 6), numbers, st.floats(0.1, 1), st.integers(0, 999))
def test_ties_is_that_of_peft_on_dense_updates(
    outputs: int, inputs: int, rank: int, density: float, seed: int
) -> None:
    parts = [patch(outputs, inputs, rank, seed + k) for k in range(3)]
    taken = max(1, int(density * outputs * inputs)) / (outputs * inputs)
    share = taken + 1e-9 if taken < 1 else 0.999999  # PEFT warns at 1
    theirs = merge_utils.ties([dense(p) for p in parts], torch.ones(3, dtype=torch.float64), min(share, 0.999999))
    if taken == 1:
        theirs = merge_utils.disjoint_merge(
            torch.stack([dense(p) for p in parts]),
            merge_utils.calculate_majority_sign_mask(torch.stack([dense(p) for p in parts])),
        )
    torch.testing.assert_close(ties([LowRank(p.a_RI, p.b_OR) for p in parts], share if taken < 1 else 1.0), theirs)


def test_ties_of_equal_adapters_that_trims_nothing_is_the_adapter() -> None:
    one = patch(9, 7, 3, 1)
    made = combine([adapter(one), adapter(one)], recipe("ties", density=1.0))
    torch.testing.assert_close(dense(first(made.adapter)), dense(one))


def test_dare_keeps_the_mean_and_the_share_and_depends_on_the_seed_alone() -> None:
    one = patch(40, 30, 4, 1)
    update = LowRank(one.a_RI, one.b_OR)
    draws = torch.stack([dare([update], 0.25, [seed]) for seed in range(400)])
    kept = draws != 0
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(draws[kept], (4 * dense(one)).expand_as(draws)[kept])
    assert float((draws.mean(0) - dense(one)).norm() / dense(one).norm()) < 0.15
    parts = [adapter(one), adapter(patch(40, 30, 4, 2))]
    same = [combine(parts, recipe("dare", density=0.5, seed=7, rank=30)).adapter for _ in range(2)]
    other = combine(parts, recipe("dare", density=0.5, seed=8, rank=30)).adapter
    assert torch.equal(first(same[0]).b_OR, first(same[1]).b_OR)
    assert not torch.equal(first(same[0]).b_OR, first(other).b_OR)


def test_dare_that_drops_nothing_is_the_sum() -> None:
    one, two = patch(9, 7, 2, 1), patch(9, 7, 3, 2, 0.5)
    made = combine([adapter(one), adapter(two)], recipe("dare", density=1.0, energy=1.0))
    torch.testing.assert_close(dense(first(made.adapter)), dense(one) + dense(two))


def test_dense_updates_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [LowRank(p.a_RI, p.b_OR) for p in (patch(13, 7, 2, 1), patch(13, 7, 3, 2))]
    whole = ties(parts, 0.4), dare(parts, 0.4, [1, 2])
    monkeypatch.setattr("workers.compute.combine._BLOCK_BYTES", 3 * 7 * 8)
    for left, right in zip(whole, (ties(parts, 0.4), dare(parts, 0.4, [1, 2])), strict=True):
        torch.testing.assert_close(left, right)


# ── PEFT ─────────────────────────────────────────────────────────────────────

def trained(folder: Path, seed: int, **options: Any) -> Path:
    """An adapter made and written by PEFT, its factors random."""
    wrapped = get_peft_model(factories.llama(), LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("method", "theirs"), [("concat", "cat"), ("linear", "linear"), ("svd", "svd")]
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_peft_loads_the_result_and_combines_to_the_same_logits(
    method: str, theirs: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    folders = [
        trained(tmp_path / "a", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        trained(tmp_path / "b", 2, r=4, lora_alpha=2, target_modules=["v_proj", "down_proj"], use_rslora=True),
    ]
    made = combine([read_adapter(folder) for folder in folders], recipe(method, weights=weights))
    write_adapter(made.adapter, tmp_path / "c", base=factories.BASE, recipe=DIGESTS[0])
    ours = PeftModel.from_pretrained(factories.llama(), tmp_path / "c")
    peft = PeftModel.from_pretrained(factories.llama(), folders[0], adapter_name="a")
    peft.load_adapter(folders[1], adapter_name="b")
    peft.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type=theirs)
    peft.set_adapter("c")
    torch.testing.assert_close(factories.logits(ours), factories.logits(peft), atol=2e-4, rtol=2e-4)
    bare = factories.logits(factories.llama())
    assert float((factories.logits(ours) - bare).abs().max()) > 1e-2


@pytest.mark.parametrize("other", [{"lora_bias": True}, {"embed": "embed_tokens"}], ids=lambda o: next(iter(o)))
def test_mixed_ranks_targets_embeddings_and_biases_of_b_add_up_in_peft(other: dict[str, Any], tmp_path: Path) -> None:
    more = [other.pop("embed")] if "embed" in other else []
    folders = [
        trained(tmp_path / "a", 1, r=4, target_modules=["q_proj", *more],
                rank_pattern={"layers.1.self_attn.q_proj": 2}),
        trained(tmp_path / "b", 2, r=3, target_modules=["q_proj", "up_proj", *more], layers_to_transform=[0], **other),
    ]  # fmt: skip
    made = combine([read_adapter(folder) for folder in folders], recipe("concat"))
    write_adapter(made.adapter, tmp_path / "c", base=factories.BASE, recipe=DIGESTS[0])
    ours = PeftModel.from_pretrained(factories.llama(), tmp_path / "c")
    both = PeftModel.from_pretrained(factories.llama(), folders[0], adapter_name="a")
    both.load_adapter(folders[1], adapter_name="b")
    both.base_model.set_adapter(["a", "b"])  # type: ignore[operator]  # torch types every attribute of a module
    torch.testing.assert_close(factories.logits(ours), factories.logits(both), atol=1e-4, rtol=1e-4)


# ── what has no sum ──────────────────────────────────────────────────────────

VALUE = torch.ones(3)
BAD: list[tuple[str, str, Adapter, Adapter]] = [
    ("concat", "DoRA", adapter(patch(4, 4, 2, 1, magnitude_O=torch.ones(4))), adapter(patch(4, 4, 2, 2))),
    ("concat", "a matrix of 4×5 in adapter 1", adapter(patch(4, 5, 2, 1)), adapter(patch(4, 4, 2, 2))),
    ("svd", "an embedding", adapter(patch(4, 4, 2, 1, embedding=True)), adapter(patch(4, 4, 2, 2))),
    ("linear", "rank 2 in adapter 1 and 3 in adapter 2", adapter(patch(4, 4, 2, 1)), adapter(patch(4, 4, 3, 2))),
    ("concat", "only one of them replaces 'head'", adapter(patch(4, 4, 2, 1), head=VALUE), adapter(patch(4, 4, 2, 2))),
    ("concat", "different values", adapter(patch(4, 4, 2, 1), head=VALUE), adapter(patch(4, 4, 2, 2), head=VALUE + 1)),
    ("concat", "does not take beside the embedding", adapter(patch(4, 4, 2, 1, bias_O=torch.ones(4))),
     Adapter({"embed": patch(5, 5, 1, 3, embedding=True)}, {})),
    ("concat", "name modules alike", adapter(patch(4, 4, 2, 1)),
     Adapter({"model.layers.0.proj": patch(4, 4, 2, 2)}, {})),
]  # fmt: skip


@pytest.mark.parametrize(("method", "reason", "one", "two"), BAD)
def test_what_has_no_sum_is_refused_by_name(method: str, reason: str, one: Adapter, two: Adapter) -> None:
    for pair in ([one, two],) if "adapter 1" in reason or "DoRA" in reason else ([one, two], [two, one]):
        with pytest.raises(NotCombinable, match=reason):
            combine(pair, recipe(method))


def test_a_sum_that_cancels_is_refused() -> None:
    one = adapter(patch(4, 4, 2, 1))
    with pytest.raises(NotCombinable, match="changes nothing"):
        combine([one, one], recipe("ties", weights=(1.0, -1.0), density=1.0))


def test_equal_replacements_stay_and_modules_of_one_adapter_alone_come_along() -> None:
    made = combine(
        [adapter(patch(4, 4, 2, 1), head=VALUE), adapter(patch(4, 4, 2, 2), patch(5, 5, 1, 3), head=VALUE)],
        recipe("concat"),
    )
    assert torch.equal(made.adapter.replaced["head"], VALUE)
    assert {name: kept.after for name, kept in made.modules.items()} == {"layers.0.proj": 4, "layers.1.proj": 1}
    assert made.adapter.config["rank_pattern"] == made.adapter.config["alpha_pattern"] == {"layers.1.proj": 1}
    assert (made.adapter.config["r"], made.adapter.config["lora_alpha"]) == (4, 4)
