"""The cost model: seconds of a step = fixed + α·tokens + β·routed pairs + γ·distinct experts.

It depends on expert counts and numbers of tokens, not on sequences, blocks or clock; `engine/calibrate.py` measures the
four constants. It uses the standard library only, since `StepCost` is sent to the HTTP process.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

from model.budget import CountRun, ExpertCounts

MIN_PREFILL_SHARE, MAX_PREFILL_SHARE = 0.25, 0.75  # of a step's time
PREFILL_SHARE_PER_SECOND = 0.1


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """The experts of one MoE layer; for ∞-MoE its groups of units, of which each draw uses `kept`."""

    experts: int
    kept: int = 0  # 0: each routed pair uses one expert, and a token's experts differ

    def untouched_probability(self, count: int) -> float:
        """The probability that a token with this count does not use a given expert, if routing is uniform."""
        if self.kept:
            return max(0.0, 1 - self.kept / self.experts) ** count
        return max(0.0, 1 - count / self.experts)


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost model's constants for one model on one machine, in seconds, none negative; and its expert pools.

    `token_buckets`: if decoding steps are padded, the numbers of tokens that they are padded to (`padded_tokens`).
    Steps with prompts are estimated in the same way although they are not padded: the error is at most a few tokens.
    """

    fixed: float
    per_token: float
    per_pair: float
    per_expert: float
    pools: tuple[ExpertPool, ...]  # one per MoE layer
    token_buckets: tuple[int, ...] = ()

    @property
    def experts(self) -> int:
        """All experts, summed over the MoE layers."""
        return sum(pool.experts for pool in self.pools)

    def seconds(self, tokens: float, pairs: float, distinct: float) -> float:
        """The estimated seconds of a step; `pairs` and `distinct` experts are sums over the MoE layers."""
        tokens = padded_tokens(tokens, self.token_buckets)
        return self.fixed + self.per_token * tokens + self.per_pair * pairs + self.per_expert * distinct

    def __hash__(self) -> int:
        # Every step looks up an estimate by its cost: hashing the pools, one per layer, took longer than the rest.
        return hash((self.fixed, self.per_token, self.per_pair, self.per_expert))


NO_COST = StepCost(0.0, 0.0, 0.0, 0.0, ())


def padded_tokens(tokens: float, buckets: tuple[int, ...]) -> float:
    """How many tokens a step of `tokens` tokens computes after padding: the next of the rising `buckets`, or `tokens`
    itself if it is beyond the last one.

    padded_tokens(9, (8, 16)) == 16; padded_tokens(17, (8, 16)) == 17.
    """
    place = bisect_left(buckets, tokens)
    return buckets[place] if tokens and place < len(buckets) else tokens


def prefill_share(age: float) -> float:
    """The share of a step's time reserved for prefill if the oldest prompt has waited `age` seconds: a quarter, plus a
    tenth per second, up to three quarters. So a step takes at most four times as long as its decodes need."""
    return min(MAX_PREFILL_SHARE, MIN_PREFILL_SHARE + PREFILL_SHARE_PER_SECOND * age)


class StepLoad:
    """The work of one step while it is planned.

    A layer is expected to use E · (1 - Π untouched_probability) distinct experts, as if routing were uniform. Real
    routers are not uniform and use fewer, so the estimate is rather too high.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._tokens: dict[ExpertCounts, int] = {}
        self.other_seconds = 0.0  # time of work outside the model

    def add(self, counts: ExpertCounts, tokens: int) -> None:
        """Add tokens with these expert counts."""
        self._tokens[counts] = self._tokens.get(counts, 0) + tokens

    @property
    def tokens(self) -> int:
        return sum(self._tokens.values())

    @property
    def routed_pairs(self) -> int:
        return sum(tokens * sum(counts) for counts, tokens in self._tokens.items())

    @property
    def distinct_experts(self) -> float:
        """Experts that the step is expected to use, summed over the MoE layers."""
        return self._cost.experts - sum(self._untouched())

    @property
    def seconds(self) -> float:
        """The estimated seconds of the step so far."""
        return _seconds(self._cost, tuple(self._tokens.items())) + self.other_seconds

    def max_tokens_within(self, counts: ExpertCounts, seconds: float, most: int) -> int:
        """How many more tokens with these counts, at most `most`, a step of `seconds` has room for.

        Found by bisection, since the estimate grows with the tokens.
        """
        return bisect_right(range(1, most + 1), seconds, key=self.seconds_with(counts))

    def seconds_with(self, counts: ExpertCounts) -> Callable[[int], float]:
        """A function from a number of further tokens with these counts to the estimated seconds of the step."""
        tokens, pairs, pairs_per_token = self.tokens, self.routed_pairs, sum(counts)
        untouched_L, probability_L = self._untouched(), self._probabilities(counts)
        experts = self._cost.experts

        def seconds(more: int) -> float:
            layers = zip(untouched_L, probability_L, strict=True)
            distinct = experts - sum(was * p**more for was, p in layers)
            model = self._cost.seconds(tokens + more, pairs + more * pairs_per_token, distinct)
            return model + self.other_seconds

        return seconds

    def seconds_alone(self, counts: ExpertCounts) -> float:
        """The estimated seconds of a step of one token with these counts and nothing else."""
        return _seconds(self._cost, ((counts, 1),))

    def _untouched(self) -> list[float]:
        """Per MoE layer, the expected number of experts that no token of the step uses."""
        untouched_L = [float(pool.experts) for pool in self._cost.pools]
        for counts, tokens in self._tokens.items():
            probability_L = self._probabilities(counts)
            untouched_L = [was * p**tokens for was, p in zip(untouched_L, probability_L, strict=True)]
        return untouched_L

    def _probabilities(self, counts: ExpertCounts) -> list[float]:
        """Per MoE layer, the probability that one token with these counts does not use a given expert."""
        # Not strict: a cost without pools does not count distinct experts.
        return [pool.untouched_probability(count) for pool, count in zip(self._cost.pools, counts, strict=False)]


@lru_cache(64)
def _seconds(cost: StepCost, tokens: tuple[tuple[ExpertCounts, int], ...]) -> float:
    """The estimated seconds of a step; `tokens`: the number of tokens for each tuple of expert counts.

    Cached: while sequences decode, most steps are like the one before.
    """
    load = StepLoad(cost)
    for counts, number in tokens:
        load.add(counts, number)
    return cost.seconds(load.tokens, load.routed_pairs, load.distinct_experts)


class StepBudget:
    """What one step may still compute: bounded by tokens, and by seconds as soon as a sequence decodes in it.

    Prompts get the time that decodes leave of the target, but never less than a share of the step. No chunk is shorter
    than `min_chunk` for lack of time, unless its prompt ends with it. The first prompt gets `min_chunk` tokens whatever
    they cost, so that prefill always progresses.
    """

    def __init__(self, cost: StepCost, tokens: int, seconds: float, min_chunk: int) -> None:
        self.load = StepLoad(cost)
        self.tokens = tokens  # that the step may still compute
        self.has_prompts = False
        self.has_decodes = False
        self._seconds, self._min_chunk = seconds, min_chunk

    @property
    def time_bounded(self) -> bool:
        """Whether time bounds the prefill of this step."""
        return self.has_decodes and self._seconds < math.inf

    def min_chunk(self, rows: int = 1) -> int:
        """The shortest chunk of a prompt with `rows` rows, at most what the step has left."""
        return min(self._min_chunk, self.tokens // rows)

    def reserve_for_prompts(self, share: float) -> None:
        """After the decodes: let prompts use at least this share of the step's time."""
        self._seconds = max(self._seconds, self.load.seconds / (1 - share))

    def half(self) -> "StepBudget":
        """A budget of half of what is left of this step. Only to compare with: `spend` from the whole."""
        half = copy(self)
        half.tokens = self.tokens // 2
        half._seconds = (self.load.seconds + self._seconds) / 2
        return half

    def max_prompt_tokens(self, counts: ExpertCounts, rows: int = 1) -> int:
        """How many more prompt tokens fit the step, each in `rows` rows with at most these counts."""
        if not self.time_bounded:
            return self.tokens // rows
        return self.load.max_tokens_within(counts, self._seconds, self.tokens) // rows

    def max_chunk(self, counts: ExpertCounts, rows: int = 1) -> int:
        """The longest chunk of a prompt that must be cut; 0 if the room left is shorter than a chunk should be."""
        fit, least = self.max_prompt_tokens(counts, rows), self.min_chunk(rows)
        if fit >= least:
            return fit
        return 0 if self.has_prompts else least

    def spend(self, counts: ExpertCounts, tokens: int, *, prompt: bool) -> None:
        """Account for a chunk: of a prompt, or of a sequence that decodes."""
        self.has_prompts |= prompt
        self.has_decodes |= not prompt
        self.tokens -= tokens
        self.load.add(counts, tokens)

    def spend_runs(self, runs: Iterable[CountRun], *, prompt: bool) -> None:
        """The same of positions whose counts differ."""
        for counts, tokens in runs:
            self.spend(counts, tokens, prompt=prompt)
