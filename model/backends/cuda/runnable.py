"""A decoder on the GPU backend as the engine runs it: steps from batches and pages, over a paged cache."""

import torch
from torch import Tensor

from model.backends.cuda.buckets import TOKENS, Buckets
from model.backends.cuda.decoder import AS_LOADED, CudaDecoder
from model.backends.cuda.graphs import GRAPH_BYTES, GraphSet
from model.backends.cuda.inputs import StepInputs, host_inputs, on_device
from model.backends.cuda.kernels.attend import MAX_QUERIES, PROGRAMS, SEGMENT
from model.backends.cuda.outputs import StepOutputs
from model.backends.cuda.places import check_block_size
from model.backends.cuda.quantise import Precision
from model.backends.cuda.recorder import CudaRecorder
from model.backends.cuda.sampling import CudaSampling
from model.backends.cuda.sublayers import PlainStep
from model.backends.torch.attend import PagedAttend
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, Cache, Pages
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.memory import PagedMemory
from model.step import Observer


class CudaRunnable(TorchRunnable):
    """A decoder whose steps run on kernels. Its cache is that of plain torch, which layers without kernels use."""

    backend = "cuda"
    sets = False
    device_sampling = CudaSampling()

    def __init__(self, decoder: Decoder, length: int, precision: Precision = AS_LOADED) -> None:
        super().__init__(decoder)
        self.program = CudaDecoder(decoder, length, precision)
        self.exact = self.program.native
        self.kernels = kernels_name(decoder.device) + ("" if self.program.native else " and torch")
        self.graphs = graphs_of(self.program, decoder.device, length)
        self.token_buckets = () if self.graphs is None else TOKENS
        self.workspace = attention_bytes(self.program, length)
        self.workspace += TorchRunnable.workspace if not self.program.native else 0
        self.workspace += GRAPH_BYTES if self.graphs is not None else 0

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> Cache:
        """As that of plain torch.

        Raises:
            ValueError: blocks of this size have no kernels.
        """
        check_block_size(block_size)
        return super().cache(blocks, block_size, slots)

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], float32, where the weights are. A step's input comes from the CPU; no
        value is read back."""
        if self.graphs is None:
            outputs = self._compute(batch, pages)
        else:
            outputs = self.graphs.run(self._host_inputs(batch, pages), batch.late)
        if observer is not None:
            outputs.report_to(observer, batch.budget, batch.routes)
        return self.program.logits(outputs.normed_BD[: len(batch.rows_B)])

    def _compute(self, batch: Batch, pages: Pages) -> StepOutputs:
        """A step without graphs."""
        plain = None
        if not self.program.native:
            plain = PlainStep(batch.to(self.device), PagedAttend(pages, self.device))
        return self.program.compute(self.inputs(batch, pages), plain)

    def inputs(self, batch: Batch, pages: Pages) -> StepInputs:
        """A step's inputs on the device, with no ids late."""
        return on_device(self._host_inputs(batch, pages), self.device, batch.late)

    def _host_inputs(self, batch: Batch, pages: Pages) -> StepInputs:
        return host_inputs(batch, pages, self.program.tile_rows, self.config.experts.trained)


def graphs_of(program: CudaDecoder, device: torch.device, length: int) -> GraphSet[StepOutputs] | None:
    """What replays decoding steps: on a GPU, if every layer has kernels."""
    if device.type != "cuda" or not program.native:
        return None
    return GraphSet(program.compute, buckets_of(program.config, length), CudaRecorder(device), device)


def buckets_of(config: DecoderConfig, length: int) -> Buckets:
    """The buckets of a decoder that serves so many positions."""
    return Buckets(length, config.experts.trained, config.experts.maximum)


def kernels_name(device: torch.device) -> str:
    """What kernels are compiled for."""
    if device.type != "cuda":
        return "triton interpreted"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton sm_{major}{minor}"


def attention_bytes(program: CudaDecoder, length: int) -> int:
    """The most that segments of keys side by side leave to be merged, float32: see `attend.py`."""
    width = max((kind.key_width for kind in program.config.memory if isinstance(kind, PagedMemory)), default=0)
    segments = -(-length // SEGMENT)
    return PROGRAMS * MAX_QUERIES * segments * (width + 2) * 4
