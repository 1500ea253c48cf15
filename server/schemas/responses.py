"""The body of /v1/responses: what a client may send, and what of OpenAI's API is refused by name.

It knows fields and their ranges; what they mean in a chat is `server/requests/responses_as_chat.py`'s business.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from model.errors import InvalidRequest, shown
from server.schemas.base import SampledBody, TextOr, refuse_unsupported, validate
from server.schemas.bounds import AtMost, FreeObject, JsonText
from server.schemas.chat import Mode, Name, TemplateBody, choice_kind
from server.settings import Settings

# OpenAI's own words for them, so that who moves from chat is told where to
MOVED: Mapping[str, str] = {
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
KINDS: Mapping[str, str] = {
    "message": "InputMessage",
    "function_call": "InputCall",
    "function_call_output": "InputCallOutput",
    "reasoning": "InputReasoning",
}
PARTS = ("input_text", "output_text", "reasoning_text")
FUNCTION = ("function",)
CHOICES = ("function", "allowed_tools")
ECHOED = ("instructions", "metadata", "reasoning", "text", "tool_choice", "tools", "user")


PARTS_AT_MOST = AtMost("max_parts", "parts")


ANSWERED = frozenset({"id", "status"})  # what an item of an answer has beside its content; it asks nothing


class Given(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class InputPart(Given):
    """Text; `output_text` is what an answer of a previous turn has."""

    carried: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs"})  # of an answer; they ask nothing

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Given):
    """With `type` or without it, with one text or parts of it."""

    carried: ClassVar[frozenset[str]] = ANSWERED

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[TextOr[InputPart], PARTS_AT_MOST]


class InputCall(Given):
    """A call that the model made in a previous turn."""

    carried: ClassVar[frozenset[str]] = ANSWERED

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, JsonText] = Field(description="JSON, as a text")


class InputCallOutput(Given):
    """What the called function said."""

    carried: ClassVar[frozenset[str]] = ANSWERED

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[TextOr[InputPart], PARTS_AT_MOST]


class ReasoningPart(Given):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Given):
    """A thought of a previous turn. A summary is for people: the model is told the thought itself, or nothing."""

    carried: ClassVar[frozenset[str]] = ANSWERED | {"summary"}

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart] | None, PARTS_AT_MOST] = None
    encrypted_content: None = Field(None, description="Only who wrote it can read it")


def _kind(item: Any) -> str:
    """The class of an item. What is no item is taken for a message, and refused as one."""
    given = item.get("type", "message") if isinstance(item, Mapping) else getattr(item, "type", "message")
    return KINDS.get(given, "InputMessage") if isinstance(given, str) else "InputMessage"


InputItem = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[InputCall, Tag("InputCall")]
    | Annotated[InputCallOutput, Tag("InputCallOutput")]
    | Annotated[InputReasoning, Tag("InputReasoning")],
    Discriminator(_kind),
]


class FlatTool(Given):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: FreeObject | None = Field(None, description="A JSON schema of the arguments")
    strict: bool | None = None


class FlatChoice(Given):
    type: Literal["function"]
    name: str


class FlatAllowed(Given):
    """All tools are told to the model, so that prompts begin alike; these may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice], AtMost("max_tools", "tools")] = Field(min_length=1)


FlatToolChoice = Annotated[
    Mode | Annotated[FlatChoice, Tag("Chosen")] | Annotated[FlatAllowed, Tag("Allowed")], Discriminator(choice_kind)
]


class PlainFormat(Given):
    type: Literal["text", "json_object"] = "text"
    schema_: FreeObject | None = Field(
        default=None, alias="schema", description="Of the object; llama.cpp's way to give one"
    )


class SchemaFormat(Given):
    """`strict` asks for nothing more, the schema always holds."""

    type: Literal["json_schema"]
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: FreeObject = Field(alias="schema")
    strict: bool | None = None


def _format_kind(value: Any) -> str:
    given = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "SchemaFormat" if given == "json_schema" else "PlainFormat"


class TextOptions(Given):
    format: (
        Annotated[
            Annotated[PlainFormat, Tag("PlainFormat")] | Annotated[SchemaFormat, Tag("SchemaFormat")],
            Discriminator(_format_kind),
        ]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Given):
    """A summary is never written, so "auto" is all that may be asked of it."""

    effort: Annotated[str | None, Field(max_length=32, description="For templates that know it")] = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(Given):
    include_obfuscation: Literal[False] | None = None


class ResponsesBody(SampledBody, TemplateBody):
    """Nothing is stored: `store` is accepted, since clients send it, and the answer says that it is false."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
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
    include: Annotated[
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "message.input_image.image_url",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ],
        AtMost(64, "names"),
    ] = Field([], description="Only the first adds something; of the others no answer has any")
    top_logprobs: int | None = Field(None, ge=0)
    text: TextOptions = TextOptions()
    tools: Annotated[list[FlatTool], AtMost("max_tools", "tools")] = Field([])
    tool_choice: FlatToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions = ReasoningOptions()
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], AtMost(16)
    ] = Field({}, max_length=16, description="Comes back as it is")
    store: bool = Field(False, description="Accepted; nothing is stored")
    truncation: Literal["disabled"] = "disabled"
    stream_options: ResponseStreamOptions | None = None


def read_body(raw: Mapping[str, Any], settings: Settings | None = None) -> ResponsesBody:
    """The typed body.

    Raises:
        InvalidRequest: a field has a bad value, belongs to a chat, or asks for what is not there.
    """
    for field, home in MOVED.items():
        if raw.get(field) is not None and raw[field] is not False:
            raise InvalidRequest(f"{field} is {home} in /v1/responses", field, "unsupported_parameter")
    refuse_unsupported(ResponsesBody, raw)
    _refuse_kinds(raw, Settings.model_fields["max_messages"].default if settings is None else settings.max_messages)
    body = validate(ResponsesBody, raw, settings=settings)
    _refuse_unwritable(raw)
    return body


def _refuse_kinds(raw: Mapping[str, Any], most: int) -> None:
    """Items, parts and tools of kinds that are not there: pictures, files, hosted tools, what would be stored. Of
    lists, only as much is looked at as can be valid."""
    for i, item in enumerate(_list(raw.get("input"))[:most]):
        _check_kind(item, f"input[{i}]", tuple(KINDS))
        for field in ("content", "output") if isinstance(item, Mapping) else ():
            for j, part in enumerate(_list(item.get(field))[:most]):
                _check_kind(part, f"input[{i}].{field}[{j}]", PARTS)
    for i, tool in enumerate(_list(raw.get("tools"))[:most]):
        _check_kind(tool, f"tools[{i}]", FUNCTION)
    choice = raw.get("tool_choice")
    _check_kind(choice, "tool_choice", CHOICES)
    for i, tool in enumerate(_list(choice.get("tools") if isinstance(choice, Mapping) else None)[:most]):
        _check_kind(tool, f"tool_choice.tools[{i}]", FUNCTION)


def _refuse_unwritable(raw: Mapping[str, Any]) -> None:
    """What is read as JSON may be none that can be written: integers beyond 64 bits."""
    for field in ECHOED:
        try:
            orjson.dumps(raw.get(field))
        except orjson.JSONEncodeError as error:
            raise InvalidRequest(f"{field} cannot be repeated in the answer: {error!s:.200}", field) from None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_kind(value: Any, where: str, known: tuple[str, ...]) -> None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(kind, str) and kind not in known:
        message = f"{where}.type: {shown(kind)} is not supported; supported: {', '.join(known)}"
        raise InvalidRequest(message, f"{where}.type", "unsupported_parameter")
