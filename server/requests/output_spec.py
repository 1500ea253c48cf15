"""How the answers of one call are parsed, and what they must match: its dialect, tools and constraint, put together.

It depends on bodies and dialects, not on tokens or the engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.errors import InvalidRequest
from server.dialects.base import Dialect, OutputParser, ToolSpec
from server.dialects.closed_schemas import SchemaTooComplex
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
    """What the answers of one call are."""

    dialect: Dialect
    tools: tuple[ToolSpec, ...] = ()
    prompt: str = ""
    grammar: str = ""  # which the engine makes answers match
    field: str = ""  # of the body, which the grammar came from
    parsed: bool = False  # whether answers are more than their text
    forced: bool = False  # whether answers consist of calls only, so that other text is an incomplete delimiter
    single: bool = False  # whether the first call ends an answer that no grammar bounds

    def parser(self) -> OutputParser | None:
        """A parser for one answer; None where the answer is its text."""
        return self.dialect.parser(self.prompt, self.tools, self.single) if self.parsed else None


def completion_output_spec(body: GenerationBody, limit: int, close: bool) -> OutputSpec:
    """The output spec of a completion, whose text is all content.

    `limit`: the most bytes that a grammar may be written from; `close`: whether the objects of schemas are closed.
    """
    constraint = constraint_of(body, limit, close)
    if constraint is None:
        return OutputSpec(PLAIN)
    grammar = constraint.grammar(PLAIN.answer_grammar("", constraint.rules))
    _check_length(grammar, constraint.field, limit)
    return OutputSpec(PLAIN, grammar=grammar, field=constraint.field)


def chat_output_spec(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> OutputSpec:
    """The output spec of a chat; `prompt` is the rendered template.

    Raises:
        InvalidRequest: the constraint or a tool makes no grammar, or one that is too long.
    """
    try:
        return _chat_output_spec(body, dialect, prompt, limit, close)
    except SchemaTooComplex as error:
        raise InvalidRequest(f"tools: parameters cannot be closed: {error}", "tools") from None


def _chat_output_spec(body: ChatBody, dialect: Dialect, prompt: str, limit: int, close: bool) -> OutputSpec:
    offered = tuple(replace(tool, closed=close) for tool in offered_tools(body))
    choice, constraint = choice_of(body), constraint_of(body, limit, close)
    tools = offered
    if choice.names is not None:
        tools = tuple(tool for tool in offered if tool.name in choice.names)
    if choice.forced:
        _check_can_wait(constraint)
        field, grammar = "tools", dialect.call_grammar(prompt, tools, not choice.one)
    elif constraint is None and len(tools) == len(offered):
        field = grammar = ""
    else:  # where only some tools may be called, a grammar keeps the model from the others
        constraint = constraint or Constraint("tools", dialect.free_text_rules())
        field, grammar = constraint.field, _grammar_of(dialect, prompt, tools, constraint, not choice.one)
    _check_length(grammar, field, limit)
    single = choice.one and not grammar
    return OutputSpec(dialect, tools, prompt, grammar, field, parsed=True, forced=choice.forced, single=single)


def _grammar_of(
    dialect: Dialect, prompt: str, tools: tuple[ToolSpec, ...], constraint: Constraint, parallel: bool
) -> str:
    """A grammar of answers that match the constraint, or, where there are tools, call one of them."""
    answers = dialect.answer_grammar(prompt, constraint.rules)
    if not tools:
        return constraint.grammar(answers)
    return constraint.either(answers, dialect.call_grammar(prompt, tools, parallel))


def _check_can_wait(constraint: Constraint | None) -> None:
    """Check a constraint beside a forced call.

    A response format describes the turn that answers, and waits for it. Other constraints describe this answer.

    Raises:
        InvalidRequest: `constraint` cannot wait.
    """
    if constraint is not None and constraint.field != RESPONSE_FORMAT:
        raise InvalidRequest(f"{constraint.field} cannot hold where tool_choice forces a call", constraint.field)


def _check_length(grammar: str, field: str, limit: int) -> None:
    """Raises InvalidRequest for a grammar that is more than twice as long as what it may be written from."""
    if len(grammar) > 2 * limit:
        raise InvalidRequest(f"{field} makes a grammar of {len(grammar)} bytes; at most {2 * limit}", field)


def offered_tools(body: ChatBody) -> tuple[ToolSpec, ...]:
    """The tools that the prompt tells the model of: none where it must not call any.

    Raises:
        InvalidRequest: the chosen tool is not among them, or two have the same name.
    """
    functions = [tool.function for tool in body.tools or ()]
    tools = tuple(ToolSpec(function.name, function.parameters or NO_SCHEMA) for function in functions)
    names = [tool.name for tool in tools]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise InvalidRequest(f"tools: there are two functions named {duplicate!r}", "tools")
    check_choice(body, names)
    return () if body.tool_choice == "none" else tools
