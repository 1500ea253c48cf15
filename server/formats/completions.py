"""How /v1/completions writes an answer: `text_completion` objects, whole or in chunks."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from engine.types import Logprob
from server.event_loop.slices import ENTRIES, LongList, Steps, at_once
from server.formats.base import DataFormat, merge_deltas, prompt_entries, token_text
from server.formats.routed_experts import routed_experts_of
from server.formats.usage import RunningUsage, metrics_of, usage_of, usage_wanted
from server.generation.generation import AnswerSequence
from server.generation.output_processor import Delta, FinishReason, TokenLogprob, token_logprob
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall
from server.schemas.completions import CompletionBody

LogprobEntry = TokenLogprob | int  # the first token of a prompt has no log-probability


class CompletionFormat(DataFormat):
    """`text_completion` objects and their chunks.

    Sequences are numbered prompt by prompt; so are choices, unless `best_of` leaves some out.
    """

    def __init__(self, call: GenerationCall, tokenizer: TokenizerProtocol) -> None:
        self._usage = RunningUsage(call)
        super().__init__(uniform=not self._usage.wanted)
        assert isinstance(call.body, CompletionBody)
        self.call, self.tokenizer, self.request_body = call, tokenizer, call.body
        self._texts = _as_list(call.body.prompt)
        self._decoded: dict[int, str] = {}  # echoes of token ids, by prompt
        self._head = {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}
        self._head["system_fingerprint"] = call.fingerprint

    def opening(self) -> Iterator[dict[str, Any]]:
        """The echo; with log-probabilities it comes later, with the first delta."""
        for index in range(self.request_body.n * len(self.call.prompts)):
            if (echo := self._echo(index)) and self.request_body.logprobs is None:
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
        echo = ""
        if delta.prompt is not None and self.request_body.logprobs is not None:
            echo = self._echo(delta.index)
        if delta.parts or delta.logprobs or echo:
            yield self._chunk(self._choice(delta, logprobs, echo))
        if delta.finish:
            ended = self._choice(Delta(delta.index, ()), finish=delta.finish)
            yield self._chunk(ended | {"stop_reason": delta.stop_reason, **routed_experts_of(delta.routes)})

    def closing(self) -> Iterator[dict[str, Any]]:
        if usage_wanted(self.call):
            yield self._object([]) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def body(self, deltas: list[Delta]) -> Steps[dict[str, Any]]:
        answers = yield from merge_deltas(deltas)
        choices = []
        for index, sequence in enumerate(self._returned()):
            choices.append((yield from self._full_choice(answers[sequence], index)))
        return self._object(choices) | {"usage": usage_of(self.call), "metrics": metrics_of(self.call)}

    def _returned(self) -> list[int]:
        """The indices of the sequences that are returned: for each prompt the n with the best mean log-probability."""
        answers, n = self.request_body.answers, self.request_body.n
        if answers == n:
            return list(range(n * len(self.call.prompts)))
        sequences = self.call.generation.sequences
        returned: list[int] = []
        for first in range(0, len(sequences), answers):
            ranked = sorted(sequences[first : first + answers], key=_negative_mean_logprob)
            returned += [sequence.output.index for sequence in ranked[:n]]
        return returned

    def _full_choice(self, answer: Delta, index: int) -> Steps[dict[str, Any]]:
        logprobs = yield from self._logprobs(answer)
        choice = self._choice(answer, logprobs, self._echo(answer.index), answer.finish)
        choice |= {"index": index, "stop_reason": answer.stop_reason, **routed_experts_of(answer.routes)}
        if self.request_body.prompt_logprobs is not None:
            tokens = self.call.prompts[answer.index // self.request_body.answers]
            scores = prompt_entries(self.tokenizer, tokens, answer.prompt or (), self.request_body.prompt_logprobs)
            choice["prompt_logprobs"] = yield from scores
        return choice

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._object([choice]) | self._usage.fields()

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}

    def _echo(self, index: int) -> str:
        """The echo of a prompt: a whole text as it was sent, token ids and truncated texts as they decode."""
        prompt = index // self.request_body.answers
        if not self.request_body.echo:
            return ""
        if self._is_unchanged(prompt):
            return str(self._texts[prompt])
        if prompt not in self._decoded:
            specials = not self.request_body.skip_special_tokens
            self._decoded[prompt] = self.tokenizer.decode(self.call.prompts[prompt], specials)
        return self._decoded[prompt]

    def _is_unchanged(self, prompt: int) -> bool:
        return isinstance(self._texts[prompt], str) and self.request_body.truncate_prompt_tokens is None

    def _choice(
        self, delta: Delta, logprobs: dict[str, Any] | None = None, echo: str = "", finish: FinishReason | None = None
    ) -> dict[str, Any]:
        return {"index": delta.index, "text": echo + delta.text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, delta: Delta) -> Steps[dict[str, Any] | None]:
        prompt = delta.prompt if self.request_body.echo else None
        if self.request_body.logprobs is None or not (delta.logprobs or prompt is not None):
            return None
        columns = {name: LongList() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        entries = chain(self._prompt_entries(delta.index, prompt), self._generated_entries(delta))
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

    def _generated_entries(self, delta: Delta) -> Iterator[tuple[LogprobEntry, int]]:
        """The generated tokens; their text begins after the echo."""
        echo = len(self._echo(delta.index))
        return ((entry, echo + entry.offset) for entry in delta.logprobs)

    def _prompt_entries(self, index: int, found: tuple[Logprob, ...] | None) -> Iterator[tuple[LogprobEntry, int]]:
        """The prompt's tokens and where their texts begin. The first has no log-probability."""
        if found is None:
            return
        prompt = index // self.request_body.answers
        hidden = self.request_body.skip_special_tokens or self._is_unchanged(prompt)
        decoder = self.tokenizer.stream(() if hidden else tuple(self.tokenizer.specials))
        offset = 0
        tokens = self.call.prompts[prompt]
        for token, logprob in zip(tokens, (None, *found), strict=True):
            yield (token if logprob is None else self._scored(token, logprob, offset)), offset
            offset += len(decoder.push(token))

    def _scored(self, token: int, logprob: Logprob, offset: int) -> TokenLogprob:
        """With as many alternatives as `logprobs` asks for; `prompt_logprobs` may have asked for more."""
        return token_logprob(token, Logprob(logprob.value, logprob.top[: self.request_body.logprobs]), offset)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and the actual one, by text. Of two tokens with the same text the likelier one counts."""
        values: dict[str, float] = {}
        for id, value in (*entry.top, (entry.token, entry.value)):
            text = self._text(id)
            values[text] = max(value, values.get(text, value))
        return values

    def _text(self, id: int) -> str:
        return token_text(self.tokenizer.token_bytes(id))


def _as_list(prompt: Any) -> list[Any]:
    """The prompts of a body as a list, in whichever shape they were sent."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _negative_mean_logprob(sequence: AnswerSequence) -> float:
    return -sequence.output.total_logprob / max(1, sequence.timeline.tokens)
