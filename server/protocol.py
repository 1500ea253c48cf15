"""uvicorn's h11 protocol with what it does not have: a deadline for request headers, and a short way for the chunks of
a streamed body, past ASGI's and h11's layers, which cost several times the write itself.

It knows one connection and no request.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

ANSWER = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n"
    b'{"error":{"message":"the request headers did not arrive in time","type":"invalid_request_error",'
    b'"param":null,"code":"header_timeout"}}'
)

CHUNKS = "chunks"  # of an HTTP/1.1 request's state: its `Chunks`, for a response without a content-length alone


class Chunks:
    """Writes parts of a body that has begun, between two sends of ASGI's, exactly as h11 would."""

    def __init__(self, protocol: H11Protocol) -> None:
        self._transport, self._flow = protocol.transport, protocol.flow

    @property
    def paused(self) -> bool:
        """Whether the reader is slow; ASGI's send waits for it."""
        return self._flow.write_paused

    def write(self, data: bytes) -> None:
        """Write a part, if there is anything in it and anyone to read it."""
        if data and not self._transport.is_closing():  # without data it would be the last part
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def with_header_deadline(seconds: float) -> type[asyncio.Protocol]:
    """A protocol class whose connections are closed when a request's headers take longer than `seconds`."""

    class DeadlineProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            if not self._busy():
                self._wait_for_headers()
            super().data_received(data)
            if self._busy():
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and self.cycle.scope["http_version"] == "1.1":
                # the application does not begin before the loop's next turn
                self.cycle.scope["state"].setdefault(CHUNKS, Chunks(self))

        def _busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait_for_headers(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if not self.transport.is_closing():
                self.transport.write(ANSWER)
                self.transport.close()

        def on_response_complete(self) -> None:
            # a pipelined next request may already be half here: its time starts now
            super().on_response_complete()
            if not self._busy() and self.conn.trailing_data[0]:
                self._wait_for_headers()

    return DeadlineProtocol
