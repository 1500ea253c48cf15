"""Which module computes which shape. The decoder asks here; a file in `attention/` or `moe/` registers its own.

Example:
    @module_for.register
    def _(shape: TopK, decoder: DecoderConfig) -> TopKMixture:
        return TopKMixture(decoder.width, shape)
"""

import importlib
import pkgutil
from functools import singledispatch
from types import ModuleType

from torch import Tensor, nn

from model.shapes.decoder import DecoderConfig
from model.step import LayerStep


class LayerModule(nn.Module):
    """A sublayer, attention or feed-forward: y_TD = f(x_TD)."""

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """Compute one step's rows."""
        raise NotImplementedError


@singledispatch
def module_for(shape: object, decoder: DecoderConfig) -> LayerModule:
    """The module, its parameters uninitialised, that computes a sublayer of this shape.

    Raises:
        TypeError: no module is registered for this kind of shape.
    """
    raise TypeError(f"no module computes layers of the kind {type(shape).__name__}")


def register_all(*packages: ModuleType) -> None:
    """Import every file of these packages, so that each registers its modules."""
    for package in packages:
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
