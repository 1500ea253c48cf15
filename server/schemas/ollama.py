"""The bodies of Ollama's API: /api/chat, /api/generate and /api/show.

Not here: how they are turned into chats and prompts (see `server/requests/ollama_as_chat.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.errors import InvalidRequest
from server.schemas.base import BodyModel, SchemaOrText, TextOr, Unsupported, validate
from server.schemas.bounds import AtMost, FreeObject
from server.schemas.chat import Tools
from server.schemas.experts import COUNT_SCHEMA, EXPERTS_SCHEMA
from server.schemas.unknown import unknown_nested
from server.settings import Settings

NOTHING: tuple[Any, ...] = (None, False, "", [])
KEEP_ALIVE = "Accepted; the model stays loaded"


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ExpertFields(StrictModel):
    num_experts: Any = Field(None, description="Experts per token", json_schema_extra=COUNT_SCHEMA, examples=[2])
    experts: Any = Field(None, description="The same, or an object", json_schema_extra=EXPERTS_SCHEMA)


class Options(ExpertFields):
    """What is sampled and how much; ranges are those of chats. Others of Ollama's options are named and ignored."""

    num_predict: int | None = Field(
        None, description="The most tokens of an answer; 0 and below: what fits the context"
    )
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[TextOr[str] | None, AtMost("max_stop", "strings")] = None


class CalledFunction(StrictModel):
    ignored_fields: ClassVar[frozenset[str]] = frozenset({"index"})

    name: str
    arguments: FreeObject = {}


class Call(StrictModel):
    ignored_fields: ClassVar[frozenset[str]] = frozenset({"type"})

    id: str | None = None
    function: CalledFunction


class OllamaMessage(StrictModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = Field(None, description="Of an answer of the assistant")
    tool_calls: Annotated[list[Call] | None, AtMost("max_parts", "calls")] = None
    tool_name: str | None = Field(None, description="Of the tool whose result this is")
    tool_call_id: str | None = None
    images: Annotated[list[str] | None, AtMost(0, "images, since the model reads text only")] = None


class OllamaBody(ExpertFields):
    """The fields of both ways to generate. An explicit null means the default."""

    unsupported: ClassVar[Unsupported] = {}  # fields that ask for something that is not there

    model: str | None = Field(None, description="NAME, NAME:latest, or NAME:k2 for two experts per token")
    stream: bool = True
    format: SchemaOrText | None = Field(None, description='"json", or a JSON schema')
    options: Options = Field(default_factory=Options.model_construct)
    think: bool | str | None = Field(None, description="Whether to think, or how much, for templates that know it")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    keep_alive: float | str | None = Field(None, description=KEEP_ALIVE)


class OllamaChatBody(OllamaBody):
    messages: Annotated[list[OllamaMessage], AtMost("max_messages", "messages")] = Field(
        [], examples=[[{"role": "user", "content": "Tell me a story."}]], description="None: whether the model is there"
    )
    tools: Annotated[Tools | None, AtMost("max_tools", "tools")] = None


class OllamaGenerateBody(OllamaBody):
    unsupported: ClassVar[Unsupported] = {
        "suffix": (),
        "template": (),
        "context": (),
        "images": (),
        "width": (),
        "height": (),
        "steps": (),
    }

    prompt: str = Field("", examples=["Once upon a time"], description="None: whether the model is there")
    system: str | None = None
    raw: bool = Field(False, description="The prompt goes to the model as it is, without a chat template")


class ShowBody(StrictModel):
    """Ollama's older clients name the model `name`."""

    model: str | None = None
    name: str | None = None
    verbose: bool = False


def read_ollama(kind: type[BodyModel], raw: Mapping[str, Any], settings: Settings) -> tuple[BodyModel, list[str]]:
    """The typed body, and the fields that nothing reads.

    Raises:
        InvalidRequest: a field has a bad value, or is not supported.
    """
    unsupported: Unsupported = getattr(kind, "unsupported", {})
    for field in unsupported:
        if raw.get(field) not in NOTHING:
            raise InvalidRequest(f"{field} is not supported", field, "unsupported_parameter")
    body = validate(kind, raw, settings=settings)
    unknown = [key for key in raw if key not in kind.model_fields and key not in unsupported]
    return body, unknown + unknown_nested(body, raw)
