"""The chunked loss is the loss, and so is its gradient; a head that does more is noticed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.workers import factories
from workers.compute import loss as loss_module
from workers.compute.data import Example, Packed, Taught, pack, tokenize
from workers.compute.loss import Loss
from workers.compute.model import Model

TOKENIZER = factories.tokenizer()


def packed() -> Packed:
    examples = [tokenize(TOKENIZER, row, 64) for row in factories.rows(9)]
    return pack([examples[:4], examples[4:]])


def whole(model: Model, batch: Packed) -> tuple[Tensor, Tensor]:
    inputs = {"input_ids": batch.ids_BT, "position_ids": batch.positions_BT, "use_cache": False}
    logits = model(**inputs).logits[batch.asked_BT]
    losses_N = F.cross_entropy(logits, batch.targets_N, reduction="none")
    return (losses_N * batch.weights_N).sum(), losses_N


@pytest.mark.parametrize("bytes_of_a_chunk", [1, 4 * 259 * 5, 1 << 30])
@pytest.mark.parametrize("make", [factories.llama, factories.gpt2], ids=["llama", "gpt2"])
def test_chunks_of_any_size_give_the_loss_and_gradient_of_all_logits(
    make: type[Model], bytes_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", bytes_of_a_chunk)
    model, batch = make(), packed()
    embedding = model.get_input_embeddings()
    found = []
    for compute in (Loss(model, head_is_adapted=False), lambda given: whole(model, given)):
        grads: list[Tensor] = []

        def shifted(_: nn.Module, __: object, h: Tensor, grads: list[Tensor] = grads) -> Tensor:
            grads.append(torch.zeros_like(h).requires_grad_())
            return h + grads[-1]

        handle = embedding.register_forward_hook(shifted)
        total, losses_N = compute(batch)
        handle.remove()
        total.backward()
        grad = grads[-1].grad
        assert grad is not None
        found.append((total.detach(), losses_N.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bytes_of_a_chunk", [1, 4 * 259 * 5, 1 << 30])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_that_is_trained_gets_the_gradient_of_all_logits(
    bytes_of_a_chunk: int, tied: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", bytes_of_a_chunk)
    model, batch = factories.llama(tied=tied), packed()
    head = model.get_output_embeddings()
    if bias:
        head.bias = nn.Parameter(torch.randn(259))
    model.requires_grad_(True)
    found = []
    for compute in (Loss(model, head_is_adapted=False), lambda given: whole(model, given)):
        model.zero_grad()
        compute(batch)[0].backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], atol=1e-5, rtol=1e-4)


def test_a_model_that_caps_its_logits_is_left_to_compute_them() -> None:
    class Capped(nn.Module):
        """A model whose logits are more than the head's product."""

        def __init__(self, inner: Model) -> None:
            super().__init__()
            self.inner, self.device, self.config = inner, inner.device, inner.config

        def get_output_embeddings(self) -> nn.Module:
            head: nn.Module = self.inner.get_output_embeddings()
            return head

        def forward(self, **inputs: object) -> object:
            answer = self.inner(**inputs)
            answer.logits = torch.tanh(answer.logits)
            return answer

    model, batch = Capped(factories.llama()), packed()
    ours, theirs = Loss(model, head_is_adapted=False)(batch), whole(model, batch)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def test_a_token_beyond_what_float32_can_tell_from_impossible_has_its_loss() -> None:
    model, batch = factories.llama(), packed()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(400.0)
    (ours, ours_N), (theirs, theirs_N) = Loss(model, head_is_adapted=False)(batch), whole(model, batch)
    assert float(theirs_N.max()) > 104  # exp of minus this is 0
    torch.testing.assert_close((ours, ours_N), (theirs, theirs_N), atol=1e-3, rtol=1e-5)


# ── a teacher's ──────────────────────────────────────────────────────────────


def taught(model: Model, many: int) -> list[Example]:
    """Sums, with what the model finds likely there."""
    examples = [tokenize(TOKENIZER, row, 64) for row in factories.rows(9)]
    loss = Loss(model, head_is_adapted=False)
    found = [loss.likeliest(pack([[example]], together=False), many) for example in examples]
    return [replace(example, taught=Taught(*said)) for example, said in zip(examples, found, strict=True)]


@pytest.mark.parametrize("bytes_of_a_chunk", [1, 4 * 259 * 5, 1 << 30])
@pytest.mark.parametrize("adapted", [True, False], ids=["all logits", "by chunks"])
def test_the_divergence_from_all_that_a_teacher_says_is_that_of_the_distributions(
    bytes_of_a_chunk: int, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", bytes_of_a_chunk)
    teacher, student = factories.llama(seed=1), factories.llama()
    examples = taught(teacher, 259)
    batch = pack([examples[:4], examples[4:]])
    inputs = {"input_ids": batch.ids_BT, "position_ids": batch.positions_BT, "use_cache": False}
    p_NV, q_NV = (model(**inputs).logits[batch.asked_BT].log_softmax(1) for model in (teacher, student))
    expected_N = F.kl_div(q_NV, p_NV, log_target=True, reduction="none").sum(1)
    total, losses_N = Loss(student, head_is_adapted=adapted)(batch)
    torch.testing.assert_close(losses_N, expected_N, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, (expected_N * batch.weights_N).sum(), atol=1e-4, rtol=1e-4)


def test_a_teacher_that_names_some_tokens_says_of_the_others_how_much_they_are_together() -> None:
    model = factories.llama()
    batch = pack([taught(model, 3)])
    _, losses_N = Loss(model, head_is_adapted=False)(batch)
    torch.testing.assert_close(losses_N, torch.zeros_like(losses_N), atol=1e-5, rtol=0)
    logits_NV = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 0.0, 1.0]])
    log_p_NK = torch.tensor([[0.5, 0.25], [1.0, 0.0]]).log()
    top_NK = torch.tensor([[1, 3], [1, 0]])
    q_NV = logits_NV.softmax(1)
    rest = 0.25 * torch.log(0.25 / (q_NV[0, 0] + q_NV[0, 2]))
    first = 0.5 * torch.log(0.5 / q_NV[0, 1]) + 0.25 * torch.log(0.25 / q_NV[0, 3]) + rest
    expected_N = torch.stack([first, -q_NV[1, 1].log()])
    torch.testing.assert_close(loss_module.divergence(logits_NV, top_NK, log_p_NK), expected_N)


@pytest.mark.parametrize("bytes_of_a_chunk", [1, 4 * 259 * 5, 1 << 30])
def test_what_a_teacher_says_has_the_gradient_of_all_logits(
    bytes_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", bytes_of_a_chunk)
    examples = taught(factories.llama(seed=1), 5)
    batch = pack([examples[:4], [replace(example, taught=None) for example in examples[4:]]])
    student = factories.llama()
    found = []
    for adapted in (False, True):
        grads: list[Tensor] = []

        def shifted(_: nn.Module, __: object, h: Tensor, grads: list[Tensor] = grads) -> Tensor:
            grads.append(torch.zeros_like(h).requires_grad_())
            return h + grads[-1]

        loss = Loss(student, head_is_adapted=adapted)
        handle = student.get_input_embeddings().register_forward_hook(shifted)
        total, losses_N = loss(batch)
        handle.remove()
        total.backward()
        assert grads[-1].grad is not None
        found.append((losses_N.detach(), grads[-1].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_beside_one_that_is_taught_an_example_of_its_own_keeps_its_cross_entropy() -> None:
    model = factories.llama()
    examples = taught(model, 5)
    own = [replace(example, taught=None) for example in examples[4:]]
    _, mixed_N = Loss(model, head_is_adapted=False)(pack([examples[:4], own], together=False))
    _, alone_N = Loss(model, head_is_adapted=False)(pack([own], together=False))
    torch.testing.assert_close(mixed_N[-len(alone_N) :], alone_N, atol=1e-4, rtol=1e-4)
