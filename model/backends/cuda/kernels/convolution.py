"""The short causal convolution of a gated delta net, over the tokens of each sequence and the inputs kept of its past.

A program has a block of channels of one sequence and takes its tokens in order, so that chunks change nothing. Axes in
kernels: C channels of a block, J inputs of one output, padded.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.shapes.attention import GatedDeltaNet

CHANNELS = 128


@triton.jit
def _columns(channel, key_heads, key_width, shared_width):
    """Where each channel lies in a row of the projection, which has queries, keys, values and gates by key head."""
    keys = key_heads * key_width
    group_width = 2 * (key_width + shared_width)
    of_keys = channel % keys
    key_column = of_keys // key_width * group_width + channel // keys * key_width + of_keys % key_width
    of_values = channel - 2 * keys
    value_column = of_values // shared_width * group_width + 2 * key_width + of_values % shared_width
    return tl.where(channel < 2 * keys, key_column, value_column)


@triton.jit
def _inputs(projected, kept, row, kept_rows, fresh, real):
    """Inputs at rows of the sequence, counted from its first new one: projected, or below 0 kept; before all of them 0.

    `projected` points to row 0 of a channel and steps by `row`; `kept` points to the oldest kept input of a channel.
    """
    is_new = row >= 0
    new = tl.load(projected, mask=real & is_new, other=0.0).to(tl.float32)
    old = tl.load(kept + (row + kept_rows), mask=real & (is_new == 0) & (fresh == 0), other=0.0)
    return tl.where(is_new, new, old)


@triton.jit
def _convolve(
    projected,
    weight,
    states,
    spans,
    slots,
    out,
    channels,
    key_heads,
    key_width,
    shared_width,
    row_width,
    state_size,
    kernel: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
):
    sequence = tl.program_id(0)
    first = tl.load(spans + sequence * 3)
    rows = tl.load(spans + sequence * 3 + 1).to(tl.int32)
    if rows <= 0:
        return
    fresh = tl.load(spans + sequence * 3 + 2) == rows
    channel = tl.program_id(1) * C + tl.arange(0, C)
    real = (channel < channels)[:, None]
    tap = tl.arange(0, J)[None, :]
    real_tap = real & (tap < kernel)
    column = projected + first * row_width + _columns(channel, key_heads, key_width, shared_width)[:, None]
    kept = states + tl.load(slots + sequence) * state_size + channel[:, None] * (kernel - 1)
    factor = tl.load(weight + channel[:, None] * kernel + tap, mask=real_tap, other=0.0).to(tl.float32)
    for row in range(rows):
        at = row - (kernel - 1) + tap
        values = _inputs(column + at.to(tl.int64) * row_width, kept, at, kernel - 1, fresh, real_tap)
        total = tl.sum(values * factor, axis=1)
        total = total * tl.sigmoid(total)
        tl.store(out + (first + row) * channels + channel, total, mask=channel < channels)
    at = rows - (kernel - 1) + tap
    is_kept = real & (tap < kernel - 1)
    last = _inputs(column + at.to(tl.int64) * row_width, kept, at, kernel - 1, fresh, is_kept)
    tl.debug_barrier()  # all of the old inputs are read before any is overwritten
    tl.store(kept + tap, last, mask=is_kept)


def convolve(
    projected_TX: Tensor,
    weight_CJ: Tensor,
    shape: GatedDeltaNet,
    state_SX: Tensor,
    spans_B3: Tensor,
    slots_B: Tensor,
    out_TC: Tensor,
) -> None:
    """Write silu(convolution) of each new token, float32, and leave the last inputs of each sequence in its state.

    A sequence without new tokens is left as it was; one that starts with this step has no past.
    """
    shared_width = shape.value_heads // shape.key_heads * shape.value_width
    _convolve[(len(spans_B3), triton.cdiv(shape.channels, CHANNELS))](
        projected_TX,
        weight_CJ,
        state_SX,
        spans_B3,
        slots_B,
        out_TC,
        shape.channels,
        shape.key_heads,
        shape.key_width,
        shared_width,
        projected_TX.shape[1],
        state_SX.shape[1],
        kernel=shape.kernel,
        C=CHANNELS,
        J=triton.next_power_of_2(shape.kernel),
        num_warps=4,
        enable_fp_fusion=False,
    )
