"""What each pass of a generation call used: tokens, and the mean expert count that they ran with.

A call has one pass; with a cascade a second one, of the answers that were made again. It depends on timelines, not on
prices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.budget import ExpertBudget
from server.generation.generation import Generation, Pass
from server.generation.timeline import Timeline


@dataclass(frozen=True, slots=True)
class PassUsage:
    """The tokens of one pass. A prompt counts once however many answers it has."""

    budget: ExpertBudget
    timelines: tuple[Timeline, ...]  # one at least
    prompt_tokens: int
    read_tokens: int  # of the prompts that have been read so far
    cached_tokens: int  # of these
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def mean_count(self) -> float:
        """The mean expert count of prompts and answers together."""
        measured = self._measured_count
        return self.budget.mean(self.prompt_tokens, self.completion_tokens) if measured is None else measured

    @property
    def mean_counts(self) -> tuple[float, float]:
        """The same of prompts and of answers; where only all pairs together were counted, twice their mean."""
        measured = self._measured_count
        return (self.budget.mean(1, 0), self.budget.mean(0, 1)) if measured is None else (measured, measured)

    @property
    def _measured_count(self) -> float | None:
        """The mean over what was computed, where the count depends on the token or changes on the way."""
        if not any(timeline.measured for timeline in self.timelines):
            return None
        passes = sum(timeline.layer_passes for timeline in self.timelines)
        return sum(timeline.own_pairs for timeline in self.timelines) / passes if passes else None


def pass_usages(
    generation: Generation,
    budgets: Sequence[ExpertBudget],
    prompts: Sequence[int],
    shown: Mapping[int, int] | None = None,
) -> list[PassUsage]:
    """The usage of each pass that took place, in order. `budgets`: of the passes. `prompts`: the tokens of each prompt.

    `shown`, in a stream: the tokens of each answer, by position, that its client has so far.
    """
    answers = len(generation.sequences) // len(prompts)
    again = generation.passes[1]
    found: list[PassUsage] = []
    for budget, own in zip(budgets, generation.passes, strict=False):
        tokens = {position: sequence.timeline.tokens for position, sequence in own.items()}
        if shown is not None:  # of an answer that is made again, the first run is never shown, and counts whole
            tokens |= {at: shown.get(at, 0) for at in own if own is again or at not in again}
        if own:
            found.append(_usage(budget, own, tokens, prompts, answers))
    return found


def _usage(
    budget: ExpertBudget, own: Pass, tokens: Mapping[int, int], prompts: Sequence[int], answers: int
) -> PassUsage:
    # Of each prompt the answer that began first: later ones find its prompt in the prefix cache.
    first = {position // answers: position for position in reversed(own)}
    timelines = {prompt: own[position].timeline for prompt, position in first.items()}
    stats = [timeline.stats for timeline in timelines.values()]
    return PassUsage(
        budget,
        tuple(sequence.timeline for sequence in own.values()),
        prompt_tokens=sum(prompts[prompt] for prompt in first),
        read_tokens=sum(prompts[prompt] for prompt, timeline in timelines.items() if timeline.prompt.done),
        cached_tokens=sum(one.cached_tokens for one in stats if one is not None),
        completion_tokens=sum(tokens.values()),
    )
