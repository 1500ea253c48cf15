"""The HTTP process's own rules for log lines. Prompts are never logged. How a line looks is `engine/logs.py`'s."""

import logging

from engine import logs
from engine.logs import Level, LogFormat


def configure(level: Level, format: LogFormat = "json") -> None:
    """Set up the log, without uvicorn's lines about its own starting and stopping."""
    logs.configure(level, format)
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
