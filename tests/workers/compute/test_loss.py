"""The chunked loss is the loss, and so is its gradient; a head that does more is noticed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.workers import factories
from workers.compute import loss as loss_module
from workers.compute.data import Packed, pack, tokenize
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
