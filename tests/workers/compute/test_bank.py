"""Many adapters at once answer and learn as each would alone, and the base never changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from registry.core.errors import NotRunnable
from tests.workers import factories
from workers.compute.bank import Bank, Drop, Group, attached, groups_of
from workers.compute.lora import Adapter, Patch
from workers.compute.model import Model

IDS = torch.randint(3, 259, (7, 10), generator=torch.Generator().manual_seed(1))


def mixed(model: Model) -> list[Adapter]:
    """Adapters of different ranks, scales and targets."""
    return [
        factories.random_adapter(model, seed=1, rank=4, targets=("all-linear",)),
        factories.random_adapter(model, seed=2, rank=2, alpha=3.0, targets=("all-linear",)),
        factories.random_adapter(model, seed=3, rank=6, targets=TARGETS[type(model).__name__]),
    ]


TARGETS = {"LlamaForCausalLM": ("q_proj", "down_proj"), "GPT2LMHeadModel": ("c_attn",)}


def answers(model: Model, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_BT).logits
    return found


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 2), (1, 2), (2, 2), (None, 1)],
        [(None, 1), (0, 3), (1, 1), (2, 2)],
        [(2, 1), (0, 2), (None, 2), (1, 2)],
        [(1, 7)],
    ],
)
def test_every_row_is_answered_as_by_its_adapter_alone(make: Any, rows: list[tuple[int | None, int]]) -> None:
    model = make()
    adapters = mixed(model)
    bank = Bank(model, adapters)
    bank.assign(rows)
    with bank.attached():
        together = answers(model, IDS)
    start = 0
    for which, count in rows:
        span = slice(start, start := start + count)
        if which is None:
            expected = answers(model, IDS[span])
        else:
            with attached(model, adapters[which]):
                expected = answers(model, IDS[span])
        torch.testing.assert_close(together[span], expected, atol=1e-4, rtol=1e-4)


def test_magnitudes_biases_embeddings_and_replaced_parameters_keep_to_their_rows() -> None:
    model = factories.llama(tied=False)
    plain = factories.random_adapter(model, seed=1)
    q, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    magnitude = torch.rand(len(plain.patches[q].b_OR)) + 0.5
    special = replace(plain.patches[q], magnitude_O=magnitude)
    shifted = replace(plain.patches[v], bias_O=torch.rand(len(plain.patches[v].b_OR)))
    tokens = Patch(torch.rand(2, 259), torch.rand(32, 2), 0.1, embedding=True)
    odd = Adapter(
        {q: special, v: shifted, "model.embed_tokens": tokens}, plain.config,
        {"lm_head.weight": torch.rand(259, 32)},
    )  # fmt: skip
    bank = Bank(model, [plain, odd])
    bank.assign([(1, 3), (None, 2), (0, 2)])
    with bank.attached():
        together = answers(model, IDS)
    with attached(model, odd):
        torch.testing.assert_close(together[:3], answers(model, IDS[:3]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[3:5], answers(model, IDS[3:5]), atol=1e-4, rtol=1e-4)
    with attached(model, plain):
        torch.testing.assert_close(together[5:], answers(model, IDS[5:]), atol=1e-4, rtol=1e-4)


def test_a_thousand_switches_leave_the_base_bit_by_bit() -> None:
    model = factories.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bare = answers(model, IDS)
    bank = Bank(model, mixed(model))
    with bank.attached():
        for turn in range(1000):
            bank.assign([(turn % 3, len(IDS))])
            if turn % 250 == 0:
                answers(model, IDS)
    assert torch.equal(answers(model, IDS), bare)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rows", [[(0, 2), (1, 2), (2, 2)], [(0, 1), (1, 3), (2, 2)]], ids=["equal", "unequal"])
def test_gradients_are_those_of_the_dense_updates_in_float64(make: Any, rows: list[tuple[int, int]]) -> None:
    model = make().double()
    adapters = mixed(model)
    ids = IDS[:6]
    bank64 = Bank(model, adapters, train=True)
    for layer in bank64.layers.values():  # the same, in float64 throughout
        layer.a_KRI, layer.b_KOR, layer.scale_K11 = layer.a_KRI.double(), layer.b_KOR.double(), layer.scale_K11.double()
    bank64.assign(rows)
    assert bank64.grad_KP is not None
    with bank64.attached():
        for _ in range(2):  # the second time in the place of the first
            with bank64.gradients():
                model(input_ids=ids).logits.square().mean().backward()
    leaves: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    start, total = 0, torch.zeros((), dtype=torch.float64)
    weights = {name: model.get_submodule(name).weight for name in bank64.layers}
    for which, count in rows:
        span = slice(start, start := start + count)
        adapted = {}
        for name, patch in adapters[which].patches.items():
            a, b = (factor.double().requires_grad_() for factor in (patch.a_RI, patch.b_OR))
            leaves[which, name] = (a, b)
            update = patch.scale * b @ a
            adapted[f"{name}.weight"] = weights[name] + (update.T if make is factories.gpt2 else update)
        logits = torch.func.functional_call(model, adapted, kwargs={"input_ids": ids[span]}).logits
        total = total + logits.square().sum()
    (total / (len(ids) * ids.shape[1] * 259)).backward()
    for which in range(3):
        parts = bank64.parts(which, bank64.grad_KP)
        for name in adapters[which].patches:
            grad_a, grad_b = parts[f"{name}.A"], parts[f"{name}.B"]
            a, b = leaves[which, name]
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(grad_a.double(), a.grad, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(grad_b.double(), b.grad, atol=1e-6, rtol=1e-5)


def test_factors_come_back_as_they_were_given() -> None:
    model = factories.llama()
    adapters = mixed(model)
    bank = Bank(model, adapters, train=True)
    for which, adapter in enumerate(adapters):
        parts = bank.parts(which)
        for name, patch in adapter.patches.items():
            assert torch.equal(parts[f"{name}.A"], patch.a_RI)
            assert torch.equal(parts[f"{name}.B"], patch.b_OR)


def test_neighbours_with_equally_many_rows_are_one_group() -> None:
    assert groups_of([(0, 2), (1, 2), (2, 3), (None, 1), (3, 3)]) == [
        Group(slice(0, 2), slice(0, 4)), Group(slice(2, 3), slice(4, 7)), Group(slice(3, 4), slice(8, 11)),
    ]  # fmt: skip
    assert groups_of([(1, 2), (0, 2)]) == [Group(slice(1, 2), slice(0, 2)), Group(slice(0, 1), slice(2, 4))]
    assert groups_of([(0, 2), (None, 2), (1, 2)]) == [
        Group(slice(0, 1), slice(0, 2)), Group(slice(1, 2), slice(4, 6)),
    ]  # fmt: skip
    assert groups_of([(0, 0), (None, 3)]) == []


def test_a_module_that_sees_other_rows_is_refused_while_adapters_share_a_batch() -> None:
    model = factories.llama()
    bank = Bank(model, mixed(model))
    bank.assign([(0, 3), (1, 3)])
    with bank.attached(), pytest.raises(NotRunnable, match="7 rows of a batch of 6"):
        answers(model, IDS)


def test_dropout_keeps_the_mean_and_is_each_adapters_own() -> None:
    x = torch.ones(4, 50, 64)
    chances = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    dropped = Drop([0.0, 0.25], chances)(x, [Group(slice(0, 2), slice(0, 4))])
    assert torch.equal(dropped[:2], x[:2])
    assert dropped[2:].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped[2:].mean().item() == pytest.approx(1, abs=0.03)


def test_a_module_that_was_not_passed_has_no_gradient_of_the_step_before() -> None:
    model = factories.llama()
    bank = Bank(model, mixed(model), train=True)
    bank.assign([(0, 2), (1, 2), (2, 3)])
    with bank.attached():
        with bank.gradients() as grad_KP:
            model(input_ids=IDS).logits.square().mean().backward()
        assert all(bool(row.any()) for row in grad_KP)
        with bank.gradients() as grad_KP:
            pass
        assert not grad_KP.any()


def test_the_scale_is_not_rounded_to_the_models_type() -> None:
    model = factories.llama().bfloat16()
    [name] = [name for name in factories.random_adapter(model).patches if name.endswith("0.self_attn.q_proj")]
    module = model.get_submodule(name)
    chance = torch.Generator().manual_seed(0)
    a_RI, b_OR = (torch.randn(shape, generator=chance).bfloat16() for shape in ((4, 32), (32, 4)))
    x = torch.randn(64, 50, 32, generator=chance).bfloat16()
    bare = module(x).double()
    with attached(model, Adapter({name: Patch(a_RI, b_OR, 0.3)}, {})):
        update = module(x).double() - bare
    exact = 0.3 * x.double() @ a_RI.double().T @ b_OR.double().T
    assert float((update * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=5e-4)


def test_gradients_of_passes_with_others_company_add_up_and_forget_the_step_before() -> None:
    model = factories.llama()
    bank = Bank(model, mixed(model), train=True)

    def said(*passes: list[tuple[int | None, int]]) -> Tensor:
        with bank.attached(), bank.gradients() as grad_KP:
            for rows in passes:
                bank.assign(rows)
                ids_BT = torch.cat([IDS[which : which + count] for which, count in rows if which is not None])
                model(input_ids=ids_BT).logits.square().sum().backward()
        return grad_KP.clone()

    both = said([(0, 2), (1, 2)], [(1, 1), (2, 1)])  # adapter 1 goes first with 0, then with 2 that has nothing yet
    alone = [said([(0, 2)]), said([(1, 2)], [(1, 1)]), said([(2, 1)])]
    for which, grad_KP in enumerate(alone):
        torch.testing.assert_close(both[which], grad_KP[which], atol=1e-4, rtol=1e-4)
        assert not grad_KP[[other for other in range(3) if other != which]].any()
