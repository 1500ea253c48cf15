"""Bytes and FLOPs of one token of a decoder, from its shapes. Attention over the context is left out: no count changes
it. It measures nothing."""

from dataclasses import dataclass

import torch

from model.backends.cpu.kernels.quantise import quantise_int4
from model.decoder import parameter_count
from model.encoder_decoder import decoder_of
from model.options import Quantize, QuantizeLayers
from model.shapes.decoder import DecoderConfig
from model.shapes.work import TokenWork
from weights.sizes import BytesPerWeight

INPUTS = 4096  # of a typical matrix, over which a factor per output is divided


@dataclass(frozen=True, slots=True)
class Weights:
    """How many bytes a weight takes on average."""

    experts: float
    others: float

    @classmethod
    def of(cls, loaded: BytesPerWeight, quantize: Quantize, layers: QuantizeLayers) -> "Weights":
        """Of weights that were loaded so, and then quantised. The scales of int8, one per output, are left out."""
        if quantize == "none":
            return cls(loaded.experts or loaded.others, loaded.others)
        experts = int4_bytes() if quantize == "int4" else 1
        if layers == "all":
            return cls(experts, experts)
        return cls(experts, 1 if quantize == "int4" else loaded.others)


def int4_bytes() -> float:
    """What --quantize int4 makes of one weight, with its share of scales."""
    return quantise_int4(torch.zeros(1, INPUTS)).nbytes / INPUTS


@dataclass(frozen=True, slots=True)
class DecoderWork:
    """The work of one token in a decoder."""

    config: DecoderConfig
    outside: int  # weights that every token reads outside the mixtures

    @classmethod
    def of(cls, config: DecoderConfig) -> "DecoderWork":
        """All but the mixtures, and but an embedding that is no head: of it a token reads one row."""
        with torch.device("meta"):
            decoder = decoder_of(config)
        outside = parameter_count(decoder)
        for layer, shape in zip(decoder.layers, config.feed_forward, strict=True):
            outside -= parameter_count(layer.get_submodule("ffn")) if shape.num_experts else 0
        return cls(config, outside if config.tied else outside - config.width * (config.vocabulary - 1))

    def bytes_per_token(self, counts: tuple[float, ...], weights: Weights) -> float:
        """Of weights read for one token alone; `counts` per MoE layer."""
        layers = self._layers(counts)
        shared = self.outside + sum(work.shared for work in layers)
        return shared * weights.others + sum(work.routed for work in layers) * weights.experts

    def flops_per_token(self, counts: tuple[float, ...]) -> float:
        """Two for each multiplication and its addition."""
        return 2 * (self.outside + sum(work.multiplications for work in self._layers(counts)))

    def _layers(self, counts: tuple[float, ...]) -> list[TokenWork]:
        shapes = zip(self.config.mixtures, counts, strict=True)
        return [shape.token_work(self.config.width, count) for shape, count in shapes]
