"""What an answer must match, as one grammar, which the engine compiles.

It writes grammars and checks their size; whether one makes sense, the grammar library says in the engine.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import grammar_from, regex_to_lark

from model.errors import InvalidRequest, shown
from server.dialects.closed_schemas import SchemaTooComplex, closed
from server.requests.output_fields import ConstraintField, closing_of, constraint_fields, whitespace_of
from server.schemas.base import GenerationBody

# Without these, a grammar allows white space without end, and small models write just that.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ALL, ANSWERS, CALLS, OWN = "moe_all", "moe_answers", "moe_calls", "moe_own"  # grammars beside each other


@dataclass(frozen=True, slots=True)
class Constraint:
    """`rules` is Lark that defines `answer`; `own` is a caller's whole grammar, to which they refer."""

    field: str
    rules: str
    own: str = ""

    def grammar(self, answers: str) -> str:
        """As one text for the engine; `answers` is Lark that includes the rules."""
        return self._together(answers) if self.own else answers

    def either(self, answers: str, calls: str) -> str:
        """What matches, or `calls`, which is Lark of its own."""
        return self._together(f"start: @{ANSWERS} | @{CALLS}\n", **{ANSWERS: answers, CALLS: calls})

    def _together(self, start: str, **others: str) -> str:
        parts = {ALL: start} | others | ({OWN: self.own} if self.own else {})
        return json.dumps({"grammars": [{"name": name, "lark_grammar": text} for name, text in parts.items()]})


def constraint_of(body: GenerationBody, limit: int, close: bool) -> Constraint | None:
    """The one constraint that a body asks for; with `close`, objects of schemas are closed where these are silent.

    Raises:
        InvalidRequest: there are two, one is larger than `limit` bytes, or empty.
    """
    asked, whitespace = constraint_fields(body), whitespace_of(body)
    if len(asked) > 1:
        one, other = asked[0].field, asked[1].field
        raise InvalidRequest(f"{other} and {one} both say what the answer must match; give one", other)
    if whitespace is not None and not (asked and asked[0].kind == "schema"):
        raise InvalidRequest(f"{whitespace[0]} needs a JSON schema beside it", whitespace[0])
    if not asked:
        return None
    (one_asked,) = asked
    _check_size(one_asked, limit)
    if one_asked.kind == "schema":
        written = COMPACT if whitespace is None else {"whitespace_pattern": whitespace[1]}
        return _schema(one_asked, written, close if (own := closing_of(body)) is None else own)
    return WRITERS[one_asked.kind](one_asked.field, one_asked.value)


def _check_size(asked: ConstraintField, limit: int) -> None:
    text = asked.value if isinstance(asked.value, str) else json.dumps(asked.value)
    if (size := len(text.encode("utf-8", "replace"))) > limit:
        raise InvalidRequest(f"{asked.field} must be at most {limit} bytes, got {size}", asked.field)


def json_rule(schema: Any, writing: Mapping[str, Any] = COMPACT) -> str:
    """A schema as a term of Lark; `writing` says which white space there is, where the schema does not."""
    if isinstance(schema, dict):
        options = schema.get("x-guidance")
        schema = {**schema, "x-guidance": {**writing, **(options if isinstance(options, dict) else {})}}
    return f"%json {json.dumps(schema)}"


def _schema(asked: ConstraintField, writing: Mapping[str, Any], close: bool) -> Constraint:
    field, value = asked.field, asked.value
    if isinstance(value, str):
        try:
            value = json.loads(value)  # its depth was seen to with the body's
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
    """A caller's grammar keeps its own names: it stands apart and is referred to."""
    try:
        lark = grammar_from("grammar", value)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error!s:.200}", field) from None
    if "@moe_" in lark:
        raise InvalidRequest(f"{field}: @moe_… are names of the server's own", field)
    return Constraint(field, f"answer: @{OWN}\n", lark)


WRITERS: Mapping[str, Callable[[str, Any], Constraint]] = {"regex": _regex, "choice": _choice, "grammar": _own}
