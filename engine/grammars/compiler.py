"""Grammars of answers: found good or bad on a thread beside the steps, by a process that may take its time.

It knows no logits, no schedule and no masks (`engine/grammars/matcher.py`).
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from engine.grammars.matcher import MaskProcesses, Matcher, first_line
from engine.grammars.validator import Judge, Lapse
from model.errors import InvalidRequest

log = logging.getLogger(__name__)

KEPT_BYTES = 32 << 20  # of texts of grammars and what was found of them
ENTRY_BYTES = 1000  # of one beside its text
RETRY_SECONDS = 30.0  # before one that took too long, perhaps beside other work, is tried again


class Grammars:
    """Compiles grammars for one vocabulary. `tokenizer` is a tokenizer.json.

    A grammar is used only after a process has compiled it in time (`engine/grammars/validator.py`). What was found of
    those asked for last is remembered, good and bad; compiled ones are kept where they are used
    (`engine/grammars/mask_process.py`).
    """

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        self._judge = Judge(tokenizer, vocabulary, list(ends))
        self.processes = MaskProcesses(tokenizer, vocabulary, ends)
        # each with how long it holds, None for a good one; the least recently asked for first
        self._known: OrderedDict[str, tuple[InvalidRequest | None, float]] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Matcher:
        """Now, on this thread, which is to be the only one that does.

        Raises:
            InvalidRequest: it is no grammar, nothing matches it, or it costs more than the limits.
        """
        found = self._recall(grammar)
        if found is not None:
            raise InvalidRequest(found.message, found.param, found.code)
        return Matcher(self.processes, grammar)

    def start(self, grammar: str, wake: Callable[[], None]) -> Future[Matcher]:
        """On the thread of this pool, unless it is known; `wake` is called from there at the end."""
        refused, until = self._known.get(grammar, (None, 0.0))
        if refused is None and time.monotonic() < until:
            known: Future[Matcher] = Future()
            known.set_result(Matcher(self.processes, grammar))
            return known
        future = self._pool.submit(self.compile, grammar)
        future.add_done_callback(lambda _: wake())
        return future

    def _recall(self, grammar: str) -> InvalidRequest | None:
        known = self._known.pop(grammar, None)
        if known is None or time.monotonic() > known[1]:
            self._bytes += 0 if known else len(grammar) + ENTRY_BYTES
            known = self._judged(grammar)
        self._known[grammar] = known
        while self._bytes > KEPT_BYTES:
            text, _ = self._known.popitem(last=False)
            self._bytes -= len(text) + ENTRY_BYTES
        return known[0]

    def _judged(self, grammar: str) -> tuple[InvalidRequest | None, float]:
        """Why it cannot be used, if so, and until when that holds."""
        try:
            objection = self._judge.objection(grammar)
        except Lapse as lapse:
            return refusal(str(lapse)), time.monotonic() + RETRY_SECONDS
        except Exception as error:  # whatever it is, it is this grammar's fault and ends nothing else
            log.exception("a grammar failed to compile")
            return refusal(f"the grammar library failed ({type(error).__name__})"), 0.0
        return refusal(objection) if objection else None, math.inf


def refusal(reason: str) -> InvalidRequest:
    """What the request is told; the field at fault is known to the HTTP process alone."""
    return InvalidRequest(f"the grammar or schema cannot be used: {first_line(reason)}", "grammar", "invalid_grammar")
