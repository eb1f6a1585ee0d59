"""Tier 2: an adapter on a base of another shape: width, depth, heads, vocabulary (docs: rebase).

    B₂ = M_out·B₁        A₂ = A₁·M_in⁺        of layer b in the place of layer a; of nobody's layer B = 0

What writes the residual stream or reads it behind a norm (gains g, biases b; see `widths` for c, Q and ρ):

    M_out = c·Q        A₂ = A₁·diag(g₁)·ρQᵀ·diag(1 ⁄ g₂)        and a bias of B₂·(A₁·b₁ − A₂·b₂)

q, k, v, gate, up, and what o and down read: the sparse maps of heads and neurons in `widths`. Embedding and head: S of
`tokens`. All this is exact where the new base computes what the old one did. How sure it is, is measured module by
module: the least likeness of the spaces that the module lies in. Where that is below `SURE`, and there is unlabelled
text, the module's factors come from `activations` in place; without text each is brought to the size, against its
weight, that it had before:

    ‖B₂·A₂‖ ⁄ ‖W₂‖ = ‖B₁·A₁‖ ⁄ ‖W₁‖

Legend: D residual of the old base, E of the new one, V vocabulary, R rank, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from registry.core.errors import NotRunnable

from ..data import Row
from ..finetune import Report, silent
from ..lora import Adapter, Patch, fitted, is_transposed, modules_called, sizes
from ..lowrank import LowRank
from ..model import Model, Tokenizer, config_of, context_of, load
from ..plain import plain
from ..quantised import form_of
from .activations import Piece, Shared, completed, heard, said, shared, streams, surprise, with_asked
from .align import only_factors
from .anatomy import READERS, Base, Family, Role
from .depths import by_text, by_weights, monotone
from .tokens import number_cuts, shared_tokens, tokenizer_of
from .widths import Routes, Stream, routes, seen, stream

_WHAT = "Transporting"
STRENGTHS = (0.5, 1.0, 1.5)
"""Of what text gave, that are tried."""
_SPACES: Mapping[Role, tuple[str, ...]] = {
    "q": ("heads", "qk"), "k": ("heads", "qk"), "v": ("heads", "vo"), "o": ("heads", "vo"),
    "gate": ("neurons",), "up": ("neurons",), "down": ("neurons",),
}  # fmt: skip
"""Beside the residual stream."""
Way = Literal["weights", "text", "new"]
"""How a module of the new base came by its factors; ``new``: its layer was nobody's, and B = 0."""
SURE = 0.99
"""Spaces that are so alike, or more, are one space in other coordinates."""
_TOKENS = 16384
_FLAT = 1e-6
"""A gain below this share of the largest lets nothing through, and nothing is put through it."""
_CONSTANT = 1e-5
"""What a bias brought is rounding below this share of it."""


@dataclass(frozen=True)
class Moved:
    """What became of one module of the new base."""

    of: tuple[str, ...]
    """Modules of the old base that its update comes from."""
    by: Way
    likeness: float
    """Of the spaces that it lies in, as their weights tell: the least."""


@dataclass(frozen=True)
class Transported:
    """The adapter on the new base, and how it got there."""

    adapter: Adapter
    modules: dict[str, Moved]
    layers: tuple[int | None, ...]
    """The old layer that each new one was."""
    lost: tuple[str, ...]
    """Patched modules of old layers that no new layer was."""
    residual: float
    """How alike the residual streams are, by the embeddings of shared tokens."""
    tokens: dict[str, int]
    """Shared ones, those of the old base, and those of the new one."""
    read: dict[str, float]
    """Of what was tried by text: nats per token that the adapted old base finds likely; the least was taken."""
    numbers: dict[str, tuple[int, ...]] | None
    """Where the tokenizers cut numbers differently: into how many tokens each cuts those of `tokens.NUMBERS`."""

    def facts(self) -> dict[str, Any]:
        """All but the adapter, as JSON has it."""
        return {key.name: getattr(self, key.name) for key in fields(self) if key.name not in ("adapter", "modules")} | {
            "modules": {name: asdict(moved) for name, moved in self.modules.items()}
        }


def transport(
    adapter: Adapter, old: Path, base: Path, unlabelled: Sequence[Row] | None = None, report: Report = silent
) -> Transported:
    """``adapter``, made on the base in folder ``old``, for the base in folder ``base``.

    Bases are read layer by layer; where their weights leave doubt, each is also run on ``unlabelled`` rows, of which
    the prompts count: the adapted old base completes them. `NotRunnable` for families whose parts do not answer one
    another, for quantised bases, for tokenizers that share nothing, and for what an adapter has beside B·A.
    """
    for folder in (old, base):
        if form := form_of(config_of(folder)):
            raise NotRunnable(what=_WHAT, reason=f"the base in '{folder.name}' is stored as {form}, not as numbers")
    only_factors(adapter, _WHAT)
    pair = _Pair.of(old, base)
    patches = {name: patch for name, _, patch in fitted(pair.one.model, adapter)[0]}
    reading = _Reading(pair, adapter, unlabelled, report) if unlabelled else None
    layers = _layers(pair, reading)
    brought = _ends(pair, patches)
    for layer in range(len(layers)):
        brought += _layer(pair, patches, layers, layer)
        report({"step": layer + 1, "steps": len(layers)})
    read: dict[str, float] = {}
    doubtful = [place for place, one in enumerate(brought) if one.likeness < SURE]
    if reading and doubtful:
        sure = [one for one in brought if one.likeness >= SURE]
        found, read = reading.fitted(
            [brought[place] for place in doubtful], lambda some: _joined(pair, adapter, [*sure, *some])
        )
        for place, one in zip(doubtful, found, strict=True):
            brought[place] = one
    used = {one.piece.old for one in brought if one.by != "new"}
    cuts = [number_cuts(tokenizer) if tokenizer is not None else () for tokenizer in pair.tokenizers]
    return Transported(
        adapter=_joined(pair, adapter, brought),
        modules=_told(brought),
        layers=tuple(layers),
        lost=tuple(name for name in patches if name not in used),
        residual=pair.stream.match.after,
        tokens={"shared": len(pair.tokens), "old": pair.rows[0], "new": pair.rows[1]},
        read=read,
        numbers={"old": cuts[0], "new": cuts[1]} if cuts[0] != cuts[1] else None,
    )


@dataclass(frozen=True)
class _Pair:
    """Two bases, what their vocabularies share, and the map of their residual streams."""

    folders: tuple[Path, Path]
    one: Base
    two: Base
    tokenizers: tuple[Tokenizer | None, Tokenizer | None]
    rows: tuple[int, int]
    """Of their embeddings."""
    tokens: Sequence[tuple[int, int]]
    stream: Stream

    @classmethod
    def of(cls, old: Path, base: Path) -> Self:
        """Reads the embeddings and nothing else."""
        one, two = Base.at(old), Base.at(base)
        _check(one.parts.family, two.parts.family)
        tokenizers = tokenizer_of(old), tokenizer_of(base)
        rows = tuple(side.model.get_input_embeddings().weight.shape[0] for side in (one, two))
        tokens = shared_tokens(*tokenizers, rows)
        if not tokens:
            raise NotRunnable(what=_WHAT, reason="the tokenizers of the two bases share no token")
        some = tokens[:: -(-len(tokens) // _TOKENS)]
        e1_ND, e2_NE = one.embeddings([a for a, _ in some]), two.embeddings([b for _, b in some])
        centred = one.parts.family.centred
        return cls((old, base), one, two, tokenizers, rows, tokens, stream(e1_ND, e2_NE, centred=centred))

    def through(self, norms: tuple[str, str], a_RI: Tensor) -> tuple[Tensor, Tensor]:
        """A₂ for what reads through a norm, and A₁·b₁ − A₂·b₂."""
        (g1_D, b1_D), (g2_E, b2_E) = self.one.norm(norms[0]), self.two.norm(norms[1])
        through_E = torch.where(g2_E.abs() > _FLAT * g2_E.abs().max(), 1 / g2_E, 0.0)
        moved_RE = self.one.centred(a_RI * g1_D) @ self.stream.read_DE * through_E
        before_R = a_RI @ b1_D
        constant_R = before_R - moved_RE @ b2_E
        rounding = float(constant_R.norm()) <= _CONSTANT * float(before_R.norm())
        return moved_RE, torch.zeros_like(constant_R) if rounding else constant_R


def _check(one: Family, two: Family) -> None:
    """`NotRunnable` where parts of one family are not parts of the other."""
    if one == two:
        return
    differ = [
        word
        for word, alike in (
            ("gated neurons", one.modules.keys() == two.modules.keys()),
            ("the kind of norm", one.centred == two.centred),
            ("rotary positions", one.rotary == two.rotary),
            ("norms of q and k", one.qk_norms == two.qk_norms),
        )
        if not alike
    ]  # fmt: skip
    if differ:
        raise NotRunnable(what=_WHAT, reason=f"the bases' families differ in {' and '.join(differ)}")


Join = Callable[[Sequence["Brought"]], Adapter]


@dataclass(frozen=True)
class _Reading:
    """Both bases on unlabelled text; each is loaded when something is asked of it, and one at a time."""

    pair: _Pair
    adapter: Adapter
    unlabelled: Sequence[Row]
    report: Report

    @cached_property
    def texts(self) -> list[Shared]:
        """What both read."""
        one, two = self.pair.tokenizers
        if one is None or two is None:
            raise NotRunnable(what=_WHAT, reason="a base without a tokenizer reads no text; leave the inputs out")
        model, tokenizer = load(self.pair.folders[0])
        contexts = context_of(self.pair.one.model), context_of(self.pair.two.model)
        found = shared(one, two, completed(model, tokenizer, self.adapter, self.unlabelled), contexts)
        return with_asked(model, self.adapter, found, self.pair.tokens)

    def streams(self) -> list[list[Tensor]]:
        """The residual streams of either base."""
        names = [side.parts.family.layers for side in (self.pair.one, self.pair.two)]
        folders = self.pair.folders
        return [streams(load(folders[side])[0], self.texts, side, names[side]) for side in (0, 1)]

    def fitted(self, brought: Sequence["Brought"], join: Join) -> tuple[list["Brought"], dict[str, float]]:
        """The same by text, from the bare new base alone or also from that with what came of it, at one of `STRENGTHS`:
        whatever brings the new base nearest to what the adapted old one finds likely. And how near each came."""
        steps = iter(range(1, 1 << 30))

        def told() -> None:
            self.report({"step": next(steps), "texts": len(self.texts)})

        pieces = [one.piece for one in brought]
        known = said(load(self.pair.folders[0])[0], self.texts, pieces, told)
        model, _ = load(self.pair.folders[1])
        first = list(map(_by_text, brought, heard(model, self.texts, pieces, known, told)))
        again = heard(model, self.texts, pieces, known, told, (None, join(first)))
        second = list(map(_by_text, first, again))
        tried = {
            f"{way} × {strength:g}": _times(found, strength)
            for way, found in (("bare", first), ("both", second))
            for strength in STRENGTHS
        }
        losses = surprise(model, self.texts, [join(found) for found in tried.values()])
        told_of = dict(zip(tried, losses, strict=True))
        return tried[min(told_of, key=told_of.__getitem__)], told_of


def _times(brought: Sequence["Brought"], factor: float) -> list["Brought"]:
    return [replace(one, b_OR=one.b_OR * factor) for one in brought]


def _layers(pair: _Pair, reading: _Reading | None) -> list[int | None]:
    """The old layer that each new one was."""
    one, two = pair.one.parts, pair.two.parts
    if one.layers == two.layers:
        return list(range(one.layers))
    like_AB = by_weights(pair.one, pair.two, pair.stream)
    found = monotone(like_AB)
    sure = all(like_AB[a, b] >= SURE for b, a in enumerate(found) if a is not None)
    if reading and not sure:
        found = monotone(by_text(*reading.streams()))
    if all(old is None for old in found):
        raise NotRunnable(what=_WHAT, reason="no layer of the new base is like any of the old one")
    return found


# ── from the weights ─────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Brought:
    """What one patch became in one module of the new base: its factors, the scale in B, and a bias."""

    piece: Piece
    a_RI: Tensor
    b_OR: Tensor
    likeness: float
    bias_O: Tensor | None = None
    """What the old norm's bias brought and the new one's does not, for the module's own bias."""
    shift_O: Tensor | None = None
    """The patch's bias of B."""
    by: Way = "weights"


def _layer(pair: _Pair, patches: Mapping[str, Patch], layers: Sequence[int | None], new: int) -> list[Brought]:
    """Everything that lies in one layer of the new base."""
    one, two = pair.one, pair.two
    # a layer that was nobody's is patched as the one next to it
    old = min((abs(at - new), was) for at, was in enumerate(layers) if was is not None)[1]
    roles_of: dict[tuple[str, str], list[Role]] = {}
    for role in two.parts.family.modules:
        names = one.parts.part(old, role).module, two.parts.part(new, role).module
        if names[0] in patches:
            roles_of.setdefault(names, []).append(role)
    if layers[new] is None:
        return [_new(pair, Piece(*names, patches[names[0]]), new) for names in roles_of]
    if not roles_of:
        return []
    ours = {role: seen(role, one.normal(old, role), pair.stream.old) for role in one.parts.family.modules}
    theirs = {role: seen(role, two.normal(new, role), pair.stream.new) for role in two.parts.family.modules}
    maps = routes(one.parts, two.parts, ours, theirs)
    return [_inside(pair, maps, patches[names[0]], names, roles, (old, new)) for names, roles in roles_of.items()]


def _new(pair: _Pair, piece: Piece, layer: int) -> Brought:
    """As a fresh adapter has it: A uniform in ±1 ⁄ √I, and B = 0."""
    outputs, inputs = sizes(pair.two.model.get_submodule(piece.new))
    chance = torch.Generator().manual_seed(layer)
    a_RI = torch.rand(len(piece.patch.a_RI), inputs, generator=chance, dtype=torch.float64) * 2 - 1
    b_OR = torch.zeros(outputs, len(a_RI), dtype=torch.float64)
    shift_O = None if piece.patch.bias_O is None else torch.zeros(outputs, dtype=torch.float64)
    return Brought(piece, a_RI / inputs**0.5, b_OR, 1.0, shift_O=shift_O, by="new")


def _inside(
    pair: _Pair, maps: Routes, patch: Patch, names: tuple[str, str], roles: Sequence[Role], layers: tuple[int, int]
) -> Brought:
    parts = [(pair.one.parts.part(layers[0], role), pair.two.parts.part(layers[1], role)) for role in roles]
    outputs = sizes(pair.two.model.get_submodule(names[1]))[0]

    def out(x_ON: Tensor) -> Tensor:
        moved = torch.zeros(outputs, x_ON.shape[1], dtype=x_ON.dtype)
        for role, (ours, theirs) in zip(roles, parts, strict=True):
            moved[theirs.rows] = (maps.out[role] if role in READERS else pair.stream.write_ED) @ x_ON[ours.rows]
        return moved

    a_RI, b_OR = patch.a_RI.double(), out(patch.b_OR.double() * patch.scale)
    first, second = parts[0]
    bias_O = None
    if first.norm is None or second.norm is None:
        a_RI = (maps.into[roles[0]].T @ a_RI.T).T
    else:
        a_RI, constant_R = pair.through((first.norm, second.norm), a_RI)
        bias_O = b_OR @ constant_R if constant_R.any() else None
    spaces = [pair.stream.match, *(maps.matches[name] for name in {name for role in roles for name in _SPACES[role]})]
    likeness = min(match.after if match.moved else match.before for match in spaces)
    rows = (_rows([part.rows for part, _ in parts]), _rows([part.rows for _, part in parts]))
    shift_O = None if patch.bias_O is None else out(patch.bias_O.double()[:, None] * patch.scale)[:, 0]
    made = Brought(Piece(names[0], names[1], patch, *rows), a_RI, b_OR, likeness, bias_O, shift_O)
    return made if likeness >= SURE else _sized(pair, made)


def _rows(some: Sequence[Tensor | slice]) -> Tensor | slice:
    return torch.cat([rows for rows in some if isinstance(rows, Tensor)]) if isinstance(some[0], Tensor) else some[0]


def _sized(pair: _Pair, made: Brought) -> Brought:
    """Brought to the size, against its weight, that it had on the old base."""
    piece = made.piece
    w1, w2 = (base.parameter(f"{name}.weight") for base, name in ((pair.one, piece.old), (pair.two, piece.new)))
    now = LowRank(made.a_RI, made.b_OR).norm()
    if w1 is None or w2 is None or not now:
        return made
    factor = piece.patch.update.norm() / float(w1[piece.rows1].norm()) * float(w2[piece.rows2].norm()) / now
    return replace(made, b_OR=made.b_OR * factor, bias_O=None if made.bias_O is None else made.bias_O * factor)


def _ends(pair: _Pair, patches: Mapping[str, Patch]) -> list[Brought]:
    """Patches of the embedding and of the head: S, and the residual stream on the other side."""
    found = []
    old, new = (list(some) for some in zip(*pair.tokens, strict=True))
    likeness = pair.stream.match.after
    for name, patch in patches.items():
        if pair.one.parts.layer_of(name) is not None:
            continue
        module = pair.one.model.get_submodule(name)
        if module is pair.one.model.get_input_embeddings():
            a_RV = torch.zeros(len(patch.a_RI), pair.rows[1], dtype=torch.float64)
            a_RV[:, new] = patch.a_RI.double()[:, old]
            b_ER = pair.stream.write_ED @ (patch.b_OR.double() * patch.scale)
            its = _name_of(pair.two.model, pair.two.model.get_input_embeddings())
            found.append(Brought(Piece(name, its, patch, reads=False), a_RV, b_ER, likeness))
        elif module is pair.one.model.get_output_embeddings():
            norms = pair.one.parts.family.final_norm, pair.two.parts.family.final_norm
            a_RE, constant_R = pair.through(norms, patch.a_RI.double())
            if constant_R.any() and likeness >= SURE:
                raise NotRunnable(what=_WHAT, reason="the head has no bias for what the old norm's bias brought")
            b_VR = torch.zeros(pair.rows[1], patch.b_OR.shape[1], dtype=torch.float64)
            b_VR[new] = patch.b_OR.double()[old] * patch.scale
            its = _name_of(pair.two.model, pair.two.model.get_output_embeddings())
            found.append(Brought(Piece(name, its, patch, writes=False), a_RE, b_VR, likeness))
        else:
            raise NotRunnable(what=_WHAT, reason=f"'{name}' is neither in a layer nor the embedding or the head")
    return found


def _name_of(model: Model, module: nn.Module) -> str:
    found: str = next(name for name, own in model.named_modules() if own is module)
    return found


# ── together ─────────────────────────────────────────────────────────────────


def _by_text(made: Brought, fitted: tuple[Tensor, Tensor]) -> Brought:
    """The same with what text gave; biases stay the new base's own."""
    a_RI, b_OR = fitted
    b_all = made.b_OR
    if made.piece.writes:
        b_all = torch.zeros_like(b_all)
        b_all[made.piece.rows2] = b_OR
    return replace(made, a_RI=a_RI if made.piece.reads else made.a_RI, b_OR=b_all, bias_O=None, by="text")


def _joined(pair: _Pair, adapter: Adapter, brought: Sequence[Brought]) -> Adapter:
    """One patch for every module: pieces beside one another, [B B′]·[A; A′]."""
    by_module: dict[str, list[Brought]] = {}
    for one in brought:
        by_module.setdefault(one.piece.new, []).append(one)
    if not by_module:
        raise NotRunnable(what=_WHAT, reason="nothing of what it patches has a place in the new base")
    patches, biases = {}, {}
    for name, some in by_module.items():
        dtype = some[0].piece.patch.a_RI.dtype
        shifts = [one.shift_O for one in some if one.shift_O is not None]
        patches[name] = Patch(
            torch.cat([one.a_RI for one in some]).to(dtype),
            torch.cat([one.b_OR for one in some], dim=1).to(dtype),
            scale=1.0,
            bias_O=torch.stack(shifts).sum(0).to(dtype) if shifts else None,
            embedding=some[0].piece.patch.embedding,
        )
        constants = [one.bias_O for one in some if one.bias_O is not None]
        if constants:
            bias_O = pair.two.parameter(f"{name}.bias")
            if bias_O is None:
                raise NotRunnable(what=_WHAT, reason=f"'{name}' has no bias for what the old norm's bias brought")
            biases[f"{name}.bias"] = (bias_O + torch.stack(constants).sum(0)).float()
    model = pair.two.model
    ends = sorted({name.rpartition(".")[2] for name in patches})
    targets = ends if set(modules_called(model, ends)) == patches.keys() else sorted(patches)
    turned = any(is_transposed(model.get_submodule(name)) for name in patches)
    config = adapter.config | {"fan_in_fan_out": turned} | ({"bias": "lora_only"} if biases else {})
    return plain(patches, config, targets, biases)


def _told(brought: Sequence[Brought]) -> dict[str, Moved]:
    found: dict[str, Moved] = {}
    for one in brought:
        before = found.get(one.piece.new)
        of = () if one.by == "new" else (*(before.of if before else ()), one.piece.old)
        found[one.piece.new] = Moved(of, one.by, min(one.likeness, before.likeness if before else 1.0))
    return found
