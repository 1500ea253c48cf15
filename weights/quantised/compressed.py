"""compressed-tensors, as llm-compressor writes it: one config, several layouts. What is stored says which one a matrix
has; the config's groups must know it.

Integers in words: `X.weight_packed` int32 [n, k · bits / 32], neighbouring inputs in a word, `X.weight_scale`,
`X.weight_shape`, and where they are not symmetric `X.weight_zero_point` [n · bits / 32, groups], neighbouring outputs
in a word. Integers of 8 bits: `X.weight` int8. FP8: `X.weight` E4M3. FP4: `X.weight_packed` uint8.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from weights.files import Stored
from weights.forms import form_within
from weights.quantised.config import expect, fields_of, refuse_unknown
from weights.quantised.fp8 import block_of, fp8_matrices
from weights.quantised.integers import Integers, integer_tensor, integer_values, unpacked, words_as_bytes
from weights.quantised.mxfp4 import mxfp4_matrix
from weights.quantised.nvfp4 import nvfp4
from weights.quantised.parts import FLOATS, misshapen, part
from weights.quantised.tensor import QuantisedTensor

_FIELDS = """quant_method format quantization_status config_groups ignore kv_cache_scheme version
global_compression_ratio sparsity_config transform_config"""
_WEIGHTS = """num_bits type symmetric strategy group_size block_structure dynamic actorder observer observer_kwargs
scale_dtype zp_dtype"""
FIELDS, WEIGHTS = frozenset(_FIELDS.split()), frozenset(_WEIGHTS.split())
GROUP = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
Weights = Mapping[str, Any]  # one group's field `weights`


def compressed(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """Every quantised matrix.

    Raises:
        CheckpointError: a part is missing or misshapen, or the config has a value that is not known.
    """
    schemes = list(_schemes(quantisation))
    found = {}
    for name, weight in stored.items():
        base, _, last = name.rpartition(".")
        base += "."
        if last == "weight_packed" and weight.dtype is torch.int32:
            found[base + "weight"] = _words(base, stored, schemes)
        elif last == "weight_packed" and base + "weight_global_scale" in stored:
            found[base + "weight"] = nvfp4(base, last, "weight_global_scale", stored, divides=True)
        elif last == "weight_packed":
            found[base + "weight"] = mxfp4_matrix(base, stored)
        elif last == "weight" and weight.dtype is torch.int8:
            found[name] = _bytes(base, stored)
    blocks = {block_of(each, "block_structure") for each in schemes if each.get("strategy") == "block"}
    if len(blocks) > 1:
        raise CheckpointError(
            f"config.json: quantization_config's config_groups have different blocks: {sorted(blocks)}"
        )
    return found | fp8_matrices(stored, next(iter(blocks), None), "_scale")


def _schemes(quantisation: Mapping[str, Any]) -> Iterator[Weights]:
    """How the config's groups keep their weights.

    Raises:
        CheckpointError: a field has a value that is not known.
    """
    refuse_unknown(quantisation, FIELDS)
    expect(quantisation, "format", *FORMATS)
    expect(quantisation, "quantization_status", "compressed", "frozen", default="compressed")
    expect(fields_of(quantisation, "sparsity_config"), "format", "dense", default="dense")
    if fields_of(quantisation, "transform_config").get("config_groups"):
        raise CheckpointError("config.json: quantization_config's transform_config is set; no transforms are known")
    groups = quantisation.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(
            f"config.json: quantization_config's config_groups is {groups!r:.80}, not an object of objects"
        )
    for group in groups.values():
        refuse_unknown(group, GROUP)
        expect(group, "format", *FORMATS, default="dense")
        weights = group.get("weights")
        if isinstance(weights, dict):
            refuse_unknown(weights, WEIGHTS)
            expect(weights, "type", "int", "float", default="int")
            expect(weights, "num_bits", 4, 8, default=8)
            expect(weights, "strategy", "tensor", "channel", "group", "tensor_group", "block", default="tensor")
            expect(weights, "dynamic", False, default=False)
            expect(weights, "actorder", "weight", "group", "static", "dynamic", default="weight")
            yield weights


def _words(base: str, stored: Mapping[str, Stored], schemes: list[Weights]) -> QuantisedTensor:
    """Integers of 4 or 8 bits, packed in words."""
    words = part(stored, base, "weight_packed", torch.int32, 2)
    scales = part(stored, base, "weight_scale", FLOATS, 2)
    part(stored, base, "weight_shape", (torch.int64, torch.int32), 1)
    n, groups = scales.shape
    fitting = {bits for bits in _bits(words.shape[1], groups, schemes)}
    if words.shape[0] != n or not words.shape[1] or not groups or len(fitting) != 1:
        raise misshapen(base + "weight_packed", words, f"as config_groups and scales of shape {scales.shape} have it")
    bits = fitting.pop()
    k = words.shape[1] * 32 // bits
    names = [base + "weight_packed", base + "weight_scale", base + "weight_shape"]
    zeros, order = stored.get(base + "weight_zero_point"), stored.get(base + "weight_g_idx")
    if zeros is not None:
        wanted = (-(-n * bits // 32), groups)
        if (zeros.dtype, zeros.shape) != (torch.int32, wanted):
            raise misshapen(base + "weight_zero_point", zeros, f"{wanted} of torch.int32")
        names.append(base + "weight_zero_point")
    if order is not None:
        if (order.dtype, order.shape) != (torch.int32, (k,)):
            raise misshapen(base + "weight_g_idx", order, f"({k},) of torch.int32")
        names.append(base + "weight_g_idx")
    values = integer_values(bits, zeros is not None)
    form = None if order is not None else form_within(k, k // groups, values, scales.dtype, zeros is not None)
    meant = Stored(words.file, words.start, scales.dtype, (n, k), form)
    read = partial(_integers, base=base, bits=bits, zeros=zeros is not None, ordered=order is not None)
    return integer_tensor(tuple(names), meant, read)


def _bits(words: int, groups: int, schemes: list[Weights]) -> Iterator[int]:
    """The bits of a code by which so many words and groups are those of a scheme."""
    for each in schemes:
        bits, size = each.get("num_bits", 8), each.get("group_size")
        k = words * 32 // bits
        run = size if type(size) is int and size > 0 else k
        if each.get("type", "int") == "int" and run * groups == k:
            yield bits


def _integers(
    words: Tensor, scales: Tensor, shape: Tensor, *others: Tensor, base: str, bits: int, zeros: bool, ordered: bool
) -> Integers:
    n, groups = scales.shape
    k = words.shape[1] * 32 // bits
    if shape.tolist() != [n, k]:
        raise CheckpointError(f"{base}weight_shape is {shape.tolist()!r:.80}, not [{n}, {k}]")
    middle = torch.full((n, groups), 1 << bits - 1, dtype=torch.int32)
    if zeros:
        middle = unpacked(others[0].T, bits).T[:n]
    group_of = others[-1].long() if ordered else None
    if group_of is not None and bool(((group_of < 0) | (group_of >= groups)).any()):
        raise CheckpointError(f"{base}weight_g_idx names groups outside 0 to {groups - 1}")
    return Integers(words_as_bytes(words), scales, middle, bits, group_of)


def _bytes(base: str, stored: Mapping[str, Stored]) -> QuantisedTensor:
    """Integers of 8 bits, one scale per output or for all."""
    weight = part(stored, base, "weight", torch.int8, 2)
    scales = part(stored, base, "weight_scale", FLOATS)
    n, k = weight.shape
    if scales.shape not in ((), (1,), (n, 1)):
        raise misshapen(base + "weight_scale", scales, f"one scale for all or one for each of {n} outputs")
    names = [base + "weight", base + "weight_scale"]
    if (zeros := stored.get(base + "weight_zero_point")) is not None:
        if zeros.dtype is not torch.int8 or zeros.shape != scales.shape:
            raise misshapen(base + "weight_zero_point", zeros, f"{scales.shape} of torch.int8")
        names.append(base + "weight_zero_point")
    form = form_within(k, k, "bytes", scales.dtype, zeros is not None)
    meant = Stored(weight.file, weight.start, scales.dtype, (n, k), form)
    return integer_tensor(tuple(names), meant, _of_bytes)


def _of_bytes(weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Integers:
    n = len(weight)
    spread = scales.reshape(-1, 1).expand(n, 1)
    middle = torch.zeros(1, 1, dtype=torch.int32) if zeros is None else zeros.int().reshape(-1, 1)
    return Integers(weight.view(torch.uint8) ^ 128, spread, (middle + 128).expand(n, 1), 8)
