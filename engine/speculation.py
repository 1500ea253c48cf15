"""Speculative decoding without a second model: where drafts come from, and how many are worth verifying.

Drafts are tokens that a grammar leaves no alternative to; or what followed the last occurrence of the same n-gram in
the prompt or the answer ("prompt lookup decoding"); or tokens that the model itself makes with fewer experts. A draft
is accepted only if it equals the token that is sampled at its position. So answers are the same, token for token, at
any temperature: a token depends only on its logits, the seed and the position.

It depends on tokens and times, not on a model.
"""

from dataclasses import dataclass, field

from engine.cost import StepBudget
from engine.plan import Chunk
from engine.sequence import Sequence
from model.errors import InvalidRequest

MAX_DRAFTS = 8  # per sequence and step, unless a grammar forces more
NGRAM_LENGTHS = (4, 3, 2)  # the longest n-gram that occurred before is used
FORCED, MODEL = 0, 1  # sources of drafts beside the n-gram lengths: forced by a grammar, or made with fewer experts
PRIORS = {FORCED: 0.95, MODEL: 0.8, 4: 0.6, 3: 0.5, 2: 0.3}  # acceptance rates before anything is observed
LEARNING_RATE = 0.15  # weight of one more draft in its sequence's acceptance rate
FORGETTING_RATE = 0.002  # weight of the prior in that rate, per step in which drafts were not worthwhile
PRIOR_RATE = 0.02  # weight of one draft in the rate that new sequences start with
MIN_PROBABILITY = 0.2  # without a cost model: the least probability of acceptance
MARGIN = 1.5  # the least expected gain over expected cost: costs of larger steps are underestimated
SMOOTHING = 0.1  # weight of the last step in `seconds_per_token`


@dataclass(slots=True)
class DraftState:
    """What is known of one sequence: its n-grams, and the acceptance rate of drafts per source.

    A longer n-gram predicts better, so each length is a source of its own.
    """

    rates: dict[int, float]
    source: int = FORCED  # of the last drafts
    indexed: int = 0  # how many tokens are in the n-gram index
    following: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram → position after its last occurrence


class Speculator:
    """Decides how many draft tokens a sequence gets, so that the expected gain pays for verifying them.

    Tokens forced by a grammar come first. Otherwise, with `ngrams`, drafts come from an n-gram look-up, or, with
    `experts`, from the model at that expert count. A sequence whose drafts are not worthwhile gets none, until its
    acceptance rate has slowly returned to the prior.
    """

    def __init__(self, ngrams: bool = True, experts: int = 0, max_drafts: int = MAX_DRAFTS) -> None:
        self.experts, self._ngrams, self._max_drafts = experts, ngrams, max_drafts
        self.seconds_per_token = 0.0  # smoothed estimate: what one more token per step is worth
        self._initial_rates = dict(PRIORS)  # of a new sequence

    def add_drafts(self, chunk: Chunk, limit: int, step_budget: StepBudget) -> Chunk:
        """The chunk of a decoding sequence with at most `limit` drafts, none of them beyond the last token wanted."""
        sequence = chunk.sequence
        limit = min(limit, sequence.request.sampling.max_tokens - sequence.output_count - 1)
        drafts = self.propose(sequence, limit, step_budget)
        model_drafts = 0 if drafts else self.model_drafts(sequence, limit, step_budget)
        return Chunk(sequence, chunk.start, chunk.length, drafts, model_drafts)

    def propose(self, sequence: Sequence, limit: int, step_budget: StepBudget) -> tuple[int, ...]:
        """Up to `limit` draft tokens from a grammar or n-grams. Call it at most once per step and decoding sequence."""
        if limit < 1 or not (self._ngrams or sequence.matcher) or not _can_verify(sequence):
            return ()
        if sequence.matcher is not None and sequence.matcher.expensive:
            return ()  # the masks after the drafts would be late
        state = self._state(sequence)
        found: tuple[int, ...] = ()
        if sequence.matcher is not None:
            found = tuple(sequence.matcher.forced()[:limit])
            state.source = FORCED
        if not found and self._ngrams:
            found = _ngram_drafts(sequence, state, min(limit, self._max_drafts))
        if not found:
            return ()
        return found[: self._worthwhile_count(sequence, state, len(found), step_budget, 0.0)]

    def model_drafts(self, sequence: Sequence, limit: int, step_budget: StepBudget) -> int:
        """How many drafts the model shall make itself, with fewer experts."""
        if not self.experts or limit < 1 or not _can_verify(sequence) or sequence.matcher is not None:
            return 0
        state = self._state(sequence)
        state.source = MODEL
        budget = sequence.request.budget.at_most(self.experts)
        counts = budget.at(len(sequence.tokens), sequence.prompt_length)
        draft_seconds = step_budget.load.seconds_alone(counts)
        return self._worthwhile_count(sequence, state, min(limit, self._max_drafts), step_budget, draft_seconds)

    def record_acceptance(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Update the rates: `accepted` of `drafted` drafts were accepted. Drafts after a miss do not count."""
        state = self._state(sequence)
        outcomes = [1] * accepted
        if accepted < drafted:
            outcomes.append(0)
        for outcome in outcomes:
            state.rates[state.source] += LEARNING_RATE * (outcome - state.rates[state.source])
            self._initial_rates[state.source] += PRIOR_RATE * (outcome - self._initial_rates[state.source])

    def record_step(self, seconds: float, tokens: int) -> None:
        """Update `seconds_per_token` after a step with this estimated time yielded this many tokens."""
        if tokens:
            weight = SMOOTHING if self.seconds_per_token else 1.0
            self.seconds_per_token += weight * (seconds / tokens - self.seconds_per_token)

    def _worthwhile_count(
        self, sequence: Sequence, state: DraftState, limit: int, step_budget: StepBudget, draft_seconds: float
    ) -> int:
        """How many of `limit` drafts pay for themselves: the n-th is accepted with probability rate^n.

        The step must already hold the sequence's own token; making one draft takes `draft_seconds`.
        """
        rate = state.rates[state.source]
        after = step_budget.load.seconds_with(sequence.counts_at(len(sequence.tokens)))
        count, probability, before = 0, rate, after(0)
        while count < limit and self._pays(probability, after(count + 1) - before + draft_seconds):
            count += 1
            probability *= rate
            before = after(count)
        if not count:
            state.rates[state.source] += FORGETTING_RATE * (PRIORS[state.source] - rate)
        return count

    def _pays(self, probability: float, seconds: float) -> bool:
        """Whether a draft that is accepted with this probability is worth this much time."""
        if not self.seconds_per_token:
            return probability > MIN_PROBABILITY
        return probability * self.seconds_per_token > MARGIN * seconds

    def _state(self, sequence: Sequence) -> DraftState:
        if not isinstance(sequence.draft_state, DraftState):
            sequence.draft_state = DraftState(dict(self._initial_rates))
        return sequence.draft_state


def _can_verify(sequence: Sequence) -> bool:
    """Whether the rows after drafts have the logits that would be sampled from: penalties and bad words depend on the
    tokens before, so that such sequences get no drafts."""
    sampling = sequence.request.sampling
    return not sampling.penalises and not sampling.bad_words and sequence.output_count >= sampling.min_tokens


def _ngram_drafts(sequence: Sequence, state: DraftState, limit: int) -> tuple[int, ...]:
    """The tokens that followed the last earlier occurrence of the n-gram at the end of the sequence."""
    tokens, following = sequence.tokens, state.following
    for end in range(max(state.indexed, 1), len(tokens)):  # the last token is followed by nothing yet
        for length in NGRAM_LENGTHS:
            if end >= length:
                following[tuple(tokens[end - length : end])] = end
    state.indexed = len(tokens)
    for length in NGRAM_LENGTHS:
        if len(tokens) < length:
            continue
        position = following.get(tuple(tokens[-length:]))
        if position is not None:
            state.source = length
            return _continuation(tokens, position, limit)
    return ()


def _continuation(tokens: list[int], position: int, limit: int) -> tuple[int, ...]:
    """`limit` tokens from `position` on; where the text ends they start again, as a repeating text would.

    Example: from position 2 of [7, 8, 7, 8], five tokens are 7, 8, 7, 8, 7.
    """
    period = len(tokens) - position
    return tuple(tokens[position + i % period] for i in range(limit))


def speculator_of(setting: str) -> Speculator | None:
    """The speculator of a setting: "off" (None), "grammar", "ngram" or "experts=K".

    Raises:
        InvalidRequest: it is none of these.
    """
    if setting == "off":
        return None
    if setting in ("grammar", "ngram"):
        return Speculator(ngrams=setting == "ngram")
    word, _, count = setting.partition("=")
    if word != "experts" or not count.isdecimal() or int(count) < 1:
        raise InvalidRequest(f"speculate must be off, grammar, ngram or experts=K, got {setting!r:.64}", "speculate")
    return Speculator(ngrams=False, experts=int(count))
