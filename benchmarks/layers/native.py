"""The native kernels as `benchmarks.layer` calls them: a whole mixture layer around given weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.backends.cpu.blocks import feed_forward_block
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.rules import rule_arguments
from model.backends.cpu.weights import precision_for
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.shapes.mixtures import Infinity, TopK
from model.step import LayerStep


def native_layer(
    config: TopK | Infinity, parameters: dict[str, Tensor]
) -> Callable[[Tensor, LayerStep], Tensor] | None:
    """x_TD, use ↦ y_TD with the router included, around `parameters` (named as in the mixture's module, bf16), laid out
    for the kernel here and not in the call; None where there is no kernel for this machine.

    The op adds to its input, in float32: the time includes the conversion of the rows and taking the input off again.
    """
    if not load().native:
        return None
    width = parameters["router"].shape[1]
    with torch.device("meta"):
        module = InfinityMixture(width, config) if isinstance(config, Infinity) else TopKMixture(width, config)
    module.load_state_dict(parameters, assign=True)
    block = feed_forward_block(nn.Identity(), module, 0, precision_for(torch.bfloat16))
    op, arguments = getattr(torch.ops.moedial, block.op).default, block.arguments()

    def run(x_TD: Tensor, use: LayerStep) -> Tensor:
        y_TD = x_TD.float()
        noise = (use.seeds_T, use.positions_T) if isinstance(config, Infinity) else ()
        op(y_TD, use.budget.counts_T, *noise, use.budget.k_max, *rule_arguments(use.budget), *arguments)
        return y_TD.sub_(x_TD)

    return run
