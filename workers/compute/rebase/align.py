"""Tier 1: symmetries between the bases are undone before an adapter is carried; exact, and without data (docs: rebase).

    B′ = M_out·B        A′ = A·M_in⁻¹        M: maps from the old base's spaces to the new one's (see `symmetries`)

What reads the residual stream reads it through a norm x ↦ g·x̂ + b, whose gains belong to either base:

    A′ = A·diag(g₁)·Qᵀ·diag(1⁄g₂)        and a bias of B′·(A·b₁ − A′·b₂) where norms have biases

Legend: D residual, V vocabulary, R rank, I inputs, O outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from registry.core.errors import NotRunnable

from ..finetune import Report, silent
from ..lora import Adapter, Patch, fitted
from ..pool import a_core_each
from ..shards import read_ahead
from .anatomy import ATTENTION, Anatomy, Base, Role
from .symmetries import Maps, Match, Sides, all_stays, layer_maps, likeness, rotation, taken
from .tokens import shared_tokens, tokenizer_of

_TOKENS = 16384
"""Tokens that the rotation is found from, at most; spread over the vocabulary."""
_WIDE, _CHANNELS, _OUTPUTS = 1024, 512, 128
"""Residual streams above the first are compared on so many of their channels, and what gains do on so many outputs,
where these can tell."""
_AHEAD = 4 << 30
"""Bytes that are read from the disk before they are needed, about."""
_FLAT = 1e-6
"""A gain below this share of the largest lets nothing through, and nothing is put through it."""


@dataclass(frozen=True)
class Aligned:
    """The adapter in the new base's coordinates, and what was found by space (``residual``, ``layers.0.neurons`` …)."""

    adapter: Adapter
    matches: dict[str, Match]


def align(adapter: Adapter, old: Path, base: Path, report: Report = silent) -> Aligned:
    """``adapter``, made on the base in folder ``old``, in the coordinates of the base in folder ``base``.

    Both are read layer by layer. `NotRunnable` for families whose symmetries are not known, for bases of other sizes,
    and for what an adapter has beside B·A: lengths and whole parameters belong to the old base's own rows.
    """
    one, two = Base.at(old), Base.at(base)
    patched, _ = fitted(one.model, adapter)
    _check(adapter, one.parts, two.parts)
    rows = tuple(side.model.get_input_embeddings().weight.shape[0] for side in (one, two))
    tokens = shared_tokens(tokenizer_of(old), tokenizer_of(base), rows)
    if not tokens:
        raise NotRunnable(what="Aligning", reason="the tokenizers of the two bases share no token")
    patches: dict[str, Patch] = {}
    biases: dict[str, Tensor] = {}
    by_layer: dict[int | None, dict[str, Patch]] = {}
    for name, _, patch in patched:
        by_layer.setdefault(one.parts.layer_of(name), {})[name] = patch
    ends = by_layer.pop(None, {})
    steps = [[base.table(base.model.get_input_embeddings()) for base in (one, two)]]
    steps += [[*one.layer(layer), *two.layer(layer)] for layer in by_layer if layer is not None]
    largest = max(sum(tensor.size for tensor in step) for step in steps)
    with read_ahead(steps, max(1, _AHEAD // max(1, largest))) as done:
        bases, found = _streams(one, two, tokens)
        done()
        matches = {"residual": found}
        for step, (layer, (moved, here)) in enumerate(_each(bases, by_layer), start=1):
            done()
            matches |= {f"layers.{layer}.{space}": match for space, match in here.items()}
            for name, (patch, bias_O) in moved.items():
                patches[name] = patch
                biases |= {} if bias_O is None else {f"{name}.bias": bias_O}
            report({"step": step, "steps": len(by_layer)})
    patches |= {name: _end(bases, name, patch, tokens) for name, patch in ends.items()}
    config = adapter.config | ({"bias": "lora_only"} if biases else {})
    return Aligned(Adapter(patches, config, biases), matches)


def _streams(one: Base, two: Base, tokens: Sequence[tuple[int, int]]) -> tuple["_Bases", Match]:
    """Both bases with the map of their residual streams, as the embeddings of tokens say."""
    some = tokens[:: -(-len(tokens) // _TOKENS)]
    e1_ND, e2_ND = one.embeddings([a for a, _ in some]), two.embeddings([b for _, b in some])
    wide = one.parts.residual > _WIDE
    q_DD, found = rotation(e1_ND, e2_ND, centred=one.parts.family.centred, wide=wide)
    return _Bases(one, two, q_DD), found


_Layer = tuple[dict[str, tuple[Patch, Tensor | None]], dict[str, Match]]
"""Its patches and the biases that came to them, and its matches."""


def _each(bases: "_Bases", by_layer: Mapping[int | None, Mapping[str, Patch]]) -> Iterator[tuple[int, _Layer]]:
    """The layers in their order; where little of each is held at a time, two at once."""

    def one(layer: int) -> _Layer:
        maps, found = bases.maps(layer)
        patches = by_layer[layer].items()
        return {name: _inside(bases, maps, layer, name, patch) for name, patch in patches}, found

    layers = [layer for layer in by_layer if layer is not None]
    if bases.residual_DD is not None or bases.old.parts.family.centred:
        yield from ((layer, one(layer)) for layer in layers)
        return
    with a_core_each(2) as pool:
        yield from zip(layers, pool.map(one, layers), strict=True)


def only_factors(adapter: Adapter, what: str) -> None:
    """`NotRunnable` for what an adapter has beside B·A: it belongs to the old base's own rows."""
    if adapter.replaced:
        raise NotRunnable(what=what, reason=f"the adapter replaces '{min(adapter.replaced)}' as a whole")
    lengths = sorted(name for name, patch in adapter.patches.items() if patch.magnitude_O is not None)
    if lengths:
        raise NotRunnable(what=what, reason=f"'{lengths[0]}' has DoRA, whose lengths are of the old base's rows")


def _check(adapter: Adapter, one: Anatomy, two: Anatomy) -> None:
    only_factors(adapter, "Aligning")
    differ = [f"{key} {value} and {two.sizes[key]}" for key, value in one.sizes.items() if value != two.sizes[key]]
    if one.family != two.family or differ:
        raise NotRunnable(
            what="Aligning", reason=f"the bases are not of one shape: {', '.join(differ) or 'two families'}"
        )


@dataclass(frozen=True)
class _Bases:
    """Two bases, and the map of their residual streams."""

    old: Base
    new: Base
    residual_DD: Tensor | None
    """None: their streams are one."""

    def maps(self, layer: int) -> tuple[Maps, dict[str, Match]]:
        """The maps of a layer, where streams are wide by some of their channels as far as these suffice."""
        parts, roles = self.old.parts, list(self.old.parts.family.modules)
        wide = parts.residual > _WIDE
        channels = _some(parts.residual, _CHANNELS, layer) if wide else None
        if wide and self.residual_DD is None:
            found = all_stays(parts, self._sides(layer, roles, channels, torch.float32))
            if found is not None:
                return Maps.none(parts), found
        whole = partial(self._sides, layer, ATTENTION) if wide else None
        return layer_maps(parts, self._sides(layer, roles, channels), self.residual_DD, whole)

    def _sides(
        self, layer: int, roles: Sequence[Role], channels: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Sides:
        """Parts of both bases in normal form, in the new one's coordinates of the residual stream."""
        new = {role: self.new.normal(layer, role, channels, dtype) for role in roles}
        return {role: self._turned(layer, role, channels, dtype) for role in roles}, new

    def _turned(self, layer: int, role: Role, channels: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.residual_DD is None:
            return self.old.normal(layer, role, channels, dtype)
        return self.old.turned(layer, role, self.residual_DD if channels is None else self.residual_DD[channels])

    def pairs(self, layer: int, roles: Sequence[Role], maps: Maps) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights of both bases, the old ones with their outputs mapped; of wide ones that stay, some outputs."""
        for role in roles:
            outputs = None
            if self.old.parts.residual > _WIDE and maps.keeps(role):
                outputs = _some(self.old.parts.outputs[role], _OUTPUTS, layer)
            one, two = (base.weight(layer, role, outputs) for base in (self.old, self.new))
            yield (maps.out(role, one) if outputs is None else one), two

    def through(
        self, norm: str, a_RI: Tensor, pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    ) -> tuple[Tensor, Tensor]:
        """A′ for what reads through ``norm``, and A·b₁ − A′·b₂.

        ``pairs`` are weights that read through it, old ones with their outputs mapped and new ones: where the streams
        are one, gains are only folded when that brings these together.
        """
        (g1_D, b1_D), (g2_D, b2_D) = self.old.norm(norm), self.new.norm(norm)
        through_D = torch.where(g2_D.abs() > _FLAT * g2_D.abs().max(), 1 / g2_D, 0.0)

        def folded(x_ND: Tensor) -> Tensor:
            through_ND = self.old.centred(x_ND * g1_D)
            return (through_ND if self.residual_DD is None else through_ND @ self.residual_DD.T) * through_D

        def gains() -> Match:
            one, two = (torch.cat(side) for side in zip(*pairs(), strict=True))
            to_D = [self.new.centred(side * g2_D) for side in (one, folded(one), two)]
            return taken(likeness(to_D[0], to_D[2]), likeness(to_D[1], to_D[2]))

        if self.residual_DD is None and not gains().moved:
            return a_RI, torch.zeros(len(a_RI), dtype=a_RI.dtype)
        moved_RI = folded(a_RI)
        return moved_RI, a_RI @ b1_D - moved_RI @ b2_D


def _some(of: int, many: int, seed: int) -> Tensor:
    """So many places in their order."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:many].sort().values


def _inside(bases: _Bases, maps: Maps, layer: int, name: str, patch: Patch) -> tuple[Patch, Tensor | None]:
    """A patch in a layer; and its module's new bias, where what the old norm's bias brought does not come by itself."""
    parts = bases.old.parts
    roles = parts.roles_of(layer, name)
    if not roles:
        raise NotRunnable(what="Aligning", reason=f"'{name}' is no part of a layer whose symmetries are known")

    def out(x_ON: Tensor) -> Tensor:
        moved_ON = x_ON.clone()
        for role in roles:
            rows = parts.part(layer, role).rows
            moved_ON[rows] = maps.out(role, x_ON[rows])
        return moved_ON

    a_RI, b_OR = patch.a_RI.double(), out(patch.b_OR.double())
    extra_O = None if patch.bias_O is None else out(patch.bias_O.double()[:, None])[:, 0].to(patch.bias_O.dtype)
    norm = parts.part(layer, roles[0]).norm
    constant_O = None
    if norm is None:
        a_RI = maps.into(roles[0], a_RI)
    else:
        a_RI, constant_R = bases.through(norm, a_RI, lambda: bases.pairs(layer, roles, maps))
        constant_O = patch.scale * (b_OR @ constant_R)
    moved = replace(patch, a_RI=a_RI.to(patch.a_RI.dtype), b_OR=b_OR.to(patch.b_OR.dtype), bias_O=extra_O)
    if constant_O is None or not constant_O.any():
        return moved, None
    bias_O = bases.new.parameter(f"{name}.bias")
    if bias_O is None:
        raise NotRunnable(what="Aligning", reason=f"'{name}' has no bias to take up what the old norm's bias brought")
    return moved, (bias_O + constant_O).float()


def _end(bases: _Bases, name: str, patch: Patch, tokens: Sequence[tuple[int, int]]) -> Patch:
    """A patch of the embedding or the head: rows of the vocabulary go where their tokens are."""
    old, new = (list(pair) for pair in zip(*tokens, strict=True))
    module = bases.old.model.get_submodule(name)
    size = bases.new.model.get_submodule(name).weight.shape[0]
    if module is bases.old.model.get_input_embeddings():
        a_RV = torch.zeros(patch.a_RI.shape[0], size, dtype=patch.a_RI.dtype)
        a_RV[:, new] = patch.a_RI[:, old]
        if bases.residual_DD is None:
            return replace(patch, a_RI=a_RV)
        return replace(patch, a_RI=a_RV, b_OR=(bases.residual_DD @ patch.b_OR.double()).to(patch.b_OR.dtype))
    if module is not bases.old.model.get_output_embeddings():
        raise NotRunnable(what="Aligning", reason=f"'{name}' is neither in a layer nor the embedding or the head")
    heads = bases.old.rows(module, old[:_TOKENS]), bases.new.rows(bases.new.model.get_submodule(name), new[:_TOKENS])
    a_RI, constant_R = bases.through(bases.old.parts.family.final_norm, patch.a_RI.double(), lambda: [heads])
    if constant_R.any():
        raise NotRunnable(what="Aligning", reason="the head has no bias to take up what the old norm's bias brought")
    b_VR = torch.zeros(size, patch.b_OR.shape[1], dtype=patch.b_OR.dtype)
    b_VR[new] = patch.b_OR[old]
    return replace(patch, a_RI=a_RI.to(patch.a_RI.dtype), b_OR=b_VR)
