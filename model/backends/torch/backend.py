"""The reference backend: plain torch, every kind of layer. Several times slower than native kernels."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backends.base import DeviceSamplingOps
from model.backends.torch.attend import PagedAttend
from model.backends.torch.device_sampling import TorchDeviceSampling
from model.backends.torch.sampling import TorchSampling
from model.backends.torch.tiles import WORKSPACE
from model.batch import Batch, Cache, Pages
from model.decoder import Decoder
from model.devices import readable
from model.options import Options
from model.ranks import share
from model.shapes.decoder import DecoderConfig
from model.step import Observer


class TorchBackend:
    """Runs every decoder as it is."""

    def provide(self) -> None:
        """Torch is there."""

    def refusal(self, config: DecoderConfig, options: Options) -> str | None:
        """It has no 8-bit weights or caches, and divides only some decoders among ranks."""
        if options.kv_cache != "auto":
            return f"a KV cache in {options.kv_cache} needs the native kernels"
        if options.quantize != "none":
            return f"quantize {options.quantize} needs the native kernels"
        return share.refusal(config, options.ranks) if options.ranks > 1 else None

    def groups(self, decoder: Decoder) -> Collection[str]:
        """None: it multiplies floats."""
        return ()

    def prepare(self, decoder: Decoder, options: Options) -> "TorchRunnable":
        """Nothing is copied."""
        if options.threads:
            torch.set_num_threads(options.threads)
        return TorchRunnable(decoder)


class TorchRunnable(TorchSampling):
    """A decoder over a paged cache."""

    backend = kernels = "torch"
    rules = True
    sets = True
    exact = False  # matrix products of different heights may round differently
    workspace = WORKSPACE
    device_sampling: DeviceSamplingOps = TorchDeviceSampling()
    token_buckets: tuple[int, ...] = ()

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.decoder.device

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> Cache:
        """Zeros, one tensor for each of `config.memory`: pages in the model's dtype, states in float32."""
        layers = []
        for kind in self.config.memory:
            shape = kind.tensor_shape(blocks * block_size, slots)
            dtype = self.dtype if kind.per_token else torch.float32
            layers.append(torch.zeros(shape, dtype=dtype, device=self.device))
        return Cache(block_size, layers)

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], in the model's dtype, on the CPU: the one wait for a device in a step."""
        return self.launch(batch, pages, observer).cpu()

    @property
    def overlaps(self) -> bool:
        """On a device that computes by itself."""
        return not readable(self.decoder.embed.weight)

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """The same where the weights are. A step's input comes from the CPU; no value is read back."""
        if self.overlaps:
            batch = batch.to(self.device)
        logits_BV: Tensor = self.decoder(batch, PagedAttend(pages, self.device), observer)
        return logits_BV

    def load_spread(self, loads: Sequence[Tensor]) -> tuple[int, float]:
        """See `Runnable`. All loads are read at once."""
        if not loads:
            return 0, 0.0
        parts = torch.cat(list(loads)).cpu().split([len(load_E) for load_E in loads])
        arrays: list[NDArray[np.int64]] = [load_E.numpy() for load_E in parts]
        used = [array for array in arrays if array.any()]
        uneven = sum(float(array.max() / array.mean()) for array in used)
        return sum(int(np.count_nonzero(array)) for array in arrays), uneven
