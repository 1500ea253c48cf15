"""Ways to compute one mixture layer, built around weights that all of them share where they can: our torch path, our
native one, transformers' block, and for ∞-MoE the dense layer of the same width. They measure nothing."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.layers.native import native_layer
from benchmarks.layers.shapes import Parameters, Shape
from benchmarks.machine import packed_linear
from model.activation import activate
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.registry import LayerModule
from model.shapes.mixtures import Infinity, TopK
from model.step import LayerStep

Layer = Callable[[Tensor, LayerStep], Tensor]
PACKED_ROWS = 16  # the height that packed weights are laid out for


def torch_mixture(shape: Shape, weights: Parameters) -> LayerModule:
    """Our mixture in plain torch, whatever kernels there are."""
    with torch.device("meta"):
        mixture = module_of(shape)
    mixture.load_state_dict(weights, assign=True)
    return mixture.requires_grad_(False)


def module_of(shape: Shape) -> InfinityMixture | TopKMixture:
    """The module of the shape's mixture."""
    if isinstance(shape.kind, Infinity):
        return InfinityMixture(shape.width, shape.kind)
    return TopKMixture(shape.width, shape.kind)


def transformers_layer(shape: Shape, weights: Parameters, implementation: str) -> Layer:
    """transformers' OLMoE block with one of its experts implementations; its count is set before each call."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    kind = shape.kind
    assert isinstance(kind, TopK)
    experts, trained = kind.experts, kind.trained
    config = OlmoeConfig(
        hidden_size=shape.width,
        intermediate_size=kind.width,
        num_experts=experts,
        num_experts_per_tok=trained,
        norm_topk_prob=kind.router.normalise,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(config)
    names = {"router": "gate.weight", "gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}
    block.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, assign=True)
    block.requires_grad_(False).eval()

    def run(x_TD: Tensor, use: LayerStep) -> Tensor:
        block.gate.top_k = use.budget.k_max
        mixed_TD: Tensor = block(x_TD[None])[0]
        return mixed_TD

    return run


def dense_layer(shape: Shape, weights: Parameters, packed: bool) -> Layer:
    """The feed-forward layer of the same width without a mixture: all units, for every token."""
    matrices = weights["up"], weights["down"]
    if packed:
        up, down = (packed_linear(matrix, PACKED_ROWS) for matrix in matrices)
    else:
        up, down = (partial(_linear, matrix) for matrix in matrices)
    return lambda x_TD, use: down(activate(up(x_TD), shape.kind.activation))


def _linear(matrix: Tensor, x_TD: Tensor) -> Tensor:
    return F.linear(x_TD, matrix)


Build = Callable[[Shape, Parameters], Layer | None]


def builders(shape: Shape) -> dict[str, Build]:
    """Every way to compute this shape, by name."""
    ours: dict[str, Build] = {
        "ours, native": lambda shape, weights: native_layer(shape.kind, weights),
        "ours, torch": torch_mixture,
    }
    if isinstance(shape.kind, TopK) and find_spec("transformers"):
        for kind in ("grouped_mm", "eager"):
            ours[f"transformers, {kind}"] = partial(transformers_layer, implementation=kind)
    if isinstance(shape.kind, Infinity):
        ours["dense, packed"] = partial(dense_layer, packed=True)
        ours["dense, unpacked"] = partial(dense_layer, packed=False)
    return ours


def build(shape: Shape, copies: list[Parameters]) -> dict[str, list[Layer]]:
    """Every way that exists, once per copy of the weights."""
    made: dict[str, list[Layer]] = {}
    for name, builder in builders(shape).items():
        layers = [builder(shape, weights) for weights in copies]
        if None not in layers:
            made[name] = [layer for layer in layers if layer]
    return made
