"""What a script has read, as pieces: calls are numbered, whitespace around marks is dropped, neighbours are joined.

It knows no marks and reads no text.
"""

from collections.abc import Callable

from server.dialects.base import CallArguments, CallStart, Content, Piece, Reasoning
from server.dialects.cursor import Script, Tape


class Trim:
    """Text between marks. Whitespace waits until text follows it: before a mark it is dropped, as are line ends after.

    Spaces after a mark stay where a text follows them: they may indent its first line.
    """

    def __init__(self) -> None:
        self.shown = False
        self.last = False  # no mark can come any more: whitespace need not wait
        self._after_mark, self._space = False, ""

    def write(self, text: str) -> str:
        """What may be shown now."""
        if not text or (text.isspace() and (self._after_mark or not self.last)):
            self._space += text
            return ""
        text = self._space + text
        body = text if self.last else text.rstrip()
        self._space, self.shown = text[len(body) :], True
        if self._after_mark:
            body, self._after_mark = body.lstrip("\r\n"), False
        return body

    def mark(self) -> None:
        """A mark stands here."""
        self._after_mark, self._space = True, ""

    def part(self) -> None:
        """Another part of the same text begins here, with a line of its own."""
        if self.shown:
            self._after_mark, self._space = False, "\n"

    def end(self) -> str:
        """Whitespace that nothing follows; none is left of a text that a mark began and that never came."""
        space = "" if self._after_mark else self._space
        self._space = ""
        return space


class Pieces:
    """The pieces since the last `take`. `single`: after one whole call the answer is over, and nothing is added."""

    def __init__(self, single: bool = False) -> None:
        self.calls = 0  # that have begun
        self.in_call = self.over = False
        self._single = single
        self._out: list[Piece] = []
        self._content, self._thought = Trim(), Trim()

    def content(self, text: str) -> None:
        self._add(Content(self._content.write(text)))

    def thought(self, text: str) -> None:
        self._add(Reasoning(self._thought.write(text)))

    def content_part(self) -> None:
        self._content.part()

    def thought_part(self) -> None:
        self._thought.part()

    def no_more_marks(self) -> None:
        self._content.last = True

    def mark(self) -> None:
        """A mark stands here: the whitespace around it belongs to nobody."""
        self._content.mark()
        self._thought.mark()

    def call(self, name: str) -> None:
        self.over = self.over or (self._single and self.calls > 0)
        if self.over:
            return
        self.mark()
        self._out.append(CallStart(self.calls, name))
        self.calls += 1
        self.in_call = True

    def arguments(self, text: str) -> None:
        """More of the call that began last."""
        self._add(CallArguments(self.calls - 1, text))

    def call_end(self) -> None:
        """The call that began last is whole."""
        self.in_call = False
        self.over = self._single

    def end(self) -> None:
        self._add(Reasoning(self._thought.end()))
        self._add(Content(self._content.end()))

    def take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _add(self, piece: Content | Reasoning | CallArguments) -> None:
        last = self._out[-1] if self._out else None
        if not piece.text or self.over:
            return
        if isinstance(piece, Content) and isinstance(last, Content):
            self._out[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            self._out[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments) and last.index == piece.index:
            self._out[-1] = CallArguments(last.index, last.text + piece.text)
        else:
            self._out.append(piece)


class ScriptReader:
    """Runs a script over one answer. The script ends only after the tape has, so no text is left behind."""

    def __init__(self, script: Callable[[Tape, Pieces], Script[None]], begun: str = "", single: bool = False) -> None:
        self._tape, self._pieces = Tape(), Pieces(single)
        self._script = script(self._tape, self._pieces)
        self._tape.feed(begun)

    @property
    def in_call(self) -> bool:
        return self._pieces.in_call

    @property
    def over(self) -> bool:
        return self._pieces.over

    def push(self, text: str) -> list[Piece]:
        self._tape.feed(text)
        next(self._script, None)
        return self._pieces.take()

    def flush(self, cut: bool = False, last: str = "") -> list[Piece]:
        self._tape.feed(last)
        self._tape.ended, self._tape.cut = True, cut
        next(self._script, None)
        self._pieces.end()
        return self._pieces.take()
