"""How /v1/messages writes an answer: as one message of content blocks, or as the events that lead to it.

The whole answer is built from the same events as a stream, so that the two cannot differ.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from model.errors import InvalidRequest
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.event_loop.slices import Steps
from server.formats.base import Format, arguments_object
from server.formats.errors import MESSAGES_PATH, error_for
from server.formats.routed_experts import routed_experts_of
from server.formats.usage import metrics_of, own_fields, usage_of
from server.generation.output_processor import Delta
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall
from server.requests.messages_as_chat import MESSAGES_NAMES
from server.schemas.messages import MessagesBody

Event = dict[str, Any]


class AnswerBlock:
    """One content block while it is written. `empty` is the block before its first delta."""

    def __init__(self, index: int, empty: dict[str, Any], delta_type: str, delta_field: str) -> None:
        self.index, self.kind = index, empty["type"]
        self._empty, self._delta_type, self._delta_field = empty, delta_type, delta_field
        self._texts: list[str] = []

    def begin(self) -> Event:
        return {"type": "content_block_start", "index": self.index, "content_block": self._empty}

    def add(self, text: str) -> Event:
        """Add text; returns its event."""
        self._texts.append(text)
        delta = {"type": self._delta_type, self._delta_field: text}
        return {"type": "content_block_delta", "index": self.index, "delta": delta}

    def end(self) -> Event:
        return {"type": "content_block_stop", "index": self.index}

    def whole(self) -> dict[str, Any]:
        """The block as a message has it."""
        text = "".join(self._texts)
        return self._empty | ({"input": arguments_object(text)} if self.kind == "tool_use" else {self.kind: text})


class MessagesFormat(Format):
    """`message` objects, and the events that lead to them."""

    def __init__(self, call: GenerationCall, tokenizer: TokenizerProtocol, body: MessagesBody) -> None:
        self.call, self.request_body = call, body
        self._key = call.id.partition("_")[2]
        self._finished: list[dict[str, Any]] = []
        self._block: AnswerBlock | None = None  # the one that is being written
        self._end: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        self._routes: dict[str, Any] = {}

    @property
    def heartbeat(self) -> bytes:
        return self.frame({"type": "ping"})

    def opening(self) -> Iterator[Event]:
        yield {"type": "message_start", "message": self._message()}
        yield {"type": "ping"}

    def chunks(self, delta: Delta) -> Iterator[Event]:
        for part in delta.parts:
            yield from self._part_events(part)
        if delta.finish:
            yield from self._end_block()
            self._end, self._routes = self._ended(delta), routed_experts_of(delta.routes)

    def closing(self) -> Iterator[Event]:
        measured = {"usage": usage_of_message(self.call), "metrics": metrics_of(self.call), **self._routes}
        yield {"type": "message_delta", "delta": self._end, **measured}
        yield {"type": "message_stop"}

    def frame(self, chunk: Event) -> bytes:
        return f"event: {chunk['type']}\ndata: ".encode() + orjson.dumps(chunk) + b"\n\n"

    def failure(self, error: Exception) -> bytes:
        if isinstance(error, InvalidRequest):
            error = MESSAGES_NAMES.renamed(error)
        return self.frame(error_for(MESSAGES_PATH, error))

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        for delta in deltas:
            for _ in self.chunks(delta):
                yield
        return self._message() | {"metrics": metrics_of(self.call), **self._routes}

    def _part_events(self, part: DeltaPart) -> Iterator[Event]:
        match part:
            case Content(text):
                yield from self._text_events({"type": "text", "text": ""}, text)
            case Reasoning(text):
                yield from self._text_events({"type": "thinking", "thinking": "", "signature": ""}, text)
            case CallStart(index, name):
                called = {"type": "tool_use", "id": f"toolu_{self._key}{index:03x}", "name": name, "input": {}}
                yield from self._begin(AnswerBlock(self._next_index, called, "input_json_delta", "partial_json"))
            case CallArguments(_, text):
                assert self._block is not None  # calls do not overlap, and each has begun
                yield self._block.add(text)

    def _text_events(self, empty: dict[str, Any], text: str) -> Iterator[Event]:
        """Add text to the current block, which is a new one where that is of another kind."""
        kind = empty["type"]
        if self._block is None or self._block.kind != kind:
            yield from self._begin(AnswerBlock(self._next_index, empty, f"{kind}_delta", kind))
        assert self._block is not None
        yield self._block.add(text)

    @property
    def _next_index(self) -> int:
        return len(self._finished) + (self._block is not None)

    def _begin(self, block: AnswerBlock) -> Iterator[Event]:
        yield from self._end_block()
        self._block = block
        yield block.begin()

    def _end_block(self) -> Iterator[Event]:
        if self._block is not None:
            yield self._block.end()
            self._finished.append(self._block.whole())
            self._block = None

    def _ended(self, delta: Delta) -> dict[str, str | None]:
        """Why the answer ended. One that filled the context before its own limit says so."""
        reason, stop = "end_turn", None
        if delta.finish == "tool_calls":
            reason = "tool_use"
        elif delta.finish == "length":
            filled = delta.tokens < self.request_body.max_tokens
            reason = "model_context_window_exceeded" if filled else "max_tokens"
        elif isinstance(delta.stop_reason, str):
            reason, stop = "stop_sequence", delta.stop_reason
        return {"stop_reason": reason, "stop_sequence": stop}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.call.id,
            "type": "message",
            "role": "assistant",
            "model": self.call.model,
            "content": list(self._finished),
            **self._end,
            "usage": usage_of_message(self.call),
        }


def usage_of_message(call: GenerationCall) -> dict[str, Any]:
    """The usage of a chat under the names of this API, in which cached tokens are counted apart."""
    usage = usage_of(call)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        **own_fields(usage),
    }
