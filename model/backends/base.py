"""What a backend is: code that turns a loaded decoder into a `Runnable` for one kind of hardware.

The engine, its sampler and its statistics ask a runnable and never name a backend (see `choose.py`).
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch, Cache, Pages
from model.decoder import Decoder
from model.options import Options
from model.sampling import Chosen, SamplingInputs
from model.shapes.decoder import DecoderConfig
from model.step import Observer


class SamplingOps(Protocol):
    """What the sampler leaves to the backend that made the logits."""

    def greedy(self, logits_BV: Tensor) -> list[int]:
        """The best token of each row, of equals the lowest; -1 for a row that is not finite."""
        ...

    def constrain(
        self, logits_BV: Tensor, raw_BV: Tensor, allowed_MW: NDArray[np.int32], mask_of_B: NDArray[np.int64]
    ) -> Tensor:
        """Float32 logits with what masks of packed bits forbid at minus infinity; a row's mask is -1 for none.

        Where nothing finite is left, the row is taken from `raw_BV` first.
        """
        ...

    def draw(self, logits_BV: Tensor, rows_R: NDArray[np.int64], params_R: NDArray[np.void]) -> NDArray[np.int64]:
        """One token for each row of `rows_R` of float32 logits, each with a finite best one, by its `PARAMETERS`.

        Top-k applies first, then top-p to the rest; min-p is relative to the best token. Where none of them cuts, a row
        draws in vocabulary order, else from the best token on.
        """
        ...


class DeviceSamplingOps(Protocol):
    """What a sampler on the device leaves to the backend that made the logits."""

    def choose(self, logits_RV: Tensor, inputs: SamplingInputs) -> Chosen:
        """A token of each row: the best one, of equals the lowest, or a drawn one. Nothing is waited for.

        Edits come first, then what settings allow, then grammars: where these leave nothing finite, a row is taken from
        the model's logits first. Top-k applies before top-p, top-p to what it leaves; min-p is relative to the best
        token. Where none of them cuts, a row draws in vocabulary order, else from the best token on.
        """
        ...


class Runnable(SamplingOps, Protocol):
    """A decoder, ready to compute steps."""

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        ...

    @property
    def backend(self) -> str:
        """The name of the backend that made it."""
        ...

    @property
    def kernels(self) -> str:
        """What it runs on, in one word: an instruction set, or "torch"."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a row's logits are the same bits in any batch and at any chunking."""
        ...

    @property
    def rules(self) -> bool:
        """Whether it runs routing rules other than the family's (`RoutingRule`), and tells routes."""
        ...

    @property
    def sets(self) -> bool:
        """Whether it runs rules that keep some experts alone (`RoutingRule.kept`)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights and the cache are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values in the cache."""
        ...

    @property
    def workspace(self) -> int:
        """Bytes that it takes beside weights and cache: for attention, and for what it keeps between steps."""
        ...

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> Cache:
        """An empty cache of so many blocks, with states for `slots` sequences."""
        ...

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """The numbers of tokens that steps in which every sequence has one new token are padded to, rising; beyond the
        last, and where there are none, they are computed as they are."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether `launch` returns before the device has computed, so that the host may plan the next step."""
        ...

    @property
    def device_sampling(self) -> DeviceSamplingOps | None:
        """What samples where the logits are; there is something where steps overlap."""
        ...

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], on the CPU. Keys, values and states are written to the pages' cache."""
        ...

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """The same where they are computed, not waited for. The host's tensors may be overwritten once it returns; the
        logits may be overwritten by the next launch, so what reads them must be launched before it."""
        ...

    def load_spread(self, loads: Sequence[Tensor]) -> tuple[int, float]:
        """How many experts have any pairs, and the sum over the MoE layers of the busiest expert's pairs over the mean.

        `loads`: what the model's passes told an observer, one tensor per MoE layer or one per pass, as this backend
        tells them.
        """
        ...


class Backend(Protocol):
    """One way to run decoders."""

    def provide(self) -> None:
        """Get ready whatever models come: load or compile what is missing."""
        ...

    def refusal(self, config: DecoderConfig, options: Options) -> str | None:
        """Why this backend cannot run such a decoder, or None.

        It fails closed: a shape, a field or a value that the backend has not been written for is refused.
        """
        ...

    def groups(self, decoder: Decoder) -> Collection[str]:
        """The names of the decoder's parameters that may be `Grouped`: it multiplies them without widening."""
        ...

    def prepare(self, decoder: Decoder, options: Options) -> Runnable:
        """The decoder, which `refusal` has let pass, in the form that runs. It may take the weights over."""
        ...
