"""The activations of `model/activation.py` on tiles of float32, for the kernels that end in one."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(x, name: tl.constexpr):
    if name == "silu":
        x = x * tl.sigmoid(x)
    elif name == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif name == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif name == "relu":
        x = tl.maximum(x, 0.0)
    else:
        tl.static_assert(name == "none", "an activation that the kernels do not know")
    return x


@triton.jit
def activate_gated(gate, up, name: tl.constexpr):
    if name == "swiglu_clamped":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        gate = gate * tl.sigmoid(1.702 * gate)
    else:
        gate = activate(gate, name)
    return gate * up
