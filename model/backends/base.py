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
    """The part of sampling that the backend does, which made the logits."""

    def greedy(self, logits_BV: Tensor) -> list[int]:
        """The index of the highest logit of each row, the lowest of equal ones; -1 for a row that is not finite."""
        ...

    def constrain(
        self, logits_BV: Tensor, raw_BV: Tensor, allowed_MW: NDArray[np.int32], mask_of_B: NDArray[np.int64]
    ) -> Tensor:
        """Float32 logits with minus infinity where the row's mask of packed bits is 0. `mask_of_B`: each row's mask, -1
        for none. A row without a finite value left is read from `raw_BV` instead, and masked.
        """
        ...

    def draw(self, logits_BV: Tensor, rows_R: NDArray[np.int64], params_R: NDArray[np.void]) -> NDArray[np.int64]:
        """One token for each row of `rows_R` of float32 logits, each with a finite best one, by its `PARAMETERS`.

        Top-k applies first, then top-p to the rest; min-p is relative to the best token. If none of them is set, a row
        draws in vocabulary order, else from the best token on.
        """
        ...


class DeviceSamplingOps(Protocol):
    """The part of sampling that the backend does on its device, without a wait by the host."""

    def choose(self, logits_RV: Tensor, inputs: SamplingInputs) -> Chosen:
        """A token of each row: the best one (the lowest of equal ones) or a drawn one. Does not wait for the device.

        Edits are applied first, then the settings' allowed tokens, then grammars. If these leave no finite value, the
        grammar is applied to the model's logits. Top-k applies before top-p; min-p is relative to the best token. If
        none of them is set, a row draws in vocabulary order, else from the best token on.
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
        """Whether it runs routing rules other than the family's (`RoutingRule`), and reports routes."""
        ...

    @property
    def sets(self) -> bool:
        """Whether it runs rules that allow only some experts (`RoutingRule.kept`)."""
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
        """The numbers of tokens, rising, to which steps with one new token for every sequence are padded. Larger steps
        are not padded; empty: no step is."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether `launch` returns before the device has computed, so that the host may plan the next step."""
        ...

    @property
    def device_sampling(self) -> DeviceSamplingOps | None:
        """Sampling on the device; not None if steps overlap."""
        ...

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], on the CPU. Keys, values and states are written to the pages' cache."""
        ...

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """The same on the device, without waiting. The host's tensors may be overwritten once it returns. The next
        launch may overwrite the logits, so whatever reads them must be launched before."""
        ...

    def load_spread(self, loads: Sequence[Tensor]) -> tuple[int, float]:
        """How many experts have any pairs, and the sum over the MoE layers of the busiest expert's pairs over the mean.

        `loads`: the loads that this backend reported to an observer, one tensor per MoE layer or one per pass.
        """
        ...


class Backend(Protocol):
    """One way to run decoders."""

    def provide(self) -> None:
        """Load or compile the kernels that are missing, before any model is known."""
        ...

    def refusal(self, config: DecoderConfig, options: Options) -> str | None:
        """Why this backend cannot run such a decoder, or None.

        It fails closed: a shape, a field or a value that the backend has not been written for is refused.
        """
        ...

    def groups(self, decoder: Decoder) -> Collection[str]:
        """The names of the decoder's parameters that may be `Grouped` (quantised): products read them as they are
        stored."""
        ...

    def prepare(self, decoder: Decoder, options: Options) -> Runnable:
        """The decoder in the form that runs; `refusal` must have returned None. It may take over the weights."""
        ...
