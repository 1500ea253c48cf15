"""The bodies of /v1/messages and /v1/messages/count_tokens, Anthropic's API: which fields a client may send, and which
are refused by name.

Not here: how they are turned into a chat (see `server/requests/messages_as_chat.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from model.errors import InvalidRequest
from server.schemas.base import BodyModel, SampledBody, TextOr, Unsupported, refuse_unsupported, validate
from server.schemas.bounds import AtMost, FreeObject
from server.schemas.chat import Name, TemplateBody
from server.schemas.kinds import check_kind, entries_of
from server.settings import Settings

# Names of chat fields and what they are called here, for clients that move from chat
CHAT_NAMES: Mapping[str, str] = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "functions": "tools",
    "function_call": "tool_choice",
}
BLOCK_CLASSES: Mapping[str, str] = {
    "text": "TextBlock",
    "tool_use": "ToolUseBlock",
    "tool_result": "ToolResultBlock",
    "thinking": "ThinkingBlock",
    "redacted_thinking": "RedactedBlock",
}
TEXT_TYPES = ("text",)
TOOL_KINDS = ("custom",)  # and tools without a type
CHOICE_TYPES = ("auto", "any", "tool", "none")
MAX_BLOCKS = AtMost("max_parts", "blocks")


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Block(StrictModel):
    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations"})  # all prefixes are cached


class TextBlock(Block):
    type: Literal["text"]
    text: str


class ToolUseBlock(Block):
    """A call that the model made in a previous turn."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: FreeObject


class ToolResultBlock(Block):
    """The result of a called tool."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[TextOr[TextBlock] | None, MAX_BLOCKS] = None
    is_error: bool = Field(False, description='The model reads "Error: " before the result')


class ThinkingBlock(Block):
    """Reasoning of a previous turn."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control", "signature"})

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Block):
    """Reasoning that only who wrote it can read; it is left out of the prompt, and named in x-ignored-fields."""

    type: Literal["redacted_thinking"]
    data: str


def _kind(block: Any) -> str:
    """The tag of a block. Any other value is validated, and refused, as text."""
    given = block.get("type") if isinstance(block, Mapping) else getattr(block, "type", None)
    return BLOCK_CLASSES.get(given, "TextBlock") if isinstance(given, str) else "TextBlock"


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("TextBlock")]
    | Annotated[ToolUseBlock, Tag("ToolUseBlock")]
    | Annotated[ToolResultBlock, Tag("ToolResultBlock")]
    | Annotated[ThinkingBlock, Tag("ThinkingBlock")]
    | Annotated[RedactedBlock, Tag("RedactedBlock")],
    Discriminator(_kind),
]


class Turn(StrictModel):
    """A message. Calls and thoughts are the assistant's, results of calls the user's; the system's are text."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[TextOr[ContentBlock], MAX_BLOCKS]


class ClientTool(StrictModel):
    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control", "eager_input_streaming"})

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: FreeObject = Field(description="A JSON schema of the arguments")


class ToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="Of the tool to call, with the type tool")
    disable_parallel_tool_use: bool = False


class Thinking(StrictModel):
    """For templates that know thinking. There is no budget: how long the model thinks is its own affair."""

    type: Literal["enabled", "adaptive", "disabled"]


class JsonFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: FreeObject = Field(alias="schema")


class OutputConfig(StrictModel):
    effort: Annotated[str | None, Field(max_length=32, description="For templates that know it")] = None
    format: JsonFormat | None = None


class CountBody(SampledBody, TemplateBody):
    """What decides the prompt."""

    unsupported: ClassVar[Unsupported] = {
        **SampledBody.unsupported,
        "prompt_logprobs": (),
        "logprobs": (),
        "top_logprobs": (),
        "n": (1,),
        "mcp_servers": ([],),
        "container": (),
    }

    messages: Annotated[list[Turn], AtMost("max_messages", "messages")] = Field(
        min_length=1, examples=[[{"role": "user", "content": "Tell me a story."}]]
    )
    system: Annotated[TextOr[TextBlock] | None, MAX_BLOCKS] = None
    tools: Annotated[list[ClientTool], AtMost("max_tools", "tools")] = Field([])
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()


class MessagesBody(CountBody):
    max_tokens: int = Field(ge=1, examples=[64], description="The context may leave less")
    stop_sequences: Annotated[list[str], AtMost("max_stop", "strings")] = Field([])
    metadata: FreeObject = Field({}, description="Accepted; nothing is done with it")
    service_tier: str | None = Field(None, description="Accepted; there is one tier")


def read_messages(kind: type[BodyModel], raw: Mapping[str, Any], settings: Settings) -> BodyModel:
    """The typed body.

    Raises:
        InvalidRequest: a field has a bad value, belongs to a chat, or is not supported.
    """
    for field, name in CHAT_NAMES.items():
        if raw.get(field) is not None and raw[field] != []:
            raise InvalidRequest(f"{field} is {name} in /v1/messages", field, "unsupported_parameter")
    refuse_unsupported(CountBody, raw)
    _refuse_kinds(raw, settings)
    return validate(kind, raw, settings=settings)


def _refuse_kinds(raw: Mapping[str, Any], settings: Settings) -> None:
    """Refuse blocks and tools of types that are not supported, such as images and documents.

    Of a list, only as many entries are checked as it may have.
    """
    messages, parts = settings.max_messages, settings.max_parts
    for i, message in enumerate(entries_of(raw.get("messages"), messages)):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, block in enumerate(entries_of(content, parts)):
            where = f"messages[{i}].content[{j}]"
            check_kind(block, where, tuple(BLOCK_CLASSES))
            inner = block.get("content") if isinstance(block, Mapping) else None
            for k, part in enumerate(entries_of(inner, parts)):
                check_kind(part, f"{where}.content[{k}]", TEXT_TYPES)
    for i, block in enumerate(entries_of(raw.get("system"), parts)):
        check_kind(block, f"system[{i}]", TEXT_TYPES)
    for i, tool in enumerate(entries_of(raw.get("tools"), settings.max_tools)):
        check_kind(tool, f"tools[{i}]", TOOL_KINDS)
