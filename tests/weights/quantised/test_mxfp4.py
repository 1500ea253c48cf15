"""MXFP4 experts, as gpt-oss is published: read as what they mean, to the bit, and refused where a part is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from model.decoder import Decoder
from model.errors import CheckpointError
from tests.model.tiny import randomise
from weights.config import decoder_config
from weights.load import load_model
from weights.quantised.mxfp4 import unpacked
from weights.save import save_model

RAW: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 96,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "quantization_config": {"quant_method": "mxfp4"},
    "dtype": "bfloat16",
}
EXPERTS = "model.layers.0.mlp.experts."


def meant(blocks: Tensor, scales: Tensor) -> Tensor:
    """The definition, half a byte at a time: sign, exponent biased by one, a bit of mantissa; [E, rows, columns]."""
    values = []
    of_each = scales[..., None].expand(blocks.shape).flatten().tolist()
    for byte, scale in zip(blocks.flatten().tolist(), of_each, strict=True):
        for code in (byte % 16, byte // 16):
            sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
            value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            values.append(sign * value * 2.0 ** (scale - 127))
    return torch.tensor(values).reshape(*blocks.shape[:2], -1)


def write(folder: Path, **changes: Tensor | None) -> dict[str, Tensor]:
    """A folder whose experts are in four bits, `changes` to the first layer's; what its experts mean, by parameter."""
    model = Decoder(decoder_config(RAW))
    randomise(model)
    save_model(model, RAW, folder, torch.bfloat16)
    stored, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 130, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
        ours = name.removeprefix("model.").replace("mlp.experts", "ffn").removesuffix("_proj")
        expected[ours] = meant(blocks, scales)
    given = {EXPERTS + name: tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in (stored | given).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return expected


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_experts_are_what_the_format_means(dtype: Any, tmp_path: Path) -> None:
    expected = write(tmp_path)
    model, _ = load_model(tmp_path, dtype)
    assert model.dtype is (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert expected.keys() == {f"layers.{layer}.ffn.{part}" for layer in (0, 1) for part in ("gate_up", "down")}
    for name, tensor in expected.items():
        assert torch.equal(model.get_parameter(name).float(), tensor)


def test_every_code_and_every_finite_scale() -> None:
    """The smallest are subnormal, and still exact; the last three scales go beyond what a float holds."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 1, 16).expand(16, 253, 1, 16)
    scales = torch.arange(253, dtype=torch.uint8).reshape(1, 253, 1).expand(16, 253, 1)
    found = unpacked(blocks, scales)
    assert torch.equal(found.transpose(-1, -2).float(), meant(blocks, scales))
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"down_proj_scales": None}, "its scales, .*down_proj_scales, are missing"),
        ({"down_proj_scales": torch.zeros(3, 32, 2, dtype=torch.uint8)}, "down_proj_scales has shape"),
        ({"down_proj_scales": torch.zeros(3, 32, 3)}, "down_proj_scales has shape .* of torch.float32"),
        ({"down_proj_blocks": torch.zeros(3, 32, 3, 8, dtype=torch.uint8)}, "down_proj_blocks has shape"),
        ({"down_proj_blocks": None}, "missing .*down_proj"),
        ({"down_proj_scales": torch.full((3, 32, 3), 255, dtype=torch.uint8)}, "down_proj has values that are not"),
    ],
)
def test_what_is_missing_or_broken_is_named(changes: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path)


def test_the_config_must_say_so(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"quantization_config": {"quant_method": "other"}}))
    with pytest.raises(CheckpointError, match=r"_blocks is quantised, .* quant_method is 'other'"):
        load_model(tmp_path)
