"""Server-sent events as OpenAI's servers write them: bytes in, parsed chunks out. It opens no connection.

Lines end in LF or CRLF; the format's third way, a lone CR, is used by no server and not read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from terminal.errors import StreamFailed
from terminal.sanitize import one_line

Chunk = Mapping[str, Any]
LONGEST = 16 << 20  # bytes of one event; beyond, somebody is filling our memory


class Chunks:
    """One response, as it arrives. `complete` says whether the server has announced the end."""

    __slots__ = ("_data", "_kind", "_rest", "_size", "complete")

    def __init__(self) -> None:
        self._rest, self._kind, self._size = b"", b"", 0
        self._data: list[bytes] = []
        self.complete = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that these bytes complete.

        Raises:
            StreamFailed: an error event, or something that is no JSON object.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
                self._size += len(line)
            elif line in (b"", b"\r"):
                if self._data and (chunk := self._event()) is not None:
                    yield chunk
                self._kind = b""
            elif line.startswith(b"event:"):
                self._kind = line[6:].strip()
        if len(self._rest) + self._size > LONGEST:
            raise StreamFailed(f"an event of the stream is longer than {LONGEST} bytes", "event too long")

    def end(self) -> None:
        """Call when the connection has no more bytes: a silent end is not an answer."""
        if not self.complete:
            raise StreamFailed("the stream ended before the answer was complete", "stream cut short")

    def _event(self) -> Chunk | None:
        data = self._data[0].strip() if len(self._data) == 1 else b"\n".join(self._data)
        self._data, self._size = [], 0
        if self.complete or data == b"[DONE]":
            self.complete = True
            return None
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            raise StreamFailed(f"an event of the stream is no JSON object: {one_line(repr(data[:80]))}", "bad event")
        if self._kind == b"error" or chunk.get("error"):
            raise _failure(chunk)
        return chunk


def _failure(chunk: Chunk) -> StreamFailed:
    error = chunk.get("error")
    said = error if isinstance(error, dict) else {"message": error or chunk.get("message")}
    code = one_line(str(said.get("code") or said.get("type") or "unnamed"))
    message = one_line(str(said.get("message") or "no reason given"))
    return StreamFailed(f"the answer failed: {message} ({code})", f"stream error: {code}")
