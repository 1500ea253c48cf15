"""The CPU backend: native kernels, for the decoders that they are written for (`model/backends/cpu/refusal.py`)."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from model.attention.attention import SelfAttention
from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.attention.mla import MLAAttention
from model.backends.cpu.calls import OpCall, calls_of, layout
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.provide import provide
from model.backends.cpu.kernels.threads import use
from model.backends.cpu.refusal import refusal
from model.backends.cpu.weights import Precision, precision_for
from model.decoder import Decoder
from model.layers import DenseFFN
from model.moe.topk import TopKMixture
from model.options import Options
from model.shapes.decoder import DecoderConfig

GROUPED: dict[type[nn.Module], tuple[str, ...]] = {  # by module, the weights that are packed as they are stored
    Decoder: ("head.weight",),
    SelfAttention: ("qkv.weight", "out.weight"),
    MLAAttention: ("query.weight", "out.weight"),
    GatedDeltaNetAttention: ("project.weight", "out.weight"),
    DenseFFN: ("up.weight", "down.weight"),
    TopKMixture: ("gate_up", "down"),
}


class CpuBackend:
    """Runs a decoder as one program of native kernels."""

    def provide(self) -> None:
        """Load the kernels, or compile them first where an installation brought none that fit."""
        provide()

    def refusal(self, config: DecoderConfig, options: Options) -> str | None:
        """Why there are no kernels on this machine, or none for this decoder."""
        return load().reason or refusal(config, options)

    def groups(self, decoder: Decoder) -> Collection[str]:
        """What `GROUPED` says of the decoder's modules."""
        return [
            f"{place}.{name}".removeprefix(".")
            for place, module in decoder.named_modules()
            for name in GROUPED.get(type(module), ())
            if name != "head.weight" or not decoder.config.tied
        ]

    def prepare(self, decoder: Decoder, options: Options) -> NativeDecoder:
        """The weights are taken over. The kernels get the threads; torch keeps one, since what is left to it is small
        and a second pool's threads would be in the way."""
        length = options.length or decoder.config.context
        use(options.threads or torch.get_num_threads())  # first: weights are placed where their threads are
        native = NativeDecoder(
            decoder, length, options.quantize, options.quantize_layers == "experts", options.kv_cache
        )
        if options.threads:
            torch.set_num_threads(1)
        return native

    def calls(self, decoder: Decoder, options: Options) -> Iterator[OpCall]:
        """What builds the program of a decoder for all of its context. The weights are taken over."""
        return calls_of(decoder, decoder.config.context, _precision(decoder.dtype, options))

    def layout(self) -> str:
        """See `calls.layout`."""
        return layout()

    def start(
        self, config: DecoderConfig, dtype: torch.dtype, parameters: int, calls: Iterable[OpCall], options: Options
    ) -> NativeDecoder:
        """The decoder that such calls build, which were kept. Raises as `calls.built`."""
        use(options.threads or torch.get_num_threads())
        precision = _precision(dtype, options)
        native = NativeDecoder.of_calls(config, dtype, parameters, precision, calls, options.kv_cache)
        if options.threads:
            torch.set_num_threads(1)
        return native


def _precision(dtype: torch.dtype, options: Options) -> Precision:
    return precision_for(dtype, options.quantize, options.quantize_layers == "experts")
