"""The body of /v1/responses: which fields a client may send, and which of OpenAI's are refused by name.

Not here: how it is turned into a chat (see `server/requests/responses_as_chat.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from model.errors import InvalidRequest
from server.schemas.base import SampledBody, TextOr, Unsupported, refuse_unsupported, validate
from server.schemas.bounds import AtMost, FreeObject, JsonText
from server.schemas.chat import Mode, Name, TemplateBody, choice_kind
from server.schemas.kinds import check_kind, entries_of
from server.settings import Settings

# Names of chat fields and what they are called here, for clients that move from chat
CHAT_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "functions": "tools",
    "function_call": "tool_choice",
    "logprobs": "include",
}
LOGPROBS = "message.output_text.logprobs"
ITEM_CLASSES: Mapping[str, str] = {
    "message": "InputMessage",
    "function_call": "InputCall",
    "function_call_output": "InputCallOutput",
    "reasoning": "InputReasoning",
}
PART_TYPES = ("input_text", "output_text", "reasoning_text")
TOOL_TYPES = ("function",)
CHOICE_TYPES = ("function", "allowed_tools")
ECHOED_FIELDS = ("instructions", "metadata", "reasoning", "text", "tool_choice", "tools", "user")
MAX_PARTS = AtMost("max_parts", "parts")
OUTPUT_FIELDS = frozenset({"id", "status"})  # fields of an answer's items that ask for nothing when they are sent back


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class InputPart(StrictModel):
    """Text; `output_text` is of an answer of a previous turn."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "logprobs"}
    )  # of an answer; they ask for nothing

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(StrictModel):
    """A message, with or without `type`, as one text or as parts."""

    ignored_fields: ClassVar[frozenset[str]] = OUTPUT_FIELDS

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[TextOr[InputPart], MAX_PARTS]


class InputCall(StrictModel):
    """A call that the model made in a previous turn."""

    ignored_fields: ClassVar[frozenset[str]] = OUTPUT_FIELDS

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, JsonText] = Field(description="JSON, as a text")


class InputCallOutput(StrictModel):
    """The result of a called function."""

    ignored_fields: ClassVar[frozenset[str]] = OUTPUT_FIELDS

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[TextOr[InputPart], MAX_PARTS]


class ReasoningPart(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(StrictModel):
    """Reasoning of a previous turn. Its summary is for people: the prompt has the reasoning itself, or nothing."""

    ignored_fields: ClassVar[frozenset[str]] = OUTPUT_FIELDS | {"summary"}

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart] | None, MAX_PARTS] = None
    encrypted_content: None = Field(None, description="Only who wrote it can read it")


def _kind(item: Any) -> str:
    """The tag of an item. Any other value is validated, and refused, as a message."""
    given = item.get("type", "message") if isinstance(item, Mapping) else getattr(item, "type", "message")
    return ITEM_CLASSES.get(given, "InputMessage") if isinstance(given, str) else "InputMessage"


InputItem = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[InputCall, Tag("InputCall")]
    | Annotated[InputCallOutput, Tag("InputCallOutput")]
    | Annotated[InputReasoning, Tag("InputReasoning")],
    Discriminator(_kind),
]


class FlatTool(StrictModel):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: FreeObject | None = Field(None, description="A JSON schema of the arguments")
    strict: bool | None = None


class FlatChoice(StrictModel):
    type: Literal["function"]
    name: str


class FlatAllowed(StrictModel):
    """The prompt has all tools, so that the prefix cache can be used; only these may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice], AtMost("max_tools", "tools")] = Field(min_length=1)


FlatChosenBranch = Annotated[FlatChoice, Tag("Chosen")]
FlatAllowedBranch = Annotated[FlatAllowed, Tag("Allowed")]
FlatToolChoice = Annotated[Mode | FlatChosenBranch | FlatAllowedBranch, Discriminator(choice_kind)]


class PlainFormat(StrictModel):
    type: Literal["text", "json_object"] = "text"
    schema_: FreeObject | None = Field(
        default=None, alias="schema", description="Of the object; llama.cpp's way to give one"
    )


class SchemaFormat(StrictModel):
    """A schema. `strict` changes nothing: answers always match it."""

    type: Literal["json_schema"]
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: FreeObject = Field(alias="schema")
    strict: bool | None = None


def _format_kind(value: Any) -> str:
    given = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "SchemaFormat" if given == "json_schema" else "PlainFormat"


PlainBranch = Annotated[PlainFormat, Tag("PlainFormat")]
SchemaBranch = Annotated[SchemaFormat, Tag("SchemaFormat")]
TextFormat = Annotated[PlainBranch | SchemaBranch, Discriminator(_format_kind)]


class TextOptions(StrictModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(StrictModel):
    """Summaries are never written, so that "auto" is the only value they may have."""

    effort: Annotated[str | None, Field(max_length=32, description="For templates that know it")] = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(StrictModel):
    include_obfuscation: Literal[False] | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], AtMost(16)]
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesBody(SampledBody, TemplateBody):
    """The body. Nothing is stored: `store` is accepted, since clients send it, and the answer has `store: false`."""

    unsupported: ClassVar[Unsupported] = {
        **SampledBody.unsupported,
        "prompt_logprobs": (),
        "previous_response_id": (),
        "conversation": (),
        "background": (),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
        "n": (1,),
    }

    input: Annotated[TextOr[InputItem], AtMost("max_messages", "items")] = Field(examples=["Tell me a story."])
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1, description="Of hosted tools, of which there are none")
    include: Annotated[list[Included], AtMost(64, "names")] = Field(
        [], description="Only the first adds something; of the others no answer has any"
    )
    top_logprobs: int | None = Field(None, ge=0)
    text: TextOptions = TextOptions()
    tools: Annotated[list[FlatTool], AtMost("max_tools", "tools")] = Field([])
    tool_choice: FlatToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions = ReasoningOptions()
    metadata: Metadata = Field({}, max_length=16, description="Comes back as it is")
    store: bool = Field(False, description="Accepted; nothing is stored")
    truncation: Literal["disabled"] = "disabled"
    stream_options: ResponseStreamOptions | None = None


def read_body(raw: Mapping[str, Any], settings: Settings | None = None) -> ResponsesBody:
    """The typed body.

    Raises:
        InvalidRequest: a field has a bad value, belongs to a chat, or is not supported.
    """
    for field, name in CHAT_NAMES.items():
        if raw.get(field) is not None and raw[field] is not False:
            raise InvalidRequest(f"{field} is {name} in /v1/responses", field, "unsupported_parameter")
    refuse_unsupported(ResponsesBody, raw)
    _refuse_types(raw, Settings.model_fields["max_messages"].default if settings is None else settings.max_messages)
    body = validate(ResponsesBody, raw, settings=settings)
    _refuse_large_integers(raw)
    return body


def _refuse_types(raw: Mapping[str, Any], limit: int) -> None:
    """Refuse items, parts and tools of types that are not supported, such as images, files and hosted tools.

    Of a list, only as many entries are checked as it may have.
    """
    for i, item in enumerate(entries_of(raw.get("input"), limit)):
        check_kind(item, f"input[{i}]", tuple(ITEM_CLASSES))
        for field in ("content", "output") if isinstance(item, Mapping) else ():
            for j, part in enumerate(entries_of(item.get(field), limit)):
                check_kind(part, f"input[{i}].{field}[{j}]", PART_TYPES)
    for i, tool in enumerate(entries_of(raw.get("tools"), limit)):
        check_kind(tool, f"tools[{i}]", TOOL_TYPES)
    choice = raw.get("tool_choice")
    check_kind(choice, "tool_choice", CHOICE_TYPES)
    for i, tool in enumerate(entries_of(choice.get("tools") if isinstance(choice, Mapping) else None, limit)):
        check_kind(tool, f"tool_choice.tools[{i}]", TOOL_TYPES)


def _refuse_large_integers(raw: Mapping[str, Any]) -> None:
    """Refuse echoed fields that cannot be serialised, since they have integers beyond 64 bits."""
    for field in ECHOED_FIELDS:
        try:
            orjson.dumps(raw.get(field))
        except orjson.JSONEncodeError as error:
            raise InvalidRequest(f"{field} cannot be repeated in the answer: {error!s:.200}", field) from None
