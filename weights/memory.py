"""Memory for a model's weights on a device, and whether there is enough. It knows parameters as numbers of bytes, no
files."""

import torch
from torch import nn

from model.devices import CPU, free_memory
from model.errors import CheckpointError


def check_memory(model: nn.Module, device: str = CPU) -> None:
    """Raise CheckpointError, with the shortfall, where the weights are larger than the memory that is free."""
    needed = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    free = free_memory(device).value
    if needed > free:
        place = "" if device == CPU else f" on {device}"
        sizes = f"the weights need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are free{place}"
        raise CheckpointError(f"{sizes}: {(needed - free) / 1e9:.2f} GB too little")


def take_memory(model: nn.Module, device: str = CPU) -> None:
    """Allocate uninitialised memory for the parameters of a model on the meta device. (torch's `to_empty` does so too,
    but its imports take as long as reading half a gigabyte.)"""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
