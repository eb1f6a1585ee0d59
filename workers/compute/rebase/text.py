"""What two bases make of the same unlabelled text: inputs of modules, and the next tokens that an adapter makes likely.

One model is in memory at a time. Of the old one no more is kept than what the adapter read, A·x, and the likelihoods
at some positions. Only prompts are looked at: completions of the rows, where they have any, are labels.
Legend: R rank, I inputs, T tokens, P positions, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..bank import Bank
from ..data import Row, prompts_of
from ..lora import Adapter, found_in
from ..model import Model, Tokenizer, check_tokens, context_of

Tokens = tuple[int, ...]
TOKENS = 4096
"""Tokens that are looked at, at most."""
POSITIONS = 256
"""Positions whose next tokens are compared, at most: the last ones of every text."""
_LONGEST = 192
"""Tokens of a text, at most: many short ones tell more than few long ones."""


def texts_of(model: Model, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Tokens]:
    """The prompts of the first rows in tokens, their ends where they are long, up to `TOKENS` altogether."""
    longest = min(_LONGEST, context_of(model) or _LONGEST)
    texts: list[Tokens] = []
    for row in rows:
        [prompt] = prompts_of(tokenizer, [row])
        text = prompt[-longest:]
        if texts and sum(map(len, texts)) + len(text) > TOKENS:
            break
        texts.append(text)
    check_tokens(model, (token for text in texts for token in text))
    return texts


@torch.no_grad()
def watch(model: Model, texts: Sequence[Tokens], see: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Let those of ``see`` see the inputs (T×I, float32) of the modules of their names, one text after the other."""

    def seen(one: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: one(inputs[0].float().reshape(-1, inputs[0].shape[-1]).cpu())

    with ExitStack() as hooks:
        for name, one in see.items():
            handle = found_in(model, name)[1].register_forward_pre_hook(seen(one))
            hooks.callback(handle.remove)
        for text in texts:
            model(input_ids=torch.tensor([text], device=model.device), use_cache=False)


def reads(model: Model, texts: Sequence[Tokens], adapter: Adapter) -> dict[str, Tensor]:
    """A·x (R×T) of every linear module of the adapter, on the bare model."""
    found: dict[str, list[Tensor]] = {name: [] for name, patch in adapter.patches.items() if not patch.embedding}

    def see(name: str, x_TI: Tensor) -> None:
        found[name].append(adapter.patches[name].a_RI.float() @ x_TI.T)

    watch(model, texts, {name: partial(see, name) for name in found})
    return {name: torch.cat(some, dim=1) for name, some in found.items()}


@torch.no_grad()
def likelihoods(model: Model, texts: Sequence[Tokens], adapters: Sequence[Adapter | None]) -> list[Tensor]:
    """ln p of the next token (P×V, float32) at the last positions of every text, by adapter; None: the bare model."""
    last = _last(texts)
    bank = Bank(model, [adapter for adapter in adapters if adapter is not None])
    seats = iter(range(len(adapters)))
    who = [None if adapter is None else next(seats) for adapter in adapters]
    found: list[list[Tensor]] = [[] for _ in adapters]
    with bank.attached():
        for text in texts:
            ids_T = torch.tensor([text], device=model.device)
            for place, one in enumerate(who):
                bank.assign([(one, 1)])
                logits_PV = model(input_ids=ids_T, use_cache=False).logits[0, -last:]
                found[place].append(logits_PV.float().log_softmax(-1).cpu())
    return [torch.cat(some) for some in found]


def _last(texts: Sequence[Tokens]) -> int:
    """Positions of a text that are compared, where it has so many."""
    return max(1, POSITIONS // len(texts))


def divergence(p_PV: Tensor, q_PV: Tensor) -> Tensor:
    """KL(p ‖ q) by position, in nats, of two sets of ln p."""
    return (p_PV.exp() * (p_PV - q_PV)).sum(-1)


@dataclass(frozen=True)
class Seen:
    """What is kept of the old base: the texts, what the adapter read in them, and what followed with and without it."""

    texts: list[Tokens]
    read: Mapping[str, Tensor]
    adapted_PV: Tensor
    bare_PV: Tensor

    def by_text(self, values_P: Tensor) -> Sequence[Tensor]:
        """Values of the positions, apart by text."""
        return torch.split(values_P, [min(_last(self.texts), len(text)) for text in self.texts])


def seen_by(model: Model, tokenizer: Tokenizer, rows: Sequence[Row], adapter: Adapter) -> Seen:
    """What the old base makes of the prompts of ``rows``."""
    texts = texts_of(model, tokenizer, rows)
    adapted_PV, bare_PV = likelihoods(model, texts, [adapter, None])
    return Seen(texts, reads(model, texts, adapter), adapted_PV, bare_PV)
