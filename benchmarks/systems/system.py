"""What `benchmarks.offline` asks of a system that runs a checkpoint: us or a peer. It is the same for all of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Weights = Literal["bf16", "8 bit", "8 bit experts", "4 bit", "4 bit experts"]


class PeerFailed(RuntimeError):
    """A peer could not run this; the benchmark goes on without it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """One measured run of a batch, tokens per second. `touched`: experts (∞-MoE: blocks) read per decode step, summed
    over the layers, where a system can tell."""

    prefill: float
    decode: float
    touched: float | None = None


@dataclass(frozen=True, slots=True)
class LongRates:
    """Tokens per second at one length and batch: of the whole prompt, and of decoding after it (all sequences)."""

    context: int
    batch: int
    prefill: float
    decode: float
    touched: float | None = None  # as of `Rates`


class Session(Protocol):
    """One checkpoint, loaded, at one expert count."""

    def warm_up(self) -> None:
        """Run once what is not measured, if `run` does not: while other systems ran, pages of its programs may have
        left memory. Raises PeerFailed."""
        ...

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        """Prefill and decode each batch once. Raises PeerFailed."""
        ...


class System(Protocol):
    """A system and how it stores weights; ratios are taken between systems that run the same kind of file, else between
    those that store weights alike. `file`: its kind, where llama.cpp's quantiser makes one of the checkpoint."""

    name: str
    weights: Weights
    file: str

    def version(self) -> str:
        """The system's version, for the record."""
        ...

    def refuses(self, config: dict[str, Any]) -> str | None:
        """Why it cannot run a checkpoint of this config.json here; None if it can."""
        ...

    def open(self, folder: Path, count: int) -> AbstractContextManager[Session]:
        """Load. Raises PeerFailed."""
        ...
