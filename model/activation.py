"""Element-wise activations by name. Nothing else."""

from torch import Tensor
from torch.nn import functional as F

from model.config import Activation


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply the named activation; `gelu_tanh` is GPT-2's approximation."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
