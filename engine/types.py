"""The values that cross between the HTTP process and the engine process: requests, events, statistics, settings.

Frozen values, without torch, sockets or behaviour. msgspec encodes them; what every step sends, as arrays without field
names. Durations are measured inside one process and sent as seconds; no clock reading crosses between processes.

Values made for every token are hidden from the garbage collector (`gc=False`; they form no cycles): scanning those of
one large call blocked the event loop for 0.3 s, several times.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from engine.cost import StepCost
from engine.logs import Level, LogFormat
from model.budget import ExpertBudget
from model.expert_range import ExpertRange
from model.options import DType, KVCacheDType, Quantize, QuantizeLayers
from weights.sizes import BytesPerWeight, WeightFiles

GenerationConfig = Literal["auto", "none"]
Finish = Literal["stop", "length", "error", "abort"]
Measure = Literal["entropy", "margin"]  # of how unsure the model is of a next token
MAX_ROUTED_TOKENS = 2048  # of a request that wants its routes, prompt and answer together
NO_TOKEN_LEFT = "no_token_left"  # code of an error: what a request asks for together leaves no token


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Every default means "off", except that `seed` is always set (the caller draws one)."""

    max_tokens: int
    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # as OpenAI: this and the next count generated tokens only
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # as transformers: divides, and counts prompt tokens as well
    min_tokens: int = 0  # stop tokens are masked until this many tokens have been generated
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # no other token is generated; empty: all are allowed
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are not generated
    logprobs: int | None = None  # None: off; 0: the chosen token's; n: also the n best alternatives
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; only with it may max_tokens be 0
    grammar: str = ""  # what the answer must match, in llguidance's Lark or JSON; "": anything
    measured: Measure | None = None  # of the model's distribution at each generated token; None: nothing is

    @property
    def plain(self) -> bool:
        """Whether tokens come from the unchanged logits, and nothing else is said of them."""
        changed = self.penalises or self.logit_bias or self.grammar or self.restricts
        reported = self.logprobs is not None or self.measured is not None
        return not (reported or self.min_tokens or changed)

    @property
    def plain_greedy(self) -> bool:
        """Whether this is plain greedy decoding: the argmax of the unchanged logits, and nothing else of them."""
        return self.temperature == 0 and self.plain

    @property
    def restricts(self) -> bool:
        """Whether allowed tokens or bad words exclude some tokens."""
        return bool(self.allowed_token_ids or self.bad_words)

    @property
    def penalises(self) -> bool:
        """Whether generated tokens change the logits of the next ones."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue. `id` is unique among running requests; `prompt` has at least one token.

    `noise_seed` keys the noise of families that draw it (None: the sampling seed). Several answers to one prompt share
    it, and so can share the prompt's KV blocks; only requests with equal `salt` share blocks.
    """

    id: str
    prompt: tuple[int, ...]
    budget: ExpertBudget
    sampling: Sampling
    noise_seed: int | None = None
    salt: str = ""
    return_routes: bool = False  # the last event says which experts ran

    @property
    def noise(self) -> int:
        """The seed of the family's noise."""
        return self.sampling.seed if self.noise_seed is None else self.noise_seed


class Logprob(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Natural-log probability of the chosen token under the unmodified model, and of the best alternatives."""

    value: float
    top: tuple[tuple[int, float], ...] = ()


class RequestStats(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Times and work of one request; times in seconds on the engine's clock."""

    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int
    preemptions: int
    computed_tokens: int  # in total: prompt, answer, drafts, and what is recomputed after a preemption
    routed_pairs: int  # (token, expert) pairs, or draws, of these tokens in all their rows; counted as they ran
    trained_pairs: int = 0  # what the same tokens would have cost at the trained count

    def mean_count(self, layers: int) -> float:
        """Pairs per token and MoE layer, as they ran."""
        return self.routed_pairs / (self.computed_tokens * layers) if self.computed_tokens and layers else 0.0


class Routes(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Which experts ran: a little-endian array of `shape`, C order.

    Top-k: experts best first; the largest value of the type where a token ran fewer. ∞-MoE: `bits` of the kept groups,
    the lowest group in the lowest bit of the first byte.
    """

    first: int  # position of the first token: those before it were found in the prefix cache
    shape: tuple[int, int, int]  # tokens, MoE layers, and experts or bytes
    dtype: Literal["uint8", "uint16"]
    bits: bool
    data: bytes


class TokenEvent(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One new token, or the end of a request, or both. A stop token is reported with finish="stop".

    The first event of a request with `prompt_logprobs` carries those of every prompt token but the first.
    """

    request_id: str
    token: int | None
    logprob: Logprob | None = None
    finish: Finish | None = None
    error: str | None = None  # with finish="error": a sentence for the caller
    stats: RequestStats | None = None  # with the first event (up to then) and with every finish
    prompt_logprobs: tuple[Logprob, ...] | None = None
    code: str = ""  # machine-readable, with an error that the request itself caused
    routes: Routes | None = None  # with finish="stop" or "length" of a request with `return_routes`
    measured: float | None = None  # with each token, where the request wants a measure


class TimedEvent(NamedTuple):
    """An event in the HTTP process and the time when the engine made it, on the HTTP process's clock: the time when it
    was received, less the time that it was buffered."""

    event: TokenEvent
    at: float


class StepStats(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one engine step did, and the state it left. Counts are of this step; gauges are after it."""

    seconds: float
    estimated_s: float  # what the scheduler expected; 0 without a cost
    prompt_tokens: int
    generated_tokens: int
    routed_pairs: int  # sum over tokens and MoE layers of the experts that ran
    trained_pairs: int  # what the same tokens would have cost at the trained count
    distinct_experts: int  # experts (∞-MoE: groups of units) used, summed over layers
    mixed: bool  # tokens of different expert counts in the batch
    load_imbalance: float  # busiest expert's pairs over the mean of all experts, mean over layers; 0 without experts
    preemptions: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache, each prompt once
    prefix_hits: int  # how many of these were found
    drafted: int  # draft tokens of speculative decoding
    accepted: int  # how many of these were accepted
    running: int
    waiting: int
    oldest_waiting_s: float  # of the sequence that has waited longest for its next token; 0 where none waits
    blocks_used: int
    blocks_total: int
    retries: int = 0  # runs of parts of the step, after the whole step had failed
    masks_s: float = 0.0  # spent waiting for grammar masks and applying them
    contrast_tokens: int = 0  # computed a second time, for self-contrast decoding
    snapshots: int = 0  # of recurrent states, kept by the prefix cache
    snapshot_bytes: int = 0
    snapshots_displaced: int = 0  # dropped to make room for others


class StepReport(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one step did: its events in order, and its statistics.

    `buffered_s`: how long the report was buffered in the engine process to be sent with later ones (the coalescer).
    """

    events: tuple[TokenEvent, ...]
    stats: StepStats
    buffered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine process reports once the model is loaded."""

    family: str
    dtype: str
    parameters: int
    vocabulary: int
    max_model_len: int
    experts: ExpertRange
    experts_total: int  # per MoE layer; for ∞-MoE the groups of units of the wide FFN
    shared_experts: int
    kv_blocks: int
    block_size: int
    load_seconds: float
    kernels: str  # the instruction set of the native kernels, what GPU kernels are compiled for, or "torch"
    kernels_reason: str  # why the device's fastest kernels are not used; empty if they are
    quantize: str  # of the weights: "none", or "int8" and the like, and which layers
    step_cost: StepCost | None  # as measured at start; None if steps are not bounded by time
    device: str = "cpu"  # where the weights and the cache are: "cpu", or "cuda:n"
    backend: str = "torch"  # "cpu": native kernels; "cuda": kernels for GPUs
    token_local: bool = True  # whether a token's mixtures look at no other tokens
    prefix_cache: bool = True  # whether requests share blocks of equal prompts
    chunked: bool = True  # whether a prompt may be computed in several steps
    calibration_reason: str = ""  # why the checkpoint's calibration is not used; empty if it is, or there is none
    expert_bytes: tuple[int, ...] = ()  # of each rank, where the experts are divided among ranks
    weight_files: WeightFiles = field(default_factory=WeightFiles)
    loaded_bytes: BytesPerWeight = field(default_factory=BytesPerWeight)  # before `quantize` changes them
    kv_cache_dtype: KVCacheDType = "auto"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run an engine. Plain data, so that it can be passed to a child process.

    The server's settings take their types and defaults from here (`server/settings.py`).
    """

    model: str  # a folder or a GGUF file that exists
    tokenizer: str = ""  # a folder with the tokenizer to use instead of the model's own
    dtype: DType = "auto"
    allow_extrapolated_experts: bool = False  # allow counts that a family's router was not made for
    device: str = "auto"  # or "cpu", "cuda", "cuda:n"; auto: a GPU if there is one
    quantize: Quantize = "none"
    quantize_layers: QuantizeLayers = "experts"
    threads: int = 0  # 0: one per core
    block_size: int = 0  # 0: what the device's kernels read best
    kv_cache_dtype: KVCacheDType = "auto"
    kv_cache_bytes: int = 0  # 0: kv_cache_fraction of the memory that is free on the device after loading
    kv_cache_fraction: float = 0.0  # 0: 0.3 on the CPU, 0.9 on a GPU
    max_model_len: int = 0  # 0: what the checkpoint says
    max_running: int = 64
    max_step_tokens: int = 512
    step_ms: int = 50  # 0: only max_step_tokens bounds a step
    stream_interval_ms: int = 50  # tokens made faster than this are sent together; 0: every step is sent at once
    prefix_cache: bool = True
    prefix_snapshots: int = 0  # of recurrent states; 0: as many as an eighth of the cache holds
    prefix_snapshot_tokens: int = 2048  # from one to the next within a long prompt
    speculate: str = "off"  # or "grammar", "ngram", "experts=K": where drafts come from (engine/speculation.py)
    generation_config: GenerationConfig = "auto"  # whether that file's tokens end an answer
    # The server would refuse bad values of these after loading; they are checked before the weights are read.
    default_num_experts: int = 0  # 0: as trained
    aliases: dict[str, int] = field(default_factory=dict)
    ranks: int = 1  # processes among which the experts are divided
    rank_address: str = ""  # HOST:PORT on which ranks of other machines join; empty: the engine starts them here
    rank_seconds: float = 8.0  # that another rank may take for its part of one layer
    log_level: Level = "info"
    log_format: LogFormat = "text"
    terminal_columns: int = 0  # width of the terminal that shows the standard error stream; 0: none does
