"""How /v1/responses writes an answer: as one object, or as the events that lead to it.

The whole answer is built from the same events as a stream, so that the two cannot differ.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from engine.types import Routes
from model.errors import InvalidRequest
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.errors import error_body
from server.event_loop.slices import Steps
from server.formats.base import Format, token_entry
from server.formats.items import Event, FunctionCallItem, ItemStatus, MessageItem, OutputItem, ReasoningItem
from server.formats.routed_experts import routed_experts_of
from server.formats.usage import metrics_of, usage_of
from server.generation.output_processor import Delta, TokenLogprob
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall
from server.requests.responses_as_chat import RESPONSE_NAMES
from server.schemas.responses import PlainFormat, ResponsesBody, SchemaFormat


class ResponsesFormat(Format):
    """`response` objects, and the events that lead to them."""

    def __init__(self, call: GenerationCall, tokenizer: TokenizerProtocol, body: ResponsesBody) -> None:
        self.call, self.tokenizer, self.request_body = call, tokenizer, body
        self._key = call.id.partition("_")[2]
        self._echo = request_echo(call, body)
        self._finished_items: list[dict[str, Any]] = []
        self._item: OutputItem | None = None  # the one that is being written
        self._status: ItemStatus = "in_progress"
        self._events = 0
        self._logprobs = PendingLogprobs(tokenizer)
        self._routes: Routes | None = None  # of the answer that has ended

    def opening(self) -> Iterator[Event]:
        yield self._numbered({"type": "response.created", "response": self._response()})
        yield self._numbered({"type": "response.in_progress", "response": self._response()})

    def chunks(self, delta: Delta) -> Iterator[Event]:
        return map(self._numbered, self._delta_events(delta))

    def closing(self) -> Iterator[Event]:
        yield self._numbered({"type": f"response.{self._status}", "response": self._response()})

    def frame(self, chunk: Event) -> bytes:
        return f"event: {chunk['type']}\ndata: ".encode() + orjson.dumps(chunk) + b"\n\n"

    def failure(self, error: Exception) -> bytes:
        if isinstance(error, InvalidRequest):
            error = RESPONSE_NAMES.renamed(error)
        fields = error_body(error)["error"]
        event = {"type": "error", "code": fields["code"], "message": fields["message"], "param": fields["param"]}
        return self.frame(self._numbered(event))

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        for delta in deltas:
            for _ in self._delta_events(delta):
                yield
        return self._response()

    def _numbered(self, event: Event) -> Event:
        numbered = {"type": event["type"], "sequence_number": self._events, **event}
        self._events += 1
        return numbered

    def _delta_events(self, delta: Delta) -> Iterator[Event]:
        self._logprobs.push(delta.logprobs)
        for part in delta.parts:
            yield from self._part_events(part)
        if delta.finish:
            self._routes = delta.routes
            yield from self._finish("incomplete" if delta.finish == "length" else "completed")

    def _part_events(self, part: DeltaPart) -> Iterator[Event]:
        match part:
            case Content(text):
                logprobs = self._logprobs.take(text, isinstance(self._item, MessageItem))
                yield from self._text_events(MessageItem, text, logprobs)
            case Reasoning(text):
                self._logprobs.take(text, isinstance(self._item, ReasoningItem))
                yield from self._text_events(ReasoningItem, text, [])
            case CallStart(_, name):
                yield from self._begin(FunctionCallItem(self._key, self._next_index, name))
            case CallArguments(_, text):
                assert self._item is not None  # calls do not overlap, and each has begun
                self._logprobs.take(text, False)
                yield self._item.add(text, [])

    def _text_events(
        self, item_type: type[MessageItem] | type[ReasoningItem], text: str, logprobs: list[TokenLogprob]
    ) -> Iterator[Event]:
        """Add text to the current item, which is a new one where that is of another type."""
        if not isinstance(self._item, item_type):
            yield from self._begin(item_type(self._key, self._next_index))
        assert self._item is not None
        yield self._item.add(text, [self._entry(logprob) for logprob in logprobs])

    def _entry(self, logprob: TokenLogprob) -> orjson.Fragment:
        """A log-probability, serialised once: the events that end its text repeat it."""
        return orjson.Fragment(orjson.dumps(token_entry(self.tokenizer, logprob)))

    @property
    def _next_index(self) -> int:
        """The output index of the next item to begin."""
        return len(self._finished_items) + (self._item is not None)

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        """End the current item and begin `item`."""
        yield from self._end("completed")
        self._item = item
        yield from item.begin()

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        if self._item is not None:
            yield from self._item.end(status)
            self._finished_items.append(self._item.snapshot(status))
            self._item = None

    def _finish(self, status: ItemStatus) -> Iterator[Event]:
        """End the answer; one without text is an empty message.

        Of the log-probabilities that are left, those of tokens without text belong to the last item; the others are of
        delimiters.
        """
        rest = [logprob for logprob in self._logprobs.take_rest() if not self.tokenizer.token_bytes(logprob.token)]
        if rest and isinstance(self._item, MessageItem):
            yield from self._text_events(MessageItem, "", rest)
        if not (self._item or self._finished_items):
            yield from self._begin(MessageItem(self._key, 0))
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
            "output": list(self._finished_items),
            "usage": usage_of_response(self.call) if ended else None,
            **({"metrics": metrics_of(self.call)} if ended else {}),
            **routed_experts_of(self._routes),
        }


class PendingLogprobs:
    """Log-probabilities of tokens whose text has not been shown: only then is known which item a token belongs to."""

    def __init__(self, tokenizer: TokenizerProtocol) -> None:
        self._tokenizer = tokenizer
        self._held: list[tuple[bytes, TokenLogprob]] = []

    def push(self, entries: Iterable[TokenLogprob]) -> None:
        self._held += [(self._tokenizer.token_bytes(entry.token), entry) for entry in entries]

    def take(self, text: str, follows: bool) -> list[TokenLogprob]:
        """The tokens of `text`. Those before it are of delimiters and are dropped; those after it are kept.

        `follows`: the text continues what was taken last, so that no delimiter need be in between. Otherwise, where
        the text occurs twice, its last occurrence is meant: delimiters come before it.
        """
        if not self._held:
            return []
        data = b"".join(own for own, _ in self._held)
        wanted = text.encode("utf-8", "replace")
        start = 0 if follows and data.startswith(wanted) else data.rfind(wanted)
        if start < 0:
            return self._take_around_delimiters(wanted)
        taken, kept, at = [], [], 0
        for own, entry in self._held:
            if at >= start + len(wanted):
                kept.append((own, entry))
            elif at + len(own) > start or not start:
                taken.append(entry)
            at += len(own)
        self._held = kept
        return taken

    def _take_around_delimiters(self, wanted: bytes) -> list[TokenLogprob]:
        """The tokens of a text that had delimiters inside, which are dropped: the last tokens that spell the text.

        All that are held, where none do: a tokenizer that does not write its bytes as they are.
        """
        taken: list[TokenLogprob] = []
        kept: list[tuple[bytes, TokenLogprob]] = []
        for own, entry in reversed(self._held):
            if own and wanted.endswith(own):
                wanted = wanted[: -len(own)]
                taken.append(entry)
            elif not taken:
                kept.append((own, entry))
        if wanted:
            return self.take_rest()
        self._held = kept[::-1]
        return taken[::-1]

    def take_rest(self) -> list[TokenLogprob]:
        held, self._held = self._held, []
        return [entry for _, entry in held]


def request_echo(call: GenerationCall, body: ResponsesBody) -> dict[str, Any]:
    """The fields of the request that a response repeats, with the values that were used."""
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
    """The usage of a chat under the names of this API. Nothing is billed for writing to the cache."""
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
        **{name: usage[name] for name in ("experts", "cascade", "cost", "cost_details") if name in usage},
    }
