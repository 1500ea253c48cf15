"""The text of an answer as it arrives, with a cursor: what every dialect's script reads from.

A script is a generator that yields where it must wait for more text. What it reads depends on the text alone, never on
how the text was split. It knows no marks and makes no pieces.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Script = Generator[None, None, T]
Write = Callable[[str], object]

SPACE = re.compile(r"[ \t\r\n]+")
_NEVER = "(?!)"
BROKEN = "\ufffd"  # half a character, where the answer was cut


class Tape:
    """Text behind the cursor is forgotten, except behind a pin: until it is taken out, the cursor can go back there.

    `cut`: the answer has ended because it had to, so that a mark or a call at its end may be half of one. Such a half
    is dropped: as text it would be markup.
    """

    def __init__(self) -> None:
        self.ended, self.cut = False, False
        self._text, self._at = "", 0
        self._pin: int | None = None

    def feed(self, text: str) -> None:
        keep = self._at if self._pin is None else self._pin
        self._text = self._text[keep:] + text
        self._at -= keep
        self._pin = None if self._pin is None else 0

    def pin(self) -> None:
        self._pin = self._at

    def unpin(self) -> None:
        self._pin = None

    def rewind(self) -> None:
        """Back to the pin, which is taken out. Not where the answer was cut within what began there."""
        if self._pin is not None and not (self.cut and self._at == len(self._text) and self._pinned.strip()):
            self._at = self._pin
        self._pin = None

    @property
    def _pinned(self) -> str:
        return self._text[self._pin : self._at]

    def take(self, size: int) -> str:
        taken = self._text[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take what matches of the text that is here. The caller goes on after it where more may come."""
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def peek(self) -> Script[str]:
        """The next character, left where it is; "" if the answer has ended."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def skip(self, pattern: re.Pattern[str] = SPACE) -> Script[None]:
        """Take all that matches, however much comes; `pattern` is a run of characters of one kind."""
        while True:
            self.run(pattern)
            if self._at < len(self._text) or self.ended:
                return
            yield

    def word(self, pattern: re.Pattern[str], limit: int = 256) -> Script[str]:
        """Take a run of characters up to one of another kind, or the end; "" if it is longer than `limit`."""
        while True:
            found = pattern.match(self._text, self._at)
            end = found.end() if found else self._at
            if end - self._at > limit:
                return ""
            if end < len(self._text) or self.ended:
                return self.take(end - self._at)
            yield

    def starts(self, *marks: str) -> Script[str]:
        """Take the one of `marks` that comes next; "" if none does. Waits only while one still may.

        No mark may begin another.
        """
        longest = max(map(len, marks))
        while True:
            for mark in marks:
                if self._text.startswith(mark, self._at):
                    return self.take(len(mark))
            rest = self._text[self._at : self._at + longest]
            if self.ended:
                self._drop_half(marks)
            if self.ended or not any(mark.startswith(rest) for mark in marks):
                return ""
            yield

    def until(self, marks: tuple[str, ...], write: Write) -> Script[str]:
        """Write the text up to the first of `marks` and stop there: the mark, not yet taken, or "" at the end.

        The end of the text is held back while it may be the beginning of a mark.
        """
        find = re.compile("|".join(map(re.escape, marks)) or _NEVER)
        while True:
            found = find.search(self._text, self._at)
            whole = self.ended and not self.cut
            end = found.start() if found else len(self._text) if whole else self._possible(marks)
            if end > self._at:
                write(self.take(end - self._at))
            if found or self.ended:
                self._drop_half(() if found else marks)
                return found.group() if found else ""
            yield

    def _possible(self, marks: tuple[str, ...]) -> int:
        """Where the earliest mark that is not whole yet may begin; the end of the text if none does."""
        longest = max(map(len, marks), default=1)
        text = self._text.rstrip(BROKEN) if self.cut else self._text
        for at in range(max(self._at, len(text) - longest + 1), len(text)):
            if any(mark.startswith(text[at:]) for mark in marks):
                return at
        return len(self._text)

    def _drop_half(self, marks: tuple[str, ...]) -> None:
        """Take a mark that is not whole, where the answer was cut within it."""
        if self.cut and self._possible(marks) == self._at:
            self._at = len(self._text)
