"""Matrices quantised and packed by the packages that people quantise with, and what these packages say they mean.

Each function makes a `Writer` and the `quantization_config` that its package writes. AutoAWQ's package does not import
beside today's transformers; the files that pack are imported without it.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import FORMAT, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from torch import Tensor, nn

from tests.weights.quantised.layouts import Writer, Written


def random_linear(n: int, k: int, seed: int) -> nn.Linear:
    linear = nn.Linear(k, n, bias=False)
    generator = torch.Generator().manual_seed(seed)
    linear.weight.data = torch.randn(n, k, generator=generator) * k**-0.5
    return linear


def limits(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of each group of inputs the smallest and the largest value, or zero."""
    split = weight.reshape(len(weight), -1, group)
    return split.amin(-1).clamp(max=0), split.amax(-1).clamp(min=0)


def affine(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [n, groups] of rounding to the nearest."""
    low, high = limits(weight, group)
    most = (1 << bits) - 1
    if symmetric:
        scales = torch.maximum(-low, high) * 2 / most
        return scales, torch.full_like(scales, 1 << bits - 1).int()
    scales = (high - low) / most
    return scales, (-low / scales).round().clamp(0, most).int()


def gptqmodel(bits: int, group: int, symmetric: bool, version: int) -> tuple[Writer, dict[str, Any]]:
    config = QuantizeConfig(
        bits=bits, group_size=group, sym=symmetric, format=FORMAT.GPTQ if version == 1 else FORMAT.GPTQ_V2
    )

    def write(n: int, k: int, seed: int) -> Written:
        linear = random_linear(n, k, seed)
        run = k if group == -1 else group
        scales, zeros = affine(linear.weight.data, bits, run, symmetric)
        module = TorchLinear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=False,
            in_features=k,
            out_features=n,
            bias=False,
            pack_dtype=torch.int32,
            register_buffers=True,
        )
        module.pack_block(linear, scales, zeros, (torch.arange(k) // run).int())
        module.post_init()
        meant = module.dequantize_weight().T.float()
        if version == 1:
            convert_gptq_v2_to_v1_format_module(module, config)
        names = ("qweight", "qzeros", "scales", "g_idx")
        return Written({name: getattr(module, name).data.clone() for name in names}, meant)

    return write, config.to_dict()


def autoawq(group: int) -> tuple[Writer, dict[str, Any]]:
    for name in ("awq", "awq.models", "awq.modules", "awq.modules.linear"):
        if name not in sys.modules:
            sys.modules[name] = module = ModuleType(name)
            module.__path__ = [str(_awq() / Path(*name.split(".")[1:]))]
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    def write(n: int, k: int, seed: int) -> Written:
        linear = random_linear(n, k, seed)
        scales, zeros = affine(linear.weight.data, 4, group, symmetric=False)
        module = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        meant = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group).T.float()
        return Written({name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales")}, meant)

    return write, AwqConfig(q_group_size=group).to_transformers_dict()


def _awq() -> Path:
    return next(Path(place) / "awq" for place in sys.path if (Path(place) / "awq" / "modules").is_dir())


def compressed(preset: str, format: str, **changes: Any) -> tuple[Writer, dict[str, Any]]:
    """A preset of compressed-tensors, with changes to how it keeps weights."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = scheme.weights.model_copy(update=changes)
    scheme.format = format
    compressor = BaseCompressor.get_value_from_registry(format)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=format, quantization_status=QuantizationStatus.COMPRESSED
    )

    def write(n: int, k: int, seed: int) -> Written:
        weight = random_linear(n, k, seed).weight.data
        stored = compressor.compress({"weight": weight, **_parameters(weight, scheme.weights)}, scheme)
        meant = compressor.decompress(dict(stored), scheme)["weight"].float()
        return Written({name: tensor.clone() for name, tensor in stored.items()}, meant)

    return write, config.to_dict()


def _parameters(weight: Tensor, args: Any) -> dict[str, Tensor]:
    """Scales and zeros as compressed-tensors computes them of smallest and largest values."""
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.reshape(len(weight) // rows, rows, -1, columns)
        scales, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        return {"weight_scale": scales}
    low, high = limits(weight, args.group_size or weight.shape[1])
    if args.strategy == "tensor_group":
        whole = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
        scales, _ = calculate_qparams(low, high, args, global_scale=whole)
        return {"weight_scale": scales, "weight_global_scale": whole}
    scales, zeros = calculate_qparams(low, high, args)
    return {"weight_scale": scales, "weight_zero_point": zeros}
