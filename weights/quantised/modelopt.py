"""NVIDIA's ModelOpt: NVFP4 and FP8.

NVFP4: `X.weight` uint8 [n, k / 2], `X.weight_scale` E4M3 [n, k / 16] and one float, `X.weight_scale_2`; all multiply.
FP8: `X.weight` E4M3, `X.weight_scale` one float.
"""

from collections.abc import Mapping
from typing import Any

import torch

from weights.files import Stored
from weights.quantised.config import expect, refuse_unknown
from weights.quantised.fp8 import fp8_matrices
from weights.quantised.nvfp4 import GROUP, nvfp4
from weights.quantised.tensor import QuantisedTensor

_FIELDS = """quant_method quant_algo producer config_groups ignore exclude_modules group_size kv_cache_scheme
kv_cache_quant_algo quantized_layers has_zero_point pre_quant_scale"""
FIELDS = frozenset(_FIELDS.split())


def modelopt(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """Every quantised matrix.

    Raises:
        CheckpointError: a part is missing or misshapen, or the config has a value that is not known.
    """
    refuse_unknown(quantisation, FIELDS)
    algorithm = expect(quantisation, "quant_algo", "NVFP4", "FP8", "MIXED_PRECISION")
    expect(quantisation, "group_size", GROUP, default=GROUP)
    for field in ("has_zero_point", "pre_quant_scale"):
        expect(quantisation, field, False, default=False)
    found = {}
    if algorithm != "FP8":
        packed = [name for name, each in stored.items() if name.endswith(".weight") and each.dtype is torch.uint8]
        found = {name: nvfp4(name.removesuffix("weight"), "weight", "weight_scale_2", stored) for name in packed}
    scales = {names for tensor in found.values() for names in tensor.names}
    others = {name: each for name, each in stored.items() if name not in scales}
    return found | fp8_matrices(others, None, "_scale")
