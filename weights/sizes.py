"""How many weights a model has, what memory they take and how they are stored, from the headers of its weight files.

Torch-free, so that the HTTP process may use it. It reads no weights.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import CheckpointError, shown
from model.options import DType
from weights.calibration import REPAIR_FILE
from weights.folder import INDEX, PACKED, SINGLE, is_gguf, open_regular, read_json, weight_map
from weights.gguf.reader import GgufFile
from weights.gguf.types import FILE_TYPES

MAX_HEADER = 100 << 20
BYTES = {"float32": 4, "bfloat16": 2}  # by the dtype that the weights are kept in

# By how the names of quantised values end, how those of the tensors end that belong to them (`weights/quantised/`).
_BESIDE = {
    ".qweight": (".qzeros", ".scales", ".g_idx"),
    ".weight_packed": (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale"),
    ".weight": (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".input_scale"),
    "_blocks": ("_scales",),
}


class WeightSize(NamedTuple):
    """Of all tensors together."""

    parameters: int
    bytes: int


class WeightFiles(NamedTuple):
    """How the weights are stored."""

    format: str = "safetensors"  # or "gguf"
    type: str = ""  # of a GGUF file: "Q4_K_M" and the like
    bytes: int = 0  # of all tensors; 0: not known


class BytesPerWeight(NamedTuple):
    """The bytes that a weight takes on average as a model was loaded, scales and minima of groups included."""

    experts: float = 0.0  # of routed experts; 0: not known, or there are none
    others: float = 0.0  # of the others that every token reads


def weight_files(model: Path) -> WeightFiles:
    """How a model's weights are stored.

    Raises:
        CheckpointError: there are no weight files, or one is damaged.
    """
    size = weight_size(model, "auto").bytes
    return WeightFiles("gguf", _gguf_type(model), size) if is_gguf(model) else WeightFiles(bytes=size)


def _gguf_type(model: Path) -> str:
    """What the file says of its type; else the type of most values."""
    with GgufFile(model) as file:
        said = file.metadata.get("general.file_type")
        values: Counter[str] = Counter()
        for entry in file.tensors.values():
            values[entry.type.name] += math.prod(entry.shape)
    known = FILE_TYPES.get(said) if isinstance(said, int) else None
    return known or next((name for name, _ in values.most_common(1)), "")


def weight_size(model: Path, dtype: DType) -> WeightSize:
    """The size of a checkpoint's weights in a dtype; auto, or where they are packed: as they are stored.

    Raises:
        CheckpointError: there are no weight files, or one is damaged.
    """
    if (model / PACKED).exists():
        return _packed(model)
    sizes = _gguf(model) if is_gguf(model) else _safetensors(model)
    parameters = stored = 0
    for count, size in sizes:
        parameters += count
        stored += size
    return WeightSize(parameters, stored if dtype == "auto" else parameters * BYTES[dtype])


def _packed(model: Path) -> WeightSize:
    """Of a packed model, whose files have tensors of the same names."""
    parameters = read_json(model / PACKED).get("parameters")
    if type(parameters) is not int:
        raise CheckpointError(f"{PACKED}: parameters is {shown(parameters)}, no number")
    places = [entry["data_offsets"] for file in model.glob("part-*.safetensors") for entry in _tensors(file).values()]
    return WeightSize(parameters, sum(end - start for start, end in places))


def _gguf(model: Path) -> Iterator[tuple[int, int]]:
    """Values and bytes of each tensor."""
    with GgufFile(model) as file:
        for entry in file.tensors.values():
            yield math.prod(entry.shape), entry.nbytes


def _safetensors(model: Path) -> Iterator[tuple[int, int]]:
    """Values and bytes of each tensor; scales and zeros of quantised ones are bytes without values of their own."""
    tensors: dict[str, dict[str, Any]] = {}
    for file in _stored_files(model):
        tensors |= _tensors(file)
    beside = {
        name.removesuffix(end) + other for name in tensors for end in _BESIDE for other in _others(name, end, tensors)
    }
    for name, tensor in tensors.items():
        start, end = tensor["data_offsets"]
        yield 0 if name in beside else math.prod(tensor["shape"]) * _per_item(name, tensor, tensors), end - start


def _stored_files(model: Path) -> list[Path]:
    """The files that a load reads. (A repository may hold the weights once more in another layout.)"""
    if (model / INDEX).exists():
        return [model / name for name in sorted(set(weight_map(model).values()))]
    if (model / SINGLE).exists():
        return [model / SINGLE]
    files = sorted(file for file in model.glob("*.safetensors") if file.name != REPAIR_FILE)
    if not files:
        raise CheckpointError(f"{model} has no safetensors files")
    return files


def _others(name: str, end: str, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names end of what belongs to a tensor of quantised values, if this is one."""
    quantised = name.endswith(end) and (end != ".weight" or tensors[name]["dtype"] in ("F8_E4M3", "I8", "U8"))
    return _BESIDE[end] if quantised else ()


def _per_item(name: str, tensor: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    """How many values one item of a tensor holds. (What compressed-tensors packs is taken to have 4 bits.)"""
    if name.endswith(".qweight"):
        zeros, scales = (tensors.get(name.removesuffix("qweight") + other) for other in ("qzeros", "scales"))
        if zeros and scales and all(zeros["shape"]) and len(zeros["shape"]) == len(scales["shape"]) == 2:
            return int(scales["shape"][-1] // zeros["shape"][-1])
    if name.endswith(".weight_packed") and tensor["dtype"] == "I32":
        return 8
    packed = tensor["dtype"] == "U8" and name.endswith(("_blocks", ".weight_packed", ".weight"))
    return 2 if packed else 1


def _tensors(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with open_regular(file) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from None
