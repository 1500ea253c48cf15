"""Breaks text between words at a width while it streams. It depends on columns, not on terminals or colours."""

from rich.cells import cell_len

TAB = 8
ERASE = "\x1b[1G\x1b[K"  # clears the line; rich drops carriage returns


class WordWrap:
    """Wraps the line being written. A word is shown as it grows; one that reaches the edge moves to the next line."""

    def __init__(self) -> None:
        self._line = ""

    def restart(self) -> None:
        """Note that the line has been ended elsewhere."""
        self._line = ""

    def feed(self, text: str, width: int) -> str:
        """What to write for `text`. The last of `width` columns stays empty: some terminals wrap when it is filled."""
        return "".join(self._put(character, width - 1) for character in text)

    def _put(self, character: str, width: int) -> str:
        if character == "\n":
            self._line = ""
            return character
        if character == "\t":
            blanks = TAB - cell_len(self._line) % TAB
            return "".join(self._put(" ", width) for _ in range(blanks))
        if cell_len(self._line + character) > width:
            return self._break(character, width)
        self._line += character
        return character

    def _break(self, character: str, width: int) -> str:
        """Break the line: a blank ends it, a word moves to the next line, a long word is cut."""
        if character == " ":
            self._line = ""
            return "\n"
        before, _, word = self._line.rpartition(" ")
        if not before.strip() or 2 * cell_len(word) > width:
            self._line = character
            return "\n" + character
        self._line = word + character
        return f"{ERASE}{before}\n{self._line}"
