"""How the answers of one call are to be read, and what they must match: dialect, tools and constraint put together.

It knows bodies and dialects, no tokens and no engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.errors import InvalidRequest
from server.dialects.base import Dialect, Reader, Tool
from server.dialects.closed_schemas import TooEntangled
from server.dialects.plain import Plain
from server.requests.output_fields import RESPONSE_FORMAT
from server.requests.structured import Constraint, constraint_of
from server.requests.tool_choice import check_choice, choice_of
from server.schemas.base import GenerationBody
from server.schemas.chat import ChatBody

PLAIN: Dialect = Plain({})
NO_SCHEMA: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """`grammar`: what the engine holds answers to; `field`: where in the body it came from."""

    dialect: Dialect
    tools: tuple[Tool, ...] = ()
    prompt: str = ""
    grammar: str = ""
    field: str = ""
    reads: bool = False  # whether answers are more than their text
    forced: bool = False  # whether answers are calls and nothing else: what is no call is a mark that was cut off
    single: bool = False  # whether the first call ends an answer that no grammar holds

    def reader(self) -> Reader | None:
        return self.dialect.reader(self.prompt, self.tools, self.single) if self.reads else None


def completion_output_spec(body: GenerationBody, limit: int, close: bool) -> OutputSpec:
    """A completion's text is all content. `limit`: bytes of what a grammar is written from; `close`: the objects of
    schemas."""
    constraint = constraint_of(body, limit, close)
    if constraint is None:
        return OutputSpec(PLAIN)
    grammar = constraint.grammar(PLAIN.answers("", constraint.rules))
    _check_length(grammar, constraint.field, limit)
    return OutputSpec(PLAIN, grammar=grammar, field=constraint.field)


def chat_output_spec(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> OutputSpec:
    """`prompt` is the rendered template.

    Raises:
        InvalidRequest: the constraint or a tool makes no grammar, or one that is too long.
    """
    try:
        return _chat_output_spec(body, dialect, prompt, limit, close)
    except TooEntangled as error:
        raise InvalidRequest(f"tools: parameters cannot be closed: {error}", "tools") from None


def _chat_output_spec(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> OutputSpec:
    told = tuple(replace(tool, closed=close) for tool in offered_tools(body))
    choice, constraint = choice_of(body), constraint_of(body, limit, close)
    tools = tuple(tool for tool in told if choice.names is None or tool.name in choice.names)
    if choice.forced:
        _check_waits(constraint)
        field, grammar = "tools", dialect.calls(prompt, tools, not choice.one)
    elif constraint is not None and tools:
        field, grammar = constraint.field, _either(dialect, prompt, tools, constraint, not choice.one)
    elif constraint is not None:
        field, grammar = constraint.field, constraint.grammar(dialect.answers(prompt, constraint.rules))
    elif len(tools) < len(told):  # who may call some of them cannot be left free to call any
        field, grammar = "tools", _either(dialect, prompt, tools, Constraint("tools", dialect.free()), not choice.one)
    else:
        field, grammar = "", ""
    _check_length(grammar, field, limit)
    single = choice.one and not grammar
    return OutputSpec(dialect, tools, prompt, grammar, field, reads=True, forced=choice.forced, single=single)


def _check_waits(constraint: Constraint | None) -> None:
    """A response format describes the turn that answers, and waits for it where a call is forced. Other constraints
    describe this answer.

    Raises:
        InvalidRequest: `constraint` cannot wait.
    """
    if constraint is not None and constraint.field != RESPONSE_FORMAT:
        raise InvalidRequest(f"{constraint.field} cannot hold where tool_choice forces a call", constraint.field)


def _check_length(grammar: str, field: str, limit: int) -> None:
    """A grammar that is written out may be longer than what it was written from, but not by much."""
    if len(grammar) > 2 * limit:
        raise InvalidRequest(f"{field} makes a grammar of {len(grammar)} bytes; at most {2 * limit}", field)


def offered_tools(body: ChatBody) -> tuple[Tool, ...]:
    """The tools that the model hears of: none where it shall not call any.

    Raises:
        InvalidRequest: the chosen tool is not among them, or two have one name.
    """
    tools = tuple(Tool(t.function.name, t.function.parameters or NO_SCHEMA) for t in body.tools or ())
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"tools: there are two functions named {twice!r}", "tools")
    check_choice(body, names)
    return () if body.tool_choice == "none" else tools


def _either(dialect: Dialect, prompt: str, tools: tuple[Tool, ...], constraint: Constraint, parallel: bool) -> str:
    """A call of a tool, or an answer that matches."""
    return constraint.either(dialect.answers(prompt, constraint.rules), dialect.calls(prompt, tools, parallel))
