"""What a parser has found, as delta parts: calls numbered, adjacent texts joined, spaces around delimiters dropped."""

from collections.abc import Callable

from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.dialects.cursor import Cursor, Parser


class WhitespaceTrimmer:
    """Trims text between delimiters. Trailing whitespace is held back until text follows it: before a delimiter it is
    dropped, and so are line ends after one.

    Spaces after a delimiter stay where text follows them: they may indent its first line.
    """

    def __init__(self) -> None:
        self.shown = False
        self.last = False  # no delimiter can come any more, so that whitespace is not held back
        self._after_delimiter, self._space = False, ""

    def write(self, text: str) -> str:
        """What may be shown now."""
        if not text or (text.isspace() and (self._after_delimiter or not self.last)):
            self._space += text
            return ""
        text = self._space + text
        body = text if self.last else text.rstrip()
        self._space, self.shown = text[len(body) :], True
        if self._after_delimiter:
            body, self._after_delimiter = body.lstrip("\r\n"), False
        return body

    def delimiter(self) -> None:
        """Note that a delimiter stands here."""
        self._after_delimiter, self._space = True, ""

    def new_paragraph(self) -> None:
        """Let another part of the same text begin here, on a line of its own."""
        if self.shown:
            self._after_delimiter, self._space = False, "\n"

    def end(self) -> str:
        """The whitespace at the end of the answer; none where a delimiter began a text that never came."""
        space = "" if self._after_delimiter else self._space
        self._space = ""
        return space


class Deltas:
    """Collects the parts that a parser finds, until `take`. `single`: the answer is complete after one call."""

    def __init__(self, single: bool = False) -> None:
        self.calls = 0  # that have begun
        self.in_call = self.complete = False
        self._single = single
        self._parts: list[DeltaPart] = []
        self._content, self._reasoning = WhitespaceTrimmer(), WhitespaceTrimmer()

    def content(self, text: str) -> None:
        self._add(Content(self._content.write(text)))

    def reasoning(self, text: str) -> None:
        self._add(Reasoning(self._reasoning.write(text)))

    def new_content(self) -> None:
        """Begin another message of content."""
        self._content.new_paragraph()

    def new_reasoning(self) -> None:
        """Begin another message of reasoning."""
        self._reasoning.new_paragraph()

    def no_more_delimiters(self) -> None:
        self._content.last = True

    def delimiter(self) -> None:
        """Note that a delimiter stands here: the whitespace around it is no text."""
        self._content.delimiter()
        self._reasoning.delimiter()

    def call(self, name: str) -> None:
        """Begin a call."""
        self.complete = self.complete or (self._single and self.calls > 0)
        if self.complete:
            return
        self.delimiter()
        self._parts.append(CallStart(self.calls, name))
        self.calls += 1
        self.in_call = True

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that began last."""
        self._add(CallArguments(self.calls - 1, text))

    def call_end(self) -> None:
        """Note that the call that began last is complete."""
        self.in_call = False
        self.complete = self._single

    def end(self) -> None:
        """Release the whitespace that was held back."""
        self._add(Reasoning(self._reasoning.end()))
        self._add(Content(self._content.end()))

    def take(self) -> list[DeltaPart]:
        """The parts since the last `take`."""
        parts, self._parts = self._parts, []
        return parts

    def _add(self, part: Content | Reasoning | CallArguments) -> None:
        last = self._parts[-1] if self._parts else None
        if not part.text or self.complete:
            return
        if isinstance(part, Content) and isinstance(last, Content):
            self._parts[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            self._parts[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.index == part.index:
            self._parts[-1] = CallArguments(last.index, last.text + part.text)
        else:
            self._parts.append(part)


class StreamingParser:
    """The `OutputParser` that runs a parser over one answer. A parser ends only when the text has, so none is left."""

    def __init__(self, parse: Callable[[Cursor, Deltas], Parser[None]], begun: str = "", single: bool = False) -> None:
        self._cursor, self._deltas = Cursor(), Deltas(single)
        self._parser = parse(self._cursor, self._deltas)
        self._cursor.feed(begun)

    @property
    def in_call(self) -> bool:
        return self._deltas.in_call

    @property
    def complete(self) -> bool:
        return self._deltas.complete

    def push(self, text: str) -> list[DeltaPart]:
        self._cursor.feed(text)
        next(self._parser, None)
        return self._deltas.take()

    def flush(self, cut: bool = False, last: str = "") -> list[DeltaPart]:
        self._cursor.feed(last)
        self._cursor.ended, self._cursor.cut = True, cut
        next(self._parser, None)
        self._deltas.end()
        return self._deltas.take()
