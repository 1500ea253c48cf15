"""A causal soft mixture: the tokens of a segment share the weights of their experts, which follow from the segment
before it, as in Lory (arXiv 2405.03133).

Logits are Soft MoE's: scale · cos(mean, w_e) of the mean of what the layer read of the segment before; in the first
segment of its first token. Everything else is as in a sparse mixture whose weights are softmax(logits).

Ours: Lory merges the experts' parameters by these weights, which costs the same at every count; here what K experts
make is weighed. A state per sequence has the sum of the segment so far, and the logits of its tokens.
"""

import torch
from torch import Tensor, nn

from model.moe.soft import unit_logits
from model.moe.topk import TopKMixture
from model.registry import module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.soft import SoftSegments
from model.step import LayerStep


class SegmentMixture(TopKMixture):
    """The experts of a sparse mixture; its router [E, D] and `scale` [1] read means."""

    def __init__(self, shape: SoftSegments) -> None:
        super().__init__(shape.model_width, shape.topk)
        self.shape = shape
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        return self.mix(x_TD, self.segment_logits(x_TD, step), step)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Of means [N, D]: [N, E], float32."""
        return unit_logits(x_TD, self.router, self.scale).float()

    def segment_logits(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        """Of each token, [T, E], float32. The states move on with the step."""
        logits_TE = torch.empty(len(x_TD), self.config.experts, device=x_TD.device)
        for span, (rows, state, _) in zip(step.spans, step.states(self.shape.memory.size), strict=True):
            logits_TE[rows] = self._of_sequence(x_TD[rows].float(), span.context - span.rows, state)
        return logits_TE

    def _of_sequence(self, x_RD: Tensor, start: int, state: Tensor) -> Tensor:
        """Of the tokens of one sequence from position `start` on, [R, E]."""
        length, width = self.shape.segment, self.shape.model_width
        sum_D, shared_E = state[:width].clone(), state[width:].clone()
        parts, row = [], 0
        while row < len(x_RD):
            position = start + row
            end = min(len(x_RD), row + length - position % length)
            if position % length == 0:
                mean_D = sum_D / length if position else x_RD[0]
                shared_E, sum_D = self.logits(mean_D[None])[0], torch.zeros_like(sum_D)
            sum_D = sum_D + x_RD[row:end].sum(0)
            parts.append(shared_E.expand(end - row, -1))
            row = end
        state.copy_(torch.cat([sum_D, shared_E]).detach())
        return torch.cat(parts)


@module_for.register
def _(shape: SoftSegments, decoder: DecoderConfig) -> SegmentMixture:
    return SegmentMixture(shape)
