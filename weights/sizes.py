"""How many weights a folder has and what memory they take, from the headers of its safetensors files.

Torch-free, so that the HTTP process may use it. It reads no weights.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import CheckpointError
from model.options import DType
from weights.folder import open_regular

MAX_HEADER = 100 << 20
BYTES = {"float32": 4, "bfloat16": 2}  # by the dtype that the weights are kept in


class WeightSize(NamedTuple):
    """Of all tensors together."""

    parameters: int
    bytes: int


def weight_size(folder: Path, dtype: DType) -> WeightSize:
    """The size of a checkpoint's weights in a dtype; auto: as they are stored.

    Raises:
        CheckpointError: there are no safetensors files, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    parameters = stored = 0
    for tensor in (tensor for file in files for tensor in _tensors(file)):
        parameters += math.prod(tensor["shape"])
        stored += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return WeightSize(parameters, stored if dtype == "auto" else parameters * BYTES[dtype])


def _tensors(file: Path) -> list[dict[str, Any]]:
    try:
        with open_regular(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        return [entry for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
