"""Runs a plan on a decoder: builds the batch, calls the model, samples.

Not here: scheduling (see `engine/scheduler.py`).
"""

from dataclasses import replace

import torch
from msgspec import structs
from torch import Tensor

from engine.batching import InputBatchBuilder
from engine.expert_stats import ExpertStats
from engine.plan import Chunk, MoEWork, Plan, Sampled, StepResult
from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.sampler import sample
from engine.sequence import Sequence
from engine.types import Logprob
from model.backends.base import Runnable, SamplingOps
from model.batch import Cache


class ModelRunner:
    """A runnable model, with the cache that it made."""

    def __init__(self, model: Runnable, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._inputs = InputBatchBuilder(cache)
        self._draft_inputs = InputBatchBuilder(cache)
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
        observed = expert_stats.observed(plan, self.model.config.mixtures)
        scoring = [chunk for chunk in plan if chunk.scored_positions]
        sampled_rows = len(logits_RV) - sum(len(chunk.scored_positions) for chunk in scoring)
        sampled = _sample(self.model, logits_RV[:sampled_rows], plan) if sampled_rows else ()
        tokens = sum(chunk.length + len(chunk.drafts) for chunk in plan)
        work = self._work(expert_stats, tokens * self._trained_pairs)
        return StepResult(sampled, work, _prompt_logprobs(logits_RV[sampled_rows:], scoring), observed)

    def _work(self, expert_stats: ExpertStats, trained_pairs: int) -> MoEWork:
        """The work of all mixtures in the step; `trained_pairs` is what the trained count would have cost."""
        distinct, imbalance = self.model.load_spread(expert_stats.loads)
        return MoEWork(expert_stats.pairs, trained_pairs, distinct, imbalance / max(1, len(expert_stats.loads)))

    def forward(self, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        """Logits [R, V] of the rows that chunks ask for, in plan order: rows to sample from, then rows that score."""
        return self._forward(self._inputs, plan, expert_stats)

    def _forward(self, inputs: InputBatchBuilder, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        batch, pages = inputs.build(plan)
        logits_RV = self.model(batch, pages, expert_stats)
        expert_stats.count_pairs(plan)
        return logits_RV

    def _draft(self, plan: Plan, expert_stats: ExpertStats) -> Plan:
        """The same plan with drafts that the model made with fewer experts, one token per forward pass.

        The drafts' keys and values are written where the plan's own belong: verifying the drafts overwrites them.
        """
        copies = {chunk.sequence.id: _draft_sequence(chunk, self.draft_experts) for chunk in plan if chunk.model_drafts}
        for done in range(max(chunk.model_drafts for chunk in plan)):
            active = [chunk for chunk in plan if chunk.model_drafts > done]
            sequences = [copies[chunk.sequence.id] for chunk in active]
            pairs = zip(active, sequences, strict=True)
            step = tuple(Chunk(own, chunk.start + done, 1) for chunk, own in pairs)
            logits_RV = self._forward(self._draft_inputs, step, expert_stats)
            results = sample(self.model, logits_RV, sequences)
            for sequence, result in zip(sequences, results, strict=True):
                sequence.tokens.append(result.token)
        return tuple(_with_drafts(chunk, copies.get(chunk.sequence.id)) for chunk in plan)


def _sample(ops: SamplingOps, logits_RV: Tensor, plan: Plan) -> tuple[Sampled, ...]:
    chunks = [chunk for chunk in plan if chunk.samples]
    return sample(ops, logits_RV, [chunk.sequence for chunk in chunks], [chunk.drafts for chunk in chunks])


def _draft_sequence(chunk: Chunk, experts: int) -> Sequence:
    """A copy of the chunk's sequence with fewer experts, whose tokens may grow without changing the original."""
    own = chunk.sequence
    sampling = replace(own.request.sampling, logprobs=None)
    budget = own.request.budget.at_most(experts)
    request = replace(own.request, budget=budget, sampling=sampling, return_routes=False)
    copy = Sequence(request, own.arrived_at)
    copy.tokens = list(own.tokens)
    copy.blocks, copy.slot = own.blocks, own.slot
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
        found.append(prompt_logprobs(rows_SV, tokens, chunk.sequence.request.sampling.prompt_logprobs))
        first += len(tokens)
    return tuple(found)
