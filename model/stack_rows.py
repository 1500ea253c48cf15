"""Which rows of a step the encoder's layers run for, and which the decoder's (see `model/encoder_decoder.py`).

A prompt of N tokens has positions 0 to N - 1. The decoder's first token, which is no token of the sequence, shares the
row and the position of the prompt's last one. The answer's tokens follow from position N on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch, Part, Span
from model.shapes.encoder import Encoder
from model.step import Observer, Past


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence of a step: its new rows, and how long the part of it is that the encoder reads."""

    number: int  # of the sequence in the step
    span: Span
    length: int
    fresh: bool  # it starts with this step

    @property
    def start(self) -> int:
        """The position of the first new row that the decoder runs for."""
        return self.length - 1 if self.fresh else self.span.context - self.span.rows

    @property
    def answer_rows(self) -> int:
        """How many rows the decoder runs for: the last ones."""
        return self.span.context - self.start

    @property
    def answer_row(self) -> int:
        """The first of them in the step."""
        return self.span.first + self.span.rows - self.answer_rows

    @property
    def encoded(self) -> Part:
        """In the encoder the whole prompt sees itself."""
        return Part(self.number, self.length, 0, self.length, 0, 0, self.length)

    @property
    def decoded(self) -> Part:
        """In the decoder the answer sees itself, from the decoder's first token on."""
        rows, start = self.answer_rows, self.start
        return Part(self.number, rows, start, rows, start, self.length - 1, self.span.context)

    @property
    def crossed(self) -> Part:
        """The answer sees the prompt, whose keys and values are new where the prompt is."""
        keys = self.length if self.fresh else 0
        return Part(self.number, self.answer_rows, self.start, keys, 0, 0, self.length)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step that one stack runs for."""

    row_R: Tensor  # int64
    position_R: Tensor  # int64: in the stack's own text, which begins with the prompt or with the decoder's first token
    parts: tuple[Part, ...]  # what they see of this text


@dataclass(frozen=True, slots=True)
class Layout:
    """Where prompts end and answers begin in a step."""

    encoder: Rows
    decoder: Rows
    cross: tuple[Part, ...]
    starts: tuple[int, ...]  # rows of the decoder's first token
    bare: tuple[int, ...]  # those of them that no token of an answer follows


def layout(batch: Batch, past: Past, encoder: Encoder, memory: int) -> Layout:
    """The rows of both stacks. `memory` keeps the lengths of prompts."""
    device = batch.ids_T.device
    prompts = list(_prompts(batch, past, encoder, memory))
    new = [prompt for prompt in prompts if prompt.fresh]
    starts = tuple(prompt.answer_row for prompt in new)
    return Layout(
        encoder=_rows([(p.span.first, 0, p.encoded) for p in new], device),
        decoder=_rows([(p.answer_row, p.start - p.length + 1, p.decoded) for p in prompts], device),
        cross=tuple(prompt.crossed for prompt in prompts),
        starts=starts,
        bare=tuple(row for row, prompt in zip(starts, new, strict=True) if prompt.answer_rows == 1),
    )


def _prompts(batch: Batch, past: Past, encoder: Encoder, memory: int) -> Iterator[Prompt]:
    """Each sequence of the step. The length of its prompt is found when it starts, and then kept."""
    rows = len(batch.ids_T)
    states = past.states(memory, rows, 1)
    for number, (span, (own, state, fresh)) in enumerate(zip(past.spans(rows), states, strict=True)):
        if fresh:
            state[0] = prompt_length(batch.ids_T[own], encoder)
        yield Prompt(number, span, int(state[0]), fresh)


def prompt_length(ids_T: Tensor, encoder: Encoder) -> int:
    """How many of a new sequence's tokens the encoder reads: up to the last one that ends a text, or all."""
    ends = torch.isin(ids_T, torch.tensor(encoder.ends, device=ids_T.device, dtype=ids_T.dtype)).nonzero()
    return int(ends[-1]) + 1 if len(ends) else len(ids_T)


def _rows(parts: list[tuple[int, int, Part]], device: torch.device) -> Rows:
    """Of each part its first row in the step, and the first position in the stack's text."""
    none = torch.empty(0, dtype=torch.int64)
    row_R = torch.cat([none, *(torch.arange(first, first + part.queries) for first, _, part in parts)])
    position_R = torch.cat([none, *(torch.arange(first, first + part.queries) for _, first, part in parts)])
    return Rows(row_R.to(device), position_R.to(device), tuple(part for _, _, part in parts))


class RowsObserver(Observer):
    """Tells an observer of a whole step what a mixture did for some of its rows."""

    def __init__(self, observer: Observer, row_R: Tensor, rows: int) -> None:
        self._observer, self._row_R, self._rows = observer, row_R, rows

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self._observer.routed(layer, pairs, load_E, scores_TE)

    def used(self, layer: int, used_T: Tensor) -> None:
        self._observer.used(layer, used_T.new_zeros(self._rows).index_copy(0, self._row_R, used_T))

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        all_TK = expert_TK.new_full((self._rows, expert_TK.shape[1]), -1)
        self._observer.routes(layer, all_TK.index_copy(0, self._row_R, expert_TK))
