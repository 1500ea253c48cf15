"""Sparse top-k mixture: a router, experts run on exactly the routed pairs that the counts allow, and a shared
part.

Shazeer et al. 2017 (1701.06538); shared experts as in DeepSeekMoE (2401.06066), with a gate of their own as in
Qwen2-MoE. Not here: how logits become a choice (see `model/moe/router.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import devices
from model.activation import activate, activate_gated
from model.layers import DenseFFN
from model.moe.base import Choice, RoutedPairs
from model.moe.dropping import kept
from model.moe.router import choose, scores
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK
from model.step import LayerStep

MAX_PADDED = 1 << 26  # values that `run_padded` computes at a time, over all experts


class TopKMixture(LayerModule):
    """Router [E, D], gate and up fused [E, 2F, D] (without gates [E, F, D]), down [E, D, F]."""

    def __init__(self, width: int, config: TopK) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.experts, config.width
        rows = hidden * (2 if config.gated else 1)
        self.router = nn.Parameter(torch.empty(experts, width))
        self.gate_up = nn.Parameter(torch.empty(experts, rows, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        if config.router.logit_bias:
            self.router_bias = nn.Parameter(torch.empty(experts))
        if config.router.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(experts))
        if config.router.score == "top_any":
            self.temperature = nn.Parameter(torch.empty(1))
            self.thresholds = nn.Parameter(torch.empty(experts))
        if config.bias:
            self.gate_up_bias = nn.Parameter(torch.empty(experts, rows))
            self.down_bias = nn.Parameter(torch.empty(experts, width))
        if config.shared is not None:
            self.shared = DenseFFN(width, config.shared)
        if config.shared_gate:
            self.shared_gate = nn.Linear(width, 1, bias=False)
        self.execute: Callable[[Tensor, RoutedPairs], Tensor] | None = None  # another way than `run_ragged`

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        return self.mix(x_TD, self.logits(x_TD), step)

    def mix(self, x_TD: Tensor, logits_TE: Tensor, step: LayerStep) -> Tensor:
        """The output for given router logits [T, E]."""
        y_TD = self.run(x_TD, self.choose(logits_TE, step), logits_TE, step)
        return y_TD if self.config.shared is None else y_TD + self.shared_output(x_TD)

    def run(self, x_TD: Tensor, choice: Choice, logits_TE: Tensor, step: LayerStep) -> Tensor:
        """The weighted sum of the experts that run. Reports them to the observer."""
        if self.execute is not None or devices.readable(x_TD):
            pairs = choice.pairs(self.config.experts)
            count, load_E = len(pairs.token_R), pairs.load_E
            y_TD = (self.execute or self.run_ragged)(x_TD, pairs)
        else:
            by_expert = choice.by_expert(self.config.num_experts)
            weight_TE, runs_TE = (found_TE[:, : self.config.experts] for found_TE in by_expert)
            count, load_E = step.budget.pairs, runs_TE.sum(0)
            y_TD = self.run_padded(x_TD, weight_TE, runs_TE)
        if step.observer is not None:
            step.observer.routed(step.moe_layer, count, load_E, scores(logits_TE, self.config.router))
            if step.budget.adaptive or self.config.adaptive or self.config.dropping is not None:
                step.observer.used(step.moe_layer, choice.used_T)
            if step.routes:
                step.observer.routes(step.moe_layer, choice.routes_TK)
        return y_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """Router logits [T, E], float32."""
        if self.config.router.score == "top_any":
            cosine_TE = F.linear(F.normalize(x_TD.float(), dim=-1), F.normalize(self.router.float(), dim=-1))
            return cosine_TE * self.temperature.float()
        logits_TE = F.linear(x_TD, self.router).float()
        return logits_TE + self.router_bias.float() if self.config.router.logit_bias else logits_TE

    def choose(self, logits_TE: Tensor, step: LayerStep) -> Choice:
        """Which of each token's experts run, and their weights."""
        router, dropping = self.config.router, self.config.dropping
        bias_E = self.selection_bias.float() if router.selection_bias else None
        if router.score == "top_any":
            bias_E = -self.temperature.float() * self.thresholds.float()
        choice = choose(logits_TE, step.budget, router, bias_E, self.config.trained)
        if dropping is None:
            return choice
        return kept(choice, scores(logits_TE, router), lambda: step.spans, dropping, router)

    def route(self, logits_TE: Tensor, step: LayerStep) -> RoutedPairs:
        """Which of each token's experts run, as pairs sorted by expert."""
        return self.choose(logits_TE, step).pairs(self.config.experts)

    def shared_output(self, x_TD: Tensor) -> Tensor:
        """The output of the shared experts, which run at any count."""
        y_TD: Tensor = self.shared(x_TD)
        return y_TD * self.shared_gate(x_TD).sigmoid() if self.config.shared_gate else y_TD

    def run_ragged(self, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
        """Σ over a token's pairs of weight · expert(x), expert by expert in rising order."""
        y_TD = torch.zeros_like(x_TD)
        start = 0
        for expert, end in enumerate(pairs.ends_E.tolist()):
            if end > start:
                token_r = pairs.token_R[start:end]
                weight_r1 = pairs.weight_R[start:end, None]
                out_rD = self.expert(x_TD[token_r], weight_r1, expert)
                y_TD.index_add_(0, token_r, out_rD.to(x_TD.dtype))
                start = end
        return y_TD

    def expert(self, x_rD: Tensor, weight_r1: Tensor, expert: int) -> Tensor:
        """weight · expert(x), or expert(weight · x)."""
        if self.config.router.weigh_input:
            x_rD, weight_r1 = (x_rD * weight_r1).to(x_rD.dtype), torch.ones_like(weight_r1)
        up_bias = self.gate_up_bias[expert] if self.config.bias else None
        down_bias = self.down_bias[expert] if self.config.bias else None
        h_rF = self.activated(F.linear(x_rD, self.gate_up[expert], up_bias))
        return F.linear(h_rF, self.down[expert], down_bias) * weight_r1

    def activated(self, both: Tensor) -> Tensor:
        """activation(gate) · up of [..., 2F], or without gates activation(up) of [..., F]."""
        if not self.config.gated:
            return activate(both, self.config.activation)
        if self.config.interleaved:
            gate, up = both[..., 0::2], both[..., 1::2]
        else:
            gate, up = both.chunk(2, dim=-1)
        return activate_gated(gate, up, self.config.activation)

    def run_padded(self, x_TD: Tensor, weight_TE: Tensor, runs_TE: Tensor) -> Tensor:
        """The same as `run_ragged`, computed for all experts and masked. It costs all experts, but no shape depends on
        values, so the host need not wait for the device."""
        rows = max(1, MAX_PADDED // (self.gate_up[..., 0].numel() + self.down[..., 0].numel()))
        parts = zip(x_TD.split(rows), weight_TE.split(rows), runs_TE.split(rows), strict=True)
        return torch.cat([self._padded(*part) for part in parts])

    def _padded(self, x_TD: Tensor, weight_TE: Tensor, runs_TE: Tensor) -> Tensor:
        x_ETD, weight_ET1 = x_TD.expand(self.config.experts, -1, -1), weight_TE.T[..., None]
        if self.config.router.weigh_input:
            x_ETD, weight_ET1 = (x_ETD * weight_ET1).to(x_TD.dtype), torch.ones_like(weight_ET1)
        both_ETF = x_ETD @ self.gate_up.mT
        if self.config.bias:
            both_ETF = both_ETF + self.gate_up_bias[:, None]
        out_ETD = self.activated(both_ETF) @ self.down.mT
        if self.config.bias:
            out_ETD = out_ETD + self.down_bias[:, None]
        kept_ETD = (out_ETD * weight_ET1).where(runs_TE.T[..., None], 0)
        return kept_ETD.sum(0).to(x_TD.dtype)

    def run_dense(self, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
        """The same as `run_ragged`, computed for all experts with zero weights: more work, in few large products. For
        training of mixtures without biases."""
        weight_TE = pairs.weight_R.new_zeros(len(x_TD), self.config.experts)
        return self.dense(x_TD, weight_TE.index_put((pairs.token_R, pairs.expert_R), pairs.weight_R))

    def dense(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """Σ_e weight[t, e] · expert_e(x_t)."""
        experts_and_units = self.gate_up.shape[:2]
        both_TEF = F.linear(x_TD, self.gate_up.flatten(0, 1)).unflatten(-1, experts_and_units)
        h_TEF = self.activated(both_TEF) * weight_TE[..., None].to(both_TEF.dtype)
        return F.linear(h_TEF.flatten(1), self.down.transpose(0, 1).flatten(1))


@module_for.register
def _(shape: TopK, decoder: DecoderConfig) -> TopKMixture:
    return TopKMixture(decoder.width, shape)
