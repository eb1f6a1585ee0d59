"""Low-rank algebra: the truncation of one module's update on its factors, against the SVD of the dense ΔW.

Both end in factors of rank 16 of the same matrix; that they are the same is checked before anything is timed.
The dense peer is `torch.linalg.svd` in float32 with the reduced factors, as PEFT's combination by SVD and most
extraction scripts do it; ours works in float64 on the small core.
"""

from statistics import median

import torch

from workers.compute.lowrank import LowRank

from .table import Row, at_least, seconds

SIDE, RANK, KEPT = 2048, 40, 16
_DENSE_ROUNDS, _ROUNDS = 5, 21


def run(scale: float = 1.0) -> list[Row]:
    side = max(64, int(SIDE * scale**0.5))
    chance = torch.Generator().manual_seed(0)
    update = LowRank(*(torch.randn(shape, generator=chance) for shape in ((RANK, side), (side, RANK))))

    def dense() -> torch.Tensor:
        u, s, v = torch.linalg.svd(update.dense(), full_matrices=False)
        cut: torch.Tensor = (u[:, :KEPT] * s[:KEPT]) @ v[:KEPT]
        return cut

    def factors() -> LowRank:
        return update.truncate(KEPT)

    torch.testing.assert_close(factors().dense(), dense(), atol=1e-3, rtol=1e-3)
    slow, fast = [], []
    for _ in range(_DENSE_ROUNDS):  # in turn, so that a slow minute of the machine meets both
        slow.append(seconds(dense))
        fast += [seconds(factors) for _ in range(_ROUNDS // _DENSE_ROUNDS + 1)]
    peer, ours = median(slow), median(fast)
    return [
        at_least(
            f"SVD of ΔW, {side}², rank {RANK} → {KEPT}", peer / ours, 300,
            peer=f"dense SVD, {peer:.3g} s",
            note=f"factor method {1000 * ours:.3g} ms, {torch.get_num_threads()} threads",
        )
    ]  # fmt: skip
