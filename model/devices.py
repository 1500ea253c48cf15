"""Devices that a model can run on: which there are, which one a setting means, and how much memory is free there.

Nothing of CUDA is loaded where torch finds no GPU. Not here: what runs on a device (see `model/backends/`).
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.resources import Amount, available_memory

CPU = "cpu"
_NUMBERED = re.compile(r"cuda:([0-9]{1,2})")


def devices() -> dict[str, str]:
    """The devices of this machine, the default one first, and what each is."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {f"cuda:{number}": torch.cuda.get_device_name(number) for number in gpus} | {CPU: "the processor"}


def resolve(setting: str) -> str:
    """The device that a setting means: "auto" is the first GPU, or the CPU where there is none; "cuda" the first GPU.

    Raises:
        CheckpointError: no such device is there.
    """
    if setting == CPU:
        return CPU
    there = devices()
    if setting == "auto":
        return next(iter(there))
    match = _NUMBERED.fullmatch("cuda:0" if setting == "cuda" else setting)
    device = f"cuda:{int(match[1])}" if match else ""
    if device not in there:
        listed = ", ".join(f"{name} ({what})" for name, what in there.items())
        raise CheckpointError(f"device {setting!r} is not on this machine; it has {listed}")
    return device


def readable(x: Tensor) -> bool:
    """Whether the host reads a tensor's values without waiting. Where it does not, every size in a step must follow
    from what the host knows."""
    return x.device.type == CPU


def tensor_on(values: Sequence[float], device: torch.device) -> Tensor:
    """A tensor of the host's values on a device, which is not waited for."""
    return torch.tensor(values).to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to the host. On a GPU the copies run while the host goes on, after what was launched before
    and beside nothing that comes later: what they read may be overwritten by any later launch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies = [tensor if readable(tensor) else self._copy(tensor) for tensor in tensors]
        on_gpu = next((tensor for tensor in tensors if tensor.is_cuda), None)
        if on_gpu is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_gpu.device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    @staticmethod
    def _copy(tensor: Tensor) -> Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return pinned.copy_(tensor, non_blocking=True)


def free_memory(device: str) -> Amount:
    """Bytes that can still be allocated on a device: of the CPU within the container's limits."""
    if device == CPU:
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return Amount(free, device)
