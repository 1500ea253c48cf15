"""The CUDA backend: Triton kernels on an NVIDIA GPU, for the decoders that they are written for (`refusal.py`).

Nothing of triton is imported before it is known to be there.
"""

import importlib.util
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection

import torch

from model.backends.base import Runnable
from model.decoder import Decoder
from model.options import Options
from model.shapes.attention import MLA
from model.shapes.decoder import DecoderConfig

MIN_CAPABILITY = (8, 0)  # bfloat16 in matrix instructions
LATENT_BYTES = 184 << 10  # of shared memory, at DeepSeek-V3's widths

log = logging.getLogger(__name__)


class CudaBackend:
    """Runs a decoder as a chain of kernels."""

    def provide(self) -> None:
        """Kernels are compiled when they first run."""

    def refusal(self, config: DecoderConfig, options: Options) -> str | None:
        """Why there are no kernels on this machine, or none for this decoder."""
        reason = machine_refusal(options) or memory_refusal(config, options.device)
        if reason is not None:
            return reason
        from model.backends.cuda.refusal import refusal

        return refusal(config, options)

    def groups(self, decoder: Decoder) -> Collection[str]:
        """None: its kernels have 8 bits with one scale per output alone."""
        return ()

    def prepare(self, decoder: Decoder, options: Options) -> Runnable:
        """Weights are copied only where they are to have 8 bits. What runs in plain torch is said in the log."""
        from model.backends.cuda.quantise import precision_for
        from model.backends.cuda.runnable import CudaRunnable

        runnable = CudaRunnable(decoder, options.length or decoder.config.context, precision_for(options))
        for reason, layers in Counter(runnable.program.plain).items():
            log.warning("%d of %d layers run in part as plain torch: %s", layers, len(decoder.layers), reason)
        return runnable


def machine_refusal(options: Options) -> str | None:
    """Why no decoder of this dtype runs on kernels here, or None."""
    if not options.device.startswith("cuda"):
        return f"the device {options.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(options.device)
    if capability < MIN_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"{options.device} has compute capability {have}; the GPU kernels need {need}"
    if options.dtype not in ("", "bfloat16"):
        return f"weights of {options.dtype}: the GPU kernels take bfloat16"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", ""), "gcc", "clang", "cc")):
        return "no C compiler (gcc, clang, or what CC names), which triton needs to launch kernels"
    return None


def memory_refusal(config: DecoderConfig, device: str) -> str | None:
    """Why a program of some kernel does not fit this device's multiprocessors, or None."""
    if not any(isinstance(shape, MLA) for shape in config.attention):
        return None
    there: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    if there < LATENT_BYTES:
        return f"latent attention needs {LATENT_BYTES} bytes of shared memory in a program; {device} has {there}"
    return None
