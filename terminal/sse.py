"""Parses server-sent events as OpenAI-compatible servers write them: bytes in, parsed chunks out. It opens no socket.

Lines end in LF or CRLF; a lone CR, the format's third line end, is used by no server and not supported.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from terminal.errors import StreamFailed
from terminal.sanitize import one_line

StreamChunk = Mapping[str, Any]
MAX_EVENT_BYTES = 16 << 20  # a longer event would fill this client's memory


class EventParser:
    """Parses one response as it arrives. `complete`: whether the server has announced the end."""

    __slots__ = ("_data", "_kind", "_rest", "_size", "complete")

    def __init__(self) -> None:
        self._rest, self._kind, self._size = b"", b"", 0
        self._data: list[bytes] = []
        self.complete = False

    def feed(self, data: bytes) -> Iterator[StreamChunk]:
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
        if len(self._rest) + self._size > MAX_EVENT_BYTES:
            raise StreamFailed(f"an event of the stream is longer than {MAX_EVENT_BYTES} bytes", "event too long")

    def end(self) -> None:
        """Call at the end of the connection. Raises StreamFailed where the server has not announced the end."""
        if not self.complete:
            raise StreamFailed("the stream ended before the answer was complete", "stream cut short")

    def _event(self) -> StreamChunk | None:
        data = b"\n".join(self._data)
        if len(self._data) == 1:
            data = data.strip()
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


def _failure(chunk: StreamChunk) -> StreamFailed:
    error = chunk.get("error")
    fields = error if isinstance(error, dict) else {"message": error or chunk.get("message")}
    code = one_line(str(fields.get("code") or fields.get("type") or "unnamed"))
    message = one_line(str(fields.get("message") or "no reason given"))
    return StreamFailed(f"the answer failed: {message} ({code})", f"stream error: {code}")
