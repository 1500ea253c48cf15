"""The timeline of one sequence, for metrics: arrival, first token, further tokens, and exactly one end.

All times are of this process's monotonic clock, except the durations that the engine measured.
"""

import time
from dataclasses import dataclass, field

from engine.types import RequestStats
from model.budget import ExpertBudget
from model.errors import EngineBusy, EngineDown, InvalidRequest, MoedialError
from server.access.quotas import Account
from server.errors import code_of
from server.metrics import HistogramBuffer, Metrics


@dataclass(slots=True)
class SharedPromptCount:
    """Whether the tokens of a prompt, which its answers share, have been counted.

    `charged`: whether its API key has paid for them, of a second pass.
    """

    done: bool = False
    charged: bool = False


@dataclass(slots=True)
class Timeline:
    """When things happened to one sequence, and what they add to the metrics."""

    metrics: Metrics
    budget: ExpertBudget
    prompt_tokens: int
    arrived: float
    account: Account | None = None  # of the API key
    trained_pairs: int = 0  # of one token at the trained count
    prompt: SharedPromptCount = field(default_factory=SharedPromptCount)
    adaptive: bool = False  # whether the model's work depends on the token under every rule
    started: float | None = None  # when it got its slot in the batch
    first_token_at: float | None = None
    last_token_at: float = 0.0
    tokens: int = 0
    stats: RequestStats | None = None  # the engine's latest figures
    tokens_at_stats: int = 0  # tokens that `stats` cover
    outcome: str | None = None
    measured: bool = False  # whether only the engine's figures tell the mean count
    label: str = field(init=False)
    _gaps: HistogramBuffer = field(init=False)

    def __post_init__(self) -> None:
        self.set_budget(self.budget)

    def set_budget(self, budget: ExpertBudget) -> None:
        """Set the budget before the first token."""
        self.budget, self.label = budget, self.metrics.label(budget)
        self.measured = self.adaptive or budget.rule.adaptive
        self._gaps = self.metrics.histogram_buffer("inter_token_latency_seconds", self.label)

    def change_budget(self, budget: ExpertBudget) -> None:
        """Change the budget of the tokens from here on. The label stays: a sequence is counted once."""
        self.budget, self.measured = budget, True

    def record_token(self, at: float) -> None:
        """Count one more token, made at this time; times that arrive out of order never make a gap negative."""
        at = max(at, self.last_token_at)
        if self.first_token_at is None:
            self.first_token_at = at
            self.metrics.observe("time_to_first_token_seconds", at - self.arrived, self.label)
            self._count_prompt()
        else:
            self._gaps.add(at - self.last_token_at)
        self.last_token_at = at
        self.tokens += 1
        self.metrics.inc("generation_tokens", self.label)
        if self.account is not None:
            self.account.spend_tokens(1)

    def record_stats(self, stats: RequestStats) -> None:
        """Keep the engine's figures, which cover all tokens so far."""
        self.stats, self.tokens_at_stats = stats, self.tokens

    @property
    def routed_pairs(self) -> int:
        """Pairs of a token and an expert that were computed.

        The engine reports them with the first and the last token; where a stop string ended the sequence here, those
        since the first token are added: as the budget says, or, where the work depends on the token, as many of each as
        the engine's figures have on average.
        """
        reported = self.stats.routed_pairs if self.stats else 0
        if (self.adaptive or self.budget.rule.adaptive) and self.stats is not None and self.stats.computed_tokens:
            return reported + round((self.tokens - self.tokens_at_stats) * reported / self.stats.computed_tokens)
        last = self.prompt_tokens - 1  # each position from here on generated one token
        start, end = last + self.tokens_at_stats, last + self.tokens
        return reported + self.budget.pairs(start, end, self.prompt_tokens)

    @property
    def routed_pairs_trained(self) -> int:
        """The pairs that the same tokens would have taken at the trained count."""
        reported = self.stats.trained_pairs if self.stats else 0
        return reported + (self.tokens - self.tokens_at_stats) * self.trained_pairs

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed, of the prompt and of the answer, with drafts and what was computed again."""
        reported = self.stats.computed_tokens if self.stats else 0
        return reported + self.tokens - self.tokens_at_stats

    @property
    def layer_passes(self) -> float:
        """Token by token, the MoE layers that it ran: all, unless prompts and answers have layers of their own."""
        return self.routed_pairs_trained * len(self.budget.per_layer) / self.trained_pairs

    @property
    def own_pairs(self) -> float:
        """The same pairs without those of the second row of self-contrast decoding, one per token and layer."""
        return self.routed_pairs - (self.layer_passes if self.budget.contrast else 0)

    @property
    def mean_count(self) -> float:
        """The mean expert count over tokens and the layers that they run."""
        if not self.measured or not self.computed_tokens:
            return self.budget.mean(self.prompt_tokens, self.tokens)
        return self.own_pairs / self.layer_passes

    def _count_prompt(self) -> None:
        """Count the prompt once it has been read: not where it was refused, and once for all its answers."""
        if not self.prompt.done:
            self.prompt.done = True
            self.metrics.inc("prompt_tokens", self.label, by=self.prompt_tokens)

    def _observe_count(self) -> None:
        self.metrics.observe("request_num_experts", self.mean_count)

    def succeed(self, reason: str) -> None:
        """End with a finish reason."""
        if self._end(reason):
            if self.first_token_at is None:  # only its prompt was computed
                self._count_prompt()
                self._observe_count()
            self.metrics.inc("request_success", reason, self.label)
            self._observe_times()

    def fail(self, error: Exception) -> None:
        """End with an error."""
        kind = code_of(error) if isinstance(error, MoedialError) else "internal_error"
        if not self._end(kind):
            return
        if isinstance(error, (EngineBusy, EngineDown, InvalidRequest)) and self.first_token_at is None:
            self.metrics.inc("requests_rejected", kind)  # it never ran, or not beyond its prompt
        else:
            self.metrics.inc("requests_failed", kind)

    def abort(self) -> None:
        """End because the generation call was closed; nothing happens to a sequence that has ended."""
        if self._end("aborted"):
            self.metrics.inc("requests_aborted")

    def _end(self, outcome: str) -> bool:
        """Whether this is the first end, which is the only one that counts."""
        if self.outcome is not None:
            return False
        self.outcome = outcome
        if self.first_token_at is not None:
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
        """The engine's figure; without it (a stop string ended the sequence here) the time measured here."""
        if self.stats is not None:
            return self.stats.prefill_s
        return self.first_token_at - self.started if self.first_token_at and self.started else 0.0

    @property
    def decode_s(self) -> float:
        if self.stats is not None and self.stats.decode_s:
            return self.stats.decode_s
        return self.last_token_at - self.first_token_at if self.first_token_at else 0.0

    def _observe_times(self) -> None:
        m, label = self.metrics, self.label
        m.observe("e2e_request_latency_seconds", time.monotonic() - self.arrived, label)
        m.observe("request_queue_time_seconds", self.queue_s, label)
        m.observe("request_prefill_time_seconds", self.prefill_s)
        m.observe("request_decode_time_seconds", self.decode_s)
        m.observe("request_inference_time_seconds", self.prefill_s + self.decode_s)
        m.observe("request_prompt_tokens", self.prompt_tokens)
        m.observe("request_generation_tokens", self.tokens)
        if self.tokens > 1 and self.first_token_at is not None:
            per_token = (self.last_token_at - self.first_token_at) / (self.tokens - 1)
            m.observe("request_time_per_output_token_seconds", per_token, label)
