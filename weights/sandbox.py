"""The Jinja environment of chat templates: what transformers offers them, in an immutable sandbox, operators bounded.

It reads no files and knows no checkpoint and no message.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weights.special_tokens import MARK

MAX_REPEATED = 65_536  # characters of text * number


class Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses the operators that build huge values from small ones."""

    intercepted_binops = frozenset(["%", "*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not (numbers or (operator == "*" and _short(left, right))):
            raise SecurityError(f"operator {operator} is allowed on numbers and short texts only, ** not at all")
        return super().call_binop(context, operator, left, right)


def _short(left: Any, right: Any) -> bool:
    text, count = (left, right) if isinstance(left, str) else (right, left)
    return isinstance(text, str) and isinstance(count, int) and len(text) * count <= MAX_REPEATED


class Generation(Extension):
    """`{% generation %}` tells trainers which text is the assistant's; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)  # as in transformers, what is set inside is not seen outside


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(json.dumps(MARK)[1:-1], MARK) if ensure_ascii else text


def environment() -> Sandbox:
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    made.filters["tojson"] = _tojson
    return made


def literals(source: str) -> str:
    """Every text that a template itself can write, joined by a character that is in no token.

    Raises:
        TemplateError: it cannot be parsed.
    """
    tree = environment().parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def read_names(source: str) -> frozenset[str]:
    """The variables that a template reads from its caller.

    Raises:
        TemplateError: it cannot be parsed.
    """
    return frozenset(meta.find_undeclared_variables(environment().parse(source)))
