"""How /v1/completions writes an answer: `text_completion` objects, whole or in chunks. It runs nothing."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from engine.types import Logprob
from server.event_loop.slices import ENTRIES, LongList, Steps, at_once
from server.formats.base import DataFormat, joined, prompt_entries, token_text
from server.formats.usage import RunningUsage, metrics_of, usage_of, usage_wanted
from server.generation.generation import Sequence
from server.generation.output_processor import Delta, TokenLogprob, WireFinish, entry_of
from server.protocols import Tokenizer
from server.requests.calls import GenerationCall
from server.schemas.completions import CompletionBody

Scored = TokenLogprob | int  # of the first token of a prompt, only the token


class CompletionFormat(DataFormat):
    """Sequences are numbered prompt by prompt; so are choices, unless `best_of` leaves some out."""

    def __init__(self, call: GenerationCall, tokenizer: Tokenizer) -> None:
        self._usage = RunningUsage(call)
        super().__init__(same=not self._usage.wanted)
        assert isinstance(call.body, CompletionBody)
        self.call, self.tokenizer, self.own = call, tokenizer, call.body
        self._typed = _as_list(call.body.prompt)
        self._decoded: dict[int, str] = {}  # echoes of ids, by prompt
        self._head = {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}
        self._head["system_fingerprint"] = call.fingerprint

    def opening(self) -> Iterator[dict[str, Any]]:
        """What is echoed; where its log-probabilities are asked for, it comes with them and the first delta."""
        for index in range(self.own.n * len(self.call.prompts)):
            if (echo := self._echo(index)) and self.own.logprobs is None:
                yield self._chunk(self._choice(Delta(index, ()), echo=echo))

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        return self._chunks(delta, at_once(self._logprobs(delta)))

    def steps_of(self, deltas: list[Delta]) -> Steps[bytes]:
        written: list[bytes] = []
        for delta in deltas:
            logprobs = yield from self._logprobs(delta)
            written += map(self.frame, self._chunks(delta, logprobs))
            yield
        return b"".join(written)

    def _chunks(self, delta: Delta, logprobs: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        self._usage.update(delta)
        echo = self._echo(delta.index) if delta.prompt is not None and self.own.logprobs is not None else ""
        if delta.pieces or delta.logprobs or echo:
            yield self._chunk(self._choice(delta, logprobs, echo))
        if delta.finish:
            ended = self._choice(Delta(delta.index, ()), finish=delta.finish)
            yield self._chunk(ended | {"stop_reason": delta.stop_reason})

    def closing(self) -> Iterator[dict[str, Any]]:
        if usage_wanted(self.call):
            yield self._object([]) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        answers = yield from joined(deltas)
        choices = []
        for index, place in enumerate(self._places()):
            choices.append((yield from self._whole(answers[place], index)))
        return self._object(choices) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _places(self) -> list[int]:
        """The sequences that are returned: of each prompt the n likeliest, by log-probability per token."""
        answers, n = self.own.answers, self.own.n
        if answers == n:
            return list(range(n * len(self.call.prompts)))
        lives = self.call.generation.sequences
        ranked = [sorted(lives[first : first + answers], key=_badness) for first in range(0, len(lives), answers)]
        return [sequence.transcript.index for best in ranked for sequence in best[:n]]

    def _whole(self, answer: Delta, index: int) -> Steps[dict[str, Any]]:
        logprobs = yield from self._logprobs(answer)
        choice = self._choice(answer, logprobs, self._echo(answer.index), answer.finish)
        choice |= {"index": index, "stop_reason": answer.stop_reason}
        if self.own.prompt_logprobs is not None:
            tokens = self.call.prompts[answer.index // self.own.answers]
            scores = prompt_entries(self.tokenizer, tokens, answer.prompt or (), self.own.prompt_logprobs)
            choice["prompt_logprobs"] = yield from scores
        return choice

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._object([choice]) | self._usage.fields()

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _echo(self, index: int) -> str:
        """A whole text is echoed as it was typed, ids and the rest of a text as they decode."""
        prompt = index // self.own.answers
        if not self.own.echo:
            return ""
        if self._as_typed(prompt):
            return str(self._typed[prompt])
        if prompt not in self._decoded:
            specials = not self.own.skip_special_tokens
            self._decoded[prompt] = self.tokenizer.decode(self.call.prompts[prompt], specials)
        return self._decoded[prompt]

    def _as_typed(self, prompt: int) -> bool:
        return isinstance(self._typed[prompt], str) and self.own.truncate_prompt_tokens is None

    def _choice(
        self, delta: Delta, logprobs: dict[str, Any] | None = None, echo: str = "", finish: WireFinish | None = None
    ) -> dict[str, Any]:
        return {"index": delta.index, "text": echo + delta.text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, delta: Delta) -> Steps[dict[str, Any] | None]:
        prompt = delta.prompt if self.own.echo else None
        if self.own.logprobs is None or not (delta.logprobs or prompt is not None):
            return None
        columns = {name: LongList() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        entries = chain(self._prompt(delta.index, prompt), self._shifted(delta))
        for place, (entry, offset) in enumerate(entries):
            if place and place % ENTRIES == 0:
                for column in columns.values():
                    column.flush()
                yield
            scored = None if isinstance(entry, int) else entry
            columns["tokens"].append(self._text(entry if isinstance(entry, int) else entry.token))
            columns["token_logprobs"].append(scored and scored.value)
            columns["top_logprobs"].append(scored and self._top(scored))
            columns["text_offset"].append(offset)
        return {name: column.value for name, column in columns.items()}

    def _shifted(self, delta: Delta) -> Iterator[tuple[Scored, int]]:
        """The generated tokens; their text begins after what is echoed."""
        echo = len(self._echo(delta.index))
        return ((entry, echo + entry.offset) for entry in delta.logprobs)

    def _prompt(self, index: int, found: tuple[Logprob, ...] | None) -> Iterator[tuple[Scored, int]]:
        """The prompt's tokens and where their texts begin. Nothing comes before the first, so it has no probability."""
        if found is None:
            return
        prompt = index // self.own.answers
        hidden = self.own.skip_special_tokens or self._as_typed(prompt)
        decoder, offset = self.tokenizer.stream(() if hidden else tuple(self.tokenizer.specials)), 0
        tokens = self.call.prompts[prompt]
        for token, logprob in zip(tokens, (None, *found), strict=True):
            yield (token if logprob is None else self._scored(token, logprob, offset)), offset
            offset += len(decoder.push(token))

    def _scored(self, token: int, logprob: Logprob, offset: int) -> TokenLogprob:
        """With as many alternatives as are asked for here; there may be more of them for others."""
        return entry_of(token, Logprob(logprob.value, logprob.top[: self.own.logprobs]), offset)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and the actual one. Two tokens may have one text: then the likelier one has it."""
        values: dict[str, float] = {}
        for id, value in (*entry.top, (entry.token, entry.value)):
            text = self._text(id)
            values[text] = max(value, values.get(text, value))
        return values

    def _text(self, id: int) -> str:
        return token_text(self.tokenizer.token_bytes(id))


def _as_list(prompt: Any) -> list[Any]:
    """The prompts of a body, of whichever shape."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _badness(sequence: Sequence) -> float:
    return -sequence.transcript.total / max(1, sequence.life.tokens)
