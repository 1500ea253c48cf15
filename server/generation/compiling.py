"""Has the engine compile a call's grammar before the call takes its turn: it holds no place in the batch meanwhile.

It knows grammars as texts, and a bounded queue of its own; what is wrong with one, the engine says.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from engine.types import TimedEvent
from model.errors import EngineBusy, MoedialError
from server.errors import QueueTimeout
from server.protocols import Engine

WAITING = 32  # calls at a time: each may take the compiler a second
REMEMBERED = 4096  # grammars that were found good, by their digests


class Compiler:
    """Grammars that this engine process has compiled are not asked about again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._good: OrderedDict[bytes, int] = OrderedDict()  # and in which engine process; the oldest first
        self.waiting = 0

    async def compile(self, id: str, grammar: str, timeout: float) -> None:
        """Wait until a grammar can be used, up to `timeout` seconds. `id` is unique among running requests.

        Raises:
            InvalidRequest: it cannot be used.
            EngineBusy: too many wait already, or it took too long.
        """
        digest, process = sha256(grammar.encode("utf-8", "surrogatepass")).digest(), self._engine.restarts
        if self._good.get(digest) == process:
            return
        if self.waiting >= WAITING:
            raise EngineBusy(f"the queue of grammars is full: {self.waiting} wait to be compiled; try again later")
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._compiled(id, grammar)
        except TimeoutError:
            raise QueueTimeout(f"waited {timeout:g} s for the grammar to be compiled; try again later", 5) from None
        finally:
            self.waiting -= 1
        self._good[digest] = process
        if len(self._good) > REMEMBERED:
            self._good.popitem(last=False)

    async def _compiled(self, id: str, grammar: str) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(found: Sequence[TimedEvent] | MoedialError) -> None:
            if done.done():
                return
            if isinstance(found, MoedialError):
                done.set_exception(found)
            else:
                done.set_result(None)

        self._engine.compile(id, grammar, take)
        try:
            await done
        finally:
            self._engine.abort(id)
