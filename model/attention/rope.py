"""Rotary positions: angles, cosines and sines for every way of stretching them that the families use.

A token's angles follow from its own position alone, so that chunks and batches change nothing: where a scaling depends
on the length ("dynamic", "longrope"), the length is the token's position + 1, which is what decoding one by one sees.
Formulas: YaRN arXiv 2309.00071 §3; Llama 3 arXiv 2407.21783 §3.4.2 and its code; LongRoPE arXiv 2402.13753.
"""

import math

import torch
from torch import Tensor

from model.devices import tensor_on
from model.shapes.rope import Rope, yarn_mscale
from model.step import Tables


def rotary_tables(positions_T: Tensor, rope: Rope) -> Tables:
    """Cosines and sines [T, 1, W], float32, in the layout of `rope`; the attention factor is in them."""
    angle_Tw = positions_T[:, None].float() * _frequencies(positions_T, rope)
    angle_TW = angle_Tw.repeat_interleave(2, dim=-1) if rope.interleaved else angle_Tw.repeat(1, 2)
    cos_T1W, sin_T1W = angle_TW.cos()[:, None], angle_TW.sin()[:, None]
    short, long = attention_factors(rope)
    if short == long:
        return cos_T1W * short, sin_T1W * short
    factor_T = torch.where(positions_T < rope.original, short, long)
    factor_T11 = factor_T[:, None, None]
    return cos_T1W * factor_T11, sin_T1W * factor_T11


def rotate(x_THC: Tensor, tables: Tables, rope: Rope) -> Tensor:
    """Turn each pair among the first W elements by its position's angle; the others stay."""
    cos_T1W, sin_T1W = (table.to(x_THC.dtype) for table in tables)
    width = rope.width
    x_THW, rest_THC = x_THC[..., :width], x_THC[..., width:]
    if rope.interleaved:
        even, odd = x_THW[..., 0::2], x_THW[..., 1::2]
        turned_THW = torch.stack([-odd, even], dim=-1).flatten(-2)
    else:
        first, second = x_THW.chunk(2, dim=-1)
        turned_THW = torch.cat([-second, first], dim=-1)
    y_THW = x_THW * cos_T1W + turned_THW * sin_T1W
    return torch.cat([y_THW, rest_THC], dim=-1) if rest_THC.shape[-1] else y_THW


def attention_factors(rope: Rope) -> tuple[float, float]:
    """What cosines and sines are multiplied by, before and after the original context."""
    factor = 1.0
    if rope.scaling == "longrope" and rope.short_mscale is not None and rope.long_mscale is not None:
        return rope.short_mscale, rope.long_mscale
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    elif rope.scaling == "yarn":
        factor = _yarn_factor(rope)
    elif rope.scaling == "longrope" and rope.factor > 1:
        growth = math.log(rope.factor) / math.log(rope.original)
        factor = math.sqrt(1 + growth)
    return factor, factor


def _yarn_factor(rope: Rope) -> float:
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def _frequencies(positions_T: Tensor, rope: Rope) -> Tensor:
    """Radians per position of each pair: [W / 2], or [T, W / 2] where they depend on the position."""
    exponent_w = torch.arange(0, rope.width, 2, device=positions_T.device).float() / rope.width
    plain_w = 1.0 / rope.theta**exponent_w
    match rope.scaling:
        case "linear":
            return plain_w / rope.factor
        case "dynamic":
            return _dynamic(positions_T, exponent_w, rope)
        case "yarn":
            return _yarn(plain_w, rope)
        case "llama3":
            return _llama3(plain_w, rope)
        case "longrope":
            short_w, long_w = (tensor_on(f, plain_w.device) for f in (rope.short_factor, rope.long_factor))
            return plain_w / torch.where((positions_T < rope.original)[:, None], short_w, long_w)
    return plain_w


def _dynamic(positions_T: Tensor, exponent_w: Tensor, rope: Rope) -> Tensor:
    """NTK-aware: beyond the original context, the base grows with the length. By logarithms in float64, since a power's
    last bit depends on its place in the tensor."""
    length_T1 = (positions_T + 1).clamp(min=rope.original)[:, None].double()
    grown_T1 = rope.factor * length_T1 / rope.original - (rope.factor - 1)
    exponent = rope.width / (rope.width - 2)
    base_T1 = math.log(rope.theta) + grown_T1.log() * exponent
    return (-base_T1 * exponent_w).exp().float()


def _yarn(plain_w: Tensor, rope: Rope) -> Tensor:
    """Fast pairs keep their frequency, slow ones are interpolated, those between are blended."""

    def pair_of(rotations: float) -> float:
        """The pair that turns so often within the original context."""
        wavelength = rope.original / (rotations * 2 * math.pi)
        return rope.width * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    high = high + 0.001 if low == high else high
    pair_w = torch.arange(rope.width // 2, device=plain_w.device).float()
    ramp_w = ((pair_w - low) / (high - low)).clamp(0, 1)
    return plain_w / rope.factor * ramp_w + plain_w * (1 - ramp_w)


def _llama3(plain_w: Tensor, rope: Rope) -> Tensor:
    """Long waves are stretched, short ones kept, those between are blended."""
    turns_w = rope.original * plain_w / (2 * math.pi)  # within the original context
    blend_w = (turns_w - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(plain_w / rope.factor, plain_w, blend_w.clamp(0, 1))
