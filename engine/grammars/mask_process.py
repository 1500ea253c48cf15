"""A process that computes masks: `python -m engine.grammars.mask_process FD NICENESS TOKENIZER VOCABULARY END…`.

The library holds the interpreter's lock while it takes in a token, which a grammar can make arbitrarily dear, and its
automata grow with use. So it runs beside the engine: no step waits for it, its memory is its own, and it can be killed.
It knows grammars and tokens, no requests and no logits.
"""

import ctypes
import os
import resource
import select
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple

import msgspec
import numpy as np
import psutil
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from engine import parent
from engine.grammars.forced import Forced
from engine.grammars.mask_messages import Advance, Ahead, Close, Frames, Masks, Open, Ready, ToMasks, frame
from engine.grammars.validator import LIMITS, MEMORY

KEPT_BYTES = 256 << 20  # of compiled grammars that may be asked for again, beside those that are in use
WEIGH_SECONDS = 0.05  # between two looks at the memory
READ_SIZE = 1 << 20


class Place:
    """How far one answer has come in its grammar. An automaton of its own is shared with no other answer."""

    def __init__(self, inner: LLMatcher, opened: Open, own: bool) -> None:
        self.inner, self.grammar, self.own = inner, opened.grammar, own
        self.said: list[int] = []
        self.forced: list[int] = []  # what must come next, as far as it was looked for


class Key(NamedTuple):
    """A compilation: of a grammar, for all who ask for it, or as one answer's own."""

    grammar: str
    own: int = 0  # the answer's id


class MaskServer:
    """Answers messages through `send`. Grammars are compiled on a thread, `wake` is called when one is done."""

    def __init__(
        self,
        tokenizer: LLTokenizer,
        vocabulary: int,
        ends: list[int],
        send: Callable[[Masks], None],
        wake: Callable[[], None],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._tokenizer, self._ends, self._send, self._wake = tokenizer, frozenset(ends), send, wake
        self._vocabulary = vocabulary
        self._forced = Forced(tokenizer, vocabulary, self._ends)
        self._places: dict[int, Place] = {}
        self.kept: OrderedDict[str, LLMatcher] = OrderedDict()  # compiled and never moved, least recently used first
        self._compiling: dict[Key, list[Open]] = {}  # who waits
        self._later: dict[int, list[ToMasks]] = {}  # what was asked since about those that wait
        self._compiled: SimpleQueue[tuple[Key, LLMatcher]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._kept_bytes, self._empty, self._weighed = kept_bytes, live_bytes(), 0.0

    def handle(self, message: ToMasks) -> None:
        """Carry out one message, or keep it until what it asks about has been compiled."""
        began = time.thread_time()
        if message.id in self._later and not isinstance(message, Close):
            return self._later[message.id].append(message)
        match message:
            case Open():
                self._open(message, began)
            case Advance(id, tokens) if place := self._places.get(id):
                self._advance(id, place, tokens, began)
            case Ahead(id, drafts) if place := self._places.get(id):
                self._ahead(id, place, drafts, began)
            case Close(id):
                self._places.pop(id, None)
                self._later.pop(id, None)
                for waiting in self._compiling.values():
                    waiting[:] = [opened for opened in waiting if opened.id != id]
            case _:
                self._send(Masks(message.id, b"", error="this answer is not known"))
        return None

    def collect(self) -> None:
        """Go on with what waited for a compiled grammar, and keep to the bound of memory."""
        while not self._compiled.empty():
            key, inner = self._compiled.get()
            if not key.own and not inner.is_error():
                self.kept[key.grammar] = inner
            for opened in self._compiling.pop(key):
                later = self._later.pop(opened.id)
                self._begin(opened, inner.deep_copy(), bool(key.own), time.thread_time())
                for message in later:
                    self.handle(message)
        if time.monotonic() - self._weighed > WEIGH_SECONDS:
            self.weigh()

    def weigh(self) -> None:
        """Let go of compiled grammars, the least recently used first, while more memory is in use than may be kept."""
        while self.kept and live_bytes() - self._empty > self._kept_bytes:
            self.kept.popitem(last=False)
        self._weighed = time.monotonic()

    def _open(self, opened: Open, began: float) -> None:
        found = self.kept.get(opened.grammar)
        if found is None:
            return self._compile(opened, Key(opened.grammar))
        self.kept.move_to_end(opened.grammar)
        return self._begin(opened, found.deep_copy(), False, began)

    def _compile(self, opened: Open, key: Key) -> None:
        self._later[opened.id] = []
        waiting = self._compiling.setdefault(key, [])
        waiting.append(opened)
        if len(waiting) == 1:
            self._pool.submit(self._compile_now, key)

    def _compile_now(self, key: Key) -> None:
        inner = LLMatcher(self._tokenizer, key.grammar, log_level=0, limits=LIMITS)
        self._compiled.put((key, inner))
        self._wake()

    def _begin(self, opened: Open, inner: LLMatcher, own: bool, began: float) -> None:
        place = self._places[opened.id] = Place(inner, opened, own)
        self._advance(opened.id, place, opened.tokens, began)

    def _advance(self, id: int, place: Place, tokens: tuple[int, ...], began: float) -> None:
        for token in tokens:
            if token in self._ends:
                break
            place.said.append(token)
            if not place.inner.consume_token(token):
                break
        row = self._fill(place.inner)
        as_expected = place.forced[: len(tokens)] == list(tokens)
        place.forced = place.forced[len(tokens) :] if as_expected else []
        place.forced = place.forced or self._forced.after(place.inner, row)
        if place.inner.is_error() and not place.own and place.inner.stop_reason() != "ParserTooComplex":
            return self._start_over(id, place)
        error = place.inner.get_error() if place.inner.is_error() else ""
        return self._send(Masks(id, row.tobytes(), tuple(place.forced), time.thread_time() - began, error))

    def _start_over(self, id: int, place: Place) -> None:
        """Give an answer an automaton of its own: the shared one has reached a limit, for which any of those that share
        it may be to blame. It is not used for further answers."""
        self.kept.pop(place.grammar, None)
        del self._places[id]
        self._compile(Open(id, place.grammar, tuple(place.said)), Key(place.grammar, own=id))

    def _ahead(self, id: int, place: Place, drafts: tuple[int, ...], began: float) -> None:
        """Masks after each guess. After one that is forbidden, nothing is possible."""
        rows = np.zeros((len(drafts), -(-self._vocabulary // 32)), np.int32)
        taken = 0
        for row, draft in zip(rows, drafts, strict=True):
            if draft in self._ends or not place.inner.try_consume_tokens([draft]):
                break
            taken += 1
            row[:] = self._fill(place.inner)
        if place.inner.is_error():  # the next token finds out why
            return self._send(Masks(id, b"", (), time.thread_time() - began))
        place.inner.rollback(taken)
        return self._send(Masks(id, rows.tobytes(), (), time.thread_time() - began))

    def _fill(self, inner: LLMatcher) -> NDArray[np.int32]:
        rows: NDArray[np.int32] = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(inner, rows, 0)
        row: NDArray[np.int32] = rows[0]
        return row


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


def live_bytes() -> int:
    """Memory that is in use: what the C library has given out, or where it does not say, what is resident."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return int(psutil.Process().memory_info().rss)
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.used) + int(found.hblkhd)


def main() -> None:
    parent.follow()
    descriptor, niceness, path, vocabulary, *ends = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.nice(int(niceness))
    tokenizer = LLTokenizer(path, n_vocab=int(vocabulary), eos_token=[int(end) for end in ends])
    with socket.socket(fileno=int(descriptor)) as sock:
        waker, woken = socket.socketpair()
        server = MaskServer(
            tokenizer,
            int(vocabulary),
            [int(end) for end in ends],
            lambda masks: sock.sendall(frame(masks)),
            lambda: waker.sendall(b"!"),
        )
        with suppress(ConnectionError):  # the engine ended without reading what was sent
            sock.sendall(frame(Ready()))
            serve(server, sock, woken)


def serve(server: MaskServer, sock: socket.socket, woken: socket.socket) -> None:
    """Until the engine closes its end."""
    decoder, frames = msgspec.msgpack.Decoder(ToMasks), Frames()
    while True:
        readable, _, _ = select.select([sock, woken], [], [])
        if woken in readable:
            woken.recv(READ_SIZE)
        if sock in readable:
            data = sock.recv(READ_SIZE)
            if not data:
                return
            for payload in frames.feed(data):
                server.handle(decoder.decode(payload))
        server.collect()


if __name__ == "__main__":
    main()
