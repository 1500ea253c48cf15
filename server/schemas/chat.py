"""The body of /v1/chat/completions: messages, tools, and variables of the chat template.

Not here: how messages become a prompt (see `server/requests/templates.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
)

from model.errors import shown
from server.json_limits import JsonTooLarge, check_count
from server.schemas.base import GenerationBody, TextOr, Unsupported
from server.schemas.bounds import AtMost, FreeObject, JsonText, bad_json, json_limits_of

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: Annotated[str, JsonText] = Field("{}", description="JSON, as a text")


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


def _only_text(value: Any) -> Any:
    """Refuse parts that are no text with one clear error, where pydantic would report every branch of the union."""
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(f"only text parts are supported, got a part of type {shown(part['type'], 32)}")
    return value


Text = Annotated[TextOr[TextPart], BeforeValidator(_only_text), AtMost("max_parts", "parts")]


class MessageBase(BaseModel):
    """The fields of all messages."""

    model_config = ConfigDict(strict=True, extra="ignore")

    content: Text
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: one text, and only the fields that are set."""
        message = {"role": self.template_role, "content": text_of(self.content)}
        return message if self.name is None else message | {"name": self.name}

    @property
    def template_role(self) -> str:
        raise NotImplementedError


class SystemMessage(MessageBase):
    """Instructions; "developer" is OpenAI's newer name for "system"."""

    role: Literal["system", "developer"]

    @property
    def template_role(self) -> str:
        return "system"


class UserMessage(MessageBase):
    role: Literal["user"]

    @property
    def template_role(self) -> str:
        return self.role


class AssistantMessage(MessageBase):
    role: Literal["assistant"]
    content: Text | None = None  # type: ignore[assignment]
    tool_calls: Annotated[list[ToolCall] | None, AtMost("max_parts", "calls")] = None
    reasoning_content: str | None = None

    @property
    def template_role(self) -> str:
        return self.role

    def for_template(self) -> dict[str, Any]:
        message = super().for_template()
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        return message


class ToolMessage(MessageBase):
    """The result of a called function."""

    role: Literal["tool"]
    tool_call_id: str | None = None

    @property
    def template_role(self) -> str:
        return self.role

    def for_template(self) -> dict[str, Any]:
        return super().for_template() | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def _check_calls(messages: list[Message], info: ValidationInfo) -> list[Message]:
    """Check that the arguments of all calls together are within the limits; each text is checked by itself as well."""
    calls = [call for message in messages if isinstance(message, AssistantMessage) for call in message.tool_calls or ()]
    try:
        check_count([call.function.arguments.encode("utf-8", "replace") for call in calls], json_limits_of(info))
    except JsonTooLarge as error:
        raise bad_json(f"hold arguments of calls that are no JSON of {error} together") from None
    return messages


Messages = Annotated[list[Message], AfterValidator(_check_calls), AtMost("max_messages", "messages")]


def text_of(content: str | list[TextPart] | None) -> str:
    """The content as one text; parts are joined by line ends."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    """A call for the template: transformers' templates take arguments as an object. Text that is no JSON is kept."""
    try:
        arguments = orjson.loads(call.function.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: Name
    description: str | None = None
    parameters: FreeObject | None = Field(None, description="A JSON schema of the arguments")
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


Tools = Annotated[list[Tool], AtMost("max_tools", "tools")]


class ChosenFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str


class ChosenTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: ChosenFunction


class AllowedSubset(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], AtMost("max_tools", "tools")] = Field(min_length=1)


class AllowedTools(BaseModel):
    """The prompt has all tools, so that the prefix cache can be used; only these may be called."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSubset


def choice_kind(value: Any) -> str:
    """The tag of a value of `tool_choice`."""
    if isinstance(value, str):
        return "Mode"
    given = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "Allowed" if given == "allowed_tools" else "Chosen"


Mode = Annotated[Literal["auto", "none", "required"], Tag("Mode")]
Chosen = Annotated[ChosenTool, Tag("Chosen")]
Allowed = Annotated[AllowedTools, Tag("Allowed")]
ToolChoice = Annotated[Mode | Chosen | Allowed, Discriminator(choice_kind)]


class TemplateBody(BaseModel):
    """The fields that control the chat template; its variables must be allowed by the operator."""

    add_generation_prompt: bool = True
    continue_final_message: bool = Field(
        False, description="The answer goes on from the last message, an assistant's; without add_generation_prompt"
    )
    enable_thinking: bool | None = Field(None, description="For templates that know it; refused by others")
    chat_template_kwargs: Annotated[dict[str, Any], AtMost(64, "variables")] = {}


def _no_tools(value: Any) -> Any:
    return None if value == [] else value


class ChatBody(GenerationBody, TemplateBody):
    unsupported: ClassVar[Unsupported] = {
        **GenerationBody.unsupported,
        "functions": ([],),
        "function_call": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "chat_template": (),
        "echo": (),
        "best_of": (1,),
    }

    add_special_tokens: bool = Field(
        False, description="Whether the template's text gets what the checkpoint puts around a prompt"
    )
    messages: Messages = Field(min_length=1, examples=[[{"role": "user", "content": "Tell me a story."}]])
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: Annotated[Tools | None, BeforeValidator(_no_tools)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(None, max_length=32, description="For templates that know it")

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatWithinContext(ChatBody):
    """A chat whose limit on the answer is cut to what the context leaves, as other APIs than OpenAI's have it."""

    most_tokens: int | None = Field(None, ge=1)

    @property
    def default_limit(self) -> int | None:
        return self.most_tokens
