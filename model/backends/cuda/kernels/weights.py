"""How a matrix product reads a tile of weights: as they are, or 8 bits wide and widened to the type of the rows.

int8 and float8_e4m3fn become bfloat16 (in tests float32 or float16), which hold all of their values. e4m3 is decoded
with integers, so no hardware has to know it. Not here: scales, which multiply sums.

Axes in kernels: U units of a tile, B inner elements of one step.
"""

import triton
import triton.language as tl


@triton.jit
def weights(row, real, start, inner, packed: tl.constexpr, dtype: tl.constexpr, B: tl.constexpr):
    """Weights [U, B] from element `start` of the rows at `row`; those of 8 bits, four in an int32, as `dtype`."""
    if packed == "none":
        at = start + tl.arange(0, B)
        tile = tl.load(row[:, None] + at[None, :], mask=real[:, None] & (at < inner)[None, :], other=0.0)
    else:  # words: of single bytes the compiler would load 8 at a time, not 16
        at = start // 4 + tl.arange(0, B // 4)
        word = tl.load(row[:, None] + at[None, :], mask=real[:, None] & (at < inner // 4)[None, :], other=0)
        even = tl.interleave(_widened(word, packed, dtype), _widened(word >> 16, packed, dtype))
        odd = tl.interleave(_widened(word >> 8, packed, dtype), _widened(word >> 24, packed, dtype))
        tile = tl.interleave(even, odd)
    return tile


@triton.jit
def _widened(byte, packed: tl.constexpr, dtype: tl.constexpr):
    """The weights that are the low bytes of int32."""
    return e4m3(byte, dtype) if packed == "e4m3" else byte.to(tl.int8).to(dtype)


@triton.jit
def e4m3(byte, dtype: tl.constexpr):
    """The numbers whose float8_e4m3fn are the low bytes of int32; NaN is left out."""
    factor: tl.constexpr = 2.0**8 if dtype == tl.float16 else 2.0**120  # the exponents' biases differ by so much
    return e4m3_bits(byte, dtype).to(dtype, bitcast=True) * factor


@triton.jit
def e4m3_bits(byte, dtype: tl.constexpr):
    """Sign, exponent and fraction where `dtype` has them, as an integer of its width."""
    sign, rest = byte & 0x80, byte & 0x7F
    if dtype == tl.float32:
        bits = (sign << 24) | (rest << 20)
    elif dtype == tl.bfloat16:
        bits = ((sign << 8) | (rest << 4)).to(tl.uint16)
    else:
        tl.static_assert(dtype == tl.float16)
        bits = ((sign << 8) | (rest << 7)).to(tl.uint16)
    return bits
