"""The parameters of the kernels' ops: a dataclass for each, with the names of the structs in csrc/params.h. Those of
attention and recurrent layers are in `attention_params.py`; here are those of mixtures, and what both are made of.

An op's schema is made from the struct in C++, and a dataclass is sorted by that schema: neither side counts arguments,
and a name that only one of them knows is an error when a block is made, not a wrong number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from model.backends.cpu.kernels.pack import Packed
from model.shapes.mixtures import Activation, Router, Score

UNGATED: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # as in csrc/values.h
ACTIVATIONS: dict[Activation, int] = {**UNGATED, "swiglu_clamped": 4}
SCORES: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sparse_mixer": 2}  # as in csrc/mixtures.h


@dataclass(frozen=True, slots=True)
class Params:
    """What an op is given that does not change from step to step."""

    op: ClassVar[str]  # its name

    def arguments(self) -> tuple[object, ...]:
        """The values as the op takes them, behind what changes with every step. Make it once and keep it.

        Raises:
            TypeError: csrc/params.h has other names.
        """
        return by_schema(self.op, named(self))


def by_schema(op: str, values: Mapping[str, object]) -> tuple[object, ...]:
    """Named values in the order of the op's last arguments.

    Raises:
        TypeError: these have other names.
    """
    schema = getattr(torch.ops.moedial, op).default._schema
    names = [argument.name for argument in schema.arguments][-len(values) :]
    if set(names) != values.keys():
        raise TypeError(f"{op} takes {', '.join(names)}, and is given {', '.join(values)}")
    return tuple(values[name] for name in names)


@dataclass(frozen=True, slots=True)
class NormParams:
    """RMSNorm, or LayerNorm with a bias; without a weight rows stay as they are. All float32."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


def named(params: object) -> dict[str, object]:
    """Every value by its name in the op's schema. Parts without a name of their own give the names of their members."""
    values: dict[str, object] = {}
    for field in fields(params):  # type: ignore[arg-type]
        values |= _named(field.name, getattr(params, field.name))
    return values


def _named(name: str, value: object) -> dict[str, object]:
    if isinstance(value, Packed):
        parts = ("scales", "group", "table", "header")
        return {name: value.packed} | {f"{name}_{part}": getattr(value, part) for part in parts}
    if isinstance(value, NormParams | RepairParams):
        return {f"{name}_{key}": part for key, part in named(value).items()}
    if name == "shared":
        return {f"{name}_{key}": part for key, part in named(value).items()}
    if isinstance(value, Params | RouterParams):
        return named(value)
    if name == "activation":
        assert isinstance(value, str)
        return {name: ACTIVATIONS[value]}  # type: ignore[index]
    return {name: value}


@dataclass(frozen=True, slots=True)
class LinearParams(Params):
    """scale · (W norm(x) + bias). `outputs`: without padding."""

    op = "linear"
    norm: NormParams
    weight: Packed
    outputs: int
    bias: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertsParams(Params):
    """Feed-forward experts of `units` units each; gated in the order of `pack.interleave`.

    Biases are in the order of the packed outputs and padded as they are.
    """

    op = "experts"
    up: Packed
    down: Packed
    units: int
    gated: bool
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


_NOTHING = Packed(torch.empty(0), None, 0, 0, "float")
NO_LAYER = ExpertsParams(_NOTHING, _NOTHING, 0, True, "silu")


@dataclass(frozen=True, slots=True)
class BlockParams(Params):
    """x += residual_scale · f(norm(x)), as an op, and as a block that `add_op` adds to a Program (csrc/program.h)."""

    add_op: ClassVar[str]


@dataclass(frozen=True, slots=True)
class FeedForwardParams(BlockParams):
    """A dense feed-forward layer: one expert that every row uses."""

    op, add_op = "ffn_block", "add_ffn"
    norm: NormParams
    expert: ExpertsParams
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RoutingParams(Params):
    """How logits become a choice and its weights: the fields of `Router`. `trained`: the count from which on a rule's
    normaliser does not apply."""

    op = "route"
    trained: int
    score: int
    normalise: bool
    weight_scale: float
    selection_bias: Tensor | None
    groups: int
    kept_groups: int
    top2: bool
    jitter: float
    normalise_eps: float
    clamp_sum: bool

    @classmethod
    def of(cls, router: Router, trained: int, selection_bias: Tensor | None = None) -> "RoutingParams":
        """Of a router's shape."""
        return cls(
            trained=trained,
            score=SCORES[router.score],
            normalise=router.normalise,
            weight_scale=router.scale,
            selection_bias=selection_bias,
            groups=router.groups,
            kept_groups=router.kept_groups,
            top2=router.group_score == "top2",
            jitter=router.jitter,
            normalise_eps=router.eps,
            clamp_sum=router.clamp_sum,
        )


@dataclass(frozen=True, slots=True)
class RouterParams:
    """Which experts a token's pairs go to. `weigh_input`: a weight multiplies what its expert reads."""

    router: Packed  # [E, D]; with `shared_gate` [E + 1, D]
    experts: int
    routing: RoutingParams
    logit_bias: Tensor | None = None  # padded as the packed outputs are
    weigh_input: bool = False
    shared_gate: bool = False  # the sigmoid of the last output weighs the shared part


@dataclass(frozen=True, slots=True)
class RepairParams:
    """y * scale + shift at each count from 0 on, [counts, D] float32; none: there is nothing to repair by."""

    scale: Tensor | None = None
    shift: Tensor | None = None


NO_REPAIR = RepairParams()


@dataclass(frozen=True, slots=True)
class TopKParams(BlockParams):
    """A sparse top-k mixture.

    A part that every token runs is the last `shared_pieces` of the experts, behind the routed ones, or the layer
    `shared`.
    """

    op, add_op = "topk_block", "add_topk"
    norm: NormParams
    routing: RouterParams
    experts: ExpertsParams
    shared_pieces: int = 0
    shared: ExpertsParams = NO_LAYER
    repair: RepairParams = NO_REPAIR
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class DrawsParams(Params):
    """How the points of an ∞-MoE are drawn. `layer`: the mixture's number; `exponential`: sigma is e^raw."""

    op = "draw"
    quantiles: Tensor  # of the normal distribution, model/noise.py
    layer: int
    exponential: bool
    sigma_min: float
    antithetic: bool
    points: Tensor | None = None  # fixed draws [largest count, Z], instead of random ones


@dataclass(frozen=True, slots=True)
class InfinityParams(BlockParams):
    """An ∞-MoE: `groups` groups of units, of which each draw keeps `kept`; the wide layer in tiles of `tile_units`.

    Up to `crossover_rows` kept units are read one by one from `up_rows` and `down_rows`, where there are any.
    """

    op, add_op = "infinity_block", "add_infinity"
    norm: NormParams
    router: Packed  # [2 Z, D]: means, then raw spreads
    scores: Tensor  # packed floats [groups, Z]
    latent_dim: int
    up: Packed
    down: Packed
    units: int
    tile_units: int
    groups: int
    kept: int
    activation: Activation
    draws: DrawsParams
    replacement: bool = True  # a draw may keep what an earlier draw kept
    keep_norm: bool = False  # the mean mask gets the mean norm of its draws
    up_rows: Tensor | None = None
    down_rows: Tensor | None = None
    crossover_rows: int = 0
    repair: RepairParams = NO_REPAIR
    residual_scale: float = 1.0
