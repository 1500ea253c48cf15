"""Runs a plan on a decoder: builds the batch, calls the model, samples. The only place where plans become tensors."""

from dataclasses import replace

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from engine.batching import InputBatchBuilder
from engine.plan import Chunk, MoEWork, Plan, StepResult
from engine.sampling.logprobs import scores
from engine.sampling.sampler import sample
from engine.sequence import Sequence
from engine.speculation import capped_counts
from engine.types import Logprob
from model.backends.cpu.cache import NativeCache
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import PagedCache
from model.decoder import Decoder


class ExpertStats:
    """Observer of one step's mixtures: pairs computed, experts touched, how uneven the load was."""

    def __init__(self) -> None:
        self.pairs = 0
        self._loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs += pairs
        self._loads.append(load_E)

    def work(self, trained_pairs: int) -> MoEWork:
        """The sums over all mixtures seen so far."""
        distinct, uneven = torch.ops.moedial.spread(self._loads) if load().native else _spread(self._loads)
        return MoEWork(self.pairs, trained_pairs, distinct, uneven / max(1, len(self._loads)))


def _spread(loads: list[Tensor]) -> tuple[int, float]:
    """Experts that have any tokens, and the sum over the mixtures of the busiest's share over the mean."""
    arrays = [load.numpy() for load in loads]
    return sum(int(np.count_nonzero(a)) for a in arrays), sum(float(a.max() / a.mean()) for a in arrays if a.any())


class ModelRunner:
    """A decoder, native or on torch, and the paged cache that it made."""

    def __init__(self, model: Decoder | NativeDecoder, cache: PagedCache | NativeCache) -> None:
        self.model, self.cache = model, cache
        self._batching, self._guessing = InputBatchBuilder(cache.block_size), InputBatchBuilder(cache.block_size)
        self.draft_experts = 0  # how many experts guess, where chunks ask for guesses
        self._trained_pairs = model.config.experts.trained * len(model.config.mixtures)  # of a token

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk; sample for those that reach their last token, score the prompts that ask for it."""
        expert_stats = ExpertStats()
        if any(chunk.model_drafts for chunk in plan):
            plan = self._guess(plan, expert_stats)
        for chunk in plan:
            if chunk.drafts and chunk.sequence.matcher is not None:
                chunk.sequence.matcher.look_ahead(chunk.drafts)
        logits_RV = self.forward(plan, expert_stats)
        scoring = [chunk for chunk in plan if chunk.scored_positions]
        rows = len(logits_RV) - sum(len(chunk.scored_positions) for chunk in scoring)
        sampling = [chunk for chunk in plan if chunk.samples]
        drafts = [chunk.drafts for chunk in sampling]
        sampled = sample(logits_RV[:rows], [chunk.sequence for chunk in sampling], drafts) if rows else ()
        tokens = sum(chunk.length + len(chunk.drafts) for chunk in plan)
        return StepResult(sampled, expert_stats.work(tokens * self._trained_pairs), _scores(logits_RV[rows:], scoring))

    def forward(self, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        """Logits [R, V] of the rows that chunks want, in plan order: rows to sample from, then those to score with."""
        return self._forward(self._batching, plan, expert_stats)

    def _forward(self, batching: InputBatchBuilder, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        batch, pages = batching.step(plan)
        # The cache is of the decoder's own kind, which no type can say here.
        logits_RV: Tensor = self.model(batch, self.cache.attend(pages), expert_stats)  # type: ignore[arg-type]
        return logits_RV

    def _guess(self, plan: Plan, expert_stats: ExpertStats) -> Plan:
        """The same plan with guesses that the model made with fewer experts, token by token.

        Their keys and values lie where the plan's own will be: checking the guesses writes over them.
        """
        shadows = {chunk.sequence.id: _shadow(chunk, self.draft_experts) for chunk in plan if chunk.model_drafts}
        for done in range(max(chunk.model_drafts for chunk in plan)):
            going = [(chunk, shadows[chunk.sequence.id]) for chunk in plan if chunk.model_drafts > done]
            step = tuple(Chunk(shadow, chunk.start + done, 1) for chunk, shadow in going)
            results = sample(self._forward(self._guessing, step, expert_stats), [shadow for _, shadow in going])
            for (_, shadow), result in zip(going, results, strict=True):
                shadow.tokens.append(result.token)
        return tuple(
            structs.replace(chunk, drafts=tuple(shadows[chunk.sequence.id].tokens[-chunk.model_drafts :]))
            if chunk.model_drafts
            else chunk
            for chunk in plan
        )


def _shadow(chunk: Chunk, experts: int) -> Sequence:
    """A sequence like the chunk's, with fewer experts, which may go ahead."""
    own = chunk.sequence
    counts = capped_counts(own.request.budget.per_layer, experts)
    sampling = replace(own.request.sampling, logprobs=None)
    request = replace(own.request, budget=replace(own.request.budget, per_layer=counts), sampling=sampling)
    shadow = Sequence(request, own.arrived_at)
    shadow.tokens, shadow.blocks, shadow.slot = list(own.tokens), own.blocks, own.slot
    return shadow


def _scores(logits_NV: Tensor, chunks: list[Chunk]) -> tuple[tuple[Logprob, ...] | None, ...]:
    """The log-probabilities of prompt tokens: of each chunk those that follow from it."""
    found: list[tuple[Logprob, ...] | None] = []
    first = 0
    for chunk in chunks:
        tokens = [chunk.sequence.tokens[position] for position in chunk.scored_positions]
        rows_SV = logits_NV[first : first + len(tokens)]
        found.append(scores(rows_SV, tokens, chunk.sequence.request.sampling.prompt_logprobs))
        first += len(tokens)
    return tuple(found)
