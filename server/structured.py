"""What an answer must match: from `response_format` and vLLM's names to one grammar, which the engine compiles.

It writes grammars and checks their size; whether one makes sense, the grammar library says in the engine.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llguidance import grammar_from, regex_to_lark

from model.errors import InvalidRequest, shown
from server.bodies.base import GenerationBody

# Without these, a grammar allows white space without end, and small models write just that.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
OBJECT = {"type": "object"}
RESPONSE_FORMAT = "response_format"
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


def constraint_of(body: GenerationBody, limit: int) -> Constraint | None:
    """The one constraint that a body asks for.

    Raises:
        InvalidRequest: there are two, one is larger than `limit` bytes, or empty.
    """
    asked = [(field, write, value) for field, write, value in _asks(body) if value is not None]
    if not asked:
        return None
    field, write, value = asked[0]
    if len(asked) > 1:
        raise InvalidRequest(f"{asked[1][0]} and {field} both say what the answer must match; give one", asked[1][0])
    size = len((value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "replace"))
    if size > limit:
        raise InvalidRequest(f"{field} must be at most {limit} bytes, got {size}", field)
    return write(field, value)


def _asks(body: GenerationBody) -> list[tuple[str, Callable[[str, Any], Constraint], Any]]:
    new = body.structured_outputs
    asks: list[tuple[str, Callable[[str, Any], Constraint], Any]] = [
        (RESPONSE_FORMAT, _schema, _schema_of_format(body)),
        ("guided_json", _schema, body.guided_json),
        ("guided_regex", _regex, body.guided_regex),
        ("guided_choice", _choice, body.guided_choice),
        ("guided_grammar", _own, body.guided_grammar),
    ]
    if new is not None:
        given = [
            ("structured_outputs", _schema, new.json_),
            ("structured_outputs", _regex, new.regex),
            ("structured_outputs", _choice, new.choice),
            ("structured_outputs", _own, new.grammar),
            ("structured_outputs", _schema, OBJECT if new.json_object else None),
        ]
        if all(value is None for _, _, value in given):
            names = "json, regex, choice, grammar and json_object"
            raise InvalidRequest(f"structured_outputs needs one of {names}", "structured_outputs")
        asks += given
    return asks


def _schema_of_format(body: GenerationBody) -> Any:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return OBJECT
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema is missing", "response_format.json_schema")
    return wanted.json_schema.schema_


def json_rule(schema: Any) -> str:
    """A schema as a term of Lark."""
    if isinstance(schema, dict):
        options = schema.get("x-guidance")
        schema = {**schema, "x-guidance": COMPACT | (options if isinstance(options, dict) else {})}
    return f"%json {json.dumps(schema)}"


def _schema(field: str, value: Any) -> Constraint:
    if isinstance(value, str):
        try:
            value = json.loads(value)  # its depth was seen to with the body's
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{field} is a text, but no JSON: {shown(value)}", field) from None
    if not isinstance(value, dict | bool):
        raise InvalidRequest(f"{field} must be a JSON schema, got {shown(value)}", field)
    return Constraint(field, f"answer: {json_rule({} if value is True else value)}\n")


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
