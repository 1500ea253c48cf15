"""The tensors of a folder of safetensors files, quantised ones as what they mean, whatever format they are stored in.

Each format is a file of `weights/quantised/`. It does not depend on families or parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.grouped import Grouped
from weights.files import Stored, TensorFiles
from weights.quantised.awq import awq
from weights.quantised.compressed import compressed
from weights.quantised.fp8 import fp8
from weights.quantised.gptq import gptq
from weights.quantised.modelopt import modelopt
from weights.quantised.mxfp4 import mxfp4
from weights.quantised.tensor import QuantisedTensor

Finder = Callable[[Mapping[str, Stored], Mapping[str, Any]], dict[str, QuantisedTensor]]
FORMATS: dict[str, Finder] = {  # by config.json's quant_method
    "awq": awq,
    "compressed-tensors": compressed,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}
_PACKED = (".qweight", ".weight_packed", "_blocks")
# Scales of what is not a weight: inputs, keys and values are quantised as they come, or not at all.
_UNUSED = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)


class Tensors:
    """A `TensorSource` of one folder. Tensors are read one at a time."""

    def __init__(self, files: TensorFiles, quantisation: object = None) -> None:
        """`quantisation` is config.json's `quantization_config`.

        Raises:
            CheckpointError: a part of a tensor is missing or misshapen, or the config does not describe it.
        """
        self._files = files
        self._derived = _find(files.stored, quantisation)
        parts = {name for tensor in self._derived.values() for name in tensor.names}
        if self._derived:
            parts |= {name for name in files.stored if name.endswith(_UNUSED)}
        self.stored = {name: stored for name, stored in files.stored.items() if name not in parts}
        self.stored |= {name: tensor.stored for name, tensor in self._derived.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, ready to be copied into a parameter."""
        tensor = self._derived.get(name)
        if tensor is None:
            return self._files.read(name)
        return tensor.dense(*map(self._files.read, tensor.names))

    def read_into(self, name: str, target: Tensor) -> None:
        """One tensor that is stored as `target` is."""
        if name in self._derived:
            target.copy_(self.read(name))
        else:
            self._files.read_into(name, target)

    def grouped(self, name: str) -> Grouped | None:
        """See `TensorSource`."""
        tensor = self._derived.get(name)
        if tensor is None or tensor.grouped is None:
            return None
        return tensor.grouped(*map(self._files.read, tensor.names))


def _find(stored: Mapping[str, Stored], quantisation: object) -> dict[str, QuantisedTensor]:
    """The quantised tensors by the format that the config names.

    Raises:
        CheckpointError: there are some, and it names none that is known.
    """
    said = quantisation if isinstance(quantisation, dict) else {}
    method = said.get("quant_method")
    find = FORMATS.get(method) if isinstance(method, str) else None
    if find is not None:
        return find(stored, said)
    odd = [name for name, each in stored.items() if each.dtype is torch.float8_e4m3fn]
    integers = [name for name, each in stored.items() if each.dtype in (torch.uint8, torch.int8, torch.int32)]
    odd += [name for name in integers if name.endswith(_PACKED)]
    odd += integers if method is not None else []
    if odd:
        known = ", ".join(FORMATS)
        raise CheckpointError(
            f"{odd[0]} is quantised, but config.json's quantization_config does not say how: quant_method is"
            f" {method!r:.40}; known: {known}"
        )
    return {}
