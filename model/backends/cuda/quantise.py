"""Weights of 8 bits for the GPU's matrix product: int8 or float8_e4m3fn, symmetric, one scale per output.

Rows and sums stay as they are. int8 holds the numbers of the CPU backend's "int8-weights". Not here: the arithmetic
with such weights (`kernels/gemm.py`), and which matrices a decoder has.
"""

from dataclasses import dataclass, replace

import torch

from model.backends.cuda.kernels.operands import WORD, Weight
from model.errors import CheckpointError
from model.options import Options, Quantize
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK

DTYPE = {"int8-weights": torch.int8, "fp8-weights": torch.float8_e4m3fn}
LARGEST = {"int8-weights": 127.0, "fp8-weights": 448.0}
TINY = 1e-30  # divides outputs whose weights are all 0
AT_ONCE = 1 << 24  # values that are float32 at a time


@dataclass(frozen=True, slots=True)
class Precision:
    """How a decoder's weights are kept: `quantize` holds for experts, and unless `experts_only` for every other matrix.

    Routers and the gates of shared experts are not to pass through here: they stay as they are.
    """

    quantize: Quantize = "none"
    experts_only: bool = True

    def experts(self, weight: Weight) -> Weight:
        """A weight of routed experts as it is kept."""
        return weight if self.quantize == "none" else quantised(weight, self.quantize)

    def linear(self, weight: Weight) -> Weight:
        """A weight that every token uses as it is kept: attention, dense layers, shared experts, the head."""
        return weight if self.experts_only else self.experts(weight)


AS_LOADED = Precision()


def precision_for(options: Options) -> Precision:
    """The precision that `refusal` let pass."""
    return Precision(options.quantize, options.quantize_layers == "experts")


def refusal(config: DecoderConfig, options: Options) -> str | None:
    """Why the GPU's kernels cannot keep this decoder's weights in this way, or None."""
    kind, layers = options.quantize, options.quantize_layers
    if kind == "none":
        return None
    if kind in ("int8", "int4"):
        return (
            f"quantize {kind} multiplies in 8 bits, for which there is no GPU kernel: use int8-weights or fp8-weights"
        )
    if kind not in DTYPE or layers not in ("experts", "all"):
        return f"quantize {kind} of {layers}"
    for shape in config.mixtures:
        if type(shape) is not TopK:
            return f"quantize {kind} has no GPU kernel for layers of the kind {type(shape).__name__}"
    for attention in config.attention:
        if layers == "all" and type(attention) is not Attention:
            name = type(attention).__name__
            return f"quantize {kind} of all layers has no GPU kernel for layers of the kind {name}: use experts"
    return None


def quantised(weight: Weight, kind: Quantize) -> Weight:
    """The weight in 8 bits, on its device: the largest magnitude of an output becomes the format's largest number.

    The given values are left as they are; few of them are widened at a time.

    Raises:
        CheckpointError: rows are no whole number of words.
    """
    experts, outputs, inner = weight.values_EOD.shape
    if inner % WORD:
        raise CheckpointError(f"quantize {kind}: {inner} inputs of a matrix are not a multiple of {WORD}")
    values_EOD = weight.values_EOD.new_empty(weight.values_EOD.shape, dtype=DTYPE[kind])
    scale_EO = weight.values_EOD.new_empty(experts, outputs, dtype=torch.float32)
    rows = max(1, AT_ONCE // inner)
    parts = (tensor.flatten(0, 1).split(rows) for tensor in (weight.values_EOD, values_EOD))
    for given_rD, values_rD, scale_r in zip(*parts, scale_EO.flatten().split(rows), strict=True):
        wide_rD = given_rD.float()
        torch.div(wide_rD.abs().amax(-1), LARGEST[kind], out=scale_r)
        scaled_rD = wide_rD / scale_r.clamp(min=TINY)[:, None]
        values_rD.copy_(scaled_rD.round() if kind == "int8-weights" else scaled_rD)
    return replace(weight, values_EOD=values_EOD, scale_EO=scale_EO)
