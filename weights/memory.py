"""Memory for a model's weights, and whether there is enough. It knows parameters as numbers of bytes, no files."""

import torch
from torch import nn

from model.errors import CheckpointError
from model.resources import available_memory


def check_memory(model: nn.Module) -> None:
    """Raise CheckpointError, with the shortfall, where the weights are larger than the memory that is free."""
    needed = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    free = available_memory().value
    if needed > free:
        sizes = f"the weights need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are free"
        raise CheckpointError(f"{sizes}: {(needed - free) / 1e9:.2f} GB too little")


def take_memory(model: nn.Module) -> None:
    """Allocate uninitialised memory for the parameters of a model on the meta device. (torch's `to_empty` does so too,
    but its imports take as long as reading half a gigabyte.)"""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
