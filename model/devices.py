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


def free_memory(device: str) -> Amount:
    """Bytes that can still be allocated on a device: of the CPU within the container's limits."""
    if device == CPU:
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return Amount(free, device)
