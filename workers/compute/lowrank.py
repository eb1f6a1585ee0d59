"""Low-rank matrices, computed on their factors: what ΔW = B·A can be asked without ever forming it.

Legend: R rank, I inputs, O outputs, K kept rank. A is R×I and B is O×R, with the scale already in B.
The fast SVD of a product: B = Q_B·R_B, Aᵀ = Q_A·R_A, then the SVD of the small core R_B·R_Aᵀ.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_EXACT = 768
"""The smaller side up to which a dense matrix is decomposed exactly."""
_DEPTH = 3
_FIRST_RANK = 64


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = B·A by its factors; work is done in float64, results come back in the factors' own type."""

    a_RI: Tensor
    b_OR: Tensor

    def __post_init__(self) -> None:
        if self.a_RI.ndim != 2 or self.b_OR.ndim != 2 or self.a_RI.shape[0] != self.b_OR.shape[1]:
            raise ValueError(f"A {tuple(self.a_RI.shape)} and B {tuple(self.b_OR.shape)} do not share a rank")

    @property
    def rank(self) -> int:
        """Columns of B: an upper bound of the true rank."""
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def dense(self) -> Tensor:
        """B·A itself, O×I, for those who have the room."""
        return self.b_OR @ self.a_RI

    def __add__(self, other: Self) -> "LowRank":
        """B₁A₁ + B₂A₂ = [B₁ B₂]·[A₁; A₂]: exact, ranks add up."""
        return LowRank(torch.cat([self.a_RI, other.a_RI]), torch.cat([self.b_OR, other.b_OR], dim=1))

    def __mul__(self, factor: float) -> "LowRank":
        return LowRank(self.a_RI, self.b_OR * factor)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (O×K), s (K), Vᵀ (K×I) of B·A in float64, with K = min(rank, O, I)."""
        q_b, r_b = torch.linalg.qr(self.b_OR.double())
        q_a, r_a = torch.linalg.qr(self.a_RI.double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, s, v @ q_a.T

    def inner(self, other: Self) -> float:
        """⟨B₁·A₁, B₂·A₂⟩ = ⟨B₁ᵀ·B₂, A₁·A₂ᵀ⟩."""
        left, right = self.b_OR.double().T @ other.b_OR.double(), self.a_RI.double() @ other.a_RI.double().T
        return float((left * right).sum())

    def norm(self) -> float:
        """‖B·A‖ (Frobenius), from the singular values of the core: sums that cancel give zero, not a root of noise."""
        _, r_b = torch.linalg.qr(self.b_OR.double())
        _, r_a = torch.linalg.qr(self.a_RI.double().T)
        return float(torch.linalg.matrix_norm(r_b @ r_a.T))

    @classmethod
    def cut(cls, svd: tuple[Tensor, Tensor, Tensor], rank: int, dtype: torch.dtype) -> "LowRank":
        """U·diag(s)·Vᵀ up to ``rank``, the root of each σ in either factor."""
        u, s, v = svd
        root = s[:rank].sqrt()
        return cls((root[:, None] * v[:rank]).to(dtype), (u[:, :rank] * root).to(dtype))

    def truncate(self, rank: int) -> "LowRank":
        """The nearest matrix of rank at most ``rank`` (Eckart–Young)."""
        return LowRank.cut(self.svd(), rank, self.b_OR.dtype)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of ‖B·A‖²."""
        _, s, _ = self.svd()
        return rank_for(s, energy)

    def angles(self, other: Self) -> tuple[Tensor, Tensor]:
        """Principal angles, ascending, in radians, between the output spaces and between the input spaces."""
        (u1, _, v1), (u2, _, v2) = self._spaces(), other._spaces()
        return _angles(u1, u2), _angles(v1.T, v2.T)

    def _spaces(self) -> tuple[Tensor, Tensor, Tensor]:
        """The SVD without directions that are rounding noise."""
        u, s, v = self.svd()
        floor = s.max() * max(self.shape) * torch.finfo(self.b_OR.dtype).eps if len(s) else 0.0
        kept = s > floor
        return u[:, kept], s[kept], v[kept]


# ── dense matrices ───────────────────────────────────────────────────────────


def rank_for(s_K: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest rank, from 1, at which Σσ² is this share of ``total`` (None: of all of Σσ²).

    An energy of 1 keeps every σ that is no rounding noise of float64.
    """
    if not len(s_K):
        return 0
    if energy >= 1:
        return max(1, int((s_K > s_K.max() * len(s_K) * torch.finfo(torch.float64).eps).sum()))
    whole = float((s_K**2).sum()) if total is None else total
    return min(int((torch.cumsum(s_K**2, 0) < (energy - 1e-12) * whole).sum()) + 1, len(s_K))


def leading(w_OI: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of a dense matrix, in float64; the same ones at every call.

    A float64 SVD where the smaller side is at most 768. Of few triplets of a larger matrix, unless ``exact``,
    randomised block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477): Q spans [WΩ, WWᵀWΩ, …], and the SVD of
    QᵀW is taken; U·s·Vᵀ is then a projection of W, so that Σσ² is what it really keeps of ‖W‖², never more. Of many,
    the eigenvectors of WᵀW in float64, a fifth of an SVD's time and exact down to 1e-8 of the largest σ, which is
    below the rounding of float32.
    """
    small, block = min(w_OI.shape), rank + 8
    few = not exact and (_DEPTH + 1) * block < small
    if small <= _EXACT or (not few and w_OI.dtype == torch.float64):
        u, s, v = torch.linalg.svd(w_OI.double(), full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    if not few:
        return _by_gram(w_OI, rank)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(w_OI.shape[1], block, generator=chance, dtype=w_OI.dtype).to(w_OI.device)
    blocks = []
    for _ in range(_DEPTH + 1):
        y, _ = torch.linalg.qr(w_OI @ x)
        blocks.append(y)
        x = w_OI.T @ y
    q, _ = torch.linalg.qr(torch.cat(blocks, dim=1).double())
    u, s, v = torch.linalg.svd((q.to(w_OI.dtype).T @ w_OI).double(), full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], v[:rank]


def _by_gram(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """WᵀW = V·Σ²·Vᵀ and U = W·V·Σ⁻¹, on the smaller side."""
    outputs, inputs = w_OI.shape
    if outputs < inputs:
        v, s, u = _by_gram(w_OI.T, rank)
        return u.T, s, v.T
    w = w_OI.double()
    squares, vectors = torch.linalg.eigh(w.T @ w)
    s, v = squares.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    return w @ v / s.clamp_min(torch.finfo(s.dtype).tiny), s, v.T


def nearest(
    w_OI: Tensor, *, rank: int | None = None, energy: float = 1.0, noise: float = 0.0
) -> tuple[LowRank, float]:
    """The nearest low-rank matrix to a dense one, in its type, and the share of ‖W‖² that it keeps.

    By ``rank``, or by the smallest rank that keeps ``energy``; σ up to ``noise`` are never taken, so that the rank
    may be 0. Memory: W, and with many ranks asked for a float64 copy of it.
    """
    small, total = min(w_OI.shape), float(torch.linalg.vector_norm(w_OI, dtype=torch.float64)) ** 2
    if not total:
        return LowRank(w_OI.new_zeros(0, w_OI.shape[1]), w_OI.new_zeros(w_OI.shape[0], 0)), 1.0
    asked = min(rank or _FIRST_RANK, small)
    while True:
        u, s, v = leading(w_OI, asked)
        floor = max(noise, float(s[0]) * max(w_OI.shape) * torch.finfo(w_OI.dtype).eps)
        reached = energy < 1 and float((s**2).sum()) >= energy * total
        if rank is not None or asked == small or reached or float(s[-1]) <= floor:
            break
        asked = min(4 * asked, small)
    wanted = rank if rank is not None else rank_for(s, energy, total) if energy < 1 else small
    kept = min(wanted, int((s > floor).sum()))
    return LowRank.cut((u, s, v), kept, w_OI.dtype), float((s[:kept] ** 2).sum()) / total


def _angles(x_NK: Tensor, y_NL: Tensor) -> Tensor:
    """arccos of the singular values of XᵀY for orthonormal X, Y; small angles by arcsin (Björck and Golub 1973)."""
    cosines = torch.linalg.svdvals(x_NK.T @ y_NL).clamp(0, 1)
    thin, wide = (x_NK, y_NL) if x_NK.shape[1] <= y_NL.shape[1] else (y_NL, x_NK)
    sines = torch.linalg.svdvals(thin - wide @ (wide.T @ thin)).clamp(0, 1).flip(0)
    return torch.where(cosines > math.sqrt(0.5), torch.arcsin(sines), torch.arccos(cosines))
