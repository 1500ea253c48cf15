"""Weights of 8 bits for GPUs: the CPU backend's numbers, how far they are off, what is quantised, what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.backends.cpu.kernels import pack
from model.backends.cuda import quantise
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.quantise import Precision, precision_for, quantised, refusal
from model.errors import CheckpointError
from model.options import Options, Quantize
from model.shapes.attention import MLA
from model.shapes.rope import Rope
from tests.model.tiny import infinity, llama_like, topk

KINDS: list[Quantize] = ["int8-weights", "fp8-weights"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values whose outputs differ by orders of magnitude; one output is 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * 10 ** (4 * torch.rand(*shape[:-1], 1, generator=generator) - 2)
    values[..., 1, :] = 0
    return values.to(dtype)


def dequantised(weight: Weight) -> Tensor:
    assert weight.scale_EO is not None
    return weight.values_EOD.float() * weight.scale_EO[..., None]


@given(st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 50, 1 << 24]))
def test_int8_holds_the_numbers_of_the_cpu(seed: int, dtype: torch.dtype, at_once: int) -> None:
    values_EOD = random(3, 7, 20, seed=seed, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "AT_ONCE", at_once)
        found = quantised(Weight(values_EOD), "int8-weights")
    wanted_EOD, side = pack.quantise(values_EOD)
    assert found.scale_EO is not None
    assert torch.equal(found.values_EOD, wanted_EOD)
    assert torch.equal(found.scale_EO.view(torch.int32).flatten(), side[0])


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_off_by_half_a_step(kind: Quantize) -> None:
    given_EOD = random(2, 6, 400)
    found = quantised(Weight(given_EOD), kind)
    assert found.scale_EO is not None
    step_EO1 = found.scale_EO[..., None]
    bound_EOD = step_EO1 * 0.5001
    if kind == "fp8-weights":  # three bits after the first; below 2⁻⁶ steps are even
        bound_EOD = torch.maximum(given_EOD.float().abs() / 16, step_EO1 * 2.0**-10) * 1.0001
    assert ((dequantised(found) - given_EOD.float()).abs() <= bound_EOD).all()
    largest_EO = found.values_EOD.float().abs().amax(-1)
    assert set(largest_EO.unique().tolist()) == {0.0, {"int8-weights": 127.0, "fp8-weights": 448.0}[kind]}


def test_everything_else_of_a_weight_stays() -> None:
    weight = Weight(random(2, 6, 8), torch.ones(2, 6), "silu", gated=True, interleaved=True)
    found = quantised(weight, "fp8-weights")
    assert found.bias_EO is weight.bias_EO
    assert (found.activation, found.gated, found.interleaved, found.units) == ("silu", True, True, 3)
    assert (weight.packed, found.packed) == ("none", "e4m3")
    assert found.stored.shape == (2, 6, 2)


def test_rows_that_are_no_whole_words_are_refused() -> None:
    with pytest.raises(CheckpointError, match="quantize int8-weights: 6 inputs of a matrix are not a multiple of 4"):
        quantised(Weight(random(1, 8, 6)), "int8-weights")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_experts_or_all(kind: Quantize) -> None:
    weight = Weight(random(1, 8, 4))
    experts, all_layers = (precision_for(Options(quantize=kind, quantize_layers=part)) for part in ("experts", "all"))
    assert experts.linear(weight) is weight
    packed = {made.packed for made in (experts.experts(weight), all_layers.experts(weight), all_layers.linear(weight))}
    assert packed == {"int8" if kind == "int8-weights" else "e4m3"}
    assert Precision().experts(weight) is Precision(experts_only=False).linear(weight) is weight


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(), None),
        *((Options(quantize=kind, quantize_layers="all"), None) for kind in KINDS),
        (Options(quantize="int8"), "multiplies in 8 bits, for which there is no GPU kernel: use int8-weights or fp8-"),
        (Options(quantize="int3"), "quantize int3 of experts"),  # type: ignore[arg-type]
        (Options(quantize="fp8-weights", quantize_layers="some"), "quantize fp8-weights of some"),  # type: ignore[arg-type]
    ],
)
def test_options_are_looked_at(options: Options, reason: str | None) -> None:
    found = refusal(llama_like(topk(), topk()), options)
    assert found is None if reason is None else found is not None and reason in found


def test_layers_without_8_bits_are_named() -> None:
    config = llama_like(topk(), infinity())
    assert refusal(config, Options()) is None
    wanted = "quantize fp8-weights has no GPU kernel for layers of the kind Infinity"
    assert refusal(config, Options(quantize="fp8-weights")) == wanted
    latent = MLA(heads=2, query_rank=None, rank=8, plain_width=4, rope=Rope(4), value_width=4)
    config = replace(llama_like(topk(), topk()), attention=(latent,) * 2)
    assert refusal(config, Options(quantize="fp8-weights")) is None
    wanted = "quantize int8-weights of all layers has no GPU kernel for layers of the kind MLA: use experts"
    assert refusal(config, Options(quantize="int8-weights", quantize_layers="all")) == wanted
