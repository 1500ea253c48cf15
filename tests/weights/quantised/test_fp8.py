"""FP8 with a scale per block: read as the products, to the bit, and refused where a part of it is missing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from tests.families import reference
from tests.model.tiny import whole_logits
from weights.dequantise import Tensors
from weights.files import TensorFiles
from weights.load import load_model
from weights.quantised.fp8 import scaled
from weights.save import tensors

BLOCK = (5, 7)
CONFIG: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*BLOCK]}


def blocks(matrix: Tensor) -> tuple[int, int]:
    return -(-matrix.shape[0] // BLOCK[0]), -(-matrix.shape[1] // BLOCK[1])


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values and the scales of their blocks."""
    scale, values = torch.empty(blocks(matrix)), torch.empty_like(matrix)
    for row, column in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
        at = slice(row * BLOCK[0], (row + 1) * BLOCK[0]), slice(column * BLOCK[1], (column + 1) * BLOCK[1])
        scale[row, column] = matrix[at].abs().max() / 448
        values[at] = matrix[at] / scale[row, column]
    return values.to(torch.float8_e4m3fn), scale


def products(values: Tensor, scale: Tensor) -> Tensor:
    """The definition, one element at a time."""
    rows, columns = torch.arange(values.shape[0]) // BLOCK[0], torch.arange(values.shape[1]) // BLOCK[1]
    return values.float() * scale[rows[:, None], columns]


def write(folder: Path, state: Mapping[str, Tensor], quantisation: object = CONFIG) -> dict[str, Tensor]:
    """A folder whose projections are in FP8; what it means."""
    stored, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if name.endswith(("proj.weight", "mqa.weight")):
            stored[name], stored[name + "_scale_inv"] = quantised(tensor)
            meant[name] = products(stored[name], stored[name + "_scale_inv"])
    save_file(stored, folder / "model.safetensors")
    config = folder / "config.json"
    raw = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(raw | {"quantization_config": quantisation}))
    return meant


def deepseek(folder: Path) -> dict[str, Tensor]:
    """A tiny DeepSeek-V3 as transformers saves it, in one file."""
    reference.save(reference.build("deepseek_v3", 0), folder)
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    return state


def said(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    return str(caught.value)


def test_a_deepseek_in_fp8_loads_as_its_products_to_the_bit(tmp_path: Path) -> None:
    meant = write(tmp_path, deepseek(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.dtype is torch.float8_e4m3fn for tensor in stored.values()) > 30
    model, _ = load_model(tmp_path)
    found = tensors(model, "deepseek_v3")
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in meant.items())
    assert whole_logits(model, reference.PROMPT, [3] * 2).isfinite().all()


def test_at_run_time_the_products_are_rounded_once(tmp_path: Path) -> None:
    meant = write(tmp_path, deepseek(tmp_path))
    found = tensors(load_model(tmp_path, "bfloat16")[0], "deepseek_v3")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(found[name], meant[name].bfloat16())


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (6, 7), (5, 8), (12, 20), (4, 30), (30, 4)])
def test_blocks_at_the_edges_may_be_smaller(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scale = quantised(matrix)
    assert torch.equal(scaled(values, scale, BLOCK), products(values, scale))
    torch.testing.assert_close(scaled(values, scale, BLOCK), matrix, rtol=1 / 16, atol=1e-3)


def test_stacked_matrices_have_stacked_scales() -> None:
    pairs = [quantised(torch.randn(12, 20)) for _ in range(3)]
    values, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    assert torch.equal(scaled(values, scale, BLOCK), torch.stack([products(*pair) for pair in pairs]))


def test_names_are_those_of_what_is_meant(tmp_path: Path) -> None:
    state = {"a_proj.weight": torch.randn(6, 8), "norm.weight": torch.ones(3).bfloat16()}
    meant = write(tmp_path, state)
    with TensorFiles(tmp_path) as files:
        found = Tensors(files, CONFIG)
        assert found.stored.keys() == meant.keys() and len(files.stored) == 3
        assert found.stored["a_proj.weight"].shape == (6, 8)
        assert all(torch.equal(found.read(name), tensor) for name, tensor in meant.items())
        target = torch.empty(6, 8)
        found.read_into("a_proj.weight", target)
        assert torch.equal(target, meant["a_proj.weight"])


def test_missing_scales_are_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path, deepseek(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    del stored[name + "_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors")
    assert said(tmp_path) == f"{name} is stored in FP8, but its scales, {name}_scale_inv, are missing"


def test_scales_of_nothing_are_extra(tmp_path: Path) -> None:
    state = deepseek(tmp_path)
    write(tmp_path, state)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    save_file(stored | {name: state[name]}, tmp_path / "model.safetensors")
    assert said(tmp_path).endswith(f"extra {name}_scale_inv")


def test_a_scale_per_block(tmp_path: Path) -> None:
    write(tmp_path, deepseek(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    save_file(stored | {name: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert said(tmp_path) == f"{name} has shape (2, 2), not (7, 3)"


def test_fp8_that_is_no_matrix(tmp_path: Path) -> None:
    write(tmp_path, {})
    save_file(
        {"x": torch.ones(3).to(torch.float8_e4m3fn), "x_scale_inv": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match="only matrices can be"):
        Tensors(files, CONFIG)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "other"}, "quantization_config does not say how: quant_method is 'other'; known: awq, "),
        ({"quant_method": None}, "quantization_config does not say how"),
        ({"quant_method": ["fp8"]}, "quantization_config does not say how"),
        ({"weight_block_size": None}, "its scales, .*weight_scale, are missing"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\], not \[rows, columns\]"),
        ({"weight_block_size": [0, 128]}, "not .rows, columns."),
        ({"weight_block_size": "128"}, "not .rows, columns."),
        ({"weight_block_size": [True, 128.0]}, "not .rows, columns."),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; known: 'e4m3'"),
        ({"other_field": 7}, "other_field is not known; it is 7"),
    ],
)
def test_a_config_that_does_not_describe_it(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path, {"a_proj.weight": torch.randn(6, 8)})
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match=words):
        Tensors(files, CONFIG | changes)


@pytest.mark.parametrize("given", [None, [], "fp8", 7])
def test_a_config_of_another_type(given: object, tmp_path: Path) -> None:
    write(tmp_path, {"a_proj.weight": torch.randn(6, 8)})
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match="quantization_config"):
        Tensors(files, given)
