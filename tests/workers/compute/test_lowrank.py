import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.compute.lowrank import LowRank

sizes = st.integers(1, 9)


def lowrank(outputs: int, inputs: int, rank: int, seed: int) -> LowRank:
    chance = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in ((rank, inputs), (outputs, rank)))
    return LowRank(*draw)


matrices = st.builds(lowrank, sizes, sizes, sizes, st.integers(0, 1000))


@settings(deadline=None)
@given(matrices)
def test_truncation_at_full_rank_is_the_identity(x: LowRank) -> None:
    torch.testing.assert_close(x.truncate(x.rank).dense(), x.dense())


@settings(deadline=None)
@given(matrices)
def test_the_norm_is_that_of_the_dense_matrix(x: LowRank) -> None:
    assert x.norm() == pytest.approx(float(x.dense().norm()))


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 1000))
def test_a_sum_is_the_sum_of_the_dense_matrices(o: int, i: int, r1: int, r2: int, seed: int) -> None:
    x, y = lowrank(o, i, r1, seed), lowrank(o, i, r2, seed + 1)
    total = x + y
    assert total.rank == r1 + r2
    torch.testing.assert_close(total.dense(), x.dense() + y.dense())


@settings(deadline=None)
@given(matrices, st.integers(1, 9))
def test_truncation_leaves_exactly_the_discarded_singular_values(x: LowRank, rank: int) -> None:
    _, s, _ = x.svd()
    left = (x + x.truncate(rank) * -1.0).norm()
    assert left == pytest.approx(float(s[rank:].norm()), abs=1e-9)


@settings(deadline=None)
@given(matrices)
def test_the_svd_of_the_factors_is_that_of_the_dense_matrix(x: LowRank) -> None:
    u, s, v = x.svd()
    torch.testing.assert_close(u @ torch.diag(s) @ v, x.dense())
    torch.testing.assert_close(s, torch.linalg.svdvals(x.dense())[: len(s)], atol=1e-9, rtol=1e-9)


@settings(deadline=None)
@given(matrices, st.floats(0.1, 5))
def test_a_matrix_and_its_multiple_have_no_angle_between_them(x: LowRank, factor: float) -> None:
    for angles in x.angles(x * factor):
        assert float(angles.abs().max()) < 1e-6


def test_orthogonal_updates_are_a_right_angle_apart() -> None:
    e = torch.eye(4, dtype=torch.float64)
    left, right = LowRank(e[:1], e[:, :1]).angles(LowRank(e[1:2], e[:, 1:2]))
    assert left.tolist() == right.tolist() == [pytest.approx(math.pi / 2)]


def test_a_sum_that_cancels_has_norm_zero() -> None:
    x = lowrank(6, 5, 3, 0)
    assert (x + x * -1.0).norm() < 1e-14 * x.norm() * 10


def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it() -> None:
    e = torch.eye(3, dtype=torch.float64)
    x = LowRank(e, torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)))
    assert [x.rank_for(energy) for energy in (9 / 14, 13 / 14, 1.0)] == [1, 2, 3]


def test_factors_without_a_common_rank_are_no_matrix() -> None:
    with pytest.raises(ValueError, match="do not share a rank"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 3))
