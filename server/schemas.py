"""The bodies of completions and chat: types and fixed ranges. Unknown keys pass; fields of later releases do not.

Limits that an operator can set are in `server/limits.py`; the expert fields are in `server/experts.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from model.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)
NEUTRAL = (None, False, 0, "", "auto", "none")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class GenerationBody(BaseModel):
    """What completions and chat have in common. An explicit null means the default."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    # fields of OpenAI's or vLLM's API that must not be ignored while they are not supported; the values ask nothing
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "prompt_logprobs": (),
        "use_beam_search": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
        "include_stop_str_in_output": (),
        "response_format": ({"type": "text"},),
        "truncate_prompt_tokens": (),
        "prompt_embeds": (),
        "logits_processors": ([],),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
    }

    model: str | None = None
    num_experts: Any = Field(None, json_schema_extra={"type": "integer", "minimum": 1})
    experts: Any = Field(None, json_schema_extra={"type": "object"})
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    stop_token_ids: list[int] = Field([], max_length=1024)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives per token are listed; None: no log-probabilities at all."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**GenerationBody.unsupported, "suffix": ()}

    prompt: Any = Field(..., json_schema_extra={"type": ["string", "array"]})
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """For the template: one string; "developer" is OpenAI's newer word for "system"."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TemplateBody(BaseModel):
    """What a request may ask of the chat template; its variables only by names that the operator allows."""

    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class ChatBody(GenerationBody, TemplateBody):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.unsupported,
        "tools": ([],),
        "functions": ([],),
        "tool_choice": (),
        "function_call": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "chat_template": (),
        "continue_final_message": (),
        "echo": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(TemplateBody):
    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    tokens: list[int] = Field(max_length=1_000_000)


def validate(kind: type[Body], raw: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> Body:
    """The typed body, or one refusal that names field, value and what is wrong with it."""
    try:
        return kind.model_validate({**defaults, **{key: value for key, value in raw.items() if value is not None}})
    except ValidationError as error:
        raise _refusal(error) from None


def refuse_unsupported(kind: type[GenerationBody], raw: Mapping[str, Any]) -> None:
    for field, harmless in kind.unsupported.items():
        value = raw.get(field)
        if not any(type(value) is type(ok) and value == ok for ok in (*NEUTRAL, *harmless)):
            raise InvalidRequest(f"{field} is not supported yet", field, "unsupported_parameter")


def unknown_fields(kind: type[GenerationBody], raw: Mapping[str, Any]) -> list[str]:
    return [key for key in raw if key not in kind.model_fields and key not in kind.unsupported and key != "extra_body"]


def _refusal(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"] if not _names_a_type(part)]
    field = path[0] + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path[1:])
    got = "" if first["type"] == "missing" else f", got {first['input']!r:.64}"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return InvalidRequest(f"{field[:128]}: {first['msg'][:256]}{got}", field[:128], code)


def _names_a_type(part: int | str) -> bool:
    """pydantic adds the branch of a union to the path; a caller did not write it."""
    return part == "str" or (isinstance(part, str) and part.startswith("list["))
