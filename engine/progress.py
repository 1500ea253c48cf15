"""Progress of loading: a progress bar in a terminal, or a line every few seconds in a log."""

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between lines


class LoadingProgress:
    """Call it with the bytes loaded and the bytes in total. Use as a context manager.

    `columns`: width of the terminal behind a standard error stream that is a pipe; 0: there is none.
    """

    def __init__(self, columns: int = 0) -> None:
        console = Console(stderr=True, force_terminal=True, width=columns) if columns else Console(stderr=True)
        parts = ("loading weights", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*parts, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("", total=None) if self._bar else None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._said > INTERVAL:
            self._said = time.monotonic()
            log.info("loading weights: %.2f of %.2f GB", done / 1e9, total / 1e9)
