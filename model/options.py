"""How a model is to run, as plain values: what a backend is asked for, and the words of the settings that lead to it.

Standard library only: the settings of the engine and of the server use the same types.
"""

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16"]  # auto: the checkpoint's own
# int8, int4: activations in 8 bits too, on CPUs only.
Quantize = Literal["none", "int8", "int4", "int8-weights", "fp8-weights"]
KVCacheDType = Literal["auto", "int8"]  # auto: that of the weights
# all: every matrix but the routers; int4 of experts keeps the other matrices in int8
QuantizeLayers = Literal["experts", "all"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a backend needs to know beside the decoder."""

    block_size: int = 16  # tokens per block of the cache
    length: int = 0  # positions served; 0: the decoder's context
    quantize: Quantize = "none"
    quantize_layers: QuantizeLayers = "experts"
    kv_cache: KVCacheDType = "auto"
    threads: int = 0  # 0: as many as torch uses now, whose own stay as they are
    device: str = "cpu"  # as `devices.resolve` returns it
    ranks: int = 1  # processes among which the experts are divided
    dtype: str = ""  # of the weights, as torch names it; "": not known yet
