"""The grammar compiler: validates grammars in a process of their own, on a thread beside the engine's steps.

Not here: masks (see `engine/grammars/matcher.py`).
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from engine.grammars.matcher import MaskProcesses, Matcher, first_line
from engine.grammars.validator import GrammarValidator, ValidationTimeout
from model.errors import InvalidRequest

log = logging.getLogger(__name__)

KEPT_BYTES = 32 << 20  # size of the cache of results, keyed by grammar
ENTRY_BYTES = 1000  # of one entry, in addition to its text
RETRY_SECONDS = 30.0  # before a grammar that timed out, perhaps because the machine was busy, is tried again


class GrammarCompiler:
    """Compiles grammars for one vocabulary. `tokenizer` is a path: a folder with a tokenizer.json, or a GGUF file.

    A grammar is used only after the validator process has compiled it in time (`engine/grammars/validator.py`). Recent
    results, good and bad, are cached; compiled grammars are kept in the process that uses them
    (`engine/grammars/mask_process.py`).
    """

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        self._validator = GrammarValidator(tokenizer, vocabulary, list(ends))
        self.processes = MaskProcesses(tokenizer, vocabulary, ends)
        # Per grammar: its error (None: it is valid) and until when that holds. Least recently used first.
        self._known: OrderedDict[str, tuple[InvalidRequest | None, float]] = OrderedDict()
        self._bytes = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Matcher:
        """Validate a grammar now; returns a matcher for it. Call it from one thread only.

        Raises:
            InvalidRequest: it is no grammar, nothing matches it, or it is above the limits.
        """
        found = self._recall(grammar)
        if found is not None:
            raise InvalidRequest(found.message, found.param, found.code)
        return Matcher(self.processes, grammar)

    def start(self, grammar: str, wake: Callable[[], None]) -> Future[Matcher]:
        """Validate a grammar on the compiler's thread, unless it is cached; `wake` is called from there at the end."""
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
            known = self._validate(grammar)
        self._known[grammar] = known
        while self._bytes > KEPT_BYTES:
            text, _ = self._known.popitem(last=False)
            self._bytes -= len(text) + ENTRY_BYTES
        return known[0]

    def _validate(self, grammar: str) -> tuple[InvalidRequest | None, float]:
        """The grammar's error, or None if it is valid; and until when that holds."""
        try:
            problem = self._validator.validate(grammar)
        except ValidationTimeout as timeout:
            return refusal(str(timeout)), time.monotonic() + RETRY_SECONDS
        except Exception as error:  # only the request with this grammar may fail
            log.exception("a grammar failed to compile")
            return refusal(f"the grammar library failed ({type(error).__name__})"), 0.0
        return refusal(problem) if problem else None, math.inf


def refusal(reason: str) -> InvalidRequest:
    """The error of a request whose grammar cannot be used. Only the HTTP process knows which field held it."""
    return InvalidRequest(f"the grammar or schema cannot be used: {first_line(reason)}", "grammar", "invalid_grammar")
