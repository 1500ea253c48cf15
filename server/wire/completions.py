"""How /v1/completions writes an answer: `text_completion` objects, whole or in chunks. It runs nothing."""

from collections.abc import Iterable, Iterator
from typing import Any

from server.calls import Call
from server.schemas import CompletionBody
from server.seams import Tokenizer
from server.transcript import Delta, TokenLogprob
from server.wire.answers import joined, token_text
from server.wire.usage import metrics_of, usage_of


class CompletionFormat:
    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        assert isinstance(call.body, CompletionBody)
        self.call, self.tokenizer, self.choices = call, tokenizer, call.body.n * len(call.prompts)
        self.echoes = self._echoes(call.body.prompt) if call.body.echo else [""] * len(call.prompts)

    def _echoes(self, prompt: Any) -> list[str]:
        """A text is echoed as it was typed, ids as they decode."""
        typed = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        pairs = zip(typed, self.call.prompts, strict=True)
        return [text if isinstance(text, str) else self.tokenizer.decode(ids) for text, ids in pairs]

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self.choices):
            if echo := self.echoes[index // self.call.body.n]:
                yield self._object([self._choice(Delta(index, echo))])

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.text or delta.logprobs:
            yield self._object([self._choice(Delta(delta.index, delta.text, delta.logprobs))])
        if delta.finish:
            yield self._object([self._choice(Delta(delta.index, "", (), delta.finish))])

    def usage(self) -> dict[str, Any]:
        return self._object([]) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> dict[str, Any]:
        choices = [self._choice(joined(deltas, index)) for index in range(self.choices)]
        for choice in choices:
            choice["text"] = self.echoes[choice["index"] // self.call.body.n] + choice["text"]
        return self._object(choices) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        call = self.call
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "choices": choices,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        offset = len(self.echoes[delta.index // self.call.body.n])
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.logprobs, offset) if delta.logprobs else None,
            "finish_reason": delta.finish,
        }

    def _logprobs(self, entries: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        entries = tuple(entries)
        tops = [{**{self._text(id): v for id, v in e.top}, self._text(e.token): e.value} for e in entries]
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.value for entry in entries],
            "top_logprobs": tops,
            "text_offset": [offset + entry.offset for entry in entries],
        }

    def _text(self, id: int) -> str:
        return token_text(self.tokenizer.token_bytes(id))
