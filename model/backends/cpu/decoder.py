"""A decoder on native kernels: the same function as `model.decoder.Decoder`, row results independent of the batch.

Activations between blocks are float32 whatever the weights are. Made from a loaded `Decoder`, whose parameters it takes
over, or from the calls that a packed folder holds.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from model.backends.cpu.cache import native_cache
from model.backends.cpu.calls import OpCall, built, calls_of
from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.rules import rule_arguments
from model.backends.cpu.sampling import NativeSampling
from model.backends.cpu.weights import Precision, precision_for
from model.batch import Batch, Cache, Pages
from model.decoder import Decoder, parameter_count
from model.options import KVCacheDType, Quantize
from model.shapes.decoder import DecoderConfig
from model.step import Observer

NO_SLOTS = NO_SNAPSHOTS = torch.empty(0, dtype=torch.int64)


class NativeDecoder(NativeSampling):
    """Packed weights and the program that runs them. `length` bounds the positions served."""

    workspace = 0  # attention works on a few tiles per thread
    backend = "cpu"
    exact = True
    overlaps = False  # the cores that compute are the host's
    device_sampling = None
    token_buckets: tuple[int, ...] = ()
    rules = True
    sets = True
    device = torch.device("cpu")

    def __init__(
        self,
        model: Decoder,
        length: int,
        quantize: Quantize = "none",
        experts_only: bool = True,
        kv_cache: KVCacheDType = "auto",
    ) -> None:
        dtype = model.embed.weight.dtype
        precision = precision_for(dtype, quantize, experts_only)
        calls = calls_of(model, length, precision)
        self._start(model.config, dtype, parameter_count(model), precision, calls, kv_cache)

    @classmethod
    def of_calls(
        cls,
        config: DecoderConfig,
        dtype: torch.dtype,
        parameters: int,
        precision: Precision,
        calls: Iterable[OpCall],
        kv_cache: KVCacheDType = "auto",
    ) -> Self:
        """The decoder that these calls build. Raises as `calls.built`."""
        made = cls.__new__(cls)
        made._start(config, dtype, parameters, precision, calls, kv_cache)
        return made

    def _start(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        parameters: int,
        precision: Precision,
        calls: Iterable[OpCall],
        kv_cache: KVCacheDType,
    ) -> None:
        self.config, self.kernels, self.dtype = config, load().name, dtype
        self.cache_dtype = torch.int8 if kv_cache == "int8" else dtype
        self.parameters, self.precision = parameters, precision
        self._experts = [shape.num_experts for shape in config.mixtures]
        self._program = built(calls, len(config.feed_forward))
        self._run = self._program.run

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> Cache:
        """The cache that this decoder reads and writes."""
        return native_cache(self.config.memory, blocks, block_size, self.cache_dtype, slots)

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], float32."""
        cache = pages.cache
        logits_BV, load_N, used_LT, expert_LTK = self._run(
            batch.ids_T,
            batch.positions_T,
            batch.seeds_T,
            batch.budget.counts_LT,
            batch.budget.k_max,
            *rule_arguments(batch.budget),
            batch.rows_B,
            cache.layers,
            pages.spans_B3,
            pages.tables_BP,
            NO_SLOTS if pages.slots_B is None else pages.slots_B,
            NO_SNAPSHOTS if pages.snapshots_N3 is None else pages.snapshots_N3,
            cache.block_size,
            batch.routes,
        )
        if observer is not None:
            pairs_L = batch.budget.pairs_L
            if used_LT is not None:
                pairs_L = used_LT.sum(1).tolist()
                for_each_mixture(observer.used, used_LT)
            observer.routed_all(pairs_L, load_N, self._experts)
            for_each_mixture(observer.routes, expert_LTK)
        result: Tensor = logits_BV
        return result

    launch = __call__

    def load_spread(self, loads: Sequence[Tensor]) -> tuple[int, float]:
        """See `Runnable`. Each of `loads` is that of all mixtures in one pass."""
        distinct, uneven = torch.ops.moedial.spread.default(loads, self._experts)
        return distinct, uneven


def for_each_mixture(report: Callable[[int, Tensor], None], of_mixtures: Iterable[Tensor]) -> None:
    """Call `report` with the number and the tensor of every mixture."""
    for mixture, values in enumerate(of_mixtures):
        report(mixture, values)
