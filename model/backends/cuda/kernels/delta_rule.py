"""The gated delta rule (arXiv 2412.06464 eq. 10), token by token: S ← e^g · S; S ← S + k ⊗ β(v - Sᵀk); y = Sᵀq.

Columns of a state do not see each other, so a program has a few columns of one head of one sequence and takes its
tokens in order, so that chunks change nothing. Axes in kernels: K elements of a key, padded, and V columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.shapes.attention import GatedDeltaNet

WIDEST = 256  # elements of a key: with more, a program's columns spill
COLUMNS = 8  # of a program, which is one warp: sums over a key need no shared memory


@triton.jit
def _unit(at, place, width):
    """A query or a key of length one."""
    value = tl.load(at + place, mask=place < width, other=0.0)
    return value / tl.sqrt(tl.sum(value * value, axis=0) + 1e-6)


@triton.jit
def _rates(rates, step_bias, log_decay, token, head, heads, shared):
    """β and e^g of one head of a token, whose logits lie by key head: `shared` of β, then of the decay."""
    at = rates + token * 2 * heads + head // shared * 2 * shared + head % shared
    beta = tl.sigmoid(tl.load(at).to(tl.float32))
    step = tl.load(at + shared).to(tl.float32) + tl.load(step_bias + head).to(tl.float32)
    grown = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    return beta, tl.exp(-tl.exp(tl.load(log_decay + head).to(tl.float32)) * grown)


@triton.jit
def _delta_rule(
    convolved,
    rates,
    step_bias,
    log_decay,
    states,
    spans,
    slots,
    out,
    heads,
    key_heads,
    key_width,
    value_width,
    channels,
    state_size,
    first_state,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(spans + sequence * 3)
    rows = tl.load(spans + sequence * 3 + 1).to(tl.int32)
    if rows <= 0:
        return
    fresh = tl.load(spans + sequence * 3 + 2) == rows
    shared = heads // key_heads
    place = tl.arange(0, K)
    column = tl.program_id(2) * V + tl.arange(0, V)
    real_column = column < value_width
    state = states + tl.load(slots + sequence) * state_size + first_state + head * key_width * value_width
    state_at = state + place[:, None] * value_width + column[None, :]
    real = (place < key_width)[:, None] & real_column[None, :]
    memory = tl.load(state_at, mask=real & (fresh == 0), other=0.0)
    key_at = head // shared * key_width
    for row in range(rows):
        token = first + row
        token_at = convolved + token * channels
        query = _unit(token_at + key_at, place, key_width) * scale
        key = _unit(token_at + key_heads * key_width + key_at, place, key_width)
        value_at = token_at + 2 * key_heads * key_width + head * value_width
        value = tl.load(value_at + column, mask=real_column, other=0.0)
        beta, decay = _rates(rates, step_bias, log_decay, token, head, heads, shared)
        memory *= decay
        known = tl.sum(memory * key[:, None], axis=0)
        memory += key[:, None] * (beta * (value - known))[None, :]
        seen = tl.sum(memory * query[:, None], axis=0)
        tl.store(out + (token * heads + head) * value_width + column, seen, mask=real_column)
    tl.store(state_at, memory, mask=real)


def delta_rule(
    convolved_TC: Tensor,
    rates_TX: Tensor,
    step_bias_H: Tensor,
    log_decay_H: Tensor,
    shape: GatedDeltaNet,
    state_SX: Tensor,
    spans_B3: Tensor,
    slots_B: Tensor,
    out_THV: Tensor,
) -> None:
    """Write what each head of each new token reads from its state, float32, and leave the states behind the last.

    `convolved_TC`, float32, has queries, keys and values side by side. A sequence without new tokens is left as it was;
    one that starts with this step has a state of zeros.
    """
    _delta_rule[(len(spans_B3), shape.value_heads, triton.cdiv(shape.value_width, COLUMNS))](
        convolved_TC,
        rates_TX,
        step_bias_H,
        log_decay_H,
        state_SX,
        spans_B3,
        slots_B,
        out_THV,
        shape.value_heads,
        shape.key_heads,
        shape.key_width,
        shape.value_width,
        shape.channels,
        state_SX.shape[1],
        shape.channels * (shape.kernel - 1),
        shape.key_width**-0.5,
        K=triton.next_power_of_2(shape.key_width),
        V=COLUMNS,
        num_warps=1,
        enable_fp_fusion=False,
    )
