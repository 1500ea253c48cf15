"""The checkpoint's chat template, rendered in jinja2's immutable sandbox with bounded output.

Templates come from the checkpoint only, never from a client. Torch-free. It knows no tokens beyond special strings.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import CheckpointError, InvalidRequest
from weights.folder import read_json
from weights.tokenizer import mark_specials

MAX_OUTPUT = 4 * 1024 * 1024  # characters
MAX_PIECES = 1_000_000


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses the operators that build huge values from small ones."""

    intercepted_binops = frozenset(["%", "*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not isinstance(left, int | float) or not isinstance(right, int | float) or operator == "**":
            raise SecurityError(f"operator {operator} is allowed on numbers only, ** not at all")
        return super().call_binop(context, operator, left, right)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment


class ChatTemplate:
    """One checkpoint's template."""

    def __init__(self, source: str, special_strings: tuple[str, ...], variables: dict[str, Any]) -> None:
        self._template: Template = _environment().from_string(source)
        self._specials, self._variables = special_strings, variables

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """`chat_template.jinja`, or the template inside tokenizer_config.json; None if the checkpoint has neither.

        Raises:
            CheckpointError: the template, or a file it needs, cannot be read or parsed.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        try:
            source = _source(folder, config)
            return None if source is None else cls(source, _special_strings(folder), _variables(config))
        except (TemplateError, TypeError, AttributeError, LookupError, ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{folder}: the chat template cannot be parsed: {error}") from None

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text for `messages`, ready for `Tokenizer.encode_chat`.

        Raises:
            InvalidRequest: the template refuses these messages, or grows beyond its bound.
        """
        safe = _mark(messages, self._specials)
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=safe, add_generation_prompt=True, **self._variables):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT or len(parts) > MAX_PIECES:
                    raise InvalidRequest(f"messages render to more than {MAX_OUTPUT} characters", "messages")
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", "messages") from None
        return "".join(parts)


def _source(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own wins over the config; of several named templates, "default" is meant."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    if source is None or isinstance(source, str):
        return source
    raise TypeError(f"it is a {type(source).__name__}, not text")


def _mark(value: Any, specials: tuple[str, ...]) -> Any:
    """`value` with the special-token strings in every text of it broken."""
    if isinstance(value, str):
        return mark_specials(value, specials)
    if isinstance(value, dict):
        return {_mark(key, specials): _mark(item, specials) for key, item in value.items()}
    return [_mark(item, specials) for item in value] if isinstance(value, list) else value


def _special_strings(folder: Path) -> tuple[str, ...]:
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.exists() else []
    return tuple(sorted((token["content"] for token in added if token.get("special")), key=len, reverse=True))


def _variables(config: dict[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token and the like, as strings."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    values = {name: config.get(name) for name in names}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in values.items() if value}
