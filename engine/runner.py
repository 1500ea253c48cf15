"""Runs a plan on a decoder: builds the batch, calls the model, samples. The only place where plans become tensors."""

import torch
from torch import Tensor

from engine.plan import Chunk, Plan, StepResult, Work
from engine.sampler import sample
from model.attend import PagedAttend, PagedCache
from model.batch import Batch, Pages, Span
from model.decoder import Decoder


class Tally:
    """Observer of one step's mixtures: pairs computed, experts touched, how uneven the load was."""

    def __init__(self) -> None:
        self.pairs = 0
        self._loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs += pairs
        self._loads.append(load_E)

    def work(self, trained_pairs: int) -> Work:
        """The sums over all mixtures seen so far."""
        if not self._loads:
            return Work(0, 0, 0, 0.0)
        distinct = sum(int(load.count_nonzero()) for load in self._loads)
        uneven = [float(load.max() / load.float().mean().clamp(min=1e-9)) for load in self._loads]
        return Work(self.pairs, trained_pairs, distinct, sum(uneven) / len(uneven))


class ModelRunner:
    """A decoder and its paged cache."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk; sample for those that reach their last token."""
        tally = Tally()
        logits_BV = self.forward(plan, tally)
        sampled = sample(logits_BV, [chunk.sequence for chunk in plan if chunk.samples]) if len(logits_BV) else ()
        trained = self.model.config.experts.trained * len(self.model.config.mixtures)
        return StepResult(sampled, tally.work(sum(chunk.length for chunk in plan) * trained))

    def forward(self, plan: Plan, tally: Tally) -> Tensor:
        """Logits [B, V] of the chunks that sample, in plan order."""
        lengths_B = torch.tensor([chunk.length for chunk in plan])
        batch = Batch(
            ids_T=torch.tensor([t for c in plan for t in c.sequence.tokens[c.start : c.start + c.length]]),
            positions_T=torch.cat([torch.arange(c.start, c.start + c.length) for c in plan]),
            seeds_T=torch.tensor([c.sequence.request.sampling.seed for c in plan]).repeat_interleave(lengths_B),
            experts_LT=_counts(plan).repeat_interleave(lengths_B, dim=1),
            k_max=max((max(c.sequence.request.budget.per_layer, default=0) for c in plan), default=0),
            rows_B=(lengths_B.cumsum(0) - 1)[[chunk.samples for chunk in plan]],
        )
        attend = PagedAttend(self.cache, self._pages(plan, batch.positions_T))
        logits_BV: Tensor = self.model(batch, attend, tally)
        return logits_BV

    def _pages(self, plan: Plan, positions_T: Tensor) -> Pages:
        size = self.cache.block_size
        longest = max(-(-(c.start + c.length) // size) for c in plan)
        tables = [(c.sequence.blocks[:longest] + [0] * longest)[:longest] for c in plan]
        lengths_B = torch.tensor([chunk.length for chunk in plan])
        tables_BP = torch.tensor(tables)
        row_T = torch.arange(len(plan)).repeat_interleave(lengths_B)
        slots_T = tables_BP[row_T, positions_T // size] * size + positions_T % size
        return Pages(slots_T, tables_BP, tuple(_spans(plan)))


def _counts(plan: Plan) -> Tensor:
    """The allowed count per MoE layer and sequence, [L, B]."""
    return torch.tensor([chunk.sequence.request.budget.per_layer for chunk in plan]).T


def _spans(plan: tuple[Chunk, ...]) -> list[Span]:
    spans, first = [], 0
    for chunk in plan:
        spans.append(Span(first, chunk.length, chunk.start + chunk.length))
        first += chunk.length
    return spans
