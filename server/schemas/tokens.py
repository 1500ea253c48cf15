"""The bodies of /tokenize and /detokenize."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.bounds import AtMost
from server.schemas.chat import Messages, TemplateBody, Tools

MAX_TOKENS = 1_000_000  # of one text
TokenIds = Annotated[list[int], AtMost(MAX_TOKENS, "ids")]


class TokenizeBody(TemplateBody):
    """Exactly one of `prompt` and `messages`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str | None = Field(None, examples=["Once upon a time"])
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = Field(True, description="Whether a prompt gets what the checkpoint puts around it")


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    tokens: TokenIds = Field(max_length=MAX_TOKENS, examples=[[1, 2, 3]])
