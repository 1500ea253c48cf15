"""MoE++ (arXiv 2410.07348): a top-k mixture in whose pool some experts compute nothing.

With x the input, a zero expert gives 0, a copy expert x, and a constant expert α₁ x + α₂ v, where v is learned and
[α₁, α₂] = softmax(W_c x). The router's logits are W x, plus those of the mixture before this one times a matrix. The
weights are softmax(logits), 0 for zero experts, normalised over what a token chose.

Ours: `free_bias` of a request is added to the logits of experts that compute nothing when experts are chosen, not when
they are weighed, and not in what the next mixture gets.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.moe.base import Choice, ranks, rule_offsets, running_sum
from model.moe.topk import TopKMixture
from model.registry import module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.moe_plus_plus import MoEPlusPlus
from model.step import LayerStep


class MoEPlusPlusMixture(TopKMixture):
    """Router [P, D] of the whole pool, residual [P, P]; constants v [C, D] and W_c [C, 2, D]."""

    config: MoEPlusPlus

    def __init__(self, width: int, config: MoEPlusPlus) -> None:
        super().__init__(width, config)
        pool = config.num_experts
        self.router = nn.Parameter(torch.empty(pool, width))
        if config.residual:
            self.residual = nn.Parameter(torch.empty(pool, pool))
        if config.constant:
            self.constants = nn.Parameter(torch.empty(config.constant, width))
            self.constant_mix = nn.Parameter(torch.empty(config.constant, 2, width))

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        return self.mix(x_TD, self.routed_logits(x_TD, step), step)

    def routed_logits(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """Router logits [T, P], float32, which the next mixture gets too."""
        logits_TE = self.logits(x_TD)
        if self.config.residual:
            if not step.router_logits:
                raise ValueError("there is no mixture before this one whose logits it could add")
            logits_TE = logits_TE + F.linear(step.router_logits[-1], self.residual.float())
        step.router_logits.append(logits_TE)
        return logits_TE

    def choose(self, logits_TE: Tensor, step: LayerStep) -> Choice:
        """Which of the pool each token takes, and their weights."""
        budget, config = step.budget, self.config
        if budget.ranks or any(rule.kept for rule in budget.rules):
            raise ValueError("MoE++ runs no routing rule but a bias of experts that compute nothing")
        expert_E = torch.arange(config.num_experts, device=logits_TE.device)
        bias_T1 = rule_offsets(budget, "free_bias")
        ranked_TE = logits_TE if bias_T1 is None else logits_TE + bias_T1 * (expert_E >= config.experts)
        expert_TK = ranked_TE.sort(dim=-1, descending=True, stable=True).indices[:, : budget.k_max]
        score_TE = logits_TE.softmax(-1) * (expert_E < config.num_experts - config.zero)
        weight_TK, runs_TK = score_TE.gather(-1, expert_TK), ranks(budget)
        sum_T1 = running_sum(weight_TK * runs_TK)
        return Choice(expert_TK, weight_TK / sum_T1.clamp(min=torch.finfo(sum_T1.dtype).tiny), runs_TK)

    def run(self, x_TD: Tensor, choice: Choice, logits_TE: Tensor, step: LayerStep) -> Tensor:
        """The feed-forward experts as in any top-k mixture, and what the others give."""
        computes_TK = choice.runs_TK & (choice.expert_TK < self.config.experts)
        routed = Choice(choice.expert_TK, choice.weight_TK, computes_TK)
        return super().run(x_TD, routed, logits_TE, step) + self.free(x_TD, choice).to(x_TD.dtype)

    def free(self, x_TD: Tensor, choice: Choice) -> Tensor:
        """Σ of the constant and the copy experts that a token chose, float32."""
        config = self.config
        weight_TE, _ = choice.by_expert(config.num_experts)
        kinds = [config.experts, config.constant, config.copy, config.zero]
        _, constant_TC, copy_TC, _ = weight_TE.split(kinds, dim=-1)
        x_TD, share_T1 = x_TD.float(), copy_TC.sum(-1, keepdim=True)
        if not config.constant:
            return share_T1 * x_TD
        alpha_TC2 = torch.einsum("td,cad->tca", x_TD, self.constant_mix.float()).softmax(-1)
        share_T1 = share_T1 + (constant_TC * alpha_TC2[..., 0]).sum(-1, keepdim=True)
        return share_T1 * x_TD + (constant_TC * alpha_TC2[..., 1]) @ self.constants.float()


@module_for.register
def _(shape: MoEPlusPlus, decoder: DecoderConfig) -> MoEPlusPlusMixture:
    return MoEPlusPlusMixture(decoder.width, shape)
