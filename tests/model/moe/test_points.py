"""The fixed draws of an ∞-MoE: the mean, then mirrored pairs of orthogonal directions."""

import pytest
import torch

from model.moe.points import fixed_points, hadamard


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_rows_are_orthogonal_signs(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


def test_the_first_point_is_the_mean_and_pairs_are_mirrored() -> None:
    points = fixed_points(16, 32)
    assert torch.equal(points[0], torch.zeros(32))
    for first in range(1, 15, 2):
        assert torch.equal(points[first], -points[first + 1])
    assert torch.equal(points[1:].norm(dim=1), torch.full((15,), 32.0).sqrt())


def test_directions_are_orthogonal() -> None:
    directions = fixed_points(63, 32)[1::2]  # one of each pair
    assert torch.equal(directions @ directions.T, 32 * torch.eye(31))


@pytest.mark.parametrize("latent_dim", [1, 4, 24, 32])
def test_fewer_points_are_the_first_of_more(latent_dim: int) -> None:
    most = 2 * (max(2, 1 << (latent_dim - 1).bit_length()) - 1) + 1
    points = fixed_points(most, latent_dim)
    assert points.shape == (most, latent_dim)
    for count in range(1, most):
        assert torch.equal(fixed_points(count, latent_dim), points[:count])


def test_no_point_comes_twice() -> None:
    assert len(fixed_points(63, 32).unique(dim=0)) == 63


def test_the_example_of_the_docstring() -> None:
    rows = ["".join("0+-"[int(sign)] for sign in point) for point in fixed_points(7, 4)]
    assert rows == ["0000", "+-+-", "-+-+", "++--", "--++", "+--+", "-++-"]
