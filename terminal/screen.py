"""The terminal itself: lines that are typed or piped in, and what is shown. It knows colours, no conversation.

Whatever is shown passes `safe`, and none of it is read as rich's markup.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.text import Text

from terminal.answer import Piece
from terminal.safe import one_line, plain

STYLES = {"text": None, "thought": "dim italic", "call": "cyan"}


class Screen:
    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # bytes that are no text, or a locale without our characters
                stream.reconfigure(errors="replace")
        self.console = Console(highlight=False, soft_wrap=True)
        self._kind, self._end = "text", "\n"

    def show(self, piece: Piece) -> None:
        """A part of an answer, at once."""
        kind, text = piece[0], plain(piece[1])
        if kind != self._kind:
            self.close_line()
            self._kind = kind
        if text:
            with self.console.capture() as drawn:
                self.console.out(text, style=STYLES[kind], highlight=False, end="")
            # not by the console itself: it writes its buffer again if Ctrl-C strikes between writing and clearing it
            self.console.file.write(drawn.get())
            self.console.file.flush()
            self._end = text[-1]

    def close_line(self) -> None:
        """An answer may end anywhere on its line."""
        if self._end != "\n":
            self.console.out("")
        self._kind, self._end = "text", "\n"

    def note(self, text: str) -> None:
        self._aside(plain(text), "dim")

    def fault(self, error: Exception) -> None:
        self._aside(one_line(str(error)), "red")

    def _aside(self, text: str, style: str) -> None:
        self.close_line()
        self.console.print(Text(text, style))

    def lines(self, prompt: Callable[[], str]) -> Iterator[str]:
        """Until they end. Ctrl-C at the prompt forgets the line; input that is piped has no prompt."""
        typed = sys.stdin.isatty()
        if typed:
            with suppress(ImportError):
                import readline  # noqa: F401  # line editing and history for input(), where the platform has it
        while True:
            try:
                line = input(plain(prompt())) + "\n" if typed else sys.stdin.readline()
            except EOFError:
                line = ""
                self.console.out("")  # whatever comes after us begins on a line of its own
            except KeyboardInterrupt:
                line = "\n" if typed else ""
                self.console.out("")
            if not line:
                return
            yield line.strip()
