"""The draws of an ∞-MoE: points z = mean + spread · ε of each token's Gaussian, with the noise of `model/noise.py`.

ε depends on seed, layer, position and sample alone, never on the batch. A program makes one draw of one token; draws
beyond a token's count are not written. Axes in kernels: Z elements of the expert space, padded to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.moe.points import fixed_points
from model.noise import normal_table
from model.shapes.mixtures import Infinity

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_MASK34 = tl.constexpr((1 << 34) - 1)
_MASK37 = tl.constexpr((1 << 37) - 1)
_MASK33 = tl.constexpr((1 << 33) - 1)


@triton.jit
def _mix(x):
    """`mix` of `model/noise.py`, on int64."""
    x = (x ^ ((x >> 30) & _MASK34)) * _MIX1
    x = (x ^ ((x >> 27) & _MASK37)) * _MIX2
    return x ^ ((x >> 31) & _MASK33)


@triton.jit
def _normal(seed, layer, position, sample, table, width, Z: tl.constexpr):
    """`normal` of `model/noise.py` [Z]: four elements have one hash, of which each takes 16 bits."""
    place = tl.arange(0, Z).to(tl.int64)
    groups = (width + 3) // 4
    layer_key = _mix(seed + tl.cast(layer + 1, tl.int64) * _GOLDEN)
    key = _mix(layer_key + position * _GOLDEN)
    counter = tl.cast(sample, tl.int64) * groups + place // 4 + 1
    bits = _mix(key + counter * _GOLDEN)
    index = (bits >> (place % 4 * 16)) & 0xFFFF
    return tl.load(table + index, mask=place < width, other=0.0)


@triton.jit
def _draw(
    gaussian,
    seeds,
    positions,
    counts,
    table,
    out,
    layer,
    width,
    k_max,
    sigma_min,
    draws: tl.constexpr,
    link: tl.constexpr,
    Z: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1)
    if sample >= tl.load(counts + token):
        return
    place = tl.arange(0, Z)
    real = place < width
    mean = tl.load(gaussian + token * 2 * width + place, mask=real, other=0.0)
    raw = tl.load(gaussian + token * 2 * width + width + place, mask=real, other=0.0)
    softplus = tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))
    spread = tl.exp(raw) if link == "exp" else softplus
    if draws == "points":
        noise = tl.load(table + sample * width + place, mask=real, other=0.0)
    else:
        seed, position = tl.load(seeds + token), tl.load(positions + token)
        if draws == "antithetic":
            noise = _normal(seed, layer, position, sample // 2, table, width, Z) * (1 - 2 * (sample % 2))
        else:
            noise = _normal(seed, layer, position, sample, table, width, Z)
    z = mean + (spread + sigma_min) * noise
    tl.store(out + (token * k_max + sample) * width + place, z, mask=real)


def noise_table(shape: Infinity, device: Tensor) -> Tensor:
    """What `draw` looks noise up in: quantiles of the normal distribution, or the fixed points of this shape."""
    table = fixed_points(shape.maximum, shape.latent_dim) if shape.draws == "points" else normal_table()
    return table.to(device.device)


def draw(
    gaussian_TZ: Tensor,
    seeds_T: Tensor,
    positions_T: Tensor,
    counts_T: Tensor,
    layer: int,
    shape: Infinity,
    table: Tensor,
    z_RZ: Tensor,
) -> None:
    """Write draw k of token t to row t · K + k of `z_RZ`, for each k below the token's count.

    `gaussian_TZ` has means and raw spreads side by side, float32. `table` is `noise_table`'s.
    """
    tokens = len(counts_T)
    k_max = len(z_RZ) // tokens
    _draw[(tokens, k_max)](
        gaussian_TZ,
        seeds_T,
        positions_T,
        counts_T,
        table,
        z_RZ,
        layer,
        shape.latent_dim,
        k_max,
        float(shape.sigma_min),
        draws=shape.draws,
        link=shape.sigma_link,
        Z=triton.next_power_of_2(shape.latent_dim),
        num_warps=1,
        enable_fp_fusion=False,
    )
