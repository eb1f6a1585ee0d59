"""Cross entropy of the asked positions, without ever holding their logits at once.

    loss_n = ln Σ_v exp(w_v·h_n + b_v) − (w_t·h_n + b_t)        t the token that comes next

Gradients are computed chunk by chunk on the way forward: of a chunk's logits nothing is kept but what they say about h
and, where the head itself is trained, about w and b, summed in float32. Where a model does more to its logits than the
head's product (caps, scales) or an adapter changes the head, autograd has its way with all of them.
Legend: N asked positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Packed
from .model import Model

CHUNK_BYTES = 32 << 20
"""Of logits in float32."""


class Loss:
    """How a model's loss is computed: by chunks where its logits are the head's product and nothing else."""

    def __init__(self, model: Model, *, head_is_adapted: bool) -> None:
        self._model = model
        self._head: nn.Module | None = model.get_output_embeddings()
        self._chunked = not head_is_adapted and type(self._head) is nn.Linear and self._is_product()
        self._head_is_adapted = head_is_adapted

    def __call__(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """The weighted sum over all asked positions, to be differentiated, and the loss of each (N)."""
        if self._chunked:
            assert isinstance(self._head, nn.Linear)
            with _answering_what_it_is_asked(self._head):
                hidden_ND = self._logits(packed)
            total, losses_N = _Chunked.apply(
                hidden_ND, self._head.weight, self._head.bias, packed.targets_N, packed.weights_N
            )
            return total, losses_N
        losses_N = F.cross_entropy(self._logits(packed).float(), packed.targets_N, reduction="none")
        return (losses_N * packed.weights_N).sum(), losses_N.detach()

    def _logits(self, packed: Packed) -> Tensor:
        inputs = {"input_ids": packed.ids_BT, "position_ids": packed.positions_BT, "use_cache": False}
        if self._head_is_adapted:  # whose a row is must be known there, so that all rows go through it
            everything: Tensor = self._model(**inputs).logits[packed.asked_BT]
            return everything
        kept: Tensor = self._model(**inputs, logits_to_keep=packed.asked_BT).logits
        return kept.reshape(len(packed.targets_N), -1)

    @torch.no_grad()
    def _is_product(self) -> bool:
        """Whether the logits of a probe are what the head makes of what reaches it."""
        assert isinstance(self._head, nn.Linear)
        probe = torch.arange(1, 3, device=self._model.device)[None]
        logits = self._model(input_ids=probe, use_cache=False).logits
        with _answering_what_it_is_asked(self._head):
            hidden = self._model(input_ids=probe, use_cache=False).logits
        return hidden.shape[-1] == self._head.in_features and torch.allclose(
            F.linear(hidden, self._head.weight, self._head.bias).float(), logits.float(), rtol=1e-3, atol=1e-3
        )


@contextmanager
def _answering_what_it_is_asked(module: nn.Module) -> Iterator[None]:
    """The module gives back its input: what reaches it comes out of the model."""
    module.forward = lambda x: x
    try:
        yield
    finally:
        del module.forward


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        trained, shifted = ctx.needs_input_grad[1:3]
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trained else None
        grad_V = torch.zeros(len(weight_VD), device=weight_VD.device) if shifted else None
        many = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
        for start in range(0, len(targets_N), many):
            chunk = slice(start, start + many)
            asked_C1 = targets_N[chunk, None]
            logits_CV = F.linear(hidden_ND[chunk], weight_VD, bias_V).float()
            logit_C1, top_C1, weight_C1 = logits_CV.gather(1, asked_C1), logits_CV.amax(1, True), weights_N[chunk, None]
            exp_CV = logits_CV.sub_(top_C1).exp_()  # in place: memory that is new to a process is slow to come by
            sum_C1 = exp_CV.sum(1, True)
            losses_N[chunk] = (sum_C1.log() + top_C1 - logit_C1)[:, 0]
            if grad_ND is None and not (trained or shifted):
                continue
            p_CV = exp_CV.mul_(weight_C1 / sum_C1).scatter_add_(1, asked_C1, -weight_C1)
            said_CV = p_CV.to(weight_VD.dtype)
            if grad_ND is not None:
                grad_ND[chunk] = said_CV @ weight_VD
            if grad_VD is not None:
                grad_VD += said_CV.T @ hidden_ND[chunk]
            if grad_V is not None:
                grad_V += p_CV.sum(0)
        ctx.save_for_backward(
            grad_ND,
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        times = gradients[0]
        found = [None if grad is None else grad * times.to(grad.dtype) for grad in ctx.saved_tensors]
        return *found, None, None
