"""How /v1/completions writes an answer: `text_completion` objects, whole or in chunks. It runs nothing."""

from collections.abc import Iterator
from typing import Any

from engine.types import Logprob
from server.bodies.completions import CompletionBody
from server.calls import Call
from server.generation import Sequence
from server.seams import Tokenizer
from server.transcript import Delta, TokenLogprob, WireFinish, entry_of
from server.wire.answers import DataFormat, joined, token_text
from server.wire.usage import metrics_of, usage_of, usage_wanted

Scored = TokenLogprob | int  # of the first token of a prompt, only the token


class CompletionFormat(DataFormat):
    """Sequences are numbered prompt by prompt; so are choices, unless `best_of` leaves some out."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        super().__init__()
        assert isinstance(call.body, CompletionBody)
        self.call, self.tokenizer, self.own = call, tokenizer, call.body
        self.echoes = self._echoes(call.body.prompt) if call.body.echo else [""] * len(call.prompts)
        self._head = {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}

    def _echoes(self, prompt: Any) -> list[str]:
        """A text is echoed as it was typed, ids as they decode."""
        typed = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        pairs = zip(typed, self.call.prompts, strict=True)
        return [text if isinstance(text, str) else self.tokenizer.decode(ids) for text, ids in pairs]

    def opening(self) -> Iterator[dict[str, Any]]:
        """What is echoed; where its log-probabilities are asked for, it comes with them and the first delta."""
        for index in range(self.own.n * len(self.call.prompts)):
            if (echo := self._echo(index)) and self.own.logprobs is None:
                yield self._object([self._choice(Delta(index, ()), echo)])

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        echo = self._echo(delta.index) if delta.prompt is not None and self.own.logprobs is not None else ""
        if delta.pieces or delta.logprobs or echo:
            yield self._object([self._choice(delta, echo)])
        if delta.finish:
            yield self._object([self._choice(Delta(delta.index, ()), finish=delta.finish)])

    def closing(self) -> Iterator[dict[str, Any]]:
        if usage_wanted(self.call):
            yield self._object([]) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> dict[str, Any]:
        answers = joined(deltas)
        choices = [self._whole(answers[place], index) for index, place in enumerate(self._places())]
        return self._object(choices) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _places(self) -> list[int]:
        """The sequences that are returned: of each prompt the n likeliest, by log-probability per token."""
        answers, n = self.own.answers, self.own.n
        if answers == n:
            return list(range(n * len(self.call.prompts)))
        lives = self.call.generation.sequences
        ranked = [sorted(lives[first : first + answers], key=_badness) for first in range(0, len(lives), answers)]
        return [sequence.transcript.index for best in ranked for sequence in best[:n]]

    def _whole(self, answer: Delta, index: int) -> dict[str, Any]:
        return self._choice(answer, self._echo(answer.index), answer.finish) | {"index": index}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _echo(self, index: int) -> str:
        return self.echoes[index // self.own.answers]

    def _choice(self, delta: Delta, echo: str = "", finish: WireFinish | None = None) -> dict[str, Any]:
        logprobs = None
        if self.own.logprobs is not None and (delta.logprobs or delta.prompt is not None):
            logprobs = self._logprobs(delta)
        return {"index": delta.index, "text": echo + delta.text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        entries = [*self._prompt(delta.index, delta.prompt), *self._shifted(delta)]
        return {
            "tokens": [self._text(entry if isinstance(entry, int) else entry.token) for entry, _ in entries],
            "token_logprobs": [None if isinstance(entry, int) else entry.value for entry, _ in entries],
            "top_logprobs": [None if isinstance(entry, int) else self._top(entry) for entry, _ in entries],
            "text_offset": [offset for _, offset in entries],
        }

    def _shifted(self, delta: Delta) -> Iterator[tuple[Scored, int]]:
        """The generated tokens; their text begins after what is echoed."""
        echo = len(self._echo(delta.index))
        return ((entry, echo + entry.offset) for entry in delta.logprobs)

    def _prompt(self, index: int, found: tuple[Logprob, ...] | None) -> Iterator[tuple[Scored, int]]:
        """The prompt's tokens and where their texts begin. Nothing comes before the first, so it has no probability."""
        if found is None:
            return
        decoder, offset = self.tokenizer.stream(), 0
        tokens = self.call.prompts[index // self.own.answers]
        for token, logprob in zip(tokens, (None, *found), strict=True):
            yield (token if logprob is None else entry_of(token, logprob, offset)), offset
            offset += len(decoder.push(token))

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and the actual one. Two tokens may have one text: then the likelier one has it."""
        values: dict[str, float] = {}
        for id, value in (*entry.top, (entry.token, entry.value)):
            text = self._text(id)
            values[text] = max(value, values.get(text, value))
        return values

    def _text(self, id: int) -> str:
        return token_text(self.tokenizer.token_bytes(id))


def _badness(sequence: Sequence) -> float:
    return -sequence.transcript.total / max(1, sequence.life.tokens)
