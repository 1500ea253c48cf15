"""The types of the server's answers, for /openapi.json. Tests compare real answers with them.

Nothing here writes an answer: `server/formats/` does, without the cost of a model per chunk.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STOP_REASON = "The request's own stop string or stop token that ended the answer"


class AnswerModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptDetails(AnswerModel):
    cached_tokens: int


class CompletionDetails(AnswerModel):
    reasoning_tokens: int


class ExpertsOption(AnswerModel):
    """The option of the model's calibration that a request got."""

    option: str
    chosen_by: Literal["request", "auto", "brownout"]
    relative_quality: float = Field(description="As calibrated; 1 is as good as the trained count")
    predicted_itl_ms: float | None = Field(None, description="Of a token when it was chosen, with max_itl_ms")
    bound_met: bool | None = Field(None, description="Whether that is within max_itl_ms")


class CascadeRun(AnswerModel):
    num_experts: float
    prompt_tokens: int
    completion_tokens: int


class CascadeAnswer(AnswerModel):
    returned: Literal["low", "high"]
    low: float = Field(description="Mean of what was measured, over the tokens of the first run")
    high: float | None = Field(description="Of the second run; null where there was none")


class CascadeUsage(AnswerModel):
    """The runs of `experts.cascade`. The counts beside it are those of both."""

    by: Literal["entropy", "margin"]
    threshold: float
    low: CascadeRun
    high: CascadeRun | None = Field(description="Of the answers that were made again; null without any")
    answers: list[CascadeAnswer] = Field(description="In order; with best_of also those that are not returned")


class CostDetails(AnswerModel):
    currency: str
    prompt_cost: float
    completion_cost: float


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    num_experts: float = Field(description="The count that ran; the mean where tokens or layers differ")
    routed_pairs: int = Field(description="Pairs of a token and an expert, or draws, that were computed")
    routed_pairs_trained: int = Field(description="What the same tokens would have cost at the trained count")
    experts: ExpertsOption | None = Field(None, description="Where the server chose, or an option was named")
    cascade: CascadeUsage | None = Field(None, description="Where the request has experts.cascade")
    cost: float | None = Field(None, description="Where the operator has set prices: in cost_details.currency")
    cost_details: CostDetails | None = None


class RequestMetrics(AnswerModel):
    """Milliseconds, but for the last five; null where nothing was measured."""

    time_to_first_token_ms: float | None
    queue_time_ms: float | None
    generation_time_ms: float | None
    mean_itl_ms: float | None
    tokens_per_second: float | None
    num_experts: float
    routed_pairs: int
    routed_pairs_trained: int
    experts_option: str | None = Field(None, description="As usage.experts.option")


class RoutedExperts(AnswerModel):
    """Which experts each token used, where `return_routed_experts` asked for it."""

    shape: list[int] = Field(min_length=3, max_length=3, description="Tokens, MoE layers, and experts or bytes")
    dtype: Literal["uint8", "uint16"]
    bits: bool = Field(
        description="false: experts, best first, the largest value of the type where fewer ran; true (∞-MoE): the kept "
        "groups as bits, the lowest group in the lowest bit of the first byte"
    )
    first: int = Field(description="Position of the first token; those before it came out of the prefix cache")
    data: str = Field(description="The array, in C order, little-endian, in base64")


class CompletionLogprobs(AnswerModel):
    """Lists of one length; null for the first token of a prompt, which nothing comes before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(AnswerModel):
    logprob: float
    rank: int | None = Field(description="Among all tokens, from 1; null beyond those that are listed")
    decoded_token: str


PromptLogprobList = list[dict[str, PromptToken] | None]  # by token id; null for the first token


class CompletionChoice(AnswerModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = Field(None, description=STOP_REASON)
    prompt_logprobs: PromptLogprobList | None = None
    routed_experts: RoutedExperts | None = None


class Completion(AnswerModel):
    """Also every chunk of a stream; `usage` and `metrics` are in the last one, where they are asked for, and `usage` in
    every one with `continuous_usage_stats`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class BestToken(AnswerModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(BestToken):
    top_logprobs: list[BestToken]


class ChatLogprobs(AnswerModel):
    content: list[TokenEntry]
    refusal: None


class FunctionCalled(AnswerModel):
    name: str
    arguments: str = Field(description="JSON, as a text")


class ToolCalled(AnswerModel):
    id: str
    type: Literal["function"]
    function: FunctionCalled


class AnswerMessage(AnswerModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCalled] | None = None


class ChatChoice(AnswerModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = Field(description=STOP_REASON)
    routed_experts: RoutedExperts | None = None


class ChatCompletion(AnswerModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics
    prompt_logprobs: PromptLogprobList | None = None


class FunctionDelta(AnswerModel):
    name: str | None = None
    arguments: str


class ToolDelta(AnswerModel):
    """The first of a call has its id and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(AnswerModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolDelta] | None = None


class ChunkChoice(AnswerModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = Field(None, description=STOP_REASON)
    routed_experts: RoutedExperts | None = None


class ChatChunk(AnswerModel):
    """One server-sent event of a streamed chat; the last one, where it is asked for, has the usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


class ErrorDetails(AnswerModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(AnswerModel):
    """Every refusal and failure; in a stream that has begun, the data of an `error` event."""

    error: ErrorDetails


class Model(AnswerModel):
    """The model or one of its aliases; `meta.moe` has the range of counts and what each was measured to be worth."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    meta: dict[str, Any]


class Models(AnswerModel):
    object: Literal["list"]
    data: list[Model]
    models: list[dict[str, Any]] = Field(description="The same models as Codex reads them")


class Tokenized(AnswerModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(AnswerModel):
    prompt: str


class TokenizerInfo(AnswerModel):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int
    vocab_size: int
