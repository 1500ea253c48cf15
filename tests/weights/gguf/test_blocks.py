"""Blocks mean what llama.cpp's own dequantiser says, and `Grouped` holds them exactly or to float16's rounding."""

import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.weights.gguf.samples import blocks
from tests.weights.gguf.writer import CODES
from weights.gguf import blocks as module
from weights.gguf.blocks import dense, form_of, grouped
from weights.gguf.decode import FORMATS
from weights.gguf.types import TYPES
from weights.groups import joined
from weights.rules import TensorPart

# The first digits of SHA-256 of the float32 values that `gguf.quants.dequantize` of gguf 0.19.0 (MIT; llama.cpp's own
# package) gives for the blocks of `samples.py`.
REFERENCE = {
    "F32": "7721deef0899d212",
    "F16": "4c427dfafb346488",
    "Q4_0": "20ee57ac889a1529",
    "Q4_1": "7e0fe564fd209ee2",
    "Q5_0": "091dde0cf6330c23",
    "Q5_1": "b93a1cbeac80d17b",
    "Q8_0": "dea27479b31496e2",
    "Q2_K": "fbf2271063a2b5f5",
    "Q3_K": "dd68d5c125d44b2b",
    "Q4_K": "50727467f68d8d9f",
    "Q5_K": "1693c340b39a8547",
    "Q6_K": "86a3b951b3aa5ab4",
    "IQ4_NL": "98006882585eca04",
    "IQ4_XS": "8ee482362a5fed54",
    "BF16": "5a565d4f23ea217c",
    "MXFP4": "e90332dac833f415",
}
EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"}
HALF_STEP = 2**-11  # float16's rounding, relative
PAGE = Path(__file__).parents[3] / "docs" / "gguf.md"


@pytest.mark.parametrize("name", CODES)
def test_values_are_those_of_the_reference(name: str) -> None:
    kind = TYPES[CODES[name]]
    values = dense(kind, blocks(name, 64), (8, 8 * kind.values))
    assert sha256(values.float().numpy().tobytes()).hexdigest()[:16] == REFERENCE[name]


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_is_exact_or_rounds_scales(name: str) -> None:
    kind, shape = TYPES[CODES[name]], (2, 4, 8 * TYPES[CODES[name]].values)
    data = blocks(name, 64)
    found, values = grouped(kind, data, shape), dense(kind, data, shape).float()
    form = form_of(kind, shape)
    assert found is not None and form is not None
    assert (found.shape, found.nbytes) == (shape, form.bytes(shape))
    if name in EXACT:
        assert torch.equal(found.dense(), values)
        return
    groups = values.unflatten(-1, (-1, found.group))
    error = (found.dense() - values).unflatten(-1, (-1, found.group)).abs().amax(-1)
    assert float(error.max()) > 0
    # A scale and a minimum are each within half a step; the largest code times the scale may exceed every value.
    assert found.factors is not None
    terms = found.scales.float().abs() * found.integers().abs().amax()
    if found.minima is not None:
        terms += found.minima.float().abs()
    assert bool((error <= HALF_STEP * terms * found.factors[..., None]).all())
    assert float((found.dense() - values).norm() / groups.norm()) < 3e-4


def test_small_scales_keep_their_bits() -> None:
    """Scales near 1e-7 would be subnormal in float16; a factor per output holds them."""
    kind = TYPES[CODES["Q6_K"]]
    data = blocks("Q6_K", 8).view(8, -1)
    data[:, 208:210] = torch.tensor([3e-7], dtype=torch.float16).view(torch.uint8)
    values, found = dense(kind, data.flatten(), (8, 256)), grouped(kind, data.flatten(), (8, 256))
    assert found is not None
    assert float((found.dense() - values).norm() / values.norm()) < 3e-4


def test_types_with_and_without_a_minimum_are_joined() -> None:
    """Q3_K beside Q2_K, as in llama.cpp's files of 2 bits: the codes of one get a minimum of eight scales."""
    parts, values = [], []
    for row, name in enumerate(("Q3_K", "Q2_K")):
        kind = TYPES[CODES[name]]
        found = grouped(kind, blocks(name, 4), (4, 256))
        assert found is not None
        parts.append((TensorPart("", (slice(4 * row, 4 * row + 4),)), found))
        values.append(found.dense())
    whole = joined(parts, torch.Size([8, 256]))
    assert whole is not None and whole.values == "unsigned"
    torch.testing.assert_close(whole.dense(), torch.cat(values), atol=1e-6, rtol=1e-6)


def test_four_bits_and_six_are_joined_in_six() -> None:
    """Q4_K beside Q6_K, as in llama.cpp's Q4_K_M."""
    parts = []
    for row, name in enumerate(("Q4_K", "Q6_K")):
        found = grouped(TYPES[CODES[name]], blocks(name, 4), (4, 256))
        assert found is not None
        parts.append((TensorPart("", (slice(4 * row, 4 * row + 4),)), found))
    whole = joined(parts, torch.Size([8, 256]))
    assert whole is not None
    assert (whole.values, whole.group, whole.minima is not None) == ("signed6", 16, True)
    assert 8 * (whole.nbytes - 4 * 8) / whole.shape.numel() == 8.0


def test_the_page_says_how_many_bits_are_kept() -> None:
    """Its table counts no factors: 4 bytes an output."""
    said = re.findall(r"^\| ([A-Z0-9_, ]+) \|.*\| [\d.]+ / ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    kept = {name: float(bits) for names, bits in said for name in names.split(", ")}
    forms = {name: form_of(TYPES[CODES[name]], (1, 512)) for name in FORMATS}
    sizes = {name: form._replace(factors=False).bytes((1, 512)) for name, form in forms.items() if form is not None}
    assert kept == {name: 8 * size / 512 for name, size in sizes.items()}


def test_rows_of_zeros_are_exact() -> None:
    for name in FORMATS:
        kind = TYPES[CODES[name]]
        found = grouped(kind, torch.zeros(2 * kind.bytes, dtype=torch.uint8), (2, kind.values))
        assert found is not None
        assert not found.dense().any()


def mxfp4(*exponents: int, code: int = 0x11) -> torch.Tensor:
    """One output with groups of these exponents."""
    return torch.tensor([[exponent, *[code] * 16] for exponent in exponents], dtype=torch.uint8).flatten()


def test_mxfp4_is_exact_or_not_grouped() -> None:
    kind = TYPES[CODES["MXFP4"]]
    for exponents in [(0, 35), (0, 0), (220, 255), (127, 127)]:
        found = grouped(kind, mxfp4(*exponents), (1, 64))
        assert found is not None
        values = dense(kind, mxfp4(*exponents), (1, 64))
        assert values.dtype == torch.bfloat16
        assert torch.equal(found.dense(), values.float())
        assert values[0, 0] == 2.0 ** (exponents[0] - 128)
    assert grouped(kind, mxfp4(100, 136), (1, 64)) is None
    unused = torch.cat([mxfp4(100), mxfp4(136, code=0x80)])
    found = grouped(kind, unused, (1, 64))
    assert found is not None
    assert torch.equal(found.dense(), dense(kind, unused, (1, 64)).float())


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "MXFP4"])
def test_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TYPES[CODES[name]]
    data, shape = blocks(name, 15), (3, 5 * kind.values)
    values, whole = dense(kind, data, shape), grouped(kind, data, shape)
    monkeypatch.setattr(module, "CHUNK", 2 * kind.values)
    pieces = grouped(kind, data, shape)
    assert torch.equal(dense(kind, data, shape), values)
    assert whole is not None and pieces is not None
    assert torch.equal(pieces.dense(), whole.dense())


def test_floats_and_vectors_are_not_grouped() -> None:
    for name, shape in [("F32", (2, 4)), ("BF16", (2, 4)), ("Q8_0", (64,))]:
        kind = TYPES[CODES[name]]
        data = torch.zeros(int(np.prod(shape)) // kind.values * kind.bytes, dtype=torch.uint8)
        assert grouped(kind, data, shape) is None
        assert form_of(kind, shape) is None
