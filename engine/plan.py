"""Plans and results: what one engine step computes, and what the runner returns to the scheduler.

Plain values, no tensors: a runner reads tokens, block ids, budget and sampling from each chunk's sequence. Values made
for every token or step are msgspec structs, which are much faster to create than dataclasses.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from msgspec import structs

from engine.routes import StepRoutes
from engine.sequence import Sequence
from engine.types import Logprob
from model.budget import CountRun

NO_POSITIONS = range(0)
NOT_FINITE = "the model produced logits that are not finite for this request"


class Chunk(msgspec.Struct, frozen=True):
    """Tokens `start` to `start + length` of one sequence, and drafts of those that follow; blocks for all are held.

    `drafts` are those known when the step is planned; `model_drafts` says how many drafts the runner makes itself
    before it verifies them.
    """

    sequence: Sequence
    start: int
    length: int
    drafts: tuple[int, ...] = ()
    model_drafts: int = 0

    @property
    def reaches_end(self) -> bool:
        """Whether this chunk reaches the last token. Valid until the plan is committed, which may append a token."""
        return self.start + self.length == len(self.sequence.tokens)

    @property
    def samples(self) -> bool:
        """Whether the next token is sampled from its logits. Valid as long as `reaches_end`."""
        sequence = self.sequence
        return self.start + self.length == len(sequence.tokens) and sequence.request.sampling.max_tokens > 0

    @property
    def scored_positions(self) -> range:
        """The positions of prompt tokens whose log-probabilities this chunk yields, if the request wants them."""
        sequence = self.sequence
        if sequence.request.sampling.prompt_logprobs is None:
            return NO_POSITIONS
        end = min(self.start + self.length + 1, sequence.prompt_length)
        return range(max(self.start, len(sequence.prompt_logprobs)) + 1, end)

    @property
    def logit_rows(self) -> int:
        """How many of its tokens need logits."""
        sampled = 1 + len(self.drafts) if self.samples else 0
        scores = self.sequence.request.sampling.prompt_logprobs is not None
        return sampled + len(self.scored_positions) if scores else sampled

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute, drafts included."""
        end = self.start + self.length
        return [*self.sequence.tokens[self.start : end], *self.drafts]

    @property
    def count_runs(self) -> tuple[CountRun, ...]:
        """The expert counts of what is computed, as runs of equal counts."""
        sequence, end = self.sequence, self.start + self.length + len(self.drafts)
        return sequence.request.budget.runs(self.start, end, sequence.prompt_length)


Plan = tuple[Chunk, ...]
PromptLogprobs = tuple[Logprob, ...] | None  # of one chunk's scored positions; None: one of them is not finite


def rows_of(plan: Plan) -> Plan:
    """A chunk for every row of the batch: each chunk of the plan, and after it that of its weak row if it has one."""
    for chunk in plan:
        if chunk.sequence.weak is not None:
            return _rows_of(plan)
    return plan


def _rows_of(plan: Plan) -> Plan:
    rows: list[Chunk] = []
    for chunk in plan:
        rows.append(chunk)
        if chunk.sequence.weak is not None:
            rows.append(structs.replace(chunk, sequence=chunk.sequence.weak))
    return tuple(rows)


def sample_count(plan: Plan) -> int:
    """The number of chunks of a plan that sample."""
    return len([chunk for chunk in plan if chunk.samples])


def require_results(samples: int, sampled: int, scores: int, scored: int) -> None:
    """Raise ValueError if the number of results is not what a plan asks for that `samples` tokens and `scores`
    chunks."""
    if sampled != samples:
        raise ValueError(f"the plan samples {samples} tokens, got {sampled}")
    if scored != scores:
        raise ValueError(f"the plan scores {scores} chunks, got {scored}")


@dataclass(slots=True)
class PlanStats:
    """What happened while one plan was made; fields as in `StepStats`."""

    estimated_s: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    snapshots_displaced: int = 0


class Sampled(msgspec.Struct, frozen=True):
    """The next token of one chunk, or (with `error`, a sentence for the caller) why there is none. An error with a
    `code` was caused by the request itself.

    `after_drafts`: one more token for each accepted draft, as it would have been sampled after the token before it.
    """

    token: int
    logprob: Logprob | None = None
    error: str | None = None
    after_drafts: tuple["Sampled", ...] = ()
    code: str = ""
    measured: float | None = None  # of the model's distribution, where the request wants a measure


class MoEWork(msgspec.Struct, frozen=True):
    """The work of the MoE layers in one step; fields as in `StepStats`."""

    routed_pairs: int
    trained_pairs: int
    distinct_experts: int
    load_imbalance: float


NO_MOE_WORK = MoEWork(routed_pairs=0, trained_pairs=0, distinct_experts=0, load_imbalance=0.0)


class Observed(msgspec.Struct, frozen=True):
    """What was seen of one chunk, drafts included."""

    pairs: int | None = None  # that ran, drafts made by the model included; None: the sums of the counts
    routes: StepRoutes | None = None  # of its tokens, if the request wants them
    absent: int = 0  # token by token, the MoE layers that it did not run; only with `pairs`


NOT_OBSERVED = Observed()


class StepResult(msgspec.Struct, frozen=True):
    """One `Sampled` for each chunk with `.samples`, in plan order, and the work of the step.

    `prompt_logprobs`: for each chunk with `.scored_positions`, in plan order, the log-probabilities of its prompt
    tokens; None where one of them is not finite. `observed`: one of each chunk, or none at all.
    """

    sampled: tuple[Sampled, ...]
    work: MoEWork
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    observed: tuple[Observed, ...] = ()


class Runner(Protocol):
    """Runs a plan on a model.

    An `EngineDown` means that the device is lost and the process must end; any other exception fails this plan.
    """

    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk, and sample for those with `.samples`."""
        ...


class OverlappingRunner(Runner, Protocol):
    """Runs a plan in three parts on a device that computes by itself, while the host goes on.

    The device computes launches in order. A sequence's last token may be `LATE` when a plan is launched: it is the one
    that the last `sample` samples for this sequence.
    """

    def launch(self, plan: Plan) -> Any:
        """Start to compute every chunk; returns a handle for `sample` and `finish`."""
        ...

    def sample(self, launched: Any, plan: Plan) -> None:
        """Start to sample for the chunks of `plan`, those of the launch that are still wanted. Their sequences have all
        their tokens by now."""
        ...

    def finish(self, launched: Any) -> StepResult:
        """Wait for the results of the chunks that `sample` was given."""
        ...
