"""Element-wise activations by name."""

from torch import Tensor
from torch.nn import functional as F

from model.shapes.mixtures import Activation

CLAMP, STEEPNESS = 7.0, 1.702  # of gpt-oss


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply the named activation; `gelu_tanh` is GPT-2's approximation.

    Raises:
        ValueError: it is one of a gate and a value together.
    """
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
    raise ValueError(f"{name} needs a gate")


def activate_gated(gate: Tensor, up: Tensor, name: Activation) -> Tensor:
    """activation(gate) · up; `swiglu_clamped` is gpt-oss': both clamped, a steeper sigmoid, and up + 1."""
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return (up + 1) * (gate * (gate * STEEPNESS).sigmoid())
    return activate(gate, name) * up
