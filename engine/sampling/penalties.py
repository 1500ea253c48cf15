"""Adjusts logits before a token is chosen: penalties, biases, excluded tokens, and no stop token before `min_tokens`.

Only the tokens that a setting changes are read and written. They are kept per sequence and updated as it grows, so that
a step does not scan all generated tokens. It depends on sequences and logits, not on how a token is chosen.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.grammars.matcher import Words
from engine.sequence import Sequence
from engine.types import Sampling

ID, FACTOR, SHIFT = range(3)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def adjusted(logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
    """The float32 logits adjusted by the settings: a copy, or the same tensor if no setting changes anything."""
    found = edits(sequences, logits_BV.shape[1])
    if found is None:
        return logits_BV
    row_N, id_N, factor_N, shift_N = found
    copy_BV = logits_BV.clone()
    where = row_N, id_N
    old_N = copy_BV.numpy()[where].astype(np.float64)
    # A logit may become infinite: then it is the best one or excluded. If the model's own is, the row fails anyway.
    with np.errstate(over="ignore", invalid="ignore"):
        # As transformers: positive logits are divided, negative ones multiplied.
        scaled_N = np.where(old_N > 0, old_N / factor_N, old_N * factor_N)
        copy_BV.numpy()[where] = scaled_N + shift_N
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.allowed_token_ids:
            _keep(copy_BV.numpy()[row], _adjusted_tokens(sequence, logits_BV.shape[1]).allowed)
    return copy_BV


def edits(sequences: list[Sequence], vocabulary: int) -> tuple[Ints, Ints, Floats, Floats] | None:
    """Row, id, factor and shift of every logit that settings change; None if no setting applies to any row."""
    rows = [row for row, sequence in enumerate(sequences) if _adjusts(sequence)]
    if not rows:
        return None
    tables = [_adjusted_tokens(sequences[row], vocabulary).table(sequences[row]) for row in rows]
    row_N = np.repeat(rows, [table.shape[1] for table in tables])
    id_N, factor_N, shift_N = np.concatenate(tables, axis=1)
    return row_N, id_N.astype(np.int64), factor_N, shift_N


def allowed_words(sequence: Sequence, vocabulary: int) -> Words | None:
    """The tokens that settings allow, in packed bits; None if they allow all."""
    if not sequence.request.sampling.allowed_token_ids:
        return None
    return _adjusted_tokens(sequence, vocabulary).allowed_words(vocabulary)


def forbidden_tokens(sequence: Sequence, vocabulary: int) -> Callable[[int], bool]:
    """Whether settings exclude a token as the next one: an answer for the tokens that the sequence has now."""
    return _adjusted_tokens(sequence, vocabulary).forbids(sequence)


def forbidden(token_B: NDArray[np.int64], adjusted_BV: Tensor, sequences: list[Sequence]) -> list[int]:
    """The rows that got a token which their settings forbid: no other was left, or their grammars took precedence."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.restricts]
    return [row for row in rows if _is_forbidden(int(token_B[row]), adjusted_BV[row], sequences[row])]


def _is_forbidden(token: int, adjusted_V: Tensor, sequence: Sequence) -> bool:
    if forbidden_tokens(sequence, adjusted_V.shape[0])(token):
        return True
    return sequence.matcher is None and bool(adjusted_V[token] == -np.inf)


def _keep(row_V: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
    kept = row_V[ids]
    row_V[:] = -np.inf
    row_V[ids] = kept


def _adjusts(sequence: Sequence) -> bool:
    s = sequence.request.sampling
    return bool(s.penalises or s.logit_bias or sequence.output_count < s.min_tokens or s.restricts)


def _adjusted_tokens(sequence: Sequence, vocabulary: int) -> "AdjustedTokens":
    if not isinstance(sequence.sampler_state, AdjustedTokens):
        sequence.sampler_state = AdjustedTokens(sequence, vocabulary)
    return sequence.sampler_state


class AdjustedTokens:
    """The tokens of one sequence whose logits change: columns of id, factor and shift, [3, N].

    Stop tokens come first, so that the minimum length can mask them. Ids outside the vocabulary are left out: a
    checkpoint's stop tokens may be there. The table is a function of the sequence's tokens.
    """

    __slots__ = ("_allowed_words", "_columns", "_generated", "_read", "_slots", "_stops", "_words", "allowed")

    def __init__(self, sequence: Sequence, vocabulary: int) -> None:
        s = sequence.request.sampling
        seen = set(sequence.request.prompt) if s.repetition_penalty != 1.0 else set()
        last = [word[-1] for word in s.bad_words]
        biased = [token for token, _ in s.logit_bias]
        ids = dict.fromkeys([*s.stop_token_ids, *biased, *last, *sorted(seen)])
        known = [token for token in ids if 0 <= token < vocabulary]
        self._stops = len(set(s.stop_token_ids).intersection(known))
        self._slots = {token: slot for slot, token in enumerate(known)}
        factors = [s.repetition_penalty if token in seen else 1.0 for token in known]
        self._columns = np.array([known, factors, [0.0] * len(known)])
        for token, bias in s.logit_bias:
            if token in self._slots:
                self._columns[SHIFT, self._slots[token]] += bias
        self._words: dict[int, list[tuple[int, ...]]] = {}  # bad words by the token before their last; -1: by none
        for word in s.bad_words:
            before = word[-2] if len(word) > 1 else -1
            self._words.setdefault(before, []).append(word)
        self.allowed = np.array([token for token in s.allowed_token_ids if token < vocabulary], np.int64)
        self._allowed_words: Words | None = None
        self._generated: set[int] = set()
        self._read = sequence.prompt_length

    def table(self, sequence: Sequence) -> NDArray[np.float64]:
        """The columns after all of the sequence's tokens."""
        s = sequence.request.sampling
        if s.penalises:
            for position in range(self._read, len(sequence.tokens)):
                self._count(sequence.tokens[position], s)
            self._read = len(sequence.tokens)
        table = self._columns[:, : len(self._slots)]
        if sequence.output_count < s.min_tokens:
            table = table.copy()
            table[SHIFT, : self._stops] = -np.inf
        if bad := self._bad(sequence):
            table = table.copy()
            table[SHIFT, [self._slots[token] for token in bad]] = -np.inf
        return table

    def allowed_words(self, vocabulary: int) -> Words:
        """`allowed` in packed bits, made once."""
        if self._allowed_words is None:
            allowed_V = np.zeros(-(-vocabulary // 32) * 32, np.bool_)
            allowed_V[self.allowed] = True
            self._allowed_words = np.packbits(allowed_V, bitorder="little").view(np.int32)
        return self._allowed_words

    def forbids(self, sequence: Sequence) -> Callable[[int], bool]:
        """Whether the settings exclude a token as the next one."""
        allowed = self.allowed if sequence.request.sampling.allowed_token_ids else None
        bad = self._bad(sequence)
        return lambda token: token in bad or (allowed is not None and token not in allowed)

    def _bad(self, sequence: Sequence) -> list[int]:
        """The tokens that would complete a bad word."""
        if not self._words:
            return []
        words = list(self._words.get(-1, ()))
        if sequence.output_count:
            words += self._words.get(sequence.tokens[-1], ())
        possible = [word for word in words if word[-1] in self._slots]
        return [word[-1] for word in possible if _ends_with(sequence, word[:-1])]

    def _count(self, token: int, s: Sampling) -> None:
        """Update the columns for one more generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._columns.shape[1]:
            room = np.zeros((3, slot + 64))
            self._columns = np.concatenate([self._columns, room], axis=1)
        first = token not in self._generated
        self._generated.add(token)
        self._columns[ID, slot] = token
        self._columns[FACTOR, slot] = s.repetition_penalty
        self._columns[SHIFT, slot] -= s.frequency_penalty + s.presence_penalty * first


def _ends_with(sequence: Sequence, tokens: tuple[int, ...]) -> bool:
    """Whether the generated tokens end with these."""
    if len(tokens) > sequence.output_count:
        return False
    return tokens == tuple(sequence.tokens[len(sequence.tokens) - len(tokens) :])
