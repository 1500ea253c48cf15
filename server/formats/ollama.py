"""How Ollama's API writes an answer: as one object, or as one object a line.

A call is written whole, as Ollama does: its clients put no parts of arguments together.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import orjson

from model.errors import InvalidRequest
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.event_loop.slices import Steps, at_once, long_list
from server.formats.base import (
    Format,
    arguments_object,
    calls_of,
    content_of,
    merge_deltas,
    reasoning_of,
    token_entry,
)
from server.formats.errors import OLLAMA_PATH, error_for
from server.formats.usage import metrics_of, own_fields, usage_of
from server.generation.output_processor import Delta
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall
from server.requests.ollama_as_chat import OLLAMA_NAMES
from server.schemas.ollama import OllamaBody, OllamaChatBody

NS = 1e9


class OllamaFormat(Format):
    """Answers to /api/chat, which have a `message`, and to /api/generate, which have a `response`."""

    media_type = "application/x-ndjson"

    def __init__(self, call: GenerationCall, tokenizer: TokenizerProtocol, body: OllamaBody) -> None:
        self.call, self.tokenizer, self.request_body = call, tokenizer, body
        self._in_message = isinstance(body, OllamaChatBody)
        self._call: tuple[int, str, list[str]] | None = None  # index, name and arguments of the one being written
        self._done_reason = "stop"

    @property
    def heartbeat(self) -> bytes:
        return self.frame(self._chunk(""))

    def opening(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A chunk per part, the log-probabilities with the first; a call's when the next part, or the end, comes."""
        logprobs = at_once(self._logprobs(delta))
        parts = [chunk for part in delta.parts for chunk in self._part(part)]
        if delta.finish:
            parts += self._whole_call()
            self._done_reason = "length" if delta.finish == "length" else "stop"
        if logprobs and not parts:
            parts = [self._chunk("")]
        for chunk in parts:
            yield chunk | logprobs
            logprobs = {}

    def closing(self) -> Iterator[dict[str, Any]]:
        yield self._chunk("") | self._done()

    def frame(self, chunk: dict[str, Any]) -> bytes:
        return orjson.dumps(chunk) + b"\n"

    def failure(self, error: Exception) -> bytes:
        if isinstance(error, InvalidRequest):
            error = OLLAMA_NAMES.renamed(error)
        return self.frame(error_for(OLLAMA_PATH, error))

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        answer = (yield from merge_deltas(deltas))[0]
        self._done_reason = "length" if answer.finish == "length" else "stop"
        calls = [self._written(index, *call) for index, call in enumerate(calls_of(answer.parts))]
        logprobs = yield from self._logprobs(answer)
        chunk = self._chunk(content_of(answer.parts), reasoning_of(answer.parts), calls)
        return chunk | logprobs | self._done()

    def _part(self, part: DeltaPart) -> Iterator[dict[str, Any]]:
        match part:
            case CallArguments(_, text):
                assert self._call is not None  # calls do not overlap, and each has begun
                self._call[2].append(text)
                return
            case CallStart(index, name):
                yield from self._whole_call()
                self._call = index, name, []
            case Content(text):
                yield from self._whole_call()
                yield self._chunk(text)
            case Reasoning(text):
                yield from self._whole_call()
                yield self._chunk("", text)

    def _whole_call(self) -> Iterator[dict[str, Any]]:
        """The chunk of the call that has ended, if there is one."""
        if self._call is not None:
            index, name, texts = self._call
            self._call = None
            yield self._chunk("", "", [self._written(index, name, "".join(texts))])

    def _written(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        key = self.call.id.rpartition("-")[2]
        function = {"index": index, "name": name, "arguments": arguments_object(arguments)}
        return {"id": f"call_{key}{index:03x}", "function": function}

    def _chunk(self, text: str, thinking: str = "", calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        head = {"model": self.request_body.model or self.call.model, "created_at": timestamp(time.time())}
        if not self._in_message:
            return head | {"response": text} | thought | {"done": False}
        called = {"tool_calls": calls} if calls else {}
        return head | {"message": {"role": "assistant", "content": text} | thought | called, "done": False}

    def _logprobs(self, delta: Delta) -> Steps[dict[str, Any]]:
        if self.call.body.alternatives is None or not delta.logprobs:
            return {}
        entries = yield from long_list(token_entry(self.tokenizer, entry) for entry in delta.logprobs)
        return {"logprobs": entries}

    def _done(self) -> dict[str, Any]:
        """The figures of the last object: durations in nanoseconds, and what the other APIs have in their usage."""
        usage, timelines = usage_of(self.call), [run.timeline for run in self.call.generation.runs]
        return {
            "done": True,
            "done_reason": self._done_reason,
            "total_duration": _ns(time.monotonic() - self.call.arrived),
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": _ns(sum(timeline.prefill_s for timeline in timelines)),
            "eval_count": usage["completion_tokens"],
            "eval_duration": _ns(sum(timeline.decode_s for timeline in timelines)),
            **own_fields(usage),
            "metrics": metrics_of(self.call),
        }


def loaded(body: OllamaBody, served: str) -> dict[str, Any]:
    """The answer to a body without a prompt, by which clients load a model, or unload it: it stays loaded."""
    shown = {"message": {"role": "assistant", "content": ""}} if isinstance(body, OllamaChatBody) else {"response": ""}
    head = {"model": body.model or served, "created_at": timestamp(time.time())}
    return head | shown | {"done": True, "done_reason": "unload" if body.keep_alive in (0, "0") else "load"}


def timestamp(seconds: float) -> str:
    """A moment as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    """At least one: clients divide by it."""
    return max(1, round(seconds * NS))
