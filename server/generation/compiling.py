"""Has the engine compile a request's grammar before the request takes a slot, so that none is held meanwhile.

A bounded number of grammars waits. Not here: compiling (see `engine/grammars/compiler.py`).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from engine.types import TimedEvent
from model.errors import EngineBusy, MoedialError
from server.errors import QueueTimeout
from server.protocols import EngineProtocol

MAX_WAITING = 32  # requests at a time: each may take the compiler a second
MAX_REMEMBERED = 4096  # digests of grammars that compiled


class GrammarCheckQueue:
    """Asks the engine to compile grammars, except those that the same engine process has compiled before."""

    def __init__(self, engine: EngineProtocol) -> None:
        self._engine = engine
        # digests, and in which engine process; the oldest first
        self._compiled: OrderedDict[bytes, int] = OrderedDict()
        self.waiting = 0

    async def compile(self, id: str, grammar: str, timeout: float) -> None:
        """Wait until a grammar can be used, up to `timeout` seconds. `id` is unique among running requests.

        Raises:
            InvalidRequest: it cannot be used.
            EngineBusy: too many wait already, or it took too long.
        """
        digest, process = sha256(grammar.encode("utf-8", "surrogatepass")).digest(), self._engine.restarts
        if self._compiled.get(digest) == process:
            return
        if self.waiting >= MAX_WAITING:
            raise EngineBusy(f"the queue of grammars is full: {self.waiting} wait to be compiled; try again later")
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._compile(id, grammar)
        except TimeoutError:
            raise QueueTimeout(f"waited {timeout:g} s for the grammar to be compiled; try again later", 5) from None
        finally:
            self.waiting -= 1
        self._compiled[digest] = process
        if len(self._compiled) > MAX_REMEMBERED:
            self._compiled.popitem(last=False)

    async def _compile(self, id: str, grammar: str) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_result(found: Sequence[TimedEvent] | MoedialError) -> None:
            if done.done():
                return
            if isinstance(found, MoedialError):
                done.set_exception(found)
            else:
                done.set_result(None)

        self._engine.compile(id, grammar, on_result)
        try:
            await done
        finally:
            self._engine.abort(id)
