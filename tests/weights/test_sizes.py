"""What weights take in memory, from the headers of their files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from weights.sizes import WeightSize, weight_size


def write(path: Path, **tensors: tuple[str, list[int], int]) -> None:
    """A safetensors file without its data: by name dtype, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, count) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count]}
        start += count
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)


def test_sizes_are_as_stored_or_as_the_dtype_says(tmp_path: Path) -> None:
    write(tmp_path / "model-1.safetensors", one=("BF16", [3, 5], 30), two=("F32", [2], 8))
    write(tmp_path / "model-2.safetensors", scale=("F32", [], 4))
    assert weight_size(tmp_path, "auto") == WeightSize(18, 42)
    assert weight_size(tmp_path, "float32") == WeightSize(18, 72)
    assert weight_size(tmp_path, "bfloat16") == WeightSize(18, 36)


@pytest.mark.parametrize("data", [b"", b"short", struct.pack("<Q", 9) + b"no header", struct.pack("<Q", 2) + b"[]"])
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        weight_size(tmp_path, "auto")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        weight_size(tmp_path, "auto")
