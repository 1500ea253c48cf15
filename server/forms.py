"""How the answers of one call are to be read, and what they must match: dialect, tools and constraint put together.

It knows bodies and dialects, no tokens and no engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.errors import InvalidRequest, shown
from server.asked import RESPONSE_FORMAT
from server.bodies.base import GenerationBody
from server.bodies.chat import ChatBody, ChosenTool
from server.closed_schemas import TooEntangled
from server.dialects.plain import Plain
from server.dialects.seam import Dialect, Reader, Tool
from server.structured import Constraint, constraint_of

PLAIN: Dialect = Plain({})
NO_SCHEMA: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Form:
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


def form_of_completion(body: GenerationBody, limit: int, close: bool) -> Form:
    """A completion's text is all content. `limit`: bytes of what a grammar is written from; `close`: the objects of
    schemas."""
    constraint = constraint_of(body, limit, close)
    if constraint is None:
        return Form(PLAIN)
    grammar = constraint.grammar(PLAIN.answers("", constraint.rules))
    return Form(PLAIN, grammar=_bounded(grammar, constraint.field, limit), field=constraint.field)


def form_of_chat(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> Form:
    """`prompt` is the rendered template.

    Raises:
        InvalidRequest: the constraint or a tool makes no grammar, or one that is too long.
    """
    try:
        return _form_of_chat(body, dialect, prompt, limit, close)
    except TooEntangled as error:
        raise InvalidRequest(f"tools: parameters cannot be closed: {error}", "tools") from None


def _form_of_chat(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> Form:
    tools = tuple(replace(tool, closed=close) for tool in offered(body))
    constraint = constraint_of(body, limit, close)
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, ChosenTool)
    if forced:
        _check_waits(constraint)
        several = body.parallel_tool_calls and not isinstance(body.tool_choice, ChosenTool)  # who names one gets one
        field, grammar = "tools", dialect.calls(prompt, _callable(body, tools), several)
    elif constraint is not None and tools:
        field, grammar = constraint.field, _either(dialect, prompt, tools, constraint, body.parallel_tool_calls)
    elif constraint is not None:
        field, grammar = constraint.field, constraint.grammar(dialect.answers(prompt, constraint.rules))
    else:
        field, grammar = "", ""
    single = not body.parallel_tool_calls and not grammar
    return Form(
        dialect, tools, prompt, _bounded(grammar, field, limit), field, reads=True, forced=forced, single=single
    )


def _check_waits(constraint: Constraint | None) -> None:
    """A response format describes the turn that answers, and waits for it where a call is forced. Other constraints
    describe this answer.

    Raises:
        InvalidRequest: `constraint` cannot wait.
    """
    if constraint is not None and constraint.field != RESPONSE_FORMAT:
        raise InvalidRequest(f"{constraint.field} cannot hold where tool_choice forces a call", constraint.field)


def _bounded(grammar: str, field: str, limit: int) -> str:
    """A grammar that is written out may be longer than what it was written from, but not by much."""
    if len(grammar) > 2 * limit:
        raise InvalidRequest(f"{field} makes a grammar of {len(grammar)} bytes; at most {2 * limit}", field)
    return grammar


def offered(body: ChatBody) -> tuple[Tool, ...]:
    """The tools that the model hears of: none where it shall not call any.

    Raises:
        InvalidRequest: the chosen tool is not among them, or two have one name.
    """
    tools = tuple(Tool(t.function.name, t.function.parameters or NO_SCHEMA) for t in body.tools or ())
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"tools: there are two functions named {twice!r}", "tools")
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise InvalidRequest("tool_choice needs tools", "tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        known = ", ".join(names)
        raise InvalidRequest(
            f"tool_choice names {shown(choice.function.name, 128)}, which is not among tools: {known:.256}",
            "tool_choice",
        )
    return () if choice == "none" else tools


def _callable(body: ChatBody, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    choice = body.tool_choice
    return tuple(t for t in tools if t.name == choice.function.name) if isinstance(choice, ChosenTool) else tools


def _either(dialect: Dialect, prompt: str, tools: tuple[Tool, ...], constraint: Constraint, parallel: bool) -> str:
    """A call of a tool, or an answer that matches."""
    return constraint.either(dialect.answers(prompt, constraint.rules), dialect.calls(prompt, tools, parallel))
