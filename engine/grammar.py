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
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from model.errors import InvalidRequest

log = logging.getLogger(__name__)

COMPILE_SECONDS = 1.0
KEPT = 32  # grammars
THREADS = 1  # compiling is rare and fast, and what waits here costs no step any time
LIMITS = LLParserLimits(max_grammar_size=200_000, max_lexer_states=50_000, verbose_errors=False)


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
    """Compiles grammars for one vocabulary. `tokenizer` is a tokenizer.json; it is read when the first one comes."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        self._path, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._tokenizer: LLTokenizer | None = None
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()  # as compiled, the least recently asked for first
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Matcher:
        """Now, on this thread; one that was asked for of late is copied.

        Raises:
            InvalidRequest: it is no grammar, or larger than the limits.
        """
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._path, n_vocab=self._vocabulary, eos_token=self._ends)
        if grammar not in self._known:
            inner = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            if inner.is_error():
                raise refusal(inner.get_error())
            self._known[grammar] = inner
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(grammar)
        matcher = Matcher(self._known[grammar].deep_copy(), self._vocabulary, frozenset(self._ends))
        if not matcher.masks().any():
            raise refusal("nothing can match it")
        return matcher

    def start(self, grammar: str, wake: Callable[[], None]) -> "Job":
        """On the thread of this pool; `wake` is called from there when it begins and when it ends."""
        job = Job(wake)
        job.future = self._pool.submit(job.run, self.compile, grammar)
        job.future.add_done_callback(lambda _: wake())
        return job


class Job:
    """A grammar that is being compiled, or waits for the thread; its time begins when the thread does."""

    future: Future[Matcher]

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.deadline = math.inf

    def run(self, compile: Callable[[str], Matcher], grammar: str) -> Matcher:
        """On the thread."""
        self.deadline = time.monotonic() + COMPILE_SECONDS
        self._wake()
        return compile(grammar)

    @property
    def done(self) -> bool:
        """Whether `result` says something now."""
        return self.future.done() or time.monotonic() > self.deadline

    def result(self) -> Matcher:
        """Raises InvalidRequest: it is no grammar, too large, or took too long."""
        if not self.future.done():
            raise refusal(f"it was not compiled within {COMPILE_SECONDS:g} s")
        try:
            return self.future.result()
        except InvalidRequest:
            raise
        except Exception as error:
            log.exception("a grammar failed to compile")
            raise refusal(f"the grammar library failed ({type(error).__name__})") from None


def refusal(reason: str) -> InvalidRequest:
    """What the request is told; the field at fault is known to the HTTP process alone."""
    return InvalidRequest(f"the grammar or schema cannot be used: {_first_line(reason)}", "grammar", "invalid_grammar")


def _first_line(text: str) -> str:
    """Without the library's dump of its state, or of a grammar that the caller never saw."""
    return " ".join(re.split(r"\n(?:<state>|\s*\d+ \|)", text)[0].split())[:300]
