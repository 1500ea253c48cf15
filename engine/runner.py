"""Runs a plan on a decoder: builds the batch, calls the model, samples.

Where the model's device computes by itself, a plan can also be run in three parts that wait for nothing but the last
(`OverlappingRunner`): logits and sampled tokens stay on the device. Not here: scheduling (see `engine/scheduler.py`).
"""

from dataclasses import dataclass, replace

import torch
from msgspec import structs
from torch import Tensor

from engine.batching import InputBatchBuilder
from engine.expert_stats import ExpertStats
from engine.plan import Chunk, MoEWork, Plan, PromptLogprobs, Sampled, StepResult, rows_of
from engine.sampling.contrast import joined
from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.on_device import LaunchedSamples, LaunchedScores, launch_samples, launch_scores
from engine.sampling.sampler import sample
from engine.sequence import LATE, Sequence
from model.backends.base import Runnable, SamplingOps
from model.batch import Cache, LateIds
from model.devices import DeviceErrors


@dataclass(slots=True)
class LaunchedStep:
    """A plan that the device computes."""

    plan: Plan
    logits_RV: Tensor | None  # None once they have been sampled from
    sampled: dict[str, int]  # by sequence: the row of the logits to sample from
    scored: dict[str, range]  # by sequence: the rows of the logits that score its prompt
    stats: ExpertStats
    wanted: Plan = ()  # the chunks that will have results
    samples: LaunchedSamples | None = None
    scores: LaunchedScores | None = None


class ModelRunner:
    """A runnable model, with the cache that it made."""

    def __init__(self, model: Runnable, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._inputs = InputBatchBuilder(cache)
        self._draft_inputs = InputBatchBuilder(cache)
        self.draft_experts = 0  # the expert count of drafts, where chunks ask for model drafts
        self._sampled: dict[str, int] = {}  # the rows of the last `sample`, by sequence
        self._token_R: Tensor | None = None  # what it sampled, on the device
        self._mixtures, self._uneven = model.config.mixtures, model.config.uneven
        self._trained, self._layers = model.config.experts.trained, len(self._mixtures)
        self._no_gradients, self._errors = torch.inference_mode(), DeviceErrors(model.device)

    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk; sample for those that reach their last token, score the prompts that ask for it."""
        drafted = any([chunk.drafts or chunk.model_drafts for chunk in plan])
        if self.model.overlaps and not drafted:
            launched = self.launch(plan)
            self.sample(launched, plan)
            return self.finish(launched)
        with self._no_gradients, self._errors:
            expert_stats = self._stats()
            return self._run(self._with_drafts(plan, expert_stats) if drafted else plan, expert_stats)

    def _with_drafts(self, plan: Plan, expert_stats: ExpertStats) -> Plan:
        """The same plan with the drafts that the model makes; asks the matchers for the masks after all drafts."""
        if any(chunk.model_drafts for chunk in plan):
            plan = self._draft(plan, expert_stats)
        for chunk in plan:
            if chunk.drafts and chunk.sequence.matcher is not None:
                chunk.sequence.matcher.look_ahead(chunk.drafts)
        return plan

    def _run(self, plan: Plan, expert_stats: ExpertStats) -> StepResult:
        """Compute a plan and wait for its results."""
        logits_RV = self.forward(plan, expert_stats)
        observed = expert_stats.observed(plan, self._mixtures)
        tokens, scoring = 0, list[Chunk]()
        for chunk in plan:
            tokens += chunk.length + len(chunk.drafts)
            if chunk.scored_positions:
                scoring.append(chunk)
        scores: tuple[PromptLogprobs, ...] = ()
        sampled_rows = logits_RV.shape[0]
        if scoring:  # few steps do, and views take time
            sampled_rows -= sum(len(chunk.scored_positions) for chunk in scoring)
            logits_RV, scored_RV = logits_RV[:sampled_rows], logits_RV[sampled_rows:]
            scores = _prompt_logprobs(scored_RV, scoring)
        sampled = _sample(self.model, logits_RV, plan) if sampled_rows else ()
        work = self._work(expert_stats, tokens)
        return StepResult(sampled, work, scores, observed)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Start to compute every chunk. Late tokens are those that the last `sample` sampled for their sequences."""
        with self._errors:
            rows = rows_of(plan)
            batch, pages = self._inputs.build(rows, self._late(rows))
            stats = self._stats()
            logits_RV = joined(self.model.launch(batch, pages, stats), plan)
            stats.fetch()
        return LaunchedStep(plan, logits_RV, *_logit_rows(plan), stats)

    def _late(self, rows: Plan) -> LateIds | None:
        """The tokens of these rows whose ids are still on the device only; each is the last of its chunk."""
        last, row_N, source_N = -1, [], []
        for chunk in rows:
            last += chunk.length
            if chunk.sequence.tokens[chunk.start + chunk.length - 1] == LATE:
                row_N.append(last)
                source_N.append(self._sampled[chunk.sequence.id])
        if not row_N:
            return None
        assert self._token_R is not None
        return LateIds(torch.tensor(row_N), torch.tensor(source_N), self._token_R)

    @torch.inference_mode()
    def sample(self, launched: LaunchedStep, plan: Plan) -> None:
        """Start to sample for the chunks of `plan`, those of the launch that are still wanted."""
        launched.wanted = plan
        sequences = [chunk.sequence for chunk in plan if chunk.samples]
        scoring = [chunk for chunk in plan if chunk.scored_positions]
        self._sampled = {sequence.id: row for row, sequence in enumerate(sequences)}
        ops, logits_RV = self.model.device_sampling, launched.logits_RV
        assert ops is not None and logits_RV is not None, "steps overlap without a sampler on the device"
        launched.logits_RV = None  # the device reads them before what takes their memory is launched
        with self._errors:
            if sequences:
                rows = [launched.sampled[sequence.id] for sequence in sequences]
                launched.samples = launch_samples(ops, _taken(logits_RV, rows), sequences)
                self._token_R = launched.samples.token_R
            if scoring:
                rows = [row for chunk in scoring for row in launched.scored[chunk.sequence.id]]
                launched.scores = launch_scores(_taken(logits_RV, rows), [_scored(each) for each in scoring])

    @torch.inference_mode()
    def finish(self, launched: LaunchedStep) -> StepResult:
        """Wait for the results of the chunks given to `sample`."""
        with self._errors:
            sampled = launched.samples.results() if launched.samples else ()
            scores = launched.scores.results() if launched.scores else ()
            launched.stats.fetched(launched.plan)
        observed = launched.stats.observed(launched.plan, self._mixtures)
        if observed:
            by_sequence = dict(zip((chunk.sequence.id for chunk in launched.plan), observed, strict=True))
            observed = tuple(by_sequence[chunk.sequence.id] for chunk in launched.wanted)
        tokens = sum(chunk.length for chunk in launched.plan)
        work = self._work(launched.stats, tokens)
        return StepResult(sampled, work, scores, observed)

    def _stats(self) -> ExpertStats:
        return ExpertStats(self._layers, self._uneven)

    def _work(self, expert_stats: ExpertStats, tokens: int) -> MoEWork:
        """The work of all mixtures in a step of so many tokens."""
        distinct, imbalance = self.model.load_spread(expert_stats.loads)
        trained_pairs = (tokens * self._layers - expert_stats.absent) * self._trained
        return MoEWork(expert_stats.pairs, trained_pairs, distinct, imbalance / max(1, expert_stats.load_count))

    def forward(self, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        """Logits [R, V] of the rows that chunks ask for, in plan order: rows to sample from, then rows that score."""
        return self._forward(self._inputs, plan, expert_stats)

    def _forward(self, inputs: InputBatchBuilder, plan: Plan, expert_stats: ExpertStats) -> Tensor:
        rows = rows_of(plan)
        batch, pages = inputs.build(rows)
        logits_RV = self.model(batch, pages, expert_stats)
        expert_stats.count_pairs(plan)
        return logits_RV if rows is plan else joined(logits_RV, plan)

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
        return tuple(_drafted(chunk, copies.get(chunk.sequence.id)) for chunk in plan)


def _sample(ops: SamplingOps, logits_RV: Tensor, plan: Plan) -> tuple[Sampled, ...]:
    sequences: list[Sequence] = []
    drafts: list[tuple[int, ...]] = []
    for chunk in plan:
        if chunk.samples:
            sequences.append(chunk.sequence)
            drafts.append(chunk.drafts)
    return sample(ops, logits_RV, sequences, drafts)


def _draft_sequence(chunk: Chunk, experts: int) -> Sequence:
    """A copy of the chunk's sequence with fewer experts, whose tokens may grow without changing the original."""
    own = chunk.sequence
    sampling = replace(own.request.sampling, logprobs=None, measured=None)
    budget = own.request.budget.at_most(experts)
    request = replace(own.request, budget=budget, sampling=sampling, return_routes=False)
    copy = Sequence(request, own.arrived_at)
    copy.tokens = list(own.tokens)
    copy.blocks, copy.slot = own.blocks, own.slot
    return copy


def _drafted(chunk: Chunk, copy: Sequence | None) -> Chunk:
    if copy is None:
        return chunk
    return structs.replace(chunk, drafts=tuple(copy.tokens[-chunk.model_drafts :]))


def _logit_rows(plan: Plan) -> tuple[dict[str, int], dict[str, range]]:
    """The rows of a plan's logits by sequence: the one to sample from, and those that score its prompt."""
    sampled = {chunk.sequence.id: row for row, chunk in enumerate(chunk for chunk in plan if chunk.samples)}
    scored: dict[str, range] = {}
    first = len(sampled)
    for chunk in plan:
        if count := len(chunk.scored_positions):
            scored[chunk.sequence.id] = range(first, first + count)
            first += count
    return sampled, scored


def _scored(chunk: Chunk) -> tuple[list[int], int | None]:
    """The prompt tokens that a chunk scores, and how many alternatives are wanted."""
    sequence = chunk.sequence
    tokens = [sequence.tokens[position] for position in chunk.scored_positions]
    return tokens, sequence.request.sampling.prompt_logprobs


def _taken(logits_RV: Tensor, rows: list[int]) -> Tensor:
    """These rows, in rising order; without a copy where they are neighbours."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits_RV[rows[0] : rows[-1] + 1]
    return logits_RV.index_select(0, torch.tensor(rows).to(logits_RV.device, non_blocking=True))


def _prompt_logprobs(logits_NV: Tensor, chunks: list[Chunk]) -> tuple[PromptLogprobs, ...]:
    """The log-probabilities of prompt tokens: for each chunk, those of the tokens after its own."""
    found: list[PromptLogprobs] = []
    first = 0
    for chunk in chunks:
        tokens, wanted = _scored(chunk)
        found.append(prompt_logprobs(logits_NV[first : first + len(tokens)], tokens, wanted))
        first += len(tokens)
    return tuple(found)
