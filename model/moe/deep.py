"""One level of a Deep MoE (arXiv 1312.4314): z = Σ g_i(x) · relu(W_i x + b_i), g a softmax by a gate of two layers.

In the paper level follows level, and a linear map the last one. Here a level is the feed-forward layer of a decoder's
layer: its gate and its experts read what the levels below have made, by way of the residual stream, and a linear map
brings every level's output back to the model's width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import LayerBudget
from model.moe.base import Choice, RoutedPairs
from model.moe.router import choose
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.deep import DeepLevel
from model.shapes.mixtures import Router
from model.step import LayerStep


class DeepMixture(LayerModule):
    """Gate D → G → E, experts [E, F, D] and their biases [E, F], out F → D."""

    def __init__(self, width: int, shape: DeepLevel) -> None:
        super().__init__()
        self.shape = shape
        self.router = Router(normalise=shape.restriction == "renormalise")
        self.gate_hidden = nn.Linear(width, shape.gate_width, bias=shape.bias)
        self.gate = nn.Linear(shape.gate_width, shape.experts, bias=shape.bias)
        self.experts = nn.Parameter(torch.empty(shape.experts, shape.width, width))
        if shape.bias:
            self.expert_bias = nn.Parameter(torch.empty(shape.experts, shape.width))
        self.out = nn.Linear(shape.width, width, bias=shape.bias)
        self.constraint: Callable[[Tensor], Tensor] | None = None  # what a training makes of the gate's logits

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        logits_TE = self.gate(self.gate_hidden(x_TD).relu()).float()
        if self.constraint is not None:
            logits_TE = self.constraint(logits_TE)
        choice = choose(logits_TE, self.of_level(step.budget), self.router, None, self.shape.experts)
        pairs = choice.pairs(self.shape.experts)
        self._tell(step, logits_TE, choice, pairs)
        y_TD: Tensor = self.out(self.run(x_TD, pairs))
        return y_TD

    def of_level(self, budget: LayerBudget) -> LayerBudget:
        """Counts above the level's number of experts mean all of them."""
        if budget.k_max <= self.shape.experts:
            return budget
        counts_T = budget.counts_T.clamp(max=self.shape.experts)
        return replace(budget, counts_T=counts_T, k_max=self.shape.experts, known_pairs=None)

    def run(self, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
        """Σ over a token's pairs of weight · expert(x) [T, F], expert by expert in rising order."""
        z_TF, start = x_TD.new_zeros(len(x_TD), self.shape.width), 0
        for expert, end in enumerate(pairs.ends_E.tolist()):
            if end > start:
                token_r, weight_r1 = pairs.token_R[start:end], pairs.weight_R[start:end, None]
                bias_F = self.expert_bias[expert] if self.shape.bias else None
                h_rF = F.linear(x_TD[token_r], self.experts[expert], bias_F).relu()
                z_TF.index_add_(0, token_r, (h_rF * weight_r1).to(x_TD.dtype))
                start = end
        return z_TF

    def _tell(self, step: LayerStep, logits_TE: Tensor, choice: Choice, pairs: RoutedPairs) -> None:
        if step.observer is None:
            return
        step.observer.routed(step.moe_layer, len(pairs.token_R), pairs.load_E, logits_TE.softmax(-1))
        if step.budget.adaptive or self.shape.adaptive:
            step.observer.used(step.moe_layer, choice.used_T)
        if step.routes:
            step.observer.routes(step.moe_layer, choice.routes_TK)


@module_for.register
def _(shape: DeepLevel, decoder: DecoderConfig) -> DeepMixture:
    return DeepMixture(decoder.width, shape)
