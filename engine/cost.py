"""What a step costs, estimated from its work: seconds = fixed + α·tokens + β·routed pairs + γ·distinct experts.

It sees expert counts and numbers of tokens, no sequences, no blocks and no clock; `engine/calibrate.py` measures the
constants. Standard library only: `StepCost` crosses to the HTTP process.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

from model.budget import ExpertCounts, Run

MIN_PREFILL_SHARE, MAX_PREFILL_SHARE = 0.25, 0.75  # of a step's time, for reading prompts
PREFILL_SHARE_PER_SECOND = 0.1


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """The experts of one MoE layer; for ∞-MoE its blocks, of which each draw touches `kept`."""

    experts: int
    kept: int = 0  # 0: each pair touches one expert, and those of one token differ

    def untouched_probability(self, count: int) -> float:
        """The probability that a token with this count leaves a given expert untouched, were routing uniform."""
        if self.kept:
            return max(0.0, 1 - self.kept / self.experts) ** count
        return max(0.0, 1 - count / self.experts)


@dataclass(frozen=True, slots=True)
class StepCost:
    """The constants of one model on one machine, none below 0, in seconds; and what its tokens choose from."""

    fixed: float
    per_token: float
    per_pair: float
    per_expert: float
    pools: tuple[ExpertPool, ...]  # one per MoE layer

    def seconds(self, tokens: float, pairs: float, distinct: float) -> float:
        """The estimate for a step; `pairs` and `distinct` experts are sums over the MoE layers."""
        return self.fixed + self.per_token * tokens + self.per_pair * pairs + self.per_expert * distinct


NO_COST = StepCost(0.0, 0.0, 0.0, 0.0, ())


def prefill_share(age: float) -> float:
    """The share of a step's time that is kept for prompts, where the oldest has waited `age` seconds: a quarter, then a
    tenth more each second, up to three quarters. Decodes beside it take at most four times as long as alone."""
    return min(MAX_PREFILL_SHARE, MIN_PREFILL_SHARE + PREFILL_SHARE_PER_SECOND * age)


class StepLoad:
    """The work of one step while it is planned.

    A layer is expected to touch E · (1 - Π missed) distinct experts, as if routing were uniform. Real routers have
    favourites and touch fewer, so that the estimate errs towards shorter steps.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._experts = sum(pool.experts for pool in cost.pools)
        self._tokens: Counter[ExpertCounts] = Counter()
        self.other_seconds = 0.0  # seconds of what is no work of the model

    def add(self, counts: ExpertCounts, tokens: int) -> None:
        """Put in tokens that may use these counts."""
        self._tokens[counts] += tokens

    @property
    def tokens(self) -> int:
        return self._tokens.total()

    @property
    def routed_pairs(self) -> int:
        return sum(tokens * sum(counts) for counts, tokens in self._tokens.items())

    @property
    def distinct_experts(self) -> float:
        """Experts that the step is expected to touch, summed over the MoE layers."""
        return self._experts - sum(self._untouched())

    @property
    def seconds(self) -> float:
        """The estimate for what is in."""
        return _seconds(self._cost, tuple(self._tokens.items())) + self.other_seconds

    def max_tokens_within(self, counts: ExpertCounts, seconds: float, most: int) -> int:
        """How many of `most` more tokens with these counts a step of `seconds` has room for.

        Found by bisection, since the estimate only grows with the tokens.
        """
        return bisect_right(range(1, most + 1), seconds, key=self.seconds_with(counts))

    def seconds_with(self, counts: ExpertCounts) -> Callable[[int], float]:
        """The estimate with so many more tokens with these counts."""
        tokens, pairs, experts, each = self.tokens, self.routed_pairs, self._experts, sum(counts)
        untouched, missed = self._untouched(), self._missed(counts)

        def seconds(more: int) -> float:
            left = sum(there * miss**more for there, miss in zip(untouched, missed, strict=True))
            return self._cost.seconds(tokens + more, pairs + more * each, experts - left) + self.other_seconds

        return seconds

    def seconds_alone(self, counts: ExpertCounts) -> float:
        """The estimate for a step of one token with these counts and nothing else."""
        return _seconds(self._cost, ((counts, 1),))

    def _untouched(self) -> list[float]:
        """Expected experts, per MoE layer, that no token of the step uses."""
        untouched = [float(pool.experts) for pool in self._cost.pools]
        for counts, tokens in self._tokens.items():
            untouched = [there * miss**tokens for there, miss in zip(untouched, self._missed(counts), strict=True)]
        return untouched

    def _missed(self, counts: ExpertCounts) -> list[float]:
        # Not strict: a cost without pools does not count distinct experts.
        return [pool.untouched_probability(count) for pool, count in zip(self._cost.pools, counts, strict=False)]


@lru_cache(64)
def _seconds(cost: StepCost, tokens: tuple[tuple[ExpertCounts, int], ...]) -> float:
    """Kept, since a step of many decodes is like the one before."""
    load = StepLoad(cost)
    for counts, here in tokens:
        load.add(counts, here)
    return cost.seconds(load.tokens, load.routed_pairs, load.distinct_experts)


class StepBudget:
    """What one step may still take: tokens always; seconds too, as soon as it decodes.

    Prompts get the seconds that decodes leave of the target, but never less than a share of the step: what decodes take
    is then the rest. No chunk is shorter than `min_chunk` for lack of seconds, unless a prompt ends with it; the first
    prompt gets that much whatever it costs, so that reading never stops.
    """

    def __init__(self, cost: StepCost, tokens: int, seconds: float, min_chunk: int) -> None:
        self.load = StepLoad(cost)
        self.tokens = tokens  # left
        self.has_prompts = False  # a prompt is in
        self.has_decodes = False
        self._seconds, self._min_chunk = seconds, min_chunk

    @property
    def time_bounded(self) -> bool:
        """Whether time bounds what is read."""
        return self.has_decodes and self._seconds < math.inf

    @property
    def min_chunk(self) -> int:
        """The shortest chunk that a prompt is cut to, if there are tokens for it."""
        return min(self._min_chunk, self.tokens)

    def reserve_for_prompts(self, share: float) -> None:
        """Begin with prompts, which may have this share of the step's time."""
        self._seconds = max(self._seconds, self.load.seconds / (1 - share))

    def half(self) -> "StepBudget":
        """Half of what is left, of the same step: `take` from the whole."""
        half = copy(self)
        half.tokens = self.tokens // 2
        half._seconds = (self.load.seconds + self._seconds) / 2
        return half

    def max_prompt_tokens(self, counts: ExpertCounts) -> int:
        """How many tokens of prompts with these counts the step still has room for."""
        return self.load.max_tokens_within(counts, self._seconds, self.tokens) if self.time_bounded else self.tokens

    def max_chunk(self, counts: ExpertCounts) -> int:
        """The longest chunk that the step still takes of a prompt that must be cut; 0 where none is worth it."""
        fit = self.max_prompt_tokens(counts)
        if fit >= self.min_chunk:
            return fit
        return 0 if self.has_prompts else self.min_chunk

    def spend(self, counts: ExpertCounts, tokens: int, *, prompt: bool) -> None:
        """Put in a chunk of a prompt, or the one token of a sequence that decodes."""
        self.has_prompts, self.has_decodes = self.has_prompts or prompt, self.has_decodes or not prompt
        self.tokens -= tokens
        self.load.add(counts, tokens)

    def spend_runs(self, runs: Iterable[Run], *, prompt: bool) -> None:
        """The same of positions whose counts differ."""
        for counts, tokens in runs:
            self.spend(counts, tokens, prompt=prompt)
