"""The states of an engine process as the HTTP process sees it, and the error of requests while it serves none."""

from typing import Literal

from model.errors import EngineDown

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]

_REASONS: dict[EngineState, str] = {
    "loading": "the model is still loading",
    "restarting": "the engine is restarting",
    "failed": "the model could not be loaded",
    "stopped": "the engine is stopped",
}


def engine_down(state: EngineState, failure: str | None) -> EngineDown:
    """The error of a request that comes in this state; `failure` is why the last load failed."""
    reason = _REASONS.get(state, "the engine is not running")
    if state == "failed" and failure:
        reason = f"{reason}: {failure}"
    return EngineDown(reason)
