"""The native kernels as `benchmarks.layer` calls them: a whole mixture layer around given weights."""

from collections.abc import Callable

from torch import Tensor

from model.config import Infinity, TopK
from model.mixture.seam import Use


def native_layer(config: TopK | Infinity, parameters: dict[str, Tensor]) -> Callable[[Tensor, Use], Tensor] | None:
    """x_TD, use ↦ y_TD with the router included, around `parameters` (named as in the mixture's module, bf16), laid out
    for the kernel here and not in the call; None where there is no kernel for this config or machine."""
    return None
