"""`MaskWaits`: how long the engine waits for grammar masks before a step.

Masks are computed by processes of their own (`engine/grammars/mask_process.py`). It does not depend on plans or
sequences.
"""

from collections.abc import Callable

from engine.grammars.compiler import GrammarCompiler
from engine.grammars.mask_client import MaskClient
from model.errors import InvalidRequest

MASK_WAIT_SECONDS, MASK_WAIT_SHARE = 0.002, 0.1  # a step waits for masks this long, or this share of the last step
IDLE_WAIT_SECONDS = 0.02  # how long it waits if there is nothing else to do


class MaskWaits:
    """Waits for the masks of the grammars that `grammars` has compiled. None: the engine has no grammars."""

    def __init__(self, grammars: GrammarCompiler | None) -> None:
        self._grammars = grammars
        self._seconds = 0.0  # spent on masks so far

    def compiler(self) -> GrammarCompiler:
        """The grammar compiler for this model's vocabulary.

        Raises:
            InvalidRequest: the model has no tokenizer.
        """
        if self._grammars is None:
            raise InvalidRequest("this engine has no tokenizer, which grammars need", "grammar")
        return self._grammars

    @property
    def awaited(self) -> list[MaskClient]:
        """The clients of mask processes with replies due: each becomes readable when a mask has come."""
        return self._grammars.processes.awaited if self._grammars else []

    def collect(self) -> None:
        """Process the masks that have come, without waiting."""
        if self._grammars is not None:
            self._grammars.processes.collect()

    def wait(self, last_s: float, has_plain: Callable[[], bool]) -> None:
        """Wait for masks that are due: a tenth of the last step's duration if answers without a grammar would be
        delayed (`has_plain`, which is called only if masks are due), else up to `IDLE_WAIT_SECONDS`."""
        if self._grammars is not None and self._grammars.processes.busy:
            short = max(MASK_WAIT_SECONDS, MASK_WAIT_SHARE * last_s)
            self._grammars.processes.settle(short if has_plain() else IDLE_WAIT_SECONDS)

    def wait_idle(self) -> bool:
        """Wait briefly for a mask where a step has nothing else to do; returns whether one is due."""
        if self._grammars is None or not self._grammars.processes.busy:
            return False
        self._grammars.processes.wait(IDLE_WAIT_SECONDS)
        return True

    def stop(self) -> None:
        """End the mask processes."""
        if self._grammars is not None:
            self._grammars.processes.stop()

    def seconds(self) -> float:
        """Seconds spent on masks since the last call."""
        before = self._seconds
        self._seconds = self._grammars.processes.seconds if self._grammars else 0.0
        return self._seconds - before
