"""Soft MoE (arXiv 2308.00951) over whole texts, with the choice of an expert subset.

With logits L [tokens, slots] of one text: slot inputs are softmax(L over tokens)ᵀ X, an expert runs on its own slots,
and a token takes softmax(L over slots) of what they make. Tokens see later ones: only an encoder can have such a layer.

A token of count K takes the K experts that have most combination weight, summed over all tokens of its text, from those
weights as they are ("drop") or over their sum ("renormalise"). After arXiv 2409.00879, whose text could not be read:
which of the two it does is not confirmed.
"""

import torch
from torch import Tensor, nn

from model.activation import activate, activate_gated
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.soft import SoftSlots
from model.step import LayerStep

EPSILON = 1e-6  # added to the squared lengths of tokens and slots


class SoftMixture(LayerModule):
    """Slots [E · slots, D], scale [1], up [E, F, D] (with gates [E, 2F, D], gate first), down [E, D, F]."""

    def __init__(self, width: int, shape: SoftSlots) -> None:
        super().__init__()
        self.shape = shape
        rows = shape.width * (2 if shape.gated else 1)
        self.slots = nn.Parameter(torch.empty(shape.experts * shape.slots, width))
        self.scale = nn.Parameter(torch.empty(1))
        self.up = nn.Parameter(torch.empty(shape.experts, rows, width))
        self.down = nn.Parameter(torch.empty(shape.experts, width, shape.width))

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        if step.budget.reroutes:
            raise ValueError(self.shape.rule_refusal)
        logits_TS = unit_logits(x_TD, self.slots, self.scale)
        y_TD = torch.empty_like(x_TD)
        expert_TE = torch.empty(len(x_TD), self.shape.experts, dtype=torch.int64, device=x_TD.device)
        for span in step.spans:
            rows = slice(span.first, span.first + span.rows)
            expert_E = self.ranked(logits_TS[rows])
            expert_TE[rows] = expert_E
            y_TD[rows] = self.mix(x_TD[rows], logits_TS[rows], expert_E, step.budget.counts_T[rows])
        self._tell(step, logits_TS, expert_TE)
        return y_TD

    def by_expert(self, weight_TS: Tensor) -> Tensor:
        """[T, E, slots]."""
        return weight_TS.unflatten(1, (self.shape.experts, self.shape.slots))

    def ranked(self, logits_TS: Tensor) -> Tensor:
        """All experts by falling weight over a text's tokens, equal ones by number."""
        mass_E = self.by_expert(logits_TS.softmax(1)).sum((0, 2))
        return mass_E.sort(descending=True, stable=True).indices

    def mix(self, x_TD: Tensor, logits_TS: Tensor, expert_E: Tensor, counts_T: Tensor) -> Tensor:
        """The output of one text. Each token uses the first `counts_T` experts of the order `expert_E`."""
        expert_K = expert_E[: int(counts_T.max())]
        dispatch_TKp = self.by_expert(logits_TS.softmax(0))[:, expert_K]
        slots_KpD = torch.einsum("tkp,td->kpd", dispatch_TKp, x_TD.to(dispatch_TKp.dtype))
        made_KpD = self.run(slots_KpD.to(x_TD.dtype), expert_K).to(dispatch_TKp.dtype)
        rank_K = torch.arange(len(expert_K), device=x_TD.device)
        weight_TKp = self.combine(logits_TS, expert_K, rank_K < counts_T[:, None])
        return torch.einsum("tkp,kpd->td", weight_TKp, made_KpD).to(x_TD.dtype)

    def combine(self, logits_TS: Tensor, expert_K: Tensor, runs_TK: Tensor) -> Tensor:
        """What a token takes of each slot [T, K, slots]; zero of experts that do not run for it."""
        if self.shape.restriction == "drop":
            return self.by_expert(logits_TS.softmax(1))[:, expert_K] * runs_TK[..., None]
        kept_TKp = self.by_expert(logits_TS)[:, expert_K].masked_fill(~runs_TK[..., None], -torch.inf)
        return kept_TKp.flatten(1).softmax(1).view_as(kept_TKp)

    def run(self, slots_KpD: Tensor, expert_K: Tensor) -> Tensor:
        """Each of these experts on its own slots."""
        up_KpF = slots_KpD @ self.up[expert_K].mT
        if self.shape.gated:
            gate_KpF, value_KpF = up_KpF.chunk(2, dim=-1)
            h_KpF = activate_gated(gate_KpF, value_KpF, self.shape.activation)
        else:
            h_KpF = activate(up_KpF, self.shape.activation)
        return h_KpF @ self.down[expert_K].mT

    def _tell(self, step: LayerStep, logits_TS: Tensor, expert_TE: Tensor) -> None:
        """A pair is a token and an expert whose slots it takes from."""
        if step.observer is None:
            return
        counts_T1 = step.budget.counts_T[:, None]
        runs_TE = torch.arange(self.shape.experts, device=expert_TE.device) < counts_T1
        load_E = torch.zeros_like(runs_TE).scatter(1, expert_TE, runs_TE).sum(0)
        weight_TE = self.by_expert(logits_TS.softmax(1)).sum(2)
        step.observer.routed(step.moe_layer, step.budget.pairs, load_E, weight_TE)
        if step.budget.adaptive:
            step.observer.used(step.moe_layer, step.budget.counts_T)
        if step.routes:
            first_TK = expert_TE.where(runs_TE, -1)[:, : step.budget.k_max]
            step.observer.routes(step.moe_layer, first_TK.int())


def unit_logits(x_TD: Tensor, slots_SD: Tensor, scale: Tensor) -> Tensor:
    """scale · x / |x| · slot / |slot|, in float32 or what is wider."""
    x_TD, slots_SD = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (x_TD, slots_SD))
    return scale.to(x_TD.dtype) * (_unit(x_TD) @ _unit(slots_SD).T)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


@module_for.register
def _(shape: SoftSlots, decoder: DecoderConfig) -> SoftMixture:
    return SoftMixture(decoder.width, shape)
