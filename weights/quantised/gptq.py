"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it: `X.qweight`, `X.qzeros`, `X.scales` and mostly `X.g_idx`.

A word of `qweight` [k · bits / 32, n] holds neighbouring inputs of one output, one of `qzeros` [groups, n · bits / 32]
neighbouring outputs of one group. The first version of the format stores zeros less one.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from weights.files import Stored
from weights.forms import form_within
from weights.quantised.config import expect, refuse_unknown, whole
from weights.quantised.integers import Integers, integer_tensor, integer_values, unpacked, words_as_bytes
from weights.quantised.parts import FLOATS, part
from weights.quantised.tensor import QuantisedTensor

log = logging.getLogger(__name__)
# Those that are not read say how the file was made, or how another program is to run it.
_FIELDS = """quant_method bits group_size sym desc_act checkpoint_format format pack_dtype lm_head dynamic dataset
tokenizer true_sequential damp_percent damp_auto_increment static_groups act_group_aware model_name_or_path
model_file_base_name meta block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
batch_size pad_token_id use_exllama disable_exllama exllama_config max_input_length use_cuda_fp16 model_seqlen
cache_block_outputs backend is_marlin_format method"""
FIELDS = frozenset(_FIELDS.split())
_ONES = {4: 0x11111111, 8: 0x01010101}


def gptq(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """Every quantised matrix, in 4 or 8 bits.

    Raises:
        CheckpointError: a part is missing or misshapen, or the config has a value that is not known.
    """
    names = [name for name in stored if name.endswith(".qweight")]
    less_one = _check(quantisation)
    declared = None if quantisation.get("dynamic") else (quantisation.get("bits"), whole(quantisation, "group_size"))
    found = {}
    for name in names:
        base = name.removesuffix("qweight")
        found[base + "weight"] = _matrix(base, stored, quantisation, declared, less_one)
    if permuted := sum(tensor.stored.form is None for tensor in found.values()):
        log.info(
            "%d of %d matrices have groups that no kernel multiplies: desc_act, or odd sizes", permuted, len(found)
        )
    return found


def _check(quantisation: Mapping[str, Any]) -> bool:
    """Whether zeros are stored less one."""
    refuse_unknown(quantisation, FIELDS)
    for field in ("sym", "desc_act"):
        expect(quantisation, field, True, False, default=field == "sym")
    if not quantisation.get("dynamic"):
        expect(quantisation, "bits", 4, 8)
    expect(quantisation, "pack_dtype", "int32", default="int32")
    expect(quantisation, "is_marlin_format", False, default=False)
    field = "checkpoint_format" if quantisation.get("checkpoint_format") is not None else "format"
    return bool(expect(quantisation, field, "gptq", "gptq_v2", default="gptq") == "gptq")


def _symmetric(quantisation: Mapping[str, Any]) -> bool:
    """Whether the config, with GPTQModel's rules for some matrices, says that all zero points are in the middle.

    Matrices whose zero points are elsewhere are read with minima.
    """
    rules = quantisation.get("dynamic")
    said = [quantisation, *(rules.values() if isinstance(rules, dict) else ())]
    return all(fields.get("sym", True) for fields in said if isinstance(fields, Mapping))


def _matrix(
    base: str,
    stored: Mapping[str, Stored],
    quantisation: Mapping[str, Any],
    declared: tuple[Any, int] | None,
    less_one: bool,
) -> QuantisedTensor:
    """One of them; bits and groups follow from the shapes, and must be those of the config."""
    weight = part(stored, base, "qweight", torch.int32, 2)
    scales, zeros = part(stored, base, "scales", FLOATS, 2), part(stored, base, "qzeros", torch.int32, 2)
    groups, n = scales.shape
    bits = 32 * zeros.shape[1] // n if n else 0
    k = weight.shape[0] * 32 // bits if bits in _ONES else 0
    if not k or weight.shape[1] != n or zeros.shape != (groups, n * bits // 32) or not groups or k % groups:
        shapes = f"qweight {weight.shape}, qzeros {zeros.shape}, scales {scales.shape}"
        raise CheckpointError(f"{base.removesuffix('.')}: {shapes} are no matrix of 4 or 8 bits in groups")
    if declared is not None and declared != (bits, -1 if groups == 1 and declared[1] == -1 else k // groups):
        raise CheckpointError(
            f"{base.removesuffix('.')} has {bits} bits in groups of {k // groups}; config.json's quantization_config"
            f" says bits {declared[0]}, group_size {declared[1]}"
        )
    names = [base + "qweight", base + "qzeros", base + "scales"]
    order = stored.get(base + "g_idx")
    if order is not None:
        if (order.dtype, order.shape) != (torch.int32, (k,)):
            raise CheckpointError(f"{base}g_idx has shape {order.shape} of {order.dtype}, not ({k},) of int32")
        names.append(base + "g_idx")
    permuted = quantisation.get("desc_act") and not quantisation.get("static_groups") and groups > 1
    minimum = not _symmetric(quantisation)
    form = None if permuted else form_within(k, k // groups, integer_values(bits, minimum), scales.dtype, minimum)
    meant = Stored(weight.file, weight.start, scales.dtype, (n, k), form)
    read = partial(_integers, base=base, bits=bits, less_one=less_one)
    return integer_tensor(tuple(names), meant, read)


def _integers(*parts: Tensor, base: str, bits: int, less_one: bool) -> Integers:
    weight, zeros, scales = parts[:3]
    if less_one:  # of the words, as the writers subtract: a zero of 0 borrows from its neighbour
        zeros = zeros + _ONES[bits]
    codes = words_as_bytes(weight.T)
    k, groups = codes.shape[1] * 8 // bits, len(scales)
    group_of = parts[3].long() if len(parts) > 3 else None
    if group_of is not None:
        if bool(((group_of < 0) | (group_of >= groups)).any()):
            raise CheckpointError(f"{base}g_idx names groups outside 0 to {groups - 1}")
        if torch.equal(group_of, torch.arange(k) // (k // groups)):
            group_of = None
    return Integers(codes, scales.T, unpacked(zeros, bits).T, bits, group_of)
