"""The checkpoint's chat template, rendered in a sandbox (`weights/sandbox.py`) with bounded output.

Templates come from the checkpoint only, never from a client. Torch-free. It does not depend on tokens other than
special strings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from model.errors import CheckpointError, InvalidRequest
from weights.sandbox import environment, literals, read_names
from weights.small_files import TOKENIZER_CONFIG, SmallFiles, small_files
from weights.special_tokens import escape_specials
from weights.tokenizer import token_text

HERE = "CONTINUE_FINAL_MESSAGE_HERE"  # stands at the end of a message that is to be continued
MAX_OUTPUT = 4 * 1024 * 1024  # characters
MAX_PIECES = 1_000_000
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TRUSTED = ("system", "assistant")  # roles that an application and its model speak in
_FAULTS = (TemplateError, TypeError, AttributeError, ValueError, ArithmeticError, LookupError, RecursionError)


class ChatTemplate:
    """One checkpoint's template, and the one it has for requests with tools.

    What clients send cannot become a special token. Tokens that the template writes but that are not special
    (DeepSeek's role tokens, Qwen's `<think>`) are kept from users' and tools' messages; an assistant's own words and
    a system prompt may hold them, as models are trained on that.
    """

    def __init__(
        self,
        source: str,
        special_strings: tuple[str, ...],
        variables: dict[str, Any],
        other_tokens: tuple[str, ...] = (),
        with_tools: str | None = None,
    ) -> None:
        sources = [source, source if with_tools is None else with_tools]
        self._plain, self._with_tools = (environment().from_string(text) for text in sources)
        written = "\0".join(map(literals, sources))
        self.source = source if with_tools is None else with_tools  # as it is for requests with tools
        names = read_names(self.source)
        self.knows_tools, self.knows_thinking = "tools" in names, "enable_thinking" in names
        self._specials, self._variables = special_strings, variables
        named = (token for token in other_tokens if token in written and not token.isspace())
        self._controls = (*special_strings, *named)

    @classmethod
    def load(cls, model: Path) -> "ChatTemplate | None":
        """The checkpoint's template; None if it has none, or several and none of them the default. `model` may be a
        folder with a tokenizer alone.

        Raises:
            CheckpointError: the template, or a file it needs, cannot be read or parsed.
        """
        files = small_files(model)
        config = files.optional(TOKENIZER_CONFIG)
        try:
            sources = _sources(files, config)
            if "default" not in sources:
                return None
            variables = _variables(files.optional("special_tokens_map.json") | config)
            added = files.added_tokens
            specials, others = (_texts(added, special) for special in (True, False))
            return cls(sources["default"], specials, variables, others, sources.get("tool_use"))
        except (*_FAULTS, OSError, SyntaxError) as error:  # jinja2 compiles a stray break to Python's
            raise CheckpointError(f"{model}: the chat template cannot be parsed: {error}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text for `messages`, ready for `Tokenizer.encode_chat`. `tools` are JSON schemas. With
        `continue_final_message` it ends with the last message's text.

        Raises:
            InvalidRequest: the template refuses these messages, or grows beyond its bound.
        """
        given = self._variables | _mark(dict(variables or {}), self._controls)
        said = [self._message(message) for message in messages]
        if continue_final_message:
            said[-1]["content"] += HERE
        given |= {"messages": said, "documents": None}
        given |= {"tools": _mark(tools, self._specials), "add_generation_prompt": add_generation_prompt}
        try:
            text = _bounded(self._plain if tools is None else self._with_tools, given)
        except _FAULTS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error!s:.300}", "messages") from None

        return _before_here(text) if continue_final_message else text

    def _message(self, message: dict[str, Any]) -> Any:
        """A message with strings escaped and nulls left out, as transformers does: many templates would write None."""
        tokens = self._specials if message.get("role") in _TRUSTED else self._controls
        return _mark({key: value for key, value in message.items() if value is not None}, tokens)


def _before_here(text: str) -> str:
    before, found, _ = text.rpartition(HERE)
    if not found:
        reason = "continue_final_message: the chat template does not write the last message's text as it is"
        raise InvalidRequest(reason, "continue_final_message")
    return before


def _bounded(template: Template, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    size = 0
    for part in template.generate(variables):
        parts.append(part)
        size += len(part)
        if size > MAX_OUTPUT or len(parts) > MAX_PIECES:
            raise InvalidRequest(f"messages render to more than {MAX_OUTPUT} characters", "messages")
    return "".join(parts)


def _sources(files: SmallFiles, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. A file of its own wins over chat_template.json, which wins over tokenizer_config.json."""
    own = files.templates
    legacy = files.optional("chat_template.json").get("chat_template")
    named = {} if "default" in own else _by_name(config.get("chat_template") if legacy is None else legacy)
    return named | own


def _by_name(value: Any) -> dict[str, str]:
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}
    sources = value if isinstance(value, dict) else {} if value is None else {"default": value}
    for source in sources.values():
        if not isinstance(source, str):
            raise TypeError(f"it is a {type(source).__name__}, not text")
    return sources


def _mark(value: Any, tokens: tuple[str, ...]) -> Any:
    """`value` with these token strings in every text of it broken."""
    if isinstance(value, str):
        return escape_specials(value, tokens)
    if isinstance(value, dict):
        return {_mark(key, tokens): _mark(item, tokens) for key, item in value.items()}
    return [_mark(item, tokens) for item in value] if isinstance(value, list) else value


def _texts(added: list[dict[str, Any]], special: bool) -> tuple[str, ...]:
    return tuple(token["content"] for token in added if bool(token.get("special")) == special)


def _variables(config: dict[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token and the like, as strings."""
    texts = {name: token_text(config.get(name)) for name in _NAMED}
    return {name: text for name, text in texts.items() if text}
