"""Fixed draws of an ∞-MoE: a rule of points for the integral over a token's Gaussian, instead of random samples.

The first point is the mean; then come mirrored pairs of orthogonal directions, rows of a Hadamard matrix, so that every
pair lies at the same distance from the mean. The order is fixed and nested: K points are the first K of more.
"""

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of ±1, [size, size], float32; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        upper = torch.cat([matrix, matrix], dim=1)
        lower = torch.cat([matrix, -matrix], dim=1)
        matrix = torch.cat([upper, lower])
    return matrix


def fixed_points(count: int, latent_dim: int) -> Tensor:
    """The first `count` points ε [count, Z] in units of the spread: z = μ + σ ⊙ ε. At most
    `Infinity.points` of them.

    For Z = 4: 0000, +-+-, -+-+, ++--, --++, +--+, -++-.
    """
    rows = hadamard(_rows(latent_dim))[:, :latent_dim]
    points = torch.zeros(count, latent_dim)
    for number in range(1, count):
        sign = 1 if number % 2 else -1
        points[number] = sign * rows[(number + 1) // 2]
    return points


def _rows(latent_dim: int) -> int:
    """The smallest power of two that is not under the width, and at least 2."""
    return max(2, 1 << (latent_dim - 1).bit_length())
