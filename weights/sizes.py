"""How many weights a model has and what memory they take, from the headers of its weight files.

Torch-free, so that the HTTP process may use it. It reads no weights.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import CheckpointError
from model.options import DType
from weights.folder import is_gguf, open_regular
from weights.gguf.reader import GgufFile

MAX_HEADER = 100 << 20
BYTES = {"float32": 4, "bfloat16": 2}  # by the dtype that the weights are kept in


class WeightSize(NamedTuple):
    """Of all tensors together."""

    parameters: int
    bytes: int


def weight_size(model: Path, dtype: DType) -> WeightSize:
    """The size of a checkpoint's weights in a dtype; auto: as they are stored.

    Raises:
        CheckpointError: there are no weight files, or one is damaged.
    """
    sizes = _gguf(model) if is_gguf(model) else _safetensors(model)
    parameters = stored = 0
    for count, size in sizes:
        parameters += count
        stored += size
    return WeightSize(parameters, stored if dtype == "auto" else parameters * BYTES[dtype])


def _gguf(model: Path) -> Iterator[tuple[int, int]]:
    """Values and bytes of each tensor."""
    with GgufFile(model) as file:
        for entry in file.tensors.values():
            yield math.prod(entry.shape), entry.nbytes


def _safetensors(model: Path) -> Iterator[tuple[int, int]]:
    """Values and bytes of each tensor."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model} has no safetensors files")
    for tensor in (tensor for file in files for tensor in _tensors(file)):
        start, end = tensor["data_offsets"]
        yield math.prod(tensor["shape"]), end - start


def _tensors(file: Path) -> list[dict[str, Any]]:
    try:
        with open_regular(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        return [entry for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
