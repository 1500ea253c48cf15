"""Guesses at the next tokens of a sequence, checked all at once in one step: speculation without a second model.

Where a grammar leaves no choice, that is the guess. Where what was written last has been written before in the prompt
or the answer, what followed then is guessed (n-gram look-up; "prompt lookup decoding"). Or the model itself guesses
with fewer experts. Either way a guess only stands if it is the very token that would have been sampled: answers are
the same, token for token, at any temperature, because a token depends on its logits, the seed and the position alone.

It knows tokens and times, no model.
"""

from dataclasses import dataclass, field

from engine.cost import StepBudget
from engine.plan import Chunk
from engine.sequence import Sequence
from model.errors import InvalidRequest

LONGEST = 8  # guesses at a time
GRAMS = (4, 3, 2)  # tokens that must have been written before, longest first
FORCED, MODEL = (
    0,
    1,
)  # the other sources of guesses: a grammar that leaves no choice, and the model with fewer experts
PRIORS = {FORCED: 0.95, MODEL: 0.8, 4: 0.6, 3: 0.5, 2: 0.3}  # of a guess being right, before anything is known
LEARN, FORGET = 0.15, 0.002  # weight of one more guess; of the prior, per step in which guessing did not pay
SHARED = 0.02  # weight of one sequence's guess for what is expected of the next sequence
WORTH = 0.2  # without a cost model: the least chance of being right
MARGIN = 1.5  # expected gain over expected cost: costs of larger steps are underestimated
SMOOTH = 0.1  # weight of the last step's time per token


@dataclass(slots=True)
class DraftState:
    """What is known of one sequence: what followed each run of tokens last, and how good guesses were by their source.

    A run of four tokens foretells more than one of two, so each length is a source of its own.
    """

    rates: dict[int, float]
    source: int = FORCED  # of the last guesses
    read: int = 0  # tokens that are in the index
    after: dict[tuple[int, ...], int] = field(default_factory=dict)  # a run, and the position that followed it last


class Speculator:
    """Decides how many tokens to guess for a sequence, so that the expected gain pays for checking them.

    Where a grammar leaves no choice, that is the guess. Else, with `looks_up`, n-grams are looked up, or with `experts`
    the model guesses with so many. Guessing stops for a sequence where it does not pay, and is tried again now and
    then: what was learnt is slowly forgotten.
    """

    def __init__(self, looks_up: bool = True, experts: int = 0, longest: int = LONGEST) -> None:
        self.experts, self._looks_up, self._longest = experts, looks_up, longest
        self.value = 0.0  # estimated seconds per token of late: what one more token is worth
        self._expected = dict(PRIORS)  # of a new sequence

    def add_drafts(self, chunk: Chunk, most: int, step_budget: StepBudget) -> Chunk:
        """A decoding sequence's chunk with guesses, `most` at the most, and none beyond its last token."""
        sequence = chunk.sequence
        most = min(most, sequence.request.sampling.max_tokens - sequence.output_count - 1)
        drafts = self.propose(sequence, most, step_budget)
        ahead = 0 if drafts else self.model_drafts(sequence, most, step_budget)
        return Chunk(sequence, chunk.start, chunk.length, drafts, ahead)

    def propose(self, sequence: Sequence, most: int, step_budget: StepBudget) -> tuple[int, ...]:
        """Up to `most` tokens that may follow. Call it for sequences that decode, at most once a step."""
        if most < 1 or not (self._looks_up or sequence.matcher) or not _predictable(sequence):
            return ()
        if sequence.matcher is not None and sequence.matcher.dear:
            return ()  # what may follow a guess would come too late
        known = self._known(sequence)
        found: tuple[int, ...] = ()
        if sequence.matcher is not None:
            found, known.source = tuple(sequence.matcher.forced()[:most]), FORCED
        if not found and self._looks_up:
            found = _look_up(sequence, known, min(most, self._longest))
        return found[: self._worthwhile(sequence, known, len(found), step_budget, 0.0)] if found else ()

    def model_drafts(self, sequence: Sequence, most: int, step_budget: StepBudget) -> int:
        """How many tokens the model shall guess itself, with fewer experts."""
        if not self.experts or most < 1 or not _predictable(sequence) or sequence.matcher is not None:
            return 0
        known = self._known(sequence)
        known.source = MODEL
        position, budget = len(sequence.tokens), sequence.request.budget.at_most(self.experts)
        draft = step_budget.load.seconds_alone(budget.at(position, sequence.prompt_length))
        return self._worthwhile(sequence, known, min(most, self._longest), step_budget, draft)

    def record_acceptance(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Take in how many of so many guesses were right."""
        known = self._known(sequence)
        for right in (*[1] * accepted, *[0] * (accepted < drafted)):
            known.rates[known.source] += LEARN * (right - known.rates[known.source])
            self._expected[known.source] += SHARED * (right - self._expected[known.source])

    def record_step(self, seconds: float, tokens: int) -> None:
        """Take in what a step was expected to take, and how many tokens came of it."""
        if tokens:
            self.value += (SMOOTH if self.value else 1.0) * (seconds / tokens - self.value)

    def _worthwhile(
        self, sequence: Sequence, known: DraftState, most: int, step_budget: StepBudget, each: float
    ) -> int:
        """How many of `most` guesses pay for themselves: the n-th is right with the rate's n-th power.

        The step is taken to hold the sequence's own token already; `each` guess costs so much before it is checked.
        """
        rate = known.rates[known.source]
        after = step_budget.load.seconds_with(sequence.counts_at(len(sequence.tokens)))
        count, chance, before = 0, rate, after(0)
        while count < most:
            spent = after(count + 1) - before + each
            if not (chance * self.value > MARGIN * spent if self.value else chance > WORTH):
                break
            count, chance, before = count + 1, chance * rate, after(count + 1)
        if not count:
            known.rates[known.source] += FORGET * (PRIORS[known.source] - rate)
        return count

    def _known(self, sequence: Sequence) -> DraftState:
        if not isinstance(sequence.draft_state, DraftState):
            sequence.draft_state = DraftState(dict(self._expected))
        return sequence.draft_state


def _predictable(sequence: Sequence) -> bool:
    """Whether the logits after a guess are those that would be sampled from: penalties and bad words look back."""
    sampling = sequence.request.sampling
    return not sampling.penalises and not sampling.bad_words and sequence.output_count >= sampling.min_tokens


def _look_up(sequence: Sequence, known: DraftState, most: int) -> tuple[int, ...]:
    """What followed the last time that the text ended as it does now."""
    tokens, after = sequence.tokens, known.after
    for end in range(max(known.read, 1), len(tokens)):  # the last token is followed by nothing yet
        for gram in GRAMS:
            if end >= gram:
                after[tuple(tokens[end - gram : end])] = end
    known.read = len(tokens)
    for gram in GRAMS:
        at = after.get(tuple(tokens[-gram:])) if len(tokens) >= gram else None
        if at is not None:
            known.source = gram
            return _continued(tokens, at, most)
    return ()


def _continued(tokens: list[int], at: int, most: int) -> tuple[int, ...]:
    """Tokens from `at`; what repeats itself up to the end goes on repeating."""
    period = len(tokens) - at
    return tuple(tokens[at + i % period] for i in range(most))


def speculator_of(setting: str) -> Speculator | None:
    """From "off", "grammar", "ngram" or "experts=K".

    Raises:
        InvalidRequest: it is none of these.
    """
    if setting == "off":
        return None
    if setting in ("grammar", "ngram"):
        return Speculator(looks_up=setting == "ngram")
    word, _, count = setting.partition("=")
    if word != "experts" or not count.isdecimal() or int(count) < 1:
        raise InvalidRequest(f"speculate must be off, grammar, ngram or experts=K, got {setting!r:.64}", "speculate")
    return Speculator(looks_up=False, experts=int(count))
