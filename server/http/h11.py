"""uvicorn's h11 protocol with limits on connections and request heads, and with refusals in OpenAI's shape.

A close lets an early answer arrive. The chunks of a streamed body have a direct path past ASGI and h11, which cost
several times the write itself. It handles one connection, and does not depend on requests.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from model.errors import MoedialError
from server.errors import BadHttp, HeadersTooLarge, HeaderTimeout, TooManyConnections
from server.http.error_responses import error_response
from server.http.readers import StalledReaderWatch

CHUNK_WRITER = (
    "chunks"  # in an HTTP/1.1 request's state: its `ChunkWriter`, for responses without a content-length only
)
RESERVED = "reserved"  # in a request's state: its connection is beyond the limit, so that only probes are answered
RESERVED_CONNECTIONS = 16  # beyond the limit, for probes
RESERVED_HEADER_SECONDS = 2.0  # for the headers of a request on one of these
MIN_IDLE_SECONDS = 5.0  # between two requests, after which a connection may be closed in favour of a new one
LINGER_BYTES = 256 << 20  # of a body that are read and dropped after its answer, so that the answer arrives
LINGER_SECONDS = 10.0


class ChunkWriter:
    """Writes chunks of a body that has begun, between two ASGI sends, exactly as h11 would."""

    def __init__(self, protocol: H11Protocol) -> None:
        self._transport, self._flow = protocol.transport, protocol.flow

    @property
    def paused(self) -> bool:
        """Whether the client reads slowly, so that ASGI's send waits."""
        return self._flow.write_paused

    def write(self, data: bytes) -> None:
        """Write a chunk, unless it is empty or the connection is closing."""
        if data and not self._transport.is_closing():  # an empty chunk would end the body
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    max_connections: int
    max_lingering: int  # further connections that stay until their last answer has been read
    max_header_bytes: int
    header_timeout: float  # seconds
    on_refused: Callable[[MoedialError], None]  # called with each refusal that is sent without the application


class BoundedParser(h11.Connection):
    """h11's parser with an exact limit on request heads, without ambiguous framing, and with errors of this server.

    h11 itself compares only incomplete heads with the limit: one that arrives as a whole passes at any size.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self.max_header_bytes = max_header_bytes
        self.error: MoedialError | None = None  # why the last `next_event` raised

    def next_event(self) -> Any:
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event, before - len(self.trailing_data[0]))
        except h11.RemoteProtocolError as error:
            self.error = self._error_of(error)
            raise
        return event

    def _check(self, request: h11.Request, size: int) -> None:
        if size > self.max_header_bytes:
            raise h11.RemoteProtocolError("too long", error_status_hint=431)
        names = {name for name, _ in request.headers}
        if {b"content-length", b"transfer-encoding"} <= names:  # two readers could see two different bodies
            raise h11.RemoteProtocolError("content-length and transfer-encoding together")
        if b"transfer-encoding" in names and request.http_version < b"1.1":  # an HTTP/1.0 proxy would not see the end
            raise h11.RemoteProtocolError("transfer-encoding in HTTP/1.0")

    def _error_of(self, error: h11.RemoteProtocolError) -> MoedialError:
        if error.error_status_hint == 431:
            return HeadersTooLarge(
                f"the request line and headers have more than {self.max_header_bytes} bytes, which is the limit"
            )
        return BadHttp(f"the request is not valid HTTP/1.1: {error!s:.200}")


class BoundedProtocol(H11Protocol):
    """One connection. `protocol_of` makes the class with limits that uvicorn is given."""

    limits: ClassVar[ConnectionLimits]
    lingering: ClassVar[set["BoundedProtocol"]]  # those that stay until their last answer has been read
    idle: ClassVar[dict["BoundedProtocol", float]]  # since when each waits for its next request, the longest first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: BoundedParser = BoundedParser(self.limits.max_header_bytes)
        self._deadline: asyncio.TimerHandle | None = None
        self._reserved = False
        self._to_drop: int | None = None  # bytes that may still arrive while a lingering connection closes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reader = StalledReaderWatch(transport, self.loop)
        limit = self.limits.max_connections
        if self._open() > limit:
            self._close_idle()
        count = self._open()
        self._reserved = count > limit
        if count <= limit + RESERVED_CONNECTIONS:
            self._wait_for_headers()
            return
        self._refuse(TooManyConnections(f"the server has {limit} connections, which is its limit; try again later"))

    def _open(self) -> int:
        """How many connections there are, without lingering ones."""
        return len(self.connections) - len(self.lingering)

    def _close_idle(self) -> None:
        """Close the connection that has waited longest for its next request, if that is long enough."""
        longest, since = next(iter(self.idle.items()), (None, 0.0))
        if longest is not None and self.loop.time() - since >= MIN_IDLE_SECONDS:
            del self.idle[longest]
            self.connections.discard(longest)
            longest.timeout_keep_alive_handler()

    def data_received(self, data: bytes) -> None:
        if self._to_drop is not None:
            self._drop(len(data))
            return
        self.idle.pop(self, None)
        if not self._busy():
            self._wait_for_headers()
        super().data_received(data)
        if self._busy():
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self.idle.pop(self, None)
        self.lingering.discard(self)
        self._stop_waiting()
        self._reader.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._reader.stop()

    def eof_received(self) -> None:
        super().eof_received()
        self._reader.start()  # the transport closes by itself

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._reader.start()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and self.cycle.transport is self.transport:
            self._begin()

    def _begin(self) -> None:
        """Prepare a request whose head is complete; the application starts in the loop's next iteration."""
        state: dict[str, Any] = self.cycle.scope["state"]
        self.cycle.transport = AnswerTransport(self)  # type: ignore[assignment]
        if self.cycle.scope["http_version"] == "1.1":
            state[CHUNK_WRITER] = ChunkWriter(self)
        if self._reserved:
            state[RESERVED] = self.limits.max_connections
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        if self._to_drop is not None:
            self.server_state.total_requests += 1
            return
        # a part of a pipelined next request may have arrived: its time starts now
        super().on_response_complete()
        if self._busy() or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._wait_for_headers()
        else:
            self.idle[self] = self.loop.time()

    def shutdown(self) -> None:
        if self._to_drop is not None:
            self.transport.close()
        else:
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: an upgrade is optional, and clients could fill the log with advice to install packages."""

    def send_400_response(self, msg: str) -> None:
        """Refuse the request; uvicorn calls this when h11 cannot parse it."""
        self._refuse(self.conn.error or BadHttp(msg))

    def close_after_answer(self) -> None:
        """Close after a response. While the request's body is still arriving, a plain close would reset the connection,
        and the client would lose the answer."""
        if self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            self._linger()
        else:
            self._close()

    def _close(self) -> None:
        """Close as soon as the client has read what was written."""
        self.transport.close()
        self._reader.start()

    def _refuse(self, error: MoedialError) -> None:
        """Send a refusal without the application, and close the connection."""
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self.limits.on_refused(error)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # another answer has begun
            self._close()
            return
        if self._busy():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(raw_response(error))
        self._linger()

    def _linger(self) -> None:
        """Send the end of the stream, and close once the client has, or has sent too much or taken too long."""
        self._unset_keepalive_if_required()
        self._to_drop = LINGER_BYTES
        self.lingering.add(self)
        if len(self.lingering) > self.limits.max_lingering:  # the answer may be lost: files cannot stay open for all
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self._close)

    def _drop(self, count: int) -> None:
        assert self._to_drop is not None
        self._to_drop -= count
        if self._to_drop < 0:
            self._close()

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        if self._deadline is None:
            seconds = self.limits.header_timeout
            if self._reserved:
                seconds = min(seconds, RESERVED_HEADER_SECONDS)
            self._deadline = self.loop.call_later(seconds, self._late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(HeaderTimeout("the request headers did not arrive in time"))


class AnswerTransport:
    """The transport for uvicorn's response, whose close lets the answer arrive."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing
        self.close = protocol.close_after_answer


def raw_response(error: MoedialError) -> bytes:
    """The bytes of a refusal on a connection without a request."""
    response = error_response(error)
    lines = [b"HTTP/1.1 %d %b" % (response.status_code, HTTPStatus(response.status_code).phrase.encode())]
    lines += [b"%b: %b" % header for header in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def protocol_of(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The class of connections with these limits."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits, "lingering": set(), "idle": {}})
