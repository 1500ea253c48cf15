"""The one exception tree of moedial. What each error means on the wire is `server/errors.py`'s business.

MoedialError
├── InvalidRequest      a caller asked for something that cannot be done; names field, value and limit
├── CheckpointError     a model folder is damaged, incomplete or of an unknown kind
├── EngineBusy          the queue is full; trying again later may help
├── EngineDown          the engine process is not running (loading, restarting or draining)
└── GenerationFailed    one request failed while it ran; no other is touched
"""


class MoedialError(Exception):
    """Root of every error that moedial raises on purpose."""


class InvalidRequest(MoedialError):
    """A request that cannot be served as asked. `param` is the field at fault, `code` a stable word for programs."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code


class CheckpointError(MoedialError):
    """A model folder that cannot be loaded; the message names the file and every fault found in it."""


class EngineBusy(MoedialError):
    """The bounded queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDown(MoedialError):
    """The engine process cannot take work now."""


class GenerationFailed(MoedialError):
    """One running request ended with an error."""
