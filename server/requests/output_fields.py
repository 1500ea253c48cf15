"""Which fields of a body constrain the answer: names of OpenAI, vLLM, SGLang, llama.cpp and Ollama for the same things.

Not here: the grammar that they become (see `server/requests/structured.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from model.errors import InvalidRequest, shown
from server.schemas.base import GenerationBody, ResponseFormat, StructuredOutputs

ConstraintKind = Literal["schema", "regex", "choice", "grammar"]
OBJECT = {"type": "object"}
RESPONSE_FORMAT = "response_format"
FIELDS: tuple[tuple[str, ConstraintKind], ...] = (
    ("guided_json", "schema"),
    ("json_schema", "schema"),
    ("guided_regex", "regex"),
    ("regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("grammar", "grammar"),
    ("ebnf", "grammar"),
)
EMPTY_IS_NONE = ("grammar", "format")  # clients of llama.cpp and Ollama send an empty text for none


@dataclass(frozen=True, slots=True)
class ConstraintField:
    """One constraint as the body gives it."""

    field: str
    kind: ConstraintKind
    value: Any


def constraint_fields(body: GenerationBody) -> list[ConstraintField]:
    """The constraints of a body.

    Raises:
        InvalidRequest: a field announces a constraint and does not give it.
    """
    found = [*_of_response_format(body.response_format), *_of_ollama(body.format)]
    found += [ConstraintField(field, kind, getattr(body, field)) for field, kind in FIELDS]
    found += _of_structured_outputs(body.structured_outputs)
    return [field for field in found if field.value is not None and not _is_none(field)]


def whitespace_pattern_of(body: GenerationBody) -> tuple[str, str] | None:
    """The field that sets the white space of JSON, and its pattern."""
    if body.guided_whitespace_pattern is not None:
        return "guided_whitespace_pattern", body.guided_whitespace_pattern
    new = body.structured_outputs
    if new is not None and new.whitespace_pattern is not None:
        return "structured_outputs.whitespace_pattern", new.whitespace_pattern
    return None


def objects_closed(body: GenerationBody) -> bool | None:
    """Whether the body itself sets schemas to be closed or open; None where it does not."""
    new = body.structured_outputs
    return None if new is None else new.disable_additional_properties


def _is_none(field: ConstraintField) -> bool:
    return field.field in EMPTY_IS_NONE and field.value == ""


def _of_response_format(wanted: ResponseFormat | None) -> Iterator[ConstraintField]:
    """The schema of a response format: in `json_schema`, or beside the type, as llama.cpp has it."""
    if wanted is None:
        return
    given = {
        "response_format.json_schema": wanted.json_schema and wanted.json_schema.schema_,
        "response_format.schema": wanted.schema_,
    }
    fields = [field for field, schema in given.items() if schema is not None]
    if len(fields) > 1:
        raise InvalidRequest(f"{fields[1]} and {fields[0]} both give a schema; give one", fields[1])
    if wanted.type == "json_schema" and not fields:
        raise InvalidRequest("response_format.json_schema is missing", "response_format.json_schema")
    if fields and (wanted.type == "text" or (wanted.type == "json_object" and wanted.json_schema is not None)):
        raise InvalidRequest(f'{fields[0]} needs type "json_schema", got {shown(wanted.type)}', fields[0])
    schema = given[fields[0]] if fields else OBJECT
    if wanted.type == "json_object" and schema in ({}, True):  # allows anything, so that only the type counts
        schema = OBJECT
    if wanted.type != "text":
        yield ConstraintField(RESPONSE_FORMAT, "schema", schema)


def _of_ollama(wanted: Any) -> Iterator[ConstraintField]:
    if isinstance(wanted, str) and wanted not in ("", "json"):
        raise InvalidRequest(f'format must be "json" or a JSON schema, got {shown(wanted)}', "format")
    yield ConstraintField("format", "schema", OBJECT if wanted == "json" else wanted)


def _of_structured_outputs(new: StructuredOutputs | None) -> list[ConstraintField]:
    if new is None:
        return []
    given: dict[str, tuple[ConstraintKind, Any]] = {
        "json": ("schema", new.json_),
        "regex": ("regex", new.regex),
        "choice": ("choice", new.choice),
        "grammar": ("grammar", new.grammar),
        "json_object": ("schema", OBJECT if new.json_object else None),
    }
    names = [name for name, (_, value) in given.items() if value is not None]
    if len(names) != 1:
        got = f", got {' and '.join(names)}" if names else ""
        raise InvalidRequest(
            f"structured_outputs needs one of json, regex, choice, grammar and json_object{got}", "structured_outputs"
        )
    return [ConstraintField("structured_outputs", *given[names[0]])]
