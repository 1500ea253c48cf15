"""The life of one sequence as metrics see it: arrival, first token, tokens, and exactly one end.

All times are of this process's monotonic clock, except the engine's own durations. It knows no text.
"""

import time
from dataclasses import dataclass, field

from engine.types import RequestStats
from model.budget import ExpertBudget
from model.errors import EngineBusy, EngineDown, InvalidRequest, MoedialError
from server.access.quotas import Account
from server.errors import code_of
from server.metrics import Metrics, Spread


@dataclass(slots=True)
class PromptCount:
    """Whether a prompt's tokens have been counted, which all its answers share."""

    done: bool = False


@dataclass(slots=True)
class Lifecycle:
    """`trained_pairs`: what one token costs at the trained count, in pairs of a token and an expert."""

    metrics: Metrics
    budget: ExpertBudget
    prompt_tokens: int
    arrived: float
    account: Account | None = None  # of the key that pays for it
    trained_pairs: int = 0
    prompt: PromptCount = field(default_factory=PromptCount)
    started: float | None = None  # when it got its place in the batch
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    stats: RequestStats | None = None  # the engine's last word
    told: int = 0  # tokens up to it
    outcome: str | None = None
    label: str = field(init=False)
    _gaps: Spread = field(init=False)

    def __post_init__(self) -> None:
        self.label = self.metrics.label(self.budget)
        self._gaps = self.metrics.spread("inter_token_latency_seconds", self.label)

    def token(self, at: float) -> None:
        """One more token, made at this time; what came late before it does not make time run backwards."""
        at = max(at, self.last)
        if self.first is None:
            self.first = at
            self.metrics.observe("time_to_first_token_seconds", at - self.arrived, self.label)
            self._count_prompt()
        else:
            self._gaps.add(at - self.last)
        self.last = at
        self.tokens += 1
        self.metrics.inc("generation_tokens", self.label)
        if self.account is not None:
            self.account.spend_tokens(1)

    def tell(self, stats: RequestStats) -> None:
        """Take in the engine's figures, which go as far as the last token."""
        self.stats, self.told = stats, self.tokens

    @property
    def routed_pairs(self) -> int:
        """Pairs of tokens and experts that were computed for it. The engine says so with the first token and the last;
        where a stop string ended the sequence here, those since the first are added."""
        stated = self.stats.routed_pairs if self.stats else 0
        last = self.prompt_tokens - 1  # from each position from here on one token was generated
        return stated + self.budget.pairs(last + self.told, last + self.tokens, self.prompt_tokens)

    @property
    def routed_pairs_trained(self) -> int:
        """What the same tokens would have cost at the trained count."""
        stated = self.stats.computed_tokens if self.stats else 0
        return (stated + self.tokens - self.told) * self.trained_pairs

    def _count_prompt(self) -> None:
        """Once it has been read: what was refused is in no figure, and what several answers share in one."""
        if not self.prompt.done:
            self.prompt.done = True
            self.metrics.inc("prompt_tokens", self.label, by=self.prompt_tokens)

    def _observe_count(self) -> None:
        self.metrics.observe("request_num_experts", self.budget.mean(self.prompt_tokens, self.tokens))

    def succeed(self, reason: str) -> None:
        if self._end(reason):
            if self.first is None:  # only its prompt was read
                self._count_prompt()
                self._observe_count()
            self.metrics.inc("request_success", reason, self.label)
            self._observe_times()

    def fail(self, error: Exception) -> None:
        kind = code_of(error) if isinstance(error, MoedialError) else "internal_error"
        if not self._end(kind):
            return
        if isinstance(error, (EngineBusy, EngineDown, InvalidRequest)) and self.first is None:
            self.metrics.inc("requests_rejected", kind)  # it never ran, or not beyond its prompt
        else:
            self.metrics.inc("requests_failed", kind)

    def abort(self) -> None:
        if self._end("aborted"):
            self.metrics.inc("requests_aborted")

    def _end(self, outcome: str) -> bool:
        """The first end counts; a second one is not an end."""
        if self.outcome is not None:
            return False
        self.outcome = outcome
        if self.first is not None:
            self._observe_count()
        if self.account is not None and self.tokens:
            self.metrics.inc("key_tokens", self.account.name, "generation", by=self.tokens)
        return True

    @property
    def queue_s(self) -> float:
        waited = (self.started or self.arrived) - self.arrived
        return waited + (self.stats.queue_s if self.stats else 0.0)

    @property
    def prefill_s(self) -> float:
        """Without the engine's own figure (a stop string ended the sequence here), what this process saw."""
        if self.stats is not None:
            return self.stats.prefill_s
        return self.first - self.started if self.first and self.started else 0.0

    @property
    def decode_s(self) -> float:
        if self.stats is not None and self.stats.decode_s:
            return self.stats.decode_s
        return self.last - self.first if self.first else 0.0

    def _observe_times(self) -> None:
        m, label = self.metrics, self.label
        m.observe("e2e_request_latency_seconds", time.monotonic() - self.arrived, label)
        m.observe("request_queue_time_seconds", self.queue_s, label)
        m.observe("request_prefill_time_seconds", self.prefill_s)
        m.observe("request_decode_time_seconds", self.decode_s)
        m.observe("request_inference_time_seconds", self.prefill_s + self.decode_s)
        if self.tokens > 1 and self.first is not None:
            per_token = (self.last - self.first) / (self.tokens - 1)
            m.observe("request_time_per_output_token_seconds", per_token, label)
