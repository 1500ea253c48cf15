"""A cursor over the text of an answer as it arrives, from which the parsers of all dialects read.

A parser is a generator that yields where it must wait for more text. What it reads depends on the text only, never on
how the text was split.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Parser = Generator[None, None, T]
Write = Callable[[str], object]

SPACE = re.compile(r"[ \t\r\n]+")
_NEVER = "(?!)"
PARTIAL_CHARACTER = "\ufffd"  # how an incomplete character decodes, where the answer was cut


class Cursor:
    """Text behind the cursor is dropped, except behind a pin: until the pin is removed, the cursor can go back there.

    `cut`: a limit or a stop string ended the answer, so that a delimiter or a call at its end may be incomplete. An
    incomplete delimiter is dropped: it would show markup.
    """

    def __init__(self) -> None:
        self.ended, self.cut = False, False
        self._text, self._at = "", 0
        self._pin: int | None = None

    def feed(self, text: str) -> None:
        """Add text at the end."""
        keep = self._at if self._pin is None else self._pin
        self._text = self._text[keep:] + text
        self._at -= keep
        self._pin = None if self._pin is None else 0

    def pin(self) -> None:
        self._pin = self._at

    def unpin(self) -> None:
        self._pin = None

    def rewind(self) -> None:
        """Go back to the pin and remove it; stay where the answer was cut within what began at the pin."""
        if self._pin is not None and not (self.cut and self._at == len(self._text) and self._pinned.strip()):
            self._at = self._pin
        self._pin = None

    @property
    def _pinned(self) -> str:
        return self._text[self._pin : self._at]

    def take(self, size: int) -> str:
        """Take up to `size` characters of the text that has arrived."""
        taken = self._text[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def take_match(self, pattern: re.Pattern[str]) -> str:
        """Take what matches of the text that has arrived. More that matches may arrive later."""
        found = pattern.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def peek(self) -> Parser[str]:
        """The next character, which is not taken; "" if the answer has ended."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def skip(self, pattern: re.Pattern[str] = SPACE) -> Parser[None]:
        """Take all that matches, however much arrives; `pattern` is a run of characters of one kind."""
        while True:
            self.take_match(pattern)
            if self._at < len(self._text) or self.ended:
                return
            yield

    def word(self, pattern: re.Pattern[str], limit: int = 256) -> Parser[str]:
        """Take a run of characters up to one of another kind, or the end; "" if it is longer than `limit`."""
        while True:
            found = pattern.match(self._text, self._at)
            end = found.end() if found else self._at
            if end - self._at > limit:
                return ""
            if end < len(self._text) or self.ended:
                return self.take(end - self._at)
            yield

    def take_one_of(self, *delimiters: str) -> Parser[str]:
        """Take the one of `delimiters` that comes next; "" if none does. Waits only while one still may.

        No delimiter may begin another.
        """
        longest = max(map(len, delimiters))
        while True:
            for delimiter in delimiters:
                if self._text.startswith(delimiter, self._at):
                    return self.take(len(delimiter))
            rest = self._text[self._at : self._at + longest]
            if self.ended:
                self._drop_incomplete(delimiters)
            if self.ended or not any(delimiter.startswith(rest) for delimiter in delimiters):
                return ""
            yield

    def write_until(self, delimiters: tuple[str, ...], write: Write) -> Parser[str]:
        """Write the text up to the first of `delimiters`. Returns that delimiter, which is not taken, or "" at the end.

        The end of the text is held back while it may be the beginning of a delimiter.
        """
        find = re.compile("|".join(map(re.escape, delimiters)) or _NEVER)
        while True:
            found = find.search(self._text, self._at)
            end = found.start() if found else self._writable_end(delimiters)
            if end > self._at:
                write(self.take(end - self._at))
            if found:
                return found.group()
            if self.ended:
                self._drop_incomplete(delimiters)
                return ""
            yield

    def _writable_end(self, delimiters: tuple[str, ...]) -> int:
        """How far text without a whole delimiter can be written."""
        return len(self._text) if self.ended and not self.cut else self._incomplete_start(delimiters)

    def _incomplete_start(self, delimiters: tuple[str, ...]) -> int:
        """Where the earliest incomplete delimiter may begin; the end of the text if none does."""
        longest = max(map(len, delimiters), default=1)
        text = self._text.rstrip(PARTIAL_CHARACTER) if self.cut else self._text
        for at in range(max(self._at, len(text) - longest + 1), len(text)):
            if any(delimiter.startswith(text[at:]) for delimiter in delimiters):
                return at
        return len(self._text)

    def _drop_incomplete(self, delimiters: tuple[str, ...]) -> None:
        """Take the incomplete delimiter in which the answer was cut."""
        if self.cut and self._incomplete_start(delimiters) == self._at:
            self._at = len(self._text)
