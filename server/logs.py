"""The HTTP process's own rules for log lines. Prompts are never logged. How a line looks is `engine/logs.py`'s."""

import logging
from datetime import UTC, datetime

from engine import logs
from engine.logs import Level, LogFormat, as_json, as_text


def configure(level: Level, format: LogFormat = "json") -> None:
    """Set up the log, without uvicorn's lines about its own starting and stopping."""
    logs.configure(level, format)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def dropped_line(format: LogFormat, count: int) -> str:
    """The line that stands where `count` lines were dropped."""
    event = {
        "lines": count,
        "event": "log lines were dropped, their reader was too slow",
        "logger": "server",
        "level": "warning",
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }
    return (as_text if format == "text" else as_json)(None, "warning", event)
