"""Writes small GGUF files, correct ones and, by its parts, wrong ones."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.gguf.types import TYPES

CODES = {kind.name: code for code, kind in TYPES.items()}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
FORMS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q"}


@dataclass(frozen=True)
class Blob:
    """A tensor as it is stored: the type's name or number, the shape with the last axis that of neighbours, its
    bytes."""

    type: str | int
    shape: tuple[int, ...]
    data: bytes


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def number_type(value: object) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return FLOAT32
    return INT32 if isinstance(value, int) and value < 0 else UINT32


def value_bytes(value: object) -> bytes:
    """The type and the value, as metadata has them."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + string(value)
    if isinstance(value, list):
        head = struct.pack("<I", ARRAY)
        if value and isinstance(value[0], str):
            return head + struct.pack("<IQ", STRING, len(value)) + b"".join(map(string, value))
        kind = max(map(number_type, value), default=UINT32)
        return head + struct.pack("<IQ", kind, len(value)) + b"".join(struct.pack(FORMS[kind], v) for v in value)
    kind = number_type(value)
    return struct.pack("<I", kind) + struct.pack(FORMS[kind], value)


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, Blob, int]], version: int = 3) -> bytes:
    """Everything before the padding; each tensor with its offset."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [string(key) + value_bytes(value) for key, value in metadata.items()]
    for name, blob, offset in tensors:
        code = CODES[blob.type] if isinstance(blob.type, str) else blob.type
        axes = len(blob.shape)
        parts.append(string(name) + struct.pack(f"<I{axes}QIQ", axes, *blob.shape[::-1], code, offset))
    return b"".join(parts)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Blob], version: int = 3) -> bytes:
    """A whole file."""
    alignment = metadata.get("general.alignment", 32)
    placed, data = [], b""
    for name, blob in tensors.items():
        data += bytes(-len(data) % alignment)
        placed.append((name, blob, len(data)))
        data += blob.data
    head = header_bytes(metadata, placed, version)
    return head + bytes(-len(head) % alignment) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Blob], version: int = 3) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, version))
    return path


def blob(kind: str, shape: tuple[int, ...], data: bytes | None = None) -> Blob:
    """A tensor of a type by name; of zeros without bytes."""
    block = TYPES[CODES[kind]]
    size = math.prod(shape) // block.values * block.bytes
    return Blob(kind, shape, bytes(size) if data is None else data)
