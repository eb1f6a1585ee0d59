"""Low-rank matrices, computed on their factors: what ΔW = B·A can be asked without ever forming it.

Legend: R rank, I inputs, O outputs, K kept rank. A is R×I and B is O×R, with the scale already in B.
The fast SVD of a product: B = Q_B·R_B, Aᵀ = Q_A·R_A, then the SVD of the small core R_B·R_Aᵀ.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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

    def norm(self) -> float:
        """‖B·A‖ (Frobenius), from the singular values of the core: sums that cancel give zero, not a root of noise."""
        _, r_b = torch.linalg.qr(self.b_OR.double())
        _, r_a = torch.linalg.qr(self.a_RI.double().T)
        return float(torch.linalg.matrix_norm(r_b @ r_a.T))

    def truncate(self, rank: int) -> "LowRank":
        """The nearest matrix of rank at most ``rank`` (Eckart–Young), the root of each σ in either factor."""
        u, s, v = self.svd()
        root = s[:rank].sqrt()
        return LowRank((root[:, None] * v[:rank]).to(self.a_RI.dtype), (u[:, :rank] * root).to(self.b_OR.dtype))

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of ‖B·A‖²."""
        _, s, _ = self.svd()
        kept = torch.cumsum(s**2, 0) / (s**2).sum().clamp_min(torch.finfo(s.dtype).tiny)
        return min(int((kept < energy - 1e-12).sum()) + 1, len(s))

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


def _angles(x_NK: Tensor, y_NL: Tensor) -> Tensor:
    """arccos of the singular values of XᵀY for orthonormal X, Y; small angles by arcsin (Björck and Golub 1973)."""
    cosines = torch.linalg.svdvals(x_NK.T @ y_NL).clamp(0, 1)
    thin, wide = (x_NK, y_NL) if x_NK.shape[1] <= y_NL.shape[1] else (y_NL, x_NK)
    sines = torch.linalg.svdvals(thin - wide @ (wide.T @ thin)).clamp(0, 1).flip(0)
    return torch.where(cosines > math.sqrt(0.5), torch.arcsin(sines), torch.arccos(cosines))
