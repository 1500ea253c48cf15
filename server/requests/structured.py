"""Writes what an answer must match as one grammar, which the engine compiles.

It checks sizes; whether a grammar makes sense is for the grammar library in the engine to say.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import grammar_from, regex_to_lark

from model.errors import InvalidRequest, shown
from server.dialects.closed_schemas import SchemaTooComplex, closed
from server.requests.output_fields import ConstraintField, constraint_fields, objects_closed, whitespace_pattern_of
from server.schemas.base import GenerationBody

# Without these a grammar allows white space without end, which small models then write.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ALL, ANSWERS, CALLS, OWN = "moe_all", "moe_answers", "moe_calls", "moe_own"  # names of grammars in one text


@dataclass(frozen=True, slots=True)
class Constraint:
    """`rules` is Lark that defines `answer`; `own` is a client's complete grammar, to which the rules refer."""

    field: str
    rules: str
    own: str = ""

    def grammar(self, answers: str) -> str:
        """The grammar as one text for the engine; `answers` is Lark that includes the rules."""
        return self._together(answers) if self.own else answers

    def either(self, answers: str, calls: str) -> str:
        """A grammar of matching answers, or of `calls`, which is Lark of its own."""
        return self._together(f"start: @{ANSWERS} | @{CALLS}\n", **{ANSWERS: answers, CALLS: calls})

    def _together(self, start: str, **others: str) -> str:
        parts = {ALL: start} | others | ({OWN: self.own} if self.own else {})
        return json.dumps({"grammars": [{"name": name, "lark_grammar": text} for name, text in parts.items()]})


def constraint_of(body: GenerationBody, limit: int, close: bool) -> Constraint | None:
    """The constraint of a body, if it has one; with `close`, objects of schemas are closed where these do not say.

    Raises:
        InvalidRequest: there are two, or one is empty or larger than `limit` bytes.
    """
    fields, whitespace = constraint_fields(body), whitespace_pattern_of(body)
    if len(fields) > 1:
        one, other = fields[0].field, fields[1].field
        raise InvalidRequest(f"{other} and {one} both say what the answer must match; give one", other)
    if whitespace is not None and not (fields and fields[0].kind == "schema"):
        raise InvalidRequest(f"{whitespace[0]} needs a JSON schema beside it", whitespace[0])
    if not fields:
        return None
    (constraint,) = fields
    _check_size(constraint, limit)
    if constraint.kind == "schema":
        written = COMPACT if whitespace is None else {"whitespace_pattern": whitespace[1]}
        own = objects_closed(body)
        return _schema(constraint, written, close if own is None else own)
    return WRITERS[constraint.kind](constraint.field, constraint.value)


def _check_size(constraint: ConstraintField, limit: int) -> None:
    text = constraint.value if isinstance(constraint.value, str) else json.dumps(constraint.value)
    if (size := len(text.encode("utf-8", "replace"))) > limit:
        raise InvalidRequest(f"{constraint.field} must be at most {limit} bytes, got {size}", constraint.field)


def json_rule(schema: Any, writing: Mapping[str, Any] = COMPACT) -> str:
    """A schema as a term of Lark; `writing` sets the white space, unless the schema does."""
    if isinstance(schema, dict):
        options = schema.get("x-guidance")
        own = options if isinstance(options, dict) else {}
        schema = {**schema, "x-guidance": {**writing, **own}}
    return f"%json {json.dumps(schema)}"


def _schema(constraint: ConstraintField, writing: Mapping[str, Any], close: bool) -> Constraint:
    field, value = constraint.field, constraint.value
    if isinstance(value, str):
        try:
            value = json.loads(value)  # its depth has been checked with the body
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{field} is a text, but no JSON: {shown(value)}", field) from None
    if not isinstance(value, dict | bool):
        raise InvalidRequest(f"{field} must be a JSON schema, got {shown(value)}", field)
    if close and isinstance(value, dict):
        try:
            value = closed(value)
        except SchemaTooComplex as error:
            raise InvalidRequest(f"{field} cannot be closed: {error}", field) from None
    return Constraint(field, f"answer: {json_rule({} if value is True else value, writing)}\n")


def _regex(field: str, value: str) -> Constraint:
    if not value:
        raise InvalidRequest(f"{field} is empty", field)
    try:
        return Constraint(field, f"answer: /{regex_to_lark(value)}/\n")
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error!s:.200}", field) from None


def _choice(field: str, value: list[str]) -> Constraint:
    if not value or not all(value):
        raise InvalidRequest(f"{field} must be a list of texts that are not empty, got {shown(value)}", field)
    return Constraint(field, "answer: " + " | ".join(map(json.dumps, value)) + "\n")


def _own(field: str, value: str) -> Constraint:
    """A client's grammar is kept apart and referred to, so that it keeps its own names."""
    try:
        lark = grammar_from("grammar", value)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error!s:.200}", field) from None
    if "@moe_" in lark:
        raise InvalidRequest(f"{field}: @moe_… are names of the server's own", field)
    return Constraint(field, f"answer: @{OWN}\n", lark)


Writer = Callable[[str, Any], Constraint]
WRITERS: Mapping[str, Writer] = {"regex": _regex, "choice": _choice, "grammar": _own}
