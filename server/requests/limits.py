"""Checks a body against the limits that an operator can set. Every refusal names field, value and limit.

It checks shapes and sizes, not the meaning of fields.
"""

from math import isfinite
from typing import Any

from model.errors import InvalidRequest, context_exceeded, shown
from server.json_limits import min_json_bytes
from server.requests.output_fields import constraint_fields
from server.requests.routed_experts import check_allowed
from server.schemas.base import GenerationBody
from server.schemas.chat import AssistantMessage, ChatBody, Message, TemplateBody, text_of
from server.schemas.completions import CompletionBody
from server.settings import Settings


def check_limits(body: GenerationBody, settings: Settings) -> None:
    """Raises InvalidRequest for the first limit that a body exceeds."""
    _at_most("n", body.n, settings.max_n)
    check_allowed(body, settings.return_routed_experts)
    if isinstance(body, CompletionBody):
        _check_completion(body, settings)
    elif body.answer_limit == 0:
        raise InvalidRequest("max_tokens must be at least 1, got 0", "max_tokens")
    _at_most(
        "logprobs" if isinstance(body, CompletionBody) else "top_logprobs", _alternatives(body), settings.max_logprobs
    )
    _at_most("prompt_logprobs", body.prompt_logprobs or 0, settings.max_logprobs)
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest(f"prompt_logprobs = {body.prompt_logprobs} cannot be streamed", "prompt_logprobs")
    for i, text in enumerate(body.stop):
        _at_most(f"stop[{i}]", len(text), settings.max_stop_length, "characters")
        if not text:
            raise InvalidRequest(f"stop[{i}] is an empty string", f"stop[{i}]")
    for i, word in enumerate(body.bad_words):
        _at_most(f"bad_words[{i}]", len(word), settings.max_stop_length, "characters")
        if not word.strip():
            raise InvalidRequest(f"bad_words[{i}] is blank, got {shown(word)}", f"bad_words[{i}]")
    if isinstance(body, ChatBody):
        check_template(body, body.messages, settings)
    _check_sizes(body, settings.max_grammar_bytes)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", "stream_options")


def _check_sizes(body: GenerationBody, limit: int) -> None:
    """Check the size of what a grammar is written from, before it is serialised."""
    fields = constraint_fields(body)
    for field in fields:
        # texts are measured where they are read
        if not isinstance(field.value, str) and (size := min_json_bytes(field.value, limit)) > limit:
            raise InvalidRequest(f"{field.field} must be at most {limit} bytes, got at least {size}", field.field)
    if isinstance(body, ChatBody) and body.tools and (fields or body.tool_choice not in (None, "auto", "none")):
        schemas = [tool.function.parameters for tool in body.tools]
        if (size := min_json_bytes(schemas, 2 * limit)) > 2 * limit:
            raise InvalidRequest(f"tools make a grammar of at least {size} bytes; at most {2 * limit}", "tools")


def _check_completion(body: CompletionBody, settings: Settings) -> None:
    _at_most("best_of", body.answers, settings.max_n)
    if body.answers < body.n:
        raise InvalidRequest(f"best_of must be at least n = {body.n}, got {body.best_of}", "best_of")
    if body.answers > body.n and body.stream:
        raise InvalidRequest(
            f"best_of = {body.best_of} cannot be streamed: which answers are best is known last", "best_of"
        )
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        reason = "max_tokens can only be 0 with echo or prompt_logprobs: nothing else would come back"
        raise InvalidRequest(reason, "max_tokens")


def check_template(body: TemplateBody, messages: list[Message], settings: Settings) -> None:
    _check_continued(body, messages)
    field, allowed = "chat_template_kwargs", settings.chat_template_kwargs
    for name, value in body.chat_template_kwargs.items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise InvalidRequest(f"{field}: {shown(name)} is not allowed; the operator allows {known}", field)
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not isfinite(value)):
            kinds = "a text, a number, true, false or null"
            raise InvalidRequest(f"{field}: {name} must be {kinds}, got {shown(value)}", field)


def _check_continued(body: TemplateBody, messages: list[Message]) -> None:
    field, last = "continue_final_message", messages[-1] if messages else None
    if not body.continue_final_message:
        return
    if body.add_generation_prompt:
        raise InvalidRequest(f"{field} needs add_generation_prompt: false, got true", "add_generation_prompt")
    if not isinstance(last, AssistantMessage) or last.tool_calls or not text_of(last.content).strip():
        raise InvalidRequest(f"{field} needs a last message of the assistant that has text and no tool_calls", field)


def _alternatives(body: GenerationBody) -> int:
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise InvalidRequest(f"top_logprobs is {body.top_logprobs}, which needs logprobs: true", "top_logprobs")
    return body.alternatives or 0


def _at_most(field: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise InvalidRequest(f"{field} must be at most {limit}{unit and ' ' + unit}, got {value}", field)


def prompts_of(value: Any, limit: int) -> list[str | list[int]]:
    """`prompt`, in any of its four shapes, as a list of texts or of token-id lists."""
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        shapes = "a string, a list of strings, token ids or a list of token-id lists"
        raise InvalidRequest(f"prompt must be {shapes}, got {shown(value)}", "prompt", "invalid_type")
    _at_most("prompt", len(prompts), limit, "prompts")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise InvalidRequest(
                f"prompt[{i}] must be a string or a list of token ids, got {shown(prompt)}", "prompt", "invalid_type"
            )
    return prompts


def _are_ids(value: Any) -> bool:
    """Whether a value is a non-empty list of integers; true is none."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def biases_of(body: GenerationBody) -> dict[int, float]:
    """`logit_bias` by token id. Raises InvalidRequest for keys that are no ids."""
    biases = {}
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: {shown(key)} is not a token id", "logit_bias")
        biases[int(key)] = value
    return biases


def tokens_to_keep(body: GenerationBody, context: int) -> int | None:
    """How many of the last tokens of each prompt are kept; None: all.

    Raises:
        InvalidRequest: 0, or more than the context has.
    """
    field, kept = "truncate_prompt_tokens", body.truncate_prompt_tokens
    if kept == -1:
        default = body.default_limit or 1
        return max(1, context - (default if body.answer_limit is None else body.answer_limit))
    if kept == 0 or (kept or 0) > context:
        raise InvalidRequest(f"{field} must be -1, or between 1 and the context's {context}, got {kept}", field)
    return kept


def max_new_tokens(requested: int | None, default: int | None, prompt: int, context: int) -> int:
    """How many tokens may be generated; a `default` of None means the rest of the context.

    Raises:
        InvalidRequest: prompt and answer do not fit the context.
    """
    room = context - prompt
    least = 1 if requested is None else requested
    if least > room:
        raise context_exceeded(prompt, least, context)
    if requested is not None:
        return requested
    return room if default is None else min(default, room)
