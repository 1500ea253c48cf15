"""The types of the answers of /v1/responses, for /openapi.json. Tests compare real answers with them.

Nothing here writes an answer: `server/formats/responses.py` does.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from server.schemas.answers import (
    AnswerModel,
    CascadeUsage,
    CompletionDetails,
    CostDetails,
    ExpertsOption,
    RequestMetrics,
    RoutedExperts,
    TokenEntry,
)
from server.schemas.responses import FlatTool, FlatToolChoice

Status = Literal["completed", "incomplete"]


class OutputText(AnswerModel):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]] = Field(max_length=0)
    logprobs: list[TokenEntry] = Field(description="Of the tokens of this text; empty unless asked for")


class OutputMessage(AnswerModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class ReasoningText(AnswerModel):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(AnswerModel):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[dict[str, Any]] = Field(max_length=0)
    content: list[ReasoningText]


class OutputCall(AnswerModel):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as a text")


class InputDetails(AnswerModel):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(AnswerModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int
    num_experts: float = Field(description="The count that ran; the mean where tokens or layers differ")
    routed_pairs: int = Field(description="Pairs of a token and an expert, or draws, that were computed")
    routed_pairs_trained: int = Field(description="What the same tokens would have cost at the trained count")
    experts: ExpertsOption | None = Field(None, description="Where the server chose, or an option was named")
    cascade: CascadeUsage | None = Field(None, description="Where the request has experts.cascade")
    cost: float | None = Field(None, description="Where the operator has set prices: in cost_details.currency")
    cost_details: CostDetails | None = None


class IncompleteDetails(AnswerModel):
    reason: Literal["max_output_tokens"]


class ResponseObject(AnswerModel):
    """What the request said is repeated, with the values that ran."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    completed_at: int | None
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage
    metrics: RequestMetrics
    routed_experts: RoutedExperts | None = None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: FlatToolChoice
    tools: list[FlatTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(AnswerModel):
    """One server-sent event, in the order of `sequence_number`; the last one is completed, incomplete or error."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "error",
    ]
    sequence_number: int
