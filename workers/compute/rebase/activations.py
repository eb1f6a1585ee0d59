"""Maps between two bases from what they compute on text, where their weights alone do not tell (docs: rebase).

An adapter reads A·x₁ and says B·z. On the new base it is to read the same from what is there, and what it says is to
move losses by the same amount, to first order; at positions where both have read the same text

    A₂ = argmin ‖X₂·A₂ᵀ − X₁·A₁ᵀ‖² + λ‖A₂‖²        X: what the module is given, N × inputs
    B₂ = argmin ‖G₂·B₂ − G₁·B₁‖² + λ‖B₂‖²          G: gradients of losses by what the module gives, N × outputs

both ridge regressions of rank-many columns. That a task vector is made of activations and gradients, and that both must
be brought over, is Son et al. 2026 (BiCo, arXiv:2605.28444); before them Rinaldi et al. 2026 (Theseus,
arXiv:2602.12952) had the activations. Both turn by orthogonal Procrustes, which is what is left of the regression when
only the directions of the spaces are trusted (`benchmarks.rebase.widths` has all three).

The text is unlabelled: prompts, and what the old base with the adapter writes behind them, since an adapter shows where
it answers. The losses are that of the text's own next tokens and, at every position, those of a few tokens that the
adapted old base finds likely there: one direction of the output each. Gradients change on the way to an update, so that
the new base is read as it is, and once more so and with what came of that, together (the trapezoidal rule); what brings
it nearer to the adapted old one is taken. One base is in memory at a time: of the old one X₁·A₁ᵀ and G₁·B₁ are kept, of
the new one sums of squares, for as many modules at once as memory is given for.
Legend: N positions, R rank, I inputs, O outputs, T tokens, P positions of a text, K tokens asked for at each.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.core.errors import NotRunnable

from ..bank import attached
from ..data import Row, prompts_of
from ..lora import Adapter, Patch, sizes
from ..model import Model, Tokenizer, check_tokens, context_of
from ..panel import Panel

MOST_TEXTS = 512
"""Texts that are read, spread over those that are given."""
_TOKENS = 512
_POSITIONS = 16384
"""Positions that are compared, in all texts together."""
_STREAM_POSITIONS = 512
"""Of these, those at which whole layers are compared."""
_WRITTEN = 48
"""Tokens that are written behind a prompt, at most."""
_ASKED = 3
"""Likely tokens whose losses are taken at every position."""
_TRIED = 128
"""Texts by which what came of all this is compared."""
_UNSHARED = -100
"""In the place of one that the new base does not have."""
_RIDGE = 0.03
"""λ, in units of the mean square of what is regressed on."""
_BYTES = 1 << 30
"""Of sums of squares, at once."""


@dataclass(frozen=True)
class Piece:
    """What one patch of the old base becomes in one module of the new one; rows of either that belong together."""

    old: str
    new: str
    patch: Patch
    rows1: Tensor | slice = field(default_factory=lambda: slice(None))
    rows2: Tensor | slice = field(default_factory=lambda: slice(None))
    reads: bool = True
    """False for an embedding, which is given tokens: A is not regressed."""
    writes: bool = True
    """False for the head, which gives tokens: B is not regressed."""


@dataclass(frozen=True)
class Shared:
    """A text in the tokens of either base, and the places where both have read equally much of it."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    places: tuple[tuple[int, ...], tuple[int, ...]]
    asked: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(0, 0), torch.zeros(0, 0)))
    """K×P ids of likely next tokens, of either base."""


@torch.no_grad()
def completed(model: Model, tokenizer: Tokenizer, adapter: Adapter, rows: Sequence[Row]) -> list[str]:
    """The prompts of some rows, evenly spread, and what the adapted old base writes behind them."""
    most = min(_TOKENS, context_of(model) or _TOKENS) - _WRITTEN
    prompts = [ids[-most:] for ids in prompts_of(tokenizer, rows[:: -(-len(rows) // MOST_TEXTS)])]
    check_tokens(model, (token for prompt in prompts for token in prompt))
    panel = Panel(model, tokenizer, {"adapter": adapter}, bare=False)
    with panel.seated():
        written = panel.continuations(prompts, _WRITTEN)["adapter"]
    return [
        tokenizer.decode(prompt[prompt[0] == tokenizer.bos_token_id :]) + more.text
        for prompt, more in zip(prompts, written, strict=True)
    ]


@torch.no_grad()
def with_asked(
    model: Model, adapter: Adapter, texts: Sequence[Shared], shared: Sequence[tuple[int, int]]
) -> list[Shared]:
    """The texts with tokens that the adapted old base draws at their places, of those that both vocabularies have."""
    chance = torch.Generator().manual_seed(0)
    new_V = torch.full((model.get_input_embeddings().weight.shape[0],), _UNSHARED)
    old, new = zip(*shared, strict=True)
    new_V[list(old)] = torch.tensor(new)
    found = []
    with attached(model, adapter):
        for text in texts:
            ids_T = torch.tensor(text.ids[0], device=model.device)
            logits_PV = model(input_ids=ids_T[None], use_cache=False).logits[0, list(text.places[0])]
            p_PV = logits_PV.float().softmax(-1).cpu()[:, : len(new_V)]
            asked_KP = torch.multinomial(p_PV, _ASKED, replacement=True, generator=chance).T
            theirs_KP = new_V[asked_KP]
            found.append(replace(text, asked=(torch.where(theirs_KP == _UNSHARED, _UNSHARED, asked_KP), theirs_KP)))
    return found


def shared(
    one: Tokenizer, two: Tokenizer, texts: Sequence[str], contexts: tuple[int | None, int | None]
) -> list[Shared]:
    """The texts that both read some of alike; `NotRunnable` where there is none."""
    most = max(1, _POSITIONS // max(1, len(texts)))
    found = []
    for text in texts:
        (ids1, ends1), (ids2, ends2) = (
            _ends(tokenizer, text, min(context or _TOKENS, _TOKENS))
            for tokenizer, context in zip((one, two), contexts, strict=True)
        )
        both = sorted(ends1.keys() & ends2.keys())
        some = both[:: -(-len(both) // most)] if both else []
        if some and min(len(ids1), len(ids2)) > 1:
            found.append(Shared((ids1, ids2), (tuple(ends1[end] for end in some), tuple(ends2[end] for end in some))))
    if not found:
        raise NotRunnable(what="Transporting", reason="the unlabelled text gives no position that both bases read")
    return found


def _ends(tokenizer: Tokenizer, text: str, limit: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """The text in tokens, and the place of the token that ends at each letter."""
    told = tokenizer(text, return_offsets_mapping=True)
    ids, spans = told["input_ids"][:limit], told["offset_mapping"][:limit]
    return tuple(ids), {end: place for place, (start, end) in enumerate(spans) if end > start}


# ── one base ─────────────────────────────────────────────────────────────────

See = Callable[[str, Tensor, Tensor, int], None]
"""Told of a module what it was given (P × I), and the gradient by what it gave (P × O) of a text's n-th loss."""


def _passes(
    model: Model, texts: Sequence[Shared], side: int, names: Sequence[str], see: See, then: Callable[[int], None]
) -> None:
    """Every text forward, and back from each of its losses; ``then`` after each text, with how many places it had."""
    places: list[int] = []
    turn = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], given: Tensor) -> None:
            x_PI = torch.empty(0) if isinstance(module, nn.Embedding) else inputs[0][0, places].detach().float()
            given.register_hook(lambda g: see(name, x_PI, g[0, places].float(), turn))

        return hook

    with ExitStack() as hooks:
        embedding = model.get_input_embeddings()
        start = embedding.register_forward_hook(lambda _m, _x, given: given.requires_grad_(True))
        hooks.callback(start.remove)
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            hooks.callback(handle.remove)
        for text in texts:
            places[:] = text.places[side]
            ids_T = torch.tensor(text.ids[side], device=model.device)
            with torch.enable_grad():
                logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
                losses = [(logits_TV[:-1], ids_T[1:])]
                losses += [(logits_TV[places], one_P.to(model.device)) for one_P in text.asked[side]]
                for turn, (logits, wanted) in enumerate(losses):
                    loss = F.cross_entropy(logits, wanted, reduction="sum", ignore_index=_UNSHARED)
                    loss.backward(retain_graph=turn < len(losses) - 1)
            then(len(places))


@dataclass
class _Said:
    """Of one piece: X₁·A₁ᵀ and G₁·B₁, text by text."""

    z: list[Tensor] = field(default_factory=list)
    s: list[Tensor] = field(default_factory=list)


def said(
    model: Model, texts: Sequence[Shared], pieces: Sequence[Piece], report: Callable[[], None]
) -> list[tuple[Tensor, Tensor]]:
    """X₁·A₁ᵀ (N × R) and G₁·B₁ (of every loss, so (1 + K)·N × R) of every piece, with the scale in the latter."""
    found = [_Said() for _ in pieces]
    by_module: dict[str, list[int]] = {}
    for place, piece in enumerate(pieces):
        by_module.setdefault(piece.old, []).append(place)

    def see(name: str, x_PI: Tensor, g_PO: Tensor, turn: int) -> None:
        for place in by_module[name]:
            piece, update = pieces[place], pieces[place].patch.update
            if piece.reads and turn == 0:
                found[place].z.append((x_PI @ update.a_RI.to(x_PI).T).cpu())
            if piece.writes:
                found[place].s.append((g_PO[:, piece.rows1] @ update.b_OR.to(g_PO)[piece.rows1]).cpu())

    _passes(model, texts, 0, list(by_module), see, lambda _: report())
    return [(torch.cat(one.z or [torch.empty(0)]), torch.cat(one.s or [torch.empty(0)])) for one in found]


@dataclass
class _Sums:
    """Of one module: XᵀX and GᵀG, and by piece XᵀZ and GᵀS."""

    xx: Tensor
    gg: Tensor
    xz: dict[int, Tensor]
    gs: dict[int, Tensor]


def heard(
    model: Model,
    texts: Sequence[Shared],
    pieces: Sequence[Piece],
    known: Sequence[tuple[Tensor, Tensor]],
    report: Callable[[], None],
    wearing: Sequence[Adapter | None] = (None,),
) -> list[tuple[Tensor, Tensor]]:
    """A₂ (R × I) and B₂ (rows × R) of every piece in float64; empty where a piece does not read or write.

    The texts are read once with each of the adapters that the model is ``wearing`` (None: none).
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in _by_memory(model, pieces):
        sums = _summed(model, texts, {place: pieces[place] for place in group}, known, report, wearing)
        for place in group:
            piece, mine = pieces[place], sums[pieces[place].new]
            gg_OO = mine.gg[piece.rows2][:, piece.rows2]
            found[place] = _ridge(mine.xx, mine.xz[place]).T, _ridge(gg_OO, mine.gs[place][piece.rows2])
    return [found[place] for place in range(len(pieces))]


def _by_memory(model: Model, pieces: Sequence[Piece]) -> list[list[int]]:
    """Pieces whose sums of squares are held at once."""
    groups: list[list[int]] = []
    room = 0
    for place, piece in enumerate(pieces):
        need = 4 * sum(size**2 for size in _sizes(model, piece))
        if not groups or need > room:
            groups.append([])
            room = _BYTES
        groups[-1].append(place)
        room -= need
    return groups


def _sizes(model: Model, piece: Piece) -> tuple[int, int]:
    """Outputs and inputs of the piece's module, as far as they are regressed on."""
    outputs, inputs = sizes(model.get_submodule(piece.new))
    return outputs if piece.writes else 0, inputs if piece.reads else 0


def _summed(
    model: Model,
    texts: Sequence[Shared],
    pieces: Mapping[int, Piece],
    known: Sequence[tuple[Tensor, Tensor]],
    report: Callable[[], None],
    wearing: Sequence[Adapter | None],
) -> dict[str, _Sums]:
    by_module: dict[str, list[int]] = {}
    for place, piece in pieces.items():
        by_module.setdefault(piece.new, []).append(place)
    found: dict[str, _Sums] = {}
    for name, mine in by_module.items():
        outputs, inputs = _sizes(model, pieces[mine[0]])
        ranks = {place: pieces[place].patch.a_RI.shape[0] for place in mine}
        found[name] = _Sums(
            torch.zeros(inputs, inputs), torch.zeros(outputs, outputs),
            {place: torch.zeros(inputs, rank) for place, rank in ranks.items()},
            {place: torch.zeros(outputs, rank) for place, rank in ranks.items()},
        )  # fmt: skip
    at = 0
    losses = 1 + len(texts[0].asked[1])

    def see(name: str, x_PI: Tensor, g_PO: Tensor, turn: int) -> None:
        x_PI, g_PO, mine, many = x_PI.cpu(), g_PO.cpu(), found[name], len(g_PO)
        reads, start = len(mine.xx) and turn == 0, losses * at + turn * many
        if reads:
            mine.xx.addmm_(x_PI.T, x_PI)
        if len(mine.gg):
            mine.gg.addmm_(g_PO.T, g_PO)
        for place in by_module[name]:
            z_NR, s_NR = known[place]
            if reads:
                mine.xz[place].addmm_(x_PI.T, z_NR[at : at + many])
            if len(mine.gg):
                mine.gs[place].addmm_(g_PO.T, s_NR[start : start + many])

    def then(many: int) -> None:
        nonlocal at
        at += many
        report()

    for adapter in wearing:
        at = 0
        with attached(model, adapter or Adapter({}, {})):
            _passes(model, texts, 1, list(by_module), see, then)
    return found


def _ridge(gram_II: Tensor, cross_IR: Tensor) -> Tensor:
    """argmin ‖X·W − Z‖² + λ‖W‖² from XᵀX and XᵀZ."""
    if not len(gram_II):
        return cross_IR.double()
    gram_II = gram_II.double()
    light = _RIDGE * float(gram_II.trace()) / len(gram_II) or 1.0
    solved: Tensor = torch.linalg.solve(gram_II + light * torch.eye(len(gram_II)).double(), cross_IR.double())
    return solved


def streams(model: Model, texts: Sequence[Shared], side: int, layers: str) -> list[Tensor]:
    """The residual stream before the first layer and behind every one, at some of the places of all texts."""
    most = max(1, _STREAM_POSITIONS // len(texts))
    found: list[list[Tensor]] = [[] for _ in range(len(model.get_submodule(layers)) + 1)]
    with ExitStack() as hooks, torch.no_grad():
        for place, layer in enumerate(model.get_submodule(layers)):

            def see(_: nn.Module, inputs: tuple[Tensor, ...], given: Any, at: int = place) -> None:
                out: Tensor = given if isinstance(given, Tensor) else given[0]
                if at == 0:
                    found[0].append(inputs[0][0, places].float().cpu())
                found[at + 1].append(out[0, places].float().cpu())

            handle = layer.register_forward_hook(see)
            hooks.callback(handle.remove)
        for text in texts:
            places = text.places[side][-most:]
            model(input_ids=torch.tensor(text.ids[side], device=model.device)[None], use_cache=False)
    return [torch.cat(some)[:_STREAM_POSITIONS] for some in found]


@torch.no_grad()
def surprise(model: Model, texts: Sequence[Shared], adapters: Sequence[Adapter]) -> list[float]:
    """By adapter, nats per token that was asked for, at the places of some texts: their cross entropy."""
    some = texts[:: -(-len(texts) // _TRIED)]
    found = []
    for adapter in adapters:
        total, count = 0.0, 0
        with attached(model, adapter):
            for text in some:
                ids_T = torch.tensor(text.ids[1], device=model.device)
                logits_PV = model(input_ids=ids_T[None], use_cache=False).logits[0, list(text.places[1])].float()
                for asked_P in text.asked[1].to(model.device):
                    total += float(F.cross_entropy(logits_PV, asked_P, reduction="sum", ignore_index=_UNSHARED))
                    count += int((asked_P != _UNSHARED).sum())
        found.append(total / max(1, count))
    return found
