"""The matcher of one answer: follows its grammar and gets the masks of allowed tokens from a mask process.

Masks come a little later than they are asked for (`ready`); until then this answer is left out of the batch. A grammar
whose masks are expensive moves to a second process, where it delays only others like it, and an answer that spends too
much time ends with an error of its own.
Not here: how masks are applied to logits (see `engine/sampling/constraints.py`).
"""

import itertools
import re
import select
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.grammars.mask_client import MaskClient
from engine.grammars.mask_messages import Advance, LookAhead, Masks, Open, ToMasks

EXPENSIVE_SECONDS = 0.03  # a grammar is expensive once its masks took this much more processor time than usual
USUAL_SECONDS = 0.001  # of one answer's token
SPENT_SECONDS, SPENT_PER_TOKEN = 0.25, 0.002  # what an answer may cost in total: a constant and per token
NICENESS = 10  # of the process for expensive grammars: on a busy machine it yields to the model
SMOOTHING = 0.05  # weight of the last masks in `row_seconds`
MAX_EXPENSIVE = 1000  # grammars that are remembered as expensive
MODULE = "engine.grammars.mask_process"

Words = NDArray[np.int32]
_ids = itertools.count(1)


class MaskProcesses:
    """Two mask processes: one for usual grammars, and one, started when needed, for expensive ones."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        arguments = (tokenizer, str(vocabulary), *map(str, ends))
        self.quick = MaskClient(MODULE, 0, *arguments)
        self.slow = MaskClient(MODULE, NICENESS, *arguments)
        self.vocabulary = vocabulary
        self.expensive: OrderedDict[str, None] = OrderedDict()  # grammars that are, those found last at the end
        self._late = False
        self.seconds = 0.0  # that steps spent on masks, in total
        self.row_seconds = 0.0  # that a step spends per mask, a moving average

    @property
    def busy(self) -> bool:
        """Whether an answer waits for its mask."""
        return self.quick.busy or self.slow.busy

    @property
    def awaited(self) -> list[MaskClient]:
        """The clients that become readable when a reply has come."""
        return [client for client in (self.quick, self.slow) if client.busy]

    def collect(self) -> None:
        """Process the replies that have come."""
        self.quick.collect()
        self.slow.collect()

    def stop(self) -> None:
        """End both processes."""
        self.quick.stop()
        self.slow.stop()

    def settle(self, seconds: float) -> None:
        """Wait up to `seconds` for the usual masks; those that are late then are not waited for again."""
        if not self.busy:
            return
        began, rows = time.monotonic(), self.quick.asked
        self._settle(began + seconds)
        self.spend(time.monotonic() - began, rows)

    def spend(self, seconds: float, rows: int) -> None:
        """Record the time that a step spent on masks. Called once for waiting and once for applying them, so that each
        call counts half of a mask."""
        self.seconds += seconds
        if rows:
            self.row_seconds += SMOOTHING * (2 * seconds / rows - self.row_seconds)

    def _settle(self, deadline: float) -> None:
        self.collect()
        while self.quick.busy and not self._late:
            left = deadline - time.monotonic()
            if left <= 0:
                self._late = True
                return
            select.select([self.quick], [], [], left)
            self.quick.collect()
        self._late = self._late and self.quick.busy

    def wait(self, seconds: float) -> None:
        """Wait until a reply has come, at most `seconds`."""
        if self.busy:
            select.select(self.awaited, [], [], seconds)
            self.collect()

    def mark_expensive(self, grammar: str) -> None:
        """Answers with this grammar use the slow process from now on."""
        self.expensive[grammar] = None
        if len(self.expensive) > MAX_EXPENSIVE:
            self.expensive.popitem(last=False)


class Matcher:
    """Follows a valid `grammar` for one answer. `error`: why no further token is possible, empty if one is."""

    def __init__(self, processes: MaskProcesses, grammar: str) -> None:
        self.id, self.grammar, self.error = next(_ids), grammar, ""
        self._processes = processes
        self._client: MaskClient | None = None
        self._started = 0  # which process of the client knows this answer
        self._tokens_so_far: list[int] = []
        self._due: deque[type[ToMasks]] = deque()  # messages without a reply yet
        self._row: Words = np.zeros(0, np.int32)
        self._ahead: Words | None = None
        self._forced: tuple[int, ...] = ()
        self._spent = self._excess = 0.0

    def __del__(self) -> None:
        if self._client is not None:
            self._client.close(self.id)

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token has come, or an error."""
        return bool(self.error) or (self._client is not None and not self._due)

    @property
    def expensive(self) -> bool:
        """Whether masks take so long that no step waits for them."""
        return self.grammar in self._processes.expensive

    @property
    def row_seconds(self) -> float:
        """The expected seconds that a mask adds to a step."""
        return self._processes.row_seconds

    def spend(self, seconds: float, rows: int) -> None:
        """Record the time that applying masks took."""
        self._processes.spend(seconds, rows)

    def open(self) -> None:
        """Ask for the first mask, unless that has been done."""
        if self._client is None and not self.error:
            self._client = self._processes.slow if self.expensive else self._processes.quick
            self._ask(Open(self.id, self.grammar, tuple(self._tokens_so_far)))

    def advance(self, tokens: Sequence[int]) -> None:
        """Append tokens of the answer, without its end-of-text token, and ask for the next mask."""
        self.open()
        self._tokens_so_far += tokens
        self._ahead = None
        self._ask(Advance(self.id, tuple(tokens)))

    def forced(self) -> list[int]:
        """Tokens that the grammar forces next: drafts that are almost always accepted."""
        return list(self._forced)

    def look_ahead(self, drafts: Sequence[int]) -> None:
        """Ask for the masks after each of these drafts."""
        self._ahead = None
        self._ask(LookAhead(self.id, tuple(drafts)))

    def settle(self, seconds: float) -> None:
        """Wait up to `seconds` for replies, unless they are late already."""
        self._processes.settle(seconds)

    def words(self, drafts: int) -> Words:
        """Packed masks [1 + drafts, ceil(V / 32)]: of the next token, and after each draft of the last `look_ahead`.
        Only the first row while those have not come; for the first row it waits."""
        self.open()
        while not self.error and any(kind is not LookAhead for kind in self._due):
            self._processes.wait(1.0)
        if not drafts or self._ahead is None or len(self._ahead) != drafts:
            return self._row[None]
        return np.concatenate([self._row[None], self._ahead])

    def masks(self, drafts: Sequence[int] = ()) -> NDArray[np.bool_]:
        """The allowed tokens as booleans, [1 + drafts, V]: now, and after each draft. Waits for them.

        Rows after a draft that the grammar forbids allow nothing. A grammar that is complete allows only the
        end-of-text token.
        """
        self.wait()
        if drafts:
            self.look_ahead(drafts)
            self.wait()
        return unpacked(self.words(len(drafts)), self._processes.vocabulary)

    def wait(self) -> None:
        """Wait until the mask of the next token has come."""
        self.open()
        while not self.ready:
            self._processes.wait(1.0)

    def take(self, masks: Masks) -> None:
        """Take a reply of the mask process."""
        kind = self._due.popleft()
        words = -(-self._processes.vocabulary // 32)
        rows = np.frombuffer(masks.rows, np.int32).reshape(-1, words)
        if kind is LookAhead:
            self._ahead = rows
        elif len(rows):
            self._row, self._forced = rows[0], masks.forced
        self._count(masks.seconds)
        if masks.error:
            self.error = first_line(masks.error)
        elif self._spent > SPENT_SECONDS + SPENT_PER_TOKEN * len(self._tokens_so_far):
            self.error = f"to find out what may follow took {self._spent:.1f} s for {len(self._tokens_so_far)} tokens"
        elif self.expensive and self._client is self._processes.quick and not self._due:
            self._client.close(self.id)
            self._client = None
            self.open()

    def lost(self, reason: str) -> None:
        """The mask process ended; with a reason if it was working for this answer."""
        self._due.clear()
        self._client = self._ahead = None
        if reason:
            self.error = f"what may follow could not be found out: {reason}"
        else:
            self.open()

    def _count(self, seconds: float) -> None:
        self._spent += seconds
        self._excess = max(0.0, self._excess + seconds - USUAL_SECONDS)
        if self._excess > EXPENSIVE_SECONDS and not self.expensive:
            self._processes.mark_expensive(self.grammar)

    def _ask(self, message: ToMasks) -> None:
        if self._client is None:
            return  # the answer has ended with an error
        if self._started != (started := self._client.start()):
            self._started = started
            if not isinstance(message, Open):
                self._send(Open(self.id, self.grammar, tuple(self._tokens_so_far)))
                if isinstance(message, Advance):
                    return
        self._send(message)

    def _send(self, message: ToMasks) -> None:
        assert self._client is not None
        self._due.append(type(message))
        self._client.ask(self, message)


def unpacked(words_RW: Words, vocabulary: int) -> NDArray[np.bool_]:
    """Packed masks as booleans, [R, V]."""
    bytes_RB = np.ascontiguousarray(words_RW).view(np.uint8)
    return np.unpackbits(bytes_RB, axis=1, bitorder="little", count=vocabulary).view(np.bool_)


def first_line(text: str) -> str:
    """A library error without the dump of its state or of a grammar that the caller never saw."""
    return " ".join(re.split(r"\n(?:<state>|<non-verbose|\s*\d+ \|)", text)[0].split())[:300]
