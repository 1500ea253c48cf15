"""What is missing, misshapen or not known in a quantised checkpoint is refused with its name."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError
from tests.weights.quantised import configs, layouts
from tests.weights.quantised.layouts import Writer, opened
from tests.weights.quantised.test_formats import CASES, K, N, named


def refusal(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught, opened(folder, stored, config) as found:
        for name in found.stored:
            found.read(name)
    return str(caught.value)


I32, F16 = torch.int32, torch.float16
BROKEN: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("gptq", {"qzeros": None}, "a_proj is quantised, but a_proj.qzeros is missing"),
    ("gptq", {"scales": None}, "a_proj.scales is missing"),
    ("gptq", {"qweight": torch.zeros(32, 24)}, "a_proj.qweight has shape (32, 24) of torch.float32, not torch.int32"),
    ("gptq", {"qweight": torch.zeros(32, dtype=I32)}, "not 2 dimensions"),
    ("gptq", {"qweight": torch.zeros(32, 16, dtype=I32)}, "are no matrix of 4 or 8 bits in groups"),
    ("gptq", {"qweight": torch.zeros(0, 24, dtype=I32)}, "are no matrix of 4 or 8 bits in groups"),
    ("gptq", {"qzeros": torch.zeros(8, 2, dtype=I32)}, "are no matrix of 4 or 8 bits in groups"),
    ("gptq", {"scales": torch.zeros(0, 24, dtype=F16)}, "are no matrix of 4 or 8 bits in groups"),
    ("gptq", {"scales": torch.zeros(8, 0, dtype=F16)}, "are no matrix of 4 or 8 bits in groups"),
    ("gptq", {"g_idx": torch.zeros(24, dtype=I32)}, "a_proj.g_idx has shape (24,)"),
    ("gptq", {"g_idx": torch.full((256,), 8, dtype=I32)}, "a_proj.g_idx names groups outside 0 to 7"),
    ("gptq", {"g_idx": torch.full((256,), -1, dtype=I32)}, "a_proj.g_idx names groups outside 0 to 7"),
    ("awq", {"qzeros": None}, "a_proj.qzeros is missing"),
    ("awq", {"scales": torch.zeros(7, 24, dtype=F16)}, "are no matrix of 4 bits in groups of 32"),
    ("awq", {"qweight": torch.zeros(250, 3, dtype=I32)}, "are no matrix of 4 bits in groups of 32"),
    ("W4A16", {"weight_scale": None}, "a_proj.weight_scale is missing"),
    ("W4A16", {"weight_shape": None}, "a_proj.weight_shape is missing"),
    ("W4A16", {"weight_shape": torch.tensor([24, 250])}, "a_proj.weight_shape is [24, 250], not [24, 256]"),
    ("W4A16", {"weight_packed": torch.zeros(24, 31, dtype=I32)}, "a_proj.weight_packed has shape (24, 31)"),
    ("W4A16", {"weight_packed": torch.zeros(23, 32, dtype=I32)}, "a_proj.weight_packed has shape (23, 32)"),
    (
        "W4A16",
        {"weight_packed": torch.zeros(24, 0, dtype=I32), "weight_scale": torch.zeros(24, 0, dtype=F16)},
        "a_proj.weight_packed has shape (24, 0)",
    ),
    (
        "W4A16 per output",
        {"weight_packed": torch.zeros(24, 0, dtype=I32), "weight_scale": torch.zeros(24, 1, dtype=F16)},
        "a_proj.weight_packed has shape (24, 0)",
    ),
    ("W4A16", {"weight_g_idx": torch.zeros(3, dtype=I32)}, "a_proj.weight_g_idx has shape (3,)"),
    ("W4A16", {"weight_g_idx": torch.full((256,), 9, dtype=I32)}, "a_proj.weight_g_idx names groups outside 0 to 7"),
    (
        "W4A16 with zeros",
        {"weight_zero_point": torch.zeros(3, 1, dtype=I32)},
        "a_proj.weight_zero_point has shape (3,",
    ),
    ("W8A8", {"weight_scale": torch.ones(23, 1)}, "not one scale for all or one for each of 24 outputs"),
    (
        "W8A8 with zeros",
        {"weight_zero_point": torch.zeros(24, 1)},
        "has shape (24, 1) of torch.float32",
    ),
    ("NVFP4", {"weight_scale": None}, "a_proj.weight_scale is missing"),
    ("NVFP4", {"weight_scale_2": None}, "a_proj.weight_scale_2 is missing"),
    ("NVFP4", {"weight_scale_2": torch.ones(2)}, "a_proj.weight_scale_2 has shape (2,)"),
    ("NVFP4", {"weight_scale": torch.ones(24, 15).to(torch.float8_e4m3fn)}, "a_proj.weight_scale has shape (24, 15)"),
    (
        "MXFP4 by compressed-tensors",
        {"weight_scale": torch.ones(24, 7).byte()},
        "weight_scale has shape (24, 7)",
    ),
]


def test_one_group_of_no_inputs_is_refused(tmp_path: Path) -> None:
    shapes = {"qweight": (0, 3), "qzeros": (1, 3), "scales": (1, 24)}
    stored = {f"a_proj.{part}": torch.zeros(shape, dtype=I32) for part, shape in shapes.items()}
    stored["a_proj.scales"] = stored["a_proj.scales"].half()
    said = refusal(tmp_path, stored, configs.awq(group_size=-1))
    assert "are no matrix of 4 bits in groups" in said


@pytest.mark.parametrize(("name", "changes", "words"), BROKEN)
def test_what_is_missing_or_broken_is_named(
    name: str, changes: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    case = CASES[name]
    stored = named(case.write(N, K, 0)) | {f"a_proj.{part}": tensor for part, tensor in changes.items()}
    kept = {part: tensor for part, tensor in stored.items() if tensor is not None}
    assert words in refusal(tmp_path, kept, case.config)


COMPRESSED = partial(configs.compressed, "pack-quantized", num_bits=4, strategy="group", group_size=32)
CONFIGS: list[tuple[Writer, dict[str, Any], str]] = [
    (layouts.gptq, configs.gptq(bits=3), "bits is 3; known: 4, 8"),
    (layouts.gptq, configs.gptq(bits=8), "has 4 bits in groups of 32; config.json's quantization_config says bits 8"),
    (layouts.gptq, configs.gptq(group_size=64), "in groups of 32; .* group_size 64"),
    (layouts.gptq, configs.gptq(group_size="32"), "group_size is '32', not a number of inputs"),
    (layouts.gptq, configs.gptq(sym="yes"), "sym is 'yes'; known: True, False"),
    (layouts.gptq, configs.gptq(desc_act=1), "desc_act is 1; known"),
    (layouts.gptq, configs.gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; known: 'gptq', 'gptq_v2'"),
    (layouts.gptq, configs.gptq(pack_dtype="int64"), "pack_dtype is 'int64'"),
    (layouts.gptq, configs.gptq(is_marlin_format=True), "is_marlin_format is True; known: False"),
    (layouts.gptq, configs.gptq(new_field=[1]), "new_field is not known; it is .1."),
    (layouts.awq, configs.awq(bits=8), "bits is 8; known: 4"),
    (layouts.awq, configs.awq(version="gemv"), "version is 'gemv'; known: 'gemm'"),
    (layouts.awq, configs.awq(zero_point=False), "zero_point is False"),
    (layouts.awq, configs.awq(group_size=None), "group_size is None, not a number"),
    (layouts.awq, configs.awq(backend="llm-awq"), "backend is 'llm-awq'"),
    (layouts.packed, COMPRESSED(group_size=64), "as config_groups and scales of shape"),
    (layouts.packed, COMPRESSED(num_bits=6), "num_bits is 6; known: 4, 8"),
    (layouts.packed, COMPRESSED(num_bits=8, group_size=16), "weight_shape is .24, 256., not .24, 128."),
    (layouts.packed, COMPRESSED(type="lut"), "type is 'lut'; known: 'int', 'float'"),
    (layouts.packed, COMPRESSED(dynamic=True), "dynamic is True; known: False"),
    (layouts.packed, COMPRESSED(lut_size=5), "lut_size is not known; it is 5"),
    (layouts.packed, COMPRESSED({"format": "marlin-24"}), "format is 'marlin-24'; known: 'pack-quantized'"),
    (layouts.packed, COMPRESSED({"sparsity_config": {"format": "sparse-24-bitmask"}}), "format is 'sparse-24-bitmask'"),
    (layouts.packed, COMPRESSED({"transform_config": {"config_groups": {"u": {}}}}), "no transforms are known"),
    (layouts.packed, COMPRESSED({"sparsity_config": 16}), "sparsity_config is 16, not an object"),
    (layouts.packed, COMPRESSED({"transform_config": ["u"]}), "transform_config is .'u'., not an object"),
    (layouts.packed, COMPRESSED({"config_groups": [1]}), "config_groups is .1., not an object of objects"),
    (layouts.packed, COMPRESSED({"quantization_status": "initialized"}), "quantization_status is 'initialized'"),
    (layouts.nvfp4, configs.modelopt(quant_algo="W4A8_AWQ"), "quant_algo is 'W4A8_AWQ'; known: 'NVFP4', 'FP8'"),
    (layouts.nvfp4, configs.modelopt(group_size=32), "group_size is 32; known: 16"),
    (layouts.gptq, {"quant_method": "hqq"}, "a_proj.qweight is quantised, .* quant_method is 'hqq'; known: awq"),
    (layouts.int8, {"quant_method": "bitsandbytes"}, "a_proj.weight is quantised, .* 'bitsandbytes'"),
    (layouts.packed, {}, "a_proj.weight_packed is quantised, .* quant_method is None"),
]


@pytest.mark.parametrize(("write", "config", "words"), CONFIGS, ids=[words for _, _, words in CONFIGS])
def test_a_value_that_is_not_known_is_refused(
    write: Writer, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert re.search(words, refusal(tmp_path, named(write(N, K, 0)), config))
