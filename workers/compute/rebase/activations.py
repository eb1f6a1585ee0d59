"""Maps between two bases from what they compute on text, where their weights alone do not tell (docs: rebase).

An adapter reads A·x₁ and says B·z. On the new base it is to read the same from what is there, and what it says is to
move the loss by the same amount, to first order; at positions where both have read the same text

    A₂ = argmin ‖X₂·A₂ᵀ − X₁·A₁ᵀ‖² + λ‖A₂‖²        X: what the module is given, N × inputs
    B₂ = argmin ‖G₂·B₂ − G₁·B₁‖² + λ‖B₂‖²          G: gradients of the loss by what the module gives, N × outputs

both ridge regressions of rank-many columns. That a task vector is made of activations and gradients, and that both must
be brought over, is Son et al. 2026 (BiCo, arXiv:2605.28444); before them Rinaldi et al. 2026 (Theseus,
arXiv:2602.12952) had the activations. Both turn by orthogonal Procrustes, which is what is left of the regression when
only the directions of the spaces are trusted; here both are in the benchmark.

A base is run at a time: of the old one X₁·A₁ᵀ and G₁·B₁ are kept, of the new one sums of squares, for as many modules
at once as memory is given for. Nothing is generated, no label is read: the loss is that of the text's own next tokens.
Legend: N positions, R rank, I inputs, O outputs, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.core.errors import NotRunnable

from ..data import Row
from ..finetune import Report, silent
from ..lora import Patch, sizes
from ..model import Model, Tokenizer, load

MOST_TEXTS = 512
"""Texts that are read, spread over those that are given."""
_TOKENS = 512
_POSITIONS = 16384
"""Positions that are compared, in all texts together."""
_STREAM_POSITIONS = 512
"""Of these, those at which whole layers are compared."""
_RIDGE = 1e-2
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


def texts_of(rows: Sequence[Row]) -> list[str]:
    """The prompts of some rows, evenly spread; of messages all before the last."""
    some = rows[:: -(-len(rows) // MOST_TEXTS)]
    return [
        row.value["prompt"] if "prompt" in row.value else "\n".join(m["content"] for m in row.value["messages"][:-1])
        for row in some
    ]


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

See = Callable[[str, Tensor, Tensor], None]
"""Told of a module what it was given (N × I) and the gradient by what it gave (N × O), at the places of one text."""


def _passes(
    model: Model, texts: Sequence[Shared], side: int, names: Sequence[str], see: See, then: Callable[[int], None]
) -> None:
    """Every text forward and back; ``then`` after each, with how many places it had."""
    places: list[int] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], given: Tensor) -> None:
            x_NI = torch.empty(0) if isinstance(module, nn.Embedding) else inputs[0][0, places].detach().float()
            given.register_hook(lambda g: see(name, x_NI, g[0, places].float()))

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
                logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
                F.cross_entropy(logits_TV, ids_T[1:], reduction="sum").backward()
            then(len(places))


@dataclass
class _Told:
    """Of one piece: X₁·A₁ᵀ and G₁·B₁, text by text."""

    z: list[Tensor] = field(default_factory=list)
    s: list[Tensor] = field(default_factory=list)


def told(
    model: Model, texts: Sequence[Shared], pieces: Sequence[Piece], report: Callable[[], None]
) -> list[tuple[Tensor, Tensor]]:
    """X₁·A₁ᵀ and G₁·B₁ of every piece, N × R each, with the scale in the latter."""
    found = [_Told() for _ in pieces]
    by_module: dict[str, list[int]] = {}
    for place, piece in enumerate(pieces):
        by_module.setdefault(piece.old, []).append(place)

    def see(name: str, x_NI: Tensor, g_NO: Tensor) -> None:
        for place in by_module[name]:
            piece, update = pieces[place], pieces[place].patch.update
            if piece.reads:
                found[place].z.append((x_NI @ update.a_RI.to(x_NI).T).cpu())
            if piece.writes:
                found[place].s.append((g_NO[:, piece.rows1] @ update.b_OR.to(g_NO)[piece.rows1]).cpu())

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
) -> list[tuple[Tensor, Tensor]]:
    """A₂ (R × I) and B₂ (rows × R) of every piece in float64; empty where a piece does not read or write."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in _by_memory(model, pieces):
        sums = _summed(model, texts, {place: pieces[place] for place in group}, known, report)
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

    def see(name: str, x_NI: Tensor, g_NO: Tensor) -> None:
        x_NI, g_NO, mine = x_NI.cpu(), g_NO.cpu(), found[name]
        here = slice(at, at + len(g_NO))
        if len(mine.xx):
            mine.xx.addmm_(x_NI.T, x_NI)
        if len(mine.gg):
            mine.gg.addmm_(g_NO.T, g_NO)
        for place in by_module[name]:
            z_NR, s_NR = known[place]
            if len(mine.xx):
                mine.xz[place].addmm_(x_NI.T, z_NR[here])
            if len(mine.gg):
                mine.gs[place].addmm_(g_NO.T, s_NR[here])

    def then(many: int) -> None:
        nonlocal at
        at += many
        report()

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


# ── both ─────────────────────────────────────────────────────────────────────


def streams(folder: Path, texts: Sequence[Shared], side: int, layers: str) -> list[Tensor]:
    """The residual stream before the first layer and behind every one, at some of the places of all texts."""
    model, _ = load(folder)
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


def fitted_to_text(
    folders: tuple[Path, Path], texts: Sequence[Shared], pieces: Sequence[Piece], report: Report = silent
) -> list[tuple[Tensor, Tensor]]:
    """`heard` after `told`, each base loaded on its own."""
    step = 0

    def reported() -> None:
        nonlocal step
        step += 1
        report({"step": step, "texts": len(texts)})

    known = told(load(folders[0])[0], texts, pieces, reported)
    return heard(load(folders[1])[0], texts, pieces, known, reported)
