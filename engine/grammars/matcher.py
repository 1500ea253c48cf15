"""How far one answer has come in its grammar: which tokens may come next, as a process beside the engine finds out.

What is asked is answered a little later (`ready`); until then the answer waits, and the others of the batch do not.
A grammar whose masks are dear moves to a second process, where it delays only its like, and an answer that spends too
much ends with an error of its own. It knows no logits and no schedule.
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
from engine.grammars.mask_messages import Advance, Ahead, Masks, Open, ToMasks

HOT_SECONDS = 0.03  # of the processor beyond what masks usually cost, from which on a grammar is dear
USUAL_SECONDS = 0.001  # of one answer's token
SPENT_SECONDS, SPENT_PER_TOKEN = 0.25, 0.002  # what an answer may cost: at once, and for each of its tokens
NICENESS = 10  # of the process for dear grammars: on a busy machine it gets what the model leaves
SMOOTH = 0.05  # weight of the last masks for what one is expected to take
MOST_DEAR = 1000  # grammars that are remembered to be dear
MODULE = "engine.grammars.mask_process"

Words = NDArray[np.int32]
_ids = itertools.count(1)


class MaskProcesses:
    """One process for grammars as they usually are, and one, started when it is needed, for dear ones."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Sequence[int]) -> None:
        arguments = (tokenizer, str(vocabulary), *map(str, ends))
        self.quick, self.slow = MaskClient(MODULE, 0, *arguments), MaskClient(MODULE, NICENESS, *arguments)
        self.vocabulary = vocabulary
        self.dear: OrderedDict[str, None] = OrderedDict()  # grammars that are, those found last at the end
        self._late = False
        self.seconds = 0.0  # that steps spent on masks, in all
        self.row_seconds = 0.0  # for each mask, a moving average

    @property
    def busy(self) -> bool:
        """Whether an answer waits for its mask."""
        return self.quick.busy or self.slow.busy

    @property
    def awaited(self) -> list[MaskClient]:
        """What becomes readable when a reply has come."""
        return [client for client in (self.quick, self.slow) if client.busy]

    def collect(self) -> None:
        """Take in what has been answered."""
        self.quick.collect()
        self.slow.collect()

    def settle(self, seconds: float) -> None:
        """Wait for the usual masks, so long at the most; not again for those that were not there by then."""
        if not self.busy:
            return
        began, rows = time.monotonic(), self.quick.asked
        self._settle(began + seconds)
        self.spend(time.monotonic() - began, rows)

    def spend(self, seconds: float, rows: int) -> None:
        """Take in what a step spent on some masks. It waits for them, and applies them: a mask counts half in each."""
        self.seconds += seconds
        if rows:
            self.row_seconds += SMOOTH * (2 * seconds / rows - self.row_seconds)

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
        """Until something has been answered, or so long."""
        if self.busy:
            select.select(self.awaited, [], [], seconds)
            self.collect()

    def found_dear(self, grammar: str) -> None:
        """Answers that it constrains are in the slow process from now on."""
        self.dear[grammar] = None
        if len(self.dear) > MOST_DEAR:
            self.dear.popitem(last=False)


class Matcher:
    """Follows `grammar`, which has been found good. `error`: why nothing can follow any more."""

    def __init__(self, processes: MaskProcesses, grammar: str) -> None:
        self.id, self.grammar, self.error = next(_ids), grammar, ""
        self._processes = processes
        self._client: MaskClient | None = None
        self._started = 0  # which process of the client knows this answer
        self._said: list[int] = []
        self._due: deque[type[ToMasks]] = deque()  # what was asked and is not answered yet
        self._row: Words = np.zeros(0, np.int32)
        self._ahead: Words | None = None
        self._forced: tuple[int, ...] = ()
        self._spent = self._heat = 0.0

    def __del__(self) -> None:
        if self._client is not None:
            self._client.close(self.id)

    @property
    def ready(self) -> bool:
        """Whether it is known what may come next, or that nothing may."""
        return bool(self.error) or (self._client is not None and not self._due)

    @property
    def dear(self) -> bool:
        """Whether masks take so long that no step waits for them."""
        return self.grammar in self._processes.dear

    @property
    def row_seconds(self) -> float:
        """What a mask adds to a step, as expected."""
        return self._processes.row_seconds

    def spend(self, seconds: float, rows: int) -> None:
        """Take in what applying some masks took."""
        self._processes.spend(seconds, rows)

    def open(self) -> None:
        """Ask for the first mask, unless that has been done."""
        if self._client is None and not self.error:
            self._client = self._processes.slow if self.dear else self._processes.quick
            self._ask(Open(self.id, self.grammar, tuple(self._said)))

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in tokens that have become part of the answer; an end of the text is none."""
        self.open()
        self._said += tokens
        self._ahead = None
        self._ask(Advance(self.id, tuple(tokens)))

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the model thinks: guesses that are almost always right."""
        return list(self._forced)

    def look_ahead(self, drafts: Sequence[int]) -> None:
        """Ask what may follow each of these guesses."""
        self._ahead = None
        self._ask(Ahead(self.id, tuple(drafts)))

    def settle(self, seconds: float) -> None:
        """Wait so long for what was asked, unless it is late already."""
        self._processes.settle(seconds)

    def words(self, guesses: int) -> Words:
        """Packed masks [1 + guesses, ceil(V / 32)]: of the next token, and after each of the guesses that were looked
        ahead at. Only the first row as long as that has not been answered; for that one it waits, if it must."""
        self.open()
        while not self.error and any(kind is not Ahead for kind in self._due):
            self._processes.wait(1.0)
        if not guesses or self._ahead is None or len(self._ahead) != guesses:
            return self._row[None]
        return np.concatenate([self._row[None], self._ahead])

    def masks(self, drafts: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Which tokens may come next, [1 + drafts, V]: now, and after each of the guesses that the grammar allows.
        Waits until that is known.

        Rows after a guess that it forbids allow nothing: no answer gets there. A grammar that has come to its end
        allows the end of the text alone.
        """
        self.wait()
        if drafts:
            self.look_ahead(drafts)
            self.wait()
        return unpacked(self.words(len(drafts)), self._processes.vocabulary)

    def wait(self) -> None:
        """Until it is known what may come next."""
        self.open()
        while not self.ready:
            self._processes.wait(1.0)

    def take(self, masks: Masks) -> None:
        """A reply of the process."""
        kind = self._due.popleft()
        rows = np.frombuffer(masks.rows, np.int32).reshape(-1, -(-self._processes.vocabulary // 32))
        if kind is Ahead:
            self._ahead = rows
        elif len(rows):
            self._row, self._forced = rows[0], masks.forced
        self._count(masks.seconds)
        if masks.error:
            self.error = first_line(masks.error)
        elif self._spent > SPENT_SECONDS + SPENT_PER_TOKEN * len(self._said):
            self.error = f"to find out what may follow took {self._spent:.1f} s for {len(self._said)} tokens"
        elif self.dear and self._client is self._processes.quick and not self._due:
            self._client.close(self.id)
            self._client = None
            self.open()

    def lost(self, reason: str) -> None:
        """The process ended; with a reason, while it worked for this answer."""
        self._due.clear()
        self._client = self._ahead = None
        if reason:
            self.error = f"what may follow could not be found out: {reason}"
        else:
            self.open()

    def _count(self, seconds: float) -> None:
        self._spent += seconds
        self._heat = max(0.0, self._heat + seconds - USUAL_SECONDS)
        if self._heat > HOT_SECONDS and not self.dear:
            self._processes.found_dear(self.grammar)

    def _ask(self, message: ToMasks) -> None:
        if self._client is None:
            return  # it has ended with an error
        if self._started != (started := self._client.start()):
            self._started = started
            if not isinstance(message, Open):
                self._send(Open(self.id, self.grammar, tuple(self._said)))
                if isinstance(message, Advance):
                    return
        self._send(message)

    def _send(self, message: ToMasks) -> None:
        assert self._client is not None
        self._due.append(type(message))
        self._client.ask(self, message)


def unpacked(words_RW: Words, vocabulary: int) -> NDArray[np.bool_]:
    """Masks as booleans, [R, V]."""
    bytes_RB = np.ascontiguousarray(words_RW).view(np.uint8)
    return np.unpackbits(bytes_RB, axis=1, bitorder="little", count=vocabulary).view(np.bool_)


def first_line(text: str) -> str:
    """Without the library's dump of its state, or of a grammar that the caller never saw."""
    return " ".join(re.split(r"\n(?:<state>|<non-verbose|\s*\d+ \|)", text)[0].split())[:300]
