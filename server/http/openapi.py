"""The OpenAPI document at /openapi.json: bodies and answers that FastAPI does not see, and errors.

It describes only; nothing is checked with it. `tests/server/test_schemathesis.py` compares the server with it.
"""

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response

from server.http.middleware import PROBES
from server.schemas import answers, message_object, ollama_objects, response_object
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.messages import CountBody, MessagesBody
from server.schemas.ollama import OllamaChatBody, OllamaGenerateBody, ShowBody
from server.schemas.responses import ResponsesBody
from server.schemas.tokens import DetokenizeBody, TokenizeBody
from weights.calibration import Calibration

PATH = "/openapi.json"
REF = "#/components/schemas/{model}"
HEADER = {
    "name": "X-Num-Experts",
    "in": "header",
    "required": False,
    "description": "Experts per token, for those who can set no field; body, model alias and header must agree",
    "schema": {"type": "integer", "minimum": 1},
}
FORMAT = {
    "name": "format",
    "in": "query",
    "required": False,
    "description": "svg: a picture of quality against speed. By default JSON, unless Accept asks for SVG",
    "schema": {"type": "string", "enum": ["json", "svg"]},
}
# by path: body, answer, event of a stream
ModelType = type[BaseModel]
POSTS: dict[str, tuple[ModelType, ModelType, ModelType | None]] = {
    "/v1/completions": (CompletionBody, answers.Completion, answers.Completion),
    "/v1/chat/completions": (ChatBody, answers.ChatCompletion, answers.ChatChunk),
    "/v1/responses": (ResponsesBody, response_object.ResponseObject, response_object.ResponseEvent),
    "/v1/messages": (MessagesBody, message_object.MessageObject, message_object.MessageEvent),
    "/v1/messages/count_tokens": (CountBody, message_object.TokenCount, None),
    "/api/chat": (OllamaChatBody, ollama_objects.OllamaChatAnswer, ollama_objects.OllamaChatAnswer),
    "/api/generate": (OllamaGenerateBody, ollama_objects.OllamaGenerateAnswer, ollama_objects.OllamaGenerateAnswer),
    "/api/show": (ShowBody, ollama_objects.OllamaShown, None),
    "/tokenize": (TokenizeBody, answers.Tokenized, None),
    "/detokenize": (DetokenizeBody, answers.Detokenized, None),
}
ERRORS: dict[str, ModelType] = {  # by path; of all others it is OpenAI's
    "/v1/messages": message_object.MessagesError,
    "/v1/messages/count_tokens": message_object.MessagesError,
    "/api/chat": ollama_objects.OllamaError,
    "/api/generate": ollama_objects.OllamaError,
    "/api/show": ollama_objects.OllamaError,
    "/api/tags": ollama_objects.OllamaError,
    "/api/ps": ollama_objects.OllamaError,
    "/api/version": ollama_objects.OllamaError,
}
LINES = ("/api/chat", "/api/generate")  # whose streams are lines of JSON
GETS: dict[str, type[BaseModel]] = {
    "/v1/models": answers.Models,
    "/v1/models/{model_id}": answers.Model,
    "/tokenizer_info": answers.TokenizerInfo,
    "/api/tags": ollama_objects.OllamaModels,
    "/api/ps": ollama_objects.OllamaModels,
    "/api/version": ollama_objects.OllamaVersion,
}
SECURITY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "Where the server has keys"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, elsewhere"},
}
EXAMPLES: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {
        "two experts": {"value": {"prompt": "Once upon a time", "max_tokens": 64, "num_experts": 2}},
        "eight in the prompt, two in the answer": {
            "value": {"prompt": "Once upon a time", "max_tokens": 64, "experts": {"prefill": 8, "decode": 2}}
        },
        "the cheapest that is good enough": {
            "value": {"prompt": "Once upon a time", "experts": {"auto": {"min_quality": 0.98}}}
        },
        "an alias": {"value": {"model": "infinity-stories@k2", "prompt": "Once upon a time", "seed": 7}},
        "a score": {"value": {"prompt": [[1, 2, 3]], "max_tokens": 0, "echo": True, "logprobs": 1}},
    },
    "/v1/chat/completions": {
        "a count per layer": {
            "value": {
                "messages": [{"role": "user", "content": "Tell me a story."}],
                "experts": {"count": [4, 4, 2, 2, 1, 1]},
            }
        },
        "some of the tools": {
            "value": {
                "messages": [{"role": "user", "content": "Draw a cat."}],
                "tools": [{"type": "function", "function": {"name": name}} for name in ("draw", "sleep")],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "draw"}}],
                    },
                },
            }
        },
        "a schema": {
            "value": {
                "messages": [{"role": "user", "content": "How old is the cat?"}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "cat",
                        "schema": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
                    },
                },
            }
        },
    },
}


def install(app: FastAPI) -> None:
    """Let the app serve this document. It is made when it is first asked for, in a thread: that takes a while."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    async def document() -> Response:
        return JSONResponse(await asyncio.to_thread(openapi))

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_api_route(PATH, document, include_in_schema=False)


def describe(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, completed with what it cannot know."""
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    refs, schemas = _schemas()
    document["components"] = {"schemas": dict(schemas), "securitySchemes": SECURITY_SCHEMES}
    if app.state.service.keys:
        _require_keys(document)
    for path, (body, answer, event) in POSTS.items():
        operation = document["paths"][path]["post"]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": refs[body, "validation"]}},
        }
        if path in EXAMPLES:
            operation["requestBody"]["content"]["application/json"]["examples"] = EXAMPLES[path]
        if event is not None:
            operation["parameters"] = [HEADER]
        operation["responses"] = _responses(refs, path, answer, event)
    for path, answer in GETS.items():
        document["paths"][path]["get"]["responses"] = _responses(refs, path, answer, None)
    _describe_calibration(document, refs)
    return document


def _describe_calibration(document: dict[str, Any], refs: Mapping[Any, dict[str, Any]]) -> None:
    """Add the answer of /calibration, whose form is the file's own: a struct of msgspec, which pydantic cannot read."""
    (schema,), parts = msgspec.json.schema_components([Calibration], ref_template=REF.format(model="{name}"))
    document["components"]["schemas"] |= parts
    content = {"application/json": {"schema": schema}, "image/svg+xml": {"schema": {"type": "string"}}}
    operation = document["paths"]["/calibration"]["get"]
    operation["responses"] = _or_error(refs, "The calibration, or a picture of it", content)
    operation["parameters"] = [FORMAT]


@cache
def _schemas() -> tuple[Mapping[Any, dict[str, Any]], Mapping[str, Any]]:
    """References to the schemas of bodies and answers, and the schemas by name."""
    refs, schemas = models_json_schema(_models(), ref_template=REF)  # type: ignore[arg-type]
    return refs, schemas["$defs"]


def _models() -> list[tuple[type[BaseModel], str]]:
    """Every body and answer, and how its schema is meant; each once, in a fixed order."""
    written: list[type[BaseModel]] = []
    for _, answer, event in POSTS.values():
        written += [answer] if event is None else [answer, event]
    models: list[tuple[type[BaseModel], str]] = []
    models += [(body, "validation") for body, _, _ in POSTS.values()]
    written += [*GETS.values(), answers.Error, *ERRORS.values()]
    models += [(model, "serialization") for model in written]
    return list(dict.fromkeys(models))


def _require_keys(document: dict[str, Any]) -> None:
    """Require a key, sent in one of two ways, for every operation except the open ones."""
    document["security"] = [{"key": []}, {"x-api-key": []}]
    for path in PROBES:
        document["paths"][path]["get"]["security"] = []


DESCRIPTION = """OpenAI's API, and Anthropic's and Ollama's, over one mixture-of-experts model. Every request may say
how many experts its tokens use: `num_experts` in the body, a model alias such as `NAME@k2`, or the header
`X-Num-Experts`."""


def _responses(
    refs: Mapping[Any, dict[str, Any]], path: str, answer: ModelType, event: ModelType | None
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": refs[answer, "serialization"]}}
    if event is not None:
        type, parts = "text/event-stream", "Events whose data is"
        if path in LINES:
            type, parts = "application/x-ndjson", "Lines, each of which is"
        content[type] = {"schema": {"type": "string", "description": f"{parts} a {event.__name__}"}}
    return _or_error(refs, "The answer", content, ERRORS.get(path, answers.Error))


def _or_error(
    refs: Mapping[Any, dict[str, Any]],
    description: str,
    content: dict[str, Any],
    error: ModelType = answers.Error,
) -> dict[str, Any]:
    refusal = {"application/json": {"schema": refs[error, "serialization"]}}
    return {
        "200": {"description": description, "content": content},
        "default": {"description": "A refusal or a failure", "content": refusal},
    }
