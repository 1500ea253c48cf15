"""AWQ (arXiv 2306.00978) as AutoAWQ writes it, version "gemm": `X.qweight`, `X.qzeros` and `X.scales`, 4 bits.

A word of `qweight` [k, n / 8] and of `qzeros` [groups, n / 8] holds eight neighbouring outputs, in an order of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.grouped import packed_codes
from weights.files import Stored
from weights.forms import form_within
from weights.quantised.config import expect, refuse_unknown, whole
from weights.quantised.integers import Integers, integer_tensor, unpacked
from weights.quantised.parts import FLOATS, part
from weights.quantised.tensor import QuantisedTensor

_FIELDS = """quant_method bits w_bit group_size q_group_size zero_point version backend modules_to_not_convert do_fuse
fuse_max_seq_len modules_to_fuse exllama_config desc_act sym checkpoint_format format pack_dtype lm_head method meta"""
FIELDS = frozenset(_FIELDS.split())
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # which half byte of a word holds each of its outputs


def awq(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """Every quantised matrix.

    Raises:
        CheckpointError: a part is missing or misshapen, or the config has a value that is not known.
    """
    refuse_unknown(quantisation, FIELDS)
    expect(quantisation, "w_bit" if "w_bit" in quantisation else "bits", 4)
    expect(quantisation, "zero_point", True, default=True)
    expect(quantisation, "version", "gemm", "GEMM", default="gemm")
    expect(quantisation, "backend", "autoawq", default="autoawq")
    expect(quantisation, "desc_act", False, default=False)
    for field in ("checkpoint_format", "format"):
        expect(quantisation, field, "gemm", default="gemm")
    expect(quantisation, "pack_dtype", "int32", default="int32")
    size = whole(quantisation, "q_group_size" if "q_group_size" in quantisation else "group_size")
    bases = [name.removesuffix("qweight") for name in stored if name.endswith(".qweight")]
    return {base + "weight": _matrix(base, stored, size) for base in bases}


def _matrix(base: str, stored: Mapping[str, Stored], size: int) -> QuantisedTensor:
    weight = part(stored, base, "qweight", torch.int32, 2)
    scales, zeros = part(stored, base, "scales", FLOATS, 2), part(stored, base, "qzeros", torch.int32, 2)
    k, words = weight.shape
    run = max(k, 1) if size == -1 else size
    wanted = k // run, 8 * words
    if not k or k % run or scales.shape != wanted or zeros.shape != (k // run, words):
        shapes = f"qweight {weight.shape}, qzeros {zeros.shape}, scales {scales.shape}"
        raise CheckpointError(f"{base.removesuffix('.')}: {shapes} are no matrix of 4 bits in groups of {run}")
    form = form_within(k, run, "unsigned", scales.dtype, minimum=True)
    meant = Stored(weight.file, weight.start, scales.dtype, (8 * words, k), form)
    names = (base + "qweight", base + "qzeros", base + "scales")
    return integer_tensor(names, meant, _integers)


def _integers(weight: Tensor, zeros: Tensor, scales: Tensor) -> Integers:
    return Integers(packed_codes(_ordered(weight).T), scales.T, _ordered(zeros).T, 4)


def _ordered(words: Tensor) -> Tensor:
    """The values of words [..., w] in the order of the outputs, int32 [..., 8 w]."""
    halves = unpacked(words, 4).view(*words.shape, 8)
    return halves[..., _PLACES].flatten(-2)
