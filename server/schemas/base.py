"""The fields that all bodies of generating requests share, with types and ranges. Unknown keys pass validation.

Limits that an operator can set are checked in `server/requests/limits.py`, the expert fields in
`server/experts/`, and what an answer must match in `server/requests/structured.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from model.errors import InvalidRequest, shown
from server.schemas.bounds import BAD_JSON, KEYS, TOO_MANY, AtMost, JsonText
from server.schemas.experts import COUNT_SCHEMA, EXPERTS_SCHEMA
from server.settings import Settings

BodyModel = TypeVar("BodyModel", bound=BaseModel)
Unsupported = Mapping[str, tuple[Any, ...]]  # fields by name, each with the values that ask for nothing
UNION_TAGS = ("str", "bool", "float", "system", "developer", "user", "assistant", "tool")
ZERO_IS_A_VALUE = ("prompt_logprobs",)  # fields in which 0 asks for something
MAX_ALLOWED_IDS, MAX_BAD_WORDS = 1 << 16, 1 << 10
NEUTRAL = (None, False, 0, "", "auto", "none")


def _shape(value: Any) -> str:
    """The tag of a value that may be a text or a list."""
    return "List" if isinstance(value, list) else "Text"


Item = TypeVar("Item")
# tagged by its type, so that an error names the item at fault and not the other branch of the union
TextBranch = Annotated[str, Tag("Text")]
ListBranch = Annotated[list[Item], Tag("List")]
TextOr = Annotated[TextBranch | ListBranch[Item], Discriminator(_shape)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="The usage so far in every chunk")


SCHEMA_KEYWORDS = ("type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs")


Schema = dict[str, Any] | bool


class JsonSchema(BaseModel):
    """OpenAI's wrapper of a schema. `strict` changes nothing: answers always match the schema."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    name: str = Field("answer", max_length=64)
    description: str | None = None
    schema_: Annotated[Schema, KEYS] = Field(True, alias="schema")
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_schema(cls, value: Any) -> Any:
        """Refuse a bare schema: read as a wrapper without `schema`, it would allow anything."""
        if isinstance(value, dict) and "schema" not in value:
            for key in SCHEMA_KEYWORDS:
                if key in value:
                    raise ValueError(f"the schema belongs into its field schema, beside name; here is {key!r}")
        return value


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[Schema | None, KEYS] = Field(
        None, alias="schema", description="A JSON schema; llama.cpp's place for it"
    )


SchemaOrText = Annotated[Schema | str, KEYS, JsonText]
Bias = Annotated[float, Field(ge=-100, le=100)]
Choices = Annotated[list[str], AtMost("max_choices", "texts")]
AllowedIds = Annotated[list[int], AtMost(MAX_ALLOWED_IDS, "ids")]
BadWords = Annotated[list[str], AtMost(MAX_BAD_WORDS, "strings")]


class StructuredOutputs(BaseModel):
    """vLLM's newer names; exactly one of the first five is given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = Field(None, description="A regex of the white space that JSON may have")
    disable_additional_properties: bool | None = Field(
        None, description="Whether objects are closed where the schema is silent; by default the server's setting"
    )
    disable_any_whitespace: bool | None = Field(None, description="Nothing changes: white space is never free")
    disable_fallback: bool | None = Field(None, description="Nothing changes: there is one library")


class SampledBody(BaseModel):
    """The fields of every generating endpoint. An explicit null means the default."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    # Fields of OpenAI's or vLLM's API that must not be ignored while they are not supported, each with the values that
    # ask for nothing and therefore pass.
    unsupported: ClassVar[Unsupported] = {
        "use_beam_search": (),
        "prompt_embeds": (),
        "logits_processors": ([],),
        "structural_tag": (),
        "grammar_lazy": (),
        "grammar_triggers": ([],),
    }

    model: str | None = None
    num_experts: Any = Field(
        None, description="Experts per token; /v1/models has the range", json_schema_extra=COUNT_SCHEMA, examples=[2]
    )
    experts: Any = Field(
        None,
        description="The same, or an object: counts, how experts are weighted and chosen, a profile, or auto",
        json_schema_extra=EXPERTS_SCHEMA,
    )
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    noise_seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="Of the noise that an ∞-MoE draws; by default the server's"
    )
    return_routed_experts: bool = Field(
        False, description="Whether the answer says which experts each token used; the operator must allow it"
    )
    stop: Annotated[list[str], AtMost("max_stop", "strings"), BeforeValidator(_as_list)] = []
    stop_token_ids: Annotated[list[int], AtMost(1024, "ids")] = Field([], max_length=1024)
    include_stop_str_in_output: bool = Field(
        False, description="Whether an answer keeps the string of `stop` or the token of `stop_token_ids` that ended it"
    )
    allowed_token_ids: AllowedIds = Field(
        [], max_length=MAX_ALLOWED_IDS, description="No other token is generated, also none that ends the answer"
    )
    bad_words: BadWords = Field(
        [],
        max_length=MAX_BAD_WORDS,
        description="Texts whose tokens are not generated, at the beginning of a word or not",
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Keeps so many of the last tokens of each prompt; -1: as many as leave room to answer"
    )
    skip_special_tokens: bool = Field(True, description="false: the text shows special tokens")
    spaces_between_special_tokens: Literal[True] = Field(True, description="Nothing changes: none are added or removed")
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logit_bias: Annotated[dict[str, Bias], AtMost("max_logit_bias")] = {}
    stream: bool = False
    user: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = Field(None, description="A JSON schema; vLLM's older name")
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = Field(None, description="Lark, or EBNF as llama.cpp writes it")
    guided_whitespace_pattern: str | None = Field(None, description="A regex of the white space that JSON may have")
    regex: str | None = Field(None, description="SGLang's name of guided_regex")
    ebnf: str | None = Field(None, description="SGLang's name of guided_grammar")
    json_schema: SchemaOrText | None = Field(None, description="SGLang's and llama.cpp's name of guided_json")
    grammar: str | None = Field(None, description="llama.cpp's name of guided_grammar")
    format: SchemaOrText | None = Field(None, description='Ollama\'s name: "json", or a JSON schema')


class GenerationBody(SampledBody):
    """The further fields that completions and chat share."""

    max_tokens: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(
        None, ge=0, description="Also gives log-probabilities of the prompt's tokens, with so many alternatives of each"
    )
    n: int = Field(1, ge=1)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def answer_limit(self) -> int | None:
        """The most tokens of an answer, under whichever name the client set it."""
        return self.max_tokens

    @property
    def default_limit(self) -> int | None:
        """The same where the client set none; where the context has less room, that much. None: all the room."""
        return None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token are listed; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """How many answers to each prompt are generated."""
        return self.n


def validate(
    kind: type[BodyModel],
    raw: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    settings: Settings | None = None,
) -> BodyModel:
    """The typed body. Without `settings`, their default limits hold.

    Raises:
        InvalidRequest: names the first field at fault, its value and what is wrong with it.
    """
    given = {**defaults, **{key: value for key, value in raw.items() if value is not None}}
    try:
        return kind.model_validate(given, context=settings)
    except ValidationError as error:
        raise _refusal(error) from None


def refuse_unsupported(kind: type[SampledBody], raw: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where a field that is not supported asks for something."""
    for field, harmless in kind.unsupported.items():
        value = raw.get(field)
        neutral = NEUTRAL if field not in ZERO_IS_A_VALUE else (None, False)
        if not any(type(value) is type(ok) and value == ok for ok in (*neutral, *harmless)):
            raise InvalidRequest(f"{field} is not supported yet", field, "unsupported_parameter")


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's errors, with the path to its field as JSON writes it."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = _path(first["loc"])
    if first["type"] in (TOO_MANY, BAD_JSON):
        verb = "must be " if first["type"] == TOO_MANY else ""
        return InvalidRequest(f"{field[:128]} {verb}{first['msg']}", field[:128])
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"{field[:128]}: {first['msg'][:256]}{got}"
    return InvalidRequest(message, field[:128], code)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from a location of pydantic's."""
    path = str(location[0])
    for part in location[1:]:
        if not _names_a_branch(part):
            path += f"[{part}]" if str(part).isdecimal() else f".{part}"
    return path


def _names_a_branch(part: int | str) -> bool:
    """Whether pydantic added this part, which names a branch of a union, to the path that the client wrote."""
    if part in UNION_TAGS:
        return True
    return isinstance(part, str) and (part.startswith(("list[", "literal[")) or part[:1].isupper())
