"""Every format of quantised matrices: what is loaded is what the format means, widened and in groups."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.weights.quantised import configs, layouts
from tests.weights.quantised.layouts import Writer, Written, opened
from weights.forms import Form

HALF = 2.0**-11  # relative error of a float16


class Case(NamedTuple):
    """A format at one of its settings, and how it is kept: the form, and the error in steps of a code."""

    write: Writer
    config: dict[str, Any]
    form: str
    steps: float = 0.0


CASES = {
    "gptq": Case(layouts.gptq, configs.gptq(), "int4 g32"),
    "gptq v2": Case(partial(layouts.gptq, version=2), configs.gptq(checkpoint_format="gptq_v2"), "int4 g32"),
    "gptq g128": Case(partial(layouts.gptq, group=128), configs.gptq(group_size=128), "int4 g128"),
    "gptq g256": Case(partial(layouts.gptq, group=256), configs.gptq(group_size=256), "int4 g128"),
    "gptq per output": Case(partial(layouts.gptq, group=-1), configs.gptq(group_size=-1), "int4 g128"),
    "gptq with zeros": Case(
        partial(layouts.gptq, symmetric=False), configs.gptq(sym=False), "int4 g32 with minimum", 16 * HALF
    ),
    "gptq v2 with zeros": Case(
        partial(layouts.gptq, symmetric=False, version=2),
        configs.gptq(sym=False, checkpoint_format="gptq_v2"),
        "int4 g32 with minimum",
        16 * HALF,
    ),
    "gptq in 8 bits": Case(partial(layouts.gptq, bits=8), configs.gptq(bits=8), "int8 g32"),
    "gptq in 8 bits with zeros": Case(
        partial(layouts.gptq, bits=8, symmetric=False),
        configs.gptq(bits=8, sym=False),
        "int8 g32 with minimum",
        128 * HALF,
    ),
    "gptq of several bits": Case(
        partial(layouts.gptq, bits=8), configs.gptq(dynamic={"+:.*": {"bits": 8}}), "int8 g32"
    ),
    "awq": Case(layouts.awq, configs.awq(), "int4 g32 with minimum", 16 * HALF),
    "awq, older names": Case(
        partial(layouts.awq, group=64),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        "int4 g64 with minimum",
        16 * HALF,
    ),
    "W4A16": Case(
        layouts.packed, configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32), "int4 g32"
    ),
    "W4A16 per output": Case(
        partial(layouts.packed, group=-1), configs.compressed("pack-quantized", num_bits=4), "int4 g128"
    ),
    "W4A16 with zeros": Case(
        partial(layouts.packed, symmetric=False, group=128),
        configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=128, symmetric=False),
        "int4 g128 with minimum",
        16 * HALF,
    ),
    "W4A16 per output with zeros": Case(
        partial(layouts.packed, symmetric=False, group=-1, dtype=torch.float32),
        configs.compressed("pack-quantized", num_bits=4, symmetric=False),
        "int4 g128 with minimum",
    ),
    "W8A16": Case(partial(layouts.packed, bits=8, group=-1), configs.compressed("pack-quantized"), "int8 g128"),
    "W8A8": Case(layouts.int8, configs.compressed("int-quantized"), "int8 g128"),
    "W8A8 with zeros": Case(
        partial(layouts.int8, symmetric=False),
        configs.compressed("int-quantized", symmetric=False),
        "int8 g128 with minimum",
    ),
    "NVFP4": Case(layouts.nvfp4, configs.modelopt(), "fp4 g16"),
    "NVFP4 by compressed-tensors": Case(
        partial(layouts.nvfp4, compressed=True),
        configs.compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "fp4 g16",
    ),
    "MXFP4 by compressed-tensors": Case(
        layouts.mxfp4,
        configs.compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        "fp4 g32",
    ),
}
FP8 = {
    "per output": Case(layouts.fp8, configs.compressed("float-quantized", type="float"), "int8 g128"),
    "for all": Case(partial(layouts.fp8, scales_shape=()), configs.modelopt(quant_algo="FP8"), "int8 g128"),
    "not in blocks": Case(partial(layouts.fp8, scales_shape=(1,)), configs.FP8, "int8 g128"),
    "fbgemm": Case(layouts.fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "int8 g128"),
}
N, K = 24, 256


def named(written: Written) -> dict[str, Tensor]:
    return {f"a_proj.{name}": tensor for name, tensor in written.stored.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_matrix_is_what_its_format_means(case: Case, tmp_path: Path) -> None:
    written = case.write(N, K, 0)
    with opened(tmp_path, named(written) | {"norm.weight": torch.ones(3)}, case.config) as found:
        assert found.stored.keys() == {"a_proj.weight", "norm.weight"}
        assert found.stored["a_proj.weight"].shape == (N, K) and found.grouped("norm.weight") is None
        dense, kept = found.read("a_proj.weight"), found.grouped("a_proj.weight")
        size = found.stored["a_proj.weight"].grouped
    assert torch.equal(dense.double(), written.meant.float().double())
    assert kept is not None and str(Form.of(kept)) == case.form
    assert kept.nbytes <= size <= kept.nbytes + 4 * N  # factors are counted where they may be needed
    if case.steps:
        assert 0 < (kept.dense() - dense).abs().max() < case.steps * layouts.LARGEST
    else:
        assert torch.equal(kept.dense(), dense)


@pytest.mark.parametrize("case", FP8.values(), ids=FP8.keys())
def test_fp8_is_kept_in_255_steps_of_the_largest_of_128(case: Case, tmp_path: Path) -> None:
    written = case.write(N, K, 0)
    with opened(tmp_path, named(written), case.config) as found:
        dense, kept = found.read("a_proj.weight"), found.grouped("a_proj.weight")
        size = found.stored["a_proj.weight"].grouped
    assert torch.equal(dense.double(), written.meant.float().double())
    assert kept is not None and str(Form.of(kept)) == case.form and kept.nbytes == size
    steps = dense.view(N, -1, 128).abs().amax(-1, keepdim=True) / 127
    assert ((kept.dense() - dense).view(N, -1, 128).abs() <= 0.57 * steps).all()


def test_blocks_of_fp8_by_compressed_tensors(tmp_path: Path) -> None:
    written = layouts.fp8(256, 128, 0, ())
    scales = torch.tensor([[0.5], [3.0]])
    meant = written.stored["weight"].float() * scales.repeat_interleave(128, 0)
    config = configs.compressed("float-quantized", type="float", strategy="block", block_structure=[128, 128])
    with opened(tmp_path, named(written) | {"a_proj.weight_scale": scales}, config) as found:
        assert torch.equal(found.read("a_proj.weight"), meant)


@pytest.mark.parametrize("k", [8, 24])
def test_too_few_inputs_for_groups_are_widened(k: int, tmp_path: Path) -> None:
    written = layouts.packed(4, k, 0, group=-1)
    with opened(tmp_path, named(written), configs.compressed("pack-quantized", num_bits=4)) as found:
        assert found.grouped("a_proj.weight") is None and found.stored["a_proj.weight"].grouped == 0
        assert torch.equal(found.read("a_proj.weight").double(), written.meant)


@pytest.mark.parametrize("static", [False, True])
def test_groups_of_permuted_inputs_are_widened(static: bool, tmp_path: Path) -> None:
    """GPTQ's desc_act; with static_groups the order is undone before the file is written."""
    written = layouts.gptq(16, 64, 0)
    config = configs.gptq(desc_act=True, static_groups=static)
    if not static:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        groups = written.stored["g_idx"][order]
        written.stored["g_idx"] = groups
        codes = torch.from_numpy(layouts.unpacked_rows(written.stored["qweight"].numpy()))
        written.meant = (codes - 8).T * written.stored["scales"].double().T[:, groups.long()]
    with opened(tmp_path, named(written), config) as found:
        kept = found.grouped("a_proj.weight")
        assert (kept is not None) is static and (found.stored["a_proj.weight"].grouped > 0) is static
        assert torch.equal(found.read("a_proj.weight").double(), written.meant)


def test_zeros_of_a_symmetric_file_need_no_minimum_whatever_it_says(tmp_path: Path) -> None:
    written = layouts.gptq(16, 64, 0)
    with opened(tmp_path, named(written), configs.gptq(sym=False)) as found:
        kept = found.grouped("a_proj.weight")
    assert kept is not None and str(Form.of(kept)) == "int4 g32"


def test_scales_beyond_float16_are_shifted_by_a_power_of_two(tmp_path: Path) -> None:
    written = layouts.packed(16, 64, 0)
    written.stored["weight_scale"] *= 2.0**-20
    written.stored["weight_scale"][3] *= 2.0**40
    meant = written.meant * 2.0**-20
    meant[3] *= 2.0**40
    config = configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)
    with opened(tmp_path, named(written), config) as found:
        kept = found.grouped("a_proj.weight")
    assert kept is not None and torch.equal(kept.dense().double(), meant)


ZEROS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gptq": (partial(layouts.gptq, symmetric=False), configs.gptq(sym=False)),
    "gptq, by a rule": (partial(layouts.gptq, symmetric=False), configs.gptq(dynamic={"+:.*": {"sym": False}})),
    "gptq in 8 bits": (partial(layouts.gptq, bits=8, symmetric=False), configs.gptq(bits=8, sym=False)),
    "awq": (layouts.awq, configs.awq()),
    "W4A16": (
        partial(layouts.packed, symmetric=False),
        configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
}
BEYOND_HALF: dict[str, tuple[Writer, dict[str, Any], float, torch.dtype]] = {
    "gptq, scales": (layouts.gptq, configs.gptq(), 1.001, torch.float32),
    "W4A16, scales": (
        layouts.packed,
        configs.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
        1e8,
        torch.bfloat16,
    ),
}
BEYOND_HALF |= {f"{name}, minima": (*case, 1e6, torch.float16) for name, case in ZEROS.items()}


@pytest.mark.parametrize("name", BEYOND_HALF)
def test_bytes_are_said_that_only_scales_tell(name: str, tmp_path: Path) -> None:
    """Scales, or products of zeros and scales, that float16 does not hold have factors."""
    write, config, times, dtype = BEYOND_HALF[name]
    stored = named(write(N, 64, 0))
    scales = next(part for part in stored if part.endswith(("scales", "weight_scale")))
    stored[scales] = (stored[scales].float() * times).to(dtype)
    with opened(tmp_path, stored, config) as found:
        kept, said = found.grouped("a_proj.weight"), found.stored["a_proj.weight"].grouped
    assert kept is not None and kept.factors is not None
    assert kept.nbytes == said


def test_scales_of_activations_and_caches_are_not_used(tmp_path: Path) -> None:
    others = {f"a_proj.{name}": torch.ones(()) for name in ("input_scale", "k_scale", "v_scale")}
    with opened(tmp_path, named(layouts.nvfp4(16, 64, 0)) | others, configs.modelopt()) as found:
        assert found.stored.keys() == {"a_proj.weight"}
