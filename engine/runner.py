"""Runs a plan on a decoder: builds the batch, calls the model, samples. It knows no queues and does not schedule."""

from dataclasses import replace

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from engine.batching import InputBatchBuilder
from engine.plan import Chunk, MoEWork, Plan, Sampled, StepResult
from engine.sampling.logprobs import scores
from engine.sampling.sampler import sample
from engine.sequence import Sequence
from engine.types import Logprob
from model.backends.cpu.cache import NativeCache
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import PagedCache
from model.decoder import Decoder


class ExpertStats:
    """Observes the mixtures of one step: routed pairs, distinct experts, load imbalance."""

    def __init__(self) -> None:
        self.pairs = 0
        self._loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs += pairs
        self._loads.append(load_E)

    def work(self, trained_pairs: int) -> MoEWork:
        """The work of all mixtures observed so far; `trained_pairs` is what the trained count would have cost."""
        distinct, imbalance = torch.ops.moedial.spread(self._loads) if load().native else _load_spread(self._loads)
        return MoEWork(self.pairs, trained_pairs, distinct, imbalance / max(1, len(self._loads)))


def _load_spread(loads: list[Tensor]) -> tuple[int, float]:
    """The experts with at least one token, and the busiest expert's load over the mean; both summed over mixtures."""
    arrays = [load.numpy() for load in loads]
    distinct = sum(int(np.count_nonzero(load_E)) for load_E in arrays)
    imbalance = sum(float(load_E.max() / load_E.mean()) for load_E in arrays if load_E.any())
    return distinct, imbalance


class ModelRunner:
    """A decoder, on native kernels or torch, with its paged cache."""

    def __init__(self, model: Decoder | NativeDecoder, cache: PagedCache | NativeCache) -> None:
        self.model, self.cache = model, cache
        self._inputs = InputBatchBuilder(cache.block_size)
        self._draft_inputs = InputBatchBuilder(cache.block_size)
        self.draft_experts = 0  # the expert count of drafts, where chunks ask for model drafts
        self._trained_pairs = model.config.experts.trained * len(model.config.mixtures)  # per token

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk; sample for those that reach their last token, score the prompts that ask for it."""
        expert_stats = ExpertStats()
        if any(chunk.model_drafts for chunk in plan):
            plan = self._draft(plan, expert_stats)
        for chunk in plan:
            if chunk.drafts and chunk.sequence.matcher is not None:
                chunk.sequence.matcher.look_ahead(chunk.drafts)
        logits_RV = self.forward(plan, expert_stats)
        scoring = [chunk for chunk in plan if chunk.scored_positions]
        sampled_rows = len(logits_RV) - sum(len(chunk.scored_positions) for chunk in scoring)
        sampled = _sample(logits_RV[:sampled_rows], plan) if sampled_rows else ()
        tokens = sum(chunk.length + len(chunk.drafts) for chunk in plan)
        work = expert_stats.work(tokens * self._trained_pairs)
        return StepResult(sampled, work, _prompt_logprobs(logits_RV[sampled_rows:], scoring))

    def forward(self, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        """Logits [R, V] of the rows that chunks ask for, in plan order: rows to sample from, then rows that score."""
        return self._forward(self._inputs, plan, expert_stats)

    def _forward(self, inputs: InputBatchBuilder, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        batch, pages = inputs.build(plan)
        # The cache is of the decoder's own kind, which no type can say here.
        logits_RV: Tensor = self.model(batch, self.cache.attend(pages), expert_stats)  # type: ignore[arg-type]
        return logits_RV

    def _draft(self, plan: Plan, expert_stats: ExpertStats) -> Plan:
        """The same plan with drafts that the model made with fewer experts, one token per forward pass.

        The drafts' keys and values are written where the plan's own belong: verifying the drafts overwrites them.
        """
        copies = {chunk.sequence.id: _draft_sequence(chunk, self.draft_experts) for chunk in plan if chunk.model_drafts}
        for done in range(max(chunk.model_drafts for chunk in plan)):
            active = [chunk for chunk in plan if chunk.model_drafts > done]
            sequences = [copies[chunk.sequence.id] for chunk in active]
            step = tuple(Chunk(own, chunk.start + done, 1) for chunk, own in zip(active, sequences, strict=True))
            results = sample(self._forward(self._draft_inputs, step, expert_stats), sequences)
            for sequence, result in zip(sequences, results, strict=True):
                sequence.tokens.append(result.token)
        return tuple(_with_drafts(chunk, copies.get(chunk.sequence.id)) for chunk in plan)


def _sample(logits_RV: Tensor, plan: Plan) -> tuple[Sampled, ...]:
    chunks = [chunk for chunk in plan if chunk.samples]
    return sample(logits_RV, [chunk.sequence for chunk in chunks], [chunk.drafts for chunk in chunks])


def _draft_sequence(chunk: Chunk, experts: int) -> Sequence:
    """A copy of the chunk's sequence with fewer experts, whose tokens may grow without changing the original."""
    own = chunk.sequence
    sampling = replace(own.request.sampling, logprobs=None)
    request = replace(own.request, budget=own.request.budget.at_most(experts), sampling=sampling)
    copy = Sequence(request, own.arrived_at)
    copy.tokens, copy.blocks, copy.slot = list(own.tokens), own.blocks, own.slot
    return copy


def _with_drafts(chunk: Chunk, copy: Sequence | None) -> Chunk:
    if copy is None:
        return chunk
    return structs.replace(chunk, drafts=tuple(copy.tokens[-chunk.model_drafts :]))


def _prompt_logprobs(logits_NV: Tensor, chunks: list[Chunk]) -> tuple[tuple[Logprob, ...] | None, ...]:
    """The log-probabilities of prompt tokens: for each chunk, those of the tokens after its own."""
    found: list[tuple[Logprob, ...] | None] = []
    first = 0
    for chunk in chunks:
        tokens = [chunk.sequence.tokens[position] for position in chunk.scored_positions]
        rows_SV = logits_NV[first : first + len(tokens)]
        found.append(scores(rows_SV, tokens, chunk.sequence.request.sampling.prompt_logprobs))
        first += len(tokens)
    return tuple(found)
