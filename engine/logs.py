"""The format of log lines, the same in the HTTP process and the engine process: JSON, or text for people.

Line breaks and control characters are escaped, so that no client can forge a line.
"""

import logging
import re
import sys
from typing import Any, Literal

import orjson
import structlog

Level = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
PLAIN = re.compile(r"[\w./:@+-]+")

SHARED: list[structlog.typing.Processor] = [
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def configure(level: Level, format: LogFormat) -> None:
    """Route structlog and `logging` (uvicorn, asyncio) through one handler on the standard error stream."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    render = as_text if format == "text" else as_json
    processors: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, render]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=SHARED, processors=processors))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def as_json(_logger: Any, _method: str, event: structlog.typing.EventDict) -> str:
    """A log line as one JSON object."""
    fields = {key: _writable_text(value) for key, value in event.items()}
    try:
        return _dumps(fields)
    except TypeError:
        return _dumps({key: _as_text(value) for key, value in fields.items()})


def _writable_text(value: Any) -> Any:
    return _writable(value) if isinstance(value, str) else value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else _writable(repr(value))


def as_text(_logger: Any, _method: str, event: structlog.typing.EventDict) -> str:
    """A log line as text: `2026-11-26T17:02:43Z info server: the event key=value …`, tracebacks indented below."""
    fields = dict(event)
    time, level, logger = (str(fields.pop(key, "-")) for key in ("timestamp", "level", "logger"))
    message, trace = str(fields.pop("event", "")), str(fields.pop("exception", ""))
    words = [f"{time[:19]}Z {level} {logger}: {_escaped(message)}"]
    words += [f"{key}={_value(value)}" for key, value in fields.items()]
    return "\n    ".join([" ".join(words), *map(_escaped, trace.splitlines())])


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else _dumps(_writable(value))
    try:
        return _dumps(value)
    except TypeError:
        return _dumps(_writable(repr(value)))


def _escaped(text: str) -> str:
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _writable(text: str) -> str:
    """Text without lone surrogates, which orjson refuses: a log line must never raise."""
    return text.encode("utf-8", "backslashreplace").decode()


def _dumps(value: Any) -> str:
    """JSON without raw control characters. Raises TypeError: an integer beyond 64 bits, a surrogate inside a list."""
    return _escaped(orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS).decode())
