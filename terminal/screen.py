"""The terminal: lines that are typed or piped in, and what is shown. Not here: the conversation.

All text passes `sanitize`, and none of it is read as rich's markup. At a terminal words wrap and notes stand between
the answers; elsewhere standard output has the text of the answers and nothing else.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.text import Text

from terminal.answer import AnswerPart
from terminal.sanitize import one_line, plain
from terminal.wrap import WordWrap

STYLES = {"text": None, "reasoning": "dim italic", "call": "cyan"}


def at_terminal() -> bool:
    """Whether both input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Screen:
    """Input and output. `interactive`: a user at a terminal. `failed`: whether an error has been shown."""

    def __init__(self, interactive: bool) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # for bytes that are no text, or a locale without some characters
                stream.reconfigure(errors="replace")
        self.interactive, self.failed = interactive, False
        self.console = _console(interactive, stderr=False)
        self._notes_console = self.console if interactive else _console(interactive, stderr=True)
        self._wrap = WordWrap() if interactive and not self.console.is_dumb_terminal else None
        self._kind, self._end = "text", "\n"

    def show(self, part: AnswerPart) -> None:
        """Show a part of an answer at once. Reasoning is left out where a program reads the output."""
        kind, text = part[0], plain(part[1])
        if kind == "reasoning" and not self.interactive:
            return
        if kind != self._kind:
            self.close_line()
            self._kind = kind
        if text:
            shown = text if self._wrap is None else self._wrap.feed(text, self.console.width)
            self._write(shown, STYLES[kind])
            self._end = text[-1]

    def close_line(self) -> None:
        """End the line that an answer has begun, if any."""
        if self._end != "\n":
            self._write("\n", None)
        self._kind, self._end = "text", "\n"
        if self._wrap is not None:
            self._wrap.restart()

    def note(self, text: str) -> None:
        """Show a note about the conversation, at a terminal only."""
        if self.interactive:
            self.say(text)

    def say(self, text: str) -> None:
        """Show text that is no answer of a model; without a terminal, on standard error."""
        self._print_note(plain(text), "dim")

    def error(self, exception: Exception) -> None:
        """Show an error."""
        self.failed = True
        self._print_note(one_line(str(exception)), "red")

    def _print_note(self, text: str, style: str) -> None:
        self.close_line()
        self._notes_console.print(Text(text, style), soft_wrap=not self.interactive)

    def _write(self, text: str, style: str | None) -> None:
        with self.console.capture() as rendered:
            self.console.out(text, style=style, highlight=False, end="")
        # not by the console, which writes its buffer again if Ctrl-C arrives between writing and clearing it
        self.console.file.write(rendered.get())
        self.console.file.flush()

    def lines(self, prompt: Callable[[], str]) -> Iterator[str]:
        """The lines of input, until it ends. At a terminal, Ctrl-C at the prompt drops the line."""
        if not self.interactive:
            yield from (line.strip() for line in iter(sys.stdin.readline, ""))
            return
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input(), where the platform has it
        while True:
            try:
                yield input(plain(prompt())).strip()
            except EOFError:
                self.console.out("")  # the shell's prompt begins on a line of its own
                return
            except KeyboardInterrupt:
                self.console.out("")


def _console(interactive: bool, stderr: bool) -> Console:
    """A console, with colours at a terminal only."""
    colours = "auto" if interactive else None
    return Console(highlight=False, soft_wrap=True, stderr=stderr, color_system=colours)  # type: ignore[arg-type]
