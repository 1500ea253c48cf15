"""The module of `RunningMean`: a state per sequence, and routed pairs as every sparse mixture has them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.moe.base import ranks, sort_pairs
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.step import LayerStep
from tests.new_kind.shape import RunningMean


class RunningMeanMixture(LayerModule):
    """Router [E, D], up [E, F, D], down [E, D, F]."""

    def __init__(self, shape: RunningMean) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(torch.empty(shape.experts, shape.width))
        self.up = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.width))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.width, shape.hidden))

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        m_TD = self._means(x_TD, step)
        probs_TE = F.linear(m_TD, self.router).float().softmax(-1)
        allowed_TK = ranks(step.budget)
        expert_TE = probs_TE.sort(dim=-1, descending=True, stable=True).indices
        token_R, rank_R = allowed_TK.nonzero(as_tuple=True)
        expert_R = expert_TE[token_R, rank_R]
        pairs = sort_pairs(token_R, expert_R, probs_TE[token_R, expert_R], self.shape.experts)
        if step.observer is not None:
            step.observer.routed(step.moe_layer, len(pairs.token_R), pairs.load_E, probs_TE)
        y_TD, start = torch.zeros_like(x_TD), 0
        for expert, end in enumerate(pairs.ends_E.tolist()):
            token_r, weight_r1 = pairs.token_R[start:end], pairs.weight_R[start:end, None]
            h_rF = F.silu(F.linear(m_TD[token_r], self.up[expert]))
            y_TD.index_add_(0, token_r, (F.linear(h_rF, self.down[expert]) * weight_r1).to(x_TD.dtype))
            start = end
        return y_TD

    def _means(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        m_TD = torch.empty_like(x_TD)
        for rows, sum_D, fresh in step.states(self.shape.width):
            if fresh:
                sum_D.zero_()
            sums_RD = torch.cat([sum_D[None], x_TD[rows].float()]).cumsum(0)[1:]
            sum_D.copy_(sums_RD[-1])
            m_TD[rows] = (sums_RD / (step.positions_T[rows, None] + 1)).to(x_TD.dtype)
        return m_TD


@module_for.register
def _(shape: RunningMean, decoder: DecoderConfig) -> RunningMeanMixture:
    return RunningMeanMixture(shape)
