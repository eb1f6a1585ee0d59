"""Which layer of the old base every layer of the new one was: monotone, by how like they are.

    max Σ likeness(a, b) over pairs that cross nowhere        (dynamic programming, Needleman and Wunsch 1970)

A layer that is nobody's stays without an update (B = 0). From weights, layers are compared by what no choice of basis
in them changes, seen from the residual stream: Σ_h O_h·V_h, and Gᵀ·diag(‖u_f‖²·‖d_f‖²)·G of gate, up and down, both
between random directions. A block that adds nothing, as those do that are inserted to be trained on, is like none.
On text, by linear CKA of what a layer gives and of what it adds (Kornblith et al. 2019, arXiv:1905.00414):

    CKA(X, Y) = ‖X₁ᵀX₂‖² ⁄ (‖X₁ᵀX₁‖·‖X₂ᵀX₂‖), columns centred

Legend: A old layers, B new layers, N positions, M directions.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .anatomy import Base
from .symmetries import likeness
from .widths import Stream

_DIRECTIONS = 96
_NOTHING = 1e-6
"""A layer adds nothing where its part is below this share of the largest."""


def monotone(like_AB: Tensor) -> list[int | None]:
    """For every new layer the old one it was, or None."""
    old, new = like_AB.shape
    best = torch.zeros(old + 1, new + 1, dtype=torch.float64)
    for a in range(1, old + 1):
        for b in range(1, new + 1):
            best[a, b] = max(best[a - 1, b], best[a, b - 1], best[a - 1, b - 1] + like_AB[a - 1, b - 1].clamp_min(0))
    of: list[int | None] = [None] * new
    a, b = old, new
    while a and b:
        if best[a, b] == best[a - 1, b]:
            a -= 1
        elif best[a, b] == best[a, b - 1]:
            b -= 1
        else:
            a, b = a - 1, b - 1
            of[b] = a
    return of


def by_weights(one: Base, two: Base, stream: Stream) -> Tensor:
    """Old layer × new layer."""
    chance = torch.Generator().manual_seed(0)
    some = torch.randn(min(stream.write_ED.shape), _DIRECTIONS, generator=chance, dtype=torch.float64)
    first, second = (
        [_seen(base, layer, *(through @ some for through in views)) for layer in range(base.parts.layers)]
        for base, views in ((one, stream.old), (two, stream.new))
    )
    like = torch.zeros(len(first), len(second), dtype=torch.float64)
    for kind in (0, 1):
        floors = [_NOTHING * max(float(side[kind].norm()) for side in sides) for sides in (first, second)]
        for a, mine in enumerate(first):
            for b, theirs in enumerate(second):
                if mine[kind].norm() > floors[0] and theirs[kind].norm() > floors[1]:
                    like[a, b] += likeness(mine[kind], theirs[kind]) / 2
    return like


def _seen(base: Base, layer: int, written_DM: Tensor, read_DM: Tensor) -> tuple[Tensor, Tensor]:
    """What attention and what the feed-forward part of a layer do between some directions."""
    parts = base.parts
    v, o, gate, down = (base.normal(layer, role) for role in ("v", "o", "gate", "down"))
    up = base.normal(layer, "up")[:, :-1] if "up" in parts.family.modules else torch.ones(len(gate), 1)
    v_HKM = (v[:, :-1] @ read_DM).reshape(parts.groups, parts.width, -1).repeat_interleave(parts.heads, 0)
    attention_MM = written_DM.T @ o @ v_HKM.flatten(0, 1)
    gate_FM = gate[:, :-1] @ read_DM
    weight_F = up.double().square().sum(1) * down.square().sum(0)
    return attention_MM, gate_FM.T @ (gate_FM * weight_F[:, None])


def by_text(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Old layer × new layer: CKA of what goes in and out of each, ``first`` and ``second`` being the stream before the
    first layer and behind every one, at the same positions."""
    sides = [
        (_grams(list(side[1:])), _grams([after - before for before, after in pairwise(side)]))
        for side in (first, second)
    ]
    return torch.stack([one @ two.T for one, two in zip(*sides, strict=True)]).mean(0)


def _grams(some: Sequence[Tensor]) -> Tensor:
    """XXᵀ of each with its columns centred, as a row of length 1."""
    rows = []
    for x_ND in some:
        x_ND = x_ND.double() - x_ND.double().mean(0)
        gram_NN = (x_ND @ x_ND.T).reshape(-1)
        rows.append(gram_NN / gram_NN.norm().clamp_min(1e-30))
    return torch.stack(rows)
