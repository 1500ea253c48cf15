"""Sparse top-k mixture: a softmax router, and gated experts run on exactly the routed pairs that the counts allow.

Shazeer et al. 2017 (1701.06538); weights as in OLMoE (`normalise=False`) or Qwen3-MoE (`normalise=True`).
It does not know why a token has its count.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import activate
from model.config import TopK
from model.mixture.seam import Calls, Mixture, Use, ranks, sort_calls


class TopKMixture(Mixture):
    """Router [E, D], gate and up fused [E, 2F, D], down [E, D, F]."""

    def __init__(self, width: int, config: TopK) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.empty(config.experts, width))
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.width, width))
        self.down = nn.Parameter(torch.empty(config.experts, width, config.width))
        self.execute: Callable[[Tensor, Calls], Tensor] = self.run_ragged

    def forward(self, x_TD: Tensor, use: Use) -> Tensor:
        probs_TE = F.linear(x_TD, self.router).float().softmax(-1)
        calls = self.route(probs_TE, use)
        if use.observer is not None:
            use.observer.routed(use.layer, len(calls.token_R), calls.load_E, probs_TE)
        return self.execute(x_TD, calls)

    def route(self, probs_TE: Tensor, use: Use) -> Calls:
        """The first count(t) of each token's experts in falling order of probability; ties go to the lower index.

        One full sort serves every count, so that K's choice is a prefix of K+1's.
        """
        sorted_TE, expert_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        allowed_TK = ranks(use.counts_T, use.k_max)
        weight_TK = sorted_TE[:, : use.k_max]
        if self.config.normalise:
            weight_TK = weight_TK / (weight_TK * allowed_TK).cumsum(-1)[:, -1:]
        token_R, rank_R = allowed_TK.nonzero(as_tuple=True)
        return sort_calls(token_R, expert_TE[token_R, rank_R], weight_TK[token_R, rank_R], self.config.experts)

    def run_ragged(self, x_TD: Tensor, calls: Calls) -> Tensor:
        """Σ over a token's pairs of weight · expert(x), expert by expert in rising order."""
        y_TD = torch.zeros_like(x_TD)
        start = 0
        for expert, end in enumerate(calls.ends_E.tolist()):
            if end > start:
                token_r = calls.token_R[start:end]
                gate_rF, up_rF = F.linear(x_TD[token_r], self.gate_up[expert]).chunk(2, dim=-1)
                out_rD = F.linear(activate(gate_rF, self.config.activation) * up_rF, self.down[expert])
                y_TD.index_add_(0, token_r, (out_rD * calls.weight_R[start:end, None]).to(x_TD.dtype))
                start = end
        return y_TD

    def run_dense(self, x_TD: Tensor, calls: Calls) -> Tensor:
        """The same sum over all experts with zero weights: saves nothing, but in few large products. For training."""
        weight_TE = calls.weight_R.new_zeros(len(x_TD), self.config.experts)
        return self.dense(x_TD, weight_TE.index_put((calls.token_R, calls.expert_R), calls.weight_R))

    def dense(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """Σ_e weight[t, e] · expert_e(x_t)."""
        gate_TEF, up_TEF = F.linear(x_TD, self.gate_up.flatten(0, 1)).unflatten(-1, self.gate_up.shape[:2]).chunk(2, -1)
        h_TEF = activate(gate_TEF, self.config.activation) * up_TEF * weight_TE[..., None].to(gate_TEF.dtype)
        return F.linear(h_TEF.flatten(1), self.down.transpose(0, 1).flatten(1))
