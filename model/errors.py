"""The one exception tree of moedial, and how messages show a value. What each error means on the wire is
`server/errors.py`'s business.

MoedialError
├── InvalidRequest      a caller asked for something that cannot be done; names field, value and limit
├── CheckpointError     a model folder is damaged, incomplete or of an unknown kind
├── EngineBusy          the queue is full; trying again later may help
├── EngineDown          the engine process is not running (loading, restarting or draining)
└── GenerationFailed    one request failed while it ran; no other is touched
    ├── OutOfDeviceMemory   a device has too little memory for what was asked of it
    └── EngineStopped   the server ended while it ran
"""

from collections.abc import Iterator, Mapping

MAX_MESSAGE_LENGTH = 8192  # characters of what is wrong with a checkpoint


def printable(text: str) -> str:
    """The same with an escape for what moves a cursor, turns the direction of writing or begins a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class MoedialError(Exception):
    """Root of every error that moedial raises on purpose."""


class InvalidRequest(MoedialError):
    """A request that cannot be served as asked. `param` is the field at fault, `code` a stable word for programs."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


def context_exceeded(prompt: int, new: int, context: int, least: str = "") -> InvalidRequest:
    """The refusal of a prompt and `new` tokens that do not fit the context, in the words that clients look for.

    `least` is "at least " where the prompt has not been counted to its end.
    """
    room = context - prompt
    if room < 1:
        fits = f"the prompt must have at most {context - 1} tokens, so that a new one fits"
    else:
        fits = f"at most {room} new tokens fit after this prompt"
    asked = f"{least}{prompt + new} tokens ({least}{prompt} in the prompt, {new} as max_tokens)"
    message = f"This model's maximum context length is {context} tokens. However, you requested {asked}; {fits}"
    return InvalidRequest(message, "prompt" if room < 1 else "max_tokens", "context_length_exceeded")


class CheckpointError(MoedialError):
    """A model folder that cannot be loaded; the message names the file and every fault found in it.

    Names in it come from files: they can neither move a terminal's cursor nor begin a line of a log.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message[:MAX_MESSAGE_LENGTH]))


class EngineBusy(MoedialError):
    """The bounded queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDown(MoedialError):
    """The engine process cannot take work now."""


class GenerationFailed(MoedialError):
    """One running request ended with an error."""


class OutOfDeviceMemory(GenerationFailed):
    """A device has too little memory to compute a plan; the message is for the caller of its only request."""


class EngineStopped(GenerationFailed):
    """The server ended while this request ran."""


def shown(value: object, width: int = 64) -> str:
    """The first `width` characters of a value's repr, at a cost that does not grow with the value.

    shown([1, 2, 3]) == "[1, 2, 3]"; of a text of eight megabytes no more than `width` characters are looked at.
    """
    return _head(value, width)[:width]


def _head(value: object, width: int) -> str:
    """The repr, of which at least the first `width` characters."""
    if width <= 0:
        return ""
    if isinstance(value, str | bytes):
        return repr(value[:width])
    if isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return _joined(opening, closing, (_head(item, width - 1) for item in value), width)
    if isinstance(value, Mapping):
        return _joined("{", "}", _pairs(value, width), width)
    return repr(value)


def _pairs(value: Mapping[object, object], width: int) -> Iterator[str]:
    for key, item in value.items():
        yield f"{_head(key, width - 1)}: {_head(item, width - 4)}"


def _joined(opening: str, closing: str, parts: Iterator[str], width: int) -> str:
    text, between = opening, ""
    for part in parts:
        if len(text) >= width:
            break
        text, between = text + between + part, ", "
    return text + closing
