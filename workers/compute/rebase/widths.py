"""Maps between spaces of two sizes, found from the weights alone: rectangular, where `symmetries` has square ones.

residual   x₂ = c·Q·x₁ and x̂₁ = ρ·Qᵀ·x̂₂ behind a norm: E₂ᵀE₁ = UΣVᵀ, Q = UVᵀ, c = ‖E₂‖ ⁄ ‖E₁Qᵀ‖ on the embeddings
           of tokens that both have (rectangular Procrustes, Schönemann 1966), ρ = min(1, √(D ⁄ E)): a stream that was
           padded with zeros is as long as before, but more numbers share its mean square.
neurons    every old one goes to the new one that is most like it (assignment); new ones that are left over and equal
           an old one are its copies: what writes them writes all alike, what reads them takes 1 ⁄ n of each
           (Chen et al. 2015, Net2Net, arXiv:1511.05641). Others are nobody's: zero.
heads      the same. A group of heads takes k and v from the groups that its heads come from, and the mean of several
           (Ainslie et al. 2023, GQA, arXiv:2305.13245).

Parts are compared in the narrower of both streams: what a wide one has beside it, nothing there is read from or written
by. Exact where the new base computes what the old one did. Legend: D residual of the old base, E of the new one,
N anything, H heads, K width of a head, F neurons, M directions; a and b count old and new ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .anatomy import READERS, Anatomy, Role
from .symmetries import Match, alike, basis, likeness, mean, scaled, signless, spans, unit

_COPY = 0.99
"""How like an old part a new one must be to be its copy."""


@dataclass(frozen=True)
class Stream:
    """The residual stream's maps: where it is written, and where it is read behind a norm."""

    write_ED: Tensor
    read_DE: Tensor
    match: Match

    @cached_property
    def old(self) -> tuple[Tensor, Tensor]:
        """From the narrower stream to where the old base writes (transposed) and to what it reads."""
        if self._is_wider:
            return (torch.eye(self.write_ED.shape[1], dtype=torch.float64),) * 2
        return self.write_ED.T, self.read_DE

    @cached_property
    def new(self) -> tuple[Tensor, Tensor]:
        """The same of the new base."""
        if self._is_wider:
            return torch.linalg.pinv(self.write_ED).T, torch.linalg.pinv(self.read_DE)
        return (torch.eye(len(self.write_ED), dtype=torch.float64),) * 2

    @property
    def _is_wider(self) -> bool:
        return self.write_ED.shape[0] >= self.write_ED.shape[1]


def seen(role: Role, x: Tensor, through: tuple[Tensor, Tensor]) -> Tensor:
    """A part in normal form as the narrower stream has it."""
    written, read = through
    return torch.cat([x[:, :-1] @ read, x[:, -1:]], 1) if role in READERS else written.T @ x


def stream(e1_ND: Tensor, e2_NE: Tensor, *, centred: bool = False) -> Stream:
    """From the embeddings of the same tokens; ``centred``: the all-ones direction goes to the all-ones direction."""
    cross_ED = e2_NE.T @ e1_ND
    if centred:
        cross_ED = cross_ED + torch.full_like(cross_ED, float(cross_ED.norm()) / sqrt(cross_ED.numel()))
    u, _, vt = torch.linalg.svd(cross_ED, full_matrices=False)
    q_ED = u @ vt
    turned_NE = e1_ND @ q_ED.T
    both = min(cross_ED.shape)
    before = float((e1_ND[:, :both] * e2_NE[:, :both]).sum() / (e1_ND.norm() * e2_NE.norm()))
    wider = min(1.0, sqrt(cross_ED.shape[1] / cross_ED.shape[0]))
    return Stream(
        q_ED * (e2_NE.norm() / turned_NE.norm()), q_ED.T * wider, Match(before, likeness(turned_NE, e2_NE), moved=True)
    )


@dataclass(frozen=True)
class Routes:
    """The maps of one layer, sparse: new × old for what a part writes, old × new for what o and down read."""

    out: Mapping[Role, Tensor]
    into: Mapping[Role, Tensor]
    matches: Mapping[str, Match]


def routes(one: Anatomy, two: Anatomy, old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]) -> Routes:
    """From the layer's parts as the narrower stream has them."""
    out, into, found = _attention(one, two, old, new)
    gate, up, down, found["neurons"] = _neurons(old, new)
    return Routes(out | {"gate": gate, "up": up}, into | {"down": down}, found)


def _attention(
    one: Anatomy, two: Anatomy, old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]
) -> tuple[dict[Role, Tensor], dict[Role, Tensor], dict[str, Match]]:
    (q1, k1, v1, o1), (q2, k2, v2, o2) = (_by_head(parts, side) for parts, side in ((one, old), (two, new)))
    planes = one.width == two.width and torch.equal(one.planes_P2, two.planes_P2)

    def turning(x1: Tensor, x2: Tensor) -> Tensor:
        return alike(two, x1, x2) if planes else spans(x1, x2)

    shared_GG = (turning(k1, k2) + spans(v1, v2)) / 2
    shared_HH = shared_GG.repeat_interleave(one.heads, 0).repeat_interleave(two.heads, 1)
    like_HH = (turning(q1, q2) + spans(o1, o2)) / 4 + shared_HH / 2
    of_H = _copies(like_HH)
    share_H = _share(of_H, len(q1))
    blocks: dict[str, list[tuple[int, int, Tensor]]] = {role: [] for role in "qkvo"}
    found: dict[str, list[Match]] = {"qk": [], "vo": []}
    for b in range(two.groups):
        mine_H = torch.arange(b * two.heads, (b + 1) * two.heads)
        sources = sorted({int(a) // one.heads for a in of_H[mine_H] if a >= 0})
        for a in sources:
            mates_H = mine_H[(of_H[mine_H] >= 0) & (of_H[mine_H] // one.heads == a)]
            theirs_H = of_H[mates_H]
            q_pair = (_together(q1[theirs_H]), _together(q2[mates_H]))
            o_pair = (_together(o1[theirs_H]), _together(o2[mates_H] / share_H[mates_H, None, None]))
            if one.width == two.width:
                qk_KK, turned = basis(two, (*q_pair, k1[a], k2[b]), turning=planes or not two.family.rotary)
                vo_KK, mixed = basis(two, (v1[a], v2[b], *o_pair), turning=False)
            else:
                qk_KK, turned = _planes(one, two), Match(0.0, 0.0, moved=True)
                vo_KK, mixed = _isometry(v1[a], v2[b], *o_pair)
            found["qk"].append(turned)
            found["vo"].append(mixed)
            for mate, its in zip(mates_H.tolist(), theirs_H.tolist(), strict=True):
                blocks["q"].append((mate, its, qk_KK))
                blocks["o"].append((its, mate, torch.linalg.pinv(vo_KK) * share_H[mate]))
            blocks["k"].append((b, a, torch.linalg.pinv(qk_KK).T / len(sources)))
            blocks["v"].append((b, a, vo_KK / len(sources)))
    maps = {
        role: _sparse(blocks[role], into, of)
        for role, into, of in (
            ("q", len(q2) * two.width, len(q1) * one.width), ("k", len(k2) * two.width, len(k1) * one.width),
            ("v", len(v2) * two.width, len(v1) * one.width), ("o", len(o1) * one.width, len(o2) * two.width),
        )
    }  # fmt: skip
    matches = {"heads": _found(like_HH, of_H)} | {name: mean(some) for name, some in found.items()}
    return {"q": maps["q"], "k": maps["k"], "v": maps["v"]}, {"o": maps["o"]}, matches


def _neurons(old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor, Tensor, Match]:
    """The maps of gate, up and down."""
    (gate1, *pair1), (gate2, *pair2) = ([unit(side["gate"]), *(unit(x) for x in scaled(side))] for side in (old, new))
    paired = [x1 @ x2.T for x1, x2 in zip(pair1, pair2, strict=True)]
    like_FF = (gate1 @ gate2.T + signless(paired)) / (1 + len(paired))
    of_F = _copies(like_FF)
    new_F = (of_F >= 0).nonzero()[:, 0]
    old_F, share_F = of_F[new_F], _share(of_F, len(gate1))[new_F]
    scale_F = torch.ones_like(share_F)
    if "up" in old:
        u1, u2 = old["up"][old_F], new["up"][new_F]
        size_F = u2.norm(dim=1) / u1.norm(dim=1)
        scale_F = torch.where((u1 * u2).sum(1) < 0, -size_F, size_F)
        sound_F = scale_F.isfinite() & (scale_F != 0)
        scale_F, share_F = torch.where(sound_F, scale_F, 1.0), torch.where(sound_F, share_F, 0.0)
    shape = (len(of_F), len(gate1))
    gate, up = (_entries(new_F, old_F, value_F, shape) for value_F in (torch.ones_like(share_F), scale_F))
    return gate, up, _entries(old_F, new_F, share_F / scale_F, shape[::-1]), _found(like_FF, of_F)


# ── which is which ───────────────────────────────────────────────────────────


def _copies(like_AB: Tensor) -> Tensor:
    """The old part that every new one is; −1 for those that are none."""
    some, theirs = linear_sum_assignment(-like_AB.numpy())
    of_B = torch.full((like_AB.shape[1],), -1)
    of_B[torch.from_numpy(theirs)] = torch.from_numpy(some)
    best_B, first_B = like_AB.max(0)
    return torch.where((of_B < 0) & (best_B > _COPY), first_B, of_B)


def _share(of_B: Tensor, many: int) -> Tensor:
    """1 ⁄ n for each of n copies."""
    count_A = torch.bincount(of_B[of_B >= 0], minlength=many).clamp_min(1)
    return 1 / count_A.double()[of_B.clamp_min(0)]


def _found(like_AB: Tensor, of_B: Tensor) -> Match:
    there_B = (of_B >= 0).nonzero()[:, 0]
    before = float(like_AB.diagonal().mean())
    return Match(before, float(like_AB[of_B[there_B], there_B].mean()), moved=True)


# ── heads ────────────────────────────────────────────────────────────────────


def _by_head(parts: Anatomy, side: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and the columns of o by head, k and v by group: each H × K × N."""
    k = parts.width
    return (
        side["q"].reshape(-1, k, side["q"].shape[1]), side["k"].reshape(-1, k, side["k"].shape[1]),
        side["v"].reshape(-1, k, side["v"].shape[1]), side["o"].T.reshape(-1, k, side["o"].shape[0]),
    )  # fmt: skip


def _together(x_HKN: Tensor) -> Tensor:
    return x_HKN.transpose(0, 1).flatten(1)


def _planes(one: Anatomy, two: Anatomy) -> Tensor:
    """Between heads of two widths: each new plane is the old one that turns at the nearest speed."""
    m_KK = torch.zeros(two.width, one.width, dtype=torch.float64)
    first, second = len(one.planes_P2), len(two.planes_P2)
    for place, new in enumerate(two.planes_P2.tolist()):
        near = one.planes_P2[min(first - 1, round(place * first / second))].tolist() if first else []
        for b, a in zip(new, near, strict=False):
            m_KK[b, a] = 1
    for b, a in zip(two.free_N.tolist(), one.free_N.tolist(), strict=False):
        m_KK[b, a] = 1
    return m_KK


def _isometry(v1: Tensor, v2: Tensor, o1: Tensor, o2: Tensor) -> tuple[Tensor, Match]:
    """Between heads of two widths: the isometry that brings v and o together."""
    u, _, vt = torch.linalg.svd(v2 @ v1.T + o2 @ o1.T, full_matrices=False)
    m_KK = u @ vt
    return m_KK, Match(0.0, (likeness(m_KK @ v1, v2) + likeness(m_KK @ o1, o2)) / 2, moved=True)


# ── sparse maps ──────────────────────────────────────────────────────────────


def _entries(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=True)


def _sparse(blocks: Iterable[tuple[int, int, Tensor]], rows: int, columns: int) -> Tensor:
    places, values = [torch.zeros(2, 0, dtype=torch.long)], [torch.zeros(0, dtype=torch.float64)]
    for b, a, m in blocks:
        i, j = (x.reshape(-1) for x in torch.meshgrid(*(torch.arange(n) for n in m.shape), indexing="ij"))
        places.append(torch.stack([b * m.shape[0] + i, a * m.shape[1] + j]))
        values.append(m.reshape(-1))
    return torch.sparse_coo_tensor(torch.cat(places, 1), torch.cat(values), (rows, columns), check_invariants=True)
