"""Reads `tool_choice`: which of the tools may be called, and whether a call must be made."""

from dataclasses import dataclass

from model.errors import InvalidRequest, shown
from server.schemas.chat import AllowedTools, ChatBody, ChosenTool


@dataclass(frozen=True, slots=True)
class CallChoice:
    """Which calls an answer may have."""

    names: tuple[str, ...] | None = None  # of the tools that may be called; None: all
    forced: bool = False  # whether the answer must be a call
    one: bool = False  # whether there is at most one call


def choice_of(body: ChatBody) -> CallChoice:
    """The choice of a body whose `tool_choice` is not `none`."""
    match body.tool_choice:
        case ChosenTool(function=function):  # naming a tool asks for one call
            return CallChoice((function.name,), True, True)
        case AllowedTools(allowed_tools=allowed):
            names = tuple(tool.function.name for tool in allowed.tools)
            return CallChoice(names, allowed.mode == "required", not body.parallel_tool_calls)
        case choice:
            return CallChoice(None, choice == "required", not body.parallel_tool_calls)


def check_choice(body: ChatBody, known: list[str]) -> None:
    """Raises InvalidRequest where the choice needs a tool that is not among the `known` ones."""
    if body.tool_choice in (None, "none", "auto"):
        return
    if not known:
        raise InvalidRequest("tool_choice needs tools", "tool_choice")
    for name in choice_of(body).names or ():
        if name not in known:
            raise InvalidRequest(
                f"tool_choice names {shown(name, 128)}, which is not among tools: {', '.join(known):.256}",
                "tool_choice",
            )
