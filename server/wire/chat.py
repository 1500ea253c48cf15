"""How /v1/chat/completions writes an answer: one message per choice, or chunks of it. It runs nothing."""

from collections.abc import Iterable, Iterator
from typing import Any

from server.calls import Call
from server.seams import Tokenizer
from server.transcript import Delta, TokenLogprob
from server.wire.answers import joined, token_text
from server.wire.usage import metrics_of, usage_of


class ChatFormat:
    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self.call, self.tokenizer = call, tokenizer

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role comes once and first: repeated in later deltas it corrupts LangChain's messages."""
        for index in range(self.call.body.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.text or delta.logprobs:
            yield self._chunk(delta.index, {"content": delta.text}, self._logprobs(delta.logprobs))
        if delta.finish:
            yield self._chunk(delta.index, {}, None, delta.finish)

    def usage(self) -> dict[str, Any]:
        chunk = self._object("chat.completion.chunk", [])
        return chunk | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> dict[str, Any]:
        choices = [self._choice(joined(deltas, index)) for index in range(self.call.body.n)]
        answer = self._object("chat.completion", choices)
        return answer | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        call = self.call
        return {"id": call.id, "object": kind, "created": call.created, "model": call.model, "choices": choices}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def _choice(self, answer: Delta) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish,
        }

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if self.call.body.alternatives is None:
            return None
        content = [
            {
                **self._entry(entry.token, entry.value),
                "top_logprobs": [self._entry(id, value) for id, value in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, value: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(id)
        return {"token": token_text(data), "logprob": value, "bytes": list(data)}
