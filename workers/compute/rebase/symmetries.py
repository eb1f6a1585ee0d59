"""Maps between two bases that compute the same in other coordinates: found from their weights alone (docs: rebase).

    W₂ = M_out·W₁·M_in⁻¹

residual   x₂ = Q·x₁, Q = argmin ‖E₁Qᵀ − E₂‖ over rotations, E the embeddings of tokens that both have (Procrustes).
dual pairs x₂ = M·x₁ and y₂ = M⁻ᵀ·y₁, where only xᵀy counts: q and k, v and o, rows of up and columns of down.
           argmin ‖M·x₁ − x₂‖² + ‖Mᵀ·y₂ − y₁‖² is linear:  M·x₁x₁ᵀ + y₂y₂ᵀ·M = x₂x₁ᵀ + y₂y₁ᵀ  (Sylvester);
           on a rotary plane M is a complex number, on a neuron a real one.
order      neurons by assignment on all their weights, heads and groups on what no M changes.

A map is taken where it leaves less than half of what does not match as the bases lie; else it is the identity: between
bases that moved apart by training alone it would only follow the noise. Legend: D residual, N anything, G groups,
H heads of a group, K width of a head, P rotary planes, F neurons.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .anatomy import Anatomy, Role

_TAKEN = 0.5
"""A map is taken when it leaves less than this share of the misfit."""
_EQUAL = 1e-6
"""A misfit that is rounding."""
_SOUND = 1e6
"""A basis of a higher condition is none."""
_SAMPLE = 256
"""Neurons, or channels, that are asked first whether they are where they were."""
_STAYS = 0.9
"""The share of them that must be most like themselves."""
_ASSIGNED = 4096
"""Neurons that are assigned all at once, at most."""
_PASSES = 8
_BLOCK = 1024
"""Old neurons that are held against all new ones at once, where there are more."""


@dataclass(frozen=True)
class Match:
    """How like two bases are in one space, 1 being equal: as they lie, and by the map that was found."""

    before: float
    after: float
    moved: bool
    """Whether the map was taken."""


@dataclass(frozen=True)
class Maps:
    """The maps of one layer. New group g was ``groups_G[g]``, its head h was ``heads_GH[g, h]`` of that group."""

    residual_DD: Tensor | None
    """None: the stream did not turn."""
    groups_G: Tensor
    heads_GH: Tensor
    qk_GKK: Tensor
    vo_GKK: Tensor
    neurons_F: Tensor
    scale_F: Tensor

    @classmethod
    def none(cls, parts: Anatomy) -> Self:
        """All stays as it is."""
        groups_G, heads_H = torch.arange(parts.groups), torch.arange(parts.heads)
        same_GKK = torch.eye(parts.width, dtype=torch.float64).expand(parts.groups, -1, -1)
        everyone_F = torch.arange(parts.neurons)
        heads_GH, ones_F = heads_H.expand(parts.groups, -1), torch.ones(parts.neurons, dtype=torch.float64)
        return cls(None, groups_G, heads_GH, same_GKK, same_GKK, everyone_F, ones_F)

    def out(self, role: Role, x_ON: Tensor) -> Tensor:
        """M_out·x, for what a part writes."""
        groups, heads, width = *self.heads_GH.shape, self.qk_GKK.shape[1]
        moved: Tensor
        match role:
            case "q":
                x_GHKN = x_ON.reshape(groups, heads, width, -1)[self.groups_G[:, None], self.heads_GH]
                moved = self.qk_GKK[:, None] @ x_GHKN
            case "k":
                x_GKN = x_ON.reshape(groups, width, -1)[self.groups_G]
                moved = torch.linalg.inv(self.qk_GKK).mT @ x_GKN
            case "v":
                moved = self.vo_GKK @ x_ON.reshape(groups, width, -1)[self.groups_G]
            case "gate":
                moved = x_ON[self.neurons_F]
            case "up":
                moved = x_ON[self.neurons_F] * self.scale_F[:, None]
            case "o" | "down":
                moved = x_ON if self.residual_DD is None else self.residual_DD @ x_ON
        return moved.reshape(x_ON.shape)

    def keeps(self, role: Role) -> bool:
        """Whether what a reader of the stream writes stays as it is."""
        heads = _is_order(self.groups_G) and all(map(_is_order, self.heads_GH))
        match role:
            case "q" | "k":
                return heads and _is_identity(self.qk_GKK)
            case "v":
                return heads and _is_identity(self.vo_GKK)
            case "gate":
                return _is_order(self.neurons_F)
            case "up":
                return _is_order(self.neurons_F) and bool((self.scale_F == 1).all())
        return False

    def into(self, role: Role, a_RI: Tensor) -> Tensor:
        """A·M_in⁻¹, for what o and down read; what reads through a norm needs its gains as well."""
        if role == "down":
            return a_RI[:, self.neurons_F] / self.scale_F
        groups, heads, width = *self.heads_GH.shape, self.vo_GKK.shape[1]
        a_RGHK = a_RI.reshape(-1, groups, heads, width)[:, self.groups_G[:, None], self.heads_GH]
        moved: Tensor = a_RGHK @ torch.linalg.inv(self.vo_GKK)
        return moved.reshape(a_RI.shape)


def _is_order(places_N: Tensor) -> bool:
    return torch.equal(places_N, torch.arange(len(places_N)))


def _is_identity(m_GKK: Tensor) -> bool:
    return torch.equal(m_GKK, torch.eye(m_GKK.shape[1], dtype=m_GKK.dtype).expand_as(m_GKK))


def taken(before: float, after: float) -> Match:
    """A map that brings likeness from ``before`` to ``after``, and whether that is enough."""
    misfit = 1 - before
    return Match(before, after, moved=misfit > _EQUAL and 1 - after < _TAKEN * misfit)


def likeness(x: Tensor, y: Tensor) -> float:
    """Cosine of two tensors."""
    one, two = (float(torch.linalg.vector_norm(side, dtype=torch.float64)) for side in (x, y))
    return float((x * y).sum(dtype=torch.float64)) / (one * two) if one and two else 1.0


def rotation(
    e1_ND: Tensor, e2_ND: Tensor, *, centred: bool = False, wide: bool = False
) -> tuple[Tensor | None, Match]:
    """Q of the residual stream; None where none is taken.

    ``centred``: of those that keep the all-ones direction, along which E has nothing. Of a ``wide`` stream it is asked
    first whether there can be any.
    """
    before = likeness(e1_ND, e2_ND)
    if wide and not _may_turn(e1_ND, e2_ND):
        return None, Match(before, before, moved=False)
    cross_DD = e2_ND.T @ e1_ND
    if centred:
        cross_DD = cross_DD + torch.full_like(cross_DD, float(cross_DD.norm()) / len(cross_DD))
    u, _, vt = torch.linalg.svd(cross_DD)
    q_DD = u @ vt
    match = taken(before, likeness(e1_ND @ q_DD.T, e2_ND))
    return (q_DD if match.moved else None), match


def _may_turn(e1_ND: Tensor, e2_ND: Tensor) -> bool:
    """Whether a turn may explain what the streams differ by.

    Looked at are the channels that differ most. No rotation brings them nearer than the best linear map of all
    channels, by least squares; where that leaves as much of the misfit as a map may leave to be taken, none is.
    """
    misfit_D = (e2_ND - e1_ND).square().sum(0)
    most_N = misfit_D.topk(min(_SAMPLE, len(misfit_D))).indices
    x_ND, y_NN = e1_ND.float(), e2_ND[:, most_N].float()
    factor_DD, failed = torch.linalg.cholesky_ex(_gram(x_ND))
    if int(failed):
        return True
    left = (y_NN - x_ND @ torch.cholesky_solve(x_ND.T @ y_NN, factor_DD)).square().sum()
    return float(left) < _TAKEN * float(misfit_D[most_N].sum())


def _gram(x_ND: Tensor) -> Tensor:
    """XᵀX, of which what lies above the diagonal is not made but where blocks touch it."""
    gram_DD = x_ND.new_zeros(x_ND.shape[1], x_ND.shape[1])
    for some in torch.arange(x_ND.shape[1]).split(_BLOCK // 2):
        first, last = int(some[0]), int(some[-1]) + 1
        gram_DD[first:last, :last] = x_ND[:, first:last].T @ x_ND[:, :last]
    return gram_DD


def _some(many: int) -> Tensor:
    return torch.randperm(many, generator=torch.Generator().manual_seed(0))[:_SAMPLE]


def _stays(like_NN: Tensor) -> bool:
    """Whether nearly all are most like themselves."""
    return float((like_NN.argmax(0) == torch.arange(len(like_NN))).double().mean()) > _STAYS


Sides = tuple[Mapping[Role, Tensor], Mapping[Role, Tensor]]
"""A layer's parts in normal form, of both bases, the old ones turned by Q already."""


def all_stays(parts: Anatomy, some: Sides) -> dict[str, Match] | None:
    """Matches by space where nothing moved in a layer, as ``some`` channels in any precision tell; else None."""
    _, found = _attention(parts, *some)
    if any(match.moved for match in found.values()):
        return None
    if (neurons := _in_their_places(*some)) is None:
        return None
    _, scales = _scales(*some, torch.arange(parts.neurons))
    return None if scales.moved else found | {"neurons": neurons, "scales": scales}


def layer_maps(
    parts: Anatomy, some: Sides, residual_DD: Tensor | None, whole_attention: Callable[[], Sides] | None = None
) -> tuple[Maps, dict[str, Match]]:
    """The maps of a layer, and matches by space.

    What is compared may be ``some`` channels of the residual stream: they tell what stays, and where neurons went.
    Maps of heads are found from ``whole_attention`` then, if they are needed.
    """
    heads, found = _attention(parts, *some)
    if whole_attention is not None and any(match.moved for match in found.values()):
        heads, found = _attention(parts, *whole_attention())
    neurons_F, found["neurons"] = _neurons(*some)
    scale_F, found["scales"] = _scales(*some, neurons_F)
    return Maps(residual_DD, *heads, neurons_F, scale_F), found


def _attention(
    parts: Anatomy, old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Match]]:
    """Order of groups and of heads within them, M of q and k and of v and o by group, and how alike all this is."""
    g, h, k = parts.groups, parts.heads, parts.width
    q1, q2 = (side["q"].reshape(g, h, k, -1) for side in (old, new))
    k1, k2 = (side["k"].reshape(g, k, -1) for side in (old, new))
    v1, v2 = (side["v"].reshape(g, k, -1) for side in (old, new))
    o1, o2 = (side["o"].T.reshape(g, h, k, -1) for side in (old, new))
    groups_G, heads_GH, order = _order(
        alike(parts, q1.flatten(0, 1), q2.flatten(0, 1)).reshape(g, h, g, h).transpose(1, 2),
        (alike(parts, k1, k2) + spans(v1, v2)) / 2,
    )
    maps_qk, maps_vo = [], []
    for b, a in enumerate(groups_G.tolist()):
        q_pair = [q[place].transpose(0, 1).flatten(1) for q, place in ((q1, (a, heads_GH[b])), (q2, b))]
        o_pair = [o[place].transpose(0, 1).flatten(1) for o, place in ((o1, (a, heads_GH[b])), (o2, b))]
        maps_qk.append(basis(parts, (*q_pair, k1[a], k2[b]), turning=True))
        maps_vo.append(basis(parts, (v1[a], v2[b], *o_pair), turning=False))
    found = {"heads": order, "qk": mean(match for _, match in maps_qk), "vo": mean(match for _, match in maps_vo)}
    qk_GKK, vo_GKK = (torch.stack([m_KK for m_KK, _ in maps]) for maps in (maps_qk, maps_vo))
    return (groups_G, heads_GH, qk_GKK, vo_GKK), found


def _order(heads_GGHH: Tensor, shared_GG: Tensor) -> tuple[Tensor, Tensor, Match]:
    """By assignment: which old group every new one is, and within it which old head every new one."""
    groups, heads = heads_GGHH.shape[1:3]
    within = [[linear_sum_assignment(-heads_GGHH[a, b].numpy().T)[1] for b in range(groups)] for a in range(groups)]
    best_GG = torch.tensor([
        [float(heads_GGHH[a, b][within[a][b], range(heads)].mean()) for b in range(groups)] for a in range(groups)
    ]) + shared_GG  # fmt: skip
    old_G = torch.from_numpy(linear_sum_assignment(-best_GG.numpy().T)[1])
    own = heads_GGHH.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).mean(1) + shared_GG.diagonal()
    match = taken(float(own.mean()) / 2, float(best_GG[old_G, torch.arange(groups)].mean()) / 2)
    if not match.moved:
        return torch.arange(groups), torch.arange(heads).expand(groups, heads), match
    return old_G, torch.stack([torch.from_numpy(within[a][b]) for b, a in enumerate(old_G.tolist())]), match


def basis(parts: Anatomy, pair: tuple[Tensor, ...], *, turning: bool) -> tuple[Tensor, Match]:
    """M of a dual pair where it was taken, else the identity."""
    x1, x2, y1, y2 = pair
    identity_KK = torch.eye(len(x1), dtype=x1.dtype)
    before = (likeness(x1, x2) + likeness(y1, y2)) / 2
    if turning and parts.family.qk_norms:
        return identity_KK, Match(before, before, moved=False)
    m_KK = _dual_planes(parts, *pair) if turning else _dual(*pair)
    if not torch.isfinite(m_KK).all() or float(torch.linalg.cond(m_KK)) > _SOUND:
        return identity_KK, Match(before, before, moved=False)
    after = (likeness(m_KK @ x1, x2) + likeness(torch.linalg.solve(m_KK.T, y1), y2)) / 2
    match = taken(before, after)
    return (m_KK if match.moved else identity_KK), match


def mean(matches: Iterable[Match]) -> Match:
    """Of the parts of a space."""
    some = list(matches)
    return Match(
        fmean(match.before for match in some), fmean(match.after for match in some), any(m.moved for m in some)
    )


def _dual(x1_KN: Tensor, x2_KN: Tensor, y1_KN: Tensor, y2_KN: Tensor) -> Tensor:
    """M of a dual pair: any basis of K dimensions. Both Gram matrices are symmetric, so their own bases solve it."""
    (left_K, u_KK), (right_K, v_KK) = (torch.linalg.eigh(side_KN @ side_KN.T) for side_KN in (y2_KN, x1_KN))
    both_KK = x2_KN @ x1_KN.T + y2_KN @ y1_KN.T
    m_KK: Tensor = u_KK @ ((u_KK.T @ both_KK @ v_KK) / (left_K[:, None] + right_K)) @ v_KK.T
    return m_KK


def _dual_planes(parts: Anatomy, x1_KN: Tensor, x2_KN: Tensor, y1_KN: Tensor, y2_KN: Tensor) -> Tensor:
    """M of q and k: an angle and a scale on every rotary plane, any basis of what does not turn."""
    m_KK = torch.zeros(len(x1_KN), len(x1_KN), dtype=x1_KN.dtype)
    one_P, two_P = parts.planes_P2.unbind(1)
    a, b, c, d = (torch.complex(value[one_P], value[two_P]) for value in (x1_KN, x2_KN, y1_KN, y2_KN))
    z_P = ((a.conj() * b).sum(1) + (c.conj() * d).sum(1)) / ((a.abs() ** 2).sum(1) + (d.abs() ** 2).sum(1))
    m_KK[one_P, one_P] = m_KK[two_P, two_P] = z_P.real
    m_KK[two_P, one_P], m_KK[one_P, two_P] = z_P.imag, -z_P.imag
    free_N = parts.free_N
    if len(free_N):
        m_KK[free_N[:, None], free_N] = _dual(x1_KN[free_N], x2_KN[free_N], y1_KN[free_N], y2_KN[free_N])
    return m_KK


def alike(parts: Anatomy, x1_HKN: Tensor, x2_HKN: Tensor) -> Tensor:
    """Old head × new head: how like they are on rotary planes, whatever their angles and scales are."""
    if not len(parts.planes_P2):
        return spans(x1_HKN, x2_HKN)
    one_P, two_P = parts.planes_P2.unbind(1)
    turned = (torch.complex(x[:, one_P], x[:, two_P]) for x in (x1_HKN, x2_HKN))
    a_PHN, b_PHN = ((x / x.norm(dim=2, keepdim=True).clamp_min(1e-30)).transpose(0, 1) for x in turned)
    like_PHH: Tensor = (a_PHN.conj() @ b_PHN.mT).abs()
    return like_PHH.mean(0)


def spans(x1_HKN: Tensor, x2_HKN: Tensor) -> Tensor:
    """Old head × new head: the share of one's span that lies in the other's, whatever their bases are."""
    a_HNK, b_HNK = (torch.linalg.qr(x.transpose(1, 2)).Q for x in (x1_HKN, x2_HKN))
    common = min(x1_HKN.shape[1], x2_HKN.shape[1])
    return torch.stack([(a_NK.T @ b_HNK).square().sum((1, 2)) for a_NK in a_HNK]) / common


def _neurons(old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]) -> tuple[Tensor, Match]:
    """Which old neuron every new one is: by gate, up and down together; up and down may have changed sign."""
    everyone_F = torch.arange(len(old["gate"]))
    if (match := _in_their_places(old, new)) is not None:
        return everyone_F, match
    one, two = (_units(side, slice(None)) for side in (old, new))

    def as_they_lie(order_F: Tensor) -> float:
        gate_F, *scaled_F = ((x[order_F] * y).sum(1) for x, y in zip(one, two, strict=True))
        return float((gate_F + signless(scaled_F)).mean()) / len(one)

    def alike(some: Tensor, others: Tensor) -> Tensor:
        return _alike([x[some] for x in one], [y[others] for y in two])

    before, order_F = as_they_lie(everyone_F), _assigned(alike, len(everyone_F))
    if order_F is None:
        return everyone_F, Match(before, before, moved=False)
    match = taken(before, as_they_lie(order_F))
    return (order_F if match.moved else everyone_F), match


def _in_their_places(old: Mapping[Role, Tensor], new: Mapping[Role, Tensor]) -> Match | None:
    """How alike a sample of neurons is, where nearly all of them are most like themselves; else None."""
    sample = _some(len(old["gate"]))
    like_NN = _alike(*(_units(side, sample) for side in (old, new)))
    before = float(like_NN.diagonal().mean())
    return Match(before, before, moved=False) if _stays(like_NN) else None


def _units(side: Mapping[Role, Tensor], some: Tensor | slice) -> list[Tensor]:
    """Of some neurons what they are compared by, each of length 1."""
    return [unit(x_FN[some]) for x_FN in (side["gate"], *scaled(side))]


def _alike(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    gate_NN, *scaled_NN = (x @ y.T for x, y in zip(one, two, strict=True))
    like_NN: Tensor = (gate_NN + signless(scaled_NN)) / len(one)
    return like_NN


def _assigned(alike: Callable[[Tensor, Tensor], Tensor], many: int) -> Tensor | None:
    """Old neuron of every new one. Of many, two that are each other's likest are a pair, among the others again, a few
    times; those that are left are assigned. None where too many are left: they are like none."""
    order_F = torch.full((many,), -1)
    old_N = new_N = torch.arange(many)
    for _ in range(_PASSES):
        if len(old_N) <= _ASSIGNED:
            break
        likest_N, mutual_N = _likest(alike, old_N, new_N)
        order_F[new_N[likest_N[mutual_N]]] = old_N[mutual_N]
        old_N, new_N = old_N[~mutual_N], (order_F < 0).nonzero()[:, 0]
    if len(old_N) > _ASSIGNED:
        return None
    if len(old_N):
        order_F[new_N] = old_N[_best(alike(old_N, new_N))]
    return order_F


def _likest(alike: Callable[[Tensor, Tensor], Tensor], old_N: Tensor, new_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of every old one which new one is its likest, and whether it is that one's likest, too; by blocks."""
    places_N = torch.arange(len(old_N))
    likest_N, top_N, owner_N = places_N.clone(), torch.full((len(new_N),), -torch.inf).double(), places_N.clone()
    for some in places_N.split(_BLOCK):
        like_BN = alike(old_N[some], new_N)
        likest_N[some] = like_BN.argmax(1)
        best_N, row_N = like_BN.max(0)
        better_N = best_N > top_N
        top_N, owner_N = torch.where(better_N, best_N, top_N), torch.where(better_N, some[row_N], owner_N)
    return likest_N, owner_N[likest_N] == places_N


def _best(like_NN: Tensor) -> Tensor:
    """The old one of every new one by assignment."""
    return torch.from_numpy(linear_sum_assignment(-like_NN.numpy().T)[1])


def scaled(side: Mapping[Role, Tensor]) -> list[Tensor]:
    """The dual pair of a neuron: its column of down, and its row of up where there is one."""
    return [side["down"].T, *([side["up"]] if "up" in side else [])]


def signless(likeness: Sequence[Tensor]) -> Tensor:
    """Their sum; of a pair that may have changed sign together, without it."""
    total = torch.stack(list(likeness)).sum(0)
    return total.abs() if len(likeness) > 1 else total


def _scales(old: Mapping[Role, Tensor], new: Mapping[Role, Tensor], order_F: Tensor) -> tuple[Tensor, Match]:
    """M of up against down, a number a neuron."""
    pairs = [(old["down"].T, new["down"].T), *([(old["up"], new["up"])] if "up" in old else [])]
    (d11_F, d12_F, d22_F), *of_up = (_products(one, two, order_F) for one, two in pairs)
    ones_F = torch.ones_like(d12_F)

    def scaled_likeness(scale_F: Tensor) -> float:
        """Of s·up and of down⁄s."""
        down = _cosine(d11_F / scale_F**2, d12_F / scale_F, d22_F)
        return fmean([down, *(_cosine(u11_F * scale_F**2, u12_F * scale_F, u22_F) for u11_F, u12_F, u22_F in of_up)])

    before = scaled_likeness(ones_F)
    if not of_up:
        return ones_F, Match(before, before, moved=False)
    [(u11_F, u12_F, _)] = of_up
    s_F = (u12_F + d12_F) / (u11_F + d22_F).clamp_min(1e-30)
    if float(s_F.abs().min()) * _SOUND < float(s_F.abs().max()):
        return ones_F, Match(before, before, moved=False)
    match = taken(before, scaled_likeness(s_F))
    return (s_F if match.moved else ones_F), match


def _products(one_FN: Tensor, two_FN: Tensor, order_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every neuron x₁·x₁, x₁·x₂ and x₂·x₂, x₁ in its new place; by blocks, in float64."""
    found: list[list[Tensor]] = [[], [], []]
    for two_BN, some in zip(two_FN.split(_BLOCK), order_F.split(_BLOCK), strict=True):
        x_BN, y_BN = one_FN[some].double(), two_BN.double()
        for sums, product_BN in zip(found, (x_BN.square(), x_BN * y_BN, y_BN.square()), strict=True):
            sums.append(product_BN.sum(1))
    one_F, both_F, two_F = map(torch.cat, found)
    return one_F, both_F, two_F


def _cosine(one_F: Tensor, both_F: Tensor, two_F: Tensor) -> float:
    """As `likeness`, of the products of rows."""
    size = float((one_F.sum() * two_F.sum()).sqrt())
    return float(both_F.sum()) / size if size else 1.0


def unit(x_FN: Tensor) -> Tensor:
    """Rows of length 1."""
    length_F1: Tensor = x_FN.norm(dim=1, keepdim=True)
    return x_FN / length_F1.clamp_min(1e-30)
