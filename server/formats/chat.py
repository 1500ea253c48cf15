"""How /v1/chat/completions writes an answer: one message per choice, or chunks of it."""

from collections.abc import Iterable, Iterator
from typing import Any

from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Reasoning
from server.event_loop.slices import Steps, at_once, long_list
from server.formats.base import (
    DataFormat,
    calls_of,
    content_of,
    merge_deltas,
    prompt_entries,
    reasoning_of,
    token_entry,
)
from server.formats.routed_experts import routed_experts_of
from server.formats.usage import RunningUsage, metrics_of, usage_of, usage_wanted
from server.generation.output_processor import Delta, TokenLogprob
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall


class ChatFormat(DataFormat):
    """`chat.completion` objects and their chunks."""

    def __init__(self, call: GenerationCall, tokenizer: TokenizerProtocol) -> None:
        self._usage = RunningUsage(call)
        super().__init__(uniform=not self._usage.wanted)
        self.call, self.tokenizer = call, tokenizer
        self._head = {"id": call.id, "object": "chat.completion.chunk", "created": call.created, "model": call.model}
        self._head["system_fingerprint"] = call.fingerprint

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role comes once and first: LangChain's messages are corrupted where later deltas repeat it."""
        for index in range(self.call.body.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A chunk per part, the log-probabilities with the first, then a chunk with the finish reason."""
        self._usage.update(delta)
        logprobs = at_once(self._logprobs(delta.logprobs))
        fields = [self._part(delta.index, part) for part in delta.parts]
        if not fields and delta.logprobs:
            fields = [{"content": ""}]
        for part in fields:
            yield self._chunk(delta.index, part, logprobs)
            logprobs = None
        if delta.finish:
            ended = self._chunk(delta.index, {}, None, delta.finish)
            ended["choices"][0] |= {"stop_reason": delta.stop_reason, **routed_experts_of(delta.routes)}
            yield ended

    def closing(self) -> Iterator[dict[str, Any]]:
        if usage_wanted(self.call):
            yield {**self._head, "choices": [], "usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        answers = yield from merge_deltas(deltas)
        choices = []
        for index in range(self.call.body.n):
            choices.append((yield from self._choice(answers[index])))
        answer = {**self._head, "object": "chat.completion", "choices": choices}
        if (listed := self.call.body.prompt_logprobs) is not None:
            prompt, logprobs = self.call.prompts[0], answers[0].prompt or ()
            answer["prompt_logprobs"] = yield from prompt_entries(self.tokenizer, prompt, logprobs, listed)
        return answer | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _part(self, choice: int, part: DeltaPart) -> dict[str, Any]:
        """The fields that one part adds to a chunk's delta."""
        match part:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStart(index, name):
                call = {"index": index, "id": self._id(choice, index), "type": "function"}
                return {"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _id(self, choice: int, index: int) -> str:
        """A tool call's id: the same in a stream and in a whole answer, and unique, as the generation call's id is."""
        return f"call_{self.call.id.rpartition('-')[2]}{choice:x}{index:03x}"

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice], **self._usage.fields()}

    def _choice(self, answer: Delta) -> Steps[dict[str, Any]]:
        parsed = enumerate(calls_of(answer.parts))
        calls = [self._call(answer.index, index, *call) for index, call in parsed]
        content = content_of(answer.parts)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if reasoning := reasoning_of(answer.parts):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = yield from self._logprobs(answer.logprobs)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
            **routed_experts_of(answer.routes),
        }

    def _call(self, choice: int, index: int, name: str, arguments: str) -> dict[str, Any]:
        return {
            "id": self._id(choice, index),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> Steps[dict[str, Any] | None]:
        if self.call.body.alternatives is None:
            return None
        content = yield from long_list(token_entry(self.tokenizer, entry) for entry in entries)
        return {"content": content, "refusal": None}
