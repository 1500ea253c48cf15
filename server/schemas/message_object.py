"""The types of the answers of /v1/messages, for /openapi.json. Tests compare real answers with them.

Nothing here writes an answer: `server/formats/messages.py` does.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from server.schemas.answers import (
    AnswerModel,
    CascadeUsage,
    CostDetails,
    ExpertsOption,
    RequestMetrics,
    RoutedExperts,
)


class AnswerText(AnswerModel):
    type: Literal["text"]
    text: str


class AnswerThinking(AnswerModel):
    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class AnswerToolUse(AnswerModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(description="The arguments; a text that is no object is under `arguments`")


class ThinkingDetails(AnswerModel):
    thinking_tokens: int


class MessageUsage(AnswerModel):
    input_tokens: int = Field(description="Without those found in the prefix cache")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingDetails
    num_experts: float = Field(description="The count that ran; the mean where tokens or layers differ")
    routed_pairs: int = Field(description="Pairs of a token and an expert, or draws, that were computed")
    routed_pairs_trained: int = Field(description="What the same tokens would have cost at the trained count")
    experts: ExpertsOption | None = Field(None, description="Where the server chose, or an option was named")
    cascade: CascadeUsage | None = Field(None, description="Where the request has experts.cascade")
    cost: float | None = Field(None, description="Where the operator has set prices: in cost_details.currency")
    cost_details: CostDetails | None = None


class MessageObject(AnswerModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerThinking | AnswerToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage
    metrics: RequestMetrics
    routed_experts: RoutedExperts | None = None


class MessageEvent(AnswerModel):
    """One server-sent event; the last one is message_stop or error."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(AnswerModel):
    input_tokens: int


class MessagesErrorDetails(AnswerModel):
    type: str
    message: str
    param: str | None
    code: str


class MessagesError(AnswerModel):
    """Every refusal and failure under /v1/messages; in a stream that has begun, the data of an `error` event."""

    type: Literal["error"]
    error: MessagesErrorDetails
