"""The prompt of a chat, as the model's chat template writes it."""

from collections.abc import Mapping
from typing import Any

from model.errors import InvalidRequest, shown
from server.protocols import ChatTemplateProtocol
from server.schemas.chat import ChatBody, Message, TemplateBody, Tool
from server.service import Service


def chat_prompt(service: Service, body: ChatBody) -> str:
    """The prompt of a chat as the chat template writes it. Call it off the event loop."""
    tools = None if body.tool_choice == "none" else body.tools
    variables = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return render(service, body, body.messages, tools, variables)


def render(
    service: Service,
    body: TemplateBody,
    messages: list[Message],
    tools: list[Tool] | None,
    variables: Mapping[str, Any],
) -> str:
    """The prompt as the chat template writes it. Call it off the event loop: a template is a checkpoint's code."""
    if service.chat is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    if tools and not service.chat.knows_tools:
        raise InvalidRequest("this model's chat template knows no tools", "tools", "unsupported_parameter")
    plain_messages = [message.for_template() for message in messages]
    plain_tools = [tool.for_template() for tool in tools] if tools else None
    named = body.chat_template_kwargs | dict(variables) | _thinking(service.chat, body)
    return service.chat.render(
        plain_messages, plain_tools, body.add_generation_prompt, named, body.continue_final_message
    )


def _thinking(chat: ChatTemplateProtocol, body: TemplateBody) -> dict[str, bool]:
    """`enable_thinking` as a variable of the template.

    Raises:
        InvalidRequest: the template does not know it, or the body sets it to two values.
    """
    field, wanted = "enable_thinking", body.enable_thinking
    if wanted is None:
        return {}
    if not chat.knows_thinking:
        reason = "is not known to this model's chat template"
        raise InvalidRequest(f"{field} = {shown(wanted)} {reason}", field, "unsupported_parameter")
    if (other := body.chat_template_kwargs.get(field, wanted)) != wanted:
        reason = f"says {shown(wanted)} and chat_template_kwargs says {shown(other)}; they must agree"
        raise InvalidRequest(f"{field} {reason}", field)
    return {field: wanted}
