"""instructor in every mode it has for OpenAI's APIs, against a real server, unpatched."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import pytest
from instructor import Mode
from openai import OpenAI
from pydantic import BaseModel

from tests.clients.inputs import QUESTION
from tests.clients.running import MODEL

TOOLS = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS]
RESPONSES = [Mode.RESPONSES_TOOLS, Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS]
SCHEMAS = [Mode.JSON_SCHEMA, Mode.JSON_O1]
PROMPTED = [Mode.JSON, Mode.MD_JSON]


# Small and without a description: some modes write the schema into the prompt, and the context is short.
class Pet(BaseModel):
    animal: Literal["cat", "dog", "bird"]
    count: Literal[1, 2, 3]


class Nap(BaseModel):
    long: bool


# These two modes only ask for the shape in words, which a small model does not follow; a field of the server holds it.
HELD: dict[Mode, dict[str, Any]] = {
    Mode.JSON: {"response_format": {"type": "json_object", "schema": Pet.model_json_schema()}},
    Mode.MD_JSON: {"guided_regex": r'```json\n\{"animal": "(cat|dog|bird)", "count": [123]\}\n```'},
}


def client(base: str, mode: Mode) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return instructor.from_openai(OpenAI(base_url=base, api_key="unused", max_retries=0), mode=mode)


def asked(mode: Mode, **options: Any) -> dict[str, Any]:
    most = "max_output_tokens" if mode in RESPONSES else "max_tokens"
    single = {"parallel_tool_calls": False} if mode in TOOLS + RESPONSES else {}
    body = {"num_experts": 2, "seed": 1} | HELD.get(mode, {})
    values: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_retries": 0}
    values[most] = 40 if mode in PROMPTED else 80
    return values | single | {"extra_body": body, "response_model": Pet} | options


@pytest.mark.parametrize("mode", TOOLS + RESPONSES + SCHEMAS + PROMPTED)
def test_a_shape_whole_and_in_parts(base: str, mode: Mode) -> None:
    made = client(base, mode)
    whole, answer = made.chat.completions.create_with_completion(**asked(mode))
    *_, last = made.chat.completions.create_partial(**asked(mode))
    assert isinstance(whole, Pet) and last.model_dump() == whole.model_dump()
    assert answer.usage.num_experts == 2


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_an_alias(base: str, mode: Mode) -> None:
    values = asked(mode, model=f"{MODEL}@k2", extra_body={"seed": 1})
    shape, answer = client(base, mode).chat.completions.create_with_completion(**values)
    assert isinstance(shape, Pet) and answer.usage.num_experts == 2


def test_parallel_tools(base: str) -> None:
    """The mode leaves the choice to the model, which here is made to call, and to end when it may."""
    body = {"num_experts": 2, "seed": 1, "tool_choice": "required", "logit_bias": {"0": 100}}
    values = asked(Mode.PARALLEL_TOOLS, response_model=Iterable[Pet | Nap], extra_body=body, max_tokens=60)
    found = list(client(base, Mode.PARALLEL_TOOLS).chat.completions.create(**values))
    assert found and all(isinstance(call, Pet | Nap) for call in found)
