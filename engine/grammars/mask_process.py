"""The mask process: `python -m engine.grammars.mask_process FD NICENESS TOKENIZER VOCABULARY END…`.

The library holds the interpreter's lock while it consumes a token, which a grammar can make arbitrarily slow, and its
automata grow with use. In a process of its own it delays no step, has its own memory limit, and can be killed.
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
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import msgspec
import numpy as np
import psutil
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from engine import parent
from engine.grammars.forced import ForcedTokens
from engine.grammars.mask_messages import (
    Advance,
    Close,
    Frames,
    LookAhead,
    Masks,
    Open,
    TokenizerLoaded,
    ToMasks,
    frame,
)
from engine.grammars.validator import LIMITS, MEMORY
from weights.small_files import TOKENIZER, small_files

KEPT_BYTES = 256 << 20  # of cached compiled grammars, in addition to those in use
EVICT_SECONDS = 0.05  # between two checks of the memory in use
READ_SIZE = 1 << 20


class GrammarState:
    """One answer's position in its grammar. `own`: its automaton is not shared with other answers."""

    def __init__(self, inner: LLMatcher, opened: Open, own: bool) -> None:
        self.inner, self.grammar, self.own = inner, opened.grammar, own
        self.tokens: list[int] = []
        self.forced: list[int] = []  # tokens that must come next, as far as looked ahead


class CompileKey(NamedTuple):
    """A compilation: of a grammar for all its answers, or for one answer."""

    grammar: str
    own: int = 0  # the answer's id


class MaskServer:
    """Replies to messages through `send`. Grammars are compiled on a thread; `wake` is called when one is done."""

    def __init__(
        self,
        tokenizer: LLTokenizer,
        vocabulary: int,
        ends: list[int],
        send: Callable[[Masks], None],
        wake: Callable[[], None],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._send, self._wake = send, wake
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, frozenset(ends)
        self._forced = ForcedTokens(tokenizer, vocabulary, self._ends)
        self._states: dict[int, GrammarState] = {}
        self.kept: OrderedDict[str, LLMatcher] = OrderedDict()  # cache in initial state, least recently used first
        self._compiling: dict[CompileKey, list[Open]] = {}  # the answers that wait for each compilation
        self._later: dict[int, list[ToMasks]] = {}  # later messages of answers that wait
        self._compiled: SimpleQueue[tuple[CompileKey, LLMatcher]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._kept_bytes, self._empty, self._evicted_at = kept_bytes, live_bytes(), 0.0

    def handle(self, message: ToMasks) -> None:
        """Handle one message, or keep it until its grammar has been compiled."""
        began = time.thread_time()
        if message.id in self._later and not isinstance(message, Close):
            return self._later[message.id].append(message)
        match message:
            case Open():
                self._open(message, began)
            case Advance(id, tokens) if state := self._states.get(id):
                self._advance(id, state, tokens, began)
            case LookAhead(id, drafts) if state := self._states.get(id):
                self._ahead(id, state, drafts, began)
            case Close(id):
                self._states.pop(id, None)
                self._later.pop(id, None)
                for waiting in self._compiling.values():
                    waiting[:] = [opened for opened in waiting if opened.id != id]
            case _:
                self._send(Masks(message.id, b"", error="this answer is not known"))
        return None

    def collect(self) -> None:
        """Serve the answers whose grammars have been compiled, and keep within the memory limit."""
        while not self._compiled.empty():
            key, inner = self._compiled.get()
            if not key.own and not inner.is_error():
                self.kept[key.grammar] = inner
            for opened in self._compiling.pop(key):
                later = self._later.pop(opened.id)
                self._follow(opened, inner.deep_copy(), bool(key.own), time.thread_time())
                for message in later:
                    self.handle(message)
        if time.monotonic() - self._evicted_at > EVICT_SECONDS:
            self.evict()

    def evict(self) -> None:
        """Drop cached grammars, the least recently used first, while more memory is in use than allowed."""
        while self.kept and live_bytes() - self._empty > self._kept_bytes:
            self.kept.popitem(last=False)
        self._evicted_at = time.monotonic()

    def _open(self, opened: Open, began: float) -> None:
        found = self.kept.get(opened.grammar)
        if found is None:
            return self._compile(opened, CompileKey(opened.grammar))
        self.kept.move_to_end(opened.grammar)
        return self._follow(opened, found.deep_copy(), False, began)

    def _compile(self, opened: Open, key: CompileKey) -> None:
        self._later[opened.id] = []
        waiting = self._compiling.setdefault(key, [])
        waiting.append(opened)
        if len(waiting) == 1:
            self._pool.submit(self._compile_now, key)

    def _compile_now(self, key: CompileKey) -> None:
        inner = LLMatcher(self._tokenizer, key.grammar, log_level=0, limits=LIMITS)
        self._compiled.put((key, inner))
        self._wake()

    def _follow(self, opened: Open, inner: LLMatcher, own: bool, began: float) -> None:
        state = self._states[opened.id] = GrammarState(inner, opened, own)
        self._advance(opened.id, state, opened.tokens, began)

    def _advance(self, id: int, state: GrammarState, tokens: tuple[int, ...], began: float) -> None:
        for token in tokens:
            if token in self._ends:
                break
            state.tokens.append(token)
            if not state.inner.consume_token(token):
                break
        row = self._fill(state.inner)
        as_expected = state.forced[: len(tokens)] == list(tokens)
        state.forced = state.forced[len(tokens) :] if as_expected else []
        state.forced = state.forced or self._forced.after(state.inner, row)
        if state.inner.is_error() and not state.own and state.inner.stop_reason() != "ParserTooComplex":
            return self._recompile_alone(id, state)
        error = state.inner.get_error() if state.inner.is_error() else ""
        forced, seconds = tuple(state.forced), time.thread_time() - began
        return self._send(Masks(id, row.tobytes(), forced, seconds, error))

    def _recompile_alone(self, id: int, state: GrammarState) -> None:
        """Give an answer an automaton of its own: the shared one has reached a limit, which any of its answers may have
        caused. The shared one is not used for further answers."""
        self.kept.pop(state.grammar, None)
        del self._states[id]
        again = Open(id, state.grammar, tuple(state.tokens))
        self._compile(again, CompileKey(state.grammar, own=id))

    def _ahead(self, id: int, state: GrammarState, drafts: tuple[int, ...], began: float) -> None:
        """Reply with the masks after each draft; the rows after a forbidden draft allow nothing."""
        rows = np.zeros((len(drafts), -(-self._vocabulary // 32)), np.int32)
        taken = 0
        for row, draft in zip(rows, drafts, strict=True):
            if draft in self._ends or not state.inner.try_consume_tokens([draft]):
                break
            taken += 1
            row[:] = self._fill(state.inner)
        if state.inner.is_error():  # the next `Advance` reports why
            return self._send(Masks(id, b"", (), time.thread_time() - began))
        state.inner.rollback(taken)
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
    """Bytes of memory in use: allocated by the C library, or, if it has no `mallinfo2`, resident."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return int(psutil.Process().memory_info().rss)
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.used) + int(found.hblkhd)


def main() -> None:
    parent.die_with_parent()
    descriptor, niceness, path, size, *end_ids = sys.argv[1:]
    vocabulary, ends = int(size), [int(end) for end in end_ids]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.nice(int(niceness))
    tokenizer = LLTokenizer(small_files(Path(path)).text(TOKENIZER), n_vocab=vocabulary, eos_token=ends)
    with socket.socket(fileno=int(descriptor)) as sock:
        waker, woken = socket.socketpair()
        server = MaskServer(
            tokenizer,
            vocabulary,
            ends,
            lambda masks: sock.sendall(frame(masks)),
            lambda: waker.sendall(b"!"),
        )
        with suppress(ConnectionError):  # the engine ended without reading the last replies
            sock.sendall(frame(TokenizerLoaded()))
            serve(server, sock, woken)


def serve(server: MaskServer, sock: socket.socket, woken: socket.socket) -> None:
    """Serve until the engine closes its end."""
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
