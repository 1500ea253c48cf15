"""Tiny checkpoints made by GPTQModel, AutoAWQ and compressed-tensors have the logits of what these packages themselves
dequantise. `make test-quantised-formats` runs this in a venv with these packages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.reference import PROMPT
from tests.model.tiny import whole_logits
from tests.quantised_formats.packages import autoawq, compressed, gptqmodel
from tests.weights.quantised.layouts import Writer
from tests.weights.quantised.test_models import OLMOE, QWEN, matrices, widened, write
from weights.groups import kept_as
from weights.load import load_model

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
MODELS = {"qwen3_moe": QWEN | WIDE | {"moe_intermediate_size": 128, "head_dim": 32}, "olmoe": OLMOE | WIDE}
ALL = [4, 4]  # experts: a choice of some could change where two are nearly equal
Maker = Callable[[], tuple[Writer, dict[str, Any]]]
CASES: dict[str, tuple[Maker, str]] = {
    "gptqmodel v1": (partial(gptqmodel, 4, 128, True, 1), "int4 g128"),
    "gptqmodel v1 with zeros": (partial(gptqmodel, 4, 32, False, 1), "int4 g32 with minimum"),
    "gptqmodel v2 with zeros": (partial(gptqmodel, 4, 64, False, 2), "int4 g64 with minimum"),
    "gptqmodel per output": (partial(gptqmodel, 4, -1, True, 1), "int4 g128"),
    "gptqmodel in 8 bits": (partial(gptqmodel, 8, 128, True, 1), "int8 g128"),
    "autoawq": (partial(autoawq, 128), "int4 g128 with minimum"),
    "W4A16": (partial(compressed, "W4A16", "pack-quantized"), "int4 g128"),
    "W4A16 in groups of 32": (partial(compressed, "W4A16", "pack-quantized", group_size=32), "int4 g32"),
    "W4A16 with zeros": (partial(compressed, "W4A16_ASYM", "pack-quantized"), "int4 g128 with minimum"),
    "W8A16": (partial(compressed, "W8A16", "pack-quantized"), "int8 g128"),
    "W8A8": (partial(compressed, "W8A8", "int-quantized"), "int8 g128"),
    "FP8": (partial(compressed, "FP8_DYNAMIC", "float-quantized"), "int8 g128"),
    "FP8 in blocks": (partial(compressed, "FP8_BLOCK", "float-quantized"), "int8 g128"),
    "NVFP4": (partial(compressed, "NVFP4", "nvfp4-pack-quantized"), "fp4 g16"),
    "MXFP4": (partial(compressed, "MXFP4", "mxfp4-pack-quantized"), "fp4 g32"),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_those_of_the_package(name: str, family: str, tmp_path: Path) -> None:
    """The packages round products to float16, or of FP4 to bfloat16."""
    maker, form = CASES[name]
    writer, config = maker()
    write(tmp_path, MODELS[family], lambda _: writer, config)
    plain, dense = (load_model(tmp_path / place)[0] for place in ("plain", "quantised"))
    for parameter, meant in plain.named_parameters():
        found = dense.get_parameter(parameter)
        torch.testing.assert_close(found, meant, rtol=2**-8 if "FP4" in name else 2**-10, atol=1e-7)
    kept, _ = load_model(tmp_path / "quantised", keep_groups=matrices)
    assert kept_as(kept) == form
    expected = whole_logits(plain, PROMPT, ALL)
    assert expected.std() > 0.1
    near = 0.1 if name.startswith("FP8") else 0.02
    for model in (dense, widened(kept)):
        torch.testing.assert_close(whole_logits(model, PROMPT, ALL), expected, atol=near, rtol=0)
