"""A sparse mixture from torch's own operations, to hold ours against: `grouped_mm` over sorted pairs, and a product
that gathers each pair's weights. Both run one count for all tokens, wait for nothing, and can be captured in a graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model.activation import activate_gated
from model.moe.topk import TopKMixture

MAX_GATHERED = 64  # pairs: each brings a copy of its expert's weights
Layer = Callable[[TopKMixture, Tensor, int], Tensor]


def choose(module: TopKMixture, x_TD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token [T, K]: a softmax over all experts, or over the chosen ones."""
    router = module.config.router
    bias_E = module.router_bias.to(x_TD.dtype) if router.logit_bias else None
    logits_TE = F.linear(x_TD, module.router, bias_E).float()
    best_TK, expert_TK = logits_TE.topk(count)
    if router.normalise:
        return expert_TK, best_TK.softmax(-1)
    return expert_TK, logits_TE.softmax(-1).gather(1, expert_TK)


def grouped(module: TopKMixture, x_TD: Tensor, count: int) -> Tensor:
    """The mixture by torch's grouped product."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    expert_TK, weight_TK = choose(module, x_TD, count)
    expert_R = expert_TK.flatten()
    order_R = expert_R.argsort(stable=True)
    sorted_R = expert_R[order_R]
    place_E = torch.arange(module.config.experts, device=x_TD.device)
    offsets_E = (expert_R[:, None] == place_E).sum(0).cumsum(0).int()
    hidden_RF = grouped_mm(x_TD[order_R // count], module.gate_up.transpose(1, 2), offs=offsets_E)
    hidden_RF = _activated(module, hidden_RF, sorted_R)
    out_RD = grouped_mm(hidden_RF, module.down.transpose(1, 2), offs=offsets_E)
    if module.config.bias:
        out_RD = out_RD + module.down_bias[sorted_R].to(out_RD.dtype)
    pair_RD = torch.empty_like(out_RD)
    pair_RD[order_R] = out_RD
    return _summed(pair_RD, weight_TK)


def gathered(module: TopKMixture, x_TD: Tensor, count: int) -> Tensor:
    """The mixture by one small product for each pair, with a copy of its expert's weights."""
    expert_TK, weight_TK = choose(module, x_TD, count)
    expert_R = expert_TK.flatten()
    rows_RD1 = x_TD.repeat_interleave(count, dim=0)[:, :, None]
    hidden_RF = _activated(module, torch.bmm(module.gate_up[expert_R], rows_RD1)[:, :, 0], expert_R)
    out_RD = torch.bmm(module.down[expert_R], hidden_RF[:, :, None])[:, :, 0]
    if module.config.bias:
        out_RD = out_RD + module.down_bias[expert_R].to(out_RD.dtype)
    return _summed(out_RD, weight_TK)


def _activated(module: TopKMixture, hidden_RF: Tensor, expert_R: Tensor) -> Tensor:
    shape = module.config
    if shape.bias:
        hidden_RF = hidden_RF + module.gate_up_bias[expert_R].to(hidden_RF.dtype)
    gate, up = (hidden_RF[:, 0::2], hidden_RF[:, 1::2]) if shape.interleaved else hidden_RF.chunk(2, dim=-1)
    return activate_gated(gate, up, shape.activation)


def _summed(pair_RD: Tensor, weight_TK: Tensor) -> Tensor:
    pair_TKD = pair_RD.unflatten(0, weight_TK.shape)
    return (pair_TKD * weight_TK[:, :, None].to(pair_RD.dtype)).sum(1)
