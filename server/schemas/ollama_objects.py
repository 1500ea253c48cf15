"""The types of the answers of Ollama's API, for /openapi.json. Tests compare real answers with them.

Nothing here writes an answer: `server/formats/ollama.py` and `server/formats/ollama_models.py` do.
"""

from typing import Any, Literal

from pydantic import Field

from server.schemas.answers import AnswerModel, CascadeUsage, CostDetails, ExpertsOption, RequestMetrics, TokenEntry


class OllamaFunction(AnswerModel):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCall(AnswerModel):
    id: str
    function: OllamaFunction


class OllamaAnswerMessage(AnswerModel):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaAnswer(AnswerModel):
    """Also every line of a stream; all from `done_reason` on are in the last one. Durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    logprobs: list[TokenEntry] | None = None
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    num_experts: float | None = Field(None, description="The count that ran; the mean where tokens or layers differ")
    routed_pairs: int | None = None
    routed_pairs_trained: int | None = None
    experts: ExpertsOption | None = None
    cascade: CascadeUsage | None = None
    cost: float | None = None
    cost_details: CostDetails | None = None
    metrics: RequestMetrics | None = None


class OllamaChatAnswer(OllamaAnswer):
    message: OllamaAnswerMessage


class OllamaGenerateAnswer(OllamaAnswer):
    response: str
    thinking: str | None = None


class OllamaDetails(AnswerModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(AnswerModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | None = None
    context_length: int | None = None
    size_vram: int | None = None


class OllamaModels(AnswerModel):
    models: list[OllamaModel]


class OllamaShown(AnswerModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(AnswerModel):
    version: str = Field(description="Of Ollama, whose API this is like")
    moedial: str


class OllamaError(AnswerModel):
    """Every refusal and failure under /api/; in a stream that has begun, its last line."""

    error: str
