"""What two bases make of the same unlabelled text: inputs of modules, and the next tokens that an adapter makes likely.

Only prompts are looked at; completions of the rows, where they have any, are labels. What follows a prompt is what the
old base with the adapter answers: there its likelihoods count, since nobody asks an adapter to go on with a question.
One model is in memory at a time. Of the old one no more is kept than what the adapter read, A·x, and the likelihoods.
Legend: R rank, I inputs, T tokens, P positions, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..bank import Bank, attached
from ..data import Row, prompts_of
from ..lora import Adapter, found_in
from ..model import Model, Tokenizer, check_tokens, context_of

Tokens = tuple[int, ...]
TEXTS = 64
"""Rows that are looked at, at most, spread over all."""
POSITIONS = 512
"""Positions whose next tokens are compared, at most: the first ones of every answer."""
_PROMPT, _ANSWER = 192, 24
"""Tokens of a prompt, its end where it is longer, and of an answer, at most."""


@dataclass(frozen=True)
class Said:
    """A prompt and its answer in tokens, the answer from ``first`` on."""

    ids: Tokens
    first: int


def asked(model: Model, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Tokens]:
    """The prompts of some rows in tokens."""
    longest = max(1, min(_PROMPT, (context_of(model) or _PROMPT + _ANSWER) - _ANSWER))
    prompts = [prompt[-longest:] for prompt in prompts_of(tokenizer, rows[:: -(-len(rows) // TEXTS)])]
    check_tokens(model, (token for prompt in prompts for token in prompt))
    return prompts


def answered(model: Model, tokenizer: Tokenizer, prompts: Sequence[Tokens], adapter: Adapter) -> list[Said]:
    """The prompts with what the model with the adapter answers, greedily."""
    end = tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=_ANSWER, do_sample=False, eos_token_id=end, pad_token_id=end, bos_token_id=None
    )
    found = []
    with torch.inference_mode(), attached(model, adapter):
        for prompt in prompts:
            ids_BT = torch.tensor([prompt], device=model.device)
            [ids] = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=greedy).tolist()
            found.append(Said(tuple(ids), len(prompt)))
    return found


@torch.no_grad()
def watch(model: Model, texts: Sequence[Said], see: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Let those of ``see`` see the inputs (T×I, float32) of the modules of their names, one text after the other."""

    def seen(one: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: one(inputs[0].float().reshape(-1, inputs[0].shape[-1]).cpu())

    with ExitStack() as hooks:
        for name, one in see.items():
            handle = found_in(model, name)[1].register_forward_pre_hook(seen(one))
            hooks.callback(handle.remove)
        for text in texts:
            model(input_ids=torch.tensor([text.ids], device=model.device), use_cache=False)


def reads(model: Model, texts: Sequence[Said], adapter: Adapter) -> dict[str, Tensor]:
    """A·x (R×T) of every linear module of the adapter, on the model as it adapts it."""
    found: dict[str, list[Tensor]] = {name: [] for name, patch in adapter.patches.items() if not patch.embedding}

    def see(name: str, x_TI: Tensor) -> None:
        found[name].append(adapter.patches[name].a_RI.float() @ x_TI.T)

    with attached(model, adapter):
        watch(model, texts, {name: partial(see, name) for name in found})
    return {name: torch.cat(some, dim=1) for name, some in found.items()}


@torch.no_grad()
def likelihoods(model: Model, texts: Sequence[Said], adapters: Sequence[Adapter | None]) -> list[Tensor]:
    """ln p of the next token (P×V, float32) at the positions of the answers, by adapter; None: the bare model."""
    counts = _counts(texts)
    bank = Bank(model, [adapter for adapter in adapters if adapter is not None])
    seats = iter(range(len(adapters)))
    who = [None if adapter is None else next(seats) for adapter in adapters]
    found: list[list[Tensor]] = [[] for _ in adapters]
    with bank.attached():
        for text, count in zip(texts, counts, strict=True):
            ids_T = torch.tensor([text.ids], device=model.device)
            for place, one in enumerate(who):
                bank.assign([(one, 1)])
                logits_PV = model(input_ids=ids_T, use_cache=False).logits[0, text.first - 1 :][:count]
                found[place].append(logits_PV.float().log_softmax(-1).cpu())
    return [torch.cat(some) for some in found]


def _counts(texts: Sequence[Said]) -> list[int]:
    """Positions that are compared of each answer."""
    most = max(1, POSITIONS // len(texts))
    return [min(most, len(text.ids) - text.first) for text in texts]


def divergence(p_PV: Tensor, q_PV: Tensor) -> Tensor:
    """KL(p ‖ q) by position, in nats, of two sets of ln p."""
    return (p_PV.exp() * (p_PV - q_PV)).sum(-1)


@dataclass(frozen=True)
class Seen:
    """What is kept of the old base: the texts, what the adapter read in them, and what followed with and without it."""

    prompts: list[Tokens]
    texts: list[Said]
    read: Mapping[str, Tensor]
    adapted_PV: Tensor
    bare_PV: Tensor

    def by_text(self, values_P: Tensor) -> Sequence[Tensor]:
        """Values of the positions, apart by text."""
        return torch.split(values_P, _counts(self.texts))


def seen_by(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], adapter: Adapter) -> Seen:
    """What the old base makes of the prompts of ``rows``."""
    prompts = asked(model, tokenizer, rows)
    texts = answered(model, tokenizer, prompts, adapter)
    adapted_PV, bare_PV = likelihoods(model, texts, [adapter, None])
    return Seen(prompts, texts, reads(model, texts, adapter), adapted_PV, bare_PV)
