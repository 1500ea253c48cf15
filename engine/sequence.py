"""One request on its way through the engine: its tokens, how many of them are computed, and the blocks that hold them.

A sequence has no phases: `pending` is 1 while it decodes and more while it prefills or recomputes.
It refuses to know who schedules it, how blocks are shared, and what a tensor is.
"""

from engine.grammars.matcher import Matcher
from engine.types import Logprob, Request, RequestStats


class Sequence:
    """A running or waiting request. The scheduler moves it; the block manager fills `blocks`, `hashes` and `offered`.

    Invariants: `computed < len(tokens)`; `blocks` covers at least `computed` tokens;
    `hashes[i]` names the first i + 1 full blocks of `tokens`, which only ever grow.
    """

    __slots__ = (
        "admitted_at",
        "arrival_number",
        "arrived_at",
        "blocks",
        "cached_tokens",
        "computed",
        "computed_tokens",
        "draft_pairs",
        "draft_state",
        "first_token_at",
        "hashes",
        "isolated_until",
        "matcher",
        "plain_greedy",
        "preemptions",
        "prompt_length",
        "prompt_logprobs",
        "prompt_logprobs_sent",
        "published",
        "request",
        "sampler_state",
        "slot",
        "tokens",
        "waiting_since",
    )

    def __init__(self, request: Request, arrived_at: float, matcher: Matcher | None = None) -> None:
        self.request = request
        self.matcher = matcher  # of the request's grammar, as far as `tokens` have come
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.plain_greedy = request.sampling.plain_greedy
        self.computed = 0  # tokens whose keys and values are in the cache
        self.blocks: list[int] = []
        self.slot = -1  # the place of its states while it holds blocks
        self.hashes: list[bytes] = []
        self.published = 0  # full blocks that have been offered to the prefix cache
        self.cached_tokens = 0  # prompt tokens found in the prefix cache when the request was first admitted
        self.preemptions = 0
        self.computed_tokens = 0  # in all; see `RequestStats`
        self.draft_pairs = 0  # of guesses that were made with fewer experts
        self.isolated_until = 0  # up to here a step of it and others has failed, so that it is computed alone
        self.arrived_at = arrived_at
        self.arrival_number = 0  # its place in the order of arrival
        self.waiting_since = arrived_at  # for its next token, while it waits or is partly read
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.sampler_state: object = None  # the sampler's own, a function of the request and `tokens`
        self.prompt_logprobs: list[Logprob] = []  # of the prompt's tokens from the second on, as far as they are known
        self.prompt_logprobs_sent = False  # whether an event has carried them
        self.draft_state: object = None  # the speculator's own

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def ready(self) -> bool:
        """Whether it is known what its grammar allows next, if it has one."""
        return self.matcher is None or self.matcher.ready

    @property
    def pending(self) -> int:
        """Tokens that must still be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def output_count(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def stats(self, now: float) -> RequestStats:
        """Where the time went, if the request ends at `now` (seconds on the clock that stamped the arrival)."""
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        return RequestStats(
            queue_s=admitted - self.arrived_at,
            prefill_s=first - admitted,
            decode_s=now - first,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            computed_tokens=self.computed_tokens,
            routed_pairs=self.computed_tokens * sum(self.request.budget.per_layer) + self.draft_pairs,
        )
