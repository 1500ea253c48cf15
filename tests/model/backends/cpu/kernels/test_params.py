"""Parameters reach an op by name: dataclasses and the structs of csrc/params.h have one set of names."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.backends.cpu.kernels.attention_params import AttentionParams, DeltaParams, LatentParams, MaskParams
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.kernels.params import (
    BlockParams,
    DrawsParams,
    ExpertsParams,
    FeedForwardParams,
    InfinityParams,
    LinearParams,
    NormParams,
    Params,
    RouterParams,
    RoutingParams,
    TopKParams,
    named,
)
from model.shapes.mixtures import Router

ops = torch.ops.moedial
WEIGHT, NORM, MASK = pack(torch.ones(16, 4), "int8"), NormParams(torch.ones(4), eps=0.5), MaskParams(1.0)
ROUTING = RoutingParams.of(Router(), 2)
DRAWS = DrawsParams(torch.ones(3), 0, True, 0.1, False)
EXPERT = {"up": WEIGHT, "down": WEIGHT, "units": 16, "activation": "gelu"}
EXPERTS = ExpertsParams(**EXPERT, gated=True)
HEADS = {"heads": 4, "kv_heads": 2, "head_width": 16}
EXAMPLES: list[Params] = [
    LinearParams(NORM, WEIGHT, 16),
    EXPERTS,
    FeedForwardParams(NORM, EXPERTS, 0.5),
    MASK,
    ROUTING,
    AttentionParams(NORM, WEIGHT, None, None, None, True, 0.5, None, WEIGHT, None, **HEADS, mask=MASK),
    DeltaParams(NORM, WEIGHT, WEIGHT, *[torch.ones(16)] * 4, WEIGHT, 2, 4, 16, 32),
    LatentParams(*[NORM] * 3, WEIGHT, None, *[WEIGHT] * 4, None, torch.ones(1), 4, 0, 32, 8, 16, MASK),
    TopKParams(NORM, RouterParams(WEIGHT, 8, ROUTING), EXPERTS),
    DRAWS,
    InfinityParams(NORM, WEIGHT, WEIGHT.packed, 2, **EXPERT, tile_units=16, groups=4, kept=1, draws=DRAWS),
]
each = pytest.mark.parametrize("params", EXAMPLES, ids=lambda params: type(params).__name__)


def names_of(op: str) -> list[str]:
    return [argument.name for argument in getattr(ops, op).default._schema.arguments]


@each
def test_values_follow_the_schema(params: Params) -> None:
    values, given = named(params), params.arguments()
    names = names_of(params.op)[-len(given) :]
    assert sorted(names) == sorted(values)
    assert all(values[name] is value for name, value in zip(names, given, strict=True))


@each
def test_a_block_is_added_to_a_program_with_the_same_arguments(params: Params) -> None:
    if isinstance(params, BlockParams):
        assert names_of(params.add_op) == ["program", *names_of(params.op)[-len(params.arguments()) :]]


def test_the_head_of_a_program_is_a_linear_layer() -> None:
    assert names_of("set_head") == ["program", *names_of("linear")[1:]]


def test_parts_give_their_names() -> None:
    values = named(EXAMPLES[0])
    norm = ["norm_weight", "norm_bias", "norm_eps"]
    layout = ["weight", *(f"weight_{part}" for part in ("scales", "group", "table", "header"))]
    assert list(values) == [*norm, *layout, "outputs", "bias", "scale"]
    assert values["weight"] is WEIGHT.packed and values["weight_scales"] is WEIGHT.scales
    assert named(EXAMPLES[1])["activation"] == 1


@dataclass(frozen=True, slots=True)
class Wrong(Params):
    """Has a name that the op does not know, and lacks others."""

    op = "masks"
    scores: Tensor
    most: int


def test_other_names_than_the_ops_are_an_error() -> None:
    with pytest.raises(TypeError, match="masks takes replacement, keep_norm, and is given scores, most"):
        Wrong(torch.ones(1), 2).arguments()
