"""Which backend runs a model: the first that does not refuse it, and why the ones before it did."""

from dataclasses import replace

from model.backends.base import Backend, Runnable
from model.backends.cpu.backend import CpuBackend
from model.backends.torch.backend import TorchBackend
from model.decoder import Decoder
from model.errors import CheckpointError
from model.options import Options
from model.shapes.decoder import DecoderConfig

CPU_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64  # the pages that the GPU kernels read


def backends(device: str) -> tuple[Backend, ...]:
    """Those for a device, the fastest first. Nothing of a GPU is imported for the CPU."""
    if not device.startswith("cuda"):
        return CpuBackend(), TorchBackend()
    from model.backends.cuda.backend import CudaBackend

    return CudaBackend(), TorchBackend()


def provide(device: str) -> None:
    """Have every backend of a device get ready. Called once, when an engine starts."""
    for backend in backends(device):
        backend.provide()


def packing() -> CpuBackend:
    """The one whose models can be packed: kept as the calls that build them (`engine/packing.py`)."""
    return CpuBackend()


def block_size(device: str) -> int:
    """Tokens per block of the cache that the device's fastest backend reads best."""
    return GPU_BLOCK_SIZE if device.startswith("cuda") else CPU_BLOCK_SIZE


def choose(config: DecoderConfig, options: Options) -> tuple[Backend, str]:
    """The backend, and why it is not a faster one ("" for the first).

    Raises:
        CheckpointError: all refuse; the reasons are named.
    """
    divided = options.ranks > 1
    reasons = [f"experts on {options.ranks} ranks run in plain torch"] if divided else []
    for backend in (TorchBackend(),) if divided else backends(options.device):
        reason = backend.refusal(config, options)
        if reason is None:
            return backend, "; ".join(reasons)
        reasons.append(reason)
    raise CheckpointError(": ".join(reversed(reasons)))


def prepare(decoder: Decoder, options: Options) -> tuple[Runnable, str]:
    """The decoder in the form that runs best here, and why it is not a faster one.

    Raises:
        CheckpointError: no backend runs it.
    """
    options = replace(options, dtype=str(decoder.dtype).removeprefix("torch."))
    backend, reason = choose(decoder.config, options)
    return backend.prepare(decoder, options), reason
