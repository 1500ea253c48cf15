"""What one engine step computes, and what comes back: the border between the scheduler and whatever runs the model.

Plain values, no tensors: a runner reads tokens, block ids, budget and sampling from each chunk's sequence. What is made
for every token is a struct, which is far cheaper to make.
"""

from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.sequence import Sequence
from engine.types import Logprob


class Chunk(msgspec.Struct, frozen=True):
    """Tokens `start` to `start + length` of one sequence; blocks for all of them are already held."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last token, so that the next one is sampled from its logits.

        True or false until the plan is committed; the commit itself may append the new token.
        """
        return self.start + self.length == len(self.sequence.tokens)


Plan = tuple[Chunk, ...]


def sample_count(plan: Plan) -> int:
    """How many tokens a plan samples."""
    return sum(chunk.samples for chunk in plan)


@dataclass(slots=True)
class Counts:
    """What happened while one plan was made; the meanings are those of `StepStats`."""

    estimated_s: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Sampled(msgspec.Struct, frozen=True):
    """The next token of one chunk, or (with `error`, a sentence for the caller) why there is none."""

    token: int
    logprob: Logprob | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What the mixture layers did in one step; the meanings are those of `StepStats`."""

    routed_pairs: int
    trained_pairs: int
    distinct_experts: int
    load_imbalance: float


NO_WORK = Work(routed_pairs=0, trained_pairs=0, distinct_experts=0, load_imbalance=0.0)


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `Sampled` for each chunk with `.samples`, in plan order, and the work it took."""

    sampled: tuple[Sampled, ...]
    work: Work


class Runner(Protocol):
    """Runs a plan on a model."""

    def run(self, plan: Plan) -> StepResult:
        """Compute every chunk and sample where it says so.

        An `EngineDown` means that the device is lost and the process must end; any other exception fails this plan.
        """
        ...
