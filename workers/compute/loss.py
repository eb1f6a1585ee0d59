"""Cross entropy of the asked positions, or divergence from a teacher, without ever holding their logits at once.

    loss_n = ln Σ_v exp(w_v·h_n + b_v) − (w_t·h_n + b_t)        t the token that comes next
    loss_n = Σ_k p_k·ln(p_k ⁄ q_k) + p_r·ln(p_r ⁄ q_r)          k the teacher's likeliest tokens, r all others as one

Gradients are computed chunk by chunk on the way forward: of a chunk's logits nothing is kept but what they say about h
and, where the head itself is trained, about w and b, summed in float32. Where a model does more to its logits than the
head's product (caps, scales) or an adapter changes the head, autograd has its way with all of them.
Legend: N asked positions, D hidden size, V vocabulary, C positions of a chunk, K tokens that a teacher names.
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
_REST = 1e-6
"""What a student is taken to leave to all other tokens at least: less is lost in 1 − Σ q_k in float32."""


class Loss:
    """How a model's loss is computed: by chunks where its logits are the head's product and nothing else."""

    def __init__(self, model: Model, *, head_is_adapted: bool) -> None:
        self._model = model
        self._head_is_adapted = head_is_adapted
        head = model.get_output_embeddings()
        self._head = head if not head_is_adapted and type(head) is nn.Linear and self._is_product(head) else None
        """Where logits are its product and nothing else; they are made by chunks then."""

    def __call__(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """The weighted sum over all asked positions, to be differentiated, and the loss of each (N)."""
        taught = packed.top_NK is not None
        if self._head is not None:
            hidden_ND, head = self._hidden(packed, self._head), (self._head.weight, self._head.bias)
            if taught:
                total, losses_N = _Divergence.apply(
                    hidden_ND, *head, packed.top_NK, packed.log_p_NK, packed.weights_N
                )
            else:
                total, losses_N = _Chunked.apply(hidden_ND, *head, packed.targets_N, packed.weights_N)
            return total, losses_N
        logits_NV = self._logits(packed).float()
        if packed.top_NK is not None and packed.log_p_NK is not None:
            losses_N = divergence(logits_NV, packed.top_NK, packed.log_p_NK)
        else:
            losses_N = F.cross_entropy(logits_NV, packed.targets_N, reduction="none")
        return (losses_N * packed.weights_N).sum(), losses_N.detach()

    @torch.no_grad()
    def likeliest(self, packed: Packed, many: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at each asked position, the first first, and ln p of each (N×K)."""
        found = []
        for logits_CV in self._by_chunks(packed):
            top = logits_CV.topk(min(many, logits_CV.shape[1]))
            found.append((top.indices, top.values - logits_CV.logsumexp(1, keepdim=True)))
        tops, log_ps = zip(*found, strict=True)
        return torch.cat(tops), torch.cat(log_ps)

    def _by_chunks(self, packed: Packed) -> Iterator[Tensor]:
        if self._head is None:
            yield self._logits(packed).float()
            return
        hidden_ND = self._hidden(packed, self._head)
        for hidden_CD in hidden_ND.split(_positions(self._head.weight)):
            yield self._head(hidden_CD).float()

    def _hidden(self, packed: Packed, head: nn.Linear) -> Tensor:
        with _answering_what_it_is_asked(head):
            return self._logits(packed)

    def _logits(self, packed: Packed) -> Tensor:
        inputs = {"input_ids": packed.ids_BT, "position_ids": packed.positions_BT, "use_cache": False}
        if self._head_is_adapted:  # whose a row is must be known there, so that all rows go through it
            everything: Tensor = self._model(**inputs).logits[packed.asked_BT]
            return everything
        kept: Tensor = self._model(**inputs, logits_to_keep=packed.asked_BT).logits
        return kept.reshape(len(packed.targets_N), -1)

    @torch.no_grad()
    def _is_product(self, head: nn.Linear) -> bool:
        """Whether the logits of a probe are what the head makes of what reaches it."""
        probe = torch.arange(1, 3, device=self._model.device)[None]
        logits = self._model(input_ids=probe, use_cache=False).logits
        with _answering_what_it_is_asked(head):
            hidden = self._model(input_ids=probe, use_cache=False).logits
        return hidden.shape[-1] == head.in_features and torch.allclose(
            F.linear(hidden, head.weight, head.bias).float(), logits.float(), rtol=1e-3, atol=1e-3
        )


def divergence(logits_NV: Tensor, top_NK: Tensor, log_p_NK: Tensor) -> Tensor:
    """KL(p‖q) at each position, with q the softmax of ``logits_NV`` and all tokens that the teacher does not name as
    one; ln p = −∞ names nothing."""
    p_NK = log_p_NK.exp()
    log_q_NK = (logits_NV.gather(1, top_NK) - logits_NV.logsumexp(1, keepdim=True)).where(p_NK > 0, 0.0)
    rest_p_N = (1 - p_NK.sum(1)).clamp_min(0)
    rest_q_N = (1 - (log_q_NK.exp() * (p_NK > 0)).sum(1)).clamp_min(_REST)
    named_N: Tensor = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(1)
    return named_N + torch.xlogy(rest_p_N, rest_p_N) - rest_p_N * rest_q_N.log()


def _positions(weight_VD: Tensor) -> int:
    """Positions of a chunk."""
    return max(1, CHUNK_BYTES // (4 * len(weight_VD)))


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
        many = _positions(weight_VD)
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


class _Divergence(torch.autograd.Function):
    """`divergence` by chunks, under a head that is not trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        top_NK: Tensor,
        log_p_NK: Tensor,
        weights_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, grads = [], []
        parts = (each.split(_positions(weight_VD)) for each in (hidden_ND, top_NK, log_p_NK, weights_N))
        for hidden_CD, top_CK, log_p_CK, weights_C in zip(*parts, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf_CD = hidden_CD.detach().requires_grad_(ctx.needs_input_grad[0])
                losses_C = divergence(F.linear(leaf_CD, weight_VD, bias_V).float(), top_CK, log_p_CK)
                if ctx.needs_input_grad[0]:
                    grads += torch.autograd.grad(losses_C @ weights_C, leaf_CD)
            losses.append(losses_C.detach())
        ctx.save_for_backward(torch.cat(grads) if grads else None)
        losses_N = torch.cat(losses)
        ctx.mark_non_differentiable(losses_N)
        return losses_N @ weights_N, losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [grad_ND] = ctx.saved_tensors
        return grad_ND * gradients[0].to(grad_ND.dtype), None, None, None, None, None
