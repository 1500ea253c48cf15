"""`Sequence`: one request inside the engine, with its tokens, how many of them are computed, and its KV-cache blocks.

A sequence has no phase: `pending` is 1 while it decodes and more while it prefills or recomputes.
Not here: how blocks are shared (see `engine/blocks.py`).
"""

from dataclasses import replace

from engine.grammars.matcher import Matcher
from engine.routes import RouteRecord
from engine.types import Logprob, Request, RequestStats, Routes
from model.budget import CountRun, ExpertCounts
from model.expert_range import ExpertRange

LATE = -1  # stands for a token that the device has sampled and the host does not know yet; only while a plan is made


class Sequence:
    """A running or waiting request. The scheduler moves it; the block manager fills `blocks`, `hashes`, `published` and
    what has to do with snapshots.

    Invariants: `computed < len(tokens)`; `blocks` covers at least `computed` tokens;
    `hashes[i]` names the first i + 1 full blocks of `tokens`, which only ever grow.
    """

    __slots__ = (
        "_experts",
        "_unpriced_end",
        "_unpriced_start",
        "absent",
        "admitted_at",
        "answer_snapshot",
        "arrival_number",
        "arrived_at",
        "blocks",
        "cached_tokens",
        "computed",
        "computed_tokens",
        "draft_state",
        "first_token_at",
        "hashes",
        "id",
        "isolated_until",
        "matcher",
        "plain",
        "plain_greedy",
        "preemptions",
        "prompt_length",
        "prompt_logprobs",
        "prompt_logprobs_sent",
        "published",
        "request",
        "routed_pairs",
        "routes",
        "row_count",
        "sampler_state",
        "slot",
        "snapshot_points",
        "snapshots",
        "tokens",
        "waiting_since",
        "weak",
    )

    def __init__(
        self, request: Request, arrived_at: float, matcher: Matcher | None = None, experts: ExpertRange | None = None
    ) -> None:
        self.request = request
        self.id = request.id  # read several times a step
        self._experts = experts  # of the model: what the trained count would cost
        self.matcher = matcher  # follows the request's grammar up to the last of `tokens`
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.plain, self.plain_greedy = request.sampling.plain, request.sampling.plain_greedy
        self.computed = 0  # tokens whose keys and values are in the cache
        self.weak = _weak_row(request, arrived_at)  # the second row of self-contrast decoding, if it has one
        if self.weak is not None:
            self.weak.tokens = self.tokens
        self.row_count = request.budget.rows
        self.blocks: list[int] = []  # of its own row
        self.slot = -1  # index of its recurrent states while it holds blocks
        self.snapshot_points: tuple[int, ...] = ()  # positions of its states that are kept for others
        self.snapshots: list[tuple[int, int]] = []  # of the open plan: positions and the slots for them, by row
        self.answer_snapshot: bytes | None = None  # the name of the last one behind its prompt
        self.hashes: list[bytes] = []
        self.published = 0  # full blocks that have been put into the prefix cache
        self.cached_tokens = 0  # prompt tokens found in the prefix cache when the request was first admitted
        self.preemptions = 0
        self.computed_tokens = 0  # in total; see `RequestStats`
        self.absent = 0  # token by token, the MoE layers that it did not run
        self.routed_pairs = 0  # of these tokens, and of drafts that the model made with fewer experts
        self.routes = RouteRecord() if request.return_routes else None
        self._unpriced_start = self._unpriced_end = 0  # computed positions that are not in `routed_pairs` yet
        self.isolated_until = 0  # tokens before this position run in a step of their own: a shared step failed there
        self.arrived_at = arrived_at
        self.arrival_number = 0  # its position in the order of arrival
        self.waiting_since = arrived_at  # for its next token, while it is queued or partly prefilled
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.sampler_state: object = None  # kept by the sampler; a function of the request and `tokens`
        self.prompt_logprobs: list[Logprob] = []  # of the prompt's tokens from the second on, as far as computed
        self.prompt_logprobs_sent = False  # whether an event has carried them
        self.draft_state: object = None  # kept by the speculator

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is there, or none is needed."""
        return self.matcher is None or self.matcher.ready

    @property
    def suspected(self) -> bool:
        """Whether its next tokens run in a step of their own: a shared step failed there."""
        return self.computed < self.isolated_until

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def output_count(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def counts_at(self, position: int) -> ExpertCounts:
        """The expert counts of the token at `position`, which need not exist yet."""
        return self.request.budget.at(position, self.prompt_length)

    def count_runs(self, start: int, end: int) -> tuple[CountRun, ...]:
        """The expert counts of the positions from `start` up to `end`, as runs of equal counts."""
        return self.request.budget.runs(start, end, self.prompt_length)

    @property
    def rows(self) -> "tuple[Sequence, ...]":
        """Its rows of a batch, which hold blocks of their own: itself, and the weak one if it has one."""
        return (self,) if self.weak is None else (self, self.weak)

    def runs_of_rows(self, start: int, end: int) -> list[CountRun]:
        """The expert counts of these positions in all rows."""
        return [run for row in self.rows for run in row.count_runs(start, end)]

    @property
    def largest_counts(self) -> ExpertCounts:
        """The largest expert counts among the tokens still to be computed: an upper bound of each one's work."""
        return self.request.budget.largest(self.computed, len(self.tokens), self.prompt_length)

    def set_counts(self, counts: ExpertCounts, launched: int = 0) -> int:
        """Give the tokens still to be computed these counts; tokens before `launched` are being computed already.
        Returns the first position with the new counts. The tokens that an answer was sampled from keep their counts,
        also if the sequence was preempted and they are computed again."""
        self._price_work()
        first = max(self.computed, launched, len(self.tokens) - 1 if self.output_count else 0)
        self.request = replace(self.request, budget=self.request.budget.changed(first, counts))
        return first

    def record_work(self, start: int, end: int) -> None:
        """Add the computation of the positions from `start` up to `end` to the sequence's work."""
        self.computed_tokens += end - start
        if start != self._unpriced_end:
            self._price_work()
            self._unpriced_start = start
        self._unpriced_end = end

    def record_measured_work(self, tokens: int, pairs: int, absent: int) -> None:
        """Add the computation of so many tokens whose pairs were counted as they ran."""
        self.computed_tokens += tokens
        self.absent += absent
        self.routed_pairs += pairs

    def _price_work(self) -> None:
        """Add the pairs of the contiguous positions recorded since the last call. Adding them at every decoded token
        would cost time."""
        self.routed_pairs += self.request.budget.pairs(self._unpriced_start, self._unpriced_end, self.prompt_length)
        self._unpriced_start = self._unpriced_end

    @property
    def _trained_pairs(self) -> int:
        """What the computed tokens would have cost at the trained count."""
        if self._experts is None:
            return 0
        return (self.computed_tokens * self._experts.layers - self.absent) * self._experts.trained

    def stats(self, now: float) -> RequestStats:
        """Times and work of the request if it ends at `now` (seconds on the clock that stamped the arrival)."""
        self._price_work()
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        return RequestStats(
            queue_s=admitted - self.arrived_at,
            prefill_s=first - admitted,
            decode_s=now - first,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            computed_tokens=self.computed_tokens,
            routed_pairs=self.routed_pairs,
            trained_pairs=self._trained_pairs,
        )

    def final_routes(self) -> Routes | None:
        """The routes of a sequence that ends, if it wants them; a last token that was only sampled has none."""
        if self.routes is None:
            return None
        end = len(self.tokens) - 1 if self.output_count else len(self.tokens)
        return self.routes.routes(self.cached_tokens, end)


def _weak_row(request: Request, arrived_at: float) -> Sequence | None:
    """The second row of a sequence: the same list of tokens, computed with other experts. The scheduler sees only the
    first row; the second one has blocks, hashes, a slot and snapshots of its own."""
    budget = request.budget.weak
    if budget is None:
        return None
    sampling = replace(request.sampling, prompt_logprobs=None)
    return Sequence(replace(request, budget=budget, sampling=sampling, return_routes=False), arrived_at)
