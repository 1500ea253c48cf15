"""The terminal itself: lines that are typed or piped in, and what is shown. It knows colours, no conversation.

Whatever is shown passes `safe`, and none of it is read as rich's markup. At a terminal words wrap, and notes stand
between the answers; without one, standard output has the text of answers and nothing else.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.text import Text

from terminal.answer import Piece
from terminal.sanitize import one_line, plain
from terminal.wrap import Wrap

STYLES = {"text": None, "thought": "dim italic", "call": "cyan"}


def at_terminal() -> bool:
    """Whether a person types here and reads here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Screen:
    """`attended`: a person reads it. `failed`: an error has been shown."""

    def __init__(self, attended: bool) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # bytes that are no text, or a locale without our characters
                stream.reconfigure(errors="replace")
        self.attended, self.failed = attended, False
        self.console = _console(attended, stderr=False)
        self._aside_console = self.console if attended else _console(attended, stderr=True)
        self._wrap = Wrap() if attended and not self.console.is_dumb_terminal else None
        self._kind, self._end = "text", "\n"

    def show(self, piece: Piece) -> None:
        """A part of an answer, at once. Thoughts are no part of what a program reads."""
        kind, text = piece[0], plain(piece[1])
        if kind == "thought" and not self.attended:
            return
        if kind != self._kind:
            self.close_line()
            self._kind = kind
        if text:
            shown = text if self._wrap is None else self._wrap.feed(text, self.console.width)
            self._write(shown, STYLES[kind])
            self._end = text[-1]

    def close_line(self) -> None:
        """An answer may end anywhere on its line."""
        if self._end != "\n":
            self._write("\n", None)
        self._kind, self._end = "text", "\n"
        if self._wrap is not None:
            self._wrap.restart()

    def note(self, text: str) -> None:
        """Something about the conversation, for a person."""
        if self.attended:
            self.say(text)

    def say(self, text: str) -> None:
        """What was asked for and is no answer of a model: without a terminal, on standard error."""
        self._aside(plain(text), "dim")

    def fault(self, error: Exception) -> None:
        self.failed = True
        self._aside(one_line(str(error)), "red")

    def _aside(self, text: str, style: str) -> None:
        self.close_line()
        self._aside_console.print(Text(text, style), soft_wrap=not self.attended)

    def _write(self, text: str, style: str | None) -> None:
        with self.console.capture() as drawn:
            self.console.out(text, style=style, highlight=False, end="")
        # not by the console itself: it writes its buffer again if Ctrl-C strikes between writing and clearing it
        self.console.file.write(drawn.get())
        self.console.file.flush()

    def lines(self, prompt: Callable[[], str]) -> Iterator[str]:
        """Until they end. At a terminal, Ctrl-C at the prompt forgets the line."""
        if not self.attended:
            yield from (line.strip() for line in iter(sys.stdin.readline, ""))
            return
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input(), where the platform has it
        while True:
            try:
                yield input(plain(prompt())).strip()
            except EOFError:
                self.console.out("")  # whatever comes after us begins on a line of its own
                return
            except KeyboardInterrupt:
                self.console.out("")


def _console(attended: bool, stderr: bool) -> Console:
    """Colours are for people."""
    colours = "auto" if attended else None
    return Console(highlight=False, soft_wrap=True, stderr=stderr, color_system=colours)  # type: ignore[arg-type]
