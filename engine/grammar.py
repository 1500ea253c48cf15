"""Grammars of answers: compiled on a thread beside the steps, then asked which tokens may come next.

llguidance does the work, within limits of its own on size and time. It knows no logits and no schedule.
"""

import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from engine.judge import LIMITS, Judge, Lapse
from model.errors import InvalidRequest

log = logging.getLogger(__name__)

KEPT = 64  # grammars
RETRY_SECONDS = 30.0  # before one that took too long, perhaps beside other work, is tried again


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, inner: LLMatcher, vocabulary: int, ends: frozenset[int]) -> None:
        self._inner, self._vocabulary, self._ends = inner, vocabulary, ends

    @property
    def error(self) -> str:
        """Why nothing can follow any more; empty as long as something can."""
        return _first_line(self._inner.get_error())

    def masks(self, drafts: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Which tokens may come next, [1 + drafts, V]: now, and after each of the guesses that the grammar allows.

        Rows after a guess that it forbids allow nothing: nobody will get there. A grammar that has come to its end
        allows the end of the text alone.
        """
        words = allocate_token_bitmask(1 + len(drafts), self._vocabulary)
        words[:] = 0
        taken = 0
        for row, draft in enumerate((*drafts, None)):
            fill_next_token_bitmask(self._inner, words, row)
            if draft is None or draft in self._ends or not self._inner.try_consume_tokens([draft]):
                break
            taken += 1
        self._inner.rollback(taken)
        return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=self._vocabulary).astype(np.bool_)

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the model thinks: guesses that are always right."""
        return list(self._inner.compute_ff_tokens())

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in tokens that have become part of the answer; an end of the text is none."""
        for token in tokens:
            if token in self._ends or not self._inner.consume_token(token):
                return


class Grammars:
    """Compiles grammars for one vocabulary. `tokenizer` is a tokenizer.json; it is read when the first one comes.

    A grammar is compiled here only after another process has done so in time (`engine/judge.py`). Those that were asked
    for of late are remembered, good and bad.
    """

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        self._path, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._judge = Judge(tokenizer, vocabulary, self._ends)
        self._tokenizer: LLTokenizer | None = None
        # each with how long it holds; the least recently asked for first
        self._known: OrderedDict[str, tuple[LLMatcher | InvalidRequest, float]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Matcher:
        """Now, on this thread, which is to be the only one that does.

        Raises:
            InvalidRequest: it is no grammar, nothing matches it, or it costs more than the limits.
        """
        found = self._recall(grammar)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.message, found.param, found.code)
        return Matcher(found.deep_copy(), self._vocabulary, frozenset(self._ends))

    def start(self, grammar: str, wake: Callable[[], None]) -> Future[Matcher]:
        """On the thread of this pool; `wake` is called from there at the end."""
        future = self._pool.submit(self.compile, grammar)
        future.add_done_callback(lambda _: wake())
        return future

    def _recall(self, grammar: str) -> LLMatcher | InvalidRequest:
        found, until = self._known.pop(grammar, (None, 0.0))
        if found is None or time.monotonic() > until:
            try:
                found, until = self._compiled(grammar)
            except Exception as error:  # whatever it is, it is this grammar's fault and ends nothing else
                log.exception("a grammar failed to compile")
                found, until = refusal(f"the grammar library failed ({type(error).__name__})"), 0.0
        self._known[grammar] = found, until
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found

    def _compiled(self, grammar: str) -> tuple[LLMatcher | InvalidRequest, float]:
        """The compiled grammar or why there is none, and until when that holds."""
        try:
            objection = self._judge.objection(grammar)
        except Lapse as lapse:
            return refusal(str(lapse)), time.monotonic() + RETRY_SECONDS
        if objection:
            return refusal(objection), math.inf
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._path, n_vocab=self._vocabulary, eos_token=self._ends)
        inner = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        first = Matcher(inner.deep_copy(), self._vocabulary, frozenset(self._ends))
        possible = first.masks().any()
        if inner.is_error() or first.error or not possible:
            return refusal(inner.get_error() or first.error or "nothing can match it"), math.inf
        return inner, math.inf


def refusal(reason: str) -> InvalidRequest:
    """What the request is told; the field at fault is known to the HTTP process alone."""
    return InvalidRequest(f"the grammar or schema cannot be used: {_first_line(reason)}", "grammar", "invalid_grammar")


def _first_line(text: str) -> str:
    """Without the library's dump of its state, or of a grammar that the caller never saw."""
    return " ".join(re.split(r"\n(?:<state>|\s*\d+ \|)", text)[0].split())[:300]
