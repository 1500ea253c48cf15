"""The body of /v1/completions. Not here: what its fields do (see `server/requests`)."""

from typing import Any, ClassVar

from pydantic import Field

from server.schemas.base import GenerationBody, Unsupported

COMPLETION_TOKENS = 16  # OpenAI's default for completions
IDS = {"type": "array", "items": {"type": "integer"}}
TEXTS = {"type": "array", "items": {"type": "string"}}
PROMPT: dict[str, Any] = {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "items": IDS}]}


class CompletionBody(GenerationBody):
    unsupported: ClassVar[Unsupported] = {**GenerationBody.unsupported, "suffix": ()}

    prompt: Any = Field(
        ...,
        description="One or more texts or lists of token ids",
        json_schema_extra=PROMPT,
        examples=["Once upon a time"],
    )
    echo: bool = False
    add_special_tokens: bool = Field(True, description="Whether a prompt gets what the checkpoint puts around it")
    best_of: int | None = Field(None, ge=1, description="Answers to generate, of which the n likeliest are returned")
    logprobs: int | None = Field(None, ge=0, description="Also lists so many alternatives of each token")

    @property
    def default_limit(self) -> int | None:
        return COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return self.best_of or self.n


class CompletionWithinContext(CompletionBody):
    """A completion that is as long as the context leaves room for, unless it is limited, as Ollama has it."""

    most_tokens: int | None = Field(None, ge=1)

    @property
    def default_limit(self) -> int | None:
        return self.most_tokens
