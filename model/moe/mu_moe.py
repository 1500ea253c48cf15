"""µMoE (arXiv 2402.12550): every expert is a slice of one tensor, of which only factors exist.

y = Σ_n a_n W_n [x; 1] with a = entmax-1.5(norm(G x)). CP, of rank Q: y = C ((Aᵀ a) ⊙ (Bᵀ [x; 1])). TR: the product of
the cores contracted with a and with [x; 1], and the trace of that with the core of each output. Two such maps with an
activation between them and the same a are a layer.

Ours: a count K. The K largest of a are kept, over their sum or as they are; the others are zero. No cost depends on it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import devices
from model.activation import activate
from model.batch import LayerBudget
from model.moe.base import Choice, ranks, running_sum
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.mu_moe import MuMoE
from model.step import LayerStep


def entmax15(logits_TE: Tensor) -> Tensor:
    """(z / 2 - τ)₊² with the τ at which a row sums to 1 (Peters et al. 2019, arXiv 1905.05702), exact by sorting."""
    half_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)) / 2
    falling_TE = half_TE.sort(dim=-1, descending=True).values
    first_E = torch.arange(1, half_TE.shape[-1] + 1, device=half_TE.device, dtype=half_TE.dtype)
    mean_TE = falling_TE.cumsum(-1) / first_E
    spread_TE = falling_TE.square().cumsum(-1) - first_E * mean_TE.square()
    tau_TE = mean_TE - ((1 - spread_TE) / first_E).clamp(min=0).sqrt()  # where the first n of a row are not zero
    support_T1 = (tau_TE <= falling_TE).sum(-1, keepdim=True)
    return (half_TE - tau_TE.gather(-1, support_T1 - 1)).clamp(min=0).square()


class FactorisedMap(nn.Module):
    """A linear map per expert, as factors or cores of the experts, the inputs (with bias the last one is 1) and the
    outputs."""

    def __init__(self, inputs: int, outputs: int, shape: MuMoE) -> None:
        super().__init__()
        self.bias, self.is_ring = shape.bias, shape.factorisation == "tr"
        experts, reads, gives = shape.factor_shapes(inputs, outputs)
        self.experts = nn.Parameter(torch.empty(experts))
        self.inputs = nn.Parameter(torch.empty(reads))
        self.outputs = nn.Parameter(torch.empty(gives))

    def forward(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """Σ_n weight_n W_n [x; 1]; W is never formed."""
        if self.bias:
            x_TD = F.pad(x_TD, (0, 1), value=1.0)
        if not self.is_ring:
            both_TQ: Tensor = (weight_TE @ self.experts) * (x_TD @ self.inputs)
            return both_TQ @ self.outputs.T
        experts_Tpq = torch.einsum("te,peq->tpq", weight_TE, self.experts)
        inputs_Tqr = torch.einsum("td,qdr->tqr", x_TD, self.inputs)
        return torch.einsum("tpr,rop->to", experts_Tpq @ inputs_Tqr, self.outputs)


class MultilinearMixture(LayerModule):
    """Gate [E, D] and two factorised maps, D → F → D."""

    def __init__(self, width: int, shape: MuMoE) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(width, shape.experts, bias=shape.gate_bias)
        if shape.input_norm:
            self.input_norm = nn.LayerNorm(width)
        self.up = FactorisedMap(width, shape.width, shape)
        self.down = FactorisedMap(shape.width, width, shape)

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        gate_TE = self.weights(x_TD)
        choice = self.choose(gate_TE, step.budget)
        weight_TE, runs_TE = choice.by_expert(self.shape.experts)
        self._tell(step, gate_TE, choice, runs_TE)
        weight_TE = weight_TE.to(x_TD.dtype)
        read_TD = self.input_norm(x_TD) if self.shape.input_norm else x_TD
        h_TF = activate(self.up(read_TD, weight_TE), self.shape.activation)
        y_TD: Tensor = self.down(h_TF, weight_TE)
        return y_TD

    def weights(self, x_TD: Tensor) -> Tensor:
        """The gate's weights of all experts, [T, E] float32."""
        logits_TE = self.gate(x_TD).float()
        if self.shape.gate_norm == "layer":
            logits_TE = F.layer_norm(logits_TE, logits_TE.shape[-1:])
        return entmax15(logits_TE)

    def choose(self, gate_TE: Tensor, budget: LayerBudget) -> Choice:
        """The experts of most weight, ties to the lower index, without those of weight zero."""
        if budget.reroutes:
            raise ValueError("a µMoE runs no routing rule")
        best_TE = gate_TE.sort(dim=-1, descending=True, stable=True)
        weight_TK = best_TE.values[:, : budget.k_max]
        runs_TK = ranks(budget) & (weight_TK > 0)
        if self.shape.restriction == "renormalise":
            weight_TK = weight_TK / running_sum(weight_TK * runs_TK)
        return Choice(best_TE.indices[:, : budget.k_max], weight_TK, runs_TK)

    def _tell(self, step: LayerStep, gate_TE: Tensor, choice: Choice, runs_TE: Tensor) -> None:
        if step.observer is None:
            return
        load_E = runs_TE.sum(0)
        pairs = int(load_E.sum()) if devices.readable(load_E) else step.budget.pairs
        step.observer.routed(step.moe_layer, pairs, load_E, gate_TE)
        step.observer.used(step.moe_layer, choice.used_T)
        if step.routes:
            step.observer.routes(step.moe_layer, choice.routes_TK)


@module_for.register
def _(shape: MuMoE, decoder: DecoderConfig) -> MultilinearMixture:
    return MultilinearMixture(decoder.width, shape)
