"""Everything that crosses the border between the HTTP process and the engine process: plain frozen values.

No torch, no sockets, no behaviour. msgspec encodes them as they are, what every step sends without names.
Durations are measured inside one process and travel as seconds; no clock reading crosses the border.

What every token has is no work for the garbage collector (`gc=False`: such values make no cycles): looking through
those of one large call held up the event loop for 0.3 s, several times.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from engine.cost import StepCost
from engine.logs import Level, LogFormat
from model.budget import ExpertBudget, ExpertRange

Finish = Literal["stop", "length", "error", "abort"]
NO_TOKEN_LEFT = "no_token_left"  # code of an error: what a request asks for together leaves no token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick tokens. Every default means "off", except that `seed` is always set (the caller draws one)."""

    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # the first three follow OpenAI: they count generated tokens only
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # follows transformers: divides, and counts prompt tokens too
    min_tokens: int = 0  # stop tokens are masked until so many tokens have been generated
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # no other token is generated; empty: all are allowed
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that are not generated
    logprobs: int | None = None  # None: off; 0: the chosen token's; n: also the n best alternatives
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens; only then may max_tokens be 0
    grammar: str = ""  # what the answer must match, in llguidance's Lark or JSON; "": anything

    @property
    def plain_greedy(self) -> bool:
        """Whether the model's best token is what is wanted, and nothing about it."""
        changed = self.penalises or self.logit_bias or self.grammar or self.restricts
        return self.temperature == 0 and self.logprobs is None and not self.min_tokens and not changed

    @property
    def restricts(self) -> bool:
        """Whether some tokens are out of the question."""
        return bool(self.allowed_token_ids or self.bad_words)

    @property
    def penalises(self) -> bool:
        """Whether what has been generated changes the logits of what comes next."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue. `id` is unique among running requests; `prompt` has at least one token.

    `noise_seed` keys the noise of families that draw some (None: the sampling's seed): several answers to one prompt
    share it, and with it the prompt's keys and values. Only requests with equal `salt` share any.
    """

    id: str
    prompt: tuple[int, ...]
    budget: ExpertBudget
    sampling: Sampling
    noise_seed: int | None = None
    salt: str = ""

    @property
    def noise(self) -> int:
        """The seed of the family's noise."""
        return self.sampling.seed if self.noise_seed is None else self.noise_seed


class Logprob(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Natural-log probability of the chosen token under the unmodified model, and of the best alternatives."""

    value: float
    top: tuple[tuple[int, float], ...] = ()


class RequestStats(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where one finished request's time went, in seconds, on the engine's own clock."""

    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int
    preemptions: int
    computed_tokens: int  # in all: of the prompt and the answer, guesses, and again after a preemption
    routed_pairs: int  # (token, expert) pairs, or draws, of these


class TokenEvent(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One new token, or the end of a request, or both. A stop token is reported with finish="stop".

    A request that asked for its prompt's log-probabilities has those of every prompt token but the first with its
    first event.
    """

    request_id: str
    token: int | None
    logprob: Logprob | None = None
    finish: Finish | None = None
    error: str | None = None  # with finish="error": a sentence for the caller
    stats: RequestStats | None = None  # with the first event, as far as it goes, and with every finish
    prompt_logprobs: tuple[Logprob, ...] | None = None
    code: str = ""  # with an error that the request itself is at fault for: a word for programs


class TimedEvent(NamedTuple):
    """An event on the other side of the border, and when it was made by that process's own clock, as near as it can
    know: when it came, less the time that it was held."""

    event: TokenEvent
    at: float


class StepStats(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one engine step did, and the state it left. Counts are of this step; gauges are after it."""

    seconds: float
    estimated_s: float  # what the scheduler expected; 0 without a cost
    prompt_tokens: int
    generated_tokens: int
    routed_pairs: int  # sum over tokens and MoE layers of the counts that ran
    trained_pairs: int  # what the same tokens would have cost at the trained count
    distinct_experts: int  # experts (∞-MoE: blocks or units) touched, summed over layers
    mixed: bool  # more than one budget in the batch
    load_imbalance: float  # busiest expert's pairs over the mean of all experts, mean over layers; 0 without experts
    preemptions: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache, each prompt once
    prefix_hits: int  # of these, found
    drafted: int  # tokens that speculation guessed
    accepted: int  # of these, right
    running: int
    waiting: int
    oldest_waiting_s: float  # of the sequence that has waited longest for its next token; 0 where none waits
    blocks_used: int
    blocks_total: int
    retries: int = 0  # runs of parts of the step, after it had failed as a whole
    masks_s: float = 0.0  # waiting for masks of grammars, and applying them


class StepReport(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one step did: its events in order, and its statistics.

    `buffered_s`: how long it waited in the engine process for the steps after it (engine/process/coalescer.py).
    """

    events: tuple[TokenEvent, ...]
    stats: StepStats
    buffered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine process says of itself once the model is loaded."""

    family: str
    dtype: str
    parameters: int
    vocabulary: int
    max_model_len: int
    experts: ExpertRange
    experts_total: int  # per MoE layer; for ∞-MoE the blocks (or units) of the wide FFN
    shared_experts: int
    kv_blocks: int
    block_size: int
    load_seconds: float
    kernels: str  # the instruction set of the native kernels, or "torch"
    kernels_reason: str  # why there are none; empty with native kernels
    quantize: str  # of the weights: "none", "int8" or "int8-weights", with what it covers
    step_cost: StepCost | None  # as measured at start; None where steps are not budgeted by time


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run an engine. Plain data, so that it can be handed to a child process."""

    model: str  # a folder that exists
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    allow_extrapolated_experts: bool = False  # counts that a family's router was not made for
    quantize: Literal["none", "int8", "int8-weights"] = "none"  # int8: activations too, row by row
    quantize_layers: Literal["experts", "all"] = "experts"  # all: every matrix but the routers
    threads: int = 0  # 0: one per core
    block_size: int = 16
    kv_cache_bytes: int = 0  # 0: kv_cache_fraction of the memory that is free after loading
    kv_cache_fraction: float = 0.3
    max_model_len: int = 0  # 0: what the checkpoint says
    max_running: int = 64
    max_step_tokens: int = 512
    step_ms: int = 50  # 0: steps are bounded by tokens alone
    stream_interval_ms: int = 50  # tokens made faster than this travel together; 0: every step reports at once
    prefix_cache: bool = True
    speculate: str = "off"  # or "grammar", "ngram", "experts=K": who guesses tokens ahead (engine/speculation.py)
    generation_config: Literal["auto", "none"] = "auto"  # whether that file says which tokens end an answer
    # What the server would refuse after loading; it is compared with the config before the weights are read.
    default_num_experts: int = 0  # 0: as trained
    aliases: dict[str, int] = field(default_factory=dict)
    log_level: Level = "info"
    log_format: LogFormat = "text"
    terminal_columns: int = 0  # of the terminal that shows the standard error stream; 0: none does
