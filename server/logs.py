"""The HTTP process's rules for log lines. Prompts are never logged. `engine/logs.py` formats the lines."""

import logging
from datetime import UTC, datetime

from engine import logs
from engine.logs import Level, LogFormat, as_json, as_text


def configure(level: Level, format: LogFormat = "json") -> None:
    """Set up logging, without uvicorn's lines about its start and stop."""
    logs.configure(level, format)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def dropped_line(format: LogFormat, count: int) -> str:
    """The line that takes the place of `count` dropped lines."""
    event = {
        "lines": count,
        "event": "log lines were dropped, their reader was too slow",
        "logger": "server",
        "level": "warning",
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }
    write = as_text if format == "text" else as_json
    return write(None, "warning", event)
