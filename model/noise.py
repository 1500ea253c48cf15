"""Random numbers that depend on *what* is drawn, never on when or beside whom: a counter-based generator.

One 64-bit hash of (noise seed, layer, absolute position, counter) gives four 16-bit indices into a table of normal
quantiles. Integer hashing and a table look-up give the same bits whatever the batch, the chunk or the vector width,
which a log/cos pipeline does not.
"""

from functools import cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014), element-wise on int64; shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mix_int(x: int) -> int:
    """`mix` for one Python integer; returns 64 unsigned bits."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """One number in [0, 1) for the token sampled at `position` of a request; 53 bits."""
    key = mix_int(seed + _GOLDEN)
    return (mix_int(key + (position + 1) * _GOLDEN) >> 11) / (1 << 53)


@cache
def normal_table() -> Tensor:
    """Standard normal quantiles at the mid-points of 65,536 equal shares, float32; variance 0.99998."""
    mid = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    return torch.special.ndtri(mid).float()


@cache
def _table_on(device: torch.device) -> Tensor:
    return normal_table().to(device, non_blocking=True)


def normal(seed_R: Tensor, layer: int, position_R: Tensor, sample_R: Tensor, width: int) -> Tensor:
    """Standard normal draws ε_RZ, float32, keyed by int64 rows of (seed, layer, position, sample).

    A row's values do not depend on the other rows. `width` is rounded up to a multiple of four inside.
    """
    groups = -(-width // 4)
    layer_key_R = mix(seed_R + _signed((layer + 1) * _GOLDEN))
    key_R = mix(layer_key_R + position_R * _signed(_GOLDEN))
    group_G = torch.arange(1, groups + 1, device=seed_R.device)
    counter_RG = sample_R[:, None] * groups + group_G
    bits_RG = mix(key_R[:, None] + counter_RG * _signed(_GOLDEN))
    quarters = [(bits_RG >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    index_RG4 = torch.stack(quarters, dim=-1)
    return _table_on(seed_R.device)[index_RG4.flatten(1)[:, :width]]
