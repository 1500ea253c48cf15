"""A decoder on the GPU backend as the engine runs it: steps from batches and pages, over a paged cache."""

import torch
from torch import Tensor

from model.backends.cuda.decoder import AS_LOADED, CudaDecoder
from model.backends.cuda.inputs import StepInputs, host_inputs, on_device
from model.backends.cuda.kernels.attend import MOST_QUERIES, PROGRAMS, SEGMENT
from model.backends.cuda.places import check_block_size
from model.backends.cuda.quantise import Precision
from model.backends.cuda.sampling import CudaSampling
from model.backends.cuda.sublayers import PlainStep
from model.backends.torch.attend import PagedAttend
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, Cache, Pages
from model.decoder import Decoder
from model.shapes.memory import PagedMemory
from model.step import Observer


class CudaRunnable(TorchRunnable):
    """A decoder whose steps run on kernels. Its cache is that of plain torch, which layers without kernels use."""

    backend = "cuda"
    device_sampling = CudaSampling()

    def __init__(self, decoder: Decoder, length: int, precision: Precision = AS_LOADED) -> None:
        super().__init__(decoder)
        self.program = CudaDecoder(decoder, length, precision)
        self.exact = self.program.native
        self.kernels = kernels_name(decoder.device) + ("" if self.program.native else " and torch")
        self.workspace = attention_bytes(self.program, length) + (0 if self.program.native else TorchRunnable.workspace)

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> Cache:
        """As that of plain torch, and one block more, to which padding is written.

        Raises:
            ValueError: blocks of this size have no kernels.
        """
        check_block_size(block_size)
        return super().cache(blocks + 1, block_size, slots)

    def launch(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], float32, where the weights are. A step's input comes from the CPU; no
        value is read back."""
        plain = None
        if not self.program.native:
            plain = PlainStep(batch.to(self.device), PagedAttend(pages, self.device))
        outputs = self.program.compute(self.inputs(batch, pages), plain)
        if observer is not None:
            outputs.tell(observer, batch.budget, batch.routes)
        return outputs.logits_BV

    def inputs(self, batch: Batch, pages: Pages) -> StepInputs:
        """A step's inputs on the device, with no ids late."""
        made = host_inputs(batch, pages, self.program.tile_rows, self.config.experts.trained)
        return on_device(made, self.device, batch.late)


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
    return PROGRAMS * MOST_QUERIES * segments * (width + 2) * 4
