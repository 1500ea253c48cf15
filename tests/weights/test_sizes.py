"""What weights take in memory, from the headers of their files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from tests.weights.gguf.writer import blob, write_gguf
from weights.sizes import WeightFiles, WeightSize, weight_files, weight_size


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
    write(tmp_path / "repair.safetensors", scale=("F32", [3, 5], 60))  # no weights of the model
    assert weight_size(tmp_path, "auto") == WeightSize(18, 42)
    assert weight_size(tmp_path, "float32") == WeightSize(18, 72)
    assert weight_size(tmp_path, "bfloat16") == WeightSize(18, 36)


def test_only_files_that_are_loaded_count(tmp_path: Path) -> None:
    """Repositories may have the weights once more in another layout, or what is no file of weights yet."""
    write(tmp_path / "model.safetensors", one=("BF16", [3, 5], 30))
    (tmp_path / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert weight_files(tmp_path).bytes == 30
    write(tmp_path / "part.safetensors", one=("BF16", [3, 5], 30), two=("BF16", [2], 4))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"one": "part.safetensors", "two": "part.safetensors"}}))
    assert weight_size(tmp_path, "auto") == WeightSize(17, 34)
    index.write_text(json.dumps({"weight_map": {"one": "../part.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a safetensors file inside the folder"):
        weight_size(tmp_path, "auto")


@pytest.mark.parametrize(
    ("said", "type"), [(15, "Q4_K_M"), (12, "Q3_K_M"), (None, "Q8_0"), (1024, "Q8_0"), ("x", "Q8_0")]
)
def test_a_gguf_file_has_the_type_that_it_names_or_that_of_most_values(
    said: int | str | None, type: str, tmp_path: Path
) -> None:
    tensors = {"a": blob("Q8_0", (4, 64)), "b": blob("F32", (3, 3)), "c": blob("F32", (5, 5))}
    metadata = {} if said is None else {"general.file_type": said}
    path = write_gguf(tmp_path / "x.gguf", metadata, tensors)
    assert weight_files(path) == WeightFiles("gguf", type, weight_size(path, "auto").bytes)
    write(tmp_path / "model.safetensors", one=("BF16", [3, 5], 30))
    assert weight_files(tmp_path) == WeightFiles("safetensors", "", 30)


QUANTISED: dict[str, dict[str, tuple[str, list[int], int]]] = {
    "gptq": {".qweight": ("I32", [4, 24], 384), ".qzeros": ("I32", [1, 3], 12), ".scales": ("F16", [1, 24], 48)},
    "gptq in 8 bits": {
        ".qweight": ("I32", [8, 24], 768),
        ".qzeros": ("I32", [1, 6], 24),
        ".scales": ("F16", [1, 24], 48),
    },
    "awq": {".qweight": ("I32", [32, 3], 384), ".qzeros": ("I32", [1, 3], 12), ".scales": ("F16", [1, 24], 48)},
    "W4A16": {".weight_packed": ("I32", [24, 4], 384), ".weight_scale": ("F16", [24, 1], 48)},
    "FP8": {".weight": ("F8_E4M3", [24, 32], 768), ".weight_scale_inv": ("F32", [1, 1], 4)},
    "NVFP4": {".weight": ("U8", [24, 16], 384), ".weight_scale": ("F8_E4M3", [24, 2], 48)},
    "MXFP4": {"_blocks": ("U8", [1, 24, 1, 16], 384), "_scales": ("U8", [1, 24, 1], 24)},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_values_are_counted_and_their_scales_are_not(name: str, tmp_path: Path) -> None:
    tensors = QUANTISED[name]
    write(tmp_path / "model.safetensors", **{f"x{end}": tensor for end, tensor in tensors.items()})
    assert weight_size(tmp_path, "auto") == WeightSize(24 * 32, sum(size for _, _, size in tensors.values()))


@pytest.mark.parametrize("data", [b"", b"short", struct.pack("<Q", 9) + b"no header", struct.pack("<Q", 2) + b"[]"])
def test_damaged_files_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        weight_size(tmp_path, "auto")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        weight_size(tmp_path, "auto")
