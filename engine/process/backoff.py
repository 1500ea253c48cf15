"""Exponential backoff: how long to wait before an engine process that ended is started again."""


class Backoff:
    """No delay after a process that served well, else twice the last delay: a process that cannot load, or dies of its
    first request, must not fill the log and the cores."""

    def __init__(self, first: float, longest: float) -> None:
        self._next = self._first = first
        self._longest = longest

    def delay(self, served_well: bool) -> float:
        """Seconds before the next start."""
        if served_well:
            self._next = self._first
            return 0.0
        delay = self._next
        self._next = min(2 * delay, self._longest)
        return delay
