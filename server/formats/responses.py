"""How /v1/responses writes an answer: one object, or the events on the way to it. It runs nothing.

The whole answer is what the events lead to: they are made either way, so that the two cannot differ.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from model.errors import InvalidRequest
from server.dialects.base import CallArguments, CallStart, Content, Piece, Reasoning
from server.errors import error_body
from server.event_loop.slices import Steps
from server.formats.base import Format, token_entry
from server.formats.items import Event, FunctionCall, Message, OutputItem, Status, Thought
from server.formats.usage import metrics_of, usage_of
from server.generation.output_processor import Delta, TokenLogprob
from server.protocols import Tokenizer
from server.requests.calls import GenerationCall
from server.requests.responses_as_chat import own_words
from server.schemas.responses import PlainFormat, ResponsesBody, SchemaFormat


class ResponsesFormat(Format):
    def __init__(self, call: GenerationCall, tokenizer: Tokenizer, body: ResponsesBody) -> None:
        self.call, self.tokenizer, self.body_asked = call, tokenizer, body
        self._key = call.id.partition("_")[2]
        self._echo = echo_of(call, body)
        self._ended: list[dict[str, Any]] = []  # items
        self._item: OutputItem | None = None  # that is being written
        self._status: Status = "in_progress"
        self._events = 0
        self._scores = Scores(tokenizer)

    def opening(self) -> Iterator[Event]:
        yield self._numbered({"type": "response.created", "response": self._response()})
        yield self._numbered({"type": "response.in_progress", "response": self._response()})

    def chunks(self, delta: Delta) -> Iterator[Event]:
        return map(self._numbered, self._told(delta))

    def closing(self) -> Iterator[Event]:
        yield self._numbered({"type": f"response.{self._status}", "response": self._response()})

    def frame(self, chunk: Event) -> bytes:
        return f"event: {chunk['type']}\ndata: ".encode() + orjson.dumps(chunk) + b"\n\n"

    def failure(self, error: Exception) -> bytes:
        said = error_body(own_words(error) if isinstance(error, InvalidRequest) else error)["error"]
        told = {"code": said["code"], "message": said["message"], "param": said["param"]}
        return self.frame(self._numbered({"type": "error", **told}))

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        for delta in deltas:
            for _ in self._told(delta):
                yield
        return self._response()

    def _numbered(self, event: Event) -> Event:
        numbered = {"type": event["type"], "sequence_number": self._events, **event}
        self._events += 1
        return numbered

    def _told(self, delta: Delta) -> Iterator[Event]:
        self._scores.push(delta.logprobs)
        for piece in delta.pieces:
            yield from self._said(piece)
        if delta.finish:
            yield from self._finished("incomplete" if delta.finish == "length" else "completed")

    def _said(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Content(text):
                yield from self._added(Message, text, self._scores.take(text, isinstance(self._item, Message)))
            case Reasoning(text):
                self._scores.take(text, isinstance(self._item, Thought))
                yield from self._added(Thought, text, [])
            case CallStart(_, name):
                yield from self._begun(FunctionCall(self._key, self._place, name))
            case CallArguments(_, text):
                assert self._item is not None  # calls do not overlap, and each has begun
                self._scores.take(text, False)
                yield self._item.add(text, [])

    def _added(self, kind: type[Message] | type[Thought], text: str, scores: list[TokenLogprob]) -> Iterator[Event]:
        if not isinstance(self._item, kind):
            yield from self._begun(kind(self._key, self._place))
        assert self._item is not None
        yield self._item.add(text, [self._entry(score) for score in scores])

    def _entry(self, score: TokenLogprob) -> orjson.Fragment:
        """Written once, for it is repeated in the events that end its text."""
        return orjson.Fragment(orjson.dumps(token_entry(self.tokenizer, score)))

    @property
    def _place(self) -> int:
        """Of an item that is yet to begin."""
        return len(self._ended) + (self._item is not None)

    def _begun(self, item: OutputItem) -> Iterator[Event]:
        yield from self._end("completed")
        self._item = item
        yield from item.begin()

    def _end(self, status: Status) -> Iterator[Event]:
        if self._item is not None:
            yield from self._item.end(status)
            self._ended.append(self._item.whole(status))
            self._item = None

    def _finished(self, status: Status) -> Iterator[Event]:
        """An answer without a word is an empty message. Of the log-probabilities that are left, those of tokens without
        text belong to the last one; the others wrote marks."""
        rest = [score for score in self._scores.rest() if not self.tokenizer.token_bytes(score.token)]
        if rest and isinstance(self._item, Message):
            yield from self._added(Message, "", rest)
        if not (self._item or self._ended):
            yield from self._begun(Message(self._key, 0))
        yield from self._end(status)
        self._status = status

    def _response(self) -> dict[str, Any]:
        ended = self._status != "in_progress"
        return {
            "id": self.call.id,
            "object": "response",
            "created_at": self.call.created,
            "status": self._status,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            **self._echo,
            "output": list(self._ended),
            "usage": usage_of_response(self.call) if ended else None,
            **({"metrics": metrics_of(self.call)} if ended else {}),
        }


class Scores:
    """Log-probabilities that wait for their text: whose a token was is known when its text is shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[tuple[bytes, TokenLogprob]] = []

    def push(self, entries: Iterable[TokenLogprob]) -> None:
        self._held += [(self._tokenizer.token_bytes(entry.token), entry) for entry in entries]

    def take(self, text: str, follows: bool) -> list[TokenLogprob]:
        """The tokens that wrote `text`. Those before it wrote marks, and are dropped; those after it wait on.

        `follows`: the text goes on with what was taken last, so that no mark need be in between. Otherwise, of two
        places where the text could be, it is the last: marks come before.
        """
        if not self._held:
            return []
        data, wanted = b"".join(own for own, _ in self._held), text.encode("utf-8", "replace")
        start = 0 if follows and data.startswith(wanted) else data.rfind(wanted)
        if start < 0:  # a tokenizer that does not write its bytes as they are
            return self.rest()
        taken, kept, at = [], [], 0
        for own, entry in self._held:
            if at >= start + len(wanted):
                kept.append((own, entry))
            elif at + len(own) > start or not start:
                taken.append(entry)
            at += len(own)
        self._held = kept
        return taken

    def rest(self) -> list[TokenLogprob]:
        held, self._held = self._held, []
        return [entry for _, entry in held]


def echo_of(call: GenerationCall, body: ResponsesBody) -> dict[str, Any]:
    """What a response repeats of its request, with the values that ran."""
    choice, format = body.tool_choice, body.text.format or PlainFormat()
    verbosity = {"verbosity": body.text.verbosity} if body.text.verbosity else {}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "model": call.model,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": call.body.temperature,
        "text": {"format": _format(format)} | verbosity,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": call.body.top_p,
        "truncation": body.truncation,
        "user": body.user,
    }


def _format(format: PlainFormat | SchemaFormat) -> dict[str, Any]:
    return format.model_dump(by_alias=True, exclude_none=isinstance(format, PlainFormat))


def usage_of_response(call: GenerationCall) -> dict[str, Any]:
    """A chat's figures by their names here. Nothing is billed for writing to the cache."""
    usage = usage_of(call)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
        "num_experts": usage["num_experts"],
        "routed_pairs": usage["routed_pairs"],
        "routed_pairs_trained": usage["routed_pairs_trained"],
    }
