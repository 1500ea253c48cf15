"""Runs a plan on a decoder: builds the batch, calls the model, samples. The only place where plans become tensors."""

import numpy as np
import torch
from torch import Tensor

from engine.batching import Batching
from engine.plan import Plan, StepResult, Work
from engine.sampler import sample
from model.attend import PagedCache
from model.decoder import Decoder
from model.kernels.library import load
from model.native.cache import NativeCache
from model.native.decoder import NativeDecoder


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
        distinct, uneven = torch.ops.moedial.spread(self._loads) if load().native else _spread(self._loads)
        return Work(self.pairs, trained_pairs, distinct, uneven / max(1, len(self._loads)))


def _spread(loads: list[Tensor]) -> tuple[int, float]:
    """Experts that have any tokens, and the sum over the mixtures of the busiest's share over the mean."""
    arrays = [load.numpy() for load in loads]
    return sum(int(np.count_nonzero(a)) for a in arrays), sum(float(a.max() / a.mean()) for a in arrays if a.any())


class ModelRunner:
    """A decoder, native or on torch, and the paged cache that it made."""

    def __init__(self, model: Decoder | NativeDecoder, cache: PagedCache | NativeCache) -> None:
        self.model, self.cache = model, cache
        self._batching = Batching(cache.block_size)
        self._trained_pairs = model.config.experts.trained * len(model.config.mixtures)  # of a token

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk; sample for those that reach their last token."""
        tally = Tally()
        logits_BV = self.forward(plan, tally)
        sampled = sample(logits_BV, [chunk.sequence for chunk in plan if chunk.samples]) if len(logits_BV) else ()
        return StepResult(sampled, tally.work(sum(chunk.length for chunk in plan) * self._trained_pairs))

    def forward(self, plan: Plan, tally: Tally) -> Tensor:
        """Logits [B, V] of the chunks that sample, in plan order."""
        batch, pages = self._batching.step(plan)
        # The cache is of the decoder's own kind, which no type can say here.
        logits_BV: Tensor = self.model(batch, self.cache.attend(pages), tally)  # type: ignore[arg-type]
        return logits_BV
